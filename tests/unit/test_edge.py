"""The GGUF file, read back by transformers: the same logits, the same token ids, the same chat template."""

import copy

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, Qwen2Config, Qwen2ForCausalLM

from medkit import edge, lora
from medkit.edge import ExportError

TYPES = ["F16", "Q8_0", "Q4_0", "Q4_1"]
BYTES_PER_BLOCK = {"F16": 64, "Q8_0": 34, "Q4_0": 18, "Q4_1": 20}  # of 32 weights
IDS = torch.tensor([[5, 9, 17, 33, 4, 8, 250, 299]])
TEXTS = [
    "Which vitamin prevents scurvy?",
    "Give 325 mg at 09:30, 2000 mg a day.",
    "naïve β-blocker\n\n  two  spaces, it's",
    "<|im_start|>user\nDoes aspirin reduce fever?<|im_end|>\n<|im_start|>assistant\n",
]
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def read_back(path):
    config = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=config
    ).eval()


@torch.no_grad()
def rounded(model, weight_type):
    """A copy whose matrices went through the number format and back, in transformers' own order of rows."""
    kind, model = gguf.GGMLQuantizationType[weight_type], copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.shape[1] % 32 == 0:
            stored = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
        elif parameter.ndim == 2:
            stored = parameter.half().float().numpy()
        else:
            continue
        parameter.copy_(torch.from_numpy(np.array(stored)).reshape(parameter.shape))
    return model


@pytest.mark.parametrize("weight_type", TYPES)
def test_the_file_holds_the_model(make_llama, tokenizer, tmp_path, weight_type):
    model = make_llama()
    again = read_back(edge.export_gguf(model, tokenizer, tmp_path / "student.gguf", weight_type))
    torch.testing.assert_close(logits(again), logits(rounded(model, weight_type)), rtol=0, atol=1e-4)
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_half_precision_is_the_only_loss_of_an_f16_file(make_llama, tokenizer, tmp_path):
    model = make_llama()
    again = read_back(edge.export_gguf(model, tokenizer, tmp_path / "student.gguf", "F16"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=5e-3)
    assert logits(model).std() > 0.3  # against which 0.005 is little


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}},
        {"hidden_size": 48, "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1},
        {"head_dim": 32},
        {"rms_norm_eps": 1e-3},
    ],
    ids=["untied", "one key per head", "two heads", "rope base", "odd width", "wide heads", "epsilon"],
)
def test_the_file_holds_every_shape_of_llama(make_llama, tokenizer, tmp_path, changes):
    model = make_llama(**changes)
    again = read_back(edge.export_gguf(model, tokenizer, tmp_path / "student.gguf", "Q8_0"))
    torch.testing.assert_close(logits(again), logits(rounded(model, "Q8_0")), rtol=0, atol=1e-4)


def test_the_file_tells_the_configuration(make_llama, tokenizer, tmp_path):
    model = make_llama()
    config = read_back(edge.export_gguf(model, tokenizer, tmp_path / "student.gguf", "F16")).config
    for name in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
        "rms_norm_eps",
        "eos_token_id",
    ):
        assert getattr(config, name) == pytest.approx(getattr(model.config, name)), name


def test_the_file_holds_the_tokenizer(make_llama, tokenizer, tmp_path):
    edge.export_gguf(make_llama(), tokenizer, tmp_path / "student.gguf", "F16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="student.gguf")
    for text in TEXTS:
        assert again(text, add_special_tokens=False).input_ids == tokenizer(text).input_ids
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token_id == tokenizer.eos_token_id
    assert again.pad_token_id == tokenizer.pad_token_id


def test_a_tokenizer_without_a_start_token(make_llama, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(bos_token=None)
    edge.export_gguf(make_llama(), tokenizer, tmp_path / "student.gguf", "F16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="student.gguf")
    assert again.bos_token_id is None
    assert again(TEXTS[0], add_special_tokens=False).input_ids == tokenizer(TEXTS[0]).input_ids


def test_smollm2_as_transformers_reads_it(make_llama, make_tokenizer, tmp_path):
    """From its GGUF file: without the split of digits, and without a token of two digits that would need it."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    edge.export_gguf(make_llama(), tokenizer, tmp_path / "student.gguf", "F16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="student.gguf")
    for text in TEXTS:
        assert again(text, add_special_tokens=False).input_ids == make_tokenizer()(text).input_ids


def test_a_tokenizer_that_splits_otherwise_is_refused_or_written_right(make_llama, make_tokenizer, tmp_path):
    """Llama 3 keeps up to three digits together: read with SmolLM2's rule, its numbers are other tokens."""
    tokenizer = make_tokenizer(split=pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"))
    path = tmp_path / "student.gguf"
    try:
        edge.export_gguf(make_llama(), tokenizer, path, "F16")
    except ExportError:
        return
    said = gguf.GGUFReader(path).get_field("tokenizer.ggml.pre").contents()
    assert said == "llama-bpe"


@pytest.mark.parametrize("weight_type", TYPES)
def test_the_ledger_of_the_file_is_the_analytic_number_of_bytes(make_llama, tokenizer, tmp_path, weight_type):
    model = make_llama(tie_word_embeddings=False)
    path = edge.export_gguf(model, tokenizer, tmp_path / "student.gguf", weight_type)
    sizes = {
        "embeddings": 300 * 64,
        "attention": 3 * (2 * 64 * 64 + 2 * 64 * 32),
        "mlp": 3 * 3 * 64 * 96,
        "head": 300 * 64,
    }
    expected = {name: (n, n * BYTES_PER_BLOCK[weight_type] // 32) for name, n in sizes.items()}
    expected["norms"] = (7 * 64, 4 * 7 * 64)
    table = edge.measure_bytes(path)
    assert {r.component: (r.weights, r.bytes) for r in table.itertuples()} == expected
    assert table.weights.sum() == lora.count_parameters(model)[1]
    assert (table.bf16_bytes == 2 * table.weights).all()
    assert table.bytes.sum() < path.stat().st_size < table.bytes.sum() + 40_000


@pytest.mark.parametrize(
    ("weight_type", "low", "high"),
    [("F16", 0.0, 1e-3), ("Q8_0", 1e-3, 0.005), ("Q4_0", 0.03, 0.07), ("Q4_1", 0.03, 0.036)],
)
def test_the_error_of_a_weight_is_bounded_by_its_block(make_llama, tokenizer, tmp_path, weight_type, low, high):
    """Half a step of 255, 16 and 15 levels over the range of a block; Q4_0 misses one end by a whole step."""
    model = make_llama()
    path = edge.export_gguf(model, tokenizer, tmp_path / "student.gguf", weight_type)
    assert low < edge.largest_relative_error(model, path) < high


def test_a_wrong_weight_shows_in_the_error(make_llama, tokenizer, tmp_path):
    model = make_llama()
    path = edge.export_gguf(model, tokenizer, tmp_path / "student.gguf", "Q8_0")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 5] += 0.5
    assert edge.largest_relative_error(model, path) > 0.3


def test_a_missing_weight_is_an_error(make_llama, tokenizer, tmp_path):
    path = edge.export_gguf(make_llama(layers=2), tokenizer, tmp_path / "student.gguf", "F16")
    with pytest.raises(ExportError, match=r"blk\.2\..* is missing"):
        edge.largest_relative_error(make_llama(layers=3), path)


def test_rotary_rows_go_from_halves_to_pairs():
    rows = np.arange(8)[:, None]  # two heads of four: (0 1 | 2 3), (4 5 | 6 7)
    assert edge.permute_rotary(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_another_architecture_is_refused(tokenizer, tmp_path):
    config = Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ExportError, match="'qwen2': only 'llama'"):
        edge.export_gguf(Qwen2ForCausalLM(config), tokenizer, tmp_path / "student.gguf", "F16")


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_llama_that_the_file_cannot_hold_is_refused(make_llama, tokenizer, tmp_path, changes):
    model, path = make_llama(**changes), tmp_path / "student.gguf"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    with pytest.raises(ExportError):
        edge.export_gguf(model, tokenizer, path, "F16")
    assert not path.exists()


def test_an_export_that_fails_leaves_the_old_file_and_nothing_else(make_llama, tokenizer, tmp_path, monkeypatch):
    path = edge.export_gguf(make_llama(), tokenizer, tmp_path / "student.gguf", "F16")
    before, quantize, calls = path.read_bytes(), gguf.quantize, iter(range(100))
    monkeypatch.setattr(gguf, "quantize", lambda *args: quantize(*args) if next(calls) < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edge.export_gguf(make_llama(seed=1), tokenizer, path, "Q8_0")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["student.gguf"]


def test_rounding_to_the_grid_that_weights_came_on_takes_a_small_update_back():
    torch.manual_seed(0)
    kind = gguf.GGMLQuantizationType.Q4_1
    published = torch.from_numpy(gguf.dequantize(gguf.quantize(torch.randn(64, 256).numpy(), kind), kind).copy())
    taught = published + 0.007 * published.std() * torch.randn(published.shape)
    kept = {t: edge.measure_rounding(published, taught, t) for t in TYPES}
    assert [kept[t][0] for t in TYPES] == [16, 8.5, 4.5, 5]
    assert kept["Q4_1"][2] < 0.2 < 0.8 < kept["Q4_0"][2] < 1.2
    assert kept["Q4_1"][1] < kept["Q4_0"][1]  # less error, and yet it is the one that unteaches
    assert kept["F16"][2] == pytest.approx(1, abs=0.01)
    with torch.no_grad():
        bits, error, _ = edge.measure_rounding(published, 2 * published, "Q4_1")  # a grid scales with its block
    assert bits == 5 and error < 0.01
