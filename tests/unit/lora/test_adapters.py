"""Adapters: an untrained one changes nothing, merging is its formula, and what was saved says the same."""

import pytest
import torch
from safetensors.torch import load_file
from toys import attach_adapter, logits

from medkit.lora import adapters
from medkit.modeling import train_once
from medkit.stage import MedkitError

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = ["lora", "rslora", "dora"]
ROUNDING = 2e-5  # of logits of size 1, where norms are divided
TRAINED = 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_untrained_adapter_changes_nothing_and_it_alone_trains(make_llama, variant):
    plain, model = make_llama(), attach_adapter(make_llama(), variant, ["q_proj", "up_proj"])
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains and all("lora_" in name and ("q_proj" in name or "up_proj" in name) for name in trains)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=ROUNDING if variant == "dora" else 0.0)


@pytest.mark.parametrize(("variant", "scale"), [("lora", 8 / 4), ("rslora", 8 / 2), ("dora", 2)])
def test_merging_is_the_formula(make_llama, variant, scale):
    layer = "layers.1.self_attn.q_proj"
    before = make_llama().get_submodule(f"model.{layer}").weight.detach()
    model = attach_adapter(make_llama(), variant, strength=TRAINED)
    a, b, *size = (p.detach().clone() for name, p in model.named_parameters() if f"{layer}.lora_" in name)
    expected = before + scale * b @ a
    if variant == "dora":
        assert not torch.allclose(size[0], before.norm(dim=1), rtol=0, atol=1e-2)
        expected = size[0][:, None] * expected / expected.norm(dim=1, keepdim=True)
    merged = adapters.merge(model)
    after = merged.get_submodule(f"model.{layer}").weight
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank((after - before).double(), tol=1e-5) == (len(before) if variant == "dora" else 4)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name] and not merged.training


def test_what_has_no_weight_of_its_own_is_no_target(make_llama):
    """Merging into a tied head would change the embeddings as well."""
    for targets in (["q_proj", "nonsense"], ["input_layernorm"], ["embed_tokens"]):
        with pytest.raises(MedkitError, match=f"{targets[-1]}.*it has .*down_proj"):
            attach_adapter(make_llama(), targets=targets)
    with pytest.raises(MedkitError, match=r"lm_head.*tied"):
        attach_adapter(make_llama(), targets=["q_proj", "lm_head"])


def test_an_adapter_on_a_head_of_its_own_leaves_the_embeddings_alone(make_llama, tmp_path):
    plain, again, model = (make_llama(tie_word_embeddings=False) for _ in range(3))
    model = attach_adapter(model, targets=["lm_head"], strength=TRAINED)
    unmerged, folder = logits(model), train_once.save_adapter(model, tmp_path / "adapter")
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    merged = adapters.load_merged(again, folder)
    torch.testing.assert_close(logits(merged), unmerged, rtol=0, atol=1e-4)
    assert torch.equal(merged.get_input_embeddings().weight, plain.get_input_embeddings().weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_adapter_merges_into_its_original_base(make_llama, tmp_path, variant):
    model = attach_adapter(make_llama(), variant, EVERY_LINEAR, strength=TRAINED)
    folder = train_once.save_adapter(model, tmp_path / "adapter")
    expected = logits(adapters.merge(model))  # as trained: saving has changed nothing
    assert torch.equal(logits(adapters.load_merged(make_llama(), folder)), expected)
    assert (expected - logits(make_llama())).abs().max() > 1e-2
    torch.testing.assert_close(logits(adapters.load_adapter(make_llama(), folder)), expected, rtol=0, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_half_the_bytes_hold_what_the_model_goes_on_with(make_llama, tmp_path):
    model = attach_adapter(make_llama(), "dora", strength=TRAINED)
    before = logits(model)
    whole, half = (train_once.save_adapter(model, tmp_path / name, name == "half") for name in ("whole", "half"))
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in (whole, half)]
    assert sizes[1] < 0.75 * sizes[0]
    loaded = adapters.load_adapter(make_llama(), half)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(model))
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=0.1)


def test_a_weight_that_is_not_finite_is_not_merged(make_llama):
    model = attach_adapter(make_llama())
    next(p for name, p in model.named_parameters() if "lora_B" in name).data.fill_(float("nan"))
    with pytest.raises(ValueError):
        adapters.merge(model)


def test_singular_values_are_those_of_the_dense_update(make_llama):
    model = attach_adapter(make_llama(), "rslora", EVERY_LINEAR, strength=TRAINED)
    layers = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    found = adapters.singular_values(model)
    assert found.keys() == layers.keys() and "model.layers.2.mlp.down_proj" in found
    for name, values in found.items():
        dense = layers[name].get_delta_weight("default").detach()
        torch.testing.assert_close(values, torch.linalg.svdvals(dense)[:4], rtol=1e-5, atol=1e-6)
