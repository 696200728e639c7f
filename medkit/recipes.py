"""What each trained stage is: where it starts, what it learns from, where its result goes; in one process or in many.

The notebooks' training cells and `medkit train` call the same functions. Which loss is learned from is for who calls to
say. What was trained already, from the same start on the same rows by the same code, is read back: so a notebook goes
on with what many devices made, and a killed one with what it had finished. Nothing here evaluates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pandas as pd
from accelerate import PartialState, load_checkpoint_in_model
from accelerate.utils import broadcast_object_list, enable_fsdp_ram_efficient_loading
from filelock import FileLock, Timeout
from peft import PeftModel
from torch import nn
from transformers import AutoConfig

from medkit import (
    alignment,
    batching,
    data,
    lessons,
    lora,
    losses,
    models,
    options,
    prefixes,
    prompts,
    sampling,
    sources,
    training,
)
from medkit.batching import Example
from medkit.outputs import Stage, StageError, run_dir
from medkit.params import Params, TrainParams, digest
from medkit.signals import Signals
from medkit.training import Loss

STAGES = {
    "teacher": "02_distillation",
    "student_ce": "02_distillation",
    "student_kd": "02_distillation",
    "lora": "03_lora",
}
RECORD = "training.json"  # beside trained weights: a key to what they were made from, and the log


# --- the stages ------------------------------------------------------------------------------------------------------


def correct_teacher(
    stage: Stage, params: Params, examples: Sequence[Example], loss: Loss
) -> tuple[nn.Module, pd.DataFrame]:
    """The teacher, with an adapter that learned the examples merged into it (arXiv 2408.11796), and the log.

    Writes `teacher_adapter/` and `teacher/`.
    """
    section, source = params.distillation, params.models.teacher
    folder = models.local_folder(source)
    tokenizer = models.load_tokenizer(folder)
    start = _load(folder, params, section.correction_train, source.keep_layers)
    teacher, train = lora.attach(start, section.correction, params.seed), section.correction_train
    fast = {"optimizer": lora.make_optimizer(teacher, section.correction, train.learning_rate)}
    log = _fit(stage, "teacher_adapter", teacher, tokenizer, examples, train, loss, params.seed, **fast)
    if PartialState().is_main_process:
        teacher = lora.merge(teacher)
        models.save_model(teacher, tokenizer, stage.path("teacher"))
    return teacher, log


def train_student(
    stage: Stage,
    params: Params,
    name: str,
    examples: Sequence[Example],
    loss: Loss,
    add_extras: Callable[[list[int]], dict] = lambda rows: {},
    difficulty: Sequence[float] | None = None,
) -> tuple[nn.Module, pd.DataFrame]:
    """The student in `base/` with all its weights trained, and the log. Writes a folder called `name`."""
    section, folder = params.distillation.student_train, _made(stage, "base")
    tokenizer = models.load_tokenizer(folder)
    student = _load(folder, params, section)
    projected = None
    if getattr(loss, "hidden_layers", ()):
        size = AutoConfig.from_pretrained(_made(stage, "teacher")).get_text_config().hidden_size
        projected = losses.hidden_projections(student, loss.hidden_layers, size)
    extras = {"add_extras": add_extras, "difficulty": difficulty, "around": projected}
    return student, _fit(stage, name, student, tokenizer, examples, section, loss, params.seed, **extras)


def fit_adapter(
    stage: Stage, params: Params, examples: Sequence[Example], loss: Loss
) -> tuple[PeftModel, pd.DataFrame]:
    """The distilled student with a trained adapter beside its own weights, not merged, and the log.

    Writes `adapter/`.
    """
    folder, section = stage.require("02_distillation", "student_kd"), params.lora
    tokenizer = models.load_tokenizer(folder)
    model = lora.attach(_load(folder, params, section.train), section.adapter, params.seed)
    fast = {"optimizer": lora.make_optimizer(model, section.adapter, section.train.learning_rate)}
    return model, _fit(stage, "adapter", model, tokenizer, examples, section.train, loss, params.seed, **fast)


# --- one training, its result on disk --------------------------------------------------------------------------------


def _load(folder: Path, params: Params, section: TrainParams, keep: Sequence[int] = ()) -> nn.Module:
    """The model on its device; sharded, on the CPU of each machine's first process, whose weights the others get."""
    if not training.is_sharded(section):
        return models.load_model(folder, params.models, keep)
    attention, _ = models.pick_attention(params.models.attention, models.pick_device(params.models.device))
    enable_fsdp_ram_efficient_loading()
    there = params.models.model_copy(update={"device": "cpu", "attention": attention})
    return models.load_model(folder, there, keep)


def _fit(
    stage: Stage,
    name: str,
    model: nn.Module,
    tokenizer,
    examples: Sequence[Example],
    section: TrainParams,
    loss: Loss,
    seed: int,
    around: AbstractContextManager | None = None,
    **extras,
) -> pd.DataFrame:
    """Train the model in place and save it as `name`, unless that is there already; returns the log."""
    state, record = PartialState(), stage.dir / name / RECORD
    key = found = None
    if state.is_main_process:
        learnt_by = (prefixes, batching, sampling, training, losses, alignment, options, lora)
        code = [Path(module.__file__).read_text() for module in learnt_by]
        key = digest([training.key_of(model, examples, section, loss, seed, **extras), code])
        found = _read_record(record)
    key, found = broadcast_object_list([key, found])
    if found.get("key") == key:
        if state.is_main_process:
            _read_back(model, record.parent)
        return pd.DataFrame(found["log"])
    checkpoints = stage.path(f"checkpoints/{name}")
    with around or nullcontext():
        log = training.train(model, examples, section, loss, checkpoints, tokenizer.pad_token_id, seed, **extras)
    if state.is_main_process:
        stage.reopen()
        if isinstance(model, PeftModel):
            lora.save_adapter(model, record.parent)
        else:
            models.save_model(model, tokenizer, record.parent)
        content = {"key": key, "files": _sizes(record.parent), "log": log.to_dict("records")}
        stage.write_json(f"{name}/{RECORD}", content)
    state.wait_for_everyone()
    return log


def _read_record(record: Path) -> dict:
    """What stands in it, or nothing if a file beside it is lost or cut short: then it is trained anew."""
    found = json.loads(record.read_text()) if record.is_file() else {}
    return found if found.get("files") == _sizes(record.parent) else {}


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file in the folder, but for the record itself."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*")) if path.name != RECORD}


def _read_back(model: nn.Module, folder: Path) -> None:
    if isinstance(model, PeftModel):
        lora.restore(model, folder)
    else:
        load_checkpoint_in_model(model, str(folder))


def _made(stage: Stage, name: str) -> Path:
    """A part of the stage at hand, which no manifest vouches for yet."""
    if not (stage.dir / name).is_dir():
        raise StageError(f"{stage.name}/{name} is not there: run notebook {stage.name} up to it (run={stage.run!r})")
    return stage.dir / name


def signals_key(stage: Stage, tokenizer) -> str:
    """Who spoke, in which words and through which template: signals of another teacher are refused by it."""
    weights = [sources.sha256_of(path) for path in sorted(_made(stage, "teacher").glob("*.safetensors"))]
    return digest([*weights, prompts.TEXT.hash, tokenizer.get_vocab()])


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


def train_stage(name: str, run: str, params: Params) -> pd.DataFrame:
    """Train one of STAGES in this process, or in all processes of `accelerate launch`; returns the log.

    The same result as the notebook's own training, in the same place; the main process alone writes.
    """
    if name not in STAGES:
        raise StageError(f"no trained stage {name!r}; there are {list(STAGES)}")
    state = PartialState(cpu=models.pick_device(params.models.device).type == "cpu")
    lock = FileLock(run_dir(run) / ".lock", timeout=2)
    try:
        with lock if state.is_main_process else nullcontext():
            return _train_stage(name, Stage(run, STAGES[name]), params, state)
    except Timeout as error:
        raise StageError(f"run {run!r} is being worked on by another process; wait for it") from error


def _train_stage(name: str, stage: Stage, params: Params, state: PartialState) -> pd.DataFrame:
    """What the notebooks' training cells do, without their looks at it."""
    questions = pd.read_parquet(stage.require("01_data", "questions.parquet"))
    splits = ["train"] if name == "lora" or not (questions.split == "transfer").any() else ["train", "transfer"]
    rows = pd.concat([data.training_rows(questions, split) for split in splits])
    match name:
        case "teacher":
            tokenizer, _ = lessons.load_tokenizers(params)
            examples = batching.encode_questions(tokenizer, rows)
            _, log = correct_teacher(stage, params, examples, training.cross_entropy)
        case "student_ce" | "student_kd":
            examples = batching.encode_questions(models.load_tokenizer(_made(stage, "base")), rows)
            _, log = train_student(stage, params, name, examples, *read_lesson(name, stage, params, rows))
        case "lora":
            tokenizer = models.load_tokenizer(stage.require("02_distillation", "student_kd"))
            model, log = fit_adapter(stage, params, batching.encode_questions(tokenizer, rows), training.cross_entropy)
            if state.is_main_process:
                models.save_model(lora.merge(model), tokenizer, stage.path("merged"))
    state.wait_for_everyone()
    return log
