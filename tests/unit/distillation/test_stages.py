"""Teacher and students: each is trained once, with its loss, over every alignment; what is missing is named."""

import os

import pandas as pd
import pytest
import torch
import yaml

from medkit.distillation import entities, option_kl, pruning, rationales, stages, teacher_cache
from medkit.distillation.teacher_cache import CacheError, TeacherCache
from medkit.inference.torch_engine import TorchEngine
from medkit.lora import adapters
from medkit.modeling import batches, loading, trainer
from medkit.params import load_params
from medkit.stage import ROOT, MedkitError, Stage, StageError
from medkit.variants import VARIANTS, list_variants

TRAIN = {"epochs": 1.0, "batch_size": 4, "slice_tokens": 200, "learning_rate": 1e-2, "warmup_fraction": 0.1}
TRAIN |= {"save_every_steps": 9, "bf16": False, "gradient_checkpointing": False}
ADAPTER = {"variant": "lora_plus", "rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj"]}
ON_POLICY = {"beta": 0.5, "max_new_tokens": 4, "adapter": None, "train": TRAIN}
RATIONALES = {"questions": 6, "samples": 2, "max_new_tokens": 12, "temperature": 1.0, "too_easy": 2.0}


@pytest.fixture(scope="module")
def pieces_tokenizer(make_pieces_tokenizer):
    return make_pieces_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_llama, tokenizer, pieces_tokenizer):
    """Toy models on disk: a teacher, a student with the same tokens, and a teacher with SentencePiece-like tokens."""
    root = tmp_path_factory.mktemp("toys")
    loading.save_model(make_llama(seed=5), tokenizer, root / "teacher")
    loading.save_model(make_llama(seed=4, layers=2), tokenizer, root / "student")
    loading.save_model(make_llama(seed=3, vocab_size=400, initializer_range=0.3), pieces_tokenizer, root / "pieces")
    return root


@pytest.fixture
def load(folders, tmp_path):
    """load(alignment, teacher=…, student=…, **changes of the distillation section): the toys' params."""
    raw = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())

    def side(name):
        return {"source": {"kind": "local", "path": str(folders / name)}, "keep_layers": []}

    def load(alignment="tokens", student="pruned_teacher", seed=0, **changes):
        teacher = "teacher" if alignment == "tokens" else "pieces"
        student = side("student") if alignment != "tokens" else student
        raw["models"] |= {"teacher": side(teacher), "student": student, "device": "cpu", "attention": "sdpa"}
        trains = {"correction_train": TRAIN, "student_train": TRAIN}
        raw["distillation"] |= {**trains, "alignment": alignment, "on_policy": None, "rationales": None, **changes}
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump({**raw, "seed": seed}))
        return load_params(path)

    return load


@pytest.fixture
def rows():
    """Eight answered questions and one of the transfer set."""
    organs = ["liver", "heart", "5 µg", "colon"]
    answers = [n % 2 for n in range(8)] + [-1]
    table = [
        (f"q{n}", "choice", f"Which organ? fever {n}", "", organs[: 2 + n % 3], answer)
        for n, answer in enumerate(answers)
    ]
    questions = pd.DataFrame(table, columns=["id", "kind", "question", "context", "options", "answer"])
    return questions.assign(split=["labelled"] * 8 + ["transfer"], source="exam")


@pytest.fixture
def stage(tmp_path, monkeypatch, folders, rows, tokenizer, load):
    """A run with questions, a teacher and an untrained student; nothing captured or trained."""
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path / "outputs"))
    first, stage = Stage("toy", "01_data"), Stage("toy", "02_distillation")
    first.write_table("questions.parquet", rows)
    first.commit()
    for source, name in (("teacher", "teacher"), ("student", "base")):
        loading.save_model(loading.load_model(folders / source, load().models), tokenizer, stage.path(name))
    return stage


@pytest.fixture
def capture(stage, rows, folders, load):
    """capture(params): what notebook 02 writes before it trains students with a teacher."""

    def capture(params):
        teacher_tokenizer, _ = stages.load_tokenizers(params)
        model = loading.load_model(loading.local_folder(params.models.teacher), params.models)
        loading.save_model(model, teacher_tokenizer, stage.path("teacher"))
        key, examples = stages.teacher_key(stage, teacher_tokenizer), batches.encode_questions(teacher_tokenizer, rows)
        cache = teacher_cache.capture_teacher(model, examples, stage.path("teacher_cache"), 300, 4, key)
        scores = stage.path("option_scores.json")
        option_kl.capture_option_scores(model, teacher_tokenizer, rows, scores, key, 512)
        return cache

    return capture


@pytest.fixture
def trained(monkeypatch):
    """A list that grows with every training."""
    trained, train = [], trainer.train
    monkeypatch.setattr(trainer, "train", lambda *args, **more: trained.append(1) or train(*args, **more))
    return trained


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


# --- trained once ----------------------------------------------------------------------------------------------------


def test_what_is_trained_already_is_read_back(stage, load, rows, trained):
    params = load()
    first, log = stages.train_student("student_ce", stage, params, rows)
    stage.commit()
    again, known = stages.train_student("student_ce", stage, params, rows)
    assert len(trained) == 1 and stage.manifest(), "nothing changed"
    assert_same_weights(weights(again), weights(first))
    assert_same_weights(weights(loading.load_model(stage.dir / "student_ce", params.models)), weights(first))
    pd.testing.assert_frame_equal(known, log)


@pytest.mark.parametrize("change", ["rows", "settings", "seed", "start", "order", "lost", "cut"])
def test_what_was_made_from_other_things_is_made_again(
    stage, load, rows, capture, tokenizer, trained, make_llama, change
):
    params = load()
    capture(params)
    stages.train_student("student_ce", stage, params, rows)
    if change == "rows":
        rows = rows[:-1]
    elif change == "settings":
        params = load(student_train={**TRAIN, "learning_rate": 2e-2})
    elif change == "seed":
        params = load(seed=1)
    elif change == "start":
        loading.save_model(make_llama(layers=2, seed=2), tokenizer, stage.path("base"))
    elif change == "order":
        params = load(order="progressive")
    elif change == "lost":
        (stage.dir / "student_ce" / "config.json").unlink()
    else:
        os.truncate(stage.dir / "student_ce" / "model.safetensors", 1000)
    stages.train_student("student_ce", stage, params, rows)
    assert len(trained) == 2
    assert loading.load_model(stage.dir / "student_ce", params.models)


def test_the_command_corrects_the_teacher_as_a_hand_made_training_does(stage, load, tokenizer, rows):
    params = load()
    stages.train_stage("teacher", "toy", params)
    folder = loading.local_folder(params.models.teacher)
    adapted = adapters.attach(loading.load_model(folder, params.models), params.distillation.correction, params.seed)
    examples, section = batches.encode_questions(tokenizer, rows), params.distillation.correction_train
    trainer.train(adapted, examples, section, trainer.cross_entropy, stage.path("by_hand"), params.seed)
    by_hand = weights(adapters.merge(adapted))
    assert_same_weights(weights(loading.load_model(stage.dir / "teacher", params.models)), by_hand)


# --- with a teacher --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alignment", "term"), [("tokens", "forward_kl"), ("spans", "span_kl"), ("options", "option_kl")]
)
def test_a_student_learns_from_its_teacher_once_and_keeps_its_tokenizer(
    stage, load, capture, trained, tokenizer, alignment, term
):
    train = {**TRAIN, "epochs": 8.0, "learning_rate": 3e-3, "save_every_steps": 99}
    params = load(alignment, ce_weight=0.0, kl_weight=1.0, student_train=train)
    capture(params)
    log = stages.train_stage("student_kd", "toy", params)
    assert log[term].tail(3).mean() < 0.6 * log[term].head(3).mean()
    pd.testing.assert_frame_equal(stages.train_stage("student_kd", "toy", params), log)
    assert len(trained) == 1
    saved = loading.load_tokenizer(stage.dir / "student_kd")
    assert saved.get_vocab() == tokenizer.get_vocab() and saved.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("change", ["weight", "alignment", "teacher"])
def test_with_another_teacher_or_loss_it_is_trained_again(
    stage, load, capture, trained, folders, monkeypatch, make_llama, pieces_tokenizer, change
):
    params = load("spans")
    capture(params)
    stages.train_stage("student_kd", "toy", params)
    if change == "teacher":
        other = make_llama(seed=6, vocab_size=400)
        monkeypatch.setattr(loading, "local_folder", lambda source: folders / "other")
        loading.save_model(other, pieces_tokenizer, folders / "other")
        monkeypatch.setattr(stages, "load_tokenizers", lambda params: (pieces_tokenizer, None))
        capture(params)
    else:
        params = load("options") if change == "alignment" else load("spans", kl_weight=0.25)
    stages.train_stage("student_kd", "toy", params)
    assert len(trained) == 2


def test_a_teacher_that_is_its_own_student_has_no_divergence(stage, load, rows, capture, tokenizer, folders):
    params = load()
    cache = capture(params)
    examples = batches.encode_questions(tokenizer, rows)
    loss, add_extras = stages.distillation_loss(stage, params, rows, examples, (tokenizer, tokenizer), cache)
    extras = add_extras([1, 3])
    assert {"teacher_ids", "teacher_logprobs", "entity", "entity_weights"} <= set(extras)
    model = loading.load_model(folders / "teacher", params.models)
    with torch.no_grad():
        _, terms = loss(batches.predict(model, batches.collate([examples[1], examples[3]], 0)), extras)
    assert terms["forward_kl"].abs() < 0.02


def test_over_options_the_transfer_row_is_text_and_the_others_have_all_their_options(
    stage, load, rows, capture, tokenizer
):
    params = load("options")
    examples = batches.encode_questions(tokenizer, rows)
    _, add_extras = stages.distillation_loss(stage, params, rows, examples, (None, tokenizer), capture(params))
    batch = add_extras([7, 8])
    assert batch["num_options"].tolist() == [len(rows.options[7]), 1]
    assert batch["option_is_right"].sum() == 2
    assert batch["option_lengths"][-1] == examples[8].num_predicted
    assert batch["teacher_option_logprobs"][:-1].max() < 0 == batch["teacher_option_logprobs"][-1]


def test_option_scores_are_computed_once_and_refused_for_others(stage, load, rows, capture, pieces_tokenizer):
    cache, path = capture(load("options")), stage.dir / "option_scores.json"
    key = cache.index["key"]
    scores = option_kl.read_option_scores(path, rows, key)
    assert [len(own) for own in scores] == [*map(len, rows.options[:8]), 0]
    option_kl.capture_option_scores(None, pieces_tokenizer, rows, path, key, 512)  # no teacher is needed
    for questions, other in ((rows, "another"), (rows[::-1], key)):
        with pytest.raises(MedkitError, match="no option scores of this teacher for these questions; run notebook 02"):
            option_kl.read_option_scores(path, questions, other)


@pytest.mark.parametrize("name", ["teacher", "student_kd"])
def test_two_vocabularies_are_refused_before_any_training(stage, load, trained, folders, name):
    raw = load("spans").model_dump()
    raw["distillation"]["alignment"] = "tokens"
    params = type(load()).model_validate(raw)
    with pytest.raises(StageError, match=r"'tokens', but teacher and student have different.*set it to 'spans'"):
        stages.train_stage(name, "toy", params)
    assert trained == []


def test_each_model_keeps_its_tokenizer_and_one_vocabulary_has_one(load, tokenizer, pieces_tokenizer):
    teacher, student = stages.load_tokenizers(load())
    assert student is teacher and student.get_vocab() == tokenizer.get_vocab()
    for alignment in ("spans", "options"):
        teacher, student = stages.load_tokenizers(load(alignment))
        assert teacher.get_vocab() == pieces_tokenizer.get_vocab() and student.get_vocab() == tokenizer.get_vocab()


def test_a_progressive_order_needs_the_cache_and_a_random_one_does_not(
    stage, load, rows, capture, tokenizer, monkeypatch
):
    stages.train_stage("student_ce", "toy", load())
    with pytest.raises(StageError, match="teacher_cache is not there"):
        stages.train_stage("student_ce", "toy", load(order="progressive"))
    cache, given = capture(load()), []
    monkeypatch.setattr(stages, "train_once", lambda *args, difficulty=None, **more: given.append(difficulty))
    for name in ("student_ce", "student_kd"):
        stages.train_student(name, stage, load(order="progressive"), rows)
    densities = entities.mark_entities(tokenizer, batches.encode_questions(tokenizer, rows)).densities()
    assert given == [pruning.order_by_difficulty(cache.mean_nll(), densities)] * 2
    (stage.dir / "teacher_cache" / "index.json").unlink()
    with pytest.raises(CacheError, match="capture the teacher again"):
        stages.train_stage("student_kd", "toy", load())


# --- rationales and the student's own answers ------------------------------------------------------------------------


def test_a_student_learns_its_teacher_s_verified_answers(stage, load, tokenizer, monkeypatch):
    params = load(rationales=RATIONALES)
    with pytest.raises(StageError, match="none of 12 rationales was verified; raise distillation"):
        stages.train_stage("student_seq", "toy", params, TorchEngine)
    collect = rationales.collect_samples

    def always_right(*args):
        samples = collect(*args)  # read back: no engine is given below
        return samples.assign(text="So. Answer: A", finished=True, right=samples["sample"] == 0)

    monkeypatch.setattr(rationales, "collect_samples", always_right)
    log = stages.train_stage("student_seq", "toy", params)
    rows = pd.read_parquet(stage.require("01_data", "questions.parquet"))
    others = sum(e.num_predicted for e in batches.encode_questions(tokenizer, rows))
    one = len(tokenizer("So. Answer: A", add_special_tokens=False).input_ids) + 1
    assert others <= log.loss_tokens.sum() < others + one
    assert loading.load_model(stage.dir / "student_seq", params.models)


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["all weights", "adapter"])
def test_a_student_learns_along_its_own_answers_once(stage, load, tokenizer, monkeypatch, folders, adapter, no_network):
    trl = pytest.importorskip("trl")
    loading.save_model(loading.load_model(folders / "student", load().models), tokenizer, stage.path("student_kd"))
    params = load(on_policy={**ON_POLICY, "adapter": adapter})
    log = stages.train_stage("student_onpolicy", "toy", params)
    assert len(log) == 2 and log["completions/max_length"].max() <= 4 and (log.loss > 0).all()
    student = weights(loading.load_model(stage.dir / "student_onpolicy", params.models))
    start = weights(loading.load_model(stage.dir / "student_kd", params.models))
    changed = {name for name, tensor in student.items() if not torch.equal(tensor, start[name])}
    assert changed == ({name for name in start if "q_proj" in name} if adapter else set(start))
    assert no_network == [], "TRL reports nothing"
    monkeypatch.setattr(trl, "DistillationTrainer", None)  # not called again
    pd.testing.assert_frame_equal(stages.train_stage("student_onpolicy", "toy", params), log)


def test_every_student_that_a_profile_asks_for_is_evaluated(load):
    """Notebook 04 writes this list of variants for notebooks 05 and 06."""
    students = stages.list_students(load(on_policy=ON_POLICY, rationales=RATIONALES))
    assert students == ["student_ce", "student_kd", "student_seq", "student_onpolicy"]
    assert ("teacher", *students) == stages.STAGES
    folders = {name: variant.folder for name, variant in list_variants(students).items()}
    assert folders.keys() == {name for name, variant in VARIANTS.items() if variant.folder is not None}
    assert [folders[name] for name in students] == [f"02_distillation/{name}" for name in students]
    fewer = list_variants(stages.list_students(load()))
    assert folders.keys() - fewer.keys() == {"student_seq", "student_onpolicy"}
    assert "list_variants(distillation.list_students(params))" in (ROOT / "notebooks/04_quantization.ipynb").read_text()


# --- what is missing -------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_its_cure(stage, load, monkeypatch):
    with pytest.raises(StageError, match="no trained stage 'student'; choose one of teacher, student_ce"):
        stages.train_stage("student", "toy", load())
    with pytest.raises(StageError, match="02_distillation/teacher_cache is not there: run notebook 02_distillation"):
        stages.train_stage("student_kd", "toy", load())
    with pytest.raises(StageError, match=r"01_data/questions\.parquet is not there"):
        stages.train_stage("teacher", "another", load())
    with pytest.raises(StageError, match=r"student_onpolicy: distillation\.on_policy is null in the profile"):
        stages.train_stage("student_onpolicy", "toy", load())
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=r"needs TRL: pip install 'medkit\[onpolicy\]', or set it to null"):
        stages.list_students(load(on_policy=ON_POLICY))


def test_a_run_in_use_is_left_alone(stage, load):
    from filelock import FileLock

    with FileLock(stage.dir.parent / ".lock"), pytest.raises(StageError, match="worked on by another process"):
        stages.train_stage("teacher", "toy", load())


def test_a_cache_of_another_teacher_is_refused(stage, load, capture, tokenizer, make_llama):
    capture(load())
    loading.save_model(make_llama(seed=9), tokenizer, stage.path("teacher"))
    with pytest.raises(CacheError, match="capture the teacher again"):
        TeacherCache(stage.dir / "teacher_cache", stages.teacher_key(stage, tokenizer))
