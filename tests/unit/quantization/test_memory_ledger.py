"""The analytic ledger is the measured one: bytes at rest to the byte, the peak of live tensors within a few percent."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    QuantizedCache,
    Qwen2Config,
)

from medkit.modeling import loading
from medkit.params import QuantizationParams
from medkit.quantization import activation_memory, memory_budget, memory_ledger, quantize
from medkit.quantization.plans import Plan

GIB = 2**30
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0,
}  # fmt: skip
WINDOW = 32


def qwen2(**changes):
    return Qwen2Config(**{**SIZES, "tie_word_embeddings": False, **changes})


def gemma(**changes):
    return GemmaConfig(**{**SIZES, "head_dim": 24, **changes})


def gemma3(**changes):
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    return Gemma3TextConfig(**{**SIZES, "head_dim": 24, "sliding_window": WINDOW, "layer_types": kinds, **changes})


def gemma2(**changes):
    return Gemma2Config(**{**SIZES, "head_dim": 16, "sliding_window": WINDOW, **changes})


class RowwiseInt8(nn.Module):
    """What a scheme "int8" stores: a code per weight and a float32 scale per row."""

    def __init__(self, weight):
        super().__init__()
        scale = weight.detach().float().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)


def store(model, schemes, double_quant):
    """The model with bitsandbytes' own 4-bit modules, and rows in int8, where `schemes` says so."""
    for name, scheme in schemes.items():
        old = model.get_submodule(name)
        if scheme == "int8":
            new = RowwiseInt8(old.weight)
        else:
            like = {"compress_statistics": double_quant, "quant_type": "nf4"}
            if isinstance(old, nn.Embedding):
                new = bnb.nn.EmbeddingNF4(*old.weight.shape)
            else:
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, old.bias is not None, **like)
            new.weight = bnb.nn.Params4bit(old.weight.detach(), requires_grad=False, **like)
            new = new.to("cpu")
            if double_quant:  # the library shares this table within a process; files hold one for each matrix
                new.weight.quant_state.state2.code = new.weight.quant_state.state2.code.clone()
        if getattr(old, "bias", None) is not None:
            new.bias = old.bias
        model.set_submodule(name, new)
    return model


# --- bytes at rest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [qwen2(), qwen2(tie_word_embeddings=True), gemma(), gemma2(), gemma3()], ids=lambda c: c.model_type
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_alone_give_the_bytes_of_a_loaded_model(config, dtype):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shapes = memory_ledger.model_shapes(config)
    assert memory_ledger.plan_bytes(shapes, {}, dtype.itemsize).equals(memory_ledger.measure_bytes(model))
    assert sum(weight.count for weight in shapes) == model.num_parameters()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("recipe", ["bf16", "int8", "paper_mix", "nf4", "nf4_int8_embed", "nf4_all"])
@pytest.mark.parametrize("hidden", [64, 60])  # 60: blocks that run over rows, and a last one that is not full
def test_every_recipe_weighs_what_it_weighs_when_stored(recipe, double_quant, hidden):
    config = qwen2(hidden_size=hidden)
    shapes = memory_ledger.model_shapes(config)
    schemes = memory_budget.preset_schemes(shapes)[recipe]
    model = store(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), schemes, double_quant)
    measured = memory_ledger.measure_bytes(model)
    assert memory_ledger.plan_bytes(shapes, schemes, 2, double_quant).equals(measured)
    assert list(measured.component)[:5] == ["embeddings", "attention", "mlp", "biases", "norms"]


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_library_itself_weighs_what_nf4_weighs(make_llama, tokenizer, models_params, tmp_path, double_quant):
    folder = loading.save_model(make_llama(intermediate_size=128), tokenizer, tmp_path / "model")
    section = QuantizationParams.model_construct(double_quant=double_quant)
    model = quantize.load_nf4(folder, models_params, section)
    shapes = memory_ledger.model_shapes(model.config)
    schemes = memory_budget.preset_schemes(shapes)["nf4"]
    assert memory_ledger.plan_bytes(shapes, schemes, 4, double_quant).equals(memory_ledger.measure_bytes(model))


def test_rows_in_int8_are_codes_and_scales():
    config = qwen2(tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    before = memory_ledger.measure_bytes(model).set_index("component").bytes
    table = memory_ledger.measure_bytes(store(model, {"model.layers.0.mlp.up_proj": "int8"}, True)).set_index(
        "component"
    )
    rows, columns = 192, 64
    assert before["mlp"] - table.bytes["mlp"] == 3 * rows * columns
    assert table.bytes["quantization state"] == 4 * rows
    assert table.weights["quantization state"] == 0


@pytest.mark.parametrize(
    ("schemes", "named"),
    [({"lm_head": "int8"}, "lm_head"), ({"model.norm": "nf4"}, "model.norm"), ({"model.embed_tokens": "int4"}, "int4")],
)
def test_a_plan_for_another_model_is_refused(schemes, named):
    with pytest.raises(ValueError, match=named):
        memory_ledger.plan_bytes(memory_ledger.model_shapes(qwen2(tie_word_embeddings=True)), schemes)


# --- the numbers of the paper's models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "double_quant", "gib"),
    [
        ("bf16", True, 14.19),
        ("nf4", True, 5.17),
        ("nf4", False, 5.45),
        ("paper_mix", True, 5.54),
        ("nf4_int8_embed", True, 4.15),
    ],
)
def test_the_7b_student_weighs(recipe, double_quant, gib):
    shapes = memory_ledger.model_shapes(memory_budget.read_config("DeepSeek-R1-Distill-Qwen-7B"))
    table = memory_ledger.plan_bytes(shapes, memory_budget.preset_schemes(shapes)[recipe], 2, double_quant)
    assert round(table.bytes.sum() / GIB, 2) == gib


def test_the_7b_student_with_its_head_in_nf4():
    shapes = memory_ledger.model_shapes(memory_budget.read_config("DeepSeek-R1-Distill-Qwen-7B"))
    table = memory_ledger.plan_bytes(shapes, memory_budget.preset_schemes(shapes)["nf4"] | {"lm_head": "nf4"})
    assert round(table.bytes.sum() / GIB, 2) == 4.41


@pytest.mark.parametrize("name", ["Llama-3.3-70B", "DeepSeek-R1-Distill-Llama-70B"])
def test_the_70b_teacher_cannot_weigh_what_the_paper_says(name):
    shapes = memory_ledger.model_shapes(memory_budget.read_config(name))
    table = memory_ledger.plan_bytes(shapes, {})
    assert round(table.weights.sum() / 1e9, 2) == 70.55
    assert round(table.bytes.sum() / GIB) == 131
    assert table.bytes.sum() > 1.5 * 78.6e9


# --- key-value cache -----------------------------------------------------------------------------------------------


def storage_bytes(cache):
    """What the cache keeps alive: a slice keeps all it was cut from."""
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize("config", [qwen2(), gemma(), gemma2(), gemma3()], ids=lambda c: c.model_type)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_kv_cache_bytes_after_a_step_are_those_of_a_real_cache(config, dtype, context):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        for tokens in (context - 1, 1):
            model(torch.ones(3, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert memory_ledger.kv_cache_bytes(config, 3, context, dtype.itemsize) == storage_bytes(cache)


@pytest.mark.parametrize(("batch", "context"), [(1, 7), (3, 20)])
def test_the_fp8_cache_is_a_byte_a_value_and_two_scales_a_layer(batch, context):
    config = qwen2()
    model, cache = AutoModelForCausalLM.from_config(config).eval(), QuantizedCache("fp8", config)
    with torch.no_grad():
        model(torch.ones(batch, context, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = [t for layer in cache.layers for t in (*layer._quantized_keys, *layer._quantized_values)]
    assert memory_ledger.kv_cache_bytes(config, batch, context, 1) == sum(t.nbytes for t in held)


# --- activations ---------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it that are alive at once; what a kernel takes for itself is not."""

    def __init__(self):
        super().__init__()
        self.alive = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        storages = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for storage in {s._cdata: s for s in storages if s._cdata not in known}.values():
            self.alive += storage.nbytes()
            weakref.finalize(storage, self.release, storage.nbytes())
        self.most = max(self.most, self.alive)
        return result

    def release(self, size):
        self.alive -= size


def measured_peaks(config, dtype, batch, context, cache, recipe="bf16"):
    """Peak of a prefill, its cache included, and what the decode step after it takes on top of what stays."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    schemes = dict.fromkeys(quantize.weight_shapes(model), "unquantized")
    schemes |= memory_budget.preset_schemes(memory_ledger.model_shapes(config))[recipe]
    quantize.apply_plan(model, Plan(name=recipe, schemes=schemes), True)
    ids = torch.ones(batch, context, dtype=torch.long)
    with torch.inference_mode(), Allocations() as seen:
        found = []
        for tokens in (ids, ids[:, :1]):
            before = seen.most = seen.alive
            model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            found.append(seen.most - before)
    return found


@pytest.mark.parametrize(
    ("config", "dtype", "scratch"),
    [
        (qwen2(), torch.float32, 0),
        (qwen2(), torch.bfloat16, 0),
        (gemma(), torch.float32, 0),
        (gemma(), torch.bfloat16, 0),
        (gemma2(), torch.float32, 0),
        (gemma2(), torch.bfloat16, 4 * 4),  # 4 heads, whose scores the softmax kernel turns into float32
        (gemma3(), torch.float32, 4),  # the SDPA kernel turns the mask into the dtype
        (gemma3(), torch.bfloat16, 2),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
@pytest.mark.parametrize(("batch", "context"), [(1, 256), (3, 512)])
def test_the_peak_of_a_prefill_is_that_of_the_tensors_alive(config, dtype, scratch, batch, context):
    size, cache = dtype.itemsize, DynamicCache(config=config)
    prefill, _ = measured_peaks(config, dtype, batch, context, cache)
    computed = activation_memory.activation_bytes(
        config, memory_ledger.model_shapes(config), {}, batch, context, size, size
    )["prefill"]
    total = computed + memory_ledger.kv_cache_bytes(config, batch, context, size)
    assert 0.99 * prefill <= total <= 1.01 * prefill + scratch * batch * context**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [qwen2(), gemma()], ids=lambda c: c.model_type)
def test_the_peak_of_a_prefill_in_int8_is_that_of_the_tensors_alive(config, dtype):
    size, shapes = dtype.itemsize, memory_ledger.model_shapes(config)
    prefill, _ = measured_peaks(config, dtype, 2, 512, DynamicCache(config=config), "int8")
    schemes = memory_budget.preset_schemes(shapes)["int8"]
    computed = activation_memory.activation_bytes(config, shapes, schemes, 2, 512, size, size)["prefill"]
    total = computed + memory_ledger.kv_cache_bytes(config, 2, 512, size)
    assert 0.99 * prefill <= total <= 1.03 * prefill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv", ["as computed", "fp8"])
def test_the_peak_of_a_decode_step_is_the_longest_layer_copied(dtype, kv):
    config, batch, context = qwen2(), 3, 512
    cache = QuantizedCache("fp8", config) if kv == "fp8" else DynamicCache(config=config)
    size, kv_size = dtype.itemsize, 1 if kv == "fp8" else dtype.itemsize
    prefill, decode = measured_peaks(config, dtype, batch, context, cache)
    computed = activation_memory.activation_bytes(
        config, memory_ledger.model_shapes(config), {}, batch, context, size, kv_size
    )
    assert computed["decode"] == pytest.approx(decode, rel=0.05)
    total = computed["prefill"] + memory_ledger.kv_cache_bytes(config, batch, context, kv_size)
    assert total == pytest.approx(prefill, rel=0.01)


def test_a_prefill_grows_with_its_tokens_and_holds_no_square():
    config = qwen2()
    shapes = memory_ledger.model_shapes(config)
    one, two = (activation_memory.activation_bytes(config, shapes, {}, 1, n)["prefill"] for n in (4096, 8192))
    assert two == pytest.approx(2 * one, rel=0.001)
    capped = gemma2()
    one, two = (
        activation_memory.activation_bytes(capped, memory_ledger.model_shapes(capped), {}, 1, n)["prefill"]
        for n in (4096, 8192)
    )
    assert two > 3.9 * one


def test_a_matrix_of_bitsandbytes_is_decoded_whole_and_one_by_rows_is_not():
    config = memory_budget.read_config("DeepSeek-R1-Distill-Qwen-7B")
    shapes = memory_ledger.model_shapes(config)
    held = {
        recipe: activation_memory.activation_bytes(config, shapes, schemes, 2, 16)["decode"]
        for recipe, schemes in memory_budget.preset_schemes(shapes).items()
    }
    matrix = 2 * config.hidden_size * config.intermediate_size
    assert matrix < held["nf4"] < 1.05 * matrix
    assert held["bf16"] < held["int8"] < held["bf16"] + 2 * activation_memory.DECODED_BYTES
    assert held["nf4_all"] == held["nf4_int8_embed"] == held["nf4"]


MEASURE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, Qwen2Config
from medkit.quantization import activation_memory as peak
config = Qwen2Config(**json.loads(sys.argv[1]))
load = lambda: AutoModelForCausalLM.from_config(config).eval()
print(json.dumps(peak.measure_peak(load, batch=2, context=1024, device=torch.device("cpu"))))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set is read as Linux keeps it")
def test_a_fresh_process_grows_by_what_the_ledger_says():
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2}
    # freed blocks go back to the system, whatever allocator settings the tests themselves run under
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(sizes)],
        capture_output=True,
        text=True,
        env=kept | {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    config = Qwen2Config(**sizes)
    shapes = memory_ledger.model_shapes(config)
    computed = activation_memory.activation_bytes(config, shapes, {}, 2, 1024, 4, 4)
    rest = memory_ledger.plan_bytes(shapes, {}, 4).bytes.sum() + memory_ledger.kv_cache_bytes(config, 2, 1024, 4)
    # a resident set also holds what allocator and kernels keep, a good part of a model this small
    assert computed["prefill"] + rest == pytest.approx(measured["prefill"], rel=0.25)
    assert measured["decode"] < measured["prefill"]
