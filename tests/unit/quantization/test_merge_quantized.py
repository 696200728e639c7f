"""Dequantise, merge, requantise: what comes out is the quantised merged weight; what had no update is left alone."""

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from toys import attach_adapter, logits

from medkit.lora import adapters
from medkit.modeling import batches, train_once
from medkit.quantization import merge_quantized, plans, quantize, rowwise
from medkit.stage import MedkitError

TARGETS = ["q_proj", "v_proj", "down_proj"]


def dense_llama(make_llama, **changes):
    return make_llama(layers=2, intermediate_size=128, **changes)


def nf4_llama(make_llama, double_quant=True):
    model = dense_llama(make_llama)
    return quantize.apply_plan(model, plans.nf4_plan(quantize.weight_shapes(model)), double_quant)


def parts(weight):
    """Copies of the tensors that an NF4 weight is made of."""
    state = weight.quant_state.as_dict(packed=True)
    return {"codes": weight.data.clone(), **{name: tensor.clone() for name, tensor in state.items()}}


def stored(model):
    return {name: parts(m.weight) for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def differing(found, expected, names):
    """Which stored tensors of these modules are not the same, to the bit."""
    assert found.keys() == expected.keys()
    return {key for name in names for key in expected[name] if not torch.equal(found[name][key], expected[name][key])}


@pytest.fixture
def save(tmp_path):
    """save(base, strength, variant): the folder of an adapter on that base, moved at random as if trained."""

    def make(base, strength=0.02, variant="lora", targets=TARGETS):
        model = attach_adapter(base, variant, targets, strength)
        return train_once.save_adapter(model, tmp_path / "adapter"), model

    return make


@pytest.mark.parametrize("double_quant", [False, True], ids=["scales in fp32", "scales in 8 bits"])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_what_comes_out_is_the_quantised_merged_weight(make_llama, save, double_quant, variant):
    folder, _ = save(nf4_llama(make_llama, double_quant), variant=variant)
    before = stored(nf4_llama(make_llama, double_quant))
    decoded = dense_llama(make_llama)
    for name, layer in nf4_llama(make_llama, double_quant).named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            decoded.get_submodule(name).weight.data = rowwise.dequantize_nf4(layer.weight)
    merged = adapters.load_merged(decoded, folder)
    expected = {name: parts(rowwise.quantize_nf4(merged.get_submodule(name).weight, double_quant)) for name in before}
    found = stored(merge_quantized.merge_into_quantized(nf4_llama(make_llama, double_quant), folder))
    adapted = [name for name in before if name.rsplit(".", 1)[-1] in TARGETS]
    assert differing(found, expected, adapted) == set()
    assert "codes" in differing(found, before, adapted)
    assert differing(found, before, set(before) - set(adapted)) == set(), "without an adapter nothing is requantised"


def test_the_share_of_an_update_that_survives():
    before, update = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.5, 1.0):
        found = merge_quantized.surviving_share(before, update, before + share * update)
        assert found == pytest.approx(share, abs=1e-5)


def test_dense_targets_of_a_mixed_plan_stay_dense(make_llama, save):
    def mixed():
        model = dense_llama(make_llama)
        schemes = plans.nf4_plan(quantize.weight_shapes(model)).schemes
        kept = {name: "unquantized" if "q_proj" in name else scheme for name, scheme in schemes.items()}
        return quantize.apply_plan(model, plans.Plan(name="mixed", schemes=kept), False)

    folder, beside = save(mixed(), strength=0.1, targets=["q_proj"])
    merged = merge_quantized.merge_into_quantized(mixed(), folder)
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert (logits(merged) - logits(beside)).abs().max() < 0.1 * logits(beside).abs().max()


def test_a_base_that_has_run_is_refused(make_llama, save):
    folder, _ = save(nf4_llama(make_llama))
    base = nf4_llama(make_llama)
    logits(base)
    if not any(getattr(getattr(m, "quant_state", None), "packing_format_for_cpu", False) for m in base.modules()):
        pytest.skip("this CPU has no AVX512-BF16")
    with pytest.raises(MedkitError, match="repacked"):
        merge_quantized.merge_into_quantized(base, folder)


def test_what_merging_did_is_measured(make_llama, make_examples, save):
    examples = make_examples(12)
    plain = batches.predict_examples(make_llama(), examples)
    same = merge_quantized.compare_predictions(plain, plain, range(12), 0.95)
    assert (same["max_abs_logit"], same["top1_changed"], same["nll_change"]) == (0, 0, 0)
    assert same["ci_low"] == same["ci_high"] == 0
    other = batches.predict_examples(make_llama(seed=1), examples)
    found = merge_quantized.compare_predictions(plain, other, range(12), 0.95)
    assert found["nll_change"] == pytest.approx((other.nll - plain.nll).mean())
    assert found["ci_low"] < found["nll_change"] < found["ci_high"]
    assert found["kl_nats"] > 0 and found["positions"] == len(plain.logits)
    pairs = merge_quantized.compare_predictions(plain, other, np.arange(12) // 6, 0.95)
    assert pairs["nll_change"] == found["nll_change"], "groups move the interval alone"
