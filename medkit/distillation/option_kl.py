"""Distillation by options: the KL divergence between two models' distributions over the options of a question.

Each model reads every option in its own tokens, and only the summed log-probabilities are compared, so any two
tokenizers will do. The student needs all options of a question in one step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from medkit.modeling.batches import Example, Predicted, encode_questions
from medkit.modeling.option_scoring import Item, score_options
from medkit.modeling.train_once import find_record, key_of, write_record
from medkit.prompts import templates
from medkit.stage import MedkitError, atomic_path


def option_kl(student: torch.Tensor, teacher: torch.Tensor, num_options: Sequence[int]) -> torch.Tensor:
    """KL(teacher ‖ student) per question in nats, shape (Q,), between their distributions over its options.

    student, teacher (R,): summed log-probability of every option's text, the questions one after another with
    `num_options` rows each. A softmax over a question's options makes them distributions.
    """
    pairs = zip(student.split(list(num_options)), teacher.split(list(num_options)), strict=True)
    kl = [
        nn.functional.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True) for s, t in pairs
    ]
    return torch.stack(kl) if kl else student.new_zeros(0)


def sum_logprobs(predicted: Predicted, lengths: torch.Tensor) -> torch.Tensor:
    """Summed log-probability (R,) of every row's predicted tokens; lengths (R,): how many each row has."""
    row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    nll = nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="none")
    return torch.zeros_like(lengths, dtype=nll.dtype).index_add(0, row, -nll)


def encode_options(tokenizer, question: dict) -> list[Example]:
    """One example per option of a question: the same prompt, the option's text as the answer."""
    template = templates.pick_template(question["kind"], "option_text")
    messages = templates.render(question, template)
    encoded = [templates.encode(tokenizer, messages, answer) for answer in templates.answers(question, template)]
    return [Example([*prompt_ids, *answer_ids], len(prompt_ids)) for prompt_ids, answer_ids in encoded]


# --- the teacher's scores --------------------------------------------------------------------------------------------


def capture_option_scores(
    model: nn.Module, tokenizer, questions: pd.DataFrame, path: Path, teacher_key: str, batch_tokens: int
) -> None:
    """Write the teacher's summed log-probability of every option to `path`, unless that is there already."""
    key = _key_of(questions, teacher_key)
    if find_record(path, key) is not None:
        return
    options = [encode_options(tokenizer, q) for q in questions[questions.answer >= 0].to_dict("records")]
    items = [
        Item(rows[0].input_ids[: rows[0].loss_start], [row.input_ids[row.loss_start :] for row in rows])
        for rows in options
    ]
    scored = iter(score_options(model, items, batch_tokens, tokenizer.pad_token_id))
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps([next(scored) if answer >= 0 else [] for answer in questions.answer]))
    write_record(path, key)


def read_option_scores(path: Path, questions: pd.DataFrame, teacher_key: str) -> list[list[float]]:
    """Summed log-probability of each question's options; an empty list for a question without an answer.

    Raises MedkitError if there are none, or if they are of another teacher or of other questions.
    """
    if find_record(path, _key_of(questions, teacher_key)) is None:
        raise MedkitError(
            f"{path}: no option scores of this teacher for these questions; run notebook 02 with "
            f"distillation.alignment 'options' up to the teacher cache"
        )
    return json.loads(path.read_text())


def _key_of(questions: pd.DataFrame, teacher_key: str) -> str:
    rows = [[q["context"], q["question"], list(q["options"]), q["answer"] >= 0] for q in questions.to_dict("records")]
    return key_of(teacher_key, rows, encode_options, score_options)


# --- the student's training ------------------------------------------------------------------------------------------


class OptionRows:
    """Training rows with all their options, for `OptionLoss`.

    A training gets one example per question, that of the right option, and `batch` replaces it by the rows of all
    options. A slice holds whole questions, so it can have more than `slice_tokens` tokens.
    """

    def __init__(self, tokenizer, questions: pd.DataFrame, teacher_scores: Sequence[Sequence[float]]):
        """`teacher_scores`: of each question's options. A question without an answer is one row of text, without KL."""
        texts, records = encode_questions(tokenizer, questions), questions.to_dict("records")
        answered = [record["answer"] >= 0 for record in records]
        self.rows = [
            encode_options(tokenizer, record) if known else [text]
            for record, known, text in zip(records, answered, texts, strict=True)
        ]
        self.right = [max(record["answer"], 0) for record in records]
        self.teacher_scores = [
            scores if known else [0.0] for scores, known in zip(teacher_scores, answered, strict=True)
        ]
        for record, rows, scores in zip(records, self.rows, self.teacher_scores, strict=True):
            if len(rows) != len(scores):
                raise MedkitError(
                    f"question {record['id']} has {len(rows)} options, the teacher scored {len(scores)}; score them "
                    f"again"
                )

    @property
    def examples(self) -> list[Example]:
        """The right option's row of each question: what a training without a teacher reads."""
        return [rows[right] for rows, right in zip(self.rows, self.right, strict=True)]

    def batch(self, numbers: list[int]) -> dict:
        """The slice's examples, one per option, and the extras of `OptionLoss`."""
        rows = [row for number in numbers for row in self.rows[number]]
        is_right = [n == self.right[number] for number in numbers for n in range(len(self.rows[number]))]
        scores = [score for number in numbers for score in self.teacher_scores[number]]
        return {
            "examples": rows,
            "option_lengths": torch.tensor([row.num_predicted for row in rows]),
            "option_is_right": torch.tensor(is_right),
            "num_options": torch.tensor([len(self.rows[number]) for number in numbers]),
            "teacher_option_logprobs": torch.tensor(scores),
        }


@dataclass(frozen=True)
class OptionLoss:
    """λ1·CE of the right option + λ2·KL over the options, both per predicted token of the right options."""

    ce_weight: float
    kl_weight: float

    def __call__(self, predicted: Predicted, extras: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scores, right = sum_logprobs(predicted, extras["option_lengths"]), extras["option_is_right"]
        ce = -scores[right].sum()
        kl = option_kl(scores, extras["teacher_option_logprobs"], extras["num_options"].tolist()).sum()
        terms = {"ce": ce.detach(), "option_kl": kl.detach(), "tokens": extras["option_lengths"][right].sum()}
        return self.ce_weight * ce + self.kl_weight * kl, terms
