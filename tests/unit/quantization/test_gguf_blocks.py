"""Codes and scales reach the file as they are, llama.cpp computes with them, and fitted rounding loses less."""

import gguf
import httpx
import pytest
import torch

from medkit.inference.server_engine import llama_server
from medkit.modeling import batches
from medkit.modeling.loading import load_model
from medkit.quantization import gguf_blocks, gguf_export, plans, quantize
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


def decode(packed, kind):
    return torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind]).copy())


def replace_weights(model, blocks):
    with torch.no_grad():
        for name, stored in blocks.items():
            model.get_submodule(name).weight.copy_(stored.decode())


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


def test_fitted_files_change_predictions_less(make_llama, make_examples):
    model, examples = make_llama(), make_examples(40)
    before = batches.collect_logits(model, examples)
    exact = {name: parameter.clone() for name, parameter in model.named_parameters()}
    nearest = {n: round_to_blocks(model.get_submodule(n).weight, "Q4_0") for n in quantize.weight_shapes(model)}
    fitted = quantize_blocks(model, examples, "Q4_0", "Q4_0")
    assert all(torch.equal(exact[name], parameter) for name, parameter in model.named_parameters())
    losses = []
    for blocks in (nearest, fitted):
        replace_weights(model, blocks)
        losses.append(batches.measure_drift(before, batches.collect_logits(model, examples))["kl_nats"])
        model.load_state_dict(exact, strict=False)
    assert losses[0] > losses[1]


@pytest.mark.parametrize("kinds", [("Q4_0", "Q5_0"), ("Q5_0", "Q8_0")])
def test_llama_cpp_computes_with_the_weights_of_torch(
    make_llama, tokenizer, make_examples, models_params, tmp_path, kinds
):
    """llama.cpp rounds the inputs of its products to 8 bits, so logits agree within that rounding and not to the bit.

    The file read by transformers has torch's weights exactly.
    """
    model = make_llama()
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


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_importance_matrix_holds_the_squares_of_the_inputs(make_llama, tokenizer, make_examples, tmp_path, tied):
    """In llama.cpp's names and types. Inputs of a layer come through the rounded ones before; those of the head not."""
    model, examples = make_llama(tie_word_embeddings=tied), make_examples(9)
    blocks = quantize_blocks(model, examples, "Q4_0", "Q5_0")
    path = gguf_export.export_gguf(model, tokenizer, tmp_path / "student.gguf", blocks=blocks, dataset="nine examples")
    matrix = gguf.GGUFReader(path.with_name("student.imatrix.gguf"))
    sums, names = {t.name: torch.from_numpy(t.data.copy()) for t in matrix.tensors}, []
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in matrix.tensors)

    def compare(module, name, replaced):
        seen, exact = [], {n: p.clone() for n, p in model.named_parameters()}
        replace_weights(model, replaced)
        with module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0])):
            for example in examples:  # without the last token, which is predicted and not read
                model(torch.tensor([example.input_ids[:-1]]))
        model.load_state_dict(exact, strict=False)
        inputs = torch.cat(seen)
        torch.testing.assert_close(sums[f"{name}.in_sum2"], inputs.square().sum(0), rtol=1e-3, atol=0)
        assert sums[f"{name}.counts"].tolist() == [len(inputs)]
        names.append(name)

    compare(model.lm_head, "token_embd.weight" if tied else "output.weight", {})
    for layer, rest, name in ((0, "self_attn.q_proj", "blk.0.attn_q"), (2, "mlp.down_proj", "blk.2.ffn_down")):
        before = {n: b for n, b in blocks.items() if (at := plans.layer_of(n)) is None or at < layer}
        compare(model.get_submodule(f"model.layers.{layer}.{rest}"), f"{name}.weight", before)
    tensors = [t.name for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2]
    entries = {t for t in tensors if tied or t != "token_embd.weight"}
    assert sums.keys() == {f"{t}.{part}" for t in entries for part in ("in_sum2", "counts")} and {*names} <= entries
    facts = {"type": "imatrix", "datasets": ["nine examples"], "chunk_count": 1}
    facts |= {"chunk_size": sum(len(e.input_ids) - 1 for e in examples)}
    for name, value in facts.items():
        assert matrix.get_field(f"{'general' if name == 'type' else 'imatrix'}.{name}").contents() == value
    facts = {"file": "student.imatrix.gguf", "dataset": "nine examples"}
    facts |= {"entries_count": len(entries), "chunks_count": 1}
    fields = {name: gguf.GGUFReader(path).get_field(f"quantize.imatrix.{name}") for name in facts}
    assert {name: field.contents() for name, field in fields.items()} == facts
    assert fields["entries_count"].types == fields["chunks_count"].types == [gguf.GGUFValueType.UINT32]
    gguf_export.export_gguf(model, tokenizer, path, "Q8_0")
    assert not path.with_name("student.imatrix.gguf").exists()
    assert not any(name.startswith("quantize.") for name in gguf.GGUFReader(path).fields)
