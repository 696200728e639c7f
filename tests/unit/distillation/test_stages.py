"""Teacher and students: each is trained once, with its loss, over every alignment; what is missing is named."""

import pandas as pd
import pytest
import torch
from toys import assert_same_weights

from medkit.distillation import answers, entities, losses, pruning, stages, teacher_cache
from medkit.distillation.teacher_cache import TeacherCache
from medkit.lora import adapters
from medkit.modeling import batches, loading, trainer
from medkit.params import load_params
from medkit.stage import ROOT, MedkitError, Stage, StageError
from medkit.variants import VARIANTS, list_variants

TRAIN = {"epochs": 1.0, "batch_size": 4, "slice_tokens": 200, "learning_rate": 1e-2, "warmup_fraction": 0.1}
TRAIN |= {"save_every_steps": 9, "bf16": False, "gradient_checkpointing": False}
RATIONALES = {"questions": 4, "samples": 2, "max_new_tokens": 12, "temperature": 1.0, "too_easy": 2.0, "server": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_llama, tokenizer, make_pieces_tokenizer):
    """Toy models on disk: a teacher, a student with the same tokens, and a teacher with SentencePiece-like tokens."""
    root = tmp_path_factory.mktemp("toys")
    loading.save_model(make_llama(seed=5), tokenizer, root / "teacher")
    loading.save_model(make_llama(seed=4, layers=2), tokenizer, root / "student")
    pieces = make_llama(seed=3, vocab_size=400, initializer_range=0.3)
    loading.save_model(pieces, make_pieces_tokenizer(), root / "pieces")
    return root


@pytest.fixture
def load(folders):
    """load(alignment, **changes of the distillation section): the toys' params."""

    def side(name):
        return {"source": {"kind": "local", "path": str(folders / name)}, "keep_layers": []}

    def load(alignment="tokens", **changes):
        sides = {"teacher": side("teacher"), "student": "pruned_teacher"}
        if alignment == "spans":
            sides = {"teacher": side("pieces"), "student": side("student")}
        section = {"correction_train": TRAIN, "student_train": TRAIN, "alignment": alignment, "rationales": None}
        sections = {"models": {**sides, "device": "cpu", "attention": "sdpa"}, "distillation": section | changes}
        sections["inference"] = {"max_new_tokens": 12, "batch_tokens": 512}
        overrides = {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}
        return load_params(ROOT / "params" / "smoke.yaml", overrides)

    return load


@pytest.fixture
def questions():
    """Three private rows, four labelled, six of the transfer set and two of validation."""
    organs, splits = ["liver", "heart", "5 µg", "colon"], ["private"] * 3 + ["labelled"] * 4 + ["transfer"] * 6
    table = [
        (f"q{n}", "choice", f"Which organ? fever {n}", "", organs[: 2 + n % 3], n % 2, split, f"g{n}")
        for n, split in enumerate([*splits, "valid", "valid"])
    ]
    names = ["id", "kind", "question", "context", "options", "answer", "split", "group"]
    return pd.DataFrame(table, columns=names).assign(source="exam")


@pytest.fixture
def rows(questions):
    """What student_kd reads: the labelled rows, and the transfer rows with an answer of the teacher."""
    rows = questions[questions.split.isin(["labelled", "transfer"])].reset_index(drop=True)
    transfer = rows.split == "transfer"
    options = [["the liver"] if known else own for known, own in zip(transfer, rows.options, strict=True)]
    return rows.assign(options=options, answer=rows.answer.where(~transfer, 0))


@pytest.fixture
def stage(tmp_path, monkeypatch, folders, questions, tokenizer, load):
    """A run with questions, a teacher and an untrained student; nothing captured or trained."""
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path / "outputs"))
    first, stage = Stage("toy", "01_data"), Stage("toy", "02_distillation")
    first.write_table("questions.parquet", questions)
    first.commit()
    for source, name in (("teacher", "teacher"), ("student", "base")):
        loading.save_model(loading.load_model(folders / source, load().models), tokenizer, stage.path(name))
    return stage


@pytest.fixture
def capture(stage, rows, folders, load, monkeypatch):
    """capture(params): what notebook 02 writes before student_kd is trained: the teacher, its answers and its cache."""

    def capture(params):
        teacher_tokenizer, _ = stages.load_tokenizers(params)
        model = loading.load_model(loading.local_folder(params.models.teacher), params.models)
        loading.save_model(model, teacher_tokenizer, stage.path("teacher"))
        monkeypatch.setattr(answers, "write_answers", the_liver)
        key, examples = (
            stages.teacher_key(stage, params, teacher_tokenizer),
            batches.encode_questions(teacher_tokenizer, rows),
        )
        layers = losses.DistillationLoss.from_params(params.distillation).teacher_layers
        return teacher_cache.capture_teacher(lambda: model, examples, stage.path("teacher_cache"), 300, 4, key, layers)

    return capture


class NoEngine:
    def __init__(self, *args, **settings): ...
    def close(self): ...


def the_liver(engine, tokenizer, questions, *settings):
    table = questions[["id", "source"]].assign(sample=0, thought="", text="the liver", tokens=3, finished=True)
    return table.reset_index(drop=True)


@pytest.fixture
def trained(monkeypatch):
    """A list that grows with every training."""
    trained, train = [], trainer.train
    monkeypatch.setattr(trainer, "train", lambda *args, **more: trained.append(1) or train(*args, **more))
    return trained


@pytest.mark.parametrize("by_lora", [True, False])
def test_the_command_corrects_the_teacher_on_private_and_labelled_rows(stage, load, tokenizer, questions, by_lora):
    params = load() if by_lora else load(correction=None)
    stages.train_stage("teacher", "toy", params)
    adapted = loading.load_model(loading.local_folder(params.models.teacher), params.models)
    if by_lora:
        adapted = adapters.attach(adapted, params.distillation.correction, params.seed)
    examples, section = batches.encode_questions(tokenizer, questions[:7]), params.distillation.correction_train
    trainer.train(adapted, examples, section, trainer.cross_entropy, stage.path("by_hand"), params.seed)
    expected = adapters.merge(adapted) if by_lora else adapted
    assert_same_weights(loading.load_model(stage.dir / "teacher", params.models), expected)


def test_students_see_as_many_examples_and_no_transfer_label(stage, load, questions, capture, monkeypatch, tokenizer):
    """But the ceiling, which is told the answers of the transfer rows."""
    params = load(students=["student_hard", "student_self", "student_ceiling"])
    capture(params)
    seen = {}

    def see(stage, name, model, tokenizer, examples, *settings, **options):
        seen[name] = examples

    monkeypatch.setattr(stages, "train_once", see)
    loading.save_model(loading.load_model(stage.dir / "base", params.models), tokenizer, stage.path("student_ce"))
    for name in stages.list_students(params):
        stages.train_student(name, stage, params, questions, NoEngine)
    assert list(seen) == ["student_ce", "student_hard", "student_self", "student_kd", "student_ceiling"]
    assert {name: len(examples) for name, examples in seen.items()} == dict.fromkeys(seen, 10)

    labelled = [tuple(e.input_ids) for e in batches.encode_questions(tokenizer, questions[3:7])]
    truths = [tuple(e.input_ids) for e in batches.encode_questions(tokenizer, questions[7:13])]
    for name, examples in seen.items():
        read = {tuple(e.input_ids) for e in examples}
        assert set(labelled) <= read
        assert read == set(labelled) if name == "student_ce" else len(read) == 10
        assert bool(read & set(truths)) == (name == "student_ceiling")
    assert seen["student_kd"] == seen["student_hard"]


def test_a_teacher_that_does_not_lead_stops_the_notebook():
    lead = stages.check_lead({"icd": 0.9, "records": 0.8}, {"icd": 0.7, "records": 0.5}, 0.1)
    assert lead == pytest.approx({"icd": 0.2, "records": 0.3})
    sentence = r"leads student_ce by \{'records': 0.05\}.*min_teacher_lead \(0.1\).*private rows"
    with pytest.raises(StageError, match=sentence):
        stages.check_lead({"icd": 0.9, "records": 0.55}, {"icd": 0.7, "records": 0.5}, 0.1)
    assert stages.check_lead({"icd": 0.1}, {"icd": 0.7}, None) == pytest.approx({"icd": -0.6})


HIDDEN = {"hidden_weight": 1.0, "hidden_layers": [[1, 2]]}
TERMS = [("tokens", ["forward_kl", "hidden"], HIDDEN), ("spans", ["span_kl"], {})]


@pytest.mark.parametrize(("alignment", "terms", "changes"), TERMS, ids=["tokens", "spans"])
def test_a_student_learns_from_its_teacher_once(stage, load, capture, trained, tokenizer, alignment, terms, changes):
    train = {**TRAIN, "epochs": 8.0, "learning_rate": 3e-3, "save_every_steps": 99}
    params = load(alignment, student_train=train, ce_weight=0.0, kl_weight=1.0, **changes)
    capture(params)
    log = stages.train_stage("student_kd", "toy", params, NoEngine)
    for term in terms:
        assert log[term].tail(3).mean() < 0.6 * log[term].head(3).mean()
    stage.commit()
    pd.testing.assert_frame_equal(stages.train_stage("student_kd", "toy", params), log)
    assert len(trained) == 1 and stage.manifest(), "nothing changed"
    student = loading.load_model(stage.dir / "student_kd", params.models)
    assert not [name for name in student.state_dict() if "projection" in name]
    saved = loading.load_tokenizer(stage.dir / "student_kd")
    assert saved.get_vocab() == tokenizer.get_vocab() and saved.chat_template == tokenizer.chat_template


def test_a_teacher_as_its_own_student_has_no_divergence(stage, load, rows, capture, tokenizer, make_llama, folders):
    params = load()
    cache, examples = capture(params), batches.encode_questions(tokenizer, rows)
    loss, add_extras = stages.distillation_loss(params, examples, examples, [*range(10), 1, 3], cache)
    extras = add_extras([1, 11])
    assert {"teacher_ids", "teacher_logprobs"} <= set(extras) and "entity" not in extras
    with_entities = load(entity_weight=1.0)
    _, add_more = stages.distillation_loss(with_entities, examples, examples, [*range(10), 1, 3], cache)
    assert {"entity", "entity_weights"} <= set(add_more([1, 11]))
    model = loading.load_model(folders / "teacher", params.models)
    with torch.no_grad():
        _, terms = loss(batches.predict(model, batches.collate([examples[1], examples[3]], 0)), extras)
    assert terms["forward_kl"].abs() < 0.02
    loading.save_model(make_llama(seed=9), tokenizer, stage.path("teacher"))  # another teacher
    with pytest.raises(MedkitError, match="capture the teacher again"):
        TeacherCache(stage.dir / "teacher_cache", stages.teacher_key(stage, params, tokenizer), examples)


def test_two_vocabularies_are_refused_before_any_training(stage, load, trained):
    raw = load("spans").model_dump()
    raw["distillation"]["alignment"] = "tokens"
    with pytest.raises(StageError, match=r"'tokens', but teacher and student have different.*set it to 'spans'"):
        stages.train_stage("teacher", "toy", type(load()).model_validate(raw), NoEngine)
    assert trained == []


def test_a_progressive_order_is_that_of_the_cache(stage, load, questions, rows, capture, tokenizer, monkeypatch):
    cache, given = capture(load()), []
    monkeypatch.setattr(stages, "train_once", lambda *args, difficulty=None, **more: given.append(difficulty))
    for name in ("student_ce", "student_kd"):
        stages.train_student(name, stage, load(order="progressive"), questions, NoEngine)
    densities = entities.mark_entities(tokenizer, batches.encode_questions(tokenizer, rows)).densities()
    assert given == [None, pruning.order_by_difficulty(cache.mean_nll(), densities)]


@pytest.mark.parametrize(("alignment", "term"), [("tokens", "forward_kl"), ("spans", "span_kl")])
def test_a_student_learns_its_teacher_s_verified_answers(stage, load, capture, monkeypatch, tokenizer, alignment, term):
    params = load(alignment, rationales=RATIONALES, students=["student_seq_kd"])
    capture(params)
    with pytest.raises(StageError, match="none of 4 rationales was verified; raise distillation"):
        stages.train_stage("student_seq", "toy", params, NoEngine)
    (stage.dir / "teacher_rationales.parquet").unlink()
    monkeypatch.setattr(answers, "write_answers", lambda *a: the_liver(*a).assign(text="So. Answer: A"))
    log = stages.train_stage("student_seq", "toy", params, NoEngine)
    one = len(tokenizer("So. Answer: A", add_special_tokens=False).input_ids) + 1
    with_kl = stages.train_stage("student_seq_kd", "toy", params, NoEngine)
    assert with_kl.loss_tokens.tolist() == log.loss_tokens.tolist() and (with_kl[term] > 0).all()
    load_model, opened = loading.load_model, []
    monkeypatch.setattr(loading, "load_model", lambda path, *more: opened.append(path) or load_model(path, *more))
    assert stages.train_stage("student_seq_kd", "toy", params, NoEngine)[term].equals(with_kl[term])
    assert opened and stage.dir / "teacher" not in opened, "its whole cache needs no teacher"
    captured = teacher_cache.read_index(stage.dir / stages.RATIONALE_CACHE)
    assert captured["num_examples"] == pd.read_parquet(stage.dir / "rationale_yield.parquet").kept.sum()
    assert alignment == "spans" or captured["num_positions"] == one * captured["num_examples"]


def test_a_student_of_reasons_sees_as_many_tokens_in_as_many_steps(stage, load, capture, monkeypatch):
    params, given = load(rationales=RATIONALES), {}
    capture(params)
    monkeypatch.setattr(answers, "write_answers", lambda *a: the_liver(*a).assign(text="So. " * 5 + "Answer: A"))

    def spy(stage, name, student, tokenizer, examples, section, *rest, **options):
        lengths = [len(example.input_ids) for example in examples]
        given[name] = sum(lengths), max(lengths), -(-len(examples) // section.batch_size)

    monkeypatch.setattr(stages, "train_once", spy)
    for name in ("student_ce", "student_seq"):
        stages.train_stage(name, "toy", params, NoEngine)
    (tokens, _, steps), (reasons_tokens, longest, reasons_steps) = given["student_ce"], given["student_seq"]
    assert tokens - longest - 5 < reasons_tokens <= tokens and reasons_steps == steps  # the next one can be longer
    assert answers.repeat_examples([3, 2, 5], 13) == [0, 1, 2, 0] and answers.repeat_examples([3], 0) == [0]


def test_rationales_that_a_student_cannot_hold_are_left_out(stage, load, capture, monkeypatch):
    """By another vocabulary they can be longer than by the teacher's."""
    params, long = load(rationales=RATIONALES), "So. " * 600 + "Answer: A"
    capture(params)

    def write(texts):
        return lambda *a: the_liver(*a).assign(text=lambda table: [texts(number) for number in range(len(table))])

    monkeypatch.setattr(answers, "write_answers", write(lambda number: long))
    with pytest.raises(StageError, match=r"(\d) of \1 verified rationales are longer than the 1024 tokens"):
        stages.train_stage("student_seq", "toy", params, NoEngine)
    (stage.dir / "teacher_rationales.parquet").unlink()
    monkeypatch.setattr(answers, "write_answers", write(lambda number: long if number == 1 else "So. Answer: A"))
    with pytest.warns(UserWarning, match="1 of 2 verified rationales are longer"):
        log = stages.train_stage("student_seq", "toy", params, NoEngine)
    assert log.loss_tokens.sum() < 200


def test_every_student_that_a_profile_asks_for_is_evaluated(load):
    """Notebook 04 writes this list of variants for notebooks 05 and 06."""
    params = load(students=["student_ceiling", "student_hard", "student_self", "student_seq_kd"], rationales=RATIONALES)
    students = stages.list_students(params)
    assert tuple(students) == stages.STUDENTS
    folders = {name: variant.folder for name, variant in list_variants(params).items()}
    assert folders.keys() == {name for name, variant in VARIANTS.items() if variant.folder is not None}
    assert [folders[name] for name in students] == [f"02_distillation/{name}" for name in students]
    assert stages.list_students(load(students=[])) == ["student_ce", "student_kd"]


def test_what_is_missing_is_named_with_its_cure(stage, load):
    with pytest.raises(StageError, match="no trained stage 'student'; choose one of teacher, student_ce"):
        stages.train_stage("student", "toy", load())
    with pytest.raises(StageError, match=r"teacher_answers\.parquet is not there: run notebook 02_distillation"):
        stages.train_stage("student_kd", "toy", load())
    with pytest.raises(StageError, match=r"student_seq: distillation\.rationales in the profile does not ask for it"):
        stages.train_stage("student_seq", "toy", load())
