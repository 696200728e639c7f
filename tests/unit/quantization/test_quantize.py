"""NF4 and not FP4, bytes that agree with arithmetic, and plans that come back from disk to the bit."""

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, Gemma3TextConfig, GemmaConfig

from medkit.lora import adapters
from medkit.modeling import batches, loading
from medkit.params import QuantizationParams
from medkit.quantization import gptq, memory_ledger, plans, quantize, rowwise, sensitivity
from medkit.quantization.plans import Plan, PlanError

VOCAB, HIDDEN, KV, MLP, LAYERS = 300, 64, 32, 128, 3
LINEAR = LAYERS * [HIDDEN * HIDDEN, HIDDEN * HIDDEN, HIDDEN * KV, HIDDEN * KV, HIDDEN * MLP, HIDDEN * MLP, HIDDEN * MLP]
NORMS = (2 * LAYERS + 1) * HIDDEN
BLOCK, OUTER_BLOCK = 64, 256
# the levels of NF4 (arXiv 2305.14314, appendix E): quantiles of a standard normal, scaled to [-1, 1]
LEVELS = torch.tensor([
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
])  # fmt: skip


def section(double_quant=True):
    return QuantizationParams(
        double_quant=double_quant,
        gguf_type="Q4_1",
        memory={"total_mb": 1.0, "batch": 1, "context": 8},
        calibration_examples=1,
        drift_examples=1,
    )


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
        return loading.save_model(model, tokenizer, tmp_path / f"model-{tied}")

    return save


def four_bit(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_config_says_nf4_out_loud(double_quant, dtype):
    config = quantize.nf4_config(section(double_quant), dtype)
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant is double_quant
    assert config.bnb_4bit_compute_dtype == dtype


@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_layer_is_quantised_but_the_head(saved, models_params, tied):
    model = quantize.load_nf4(saved(tied), models_params, section())
    assert len(four_bit(model)) == len(LINEAR)
    assert {layer.weight.quant_state.quant_type for layer in four_bit(model).values()} == {"nf4"}
    assert all(layer.weight.quant_state.nested for layer in four_bit(model).values())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert not model.training


def test_each_weight_is_at_its_nearest_nf4_level(saved, models_params):
    folder = saved()
    exact, model = (loading.load_model(folder, models_params), quantize.load_nf4(folder, models_params, section(False)))
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
    model = quantize.load_nf4(saved(tied), models_params, section(double_quant))
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
    table = memory_ledger.measure_bytes(model)
    assert {r.component: (r.weights, r.bytes) for r in table.itertuples()} == expected
    assert list(table.component) == list(expected)
    assert (table.bf16_bytes == 2 * table.weights).all()


@pytest.mark.parametrize("tied", [True, False])
def test_the_ledger_of_an_unquantised_model_is_its_parameters(make_llama, tied):
    model = make_llama(tie_word_embeddings=tied)
    table = memory_ledger.measure_bytes(model)
    assert table.weights.sum() == adapters.count_parameters(model)[1]
    assert table.bytes.sum() == 4 * table.weights.sum()
    assert table.bytes.sum() == sum(p.nbytes for p in model.parameters())
    assert ("head" in set(table.component)) != tied
    assert "quantization state" not in set(table.component)


def test_the_ledger_counts_shared_storage_once(make_llama):
    model = make_llama(tie_word_embeddings=False)
    model.config.tie_word_embeddings = False
    separate = memory_ledger.measure_bytes(model).bytes.sum()
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.data)  # one storage, two parameters
    assert separate - memory_ledger.measure_bytes(model).bytes.sum() == 4 * VOCAB * HIDDEN


def test_the_ledger_counts_what_the_library_leaves_out(saved, models_params):
    model = quantize.load_nf4(saved(), models_params, section())
    table = memory_ledger.measure_bytes(model).set_index("component").bytes
    recomputed = sum(buffer.nbytes for buffer in model.buffers())  # rotary frequencies, which are no weights
    assert model.get_memory_footprint() - recomputed == table.sum() - table["quantization state"]
    assert model.get_memory_footprint() < table.sum()


@pytest.mark.parametrize("double_quant", [True, False])
def test_saved_and_reloaded_it_gives_the_same_logits(
    saved, make_examples, tokenizer, models_params, tmp_path, double_quant
):
    examples = make_examples(3)
    model = quantize.load_nf4(saved(), models_params, section(double_quant))
    before = memory_ledger.measure_bytes(model)
    folder = loading.save_model(model, tokenizer, tmp_path / "nf4")
    again = loading.load_model(folder, models_params)
    assert memory_ledger.measure_bytes(again).equals(before)
    logits = batches.collect_logits(model, examples)
    assert torch.equal(batches.collect_logits(again, examples), logits)
    exact = batches.collect_logits(loading.load_model(saved(), models_params), examples)
    assert 0 < batches.measure_drift(exact, logits)["kl_nats"] < 0.5


@pytest.mark.parametrize(("batch", "context"), [(1, 7), (3, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_cache_bytes_are_those_of_a_real_cache(make_llama, batch, context, dtype):
    model = make_llama(layers=4).to(dtype)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(batch, context, dtype=torch.long), past_key_values=cache, use_cache=True)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory_ledger.kv_cache_bytes(model.config, batch, context, dtype.itemsize) == stored


# --- plans ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_model(make_llama):
    """model(tied): a small Llama whose matrices are all whole blocks wide."""
    return lambda tied=True, **changes: make_llama(
        layers=2, **{"intermediate_size": MLP, "tie_word_embeddings": tied, **changes}
    )


PLANS = {
    "unquantized": lambda shapes: Plan(name="unquantized", schemes=dict.fromkeys(shapes, "unquantized")),
    "nf4": plans.nf4_plan,
    "paper_mix": plans.paper_plan,
    "paper_mix_nf4_head": lambda shapes: plans.paper_plan(shapes, "nf4"),
    "nf4_int8_embed": lambda shapes: plans.nf4_plan(shapes, "int8"),
    "nf4_all": lambda shapes: plans.nf4_plan(shapes, "nf4"),
    "int8": lambda shapes: Plan(name="int8", schemes=dict.fromkeys(shapes, "int8")),
}


def plan_for(model, name):
    return PLANS[name](quantize.weight_shapes(model))


def stored_bytes(model):
    return memory_ledger.measure_bytes(model).bytes.sum()


def ends_are_one(model):
    return model.lm_head.rows is model.get_input_embeddings().rows


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_reloads_to_the_same_logits_and_bytes(
    make_model, make_examples, tokenizer, models_params, tmp_path, name, tied, double_quant
):
    model, examples = make_model(tied), make_examples(3)
    plan = plan_for(model, name)
    exact = batches.collect_logits(model, examples)
    quantize.apply_plan(model, plan, double_quant)
    analytic = memory_ledger.plan_bytes(memory_ledger.model_shapes(model.config), plan.schemes, 4, double_quant)
    assert memory_ledger.measure_bytes(model).equals(analytic)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "plan")
    again = quantize.load_quantized(folder, models_params)
    assert memory_ledger.measure_bytes(again).equals(analytic)
    logits = batches.collect_logits(model, examples)
    assert torch.equal(batches.collect_logits(again, examples), logits)
    assert torch.equal(logits, exact) == (name == "unquantized")
    assert batches.measure_drift(exact, logits)["kl_nats"] < 0.5
    assert quantize.read_plan(folder) == plan
    assert (loading.load_tokenizer(folder).get_vocab(), again.training) == (tokenizer.get_vocab(), False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["nf4_int8_embed", "nf4_all"])
@pytest.mark.parametrize("kind", [GemmaConfig, Gemma2Config, Gemma3TextConfig])
def test_a_gemma_keeps_the_factor_of_its_embeddings(
    make_examples, tokenizer, models_params, tmp_path, kind, name, dtype
):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 128) | {"head_dim": 32, "sliding_window": 16}
    config = kind(**sizes, vocab_size=VOCAB, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    settings = {"dtype": dtype, "attention": "eager"}  # the only one that caps Gemma 2's scores
    examples, params = make_examples(3), models_params.model_copy(update=settings)
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    folder = loading.save_model(source, tokenizer, tmp_path / "gemma")
    model, simulated = loading.load_model(folder, params), loading.load_model(folder, params)
    plan = plan_for(model, name)
    quantize.apply_plan(model, plan, True)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "plan")
    again = quantize.load_quantized(folder, params)
    assert ends_are_one(again)
    for found in (model, again):
        for layer in four_bit(found).values():
            layer.support_avx512bf16_for_cpu = False  # bitsandbytes computes in bf16 where it can
    logits = batches.collect_logits(model, examples)
    assert torch.equal(batches.collect_logits(again, examples), logits)
    ids = torch.arange(VOCAB)[None]
    with sensitivity.fake_quantized(simulated, plan.schemes, True):
        assert torch.equal(again.get_input_embeddings()(ids), simulated.get_input_embeddings()(ids))
        wanted = batches.collect_logits(simulated, examples)
    tolerance = 1e-4 if dtype == "float32" else 0.05
    torch.testing.assert_close(logits, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_tied_ends_stay_one_storage_in_memory_and_on_disk(make_model, tokenizer, models_params, tmp_path, scheme):
    model = make_model(tied=True)
    plan = plans.nf4_plan(quantize.weight_shapes(model), scheme)
    quantize.apply_plan(model, plan, True)
    assert ends_are_one(model)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "tied")
    assert not any(key.startswith("lm_head") for key in load_file(folder / quantize.WEIGHTS))
    assert ends_are_one(quantize.load_quantized(folder, models_params))
    untied = quantize.apply_plan(make_model(tied=False), plan_for(make_model(tied=False), "nf4_int8_embed"), True)
    assert not ends_are_one(untied)


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_holds_what_the_ledger_counts(make_model, tokenizer, tmp_path, tied):
    model = make_model(tied)
    plan = plan_for(model, "nf4_all")
    quantize.apply_plan(model, plan, False)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "sizes")
    tensors = load_file(folder / quantize.WEIGHTS)
    described = sum(tensor.nbytes for key, tensor in tensors.items() if "quant_state" in key)  # dtype, shape: text
    assert sum(tensor.nbytes for tensor in tensors.values()) - described == stored_bytes(model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_calibrated_plan_weighs_the_same_and_comes_back_to_the_bit(
    make_model, make_examples, tokenizer, models_params, tmp_path, tied
):
    model, plain, examples = make_model(tied), make_model(tied), make_examples(12)
    plan = plan_for(model, "nf4_all")
    exact = batches.collect_logits(model, examples)
    fitted = gptq.calibrate(model, plan.schemes, examples, True)
    quantize.apply_plan(model, plan, True, calibration=examples)
    quantize.apply_plan(plain, plan, True)
    for name, stored in fitted.items():
        module = model.get_submodule(name)
        assert torch.equal(getattr(module, "rows", module).weight.data, stored.data), name
    assert memory_ledger.measure_bytes(model).equals(memory_ledger.measure_bytes(plain))
    assert ends_are_one(model) == tied
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "calibrated")
    logits, found_plain = (batches.collect_logits(m, examples) for m in (model, plain))
    again = quantize.load_quantized(folder, models_params)
    assert torch.equal(batches.collect_logits(again, examples), logits)
    drifts = [batches.measure_drift(exact, found)["kl_nats"] for found in (logits, found_plain)]
    assert drifts[0] < drifts[1]


@pytest.mark.parametrize("name", PLANS)
def test_what_runs_is_the_round_trip(make_model, make_examples, name):
    model, simulated, examples = make_model(False), make_model(False), make_examples(3)
    plan = plan_for(model, name)
    quantize.apply_plan(model, plan, True)
    for layer in four_bit(model).values():
        layer.support_avx512bf16_for_cpu = False  # bitsandbytes computes in bf16 where it can
    with torch.no_grad():
        for module, scheme in plan.schemes.items():
            weight = simulated.get_submodule(module).weight
            weight.copy_(rowwise.fake_quantize(weight, scheme, True))
    found, wanted = (batches.collect_logits(m, examples) for m in (model, simulated))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_biases_are_kept(make_model, make_examples, tokenizer, models_params, tmp_path):
    model, examples = make_model(attention_bias=True, mlp_bias=True), make_examples(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    exact = batches.collect_logits(model, examples)
    plan = plan_for(model, "paper_mix")
    quantize.apply_plan(model, plan, True)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "biased")
    logits = batches.collect_logits(model, examples)
    assert batches.measure_drift(exact, logits)["kl_nats"] < 0.5
    assert torch.equal(batches.collect_logits(quantize.load_quantized(folder, models_params), examples), logits)


def test_a_quantised_model_generates(make_model):
    model = make_model(True)
    quantize.apply_plan(model, plan_for(model, "nf4_int8_embed"), True)
    prompt = torch.tensor([[5, 6, 7]])
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        for length in range(3, written.shape[1]):
            assert model(written[:, :length]).logits[0, -1].argmax() == written[0, length]


@pytest.mark.parametrize("change", [{"lm_head": "int8"}, {"model.layers.9.mlp.up_proj": "nf4"}])
def test_a_plan_with_an_unknown_module_is_refused(make_model, change):
    model = make_model(tied=True)
    schemes = plan_for(model, "nf4").schemes | change
    with pytest.raises(PlanError, match=f"'wrong'.*{next(iter(change))}"):
        quantize.apply_plan(model, Plan(name="wrong", schemes=schemes), True)


def test_a_plan_that_leaves_a_module_out_is_refused(make_model):
    model = make_model()
    schemes = plan_for(model, "nf4").schemes
    del schemes["model.layers.1.self_attn.k_proj"]
    with pytest.raises(PlanError, match=r"no scheme for 'model.layers.1.self_attn.k_proj'"):
        quantize.apply_plan(model, Plan(name="short", schemes=schemes), True)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.self_attn.q_proj"])
def test_a_scheme_that_cannot_apply_is_refused_before_anything_changes(make_llama, name):
    model = make_llama(hidden_size=72, intermediate_size=64)
    before = {key: type(module) for key, module in model.named_modules()}
    schemes = plan_for(model, "int8").schemes | {name: "nf4"}
    with pytest.raises(PlanError, match=f"{name}' cannot be nf4: its rows of 72 weights"):
        quantize.apply_plan(model, Plan(name="odd", schemes=schemes), True)
    assert {key: type(module) for key, module in model.named_modules()} == before


def test_a_quantised_model_is_not_quantised_again(make_model):
    model = make_model()
    plan = plan_for(model, "nf4")
    quantize.apply_plan(model, plan, True)
    with pytest.raises(PlanError, match="Linear4bit, not a plain"):
        quantize.apply_plan(model, plan, True)


def test_a_model_that_has_run_is_not_saved_if_that_repacked_it(make_model, make_examples, tokenizer, tmp_path):
    model = make_model()
    plan = plan_for(model, "nf4")
    quantize.apply_plan(model, plan, True)
    batches.collect_logits(model, make_examples(1))
    state = model.get_decoder().layers[0].mlp.up_proj.weight.quant_state
    state.packing_format_for_cpu = True  # as bitsandbytes does on CPUs with AVX512-BF16
    with pytest.raises(PlanError, match="save a model before it runs"):
        quantize.save_quantized(model, tokenizer, plan, tmp_path / "late")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("was", "now"), [("nf4", "int8"), ("nf4", "unquantized"), ("unquantized", "nf4")])
def test_a_plan_that_is_not_of_its_weights_is_refused(make_model, tokenizer, models_params, tmp_path, was, now):
    model, name = make_model(), "model.layers.1.mlp.up_proj"
    schemes = plan_for(model, "unquantized").schemes
    plan = Plan(name="edited", schemes=schemes | {name: was})
    quantize.apply_plan(model, plan, True)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "edited")
    edited = Plan(name="edited", schemes=schemes | {name: now})
    (folder / quantize.PLAN).write_text(edited.model_dump_json())
    with pytest.raises(PlanError, match=name):
        quantize.load_quantized(folder, models_params)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", [quantize.PLAN, quantize.WEIGHTS])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "a quantised model is a folder that|is missing, its plan is there; copy"),
        (cut_in_half, "is damaged .*quantise the model again"),
        (lambda path: path.write_bytes(b""), "is damaged .*quantise the model again"),
        (lambda path: path.write_bytes(b"\xff\xfe not text"), "is damaged .*quantise the model again"),
    ],
    ids=["missing", "cut", "empty", "noise"],
)
def test_a_missing_or_damaged_file_is_named_with_a_cure(
    make_model, tokenizer, models_params, tmp_path, file, damage, said
):
    model = make_model()
    plan = plan_for(model, "nf4_int8_embed")
    quantize.apply_plan(model, plan, True)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "quantised")
    damage(folder / file)
    with pytest.raises(PlanError, match=said) as raised:
        quantize.load_quantized(folder, models_params)
    assert file in str(raised.value) and "\n" not in str(raised.value)


def test_a_wrong_scheme_on_disk_is_named(tmp_path):
    (tmp_path / quantize.PLAN).write_text('{"name": "x", "schemes": {"lm_head": "int3"}}')
    with pytest.raises(PlanError, match=r"plan\.json is damaged .* at schemes\.lm_head\)"):
        quantize.read_plan(tmp_path)


def test_a_folder_without_a_plan_is_refused_and_a_quantised_one_by_transformers(
    make_model, saved, tokenizer, models_params, tmp_path
):
    with pytest.raises(PlanError, match=r"no plan\.json"):
        quantize.load_quantized(saved(), models_params)
    model = make_model()
    plan = plan_for(model, "nf4_int8_embed")
    quantize.apply_plan(model, plan, True)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "quantised")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        loading.load_model(folder, models_params)
