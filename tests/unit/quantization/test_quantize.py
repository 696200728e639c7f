"""Quantized models come back from disk to the bit, agree with bitsandbytes, and refuse what does not fit."""

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from medkit.modeling import batches, loading
from medkit.quantization import memory_ledger, plans, quantize, rowwise
from medkit.quantization.plans import Plan
from medkit.stage import MedkitError

MLP = 128


def four_bit(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


@pytest.fixture
def make_model(make_llama):
    """model(tied): a small Llama whose matrices are all whole blocks wide."""
    return lambda tied=True, **changes: make_llama(
        layers=2, **{"intermediate_size": MLP, "tie_word_embeddings": tied, **changes}
    )


@pytest.mark.parametrize(("dtype", "double_quant"), [("float32", True), ("bfloat16", False)])
def test_the_nf4_plan_is_what_the_library_does(
    make_model, make_examples, tokenizer, models_params, tmp_path, dtype, double_quant
):
    """With nf4 named: the library's default is fp4."""
    folder = loading.save_model(make_model(), tokenizer, tmp_path / "model")
    params = models_params.model_copy(update={"dtype": dtype})
    library = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    theirs, ours = loading.load_model(folder, params, quantization_config=library), loading.load_model(folder, params)
    quantize.apply_plan(ours, plans.nf4_plan(quantize.weight_shapes(ours)), double_quant)
    assert four_bit(ours).keys() == four_bit(theirs).keys()
    table = memory_ledger.measure_bytes(ours)
    assert table.equals(memory_ledger.measure_bytes(theirs))
    buffers = sum(buffer.nbytes for buffer in theirs.buffers())  # rotary frequencies
    counted = table.bytes[table.component != "quantization state"].sum()
    assert theirs.get_memory_footprint() - buffers == counted
    examples = make_examples(3)
    assert torch.equal(batches.collect_logits(ours, examples), batches.collect_logits(theirs, examples))


PLANS = {
    "unquantized": lambda shapes: Plan(name="unquantized", schemes=dict.fromkeys(shapes, "unquantized")),
    "paper_mix": plans.paper_plan,
    "nf4_int8_embed": lambda shapes: plans.nf4_plan(shapes, "int8"),
    "nf4_all": lambda shapes: plans.nf4_plan(shapes, "nf4"),
    "int8": lambda shapes: Plan(name="int8", schemes=dict.fromkeys(shapes, "int8")),
}


def plan_for(model, name):
    return PLANS[name](quantize.weight_shapes(model))


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in PLANS), ("nf4_all", False), ("int8", False)])
def test_a_plan_reloads_to_the_same_logits_and_bytes(
    make_model, make_examples, tokenizer, models_params, tmp_path, name, tied
):
    model, examples, double_quant = make_model(tied, attention_bias=True, mlp_bias=True), make_examples(3), tied
    plan = plan_for(model, name)
    exact = batches.collect_logits(model, examples)
    quantize.apply_plan(model, plan, double_quant)
    analytic = memory_ledger.plan_bytes(memory_ledger.model_shapes(model.config), plan.schemes, 4, double_quant)
    assert memory_ledger.measure_bytes(model).equals(analytic)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "plan")
    again = quantize.load_quantized(folder, models_params)
    assert memory_ledger.measure_bytes(again).equals(analytic)
    assert any(key.startswith("lm_head") for key in load_file(folder / quantize.WEIGHTS)) != tied
    logits = batches.collect_logits(model, examples)
    assert torch.equal(batches.collect_logits(again, examples), logits)
    assert torch.equal(logits, exact) == (name == "unquantized")
    assert batches.measure_drift(exact, logits)["kl_nats"] < 0.5
    assert Plan.model_validate_json((folder / quantize.PLAN).read_bytes()) == plan
    assert (loading.load_tokenizer(folder).get_vocab(), again.training) == (tokenizer.get_vocab(), False)


@pytest.mark.parametrize("tied", [True, False])
def test_a_calibrated_plan_weighs_the_same_and_comes_back_to_the_bit(
    make_model, make_examples, tokenizer, models_params, tmp_path, tied
):
    model, plain, examples = make_model(tied), make_model(tied), make_examples(12)
    plan = plan_for(model, "nf4_all")
    exact = batches.collect_logits(model, examples)
    calibrated = rowwise.calibrate_nf4(model, plan.schemes, examples, True)
    quantize.apply_plan(model, plan, True, calibration=examples)
    quantize.apply_plan(plain, plan, True)
    for name, stored in calibrated.items():
        module = model.get_submodule(name)
        assert torch.equal(getattr(module, "rows", module).weight.data, stored.data), name
    assert memory_ledger.measure_bytes(model).equals(memory_ledger.measure_bytes(plain))
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "calibrated")
    logits, plain_logits = (batches.collect_logits(m, examples) for m in (model, plain))
    again = quantize.load_quantized(folder, models_params)
    assert torch.equal(batches.collect_logits(again, examples), logits)
    drifts = [batches.measure_drift(exact, after)["kl_nats"] for after in (logits, plain_logits)]
    assert drifts[0] < drifts[1]


def test_a_plan_of_other_modules_is_refused(make_model):
    model = make_model(tied=True)
    schemes = plan_for(model, "nf4_int8_embed").schemes
    with pytest.raises(MedkitError, match=r"'wrong'.*lm_head"):
        quantize.apply_plan(model, Plan(name="wrong", schemes=schemes | {"lm_head": "int8"}), True)
    del schemes["model.layers.1.self_attn.k_proj"]
    with pytest.raises(MedkitError, match=r"no scheme for 'model.layers.1.self_attn.k_proj'"):
        quantize.apply_plan(model, Plan(name="short", schemes=schemes), True)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.self_attn.q_proj"])
def test_a_scheme_that_cannot_apply_is_refused_before_anything_changes(make_llama, name):
    model = make_llama(hidden_size=72, intermediate_size=64)
    before = {key: type(module) for key, module in model.named_modules()}
    schemes = plan_for(model, "int8").schemes | {name: "nf4"}
    with pytest.raises(MedkitError, match=f"{name}' cannot be nf4: its rows of 72 weights"):
        quantize.apply_plan(model, Plan(name="odd", schemes=schemes), True)
    assert {key: type(module) for key, module in model.named_modules()} == before


def test_a_quantized_model_is_neither_quantized_again_nor_saved_if_a_run_repacked_it(
    make_model, make_examples, tokenizer, tmp_path
):
    model = make_model()
    plan = plans.nf4_plan(quantize.weight_shapes(model))
    quantize.apply_plan(model, plan, True)
    with pytest.raises(MedkitError, match="Linear4bit, not a plain"):
        quantize.apply_plan(model, plan, True)
    batches.collect_logits(model, make_examples(1))
    state = model.get_decoder().layers[0].mlp.up_proj.weight.quant_state
    state.packing_format_for_cpu = True  # as bitsandbytes does on CPUs with AVX512-BF16
    with pytest.raises(MedkitError, match="save a model before it runs"):
        quantize.save_quantized(model, tokenizer, plan, tmp_path / "late")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("was", "now"), [("nf4", "int8"), ("unquantized", "nf4")])
def test_a_plan_that_is_not_of_its_weights_is_refused(make_model, tokenizer, models_params, tmp_path, was, now):
    """Nor does transformers take the weights for a plain model's."""
    model, name = make_model(), "model.layers.1.mlp.up_proj"
    schemes = plan_for(model, "unquantized").schemes
    plan = Plan(name="edited", schemes=schemes | {name: was})
    quantize.apply_plan(model, plan, True)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "edited")
    with pytest.raises(MedkitError, match=r"model\.safetensors"):
        loading.load_model(folder, models_params)
    edited = Plan(name="edited", schemes=schemes | {name: now})
    (folder / quantize.PLAN).write_text(edited.model_dump_json())
    with pytest.raises(MedkitError, match=name):
        quantize.load_quantized(folder, models_params)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "noise": lambda path: path.write_bytes(b"\xff\xfe not text"),
}


@pytest.mark.parametrize("file", [quantize.PLAN, quantize.WEIGHTS])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_missing_or_damaged_file_is_named_with_a_cure(make_model, tokenizer, models_params, tmp_path, file, damage):
    model = make_model()
    plan = plan_for(model, "nf4_int8_embed")
    quantize.apply_plan(model, plan, True)
    folder = quantize.save_quantized(model, tokenizer, plan, tmp_path / "quantized")
    DAMAGES[damage](folder / file)
    with pytest.raises(MedkitError, match=rf"{file}: cannot be read .*; (?:copy|give) .*folder") as raised:
        quantize.load_quantized(folder, models_params)
    assert "\n" not in str(raised.value)
