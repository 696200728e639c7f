"""The trained stages of distillation: the corrected teacher and its students.

Notebook 02 and `medkit train` call the same functions, in one process or in many. A result that is there already, made
from the same inputs by the same code, is read back (`modeling.train_once`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig

from medkit import sources
from medkit.data import splits
from medkit.distillation import cross_tokenizer, entities, losses, on_policy, option_kl, pruning, rationales
from medkit.distillation.teacher_cache import TeacherCache, capture_teacher
from medkit.lora import adapters
from medkit.modeling import batches, loading, trainer
from medkit.modeling.batches import Example
from medkit.modeling.engine import Engine
from medkit.modeling.train_once import fit_once, key_of, load_for_training, open_stage, train_once, training_key
from medkit.modeling.trainer import Loss
from medkit.params import Params
from medkit.prompts import templates
from medkit.stage import Stage, StageError

STAGES = ("teacher", "student_ce", "student_kd", "student_seq", "student_onpolicy")


# --- the teacher -----------------------------------------------------------------------------------------------------


def load_tokenizers(params: Params) -> tuple:
    """The teacher's tokenizer and the student's; with one vocabulary the teacher's, twice.

    Raises MedkitError if `distillation.alignment` is 'tokens' and the vocabularies differ, or if it is 'spans' and the
    bytes of a tokenizer's tokens are not known.
    """
    teacher = loading.load_tokenizer(loading.local_folder(params.models.teacher))
    if params.models.student == "pruned_teacher":
        return teacher, teacher
    student = loading.load_tokenizer(loading.local_folder(params.models.student))
    if params.distillation.alignment == "tokens":
        if different := teacher.get_vocab().items() ^ student.get_vocab().items():
            raise StageError(
                f"distillation.alignment is 'tokens', but teacher and student have different vocabularies (e.g. "
                f"{next(iter(different))}); set it to 'spans', or choose a pair with one vocabulary"
            )
        return teacher, teacher
    if params.distillation.alignment == "spans":
        cross_tokenizer.TokenAligner.from_tokenizers(student, teacher)
    return teacher, student


def correct_teacher(
    stage: Stage, params: Params, examples: Sequence[Example], loss: Loss
) -> tuple[nn.Module, pd.DataFrame]:
    """The teacher after a LoRA fine-tune on the examples, merged, and the log (teacher correction, arXiv 2408.11796).

    Writes `teacher_adapter/` and `teacher/`.
    """
    section, train, source = params.distillation, params.distillation.correction_train, params.models.teacher
    folder = loading.local_folder(source)
    tokenizer = loading.load_tokenizer(folder)
    model = load_for_training(folder, params.models, source.keep_layers, adapter=True)
    teacher = adapters.attach(model, section.correction, params.seed)
    optimizer = adapters.make_optimizer(teacher, section.correction, train.learning_rate)
    log = train_once(
        stage, "teacher_adapter", teacher, tokenizer, examples, train, loss, params.seed, optimizer=optimizer
    )
    if PartialState().is_main_process:
        teacher = adapters.merge(teacher)
        loading.save_model(teacher, tokenizer, stage.path("teacher"))
    return teacher, log


def teacher_key(stage: Stage, tokenizer) -> str:
    """Digest of the teacher's weights, its tokenizer, the prompt template and the code of the capture."""
    weights = [sources.sha256_of(path) for path in sorted(_part(stage, "teacher").glob("*.safetensors"))]
    return key_of(templates.TEXT.hash, [weights, tokenizer.get_vocab()], capture_teacher)


def _part(stage: Stage, name: str) -> Path:
    """A folder that an earlier cell of this stage wrote; no manifest lists it yet."""
    if not (stage.dir / name).is_dir():
        raise StageError(f"{stage.name}/{name} is not there: run notebook {stage.name} up to it (run={stage.run!r})")
    return stage.dir / name


# --- the students ----------------------------------------------------------------------------------------------------


def list_students(params: Params) -> list[str]:
    """Names of the students that the profile asks for, in the order of their training."""
    section = params.distillation
    if section.on_policy and importlib.util.find_spec("trl") is None:  # before hours are spent on what comes first
        raise StageError("distillation.on_policy needs TRL: pip install 'medkit[onpolicy]', or set it to null")
    optional = {"student_seq": section.rationales, "student_onpolicy": section.on_policy}
    return ["student_ce", "student_kd", *(name for name, wanted in optional.items() if wanted)]


def train_student(
    name: str, stage: Stage, params: Params, rows: pd.DataFrame, make_engine: Callable[..., Engine] | None = None
) -> tuple[nn.Module, pd.DataFrame]:
    """Train a student by its name; returns the model and the log. Writes a folder called `name`.

    rows: the questions of the teacher cache, in their order. `student_ce` learns the answers; `student_kd` the answers
    and the teacher; `student_seq` the teacher's verified rationales, as many tokens as the others, with an engine from
    `make_engine`; `student_onpolicy` goes on from `student_kd`. Raises StageError for a student that the profile does
    not ask for, for missing inputs, and if no rationale was verified.
    """
    if name not in list_students(params):
        key = {"student_seq": "rationales", "student_onpolicy": "on_policy"}.get(name, name)
        raise StageError(f"{name}: distillation.{key} is null in the profile; fill it in, as in params/gpu.yaml")
    if name == "student_onpolicy":
        return _train_on_policy(stage, params, rows[rows.answer >= 0])
    section, folder = params.distillation, _part(stage, "base")
    tokenizer = loading.load_tokenizer(folder)
    examples, loss, options = batches.encode_questions(tokenizer, rows), losses.DistillationLoss(ce_weight=1.0), {}
    if name == "student_seq":
        num_predicted = sum(example.num_predicted for example in examples)
        examples, loss = _rationale_examples(stage, params, rows, num_predicted, make_engine), trainer.cross_entropy
    elif name == "student_kd" or section.order == "progressive":
        teacher_tokenizer, _ = load_tokenizers(params)
        cache = TeacherCache(_part(stage, "teacher_cache"), teacher_key(stage, teacher_tokenizer))
        if section.order == "progressive":
            densities = entities.mark_entities(tokenizer, examples).densities()
            options["difficulty"] = pruning.order_by_difficulty(cache.mean_nll(), densities)
        if name == "student_kd":
            loss, options["add_extras"] = distillation_loss(
                stage, params, rows, examples, (teacher_tokenizer, tokenizer), cache
            )
    student = load_for_training(folder, params.models)
    if getattr(loss, "hidden_layers", ()):
        size = AutoConfig.from_pretrained(_part(stage, "teacher")).get_text_config().hidden_size
        options["around"] = losses.hidden_projections(student, loss.hidden_layers, size)
    return student, train_once(
        stage, name, student, tokenizer, examples, section.student_train, loss, params.seed, **options
    )


def distillation_loss(
    stage: Stage,
    params: Params,
    rows: pd.DataFrame,
    examples: Sequence[Example],
    tokenizers: tuple,
    cache: TeacherCache,
) -> tuple[Loss, Callable[[list[int]], dict]]:
    """The loss of `student_kd`, and the function that returns its extras for row numbers.

    examples: the rows as the student reads them; tokenizers: the teacher's and the student's.
    Raises MedkitError for a row that two tokenizers read as different texts, and if option scores are missing.
    """
    section, (teacher_tokenizer, tokenizer) = params.distillation, tokenizers
    match section.alignment:
        case "tokens":
            marked = entities.mark_entities(tokenizer, examples)

            def add_extras(numbers: list[int]) -> dict:
                return {**cache.batch(numbers), **marked.batch(numbers)}

            return losses.DistillationLoss.from_params(section), add_extras
        case "spans":
            teacher_examples = batches.encode_questions(teacher_tokenizer, rows)
            aligner = cross_tokenizer.TokenAligner.from_tokenizers(tokenizer, teacher_tokenizer)
            aligned = cross_tokenizer.AlignedCache(cache, examples, teacher_examples, aligner)
            return cross_tokenizer.SpanLoss(section.ce_weight, section.kl_weight), aligned.batch
        case "options":
            scores = option_kl.read_option_scores(stage.dir / "option_scores.json", rows, cache.index["key"])
            option_rows = option_kl.OptionRows(tokenizer, rows, scores)
            return option_kl.OptionLoss(section.ce_weight, section.kl_weight), option_rows.batch


def _rationale_examples(
    stage: Stage, params: Params, rows: pd.DataFrame, num_predicted: int, make_engine: Callable[..., Engine]
) -> list[Example]:
    """Verified rationales with `num_predicted` tokens to predict. Writes `rationales.parquet`.

    The main process alone samples. With a large teacher, sample in one process before `accelerate launch`.
    """
    section, answered = params.distillation.rationales, rows[rows.answer >= 0]
    teacher_tokenizer, tokenizer = load_tokenizers(params)

    def load_engine() -> Engine:
        teacher = loading.load_model(_part(stage, "teacher"), params.models)
        torch.manual_seed(params.seed)
        settings = {"batch_tokens": params.inference.batch_tokens, "temperature": section.temperature}
        return make_engine(teacher, teacher_tokenizer.pad_token_id, scheduler="continuous", **settings)

    path, key = stage.path("rationales.parquet"), teacher_key(stage, teacher_tokenizer)
    samples = rationales.collect_samples(path, key, load_engine, teacher_tokenizer, answered, section, params.seed)
    verified, _ = rationales.keep_verified(samples, section.too_easy)
    if verified.empty:
        raise StageError(
            f"{path}: none of {len(samples)} rationales was verified; raise distillation.rationales.samples, "
            f"max_new_tokens or too_easy"
        )
    return rationales.repeat_to_length(rationales.encode_rationales(tokenizer, answered, verified), num_predicted)


def _train_on_policy(stage: Stage, params: Params, rows: pd.DataFrame) -> tuple[nn.Module, pd.DataFrame]:
    """`student_kd` after on-policy distillation, and the log. An adapter is merged and kept beside it."""
    section, name = params.distillation.on_policy, "student_onpolicy"
    start = _part(stage, "student_kd")
    tokenizer = loading.load_tokenizer(start)
    student = load_for_training(start, params.models, adapter=section.adapter is not None)
    teacher = loading.load_model(_part(stage, "teacher"), params.models)
    optimizer = None
    if section.adapter:
        student = adapters.attach(student, section.adapter, params.seed)
        optimizer = adapters.make_optimizer(student, section.adapter, section.train.learning_rate)

    def make_key() -> str:
        examples = batches.encode_questions(tokenizer, rows)
        inputs = training_key(student, examples, section.train, trainer.cross_entropy, params.seed)
        settings = section.model_dump(exclude={"train"})
        return key_of(settings, [inputs, teacher_key(stage, tokenizer)], on_policy.train_on_policy)

    def fit(checkpoints: Path) -> pd.DataFrame:
        models = (student, teacher, tokenizer)
        return on_policy.train_on_policy(*models, rows, section, checkpoints, params.seed, optimizer)

    log = fit_once(stage, f"{name}_adapter" if section.adapter else name, student, tokenizer, make_key, fit)
    if section.adapter and PartialState().is_main_process:
        loading.save_model(adapters.merge(student), tokenizer, stage.path(name))
    PartialState().wait_for_everyone()
    return loading.load_model(stage.dir / name, params.models), log  # without what the trainer attached to the model


# --- the command line ------------------------------------------------------------------------------------------------


def train_stage(name: str, run: str, params: Params, make_engine: Callable[..., Engine] | None = None) -> pd.DataFrame:
    """Train one of STAGES in this process, or in all processes of `accelerate launch`; returns the log.

    The result and its place are those of the notebook. `lora.train_stage` trains the adapter.
    """
    if name not in STAGES:
        raise StageError(f"no trained stage {name!r}; choose one of {', '.join(STAGES)}")
    with open_stage(run, "02_distillation", params) as stage:
        questions = pd.read_parquet(stage.require("01_data", "questions.parquet"))
        wanted = ("private", "labelled") if name == "teacher" else ("labelled", "transfer")
        present = [split for split in wanted if (questions.split == split).any()]
        rows = pd.concat([splits.training_rows(questions, split) for split in present])
        if name == "teacher":
            tokenizer, _ = load_tokenizers(params)
            _, log = correct_teacher(stage, params, batches.encode_questions(tokenizer, rows), trainer.cross_entropy)
        else:
            _, log = train_student(name, stage, params, rows, make_engine)
        return log
