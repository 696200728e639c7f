"""NF4 and not FP4, the head untouched, and a ledger that agrees with arithmetic to the byte."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from medkit import batching, ledger, lora, models, quantization
from medkit.params import QuantizationParams

PAD, VOCAB, HIDDEN, KV, MLP, LAYERS = 0, 300, 64, 32, 128, 3
LINEAR = LAYERS * [HIDDEN * HIDDEN, HIDDEN * HIDDEN, HIDDEN * KV, HIDDEN * KV, HIDDEN * MLP, HIDDEN * MLP, HIDDEN * MLP]
NORMS = (2 * LAYERS + 1) * HIDDEN
BLOCK, OUTER_BLOCK = 64, 256
# the levels of NF4 (arXiv 2305.14314, appendix E): quantiles of a standard normal, scaled to [-1, 1]
LEVELS = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip


def section(double_quant=True):
    return QuantizationParams(double_quant=double_quant, gguf_type="Q4_1", drift_examples=1)


def state_bytes(weights, double_quant):
    """Of one layer: scales of its blocks and the levels; if quantised as well, the scales' scales, table and mean."""
    blocks = weights // BLOCK
    nested = -(-blocks // OUTER_BLOCK) * 4 + 256 * 4 + 4
    return 16 * 4 + (blocks + nested if double_quant else 4 * blocks)


@pytest.fixture
def saved(make_llama, tokenizer, tmp_path):
    """folder(tied): a small Llama on disk, its layers whole blocks wide."""

    def save(tied=True):
        model = make_llama(intermediate_size=MLP, tie_word_embeddings=tied)
        return models.save_model(model, tokenizer, tmp_path / f"model-{tied}")

    return save


def four_bit(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_config_says_nf4_out_loud(double_quant, dtype):
    config = quantization.nf4_config(section(double_quant), dtype)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant is double_quant
    assert config.bnb_4bit_compute_dtype == dtype


@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_is_quantised_but_the_head(saved, models_params, tied):
    model = quantization.load_nf4(saved(tied), models_params, section())
    assert len(four_bit(model)) == len(LINEAR)
    assert {layer.weight.quant_state.quant_type for layer in four_bit(model).values()} == {"nf4"}
    assert all(layer.weight.quant_state.nested for layer in four_bit(model).values())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert not model.training


def test_each_weight_is_at_its_nearest_nf4_level(saved, models_params):
    folder = saved()
    exact, model = (
        models.load_model(folder, models_params),
        quantization.load_nf4(folder, models_params, section(False)),
    )
    for name, layer in four_bit(model).items():
        blocks = exact.get_submodule(name).weight.detach().reshape(-1, BLOCK)
        scaled = blocks / blocks.abs().amax(-1, keepdim=True)
        nearest = (scaled[..., None] - LEVELS).abs().amin(-1)
        read = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).reshape(-1, BLOCK)
        stored = read / blocks.abs().amax(-1, keepdim=True)
        assert (stored[..., None] - LEVELS).abs().amin(-1).max() < 1e-5, name
        torch.testing.assert_close((stored - scaled).abs(), nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_ledger_is_the_analytic_number_of_bytes(saved, models_params, double_quant, tied):
    model = quantization.load_nf4(saved(tied), models_params, section(double_quant))
    expected = {
        "embeddings": (VOCAB * HIDDEN, 4 * VOCAB * HIDDEN),
        "attention": (LAYERS * sum(LINEAR[:4]), LAYERS * sum(LINEAR[:4]) // 2),
        "mlp": (LAYERS * sum(LINEAR[4:7]), LAYERS * sum(LINEAR[4:7]) // 2),
        "norms": (NORMS, 4 * NORMS),
        "head": (VOCAB * HIDDEN, 4 * VOCAB * HIDDEN),
        "quantization state": (0, sum(state_bytes(n, double_quant) for n in LINEAR)),
    }
    if tied:
        del expected["head"]
    table = ledger.measure_bytes(model)
    assert {r.component: (r.weights, r.bytes) for r in table.itertuples()} == expected
    assert list(table.component) == list(expected)
    assert (table.bf16_bytes == 2 * table.weights).all()


@pytest.mark.parametrize("tied", [True, False])
def test_the_ledger_of_an_unquantised_model_is_its_parameters(make_llama, tied):
    model = make_llama(tie_word_embeddings=tied)
    table = ledger.measure_bytes(model)
    assert table.weights.sum() == lora.count_parameters(model)[1]
    assert table.bytes.sum() == 4 * table.weights.sum()
    assert table.bytes.sum() == sum(p.nbytes for p in model.parameters())
    assert ("head" in set(table.component)) != tied
    assert "quantization state" not in set(table.component)


def test_the_ledger_counts_shared_storage_once(make_llama):
    model = make_llama(tie_word_embeddings=False)
    model.config.tie_word_embeddings = False
    separate = ledger.measure_bytes(model).bytes.sum()
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.data)  # one storage, two parameters
    assert separate - ledger.measure_bytes(model).bytes.sum() == 4 * VOCAB * HIDDEN


def test_the_ledger_counts_what_the_library_leaves_out(saved, models_params):
    model = quantization.load_nf4(saved(), models_params, section())
    hidden = ledger.measure_bytes(model).set_index("component").bytes["quantization state"]
    assert ledger.measure_bytes(model).bytes.sum() - hidden <= model.get_memory_footprint()
    assert hidden > 0


@pytest.mark.parametrize("double_quant", [True, False])
def test_saved_and_reloaded_it_gives_the_same_logits(
    saved, make_examples, tokenizer, models_params, tmp_path, double_quant
):
    examples = make_examples(3)
    model = quantization.load_nf4(saved(), models_params, section(double_quant))
    before = ledger.measure_bytes(model)
    folder = models.save_model(model, tokenizer, tmp_path / "nf4")
    again = models.load_model(folder, models_params)
    assert ledger.measure_bytes(again).equals(before)
    logits = batching.collect_logits(model, examples, PAD)
    assert torch.equal(batching.collect_logits(again, examples, PAD), logits)
    exact = batching.collect_logits(models.load_model(saved(), models_params), examples, PAD)
    assert 0 < batching.measure_drift(exact, logits)["kl_nats"] < 0.5


@pytest.mark.parametrize(("batch", "context"), [(1, 7), (3, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_bytes_are_those_of_a_real_cache(make_llama, batch, context, dtype):
    model = make_llama(layers=4).to(dtype)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(batch, context, dtype=torch.long), past_key_values=cache, use_cache=True)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert ledger.kv_cache_bytes(model.config, batch, context, dtype.itemsize) == stored
