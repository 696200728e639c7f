"""What cannot work is found before anything runs: by `medkit run` and its `--dry-run`.

Sources that need no download are read as the notebooks read them. Of models the names and shapes of the weights are
checked, not their values.
"""

from functools import partial

import torch

from medkit import data, distillation, inference, lora, modeling, prompts, quantization, sources
from medkit.inference.torch_engine import CACHE_FACTOR
from medkit.modeling.batches import letter_forms
from medkit.params import OWN, ModelParams, Params
from medkit.quantization.gguf_tokenizer import ExportError
from medkit.stage import MedkitError


def check_profile(params: Params) -> list[str]:
    """What a user should know, a sentence each: sources that are not downloaded yet, refused rows, a missing GPU.

    Raises the MedkitError that a notebook would raise, or one in place of its traceback.
    """
    models = [params.models.teacher, *([] if params.models.student == "pruned_teacher" else [params.models.student])]
    model_sources = {"models.embedder": params.models.embedder}
    model_sources |= dict(zip(("models.teacher", "models.student"), (model.source for model in models), strict=False))
    data_sources = {f"data.datasets.{name}": dataset.origin for name, dataset in params.data.datasets.items()}
    data_sources |= {f"data.{n}": s for n in ("open_questions", "dialogues") if (s := getattr(params.data, n))}
    away = [name for name, source in (model_sources | data_sources).items() if not sources.is_here(source)]
    notes = [f"{name} is not downloaded yet, and not checked" for name in away]
    for source in (model_sources | data_sources).values():
        if source.kind in ("local", *OWN) and isinstance(source.path, str):
            sources.fetch(source)
    rationales = params.distillation.rationales
    servers = {"inference.server": params.inference.server}
    servers["distillation.rationales.server"] = rationales and rationales.server
    for key, server in servers.items():
        if server:
            inference.read_key(server, key)
    tokenizers = []
    if not {"models.teacher", "models.student"} & {*away}:
        tokenizers = _check_models(params, models)
    if "models.embedder" not in away:
        modeling.embed_texts(sources.fetch(params.models.embedder), ["a sentence"], "cpu")
    notes += _check_data(params, tokenizers, {name.removeprefix("data.datasets.") for name in away})
    if params.models.device == "cuda" and not torch.cuda.is_available():
        notes.append("models.device is cuda, and this machine has no CUDA device")
    return notes


def _check_models(params: Params, models: list[ModelParams]) -> list:
    """The tokenizers, if teacher and student fit each other, the adapters, the plans and the edge files."""
    section, tokenizers = params.distillation, list(distillation.load_tokenizers(params))
    teacher, *given_student = (modeling.load_skeleton(model, params.models) for model in models)
    depth = len(teacher.get_decoder().layers)
    if not given_student and section.num_layers > depth:
        raise MedkitError(f"distillation.num_layers is {section.num_layers}, the teacher has {depth} layers")
    student = given_student[0] if given_student else modeling.load_skeleton(models[0], params.models)
    if not given_student:
        # which block goes is not known yet; without the first one, windows of attention are most out of step
        student = modeling.keep_layers(student, range(depth - section.num_layers, depth))
    if section.correction:
        lora.check_targets(teacher, section.correction)
    lora.check_targets(student, params.lora.adapter)
    for number, (name, model) in enumerate({"student": student, "teacher": teacher}.items()):
        _check_lengths(params, name, model)
        layers = len(model.get_decoder().layers)
        if wrong := [pair for pair in section.hidden_layers if pair[number] > layers]:
            raise MedkitError(f"distillation.hidden_layers {wrong[0]}: the {name} has {layers} layers")
    for tokenizer in tokenizers:
        _check_template(tokenizer)
    _check_quantization(params, student, tokenizers[1])
    return tokenizers


def _check_lengths(params: Params, name: str, model) -> None:
    """Raise MedkitError if the longest prompt leaves no room for its answer, or if `top_k` is too large."""
    config, section, prompt = model.config.get_text_config(), params.inference, params.data.max_prompt_tokens
    rationales = params.distillation.rationales
    answer = max(section.max_new_tokens, rationales.max_new_tokens if rationales else 0)
    timed = section.bench.long_new_tokens
    new = max(answer + (section.max_thinking_tokens or 0), timed)
    limits = {f"the positions of the {name}": config.max_position_embeddings}
    limits["inference.batch_tokens"] = CACHE_FACTOR * section.batch_tokens - 64  # a page of the cache may be half empty
    for limit, tokens in limits.items():
        needed = prompt + (new if "positions" in limit else timed)
        if needed > tokens:
            raise MedkitError(
                f"data.max_prompt_tokens is {prompt}; with its answer that is {needed} tokens, {limit} allow {tokens}"
            )
    if params.distillation.top_k > config.vocab_size:
        raise MedkitError(f"distillation.top_k is {params.distillation.top_k}, the {name} has {config.vocab_size}")


def _check_template(tokenizer) -> None:
    """Raise MedkitError for a chat template that refuses our turns, and for letters that are no single tokens."""
    question = {"context": "", "question": "Which?", "options": ["one", "two"]}
    for template in (prompts.TEXT, prompts.LETTER):
        for thought in (None, ""):
            prompts.encode(tokenizer, prompts.render(question, template), "one", thought)
    try:
        for letter in prompts.LETTERS:
            letter_forms(tokenizer, letter)
    except ValueError as error:
        raise MedkitError(f"inference.shuffle asks by letter, but {error}") from error


def _check_quantization(params: Params, student, tokenizer) -> None:
    section, shapes = params.quantization, quantization.weight_shapes(student)
    if not any(name.endswith("up_proj") for name in shapes):
        raise MedkitError(f"{student.config.model_type}: only decoders with gated MLPs can be quantized here")
    for plan in (quantization.nf4_plan(shapes), quantization.paper_plan(shapes)):
        quantization.check_plan(plan, student)
    choices = quantization.list_choices(student, section.double_quant)
    bf16_bytes = 2 * sum(parameter.numel() for parameter in student.parameters())
    norms = bf16_bytes - choices[choices.scheme == "unquantized"].bytes.sum()
    try:
        quantization.check_budget(choices, int(section.plan.share * bf16_bytes) - norms)
    except MedkitError as error:
        raise MedkitError(f"quantization.plan.share is {section.plan.share}: {error}") from error
    quantization.estimate_plan(student.config, quantization.nf4_plan(shapes), section.plan.batch, section.plan.context)
    if asked := [f"quantization.{name}" for name in ("edge", "edge_small") if getattr(section, name)]:
        try:
            quantization.check_export(student, tokenizer)
        except ExportError as error:
            named = " and ".join(asked)
            raise ExportError(f"{named}: {error}; or set them to null, then no file is written") from error


def _check_data(params: Params, tokenizers: list, away: set[str]) -> list[str]:
    """Read, split and choose the questions as notebooks 01, 02 and 05 do; says which of a user's rows are refused.

    Before a first download only the user's own files are read: the others take minutes in a large profile.
    """
    local = {name for name, dataset in params.data.datasets.items() if dataset.origin.kind in ("local", *OWN)}
    datasets = {name: d for name, d in params.data.datasets.items() if not away or name in local - away}
    for name, read in (("open_questions", data.read_open_questions), ("dialogues", data.read_dialogues)):
        if (source := getattr(params.data, name)) and f"data.{name}" not in away:
            read(sources.fetch(source))
    if not datasets:
        return []
    paths = {name: sources.fetch(dataset.origin) for name, dataset in datasets.items()}
    questions, rejected = data.load_questions(datasets, paths, params.seed)
    table = data.take_splits(data.assign_pools(questions, params.seed), datasets, params.seed)
    if tokenizers:
        table = data.drop_long(table, partial(prompts.count_prompt_tokens, tokenizers), params.data.max_prompt_tokens)
    section = params.inference
    for counts in (section.questions, {"option_text": section.exams}, {"letter": section.shuffle.questions}):
        counts = {scoring: {n: c for n, c in of.items() if n in datasets} for scoring, of in counts.items()}
        if any(counts.values()):
            inference.choose_questions(table, counts, params.seed)
    if datasets.keys() == params.data.datasets.keys():
        for split in ("labelled", "valid"):
            data.training_rows(table, split)
            lora.adapter_rows(table, split)
    return [
        f"data.datasets.{row['source']}: {row['count']} rows are refused: {row['reason']} (the first: {row['rows']})"
        for row in rejected[rejected.source.isin(local)].to_dict("records")
    ]
