"""KL over options: a proper divergence per question, and a training step that reads every option."""

import math

import pytest
import torch

from medkit.distillation import option_kl as module
from medkit.distillation.option_kl import OptionLoss, OptionRows, option_kl
from medkit.modeling import batches, option_scoring, trainer
from medkit.stage import MedkitError


def test_kl_by_hand_with_ragged_questions():
    """One question of two options, (3/4, 1/4) against (1/2, 1/2); one of three that agree up to a constant."""
    teacher = torch.tensor([0.75, 0.25, 0.2, 0.3, 0.5]).log() - torch.tensor([0, 0, 5, 5, 5.0])
    student = torch.tensor([0.5, 0.5, 0.2, 0.3, 0.5]).log() - torch.tensor([9, 9, 1, 1, 1.0])
    found = option_kl(student, teacher, [2, 3])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-6)
    assert option_kl(student[:0], teacher[:0], []).shape == (0,)


def test_gradient_is_the_difference_of_the_distributions():
    teacher = torch.randn(5, dtype=torch.float64)
    student = torch.randn(5, dtype=torch.float64, requires_grad=True)
    option_kl(student, teacher, [2, 3]).sum().backward()
    for part in (slice(0, 2), slice(2, 5)):
        expected = student[part].softmax(-1) - teacher[part].softmax(-1)
        assert torch.allclose(student.grad[part], expected.detach())


@pytest.fixture
def asked(questions, tokenizer):
    """The answered questions with all their options, and made-up teacher scores."""
    solved = questions[questions.answer >= 0]
    scores = [[-float((7 * n + 3 * k) % 5) for k in range(len(options))] for n, options in enumerate(solved.options)]
    return OptionRows(tokenizer, solved, scores)


def test_scores_that_do_not_fit_are_refused(questions, tokenizer):
    with pytest.raises(MedkitError, match="question q1 has 3 options, the teacher scored 4; score them again"):
        OptionRows(tokenizer, questions[:2], [[0.0] * 4, [0.0] * 4])


def read(asked: OptionRows, numbers: list[int]) -> dict:
    """A slice as `train` makes it of them."""
    batch = asked.batch(numbers)
    return batches.pack(batch.pop("examples")) | batch


def test_examples_are_what_plain_training_reads(asked, questions, tokenizer):
    assert asked.examples == batches.encode_questions(tokenizer, questions[questions.answer >= 0])


def test_loss_is_that_of_the_scores(asked, make_llama):
    """The same numbers as `scoring`, which reads a question once for all its options."""
    model = make_llama()
    numbers = [2, 0, 1]
    batch = read(asked, numbers)
    total, terms = OptionLoss(0.25, 2.0)(batches.predict(model, batch), batch)
    items = [
        option_scoring.Item(rows[0].input_ids[: rows[0].loss_start], [row.input_ids[row.loss_start :] for row in rows])
        for rows in (asked.rows[n] for n in numbers)
    ]
    scores = option_scoring.score_options(model, items, 512, 0)
    kl = option_kl(
        torch.tensor([s for own in scores for s in own]),
        torch.tensor([s for n in numbers for s in asked.teacher_scores[n]]),
        [len(own) for own in scores],
    )
    ce = -sum(own[asked.right[n]] for n, own in zip(numbers, scores, strict=True))
    assert terms["option_kl"].item() == pytest.approx(kl.sum().item(), rel=1e-4)
    assert terms["ce"].item() == pytest.approx(ce, rel=1e-4)
    assert total.item() == pytest.approx(0.25 * ce + 2.0 * kl.sum().item(), rel=1e-4)


def test_a_student_takes_over_the_teachers_preferences(asked, make_llama, make_section, tmp_path):
    """Through the Trainer, slices so small that a batch has several: the student ends with the teacher's choices."""
    student = make_llama(seed=4)
    section = make_section(epochs=40.0, batch_size=3, slice_tokens=64, learning_rate=3e-3)
    log = trainer.train(student, asked.examples, section, OptionLoss(0.0, 1.0), tmp_path, 0, asked.batch)
    assert log.option_kl.iloc[-1] < 0.05 * log.option_kl.iloc[0]
    batch = read(asked, [0])
    scores = module.sum_logprobs(batches.predict(student, batch), batch["option_lengths"])
    assert scores.argmax() == torch.tensor(asked.teacher_scores[0]).argmax()


def test_a_loss_with_more_slices_is_the_same(asked, make_llama, make_section, tmp_path):
    """One step of plain descent would not show it: compare the logged loss of the first step."""
    logs = []
    for tokens in (32, 4096):
        section = make_section(epochs=1.0, batch_size=3, slice_tokens=tokens)
        log = trainer.train(make_llama(), asked.examples, section, OptionLoss(1.0, 1.0), tmp_path, 0, asked.batch)
        logs.append(log)
    assert logs[0].loss.iloc[0] == pytest.approx(logs[1].loss.iloc[0], rel=1e-4)
    tokens = sum(example.num_predicted for example in asked.examples[:3])
    assert [int(log.loss_tokens.iloc[0]) for log in logs] == [tokens, tokens]
    log = logs[0].iloc[0]
    assert log.ce + log.option_kl == pytest.approx(log.loss, rel=1e-4)


def test_a_prompt_is_read_once_for_all_its_options(asked):
    """A slice has the tokens of the prompt and of the options' ends, not of as many prompts as there are options."""
    for number, rows in enumerate(asked.rows):
        prompt = rows[0].loss_start
        found = read(asked, [number])["input_ids"].numel()
        assert found <= prompt + sum(row.num_predicted for row in rows)
