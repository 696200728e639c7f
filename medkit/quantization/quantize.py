"""Weights in 8 and 4 bits: apply a plan to a model, save it, load it back to the bit.

NF4 (arXiv 2305.14314): blocks of 64 weights are divided by their largest magnitude and rounded to the nearest of
sixteen levels, the quantiles of a normal distribution; double quantization stores the scales in 8 bits as well. The
decoder's linear layers in NF4 are bitsandbytes' own; everything else is stored by rows (`rowwise`). Which level a
weight is rounded to may be fitted to examples (`rounding`), nothing is trained, and a model is quantised, and loaded,
on the device where it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from medkit.modeling import loading
from medkit.modeling.batches import Example
from medkit.params import ModelsParams, QuantizationParams
from medkit.quantization import gptq, memory_ledger
from medkit.quantization.plans import Plan, PlanError, Scheme, Shapes, layer_of
from medkit.quantization.rowwise import (
    ROWS,
    Int8Rows,
    Nf4Rows,
    QuantizedEmbedding,
    QuantizedLinear,
    factor_of,
    quantize_nf4,
    restore_nf4,
)
from medkit.stage import atomic_path

PLAN, WEIGHTS = "plan.json", "quantized.safetensors"
"""The weights have a name of their own, so that transformers refuses the folder instead of filling it with noise."""


def nf4_config(section: QuantizationParams, dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 said out loud: the library's defaults are fp4 and float32 arithmetic."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def load_nf4(folder: Path, params: ModelsParams, section: QuantizationParams) -> nn.Module:
    """The model in `folder` with every linear layer but the head in NF4."""
    return loading.load_model(folder, params, quantization_config=nf4_config(section, getattr(torch, params.dtype)))


def weight_shapes(model: nn.Module) -> Shapes:
    """(rows, columns) of every linear layer and embedding, in the model's order; a tied head is no entry of its own."""
    shapes, seen = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            linear = isinstance(module, nn.Linear)
            shapes[name] = (
                (module.out_features, module.in_features) if linear else (module.num_embeddings, module.embedding_dim)
            )
    return shapes


def check_plan(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError unless the plan names exactly the model's modules, with schemes that each of them can take."""
    shapes = weight_shapes(model)
    unknown, missing = sorted(set(plan.schemes) - set(shapes)), sorted(set(shapes) - set(plan.schemes))
    if unknown:
        raise PlanError(
            f"plan {plan.name!r}: {unknown[0]!r} is no module with a weight of its own in this model "
            f"(a tied head goes with the embeddings); take it out"
        )
    if missing:
        raise PlanError(f"plan {plan.name!r}: no scheme for {missing[0]!r}; write 'unquantized' to leave it as it is")
    for name, scheme in plan.schemes.items():
        module = model.get_submodule(name)
        kind = type(module)
        if scheme != "unquantized" and kind not in (nn.Linear, nn.Embedding) and factor_of(module) is None:
            raise PlanError(
                f"plan {plan.name!r}: {name!r} cannot be {scheme}: it is a {kind.__name__}, not a plain linear layer "
                f"or embedding; use 'unquantized', or the model from before it was quantised"
            )
        if scheme == "nf4" and not can_be_nf4(shapes[name]):
            raise PlanError(
                f"plan {plan.name!r}: {name!r} cannot be nf4: its rows of {shapes[name][1]} weights are not whole "
                f"blocks of {memory_ledger.NF4_BLOCK}; use 'int8' or 'unquantized'"
            )


def can_be_nf4(shape: tuple[int, int]) -> bool:
    """Whether rows are whole blocks: what a table by rows needs, and bitsandbytes' kernels for CPUs as well."""
    return shape[1] % memory_ledger.NF4_BLOCK == 0


def apply_plan(model: nn.Module, plan: Plan, double_quant: bool, calibration: Sequence[Example] = ()) -> nn.Module:
    """Quantise a model in place by its plan; returns it. A tied head stays tied: one storage serves both ends.

    With examples as `calibration` (of rows that may be learned from), NF4 weights are rounded to fit their inputs: the
    same format and bytes, much less damage on questions like these. Without, to the nearest level, as the library does.

    Save it before its first forward pass: on CPUs with AVX512-BF16 bitsandbytes then repacks NF4 layers into another
    format, with scales in bf16. Raises PlanError, and changes nothing, for a plan that does not fit the model.
    """
    check_plan(plan, model)
    head = _tied_head(model)
    fitted = gptq.calibrate(model, plan.schemes, calibration, double_quant) if calibration else {}
    for name, scheme in plan.schemes.items():
        if scheme == "unquantized":
            continue
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear) and scheme == "nf4" and layer_of(name) is not None:
            stored = fitted[name] if name in fitted else quantize_nf4(module.weight, double_quant)
            model.set_submodule(name, _linear_4bit(stored, module.bias, module.weight.dtype))
        else:
            weight, bias = module.weight, getattr(module, "bias", None)
            rows = (
                Nf4Rows(fitted[name], weight.dtype) if name in fitted else ROWS[scheme].quantize(weight, double_quant)
            )
            _put_rows(model, name, rows, bias, head)
    return model.eval()


def _tied_head(model: nn.Module) -> str | None:
    """Name of the head if it and the embeddings are stored as one, quantised or not."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    stored = [getattr(end, "rows", None) or end.weight for end in ends if end is not None]
    if len(stored) < 2 or stored[0] is not stored[1]:
        return None
    return _name_of(model, ends[1])


def _put_rows(
    model: nn.Module, name: str, rows: Int8Rows | Nf4Rows, bias: torch.Tensor | None, tied_head: str | None
) -> None:
    if model.get_submodule(name) is not model.get_input_embeddings():
        model.set_submodule(name, QuantizedLinear(rows, bias))
        return
    model.set_submodule(name, QuantizedEmbedding(rows, factor_of(model.get_submodule(name))))
    if tied_head:
        model.set_submodule(tied_head, QuantizedLinear(rows, None))


def _linear_4bit(weight: bnb.nn.Params4bit, bias: torch.Tensor | None, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """bitsandbytes' layer around weights that are quantised already; it computes in `dtype`."""
    rows, columns = weight.quant_state.shape
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.weight, layer.quant_state, weight.module = weight, weight.quant_state, layer
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def save_quantized(model: nn.Module, tokenizer, plan: Plan, folder: Path) -> Path:
    """Write weights, plan, config and tokenizer, whole or not at all. Tied weights are written once.

    Raises PlanError for a model that has run: its NF4 layers may be repacked, which cannot be undone to the bit.
    """
    for name, weight in model.named_parameters():
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise PlanError(f"{name!r} was repacked by its first forward pass; save a model before it runs")
    head = _tied_head(model)
    tensors = {k: t.contiguous() for k, t in model.state_dict().items() if not (head and k.startswith(f"{head}."))}
    with atomic_path(folder) as scratch:
        scratch.mkdir()
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        model.config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / PLAN).write_text(plan.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return folder


def load_quantized(folder: Path, params: ModelsParams) -> nn.Module:
    """A model that `save_quantized` wrote, in eval mode on the params' device: the same logits, to the bit.

    Weights that the plan keeps, and arithmetic, are in the params' dtype. Raises PlanError where plan or weights are
    missing or damaged, and for a plan that is not that of the weights beside it.
    """
    plan = read_plan(folder)
    device, dtype = loading.pick_device(params.device), getattr(torch, params.dtype)
    attention, _ = loading.pick_attention(params.attention, device)
    with init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    check_plan(plan, model)
    head, tensors = _tied_head(model), _read_weights(folder / WEIGHTS, device)
    for name, scheme in plan.schemes.items():
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        if _scheme_of(own) != scheme:
            raise PlanError(
                f"{folder}: {name!r} is {scheme} in {PLAN} and {_scheme_of(own)} in {WEIGHTS}; quantise the model again"
            )
        if scheme != "unquantized":
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
            _restore(model, name, scheme, own, dtype, head)
    kept = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    unexpected = model.load_state_dict(kept, strict=False, assign=True).unexpected_keys
    if head and plan.schemes[_name_of(model, model.get_input_embeddings())] == "unquantized":
        model.tie_weights()
    unread = [*unexpected, *(name for name, parameter in model.named_parameters() if parameter.is_meta)]
    if unread:
        raise PlanError(f"{folder}: {unread[0]!r} is not both in {WEIGHTS} and in the model; quantise the model again")
    for module in model.modules():  # rotary frequencies, made when the model was
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
    model.generation_config = GenerationConfig()
    return model.eval()


def read_plan(folder: Path) -> Plan:
    """The plan that a quantised model was saved with."""
    path = folder / PLAN
    if not path.is_file():
        raise PlanError(f"{folder}: no {PLAN}; a quantised model is a folder that `save_quantized` wrote")
    try:
        return Plan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its top"
        raise PlanError(f"{path} is damaged ({first['msg']} at {place}); quantise the model again") from error


def _read_weights(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise PlanError(f"{path} is missing, its plan is there; copy the whole folder, or quantise the model again")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise PlanError(f"{path} is damaged ({error}); copy it again, or quantise the model again") from error


def _scheme_of(tensors: dict[str, torch.Tensor]) -> str:
    """How a module is stored, by the names of its tensors."""
    if "rows.codes" in tensors:
        return "int8"
    if any(key.endswith(".absmax") for key in tensors):
        return "nf4"
    return "unquantized" if "weight" in tensors else "missing"


def _restore(model: nn.Module, name: str, scheme: Scheme, own: dict, dtype: torch.dtype, head: str | None) -> None:
    bias = own["bias"].to(dtype) if "bias" in own else None
    if any(key.startswith("rows.") for key in own):
        _put_rows(model, name, ROWS[scheme].restore(own, dtype), bias, head)
    else:
        model.set_submodule(name, _linear_4bit(restore_nf4(own, "weight"), bias, dtype))


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
