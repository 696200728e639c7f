"""What each trained stage is: where it starts, what it learns from, where its result goes; in one process or in many.

The notebooks' training cells and `medkit train` call the same functions. Which loss is learned from is for who calls to
say. What was trained already, from the same start on the same rows by the same code, is read back: so a notebook goes
on with what many devices made, and a killed one with what it had finished. Nothing here evaluates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig

from medkit import sources
from medkit.data import splits as data
from medkit.distillation import lessons, losses, on_policy, rationales
from medkit.distillation.teacher_cache import Signals
from medkit.lora import adapters
from medkit.modeling import batches, loading, trainer
from medkit.modeling.batches import Example
from medkit.modeling.engine import Engine
from medkit.modeling.train_once import fit_once, load_for_training, open_stage, train_once
from medkit.modeling.trainer import Loss
from medkit.params import Params, digest
from medkit.prompts import templates
from medkit.stage import Stage, StageError

STAGES = {
    "teacher": "02_distillation",
    "student_ce": "02_distillation",
    "student_kd": "02_distillation",
    "student_seq": "02_distillation",
    "student_onpolicy": "02_distillation",
}


# --- the stages ------------------------------------------------------------------------------------------------------


def correct_teacher(
    stage: Stage, params: Params, examples: Sequence[Example], loss: Loss
) -> tuple[nn.Module, pd.DataFrame]:
    """The teacher, with an adapter that learned the examples merged into it (arXiv 2408.11796), and the log.

    Writes `teacher_adapter/` and `teacher/`.
    """
    section, source = params.distillation, params.models.teacher
    folder = loading.local_folder(source)
    tokenizer = loading.load_tokenizer(folder)
    start = load_for_training(folder, params.models, section.correction_train, source.keep_layers)
    teacher, train = adapters.attach(start, section.correction, params.seed), section.correction_train
    fast = {"optimizer": adapters.make_optimizer(teacher, section.correction, train.learning_rate)}
    log = train_once(stage, "teacher_adapter", teacher, tokenizer, examples, train, loss, params.seed, **fast)
    if PartialState().is_main_process:
        teacher = adapters.merge(teacher)
        loading.save_model(teacher, tokenizer, stage.path("teacher"))
    return teacher, log


def train_student(
    stage: Stage,
    params: Params,
    name: str,
    examples: Sequence[Example],
    loss: Loss,
    add_extras: Callable[[list[int]], dict] | None = None,
    difficulty: Sequence[float] | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """The student in `base/` with all its weights trained, and the log. Writes a folder called `name`."""
    section, folder = params.distillation.student_train, _made(stage, "base")
    tokenizer = loading.load_tokenizer(folder)
    student = load_for_training(folder, params.models, section)
    projected = None
    if getattr(loss, "hidden_layers", ()):
        size = AutoConfig.from_pretrained(_made(stage, "teacher")).get_text_config().hidden_size
        projected = losses.hidden_projections(student, loss.hidden_layers, size)
    extras = {"add_extras": add_extras, "difficulty": difficulty, "around": projected}
    return student, train_once(stage, name, student, tokenizer, examples, section, loss, params.seed, **extras)


def train_on_rationales(
    stage: Stage, params: Params, rows: pd.DataFrame, num_predicted: int, make_engine: Callable[..., Engine]
) -> tuple[nn.Module, pd.DataFrame]:
    """The student in `base/` trained on its teacher's own verified answers to some of the rows, and the log.

    rows: questions with an answer; num_predicted: the tokens that another student learns, and this one as many. The
    teacher is asked once: with a large one before many devices are, since they would wait for it. Writes
    `rationales.parquet` and `student_seq/`. Raises StageError if nothing was verified.
    """
    section, path = params.distillation.rationales, stage.path("rationales.parquet")
    tokenizer, own = lessons.load_tokenizers(params)

    def load_engine() -> Engine:
        teacher = loading.load_model(_made(stage, "teacher"), params.models)
        torch.manual_seed(params.seed)
        settings = {"batch_tokens": params.inference.batch_tokens, "temperature": section.temperature}
        return make_engine(teacher, tokenizer.pad_token_id, scheduler="continuous", **settings)

    if PartialState().is_main_process:
        speaker = signals_key(stage, tokenizer)
        rationales.collect_samples(path, speaker, load_engine, tokenizer, rows, section, params.seed)
    PartialState().wait_for_everyone()
    sampled = pd.read_parquet(path)
    examples, _ = rationales.choose_examples(own, rows, sampled, section.too_easy, num_predicted)
    if not examples:
        raise StageError(
            f"none of {len(sampled)} rationales is worth learning: raise distillation.rationales.samples, "
            f"max_new_tokens or too_easy"
        )
    return train_student(stage, params, "student_seq", examples, trainer.cross_entropy)


def train_on_policy(stage: Stage, params: Params, examples: Sequence[Example]) -> tuple[nn.Module, pd.DataFrame]:
    """The student in `student_kd/` corrected by the teacher at its own words, and the log. Writes `student_onpolicy/`.

    Through an adapter, it is merged, and `student_onpolicy_adapter/` written as well.
    """
    section, folder, name = params.distillation.on_policy, _made(stage, "student_kd"), "student_onpolicy"
    tokenizer = loading.load_tokenizer(folder)
    student, teacher = (loading.load_model(path, params.models) for path in (folder, _made(stage, "teacher")))
    optimizer = None
    if section.adapter:
        student, name = adapters.attach(student, section.adapter, params.seed), f"{name}_adapter"
        optimizer = adapters.make_optimizer(student, section.adapter, section.train.learning_rate)
    log = fit_once(
        stage,
        name,
        student,
        tokenizer,
        lambda: on_policy.key_of(student, teacher, examples, section, params.seed),
        lambda checkpoints: on_policy.train(
            student, teacher, tokenizer, examples, section, checkpoints, params.seed, optimizer
        ),
    )
    if section.adapter and PartialState().is_main_process:
        student = adapters.merge(student)
        loading.save_model(student, tokenizer, stage.path("student_onpolicy"))
    return student, log


def list_students(params: Params) -> list[str]:
    """The students that the profile asks for, in the order in which they can be trained; TRL is missed here."""
    section = params.distillation
    if section.on_policy:
        on_policy.check_installed()
    asked = {
        "student_ce": True,
        "student_kd": True,
        "student_seq": section.rationales,
        "student_onpolicy": section.on_policy,
    }
    return [name for name, wanted in asked.items() if wanted]


def teach_student(
    name: str, stage: Stage, params: Params, rows: pd.DataFrame, make_engine: Callable[..., Engine] | None = None
) -> tuple[nn.Module, pd.DataFrame]:
    """A student by its name, and the log; `rows`: the questions of the stage's signals, in their order.

    `student_seq` and `student_onpolicy` learn from those with an answer. Raises StageError for one that the profile
    does not ask for.
    """
    if name not in list_students(params):
        key = {"student_seq": "rationales", "student_onpolicy": "on_policy"}.get(name, name)
        raise StageError(f"{name}: distillation.{key} is null in the profile; fill it in, as in params/gpu.yaml")
    own = loading.load_tokenizer(_made(stage, "base"))
    examples, answered = batches.encode_questions(own, rows), rows[rows.answer >= 0]
    match name:
        case "student_seq":
            return train_on_rationales(stage, params, answered, sum(e.num_predicted for e in examples), make_engine)
        case "student_onpolicy":
            return train_on_policy(stage, params, batches.encode_questions(own, answered))
        case _:
            return train_student(stage, params, name, examples, *read_lesson(name, stage, params, rows))


def _made(stage: Stage, name: str) -> Path:
    """A part of the stage at hand, which no manifest vouches for yet."""
    if not (stage.dir / name).is_dir():
        raise StageError(f"{stage.name}/{name} is not there: run notebook {stage.name} up to it (run={stage.run!r})")
    return stage.dir / name


def signals_key(stage: Stage, tokenizer) -> str:
    """Who spoke, in which words and through which template: signals of another teacher are refused by it."""
    weights = [sources.sha256_of(path) for path in sorted(_made(stage, "teacher").glob("*.safetensors"))]
    return digest([*weights, templates.TEXT.hash, tokenizer.get_vocab()])


def read_lesson(name: str, stage: Stage, params: Params, rows: pd.DataFrame) -> lessons.Lesson:
    """What `student_ce` or `student_kd` is taught about these rows, from what the teacher left in the stage."""
    if name == "student_ce" and params.distillation.order == "random":
        return lessons.plain_lesson()
    tokenizers = lessons.load_tokenizers(params)
    signals = Signals(_made(stage, "signals"), signals_key(stage, tokenizers[0]))
    if name == "student_ce":
        return lessons.plain_lesson(lessons.measure_difficulty(params, rows, tokenizers[1], signals))
    return lessons.taught_lesson(params, rows, tokenizers, signals)


# --- from the command line -------------------------------------------------------------------------------------------


def train_stage(name: str, run: str, params: Params, make_engine: Callable[..., Engine] | None = None) -> pd.DataFrame:
    """Train one of STAGES in this process, or in all processes of `accelerate launch`; returns the log.

    The same result as the notebook's own training, in the same place; the main process alone writes.
    `lora.train_stage` trains the adapter.
    """
    if name not in STAGES:
        raise StageError(f"no trained stage {name!r}; there are {list(STAGES)}")
    with open_stage(run, STAGES[name], params) as stage:
        return _train_stage(name, stage, params, make_engine)


def _train_stage(name: str, stage: Stage, params: Params, make_engine) -> pd.DataFrame:
    """What the notebooks' training cells do, without their looks at it."""
    questions = pd.read_parquet(stage.require("01_data", "questions.parquet"))
    splits = ["train", "transfer"] if (questions.split == "transfer").any() else ["train"]
    rows = pd.concat([data.training_rows(questions, split) for split in splits])
    match name:
        case "teacher":
            tokenizer, _ = lessons.load_tokenizers(params)
            examples = batches.encode_questions(tokenizer, rows)
            _, log = correct_teacher(stage, params, examples, trainer.cross_entropy)
        case _:
            _, log = teach_student(name, stage, params, rows, make_engine)
    return log
