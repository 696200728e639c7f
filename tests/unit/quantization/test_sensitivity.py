"""Sensitivities agree with whole runs, and the model is left as it was."""

import pytest
import torch

from medkit.modeling import batches
from medkit.quantization import memory_ledger, plans, quantize, rowwise, sensitivity
from medkit.quantization.plans import Plan

LAYERS, MLP = 3, 128


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, make_llama):
    return make_llama(layers=LAYERS, intermediate_size=MLP, tie_word_embeddings=request.param)


@pytest.fixture
def examples(make_examples):
    return make_examples(5)


def measure(model, examples):
    return sensitivity.measure_sensitivity(model, examples, True)


def brute_force(model, examples, module, scheme):
    """KL of two whole runs, one of them with the module's weight written over."""
    before = batches.collect_logits(model, examples)
    weight = model.get_submodule(module).weight
    exact = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(rowwise.fake_quantize(exact, scheme, True))
        after = batches.collect_logits(model, examples)
        weight.copy_(exact)
    return batches.measure_drift(before, after)["kl_nats"]


def test_one_module_at_a_time_is_about_what_brute_force_finds(model, make_examples):
    examples = make_examples(150)
    table = measure(model, examples).set_index(["module", "scheme"]).kl_nats
    for name in ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.v_proj"]:
        for scheme in ("int8", "nf4"):
            found = brute_force(model, examples, name, scheme)
            assert table[name, scheme] == pytest.approx(found, rel=0.4), (name, scheme)  # three standard errors


def test_embeddings_and_head_are_what_whole_runs_find(model, examples):
    table = measure(model, examples)
    ends = table[table.layer.isna() & (table.scheme != "unquantized")]
    assert len(ends) == (2 if model.config.tie_word_embeddings else 4)
    for row in ends.itertuples():
        assert row.kl_nats == pytest.approx(brute_force(model, examples, row.module, row.scheme), rel=1e-5)


def test_sensitivity_is_zero_iff_the_scheme_is_exact(model, examples):
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():  # weights that int8 stores exactly
        weight = model.get_submodule(name).weight
        weight.copy_(weight.sign() * 127 / 1024)
    table = measure(model, examples)
    table = table[(table.scheme != "nf4") | (table.module != name)]  # two levels of NF4 store them nearly exactly too
    exact = (table.scheme == "unquantized") | ((table.scheme == "int8") & (table.module == name))
    assert ((table.kl_nats == 0) == exact).all()


def test_the_model_is_as_it_was_after_a_failure_too(model, examples, monkeypatch):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.model.norm.weight.requires_grad_(False)
    learning = [parameter.requires_grad for parameter in model.parameters()]

    def check():
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert [parameter.requires_grad for parameter in model.parameters()] == learning
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())

    measure(model, examples)
    check()
    name = "model.layers.2.mlp.down_proj"
    with pytest.raises(MemoryError), sensitivity.fake_quantized(model, {name: "nf4"}, True):
        assert not torch.equal(before[f"{name}.weight"], model.get_submodule(name).weight)
        raise MemoryError
    check()
    monkeypatch.setattr(rowwise, "fake_quantize", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(model, examples)
    check()


def test_columns_are_what_a_budget_needs(model, examples):
    table = measure(model, examples)
    ends = ~table.module.str.contains("layers")
    assert table.layer[ends].isna().all()
    assert set(table.layer.dropna()) == set(range(LAYERS))
    assert set(table.kind) >= {"q_proj", "down_proj", "embed_tokens"}
    shapes = memory_ledger.model_shapes(model.config)
    everything = Plan(name="unquantized", schemes=dict.fromkeys(table.module, "unquantized"))
    for plan in (plans.nf4_plan(quantize.weight_shapes(model), "int8"), everything):
        listed = table.set_index(["module", "scheme"]).loc[list(plan.schemes.items())].bytes.sum()
        norms = 2 * sum(weight.count for weight in shapes if len(weight.shape) == 1)
        assert listed + norms == memory_ledger.plan_bytes(shapes, plan.schemes).bytes.sum()


def test_a_scheme_that_a_shape_forbids_is_no_choice(make_llama, examples):
    table = measure(make_llama(layers=1), examples)  # 96 columns in down_proj
    without = set(table.module) - set(table.module[table.scheme == "nf4"])
    assert without == {"model.layers.0.mlp.down_proj"}


def test_a_simulated_plan_is_the_plan(make_llama, make_examples):
    make = lambda: make_llama(layers=2, intermediate_size=MLP)  # noqa: E731
    examples, model = make_examples(5), make()
    shapes = quantize.weight_shapes(model)
    table = measure(model, examples)
    int8 = Plan(name="all_int8", schemes=dict.fromkeys(shapes, "int8"))
    unquantized = Plan(name="unquantized", schemes=dict.fromkeys(shapes, "unquantized"))
    candidates = [unquantized, int8, plans.paper_plan(shapes)]
    found = sensitivity.measure_plans(model, examples, True, candidates, table).set_index("plan")
    assert found.loc["unquantized"].drop("bytes").eq(0).all()
    assert found.kl_nats["paper_mix"] > found.kl_nats["all_int8"] > 0
    alone = table.set_index(["module", "scheme"]).kl_nats
    assert found.summed_kl_nats["all_int8"] == pytest.approx(alone.xs("int8", level="scheme").sum())
    before = batches.collect_logits(model, examples)
    after = batches.collect_logits(quantize.apply_plan(make(), int8, True), examples)
    assert batches.measure_drift(before, after)["kl_nats"] == pytest.approx(found.kl_nats["all_int8"], rel=1e-3)
