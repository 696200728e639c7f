"""What a student is taught: its loss, what it hears of its teacher beside its rows, and how hard the rows are.

What carries the teacher's distribution over is the profile's choice (`distillation.bridge`). `vocabulary`: token ids
that mean the same to both. `spans`: two tokenizers, cut where both have a border (`alignment`). `options`: no tokens,
but each model's distribution over the options of a question (`options`). Nothing here trains, or asks a teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from medkit.distillation import cross_tokenizer, entities, losses, option_kl, pruning
from medkit.distillation.teacher_cache import Signals, SignalsError
from medkit.modeling import batches, loading
from medkit.modeling.trainer import Loss
from medkit.params import Params


class Lesson(NamedTuple):
    """The last arguments of `recipes.train_student`."""

    loss: Loss
    add_extras: Callable[[list[int]], dict]
    difficulty: list[float] | None


def load_tokenizers(params: Params) -> tuple:
    """The tokenizer that the teacher reads with, and the student's own; where they share a vocabulary the teacher's.

    Raises SignalsError if the bridge is `vocabulary` and the vocabularies differ, AlignmentError if it is `spans` and
    one of the tokenizers does not say which bytes its tokens write.
    """
    teacher = loading.load_tokenizer(loading.local_folder(params.models.teacher))
    if params.models.student == "pruned_teacher":
        return teacher, teacher
    student = loading.load_tokenizer(loading.local_folder(params.models.student))
    match params.distillation.bridge:
        case "vocabulary":
            try:
                pruning.check_same_vocabulary(teacher, student)
            except SignalsError as error:
                raise SignalsError(f"distillation.bridge 'vocabulary': {error}, or the bridge 'spans'") from error
            return teacher, teacher  # one vocabulary, and one way to ask
        case "spans":
            make_bridge(teacher, student)
    return teacher, student


def make_bridge(teacher_tokenizer, student_tokenizer) -> cross_tokenizer.Bridge:
    """Between two tokenizers, by the bytes of their tokens."""
    return cross_tokenizer.Bridge(
        *(cross_tokenizer.read_vocabulary(one) for one in (student_tokenizer, teacher_tokenizer))
    )


def plain_lesson(difficulty: list[float] | None = None) -> Lesson:
    """The answers alone."""
    return Lesson(losses.DistillationLoss(ce_weight=1.0), lambda numbers: {}, difficulty)


def taught_lesson(params: Params, rows: pd.DataFrame, tokenizers: tuple, signals: Signals) -> Lesson:
    """The answers and the teacher, over the bridge.

    `rows`: the questions that the signals are about, in their order. `tokenizers`: the teacher's and the student's.
    Raises AlignmentError for a row that the two read differently, SignalsError if the teacher's scores of options are
    not there.
    """
    section, (teacher_tokenizer, own) = params.distillation, tokenizers
    examples = batches.encode_questions(own, rows)
    weights = section.ce_weight, section.kl_weight
    match section.bridge:
        case "vocabulary":
            marked, loss = entities.mark_entities(own, examples), losses.DistillationLoss.from_params(section)

            def add_extras(numbers: list[int]) -> dict:
                return {**signals.batch(numbers), **marked.batch(numbers)}

        case "spans":
            asked, bridge = batches.encode_questions(teacher_tokenizer, rows), make_bridge(*tokenizers)
            add_extras = cross_tokenizer.AlignedSignals(signals, examples, asked, bridge).batch
            loss = cross_tokenizer.SpanLoss(*weights)
        case "options":
            scores = option_kl.read_scores(signals.folder, rows, signals.index["key"])
            add_extras = option_kl.OptionRows.of_questions(own, rows, scores).batch
            loss = option_kl.OptionLoss(*weights)
    return Lesson(loss, add_extras, measure_difficulty(params, rows, own, signals))


def measure_difficulty(params: Params, rows: pd.DataFrame, tokenizer, signals: Signals) -> list[float] | None:
    """Each row's place between easy and hard, for a progressive order; None, and nothing read, for a random one."""
    if params.distillation.order == "random":
        return None
    marked = entities.mark_entities(tokenizer, batches.encode_questions(tokenizer, rows))
    return pruning.order_by_difficulty(signals.mean_nll(), marked.densities())
