"""Distillation by options: the KL between two models' distributions over the options of a question.

The simplest bridge between two tokenizers: each model reads every option in its own tokens, and only the summed
log-probabilities meet. The teacher's come from `scoring`, or from any engine. The student's need all options of a
question in one step, each read as a branch of its own after the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from medkit.distillation.shards import SignalsError
from medkit.modeling.batches import Example, Predicted, encode_questions
from medkit.modeling.option_scoring import Item, score_options
from medkit.params import digest
from medkit.prompts import templates
from medkit.stage import atomic_path

SCORES = "option_scores.json"


def option_kl(student: torch.Tensor, teacher: torch.Tensor, num_options: Sequence[int]) -> torch.Tensor:
    """KL(teacher ‖ student) per question in nats, shape (Q,), between their distributions over its options.

    student, teacher (R,): summed log-probability of every option's text, the questions one after another with
    `num_options` rows each. The softmax over a question's options makes them distributions.
    """
    pairs = zip(student.split(list(num_options)), teacher.split(list(num_options)), strict=True)
    kl = [
        nn.functional.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True) for s, t in pairs
    ]
    return torch.stack(kl) if kl else student.new_zeros(0)


def option_scores(predicted: Predicted, lengths: torch.Tensor) -> torch.Tensor:
    """Summed log-probability (R,) of every row's predicted tokens; lengths (R,) say how many each has."""
    row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    nll = nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="none")
    return torch.zeros_like(lengths, dtype=nll.dtype).index_add(0, row, -nll)


def encode_options(tokenizer, question: dict) -> list[Example]:
    """One example per option of a question: the same prompt, the option's text as the answer."""
    template = templates.pick_template(question["kind"], "option_text")
    messages = templates.render(question, template)
    encoded = [templates.encode(tokenizer, messages, answer) for answer in templates.answers(question, template)]
    return [Example([*prompt_ids, *answer_ids], len(prompt_ids)) for prompt_ids, answer_ids in encoded]


# --- what the teacher says -------------------------------------------------------------------------------------------


def capture_scores(
    model: nn.Module, tokenizer, questions: pd.DataFrame, folder: Path, key: str, batch_tokens: int
) -> None:
    """Write how likely a resident teacher finds every option of every question with an answer; once.

    `folder` holds its signals, and `key` says what spoke, as for them.
    """
    if _read(folder).get("key") == _key_of(questions, key):
        return
    asked = [
        Item(rows[0].input_ids[: rows[0].loss_start], [row.input_ids[row.loss_start :] for row in rows])
        for rows in (encode_options(tokenizer, question) for question in _answered(questions))
    ]
    found = iter(score_options(model, asked, batch_tokens, tokenizer.pad_token_id))
    scores = [next(found) if answer >= 0 else [] for answer in questions.answer]
    with atomic_path(folder / SCORES) as scratch:
        scratch.write_text(json.dumps({"key": _key_of(questions, key), "scores": scores}))


def read_scores(folder: Path, questions: pd.DataFrame, key: str) -> list[list[float]]:
    """Summed log-probability of each question's options; none for a question without an answer.

    Raises SignalsError for the scores of another teacher, of other questions, and for none at all.
    """
    found = _read(folder)
    if found.get("key") != _key_of(questions, key):
        raise SignalsError(f"{folder}: no option scores of this teacher for these questions; run capture_scores again")
    return found["scores"]


def _read(folder: Path) -> dict:
    try:
        return json.loads((folder / SCORES).read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _key_of(questions: pd.DataFrame, key: str) -> str:
    asked = [[q["context"], q["question"], list(q["options"]), q["answer"] >= 0] for q in questions.to_dict("records")]
    return digest([key, asked])


def _answered(questions: pd.DataFrame) -> list[dict]:
    return questions[questions.answer >= 0].to_dict("records")


# --- what the student learns from ------------------------------------------------------------------------------------


class OptionRows:
    """Makes one training item of a question with all its options, for `training.train` and `OptionLoss`.

    `train` sees the right option's row; `batch` puts the rows of all options in its place. A slice holds whole
    questions, so it may have more than `slice_tokens` tokens: by those of the wrong options, after a shared prompt.
    """

    def __init__(
        self, rows: Sequence[Sequence[Example]], right: Sequence[int], teacher_logprobs: Sequence[Sequence[float]]
    ):
        """`right`: the right option of each question. `teacher_logprobs`: of its options, as `engine.score` gives."""
        self.rows, self.right, self.teacher_logprobs = rows, right, teacher_logprobs
        uneven = [n for n, (own, said) in enumerate(zip(rows, teacher_logprobs, strict=True)) if len(own) != len(said)]
        if uneven:
            raise ValueError(f"question {uneven[0]}: the teacher scored another number of options; score them again")

    @classmethod
    def of_questions(
        cls, tokenizer, questions: pd.DataFrame, teacher_logprobs: Sequence[Sequence[float]]
    ) -> OptionRows:
        """Of a student's tokenizer and the teacher's scores; a question without an answer is one row of text, of which
        the teacher says nothing."""
        texts, solved = encode_questions(tokenizer, questions), questions.answer >= 0
        rows = [
            encode_options(tokenizer, question) if known else [text]
            for question, known, text in zip(questions.to_dict("records"), solved, texts, strict=True)
        ]
        said = [own if known else [0.0] for own, known in zip(teacher_logprobs, solved, strict=True)]
        return cls(rows, questions.answer.clip(lower=0).tolist(), said)

    @property
    def items(self) -> list[Example]:
        """The right option's row of each question: the examples to give to `train`."""
        return [rows[right] for rows, right in zip(self.rows, self.right, strict=True)]

    def batch(self, numbers: list[int]) -> dict:
        """The slice's examples, one per option, and what `OptionLoss` needs to know about them."""
        rows = [row for number in numbers for row in self.rows[number]]
        return {
            "examples": rows,
            "option_lengths": torch.tensor([row.num_predicted for row in rows]),
            "option_is_right": torch.tensor(
                [option == self.right[number] for number in numbers for option in range(len(self.rows[number]))]
            ),
            "num_options": torch.tensor([len(self.rows[number]) for number in numbers]),
            "teacher_option_logprobs": torch.tensor(
                [said for number in numbers for said in self.teacher_logprobs[number]]
            ),
        }


@dataclass(frozen=True)
class OptionLoss:
    """λ1·CE of the right option + λ2·KL over the options, through `OptionRows`.

    Both per predicted token of the right options, as in plain training.
    """

    ce_weight: float
    kl_weight: float

    def __call__(self, predicted: Predicted, extras: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scores = option_scores(predicted, extras["option_lengths"])
        right = extras["option_is_right"]
        ce = -scores[right].sum()
        kl = option_kl(scores, extras["teacher_option_logprobs"], extras["num_options"].tolist()).sum()
        terms = {"ce": ce.detach(), "option_kl": kl.detach(), "tokens": extras["option_lengths"][right].sum()}
        return self.ce_weight * ce + self.kl_weight * kl, terms
