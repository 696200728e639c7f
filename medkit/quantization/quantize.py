"""Quantized models: apply a plan to a model, save it, and load it again with the same logits to the bit.

NF4 (arXiv 2305.14314) divides blocks of 64 weights by their largest magnitude and rounds each to the nearest of sixteen
levels, the quantiles of a normal distribution. Double quantization stores the scales of the blocks in 8 bits as well.
Linear layers of the decoder in NF4 are bitsandbytes' own; everything else is stored by rows (see rowwise.py). A model
must be quantized, and loaded, on the device where it runs.
"""

from collections.abc import Sequence
from pathlib import Path

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from medkit.modeling import loading
from medkit.modeling.batches import Example
from medkit.params import ModelsParams
from medkit.quantization import memory_ledger, rowwise
from medkit.quantization.plans import Plan, Shapes, layer_of
from medkit.quantization.rowwise import Int8Rows, Nf4Rows, QuantizedEmbedding, QuantizedLinear
from medkit.stage import MedkitError, atomic_path, reading

PLAN, WEIGHTS = "plan.json", "quantized.safetensors"
"""The weights have their own file name, so that transformers refuses the folder instead of loading random weights."""


def weight_shapes(model: nn.Module) -> Shapes:
    """(rows, columns) of every linear layer and embedding, in the model's order. A tied head has no own entry."""
    matrices = ((name, weight) for name, weight in model.named_parameters() if weight.dim() == 2)
    return {name.removesuffix(".weight"): tuple(weight.shape) for name, weight in matrices}


def can_be_nf4(shape: tuple[int, int]) -> bool:
    """Whether rows are whole blocks, as storage by rows and bitsandbytes' kernels for CPUs need."""
    return shape[1] % memory_ledger.NF4_BLOCK == 0


def is_plain(module: nn.Module) -> bool:
    """Whether a quantized module can take this one's place; Gemma's embeddings also scale what they return."""
    return type(module) in (nn.Linear, nn.Embedding)


def check_plan(plan: Plan, model: nn.Module) -> None:
    """Raise MedkitError unless the plan names exactly the model's modules, with schemes that each of them can have."""
    shapes, where = weight_shapes(model), f"plan {plan.name!r}:"
    for name in sorted(set(plan.schemes) - set(shapes)):
        raise MedkitError(f"{where} the model has no weight {name!r} (a tied head is the embeddings); remove it")
    for name in sorted(set(shapes) - set(plan.schemes)):
        raise MedkitError(f"{where} no scheme for {name!r}; add one, e.g. 'unquantized'")
    for name, scheme in plan.schemes.items():
        module = model.get_submodule(name)
        if scheme != "unquantized" and not is_plain(module):
            raise MedkitError(
                f"{where} {name!r} cannot be {scheme}: it is a {type(module).__name__}, not a plain linear layer or "
                f"embedding; use 'unquantized', or the model from before it was quantized"
            )
        if scheme == "nf4" and not can_be_nf4(shapes[name]):
            raise MedkitError(
                f"{where} {name!r} cannot be nf4: its rows of {shapes[name][1]} weights are not whole blocks of "
                f"{memory_ledger.NF4_BLOCK}; use 'int8' or 'unquantized'"
            )


def apply_plan(model: nn.Module, plan: Plan, double_quant: bool, calibration: Sequence[Example] = ()) -> nn.Module:
    """Quantize a model in place by its plan, and return it. A tied head stays tied.

    With `calibration` (examples from training rows) NF4 is rounded by GPTQ: same format and bytes, smaller KL on
    similar questions. Without it, to the nearest level, as bitsandbytes does. Save the model before its first forward
    pass: on CPUs with AVX512-BF16 that pass repacks NF4 layers. Raises MedkitError, and changes nothing, if the plan
    does not fit the model.
    """
    check_plan(plan, model)
    calibrated = rowwise.calibrate_nf4(model, plan.schemes, calibration, double_quant) if calibration else {}
    for name in [name for name, scheme in plan.schemes.items() if scheme != "unquantized"]:
        weight = model.get_submodule(name).weight
        if plan.schemes[name] == "int8":
            stored = Int8Rows.quantize(weight)
        else:
            nf4 = calibrated[name] if name in calibrated else rowwise.quantize_nf4(weight, double_quant)
            stored = Nf4Rows(nf4, weight.dtype) if layer_of(name) is None else nf4
        _replace(model, name, stored)
    return model.eval()


def _tied_head(model: nn.Module) -> str | None:
    """Name of the head if it shares the storage of the embeddings, quantized or not."""
    tied, head = model.config.get_text_config().tie_word_embeddings, model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if tied and module is head), None)


def _replace(model: nn.Module, name: str, stored: Int8Rows | Nf4Rows | bnb.nn.Params4bit) -> None:
    """Put the quantized module in the place of the module `name`; with the embeddings, also in that of a tied head."""
    old = model.get_submodule(name)
    if isinstance(stored, bnb.nn.Params4bit):
        rows, columns = stored.quant_state.shape
        options = {"compute_dtype": old.weight.dtype, "quant_type": "nf4", "device": "meta"}
        new = bnb.nn.Linear4bit(columns, rows, bias=False, **options)
        new.weight, new.quant_state, stored.module = stored, stored.quant_state, new
        new.bias = None if old.bias is None else nn.Parameter(old.bias.detach(), requires_grad=False)
    elif old is model.get_input_embeddings():
        new = QuantizedEmbedding(stored)
        if head := _tied_head(model):
            model.set_submodule(head, QuantizedLinear(stored, None))
    else:
        new = QuantizedLinear(stored, old.bias)
    model.set_submodule(name, new)


def save_quantized(model: nn.Module, tokenizer, plan: Plan, folder: Path) -> Path:
    """Write weights, plan, config and tokenizer, atomically. Tied weights are written once.

    Raises MedkitError for a model that has run: its NF4 layers may be repacked, and that is not reversible to the bit.
    """
    for name, weight in model.named_parameters():
        if is_repacked(weight):
            raise MedkitError(f"{name!r} was repacked by its first forward pass; save a model before it runs")
    head = _tied_head(model)
    tensors = {k: t.contiguous() for k, t in model.state_dict().items() if not (head and k.startswith(f"{head}."))}
    with atomic_path(folder) as scratch:
        scratch.mkdir()
        save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
        model.config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / PLAN).write_text(plan.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return folder


def is_repacked(weight: torch.Tensor) -> bool:
    """Whether bitsandbytes repacked an NF4 weight for a CPU with AVX512-BF16, with its scales rounded to bf16."""
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def load_quantized(folder: Path, params: ModelsParams) -> nn.Module:
    """A model that `save_quantized` wrote, in eval mode on the params' device: the same logits, to the bit.

    Unquantized weights and the arithmetic have the params' dtype. Raises MedkitError if plan or weights are missing or
    damaged, or if they do not belong together.
    """
    with reading(folder / PLAN, MedkitError, "give a whole folder that `save_quantized` wrote"):
        plan = Plan.model_validate_json((folder / PLAN).read_bytes())
    device, dtype = loading.pick_device(params.device), getattr(torch, params.dtype)
    attention, _ = loading.pick_attention(params.attention, device, params.dtype)
    with init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    check_plan(plan, model)
    with reading(folder / WEIGHTS, MedkitError, "copy the whole folder again, or quantize the model again"):
        tensors = load_file(folder / WEIGHTS, device=str(device))
    for name in [name for name, scheme in plan.schemes.items() if scheme != "unquantized"]:
        keys = [key for key in tensors if key.startswith(f"{name}.") and key != f"{name}.bias"]
        parts = {key.removeprefix(f"{name}."): tensors.pop(key) for key in keys}
        with reading(f"{folder}: {name!r}", MedkitError, "quantize the model again", f"not {plan.schemes[name]} there"):
            if plan.schemes[name] == "int8":
                stored = Int8Rows(parts["rows.codes"], parts["rows.scale"], dtype)
            elif layer_of(name) is None:
                stored = Nf4Rows(rowwise.restore_nf4(parts, "rows.weight"), dtype)
            else:
                stored = rowwise.restore_nf4(parts, "weight")
        _replace(model, name, stored)
    rest = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    unexpected = model.load_state_dict(rest, strict=False, assign=True).unexpected_keys
    if isinstance(model.get_input_embeddings(), nn.Embedding):
        model.tie_weights()
    unread = [*unexpected, *(name for name, parameter in model.named_parameters() if parameter.is_meta)]
    if unread:
        raise MedkitError(f"{folder}: {unread[0]!r} is not in both {WEIGHTS} and model; quantize the model again")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):  # rotary frequencies, computed with the model
            setattr(module, name, buffer.to(device))
    model.generation_config = GenerationConfig()
    return model.eval()
