"""A student learns over every bridge: the same ids, spans of two tokenizers, options; and over none that is wrong."""

import pandas as pd
import pytest
import torch
import yaml

from medkit.distillation import cross_tokenizer, lessons, option_kl, pruning, stages, teacher_cache
from medkit.distillation.cross_tokenizer import AlignmentError
from medkit.distillation.teacher_cache import Signals, SignalsError
from medkit.modeling import batches, loading, trainer
from medkit.params import load_params
from medkit.stage import ROOT, Stage

TRAIN = {
    **{"epochs": 8.0, "batch_size": 4, "slice_tokens": 200, "learning_rate": 3e-3, "warmup_fraction": 0.1},
    "save_every_steps": 99,
    "scale": None,
}


@pytest.fixture(scope="module")
def pieces_tokenizer(make_pieces_tokenizer):
    return make_pieces_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_llama, tokenizer, pieces_tokenizer):
    """Toy models on disk: a teacher with SentencePiece-like tokens, a student with byte-level ones."""
    root = tmp_path_factory.mktemp("toys")
    loading.save_model(make_llama(seed=3, vocab_size=400, initializer_range=0.3), pieces_tokenizer, root / "teacher")
    loading.save_model(make_llama(seed=4, layers=2), tokenizer, root / "student")
    return root


@pytest.fixture
def load(folders, tmp_path):
    """load(bridge, teacher=…, student=…, **changes of the distillation section): the toys' params."""
    raw = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())

    def load(bridge, teacher="teacher", student="student", **changes):
        def side(name):
            return {"source": {"kind": "local", "path": str(folders / name)}, "keep_layers": []}

        raw["models"] |= {"teacher": side(teacher), "device": "cpu", "attention": "sdpa"}
        raw["models"]["student"] = student if student == "pruned_teacher" else side(student)
        raw["distillation"] |= {"correction_train": TRAIN, "student_train": TRAIN, "bridge": bridge, **changes}
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(raw))
        return load_params(path)

    return load


@pytest.fixture
def rows():
    """Eight answered questions and one of the transfer set."""
    organs = ["liver", "heart", "5 µg", "colon"]
    table = [
        (f"q{n}", "train", "choice", f"Which organ? fever {n}", "", organs[: 2 + n % 3], n % 2 if n < 8 else -1)
        for n in range(9)
    ]
    questions = pd.DataFrame(table, columns=["id", "split", "kind", "question", "context", "options", "answer"])
    return questions.assign(split=["train"] * 8 + ["transfer"])


@pytest.fixture
def stage(tmp_path, monkeypatch, folders, rows, tokenizer, pieces_tokenizer):
    """What notebook 02 leaves before it trains students: teacher, signals on its own tokens, scores, the student."""
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path / "outputs"))
    first, stage = Stage("toy", "01_data"), Stage("toy", "02_distillation")
    first.write_table("questions.parquet", rows)
    first.commit()
    cpu = load_params(ROOT / "params" / "smoke.yaml").models.model_copy(update={"device": "cpu"})
    teacher = loading.load_model(folders / "teacher", cpu)
    loading.save_model(teacher, pieces_tokenizer, stage.path("teacher"))
    loading.save_model(loading.load_model(folders / "student", cpu), tokenizer, stage.path("base"))
    key, examples = stages.signals_key(stage, pieces_tokenizer), batches.encode_questions(pieces_tokenizer, rows)
    teacher_cache.capture_signals(teacher, examples, stage.path("signals"), 16, 4, key)
    option_kl.capture_scores(teacher, pieces_tokenizer, rows, stage.path("signals"), key, 512)
    return stage


@pytest.fixture
def made(monkeypatch):
    """A list that grows with every training."""
    made, train = [], trainer.train
    monkeypatch.setattr(trainer, "train", lambda *args, **more: made.append(1) or train(*args, **more))
    return made


# --- over the bridge -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bridge", "term"), [("spans", "span_kl"), ("options", "option_kl")])
def test_a_student_learns_over_the_bridge_and_keeps_its_tokenizer(stage, load, tokenizer, bridge, term):
    log = stages.train_stage("student_kd", "toy", load(bridge, ce_weight=0.0, kl_weight=1.0))
    assert log[term].tail(3).mean() < 0.6 * log[term].head(3).mean()
    kept = loading.load_tokenizer(stage.dir / "student_kd")
    assert kept.get_vocab() == tokenizer.get_vocab() and kept.chat_template == tokenizer.chat_template
    alone = stages.train_stage("student_ce", "toy", load(bridge))
    assert set(alone) & {"span_kl", "option_kl", "forward_kl"} == set()
    assert alone.ce.tail(3).mean() < alone.ce.head(3).mean()


@pytest.mark.parametrize("bridge", ["spans", "options"])
def test_what_was_learned_over_a_bridge_is_read_back(stage, load, made, bridge):
    first = stages.train_stage("student_kd", "toy", load(bridge))
    pd.testing.assert_frame_equal(stages.train_stage("student_kd", "toy", load(bridge)), first)
    assert len(made) == 1


@pytest.mark.parametrize("change", ["bridge", "code", "weight", "signals"])
def test_what_was_learned_over_another_bridge_is_learned_anew(
    stage, load, rows, made, monkeypatch, tmp_path, pieces_tokenizer, make_llama, change
):
    params = load("spans")
    stages.train_stage("student_kd", "toy", params)
    if change == "bridge":
        params = load("options")
    elif change == "code":
        (tmp_path / "alignment.py").write_text("# another loss")
        monkeypatch.setattr(cross_tokenizer, "__file__", str(tmp_path / "alignment.py"))
    elif change == "weight":
        params = load("spans", kl_weight=0.25)
    else:
        other = make_llama(seed=5, vocab_size=400)
        loading.save_model(other, pieces_tokenizer, stage.path("teacher"))
        key, examples = stages.signals_key(stage, pieces_tokenizer), batches.encode_questions(pieces_tokenizer, rows)
        teacher_cache.capture_signals(other, examples, stage.path("signals"), 16, 4, key)
    stages.train_stage("student_kd", "toy", params)
    assert len(made) == 2


def test_over_options_the_transfer_row_is_text_and_the_others_bring_all_their_options(stage, load, rows, tokenizer):
    lesson = stages.read_lesson("student_kd", stage, load("options"), rows)
    batch = lesson.add_extras([7, 8])
    assert batch["num_options"].tolist() == [len(rows.options[7]), 1]
    assert batch["option_is_right"].sum() == 2
    examples = batches.encode_questions(tokenizer, rows)
    assert batch["option_lengths"][-1] == examples[8].num_predicted
    assert batch["teacher_option_logprobs"][:-1].max() < 0 == batch["teacher_option_logprobs"][-1]
    read = option_kl.OptionRows.of_questions(
        tokenizer, rows, option_kl.read_scores(stage.dir / "signals", rows, key(stage))
    )
    assert read.items == examples, "what the student without a teacher reads"


def key(stage):
    return teacher_cache.read_index(stage.dir / "signals")["key"]


def test_scores_of_other_questions_or_another_teacher_are_refused(stage, load, rows):
    folder = stage.dir / "signals"
    assert [len(own) for own in option_kl.read_scores(folder, rows, key(stage))] == [*map(len, rows.options[:8]), 0]
    with pytest.raises(SignalsError, match="no option scores of this teacher for these questions; run capture_scores"):
        option_kl.read_scores(folder, rows, "another")
    with pytest.raises(SignalsError, match="no option scores"):
        option_kl.read_scores(folder, rows[::-1], key(stage))
    (folder / option_kl.SCORES).unlink()
    with pytest.raises(SignalsError, match="no option scores"):
        stages.train_stage("student_kd", "toy", load("options"))


def test_scores_are_asked_for_once(stage, rows, folders, pieces_tokenizer):
    option_kl.capture_scores(None, pieces_tokenizer, rows, stage.dir / "signals", key(stage), 512)  # no teacher needed
    with pytest.raises(AttributeError):
        option_kl.capture_scores(None, pieces_tokenizer, rows[1:], stage.dir / "signals", key(stage), 512)


# --- which bridge fits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "student_kd"])
def test_one_vocabulary_is_not_taken_for_granted(stage, load, made, name):
    with pytest.raises(
        SignalsError, match=r"^distillation\.bridge 'vocabulary': teacher and student have different"
    ) as e:
        stages.train_stage(name, "toy", load("vocabulary"))
    assert str(e.value).endswith("choose a pair with one vocabulary, or the bridge 'spans'")
    assert made == [], "before any training"


def test_tokens_that_do_not_say_their_bytes_are_refused(load, folders, make_llama):
    from tokenizers import Tokenizer, decoders
    from tokenizers import loading as backends
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(backends.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    named = {"unk_token": "[UNK]", "eos_token": "[SEP]", "pad_token": "[UNK]"}
    loading.save_model(make_llama(), PreTrainedTokenizerFast(tokenizer_object=backend, **named), folders / "wordpiece")
    with pytest.raises(AlignmentError, match="WordPiece"):
        lessons.load_tokenizers(load("spans", teacher="wordpiece"))
    assert lessons.load_tokenizers(load("options", teacher="wordpiece")), "options need no bytes"


@pytest.mark.parametrize("student", ["pruned_teacher", "teacher"])
def test_with_one_vocabulary_there_is_one_tokenizer(load, student, pieces_tokenizer):
    teacher, own = lessons.load_tokenizers(load("vocabulary", student=student))
    assert own is teacher and own.get_vocab() == pieces_tokenizer.get_vocab()


@pytest.mark.parametrize("bridge", ["spans", "options"])
def test_with_two_each_keeps_its_own(load, bridge, tokenizer, pieces_tokenizer):
    teacher, own = lessons.load_tokenizers(load(bridge))
    assert teacher.get_vocab() == pieces_tokenizer.get_vocab() and own.get_vocab() == tokenizer.get_vocab()


# --- the order -------------------------------------------------------------------------------------------------------


def test_a_progressive_order_asks_the_teacher_and_a_random_one_does_not(
    stage, load, rows, tokenizer, pieces_tokenizer, monkeypatch, folders
):
    asked, mean_nll = [], Signals.mean_nll
    monkeypatch.setattr(Signals, "mean_nll", lambda self: asked.append(1) or mean_nll(self))
    for bridge in ("spans", "options"):
        assert stages.read_lesson("student_kd", stage, load(bridge), rows).difficulty is None
    assert asked == []
    found = stages.read_lesson("student_kd", stage, load("spans", order="progressive"), rows).difficulty
    params = load("spans")
    teacher = loading.load_model(folders / "teacher", params.models)
    examples = batches.encode_questions(pieces_tokenizer, rows)
    nll = batches.collect_nll(teacher, examples)
    marked = lessons.entities.mark_entities(tokenizer, batches.encode_questions(tokenizer, rows))
    assert found == pruning.order_by_difficulty(nll, marked.densities())
    alone = stages.read_lesson("student_ce", stage, load("spans", order="progressive"), rows)
    assert alone.difficulty == found and alone.add_extras([0]) == {}


def test_the_answers_alone_need_no_signals(stage, load, rows):
    (stage.dir / "signals" / "signals.json").unlink()
    assert len(stages.train_stage("student_ce", "toy", load("spans")))
    with pytest.raises(SignalsError):
        stages.train_stage("student_ce", "toy", load("spans", order="progressive"))


def test_a_vocabulary_hears_entities_too(stage, load, rows, tokenizer, make_llama):
    params = load("vocabulary", teacher="student")
    loading.save_model(make_llama(seed=4, layers=2), tokenizer, stage.path("teacher"))
    key, examples = stages.signals_key(stage, tokenizer), batches.encode_questions(tokenizer, rows)
    teacher_cache.capture_signals(make_llama(seed=4, layers=2), examples, stage.path("signals"), 300, 4, key)
    lesson = stages.read_lesson("student_kd", stage, params, rows)
    extras = lesson.add_extras([1, 3])
    assert {"teacher_ids", "teacher_logprobs", "entity", "entity_weights"} <= set(extras)
    with torch.no_grad():
        batch = batches.collate([examples[1], examples[3]], 0)
        _, terms = lesson.loss(batches.predict(make_llama(seed=4, layers=2), batch), extras)
    assert terms["forward_kl"].abs() < 0.02, "who listens is who spoke"
