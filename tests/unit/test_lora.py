"""Adapters: an untrained one changes nothing, merging is W + (alpha / rank)·B·A, and what was tied stays tied."""

import pytest
import torch
from safetensors.torch import load_file

from medkit import lora, models
from medkit.lora import AdapterError
from medkit.params import AdapterParams

IDS = torch.tensor([[5, 9, 17, 33, 4, 8]])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapter(**changes):
    return AdapterParams(**{"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ATTENTION, **changes})


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@torch.no_grad()
def as_if_trained(model, seed=0):
    """Random B: an adapter with something to say."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_an_untrained_adapter_changes_nothing(make_llama):
    assert torch.equal(logits(lora.attach(make_llama(), adapter(), seed=0)), logits(make_llama()))


def test_only_the_adapter_trains(make_llama):
    model = lora.attach(make_llama(), adapter(target_modules=["q_proj", "up_proj"]), seed=0)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains and all("lora_" in name and ("q_proj" in name or "up_proj" in name) for name in trains)


def test_the_seed_draws_the_adapter(make_llama):
    def drawn(seed):
        model = lora.attach(make_llama(), adapter(), seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


@pytest.mark.parametrize("targets", [["q_proj", "nonsense"], ["input_layernorm"], ["embed_tokens"]])
def test_an_unknown_target_is_named(make_llama, targets):
    with pytest.raises(AdapterError, match=f"{targets[-1]}.*it has .*down_proj"):
        lora.attach(make_llama(), adapter(target_modules=targets), seed=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [ATTENTION, ["gate_proj", "down_proj"]], ids=["attention", "mlp"])
def test_merged_equals_unmerged(make_llama, targets, tied):
    plain = logits(make_llama(tie_word_embeddings=tied))
    model = as_if_trained(lora.attach(make_llama(tie_word_embeddings=tied), adapter(target_modules=targets), seed=0))
    unmerged = logits(model)
    merged = lora.merge(model)
    assert (unmerged - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), unmerged, rtol=0, atol=1e-4)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert not merged.training


def test_merging_is_the_formula(make_llama):
    before = make_llama().model.layers[1].self_attn.q_proj.weight.detach()
    model = as_if_trained(lora.attach(make_llama(), adapter(rank=4, alpha=8.0), seed=0))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    a, b = (next(w for n, w in weights.items() if f"layers.1.self_attn.q_proj.lora_{x}" in n) for x in "AB")
    after = lora.merge(model).model.layers[1].self_attn.q_proj.weight
    torch.testing.assert_close(after, before + 8 / 4 * b @ a, rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank((after - before).double(), tol=1e-5) == 4


def test_a_head_tied_to_the_embeddings_is_still_tied_after_merging(make_llama, tokenizer, models_params, tmp_path):
    merged = lora.merge(as_if_trained(lora.attach(make_llama(), adapter(), seed=0)))
    assert merged.lm_head.weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()
    again = models.load_model(models.save_model(merged, tokenizer, tmp_path / "merged"), models_params)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again), logits(merged))


def test_an_adapter_on_a_tied_head_is_refused_or_merges_right(make_llama):
    """Merging it into the shared weight would change the embeddings as well."""
    try:
        model = lora.attach(make_llama(), adapter(target_modules=["lm_head"]), seed=0)
    except AdapterError:
        return
    unmerged = logits(as_if_trained(model))
    torch.testing.assert_close(logits(lora.merge(model)), unmerged, rtol=0, atol=1e-4)


def test_a_saved_adapter_merges_into_its_base(make_llama, tmp_path):
    model = as_if_trained(lora.attach(make_llama(), adapter(), seed=0))
    folder = lora.save_adapter(model, tmp_path / "adapter")
    expected = logits(lora.merge(model))
    assert torch.equal(logits(lora.load_merged(make_llama(), folder)), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_a_weight_that_is_not_finite_is_not_merged(make_llama):
    model = lora.attach(make_llama(), adapter(), seed=0)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ValueError):
        lora.merge(model)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_and_a_tied_head_once(make_llama, tied):
    hidden, kv, mlp, vocab, layers, rank = 64, 32, 96, 300, 3, 4
    per_layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp + 2 * hidden
    total = layers * per_layer + hidden + vocab * hidden * (1 if tied else 2)
    model = make_llama(tie_word_embeddings=tied)
    assert lora.count_parameters(model) == (total, total)
    added = layers * rank * (2 * (hidden + hidden) + 2 * (hidden + kv))
    assert lora.count_parameters(lora.attach(model, adapter(), seed=0)) == (added, total + added)
