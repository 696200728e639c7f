"""A model's answers are written once; finished ones become rows; of answers with reasons the right ones stay."""

from types import SimpleNamespace

import pandas as pd
import pytest
from toys import SPECIAL, Scripted

from medkit.data import splits
from medkit.data.instructions import make_instructions
from medkit.distillation import answers
from medkit.distillation.answers import answer_rows, collect_answers, encode_verified, keep_verified, write_answers
from medkit.modeling import batches, loading
from medkit.modeling.engine import EngineError
from medkit.prompts import templates
from medkit.stage import MedkitError


@pytest.fixture
def known(questions):
    """The questions whose answer is known, as training rows; the answers are B, A and A."""
    return questions[questions.answer >= 0].assign(split="labelled").reset_index(drop=True)


TEXTS = [
    *["It has ascorbic acid. Answer: B", "Guess. Answer: C", "It has ascorbic acid. Answer: B", "So Answer: B"],
    *["Answer: A", "Insulin does. Answer: A", "It is A. Answer: A", "Answer: A"],
    *["Who knows?", "Answer: B", "Answer: A or B", "Trials say no. Answer: B"],
]
END = SPECIAL[2]
WRITTEN = [text + END * (place != 3) for place, text in enumerate(TEXTS)]  # the fourth is cut off


@pytest.fixture
def engine(tokenizer):
    return Scripted(tokenizer, WRITTEN)


def sample(engine, tokenizer, known):
    return write_answers(engine, tokenizer, known, 60, 4, templates.RATIONALE)


def test_each_question_is_asked_so_often_with_its_options(engine, tokenizer, known):
    table = sample(engine, tokenizer, known)
    assert table.id.tolist() == [id for id in known.id for _ in range(4)]
    assert table["sample"].tolist() == [0, 1, 2, 3] * 3 and table.text.tolist() == TEXTS
    assert table.finished.tolist() == [True, True, True, False, *[True] * 8]
    assert {(r.max_new_tokens, r.end_ids) for r in engine.asked} == {(60, (tokenizer.eos_token_id,))}
    asked = tokenizer.decode(engine.asked[0].prompt_ids)
    assert "B. vitamin C" in asked and "Answer:” and the letter" in asked
    with pytest.raises(MedkitError, match="must not answer test questions for training"):
        write_answers(engine, tokenizer, known.assign(split="test"), 60)
    assert len(engine.asked) == 12


def test_an_instruction_is_answered_after_its_whole_chat_and_the_answer_is_learned_there(tokenizer):
    contents, roles = ["Be kind.", "My toe hurts.", "Since when?", "May", "x"], ["system", *["user", "assistant"] * 2]
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    records = make_instructions(chat, "train", None, 1)
    rows = pd.DataFrame(records).assign(id=["a", "b"], source="notes", split="transfer")
    rows = splits.training_rows(rows, "transfer")
    texts = ["1. Rest\n2. Ice", "Since\nMay?"]
    engine = Scripted(tokenizer, [text + END for text in texts])
    taught = answer_rows(rows, write_answers(engine, tokenizer, rows, 60))
    for request, example, text in zip(engine.asked, batches.encode_questions(tokenizer, taught), texts, strict=True):
        assert example.input_ids[: example.loss_start] == list(request.prompt_ids)
        assert tokenizer.decode(example.input_ids[example.loss_start : -1]) == text
    asked = tokenizer.decode(engine.asked[1].prompt_ids)
    assert all(content in asked for content in contents[:-1]) and templates.SYSTEM not in asked


def test_what_is_right_finished_new_and_not_too_easy_is_kept(engine, tokenizer, known):
    kept, counts = keep_verified(sample(engine, tokenizer, known), known)
    assert kept[["id", "text"]].to_numpy().tolist() == [["q0", TEXTS[0]]]
    assert counts.to_dict("records") == [
        {"source": "exam", "asked": 2, "sampled": 8, "right": 7, "kept": 1, "too_easy": 1},
        {"source": "trial", "asked": 1, "sampled": 4, "right": 0, "kept": 0, "too_easy": 0},
    ]
    (example,) = encode_verified(tokenizer, known, kept)
    assert example.input_ids[: example.loss_start] == list(engine.asked[0].prompt_ids)
    assert tokenizer.decode(example.input_ids[example.loss_start :]) == TEXTS[0] + tokenizer.eos_token


def test_what_is_too_easy_is_left_out_first_by_the_student_s_own_samples(engine, tokenizer, known):
    samples = sample(engine, tokenizer, known)
    for too_easy, kept_ids in ((2.0, ["q0", "q1"]), (1.0, ["q0"]), (0.76, ["q0"]), (0.75, [])):
        kept, counts = keep_verified(samples, known, too_easy)
        assert kept.id.tolist() == kept_ids and counts.too_easy.sum() == 2 - len(kept_ids)
    own = write_answers(Scripted(tokenizer, [f"Answer: B{END}"] * 2 + ["Who knows?"]), tokenizer, known, 60)
    kept, counts = keep_verified(samples, known, 1.0, own)
    assert kept[["id", "text"]].to_numpy().tolist() == [["q1", "Answer: A"]], "the shortest"
    assert counts.set_index("source").too_easy.to_dict() == {"exam": 1, "trial": 0}


def test_a_thought_is_verified_by_its_answer_and_learned_with_it(thinker, known):
    engine = Scripted(thinker, ["It is A.\n</think>"] * 2, [f"\n\nAnswer: B{END}"] * 2)
    table = write_answers(engine, thinker, known[known.id == "q0"], 60, 2, templates.RATIONALE, 20)
    assert table[["thought", "text"]].to_numpy().tolist() == [["It is A.", "Answer: B"]] * 2 and table.finished.all()
    kept, _ = keep_verified(table, known, too_easy=2.0)
    (example,) = encode_verified(thinker, known, kept)
    assert example.input_ids[: example.loss_start] == list(engine.asked[0].prompt_ids)
    learned = thinker.decode(example.input_ids[example.loss_start :])
    assert learned == "It is A.\n</think>\n\nAnswer: B<|im_end|>"


def test_finished_answers_become_rows_that_are_asked_as_in_training(tokenizer, known):
    engine = Scripted(tokenizer, ["lemon juice" + END, "too long", END])
    table = write_answers(engine, tokenizer, known, 60)
    assert table.finished.tolist() == [True, False, False], "an empty answer teaches nothing"
    (row,) = answer_rows(known, table).to_dict("records")
    assert (row["id"], row["options"], row["answer"]) == (known.id[0], ["lemon juice"], 0)
    (example,) = batches.encode_questions(tokenizer, pd.DataFrame([row]))
    assert example.input_ids[: example.loss_start] == list(engine.asked[0].prompt_ids)
    assert tokenizer.decode(example.input_ids[example.loss_start : -1]) == "lemon juice"


def test_rows_are_repeated_by_source_and_others_fill_the_place_of_a_source_without_rows():
    sources = ["icd", "records", "icd"]
    assert answers.repeat_rows(sources, {"icd": 5, "records": 2}) == [0, 2, 0, 2, 0, 1, 1]
    assert answers.repeat_rows(sources, {"icd": 2, "exam": 3}) == [0, 2, 0, 2, 0]
    with pytest.raises(MedkitError, match="no rows to learn from"):
        answers.repeat_rows([], {"icd": 2})


@pytest.fixture
def collect(engine, tokenizer, known, make_llama, models_params, tmp_path, tmp_path_factory):
    """collect(**changes): the answers, from the engine or from the file."""

    def run(writer=0, max_new_tokens=60, num_samples=4, temperature=1.0, seed=0):
        folder = tmp_path_factory.getbasetemp() / f"writer{writer}"
        if not folder.is_dir():
            loading.save_model(make_llama(seed=writer, layers=1), tokenizer, folder)
        params = SimpleNamespace(models=models_params, inference=SimpleNamespace(batch_tokens=512), seed=seed)
        path, how = tmp_path / "answers.parquet", (max_new_tokens, num_samples, temperature, templates.RATIONALE)
        return collect_answers(path, folder, params, known, lambda *args, **settings: engine, *how)

    return run


def test_what_was_written_is_read_back_unless_it_is_asked_otherwise(collect, engine, tokenizer, known, tmp_path):
    pd.testing.assert_frame_equal(collect(), sample(Scripted(tokenizer, WRITTEN), tokenizer, known))
    changes = [{"writer": 1}, {"temperature": 0.5}, {"seed": 1}, {"num_samples": 2}, {"max_new_tokens": 9}]
    for number, change in enumerate([{}, *changes], 1):
        pd.testing.assert_frame_equal(collect(**change), collect(**change))
        assert engine.closed == number, change
    (tmp_path / "answers.parquet").write_bytes(b"cut short")
    assert len(collect(**changes[-1])) == 12 and engine.closed == 7


def test_a_killed_run_goes_on_behind_its_last_part(collect, engine, tokenizer, known, monkeypatch):
    monkeypatch.setattr(answers, "PART_QUESTIONS", 1)
    generate, engine.calls = engine.generate, [WRITTEN[:4]]

    def die_at_the_third(requests):
        if len(engine.asked) == 8:
            raise EngineError("the server is gone")
        return generate(requests)

    engine.generate = die_at_the_third
    with pytest.raises(EngineError, match="gone"):
        collect()
    assert engine.closed == 1
    engine.generate = generate
    assert collect().id.tolist() == [id for id in known.id for _ in range(4)]
    assert len(engine.asked) == 12, "two questions were not asked again"
