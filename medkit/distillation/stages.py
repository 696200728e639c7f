"""The trained stages of distillation: the corrected teacher and its students.

Notebook 02 and `medkit train` call the same functions, in one process or in many. A result that is there already, made
from the same inputs by the same code, is read back (`modeling.train_once`).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig

from medkit.data import splits
from medkit.distillation import answers, cross_tokenizer, entities, losses, pruning
from medkit.distillation.answers import MakeEngine
from medkit.distillation.teacher_cache import TeacherCache, capture_teacher
from medkit.lora import adapters
from medkit.modeling import batches, loading, trainer
from medkit.modeling.batches import Example
from medkit.modeling.train_once import key_of, load_for_training, open_stage, train_once
from medkit.modeling.trainer import Loss
from medkit.params import Params
from medkit.prompts import templates
from medkit.stage import Stage, StageError
from medkit.variants import REASONERS, VARIANTS, list_variants

STUDENTS = tuple(name for name in VARIANTS if name.startswith("student_"))
STAGES = ("teacher", *STUDENTS)
RATIONALE_CACHE = "rationale_cache"


def load_tokenizers(params: Params) -> tuple:
    """The teacher's tokenizer and the student's; with one vocabulary the teacher's, twice.

    Raises MedkitError if `distillation.alignment` is 'tokens' and the vocabularies differ, or if it is 'spans' and the
    bytes of a tokenizer's tokens are not known.
    """
    teacher = loading.load_tokenizer(loading.local_folder(params.models.teacher))
    if params.models.student == "pruned_teacher":
        return teacher, teacher
    student = loading.load_tokenizer(loading.local_folder(params.models.student))
    if params.distillation.alignment == "spans":
        cross_tokenizer.TokenAligner.from_tokenizers(student, teacher)
        return teacher, student
    if different := teacher.get_vocab().items() ^ student.get_vocab().items():
        raise StageError(
            f"distillation.alignment is 'tokens', but teacher and student have different vocabularies (e.g. "
            f"{next(iter(different))}); set it to 'spans', or choose a pair with one vocabulary"
        )
    return teacher, teacher


def teacher_rows(questions: pd.DataFrame) -> pd.DataFrame:
    """The rows that correct the teacher: the private ones, which no student sees, and the labelled ones."""
    present = [split for split in ("private", "labelled") if _has_rows(questions, split)]
    return pd.concat([splits.training_rows(questions, split) for split in present], ignore_index=True)


def _has_rows(questions: pd.DataFrame, split: str) -> bool:
    return bool(((questions.split == split) & (questions.kind != splits.SECOND_FORM)).any())


def correct_teacher(stage: Stage, params: Params, rows: pd.DataFrame) -> tuple[nn.Module, pd.DataFrame]:
    """The teacher after fine-tuning on these rows, and the log (teacher correction, arXiv 2408.11796).

    With LoRA the adapter is merged. rows: `teacher_rows`. Writes `teacher/`, and with LoRA `teacher_adapter/`.
    """
    section, train, source = params.distillation, params.distillation.correction_train, params.models.teacher
    folder = loading.local_folder(source)
    tokenizer = load_tokenizers(params)[0]
    examples = batches.encode_questions(tokenizer, rows)
    adapter = section.correction
    name = "teacher_adapter" if adapter else "teacher"
    teacher = load_for_training(folder, params.models, source.keep_layers, adapter=adapter is not None)
    teacher = adapters.attach(teacher, adapter, params.seed) if adapter else teacher
    log = train_once(stage, name, teacher, tokenizer, examples, train, trainer.cross_entropy, params.seed)
    if adapter and PartialState().is_main_process:
        teacher = adapters.merge(teacher)
        loading.save_model(teacher, tokenizer, stage.path("teacher"))
    return teacher, log


def teacher_key(stage: Stage, params: Params, tokenizer) -> str:
    """Digest of the teacher's weights, their dtype, its tokenizer, the prompt template and the code of the capture."""
    weights = answers.weights_of(_part(stage, "teacher"))
    return key_of([templates.TEXT.hash, params.models.dtype], [weights, tokenizer.get_vocab()], capture_teacher)


def _part(stage: Stage, name: str) -> Path:
    """A folder that an earlier cell of this stage wrote; no manifest lists it yet."""
    if not (stage.dir / name).is_dir():
        raise StageError(f"{stage.name}/{name} is not there: run notebook {stage.name} up to it (run={stage.run!r})")
    return stage.dir / name


def list_students(params: Params) -> list[str]:
    """Names of the students that the profile asks for, in the order of their training."""
    return [name for name in list_variants(params) if name in STUDENTS]


def student_rows(
    name: str, stage: Stage, params: Params, questions: pd.DataFrame, make_engine: MakeEngine | None = None
) -> pd.DataFrame:
    """The different rows that a student learns from: the labelled ones, and the transfer rows with its kind of answer.

    `student_ce` has the labels alone. The answers are the teacher's (`student_kd`, `student_hard`), those of student_ce
    (`student_self`) or the true ones (`student_ceiling`). Answers that were not finished within
    `inference.max_new_tokens` are left out. Written answers are kept in `<model>_answers.parquet`; `make_engine` is
    needed if they are not there.
    """
    labelled = splits.training_rows(questions, "labelled")
    if name in ("student_ce", *REASONERS) or not _has_rows(questions, "transfer"):
        return labelled
    if name == "student_ceiling":
        return pd.concat([labelled, splits.transfer_answers(questions)], ignore_index=True)
    transfer = splits.training_rows(questions, "transfer")
    writer = "student_ce" if name == "student_self" else "teacher"
    path, limit = stage.path(f"{writer}_answers.parquet"), params.inference.max_new_tokens
    table = answers.collect_answers(path, _part(stage, writer), params, transfer, make_engine, limit)
    return pd.concat([labelled, answers.answer_rows(transfer, table)], ignore_index=True)


def train_student(
    name: str, stage: Stage, params: Params, questions: pd.DataFrame, make_engine: MakeEngine | None = None
) -> tuple[nn.Module, pd.DataFrame]:
    """Train a student by its name; returns the model and the log. Writes a folder called `name`.

    All students start from `base/` and see as many examples, in as many steps: those of the labelled and the transfer
    rows together. Who has fewer different rows (`student_rows`) sees them several times. `student_kd` learns the
    distribution in `teacher_cache/` too.

    `student_seq` learns the teacher's verified answers with reasons, and `student_seq_kd` the teacher's distribution
    along them as well, in `rationale_cache/`. An example with reasons is long: these two see as many tokens as
    `student_ce`, in at most as many steps: a step has fewer examples.

    Raises StageError for a student that the profile does not ask for, for missing inputs, and if no answer was
    verified.
    """
    if name not in list_students(params):
        key = "rationales" if name == "student_seq" else "students"
        raise StageError(f"{name}: distillation.{key} in the profile does not ask for it; see params/paper.yaml")
    section, folder = params.distillation, _part(stage, "base")
    tokenizer, options, loss = loading.load_tokenizer(folder), {}, losses.DistillationLoss(ce_weight=1.0)
    rows = student_rows(name, stage, params, questions, make_engine)
    taught = questions.split.isin(["labelled", "transfer"]) & (questions.kind != splits.SECOND_FORM)
    counts = questions[taught].source.value_counts(sort=False).to_dict()
    numbers, train = answers.repeat_rows(rows.source, counts), section.student_train
    encode = partial(batches.encode_questions, questions=rows)
    unique = encode(tokenizer)
    if name in REASONERS:
        num_tokens, steps = sum(len(unique[n].input_ids) for n in numbers), -(-len(numbers) // train.batch_size)
        unique, encode = _verified_examples(stage, params, rows, make_engine)
        numbers = answers.repeat_examples([len(example.input_ids) for example in unique], num_tokens)
        train = train.model_copy(update={"batch_size": -(-len(numbers) // steps)})
    examples = [unique[n] for n in numbers]
    if name in ("student_kd", "student_seq_kd"):
        teacher_tokenizer = load_tokenizers(params)[0]
        by_teacher = unique if section.alignment == "tokens" else encode(teacher_tokenizer)
        key = teacher_key(stage, params, teacher_tokenizer)
        if name == "student_seq_kd":
            _capture_rationales(stage, params, by_teacher, key)
        cache = TeacherCache(
            _part(stage, "teacher_cache" if name == "student_kd" else RATIONALE_CACHE), key, by_teacher
        )
        loss, options["add_extras"] = distillation_loss(params, by_teacher, unique, numbers, cache)
        if name == "student_kd" and section.order == "progressive":
            densities = entities.mark_entities(tokenizer, unique).densities()
            difficulty = pruning.order_by_difficulty(cache.mean_nll(), densities)
            options["difficulty"] = [difficulty[n] for n in numbers]
    student = load_for_training(folder, params.models)
    if getattr(loss, "hidden_layers", ()):
        size = AutoConfig.from_pretrained(_part(stage, "teacher")).get_text_config().hidden_size
        options["around"] = losses.hidden_projections(student, loss.hidden_layers, size)
    return student, train_once(stage, name, student, tokenizer, examples, train, loss, params.seed, **options)


def check_lead(teacher: Mapping[str, float], student: Mapping[str, float], least: float | None) -> dict[str, float]:
    """The teacher's score minus student_ce's for each task, on validation rows.

    Raises StageError if one is below `least`: then there is nothing to distil, and the trainings to come are wasted.
    """
    lead = {task: round(teacher[task] - student[task], 6) for task in teacher}  # 0.83 − 0.73 is 0.1
    if least is not None and (low := {task: value for task, value in lead.items() if value < least}):
        raise StageError(
            f"the teacher leads student_ce by {low} on validation rows, less than distillation.min_teacher_lead "
            f"({least:g}): give the teacher more private rows or the student fewer labelled ones, or set it to null"
        )
    return lead


def distillation_loss(
    params: Params,
    teacher_examples: Sequence[Example],
    examples: Sequence[Example],
    numbers: Sequence[int],
    cache: TeacherCache,
) -> tuple[Loss, Callable[[list[int]], dict]]:
    """The loss of `student_kd`, and the function that returns its extras for places in `numbers`.

    teacher_examples: those of the cache; examples: the same rows as the student reads them; numbers: the row at each
    place of the training. Raises MedkitError for a row that two tokenizers read as different texts.
    """
    section, (teacher_tokenizer, tokenizer) = params.distillation, load_tokenizers(params)
    if section.alignment == "spans":
        aligner = cross_tokenizer.TokenAligner.from_tokenizers(tokenizer, teacher_tokenizer)
        loss = cross_tokenizer.SpanLoss(section.ce_weight, section.kl_weight)
        parts = [cross_tokenizer.AlignedCache(cache, examples, teacher_examples, aligner)]
    else:
        loss = losses.DistillationLoss.from_params(section)
        parts = [cache, *([entities.mark_entities(tokenizer, examples)] if section.entity_weight else [])]

    def add_extras(places: list[int]) -> dict:
        extras = [part.batch([numbers[place] for place in places]) for part in parts]
        return {name: tensor for tensors in extras for name, tensor in tensors.items()}

    return loss, add_extras


def _capture_rationales(stage: Stage, params: Params, examples: Sequence[Example], key: str) -> None:
    """Write RATIONALE_CACHE: the teacher's top-k log-probabilities along its own verified reasons and answers."""
    section = params.distillation
    if PartialState().is_main_process:
        load = partial(loading.load_model, _part(stage, "teacher"), params.models)
        layers = losses.DistillationLoss.from_params(section).teacher_layers
        folder, sizes = stage.path(RATIONALE_CACHE), (section.top_k, section.shard_examples)
        capture_teacher(load, examples, folder, *sizes, key, layers)
    PartialState().wait_for_everyone()


def _verified_examples(
    stage: Stage, params: Params, rows: pd.DataFrame, make_engine: MakeEngine | None
) -> tuple[list[Example], Callable[..., list[Example]]]:
    """The teacher's answers with reasons to labelled rows that are right, one of a question, as the student reads them.

    The function that is returned beside them makes the same examples with another tokenizer.

    The student answers each question once, greedily, to tell which are too easy for it. Writes both models' answers to
    `teacher_rationales.parquet` and `base_rationales.parquet`, and the yield per source to `rationale_yield.parquet`.
    The main process alone samples. With a large teacher, sample in one process before `accelerate launch`.
    """
    section, tokenizer = params.distillation.rationales, load_tokenizers(params)[1]
    rows = rows[~rows.kind.isin(templates.WRITTEN)]
    count = len(rows) if section.questions == "all" else min(section.questions, len(rows))
    rows = rows.sample(count, random_state=params.seed)  # all of them too: a student may not get to the last ones

    def collect(writer: str, **sampling) -> pd.DataFrame:
        return answers.collect_answers(
            stage.path(f"{writer}_rationales.parquet"), _part(stage, writer), params, rows, make_engine,
            section.max_new_tokens, template=templates.RATIONALE,
            max_thinking_tokens=params.inference.max_thinking_tokens, **sampling,
        )  # fmt: skip

    sampling = {"num_samples": section.samples, "temperature": section.temperature, "server": section.server}
    samples, without_teacher = collect("teacher", **sampling), collect("base") if section.too_easy <= 1 else None
    verified, counts = answers.keep_verified(samples, rows, section.too_easy, without_teacher)
    if PartialState().is_main_process:
        stage.write_table("rationale_yield.parquet", counts)
    if verified.empty:
        raise StageError(
            f"none of {len(samples)} rationales was verified; raise distillation.rationales.samples, max_new_tokens or "
            f"too_easy"
        )
    examples = answers.encode_verified(tokenizer, rows, verified)
    limit = AutoConfig.from_pretrained(_part(stage, "base")).get_text_config().max_position_embeddings
    fits = [len(example.input_ids) <= limit for example in examples]
    if not all(fits):
        too_long = f"{fits.count(False)} of {len(fits)} verified rationales are longer than the {limit}"
        if not any(fits):
            raise StageError(f"{too_long} tokens that the student reads; lower inference.max_thinking_tokens")
        warnings.warn(f"{too_long} tokens that the student reads: they are left out", stacklevel=2)
    fitting = [example for example, fit in zip(examples, fits, strict=True) if fit]
    return fitting, partial(answers.encode_verified, questions=rows, verified=verified[fits])


def train_stage(name: str, run: str, params: Params, make_engine: MakeEngine | None = None) -> pd.DataFrame:
    """Train one of STAGES as the notebook does, in one process or all of `accelerate launch`; returns the log."""
    if name not in STAGES:
        raise StageError(f"no trained stage {name!r}; choose one of {', '.join(STAGES)}")
    with open_stage(run, "02_distillation", params) as stage:
        questions = pd.read_parquet(stage.require("01_data", "questions.parquet"))
        if name == "teacher":
            return correct_teacher(stage, params, teacher_rows(questions))[1]
        return train_student(name, stage, params, questions, make_engine)[1]
