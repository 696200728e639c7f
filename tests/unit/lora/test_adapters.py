"""Adapters: an untrained one changes nothing, merging is its formula, what was saved says the same, tied stays tied."""

import pytest
import torch
from safetensors.torch import load_file

from medkit.lora import adapters
from medkit.lora.adapters import AdapterError
from medkit.modeling import loading, train_once
from medkit.params import AdapterParams

IDS = torch.tensor([[5, 9, 17, 33, 4, 8]])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERY_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
VARIANTS = ["lora", "rslora", "dora"]
ROUNDING = 2e-5  # of logits of size 1
HIDDEN, KV, MLP, VOCAB, LAYERS = 64, 32, 96, 300, 3
SHAPES = {  # (out, in) of the toy's linear layers
    **{"q_proj": (HIDDEN, HIDDEN), "k_proj": (KV, HIDDEN), "v_proj": (KV, HIDDEN), "o_proj": (HIDDEN, HIDDEN)},
    **{"gate_proj": (MLP, HIDDEN), "up_proj": (MLP, HIDDEN), "down_proj": (HIDDEN, MLP)},
}


def adapter(**changes):
    plain = {"variant": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ATTENTION}
    return AdapterParams(**{**plain, **changes})


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@torch.no_grad()
def as_if_trained(model, seed=0):
    """All that trains is moved at random: an adapter with something to say."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def attached(make_llama, **changes):
    return as_if_trained(adapters.attach(make_llama(), adapter(**changes), seed=0))


def factors(model, layer):
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return [next(w for n, w in weights.items() if f"{layer}.lora_{x}" in n) for x in "AB"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_untrained_adapter_changes_nothing(make_llama, variant):
    plain, model = make_llama(), adapters.attach(make_llama(), adapter(variant=variant), seed=0)
    exact = variant != "dora"  # which divides norms
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=0.0 if exact else ROUNDING)
    merged = adapters.merge(model).state_dict()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=0.0 if exact else 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_adapter_trains(make_llama, variant):
    model = adapters.attach(make_llama(), adapter(target_modules=["q_proj", "up_proj"], variant=variant), seed=0)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains and all("lora_" in name and ("q_proj" in name or "up_proj" in name) for name in trains)


@pytest.mark.parametrize("targets", [["q_proj", "nonsense"], ["input_layernorm"], ["embed_tokens"]])
def test_an_unknown_target_is_named(make_llama, targets):
    with pytest.raises(AdapterError, match=f"{targets[-1]}.*it has .*down_proj"):
        adapters.attach(make_llama(), adapter(target_modules=targets), seed=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_equals_unmerged(make_llama, variant, tied):
    plain, model = logits(make_llama(tie_word_embeddings=tied)), make_llama(tie_word_embeddings=tied)
    model = as_if_trained(adapters.attach(model, adapter(target_modules=EVERY_LINEAR, variant=variant), seed=0))
    unmerged = logits(model)
    merged = adapters.merge(model)
    assert (unmerged - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), unmerged, rtol=0, atol=1e-4)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert not merged.training


@pytest.mark.parametrize(("variant", "scale"), [("lora", 8 / 4), ("rslora", 8 / 2), ("dora", 2)])
def test_merging_is_the_formula(make_llama, variant, scale):
    layer = "layers.1.self_attn.q_proj"
    before = make_llama().get_submodule(f"model.{layer}").weight.detach()
    model = attached(make_llama, variant=variant)
    a, b = factors(model, layer)
    expected = before + scale * b @ a
    if variant == "dora":
        size = next(p.detach() for name, p in model.named_parameters() if f"{layer}.lora_magnitude" in name)
        assert not torch.allclose(size, before.norm(dim=1), rtol=0, atol=1e-2)
        expected = size[:, None] * expected / expected.norm(dim=1, keepdim=True)
    after = adapters.merge(model).get_submodule(f"model.{layer}").weight
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank((after - before).double(), tol=1e-5) == (HIDDEN if variant == "dora" else 4)


def test_a_head_tied_to_the_embeddings_is_still_tied_after_merging(make_llama, tokenizer, models_params, tmp_path):
    merged = adapters.merge(attached(make_llama))
    assert merged.lm_head.weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()
    again = loading.load_model(loading.save_model(merged, tokenizer, tmp_path / "merged"), models_params)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again), logits(merged))


def test_an_adapter_on_a_tied_head_is_refused(make_llama):
    """Merging it into the shared weight would change the embeddings as well."""
    with pytest.raises(AdapterError, match=r"lm_head.*tied"):
        adapters.attach(make_llama(), adapter(target_modules=["q_proj", "lm_head"]), seed=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_on_a_head_of_its_own_leaves_the_embeddings_alone(make_llama, tmp_path, variant):
    plain, again, model = (make_llama(tie_word_embeddings=False) for _ in range(3))
    model = as_if_trained(adapters.attach(model, adapter(target_modules=["lm_head"], variant=variant), seed=0))
    unmerged, folder = logits(model), train_once.save_adapter(model, tmp_path / "adapter")
    merged = adapters.merge(model)
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(adapters.load_merged(again, folder)), unmerged, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(merged), unmerged, rtol=0, atol=1e-4)
    assert torch.equal(merged.get_input_embeddings().weight, plain.get_input_embeddings().weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_the_bytes_hold_what_the_model_goes_on_with(make_llama, tmp_path, variant):
    model = attached(make_llama, variant=variant)
    sizes = [
        (train_once.save_adapter(model, tmp_path / name, half) / "adapter_model.safetensors").stat().st_size
        for name, half in (("whole", False), ("half", True))
    ]
    assert sizes[1] < 0.75 * sizes[0]
    loaded = adapters.load_adapter(make_llama(), tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(model))
    torch.testing.assert_close(logits(loaded), logits(attached(make_llama, variant=variant)), rtol=0, atol=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_adapter_merges_into_its_original_base(make_llama, tmp_path, variant):
    model = attached(make_llama, variant=variant)
    folder = train_once.save_adapter(model, tmp_path / "adapter")
    expected = logits(adapters.merge(model))  # as trained: saving has changed nothing
    assert torch.equal(logits(adapters.load_merged(make_llama(), folder)), expected)
    torch.testing.assert_close(logits(adapters.load_adapter(make_llama(), folder)), expected, rtol=0, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_a_weight_that_is_not_finite_is_not_merged(make_llama):
    model = adapters.attach(make_llama(), adapter(), seed=0)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ValueError):
        adapters.merge(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [ATTENTION, EVERY_LINEAR], ids=["attention", "all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted_and_a_tied_head_once(make_llama, variant, targets, tied):
    rank, per_layer = 4, sum(out * columns for out, columns in SHAPES.values()) + 2 * HIDDEN
    total = LAYERS * per_layer + HIDDEN + VOCAB * HIDDEN * (1 if tied else 2)
    model = make_llama(tie_word_embeddings=tied)
    assert adapters.count_parameters(model) == (total, total)
    shapes = [SHAPES[name] for name in targets]
    added = LAYERS * sum(rank * (out + columns) + (out if variant == "dora" else 0) for out, columns in shapes)
    model = adapters.attach(model, adapter(variant=variant, target_modules=targets), seed=0)
    assert adapters.count_parameters(model) == (added, total + added)


def updates(model):
    """Dense s·B·A by module."""
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_singular_values_are_those_of_the_dense_update(make_llama, variant):
    model = attached(make_llama, variant=variant, target_modules=EVERY_LINEAR)
    dense, found = updates(model), adapters.singular_values(model)
    assert found.keys() == dense.keys() and "model.layers.2.mlp.down_proj" in found
    for name, values in found.items():
        assert values.shape == (4,)
        torch.testing.assert_close(values, torch.linalg.svdvals(dense[name])[:4], rtol=1e-5, atol=1e-6)
