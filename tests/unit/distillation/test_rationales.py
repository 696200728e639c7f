"""Rejection sampling keeps what is right, finished and not too easy, counts the rest, and draws as the model thinks."""

import pandas as pd
import pytest
import torch

from medkit.distillation import rationales
from medkit.distillation.rationales import (
    collect_samples,
    encode_rationales,
    keep_verified,
    repeat_to_length,
    sample_rationales,
)
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling import trainer
from medkit.modeling.engine import EngineError, Generation
from medkit.params import RationaleParams
from medkit.prompts import templates
from medkit.stage import MedkitError

PAD = 0


@pytest.fixture
def known(questions):
    """The questions whose answer is known, as training rows; the answers are B, A and A."""
    return questions[questions.answer >= 0].assign(split="labelled").reset_index(drop=True)


class Scripted:
    """Says, question by question, what it was given; `end` is what a finished answer ends with."""

    name = "scripted"

    def __init__(self, tokenizer, said):
        self.tokenizer, self.said, self.asked, self.closed = tokenizer, said, [], 0

    def close(self):
        self.closed += 1

    def generate(self, requests):
        self.asked += requests
        end = [self.tokenizer.eos_token_id]
        texts = [text for texts in self.said for text in texts][: len(requests)]
        ids = [self.tokenizer(text.rstrip("…"), add_special_tokens=False).input_ids for text in texts]
        ends = [[] if text.endswith("…") else end for text in texts]
        return [Generation([*i, *e]) for i, e in zip(ids, ends, strict=True)]


SAID = [
    ["It has ascorbic acid. Answer: B", "Guess. Answer: C", "It has ascorbic acid. Answer: B", "So Answer: B…"],
    ["Answer: A", "Insulin does. Answer: A", "It is A. Answer: A", "Answer: A"],
    ["Who knows?", "Answer: B", "Answer: A or B", "Trials say no. Answer: B"],
]


@pytest.fixture
def engine(tokenizer):
    return Scripted(tokenizer, SAID)


def test_each_question_is_asked_so_often_with_its_options(engine, tokenizer, known):
    sampled = sample_rationales(engine, tokenizer, known, 4, 60)
    assert sampled.id.tolist() == [id for id in known.id for _ in range(4)]
    assert sampled["sample"].tolist() == [0, 1, 2, 3] * 3
    assert {(r.max_new_tokens, r.end_ids) for r in engine.asked} == {(60, (tokenizer.eos_token_id,))}
    asked = tokenizer.decode(engine.asked[0].prompt_ids)
    assert "B. vitamin C" in asked and "Answer:” and the letter" in asked
    assert sampled.right.tolist() == [True, False, True, True, *[True] * 4, *[False] * 4]
    assert sampled.finished.tolist() == [True, True, True, False, *[True] * 8]


def test_what_is_right_finished_new_and_not_too_easy_is_kept(engine, tokenizer, known):
    kept, counts = keep_verified(sample_rationales(engine, tokenizer, known, 4, 60))
    assert kept[["id", "text"]].to_numpy().tolist() == [["q0", SAID[0][0]]]
    assert counts.to_dict("records") == [
        {"source": "exam", "asked": 2, "sampled": 8, "right": 7, "kept": 1, "too_easy": 1},
        {"source": "trial", "asked": 1, "sampled": 4, "right": 0, "kept": 0, "too_easy": 0},
    ]


@pytest.mark.parametrize(
    ("too_easy", "kept_ids"), [(2.0, ["q0", "q1", "q1", "q1"]), (1.0, ["q0"]), (0.75, []), (0.76, ["q0"])]
)
def test_the_bound_says_what_is_too_easy(engine, tokenizer, known, too_easy, kept_ids):
    kept, counts = keep_verified(sample_rationales(engine, tokenizer, known, 4, 60), too_easy)
    assert kept.id.tolist() == kept_ids
    assert counts.too_easy.sum() == {2.0: 0, 1.0: 1, 0.76: 1, 0.75: 2}[too_easy]


def test_kept_rows_become_examples_of_reason_answer_and_end(engine, tokenizer, known):
    kept, _ = keep_verified(sample_rationales(engine, tokenizer, known, 4, 60))
    (example,) = encode_rationales(tokenizer, known, kept)
    given, learned = example.input_ids[: example.loss_start], example.input_ids[example.loss_start :]
    assert given == list(engine.asked[0].prompt_ids)
    assert tokenizer.decode(learned[:-1]) == SAID[0][0] and learned[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("change", [{"split": "test"}, {"answer": -1}], ids=["test material", "no answer"])
def test_questions_that_may_not_be_learned_from_are_refused(engine, tokenizer, known, change):
    with pytest.raises(MedkitError, match=r"3 of 3 questions \(e\.g\. q0\).*data\.training_rows"):
        sample_rationales(engine, tokenizer, known.assign(**change), 4, 60)
    assert not engine.asked


# --- kept, and made into a lesson ------------------------------------------------------------------------------------


@pytest.fixture
def collect(engine, tokenizer, known, tmp_path):
    """collect(speaker, seed, **changes of the section): the samples, from the engine or from the file."""

    def run(speaker="teacher", seed=0, **changes):
        settings = {"questions": "all", "samples": 4, "max_new_tokens": 60, "temperature": 1.0, "too_easy": 1.0}
        section = RationaleParams(**{**settings, **changes})
        return collect_samples(
            tmp_path / "rationales.parquet", speaker, lambda: engine, tokenizer, known, section, seed
        )

    return run


def test_what_was_sampled_is_read_back(collect, engine, tokenizer, known):
    first = collect()
    pd.testing.assert_frame_equal(first, sample_rationales(Scripted(tokenizer, SAID), tokenizer, known, 4, 60))
    assert engine.closed == 1
    pd.testing.assert_frame_equal(collect(), first)
    pd.testing.assert_frame_equal(collect(too_easy=2.0), first)  # what is learned of it may change
    assert (engine.closed, len(engine.asked)) == (1, 12)


@pytest.mark.parametrize(
    "change", [{"speaker": "other"}, {"seed": 1}, {"samples": 2}, {"max_new_tokens": 9}, {"temperature": 0.5}], ids=str
)
def test_another_speaker_or_way_to_ask_is_asked_anew(collect, engine, change):
    collect()
    collect(**change)
    assert engine.closed == 2
    collect(**change)
    assert engine.closed == 2


def test_fewer_questions_are_drawn_by_the_seed(collect, known):
    drawn = {seed: tuple(collect(seed=seed, questions=2).id.unique()) for seed in range(8)}
    assert {len(ids) for ids in drawn.values()} == {2} and len(set(drawn.values())) > 1
    assert collect(questions=99).id.nunique() == len(known)


def test_an_engine_that_fails_is_closed_and_leaves_no_file(collect, engine, tmp_path):
    def fail(requests):
        raise EngineError("out of memory")

    engine.generate = fail
    with pytest.raises(EngineError, match="out of memory"):
        collect()
    assert engine.closed == 1 and not list(tmp_path.iterdir())


def test_verified_answers_are_repeated_until_there_is_as_much_to_learn(engine, tokenizer, known):
    verified, _ = keep_verified(sample_rationales(engine, tokenizer, known, 4, 60), too_easy=2.0)
    once = encode_rationales(tokenizer, known, verified)
    total = sum(example.num_predicted for example in once)
    for wanted in (1, total, total + 1, 3 * total):
        repeated = repeat_to_length(once, wanted)
        assert repeated == [once[n % len(once)] for n in range(len(repeated))]
        assert sum(e.num_predicted for e in repeated[:-1]) < wanted <= sum(e.num_predicted for e in repeated)
    assert repeat_to_length([], total) == []


def test_a_toy_teacher_s_reasons_are_verified(make_llama, make_section, tokenizer, known, tmp_path):
    """It has learned two answers by heart, one of them wrong: only the other's samples can be kept."""
    teacher = make_llama(seed=3)
    taught = pd.DataFrame([("q0", "C it is. Answer: B"), ("q2", "No. Answer: B")], columns=["id", "text"])
    section = make_section(epochs=60.0, learning_rate=1e-2, save_every_steps=1000)
    examples = encode_rationales(tokenizer, known, taught)
    log = trainer.train(teacher, examples, section, trainer.cross_entropy, tmp_path / "c", seed=0)
    assert log.loss.iloc[-1] < 0.01
    torch.manual_seed(0)
    engine = TorchEngine(teacher, PAD, scheduler="continuous", batch_tokens=1024, temperature=0.5)
    asked = known[known.id.isin(taught.id)]
    sampled = sample_rationales(engine, tokenizer, asked, 4, 30)
    engine.close()
    kept, counts = keep_verified(sampled, too_easy=2.0)
    assert set(kept.id) == {"q0"} and "C it is. Answer: B" in set(kept.text)
    assert counts.set_index("source").right.to_dict() == sampled.groupby("source").right.sum().to_dict()
    assert counts.set_index("source").right["trial"] == 0
    (first, *_) = encode_rationales(tokenizer, asked, kept)
    assert (
        first.input_ids[: first.loss_start]
        == templates.encode(tokenizer, templates.render(known.to_dict("records")[0], rationales.TEMPLATE))[0]
    )

    # a student that learns them answers the question right, with the reason, and nothing else of what its teacher said
    chosen = repeat_to_length(encode_rationales(tokenizer, asked, kept), 20 * first.num_predicted)
    student, quick = make_llama(seed=4), make_section(epochs=12.0, learning_rate=1e-2, save_every_steps=1000)
    trainer.train(student, chosen, quick, trainer.cross_entropy, tmp_path / "s", seed=0)
    engine = TorchEngine(student, PAD, scheduler="static", batch_tokens=1024)
    answers = sample_rationales(engine, tokenizer, asked, 1, 30).set_index("id")
    engine.close()
    assert answers.loc["q0", ["finished", "right"]].all() and answers.text["q0"] in set(kept.text)
