"""Codes and scales reach the file as they are, llama.cpp computes with them, and fitted rounding loses less."""

import gguf
import httpx
import pytest
import torch

from medkit.inference.server_engine import llama_server
from medkit.modeling import batches
from medkit.modeling.loading import load_model
from medkit.quantization import gguf_blocks, gguf_export, quantize
from medkit.quantization.gguf_blocks import BITS, quantize_blocks, round_to_blocks

ROWS, COLUMNS = 24, 96


@pytest.fixture
def weight():
    torch.manual_seed(0)
    matrix = torch.randn(ROWS, COLUMNS) * torch.logspace(-3, 1, ROWS)[:, None]
    matrix[5, :32] = 0
    return matrix


@pytest.fixture
def hessian():
    torch.manual_seed(1)
    inputs = torch.randn(400, 12) @ torch.randn(12, COLUMNS) + 0.1 * torch.randn(400, COLUMNS)
    return inputs.T @ inputs


@pytest.fixture
def model(make_llama):
    return make_llama(tie_word_embeddings=True)


def decode(packed, kind):
    return torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]).copy())


def replace_weights(model, blocks):
    with torch.no_grad():
        for name, stored in blocks.items():
            model.get_submodule(name).weight.copy_(stored.decode())


def kl(before, model, examples):
    return batches.measure_drift(before, batches.collect_logits(model, examples))["kl_nats"]


@pytest.mark.parametrize("kind", BITS)
def test_the_gguf_package_reads_the_packed_bytes_exactly(weight, hessian, kind):
    blocks = round_to_blocks(weight, kind, hessian)
    assert blocks.pack().shape[1] * 8 == COLUMNS * (BITS[kind] + 0.5)
    assert torch.equal(decode(blocks.pack(), kind), blocks.decode())
    levels = 1 << BITS[kind]
    assert -levels // 2 <= blocks.codes.min().item() and blocks.codes.max().item() < levels // 2


@pytest.mark.parametrize("kind", BITS)
def test_searched_scales_lose_less_than_llama_cpps_plain_ones(weight, hessian, kind, monkeypatch):
    plain = decode(gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]), kind)
    searched, fitted = round_to_blocks(weight, kind).decode(), round_to_blocks(weight, kind, hessian).decode()
    assert (searched - weight).square().sum() < (plain - weight).square().sum()
    monkeypatch.setattr(gguf_blocks, "fit_scales", lambda weight, codes, scales, hessian: scales)
    unfitted = round_to_blocks(weight, kind, hessian).decode()
    losses = [((w - weight) @ hessian * (w - weight)).sum() for w in (plain, searched, unfitted, fitted)]
    assert losses[3] < losses[2] < 0.5 * min(losses[:2])
    assert not searched[5, :32].any()


def test_fitted_files_change_predictions_less(model, make_examples):
    examples = make_examples(40)
    before = batches.collect_logits(model, examples)
    exact = {name: parameter.clone() for name, parameter in model.named_parameters()}
    nearest = {n: round_to_blocks(model.get_submodule(n).weight, "Q4_0") for n in quantize.weight_shapes(model)}
    fitted = quantize_blocks(model, examples, "Q4_0", "Q4_0")
    assert all(torch.equal(exact[name], parameter) for name, parameter in model.named_parameters())
    losses = []
    for blocks in (nearest, fitted):
        replace_weights(model, blocks)
        losses.append(kl(before, model, examples))
        model.load_state_dict(exact, strict=False)
    assert losses[0] > losses[1]


@pytest.mark.parametrize("kinds", [("Q4_0", "Q5_0"), ("Q5_0", "Q8_0")])
def test_llama_cpp_computes_with_the_weights_of_torch(model, tokenizer, make_examples, models_params, tmp_path, kinds):
    """llama.cpp rounds the inputs of its products to 8 bits, so logits agree within that rounding and not to the bit.

    The file read by transformers has torch's weights exactly.
    """
    blocks = quantize_blocks(model, make_examples(9), *kinds)
    path = gguf_export.export_gguf(model, tokenizer, tmp_path / "student.gguf", blocks=blocks)
    exact = {name: parameter.clone() for name, parameter in model.named_parameters()}
    replace_weights(model, blocks)
    read = load_model(path, models_params)
    assert all(torch.equal(parameter, read.get_parameter(name)) for name, parameter in model.named_parameters())
    prompt = [5, 9, 17, 33, 4, 8, 250, 299]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        model.load_state_dict(exact, strict=False)
        unrounded = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    question = {"prompt": prompt, "n_predict": 1, "n_probs": len(expected), "temperature": 0}
    with llama_server(path, context_tokens=64, threads=1) as (url, key):
        answer = httpx.post(
            url.removesuffix("/v1") + "/completion", json=question, headers={"Authorization": f"Bearer {key}"}
        )
    listed = answer.json()["completion_probabilities"][0]["top_logprobs"]
    assert len(listed) == len(expected)
    logprobs = torch.full_like(expected, torch.nan)
    logprobs[[entry["id"] for entry in listed]] = torch.tensor([entry["logprob"] for entry in listed])
    error = (logprobs - expected).abs().max()
    assert error < 0.25 * (unrounded - expected).abs().max(), error
