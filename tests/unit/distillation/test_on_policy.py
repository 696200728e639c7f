"""A student learns at its own words and nowhere else, from its teacher; killed, it goes on to the same bits."""

import copy
import sys

import pandas as pd
import pytest
import torch
from torch import nn

from medkit.distillation import losses, on_policy
from medkit.lora import adapters
from medkit.modeling.batches import Example
from medkit.modeling.trainer import TrainingError
from medkit.params import AdapterParams, OnPolicyParams

WORD, END = 50, 2

pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def make_on_policy(make_section):
    """on_policy(**changes of the section, train={…})."""

    def make(train=(), **changes):
        settings = {"lmbda": 1.0, "beta": 0.5, "temperature": 1.0, "max_new_tokens": 8, "adapter": None}
        section = make_section(**{"slice_tokens": 64, "epochs": 1.0, **dict(train)})
        return OnPolicyParams(**{**settings, **changes}, train=section)

    return make


@pytest.fixture
def examples(make_examples):
    return make_examples(10)


@pytest.fixture
def learn(tokenizer, make_on_policy, examples, tmp_path):
    """learn(student, teacher, seed=0, **changes): the log."""

    def run(student, teacher, seed=0, given=None, folder="checkpoints", optimizer=None, **changes):
        section, rows = make_on_policy(**changes), examples if given is None else given
        return on_policy.train(student, teacher, tokenizer, rows, section, tmp_path / folder, seed, optimizer)

    return run


@pytest.fixture
def seen(monkeypatch):
    """What the student was shown, slice after slice: its batch, and what it and its teacher said at the labels."""
    found, plain = [], on_policy.predict

    def predict(model, batch):
        said = plain(model, batch)
        if torch.is_grad_enabled():
            found[-1] |= {"student": said.logits.detach(), "targets": said.targets}
        else:
            found.append({**batch, "teacher": said.logits})
        return said

    monkeypatch.setattr(on_policy, "predict", predict)
    return found


def rows_of(seen):
    """(prompt, answer) of every row that was learned, as token ids."""
    rows = []
    for batch in seen:
        every = batch["input_ids"].flatten()
        learned = torch.zeros_like(every, dtype=torch.bool)
        learned[batch["predicted_at"] + 1] = True
        assert torch.equal(every[learned], batch["labels"])
        for ids, mask, own in zip(
            batch["input_ids"], batch["attention_mask"].bool(), learned.view_as(batch["input_ids"]), strict=True
        ):
            rows.append((tuple(ids[mask & ~own].tolist()), tuple(ids[own].tolist())))
            assert not (own & ~mask).any()
    return rows


def as_given(examples):
    return sorted((tuple(e.input_ids[: e.loss_start]), tuple(e.input_ids[e.loss_start :])) for e in examples)


def one_word(make_llama, word):
    """A student that says one word, almost surely, whatever it is asked."""
    model = make_llama(tie_word_embeddings=False)
    model.generation_config.eos_token_id = 9  # what ends an answer is for the tokenizer to say
    with torch.no_grad():
        model.lm_head.weight.zero_()
        bias = torch.zeros(model.config.vocab_size)
        bias[word] = 30.0
        model.lm_head.bias = nn.Parameter(bias)
    return model


# --- what is learned -------------------------------------------------------------------------------------------------


def test_the_student_comes_nearer_to_its_teacher_where_it_speaks(make_llama, learn):
    student, teacher = make_llama(), make_llama(seed=1)
    before, taught = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    log = learn(student, teacher, train={"epochs": 8.0, "learning_rate": 3e-3, "save_every_steps": 1000})
    assert {"step", "epoch", "loss", "answer_tokens", "learning_rate"} <= set(log.columns)
    assert log.step.tolist() == list(range(1, 25))  # ten rows in batches of four, eight times
    assert log.loss.tail(3).mean() < 0.8 * log.loss.head(3).mean()
    assert all((before[name] != tensor).any() for name, tensor in student.state_dict().items())
    assert all(torch.equal(taught[name], tensor) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize(("word", "length"), [(WORD, 8), (END, 1)])
def test_with_lambda_1_answers_are_the_student_s_own(make_llama, learn, seen, examples, word, length):
    log = learn(one_word(make_llama, word), make_llama(tie_word_embeddings=False), train={"learning_rate": 1e-9})
    assert sorted(rows_of(seen)) == [(prompt, (word,) * length) for prompt, _ in as_given(examples)]
    assert set(log.answer_tokens) == {length}


def test_with_lambda_0_answers_are_the_data_s(make_llama, learn, seen, examples):
    log = learn(one_word(make_llama, WORD), make_llama(tie_word_embeddings=False), lmbda=0.0)
    assert sorted(rows_of(seen)) == as_given(examples)
    assert log.answer_tokens.mean() != 8


def test_between_them_some_are(make_llama, learn, seen, examples):
    learn(one_word(make_llama, WORD), make_llama(tie_word_embeddings=False), lmbda=0.5, train={"learning_rate": 1e-9})
    own = [answer == (WORD,) * 8 for _, answer in rows_of(seen)]
    assert 0 < sum(own) < len(own) == 10
    assert {row for row, drawn in zip(rows_of(seen), own, strict=True) if not drawn} <= set(as_given(examples))


def test_questions_without_an_answer_can_be_asked(make_llama, learn, seen, examples):
    asked = [Example(e.input_ids[: e.loss_start], e.loss_start) for e in examples]
    learn(one_word(make_llama, WORD), make_llama(tie_word_embeddings=False), given=asked)
    assert {answer for _, answer in rows_of(seen)} == {(WORD,) * 8}
    with pytest.raises(TrainingError, match=r"on_policy\.lmbda is 0\.5, and some examples have no answer"):
        learn(make_llama(), make_llama(), given=asked, lmbda=0.5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_loss_is_the_divergence_of_the_two_per_token_that_was_said(make_llama, learn, seen, beta):
    student, teacher = make_llama(), make_llama(seed=1)
    log = learn(student, teacher, beta=beta, temperature=0.7, train={"slice_tokens": 10_000})
    assert len(seen) == len(log) == 3  # a slice a step
    for row, batch in zip(log.loss, seen, strict=True):
        said = losses.divergence(batch["teacher"].log_softmax(-1), batch["student"].log_softmax(-1), beta)
        assert row == pytest.approx(said.mean().item(), rel=1e-5)


def test_what_the_two_say_is_what_they_say_of_each_row_alone(make_llama, learn, seen):
    """Padding on both sides, before the prompt and after the answer, changes nothing."""
    student, teacher = make_llama(), make_llama(seed=1)
    learn(student, teacher, train={"learning_rate": 1e-12, "epochs": 0.1, "slice_tokens": 10_000})
    (batch,) = seen
    answers = [answer for _, answer in rows_of(seen)]
    found = {name: batch[name].split([len(answer) for answer in answers]) for name in ("student", "teacher")}
    for number, (prompt, answer) in enumerate(rows_of(seen)):
        for name, model in (("student", student), ("teacher", teacher)):
            with torch.no_grad():
                alone = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(found[name][number], alone, rtol=0, atol=1e-4)


def test_a_student_like_its_teacher_has_nothing_to_learn(make_llama, learn):
    student = make_llama()
    log = learn(student, copy.deepcopy(student), lmbda=0.0, train={"learning_rate": 1e-9})
    assert log.loss.abs().max() < 1e-6


def test_slices_bound_memory_and_change_a_mean_of_equal_answers_by_nothing(make_llama, learn, seen, make_on_policy):
    logs = []
    for tokens in (10_000, 64):
        student = one_word(make_llama, WORD)
        quick = {"slice_tokens": tokens, "learning_rate": 1e-9}
        logs.append(learn(student, make_llama(tie_word_embeddings=False), train=quick, folder=str(tokens)))
    assert len(logs[0]) == len(logs[1]) == 3
    assert {batch["input_ids"].numel() <= 64 for batch in seen[3:]} == {True} and len(seen) == 3 + 5
    assert logs[0].loss.sum() == pytest.approx(logs[1].loss.sum(), rel=0.2)  # other rows share a batch


@pytest.mark.parametrize(
    ("size", "processes", "tokens", "slices"),
    [(16, 1, 320, 1), (16, 1, 319, 2), (12, 2, 79, 2), (12, 2, 59, 3), (6, 2, 59, 3), (4, 4, 1, 1)],
)
def test_slices_are_equal_and_as_few_as_fit(make_on_policy, size, processes, tokens, slices):
    section = make_on_policy(train={"batch_size": size, "slice_tokens": tokens}, max_new_tokens=8)
    rows = [Example([5] * 20, 12), Example([5] * 14, 11), Example([5] * 3, 2)]
    assert on_policy.count_slices(section, rows, processes) == slices


def test_a_batch_that_cannot_be_dealt_out_is_refused(make_on_policy, examples):
    with pytest.raises(TrainingError, match="batch_size is 4, which 3 processes cannot share evenly"):
        on_policy.count_slices(make_on_policy(), examples, 3)


# --- an adapter, a seed, a kill --------------------------------------------------------------------------------------


def test_an_adapter_learns_alone(make_llama, learn):
    section = AdapterParams(variant="lora_plus", rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj"])
    student = adapters.attach(make_llama(), section, 0)
    before = {name: tensor.clone() for name, tensor in student.named_parameters()}
    optimizer = adapters.make_optimizer(student, section, 1e-2)
    log = learn(student, make_llama(seed=1), optimizer=optimizer, train={"learning_rate": 1e-2, "epochs": 2.0})
    changed = {name for name, tensor in student.named_parameters() if not torch.equal(before[name], tensor)}
    assert changed and all("lora_" in name for name in changed)
    assert log.loss.notna().all()
    assert "forward" not in vars(student.get_base_model())


def test_the_seed_draws_answers_and_order(make_llama, learn, seen):
    def drawn(seed, folder):
        del seen[:]
        log = learn(make_llama(), make_llama(seed=1), seed, folder=folder)
        return log.loss.tolist(), rows_of(seen)

    first = drawn(0, "a")
    assert drawn(0, "b") == first
    assert sorted(drawn(1, "c")[1]) != sorted(first[1])


def test_a_checkpoint_s_own_wishes_change_nothing(make_llama, learn, seen):
    """A hub model says how it wants to be sampled; what is learned at must be what the student finds likely."""
    first, second = make_llama(), make_llama()
    second.generation_config.update(do_sample=True, temperature=0.01, top_k=1, top_p=0.1, eos_token_id=9, max_length=3)
    logs = [learn(student, make_llama(seed=1), folder=name) for name, student in (("a", first), ("b", second))]
    assert logs[0].loss.tolist() == logs[1].loss.tolist()


def test_a_killed_run_goes_on_to_the_same_bits(make_llama, learn, monkeypatch, tmp_path):
    """Dice say whose answers are learned, and what the student's are."""
    settings = {"lmbda": 0.5, "train": {"epochs": 3.0, "save_every_steps": 2, "slice_tokens": 40}}
    whole, killed = make_llama(), make_llama()
    expected = learn(whole, make_llama(seed=1), folder="whole", **settings)
    plain, calls = on_policy.predict, []

    def die(*args):
        calls.append(1)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return plain(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(on_policy, "predict", die)
        learn(killed, make_llama(seed=1), **settings)
    (last, *_) = tmp_path.glob("checkpoints/*/checkpoint-*")
    (last.parent / "checkpoint-99").mkdir()  # a save that was killed as well
    again = make_llama()  # a new process would load the start again
    del calls[:]
    with monkeypatch.context() as patch:
        patch.setattr(on_policy, "predict", lambda *args: calls.append(1) or plain(*args))
        found = learn(again, make_llama(seed=1), **settings)
    assert 0 < len(calls) < 2 * 2 * len(expected), "it began anew"
    pd.testing.assert_frame_equal(found[expected.columns], expected)
    assert [n for n, t in whole.state_dict().items() if not torch.equal(t, again.state_dict()[n])] == []


def test_checkpoints_of_another_teacher_or_setting_are_thrown_away(make_llama, learn, tmp_path):
    names = set()
    for teacher, beta in ((1, 0.5), (2, 0.5), (2, 0.4)):
        learn(make_llama(), make_llama(seed=teacher), beta=beta, train={"save_every_steps": 1})
        (folder,) = (tmp_path / "checkpoints").iterdir()
        names.add(folder.name)
    assert len(names) == 3


# --- what is left behind, and refused --------------------------------------------------------------------------------


def test_nothing_of_trl_stays_and_nobody_is_told(make_llama, learn, no_network, tokenizer):
    student, teacher = make_llama(), make_llama(seed=1)
    mode, vocabulary = student.generation_config.to_dict(), tokenizer.get_vocab()
    learn(student, teacher)
    assert "forward" not in vars(student) and "forward" not in vars(teacher)
    assert not student.training and not teacher.training
    assert student.generation_config.to_dict() == mode
    assert tokenizer.get_vocab() == vocabulary
    assert no_network == []


def test_what_cannot_be_trained_is_refused_in_a_sentence(make_llama, learn, monkeypatch):
    with pytest.raises(TrainingError, match="no training examples; raise the numbers of `train`"):
        learn(make_llama(), make_llama(), given=[])
    scale = {
        "bf16": False,
        "gradient_checkpointing": False,
        "sharding": "fsdp",
        "cpu_offload": False,
        "tensorboard": False,
    }
    with (
        monkeypatch.context() as patch,
        pytest.raises(TrainingError, match=r"on_policy\.train\.scale\.sharding to null"),
    ):
        patch.setenv("WORLD_SIZE", "2")
        learn(make_llama(), make_llama(), train={"scale": scale})
    with pytest.raises(TrainingError, match=r"loss is nan at step \d; lower learning_rate"):
        learn(make_llama(), make_llama(seed=1), train={"learning_rate": 1e30, "warmup_fraction": 0.0})
    with pytest.raises(ValueError, match="vocab_size 300 but the teacher model has vocab_size 320"):
        learn(make_llama(), make_llama(vocab_size=320))


def test_trl_is_asked_for_where_it_is_missing(make_llama, learn, monkeypatch):
    on_policy._import_trl.cache_clear()
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(TrainingError, match=r"needs TRL: pip install 'medkit\[onpolicy\]', or set"):
        learn(make_llama(), make_llama())
