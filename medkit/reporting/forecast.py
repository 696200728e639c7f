"""What a profile will take, before anything is downloaded: tokens, device hours, disk and memory, from shapes alone.

Arithmetic per token and weight: 2 operations to read, 4 more to train a weight, 2 more to pass gradients through one
that is frozen, and 2 more where activations are computed twice. Writing a token reads all weights once per batch.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from medkit.data.splits import MADE, SECOND_FORM
from medkit.distillation import list_students
from medkit.inference.question_variants import rows_for
from medkit.inference.torch_engine import CACHE_FACTOR
from medkit.params import ModelParams, Params, ParamsError, TrainParams
from medkit.prompts.templates import FORMS
from medkit.quantization.memory_budget import read_config
from medkit.quantization.memory_ledger import model_shapes
from medkit.reporting.tables import markdown
from medkit.variants import list_variants

FACTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
DEVICE, TOKENS = FACTS["device"], FACTS["tokens"]
TRAINED_BYTES = 16  # per weight that learns: itself, its gradient and AdamW's two averages, in float32
KEPT_BYTES = 4  # per kept teacher log-probability: a 16-bit id and a 16-bit float


class Part(NamedTuple):
    """One part of a run. `memory_bytes`: weights, gradients and optimiser, without activations."""

    name: str
    tokens: float
    hours: float
    disk_bytes: float
    memory_bytes: float


class _Model(NamedTuple):
    weights: int  # All
    multiplied: int  # Without the input embeddings, which are looked up
    bytes_each: int

    @classmethod
    def of(cls, model: ModelParams, dtype: str) -> "_Model":
        source = model.source
        if source.kind not in ("hub", "local"):
            raise ParamsError(f"no forecast: a model in a {source.kind} has known shapes only after its download")
        shapes = model_shapes(read_config(source.repo if source.kind == "hub" else source.path))
        embeddings = sum(w.count for w in shapes if w.component == "embeddings")
        total = sum(w.count for w in shapes)
        return cls(total, total - embeddings, 4 if dtype == "float32" else 2)

    def read_hours(self, tokens: float) -> float:
        return _hours(2 * self.multiplied * tokens)

    def train_hours(self, tokens: float, train: TrainParams, frozen: bool) -> float:
        per_weight = (4 if frozen else 6) + (2 if train.gradient_checkpointing else 0)
        return _hours(per_weight * self.multiplied * tokens * train.epochs)

    def write_hours(self, prompt: float, new: float, count: float, batch_tokens: int) -> float:
        rows = max(1, CACHE_FACTOR * batch_tokens // (prompt + new))
        step_s = self.weights * self.bytes_each / (DEVICE["bandwidth"] * DEVICE["bandwidth_share"])
        return self.read_hours(prompt * count) + count * new / min(rows, max(count, 1)) * step_s / 3600


def _hours(operations: float) -> float:
    return operations / (DEVICE["flops"] * DEVICE["flops_share"]) / 3600


def _rows(params: Params, *splits: str, second_form: bool = False) -> dict[str, int]:
    """Source → its rows in these splits. Raises ParamsError for a source whose rows or tokens are not known."""
    counts = {}
    for source, dataset in params.data.datasets.items():
        if source not in TOKENS:
            raise ParamsError(f"no forecast: the tokens of a row of data.datasets.{source} are not known")
        if (MADE.get(source) == SECOND_FORM) == second_form:
            counts[source] = sum(_count(source, split, getattr(dataset, split)) for split in splits)
    return counts


def _count(source: str, split: str, count: int | str) -> int:
    if count != "all":
        return count
    try:
        return FACTS["published"][source][split]
    except KeyError:
        raise ParamsError(
            f"no forecast: data.datasets.{source}.{split} is `all`, and its rows are not known; write a number"
        ) from None


def _questions(params: Params, counts: Mapping[str, Mapping[str, int | str]]) -> pd.DataFrame:
    """A row per question of scoring → source → number, as `rows_for` reads them; `all` are a dataset's test rows."""
    rows = []
    for scoring, sources in counts.items():
        for source, n in sources.items():
            n = _count(source, "test", params.data.datasets[source].test if n == "all" else n)
            rows += [(f"{source}:{i}", scoring, source, MADE.get(source, "choice")) for i in range(n)]
    return pd.DataFrame(rows, columns=["id", "scoring", "source", "kind"])


def _tokens(counts: Mapping[str, float], answers: bool = True) -> float:
    return sum(n * sum(TOKENS[source][: 2 if answers else 1]) for source, n in counts.items())


def forecast(params: Params) -> list[Part]:
    """The parts of a run in their order. Raises ParamsError where shapes or sizes are not known without a download."""
    teacher = _Model.of(params.models.teacher, params.models.dtype)
    pruned = params.models.student == "pruned_teacher"
    student = teacher if pruned else _Model.of(params.models.student, params.models.dtype)
    return [*_training(params, teacher, student), *_testing(params, teacher, student)]


def _training(params: Params, teacher: _Model, student: _Model) -> Iterator[Part]:
    section, batch_tokens = params.distillation, params.inference.batch_tokens
    known, transfer = _rows(params, "private", "labelled"), _rows(params, "transfer")
    tokens = _tokens(known)
    by_lora = section.correction is not None
    hours = teacher.train_hours(tokens, section.correction_train, frozen=by_lora)
    model_bytes = teacher.weights * teacher.bytes_each
    trained_bytes = model_bytes if by_lora else teacher.weights * TRAINED_BYTES
    what = "teacher: LoRA" if by_lora else "teacher: all weights"
    yield Part(what, tokens * section.correction_train.epochs, hours, model_bytes, trained_bytes)
    hours = sum(teacher.write_hours(TOKENS[s][0], TOKENS[s][1], n, batch_tokens) for s, n in transfer.items() if n)
    yield Part("teacher: answers of the transfer rows", _tokens(transfer), hours, 0, model_bytes)
    seen = _rows(params, "labelled", "transfer")
    tokens, disk = _tokens(seen), sum(n * TOKENS[s][1] for s, n in seen.items()) * section.top_k * KEPT_BYTES
    yield Part("teacher: top-k of the answers", tokens, teacher.read_hours(tokens), disk, model_bytes)
    students, train = list_students(params), section.student_train
    model_bytes, trained_bytes = student.weights * student.bytes_each, student.weights * TRAINED_BYTES
    if (rationales := section.rationales) is not None:
        labelled = sum(_rows(params, "labelled").values())
        asked = labelled if rationales.questions == "all" else min(rationales.questions, labelled)
        new = (params.inference.max_thinking_tokens or 0) + rationales.max_new_tokens
        prompt = _tokens(_rows(params, "labelled"), answers=False) / labelled
        writers = {"teacher": (teacher, asked * rationales.samples)}
        if rationales.too_easy <= 1:  # what the student itself gets right is left out
            writers["student"] = student, asked
        for name, (model, count) in writers.items():
            hours = model.write_hours(prompt, new, count, batch_tokens)
            loaded_bytes = model.weights * model.bytes_each
            yield Part(f"{name}: reasons, at most", count * (prompt + new), hours, 0, loaded_bytes)
        if "student_seq_kd" in students:
            tokens = asked * (prompt + new)
            disk = asked * new * section.top_k * KEPT_BYTES
            hours, loaded_bytes = teacher.read_hours(tokens), teacher.weights * teacher.bytes_each
            yield Part("teacher: top-k of the reasons, at most", tokens, hours, disk, loaded_bytes)
    tokens = _tokens(seen) * len(students)  # a student of reasons sees as many as the others
    yield Part(
        f"{len(students)} students", tokens * train.epochs, student.train_hours(tokens, train, frozen=False),
        len(students) * model_bytes, trained_bytes,
    )  # fmt: skip
    train, tokens = params.lora.train, _tokens(_rows(params, "labelled", second_form=True))
    hours = student.train_hours(tokens, train, frozen=True)
    yield Part("LoRA of the second form", tokens * train.epochs, hours, model_bytes, model_bytes)


def _testing(params: Params, teacher: _Model, student: _Model) -> Iterator[Part]:
    """All variants, at the student's cost but for two that are the teacher's; thoughts at their longest."""
    section, variants = params.inference, list(list_variants(params))
    asked, exams = _questions(params, section.questions), _questions(params, {"option_text": section.exams})
    read_tokens = read_hours = write_tokens = write_hours = 0.0
    for variant in variants:
        model = teacher if variant.startswith("teacher") else student
        rows = rows_for(variant, asked, exams, section.claims, section.few)
        for (scoring, source), count in rows.groupby(["scoring", "source"]).size().items():
            prompt, answer, options = TOKENS[source]
            if scoring != "generated":
                read_tokens += count * (prompt + options)
                read_hours += model.read_hours(count * (prompt + options))
                continue
            new = section.max_new_tokens + (section.max_thinking_tokens or 0)
            if MADE.get(source) in FORMS:  # no model thinks before it writes a record
                new = answer
            write_tokens += count * (prompt + new)
            write_hours += model.write_hours(prompt, new, count, section.batch_tokens)
    most = max(teacher.weights, student.weights) * student.bytes_each
    yield Part(f"{len(variants)} variants score options", read_tokens, read_hours, 0, most)
    yield Part(f"{len(variants)} variants write, at most", write_tokens, write_hours, 0, most)


def add_up(parts: Iterable[Part]) -> Part:
    """Tokens, hours and disk of all parts together, and the memory of the part that needs the most."""
    _, tokens, hours, disk, memory = zip(*parts, strict=True)
    return Part("in all", sum(tokens), sum(hours), sum(disk), max(memory))


def forecast_table(params: Params) -> str:
    """Markdown: the parts and their sum, with the price and the number of devices that the memory needs."""
    parts = forecast(params)
    total = add_up(parts)
    rows = [
        [part.name, f"{part.tokens / 1e6:,.1f}", f"{part.hours:,.1f}", *(f"{b / 1e9:,.0f}" for b in part[3:])]
        for part in [*parts, total]
    ]
    headings = ["part", "million tokens", f"{DEVICE['name']} hours", "disk, GB", "memory, GB"]
    price = params.evaluation.price_per_machine_hour
    share = -(-total.memory_bytes // DEVICE["memory"])
    devices = "one device holds it" if share == 1 else f"at least {share:.0f} devices must share it (params/accelerate)"
    devices += f", and at {price:g} per hour of the machine the run costs {total.hours * price:,.0f}"
    devices += "" if share == 1 else " if they work in turn"
    return (
        f"{markdown(headings, rows)}\n\n"
        f"An estimate, not a measurement: {DEVICE['flops_share']:.0%} of the arithmetic and "
        f"{DEVICE['bandwidth_share']:.0%} of the bandwidth of an {DEVICE['name']}. Memory is without activations and "
        f"caches; {devices}. Writing is that of a server such as vLLM; transformers' own loop takes several times as "
        "long."
    )
