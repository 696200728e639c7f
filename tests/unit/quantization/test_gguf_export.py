"""The GGUF file, read back by transformers: the same logits, the same token ids, the same chat template."""

import copy
import json
import re
from functools import partial

import gguf
import httpx
import numpy as np
import openai
import pytest
import torch
import toys
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from toys import PROMPT, logits, split_by_rule
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from medkit.inference.server_engine import llama_server
from medkit.modeling.loading import load_model
from medkit.prompts.templates import SYSTEM, encode, file_template
from medkit.quantization import gguf_export, gguf_tokenizer, plans
from medkit.quantization import quantize as quantization
from medkit.quantization.gguf_blocks import round_to_blocks
from medkit.quantization.gguf_export import ExportError
from medkit.quantization.gguf_readers import make_modelfile
from medkit.stage import DISCLAIMER
from medkit.variants import TASKS

BYTES_PER_BLOCK = {"F16": 64, "Q8_0": 34, "Q5_0": 22, "Q4_0": 18}  # of 32 weights
TYPES = ["F16", "Q8_0", "Q5_0", "Q4_0"]
ENDS = ("chat_template", "ggml.eos_token_id", "ggml.eot_token_id")
TEXTS = [
    "Which vitamin prevents scurvy?",
    "Give 325 mg at 09:30, 2000 mg a day.",
    "naïve β-blocker\n\n  two  spaces, it's",
    "<|im_start|>user\nDoes aspirin reduce fever?<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def make_qwen2(make_llama):
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    return partial(make_llama, **{"layers": 2, "kind": "Qwen2", "rope_parameters": rope})


@pytest.fixture(scope="module")
def make_gemma3(make_llama):
    """Every sixth layer sees the whole text, the others four tokens."""
    sizes = {"layers": 7, "head_dim": 256, "sliding_window": 4, "vocab_size": 520, "initializer_range": 0.05}
    return partial(make_llama, **{"kind": "Gemma3", **sizes})


def split_by_digits(one_by_one=True, **changes):
    bytes_ = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **changes})
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=one_by_one), bytes_])


@pytest.fixture(scope="module")
def qwen2_tokenizer(make_tokenizer):
    """With words that only Qwen2's rule makes: "-blocker" in one piece."""
    tokenizer = split_by_rule(make_tokenizer(bos_token=None), gguf_tokenizer.QWEN2_SPLIT).train_new_from_iterator(
        TEXTS * 20, 296
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@torch.no_grad()
def compare_with_llama_cpp(path, model, ids):
    """The likeliest next tokens and their log-probabilities."""
    expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(5)
    with llama_server(path, threads=1) as (url, api_key), openai.OpenAI(base_url=url, api_key=api_key) as client:
        asked = client.completions.create(model="edge", prompt=ids, max_tokens=1, temperature=0, logprobs=5)
    found = asked.choices[0].model_dump()["logprobs"]["content"][0]["top_logprobs"]
    assert [token["id"] for token in found] == expected.indices.tolist()
    np.testing.assert_allclose([token["logprob"] for token in found], expected.values, atol=0.02)


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
def test_the_file_holds_the_model_in_the_analytic_number_of_bytes(make_llama, tokenizer, tmp_path, weight_type):
    model = make_llama(tie_word_embeddings=False)
    path = gguf_export.export_gguf(model, tokenizer, tmp_path / "student.gguf", weight_type)
    torch.testing.assert_close(logits(toys.read_gguf(path)), logits(rounded(model, weight_type)), rtol=0, atol=1e-4)
    sizes = dict.fromkeys(("embeddings", "head"), 300 * 64)
    sizes |= {"attention": 3 * (2 * 64 * 64 + 2 * 64 * 32), "mlp": 3 * 3 * 64 * 96}
    expected = {name: (n, n * BYTES_PER_BLOCK[weight_type] // 32) for name, n in sizes.items()}
    expected["norms"] = (7 * 64, 4 * 7 * 64)
    table = gguf_export.measure_file_bytes(path)
    assert {r.component: (r.weights, r.bytes) for r in table.itertuples()} == expected
    assert table.weights.sum() == model.num_parameters()
    assert (table.bf16_bytes == 2 * table.weights).all()
    assert table.bytes.sum() < path.stat().st_size < table.bytes.sum() + 40_000


def test_a_file_answers_as_its_model_and_another_models_file_is_refused(make_llama, tokenizer, models_params, tmp_path):
    """A head of its own goes into the file, even where the config says tied; without it the answers differ."""
    model = make_llama(tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    blocks = {"lm_head": round_to_blocks(model.lm_head.weight, "Q4_0")}
    read = load_model(gguf_export.export_gguf(model, tokenizer, tmp_path / "m.gguf", blocks=blocks), models_params)
    assert gguf_export.check_logits(model, read, PROMPT, blocks) < 0.01
    for other in (read.requires_grad_(False), make_llama()):
        other.lm_head.weight = other.get_input_embeddings().weight
        with pytest.raises(ExportError, match="the file differs from the model"):
            gguf_export.check_logits(model, other, PROMPT, blocks)
    with pytest.raises(ExportError, match="the file differs from the model"):
        gguf_export.check_logits(model, model, PROMPT, blocks)


def test_the_file_holds_one_chat_template_and_every_end(make_llama, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(chat_template={"default": "one", "tool_use": "two"})
    tokenizer.end_token_ids = [2, 0]
    path = gguf_export.export_gguf(make_llama(layers=1), tokenizer, tmp_path / "student.gguf", "F16")
    fields = {name: gguf.GGUFReader(path).get_field(f"tokenizer.{name}") for name in ENDS}
    template, *ends = (field.contents() for field in fields.values())
    assert template.endswith("one") and ends == [2, 0]


def test_the_file_holds_a_tied_model_of_odd_width(make_llama, tokenizer, tmp_path):
    model = make_llama(hidden_size=48, head_dim=16, num_attention_heads=3, num_key_value_heads=1)
    again = toys.read_gguf(gguf_export.export_gguf(model, tokenizer, tmp_path / "student.gguf", "Q8_0"))
    torch.testing.assert_close(logits(again), logits(rounded(model, "Q8_0")), rtol=0, atol=1e-4)
    assert again.lm_head.weight is again.get_input_embeddings().weight


@pytest.mark.parametrize("split", ["digits", "SmolLM2 as transformers reads it"])
def test_the_file_holds_the_tokenizer(make_llama, make_tokenizer, tmp_path, split):
    """transformers reads SmolLM2's file without the split of digits; no token of two digits would need it."""
    tokenizer, expected = make_tokenizer(), make_tokenizer()
    if split != "digits":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gguf_export.export_gguf(make_llama(layers=1), tokenizer, tmp_path / "student.gguf", "F16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="student.gguf")
    for text in TEXTS:
        assert again(text, add_special_tokens=False).input_ids == expected(text).input_ids
    assert again.chat_template == file_template(tokenizer)
    assert again.eos_token_id == tokenizer.eos_token_id
    assert again.pad_token_id == tokenizer.pad_token_id


def test_the_file_holds_a_qwen2_model_and_its_tokenizer(make_qwen2, qwen2_tokenizer, tmp_path):
    """With rows beyond the vocabulary, as in R1-Distill-Qwen: 152 064 rows, 151 665 tokens."""
    model = make_qwen2(vocab_size=330)
    path = gguf_export.export_gguf(model, qwen2_tokenizer, tmp_path / "student.gguf", "Q8_0")
    again = toys.read_gguf(path)
    assert again.config.model_type == "qwen2" and again.config.rope_parameters["rope_theta"] == 1_000_000
    torch.testing.assert_close(logits(again), logits(rounded(model, "Q8_0")), rtol=0, atol=1e-4)
    reader = gguf.GGUFReader(path)
    biases = [t for t in reader.tensors if t.name.endswith(".bias")]
    assert len(biases) == 2 * 3 and all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in biases)
    tokens, types = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "token_type"))
    unused = [i for i, kind in enumerate(types) if kind == gguf.TokenType.UNUSED]
    assert len(tokens) == len(types) == len(set(tokens)) == 330
    assert unused == list(range(len(qwen2_tokenizer), 330))
    assert reader.get_field("tokenizer.ggml.pre").contents() == "qwen2"
    again, other = AutoTokenizer.from_pretrained(tmp_path, gguf_file="student.gguf"), copy.deepcopy(qwen2_tokenizer)
    for text in TEXTS:
        assert again(text, add_special_tokens=False).input_ids == qwen2_tokenizer(text).input_ids
    other.backend_tokenizer.pre_tokenizer = split_by_digits()
    assert any(other(t).input_ids != qwen2_tokenizer(t).input_ids for t in TEXTS)  # under SmolLM2's rule
    assert again.chat_template == file_template(qwen2_tokenizer)
    assert again.eos_token_id == qwen2_tokenizer.eos_token_id
    assert gguf_tokenizer.QWEN2_SPLIT == PRETOKENIZE_REGEX


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_is_read_by_transformers_and_by_llama_cpp(make_qwen2, qwen2_tokenizer, models_params, tmp_path, tied):
    model = make_qwen2(kind="Qwen3", head_dim=128, tie_word_embeddings=tied)
    path = gguf_export.export_gguf(model, qwen2_tokenizer, tmp_path / "student.gguf", "F16")
    read = load_model(path, models_params)
    assert gguf_export.check_logits(model, read, PROMPT, {}) < 0.01
    compare_with_llama_cpp(path, model, PROMPT)


@pytest.mark.parametrize("tied", [True, False])
def test_gemma3_is_read_by_transformers_and_by_llama_cpp(make_gemma3, models_params, tmp_path, tied):
    model, ids = make_gemma3(tie_word_embeddings=tied), np.random.default_rng(1).integers(10, 450, 60).tolist()
    path = gguf_export.export_gguf(model, toys.make_gemma_tokenizer(), tmp_path / "student.gguf", "F16")
    model = rounded(model, "F16")
    assert gguf_export.check_logits(model, load_model(path, models_params), ids, {}) < 0.001
    compare_with_llama_cpp(path, model, ids)


def test_the_file_holds_gemmas_tokenizer_and_its_turns(make_gemma3, tmp_path):
    """transformers and llama.cpp read the same tokens; a system turn goes into the first turn of the user."""
    tokenizer = toys.make_gemma_tokenizer()
    path = gguf_export.export_gguf(make_gemma3(layers=1), tokenizer, tmp_path / "student.gguf", "F16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="student.gguf")
    system, *turns = [
        {"role": role, "content": text}
        for role, text in zip(("system", "user", "assistant", "user"), (SYSTEM, *TEXTS[:3]), strict=True)
    ]
    texts = [*TEXTS, "日本 \t 😀  \n\n\n ====", "<start_of_turn>user\nWhy?<end_of_turn>\n", "  "]
    with (
        llama_server(path, threads=1) as (url, key),
        httpx.Client(base_url=url.removesuffix("/v1"), headers={"authorization": f"Bearer {key}"}) as server,
    ):

        def read(text):
            return server.post("/tokenize", json={"content": text, "parse_special": True}).json()["tokens"]

        for text in texts:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert again(text, add_special_tokens=False).input_ids == read(text) == ids
            assert server.post("/detokenize", json={"tokens": ids}).json()["content"] == tokenizer.decode(ids) == text
        for given in ([system, *turns], turns):
            prompt = server.post("/apply-template", json={"messages": given}).json()["prompt"]
            assert read(prompt) == encode(tokenizer, [system, *turns])[0]


NOT_GEMMAS = {
    "a merge is missing": lambda model, **_: model["merges"].pop(),
    "another order": lambda model, **_: model["merges"].reverse(),
    "a byte is missing": lambda model, **_: model["vocab"].update({"<0x0b>": model["vocab"].pop("<0x0B>")}),
    "spaces stay": lambda model, backend: backend.update(normalizer=None),
    "words apart": lambda model, backend: backend.update(pre_tokenizer={"type": "Whitespace"}),
}


@pytest.mark.parametrize("change", NOT_GEMMAS)
def test_pieces_that_only_look_like_gemmas_are_refused(make_gemma3, tmp_path, change):
    tokenizer = toys.make_gemma_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    NOT_GEMMAS[change](backend["model"], backend=backend)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    with pytest.raises(ExportError, match="only one that splits text as Gemma's"):
        gguf_export.export_gguf(make_gemma3(layers=1), tokenizer, tmp_path / "student.gguf", "F16")


def test_the_long_contexts_of_llama3_are_in_the_file(make_llama, make_tokenizer, models_params, tmp_path):
    """transformers itself drops them on reading; a model that was read so goes into a file again."""
    rope = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    tokenizer = split_by_rule(make_tokenizer(), gguf_tokenizer.LLAMA3_SPLIT)
    model, ids = make_llama(rope_parameters=rope), np.random.default_rng(1).integers(3, 290, 200).tolist()
    path = gguf_export.export_gguf(model, tokenizer, tmp_path / "student.gguf", "F16")
    assert gguf.GGUFReader(path).get_field("tokenizer.ggml.pre").contents() == "llama-bpe"
    read = load_model(path, models_params)
    assert gguf_export.check_logits(model, read, ids, {}) < 0.01
    compare_with_llama_cpp(path, model, ids)
    again = load_model(gguf_export.export_gguf(read, tokenizer, tmp_path / "again.gguf", "F16"), models_params)
    assert gguf_export.check_logits(model, again, ids, {}) < 0.01
    model.config.rope_parameters = rope | {"rope_type": "default"}
    usual = load_model(gguf_export.export_gguf(model, tokenizer, tmp_path / "usual.gguf", "F16"), models_params)
    with pytest.raises(ExportError, match="the file differs from the model"):
        gguf_export.check_logits(read, usual, ids, {})


def test_an_added_token_that_is_not_special_stays_in_the_answer(make_llama, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    model = make_llama(vocab_size=320)
    path = gguf_export.export_gguf(model, tokenizer, tmp_path / "student.gguf", "F16")
    types = gguf.GGUFReader(path).get_field("tokenizer.ggml.token_type").contents()
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert types[think] == gguf.TokenType.USER_DEFINED
    assert [types[i] for i in range(3)] == [gguf.TokenType.CONTROL] * 3
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="student.gguf")
    ids = tokenizer("<|im_start|>a <think> b<|im_end|>").input_ids
    assert think in ids
    assert again("<|im_start|>a <think> b<|im_end|>", add_special_tokens=False).input_ids == ids
    assert again.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)


STEPS = {
    "digits together": split_by_digits(one_by_one=False), "a space before": split_by_digits(add_prefix_space=True),
    "no rule of GPT-2's": split_by_digits(use_regex=False), "no bytes": pre_tokenizers.Whitespace(),
    "lower case": normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_tokenizer_that_only_looks_alike_is_refused(make_llama, make_tokenizer, tmp_path, name):
    tokenizer, is_case = make_tokenizer(), name == "lower case"
    setattr(tokenizer.backend_tokenizer, "normalizer" if is_case else "pre_tokenizer", STEPS[name])
    with pytest.raises(ExportError, match="'Lowercase'" if is_case else r"pre-tokenizer \["):
        gguf_export.export_gguf(make_llama(layers=1), tokenizer, tmp_path / "student.gguf", "F16")


def test_a_quantized_model_is_refused_with_the_cure(make_llama, tokenizer, tmp_path):
    model = make_llama(intermediate_size=128)
    quantization.apply_plan(model, plans.nf4_plan(quantization.weight_shapes(model), "int8"), True)
    with pytest.raises(ExportError, match="is quantized already: export the model from before"):
        gguf_export.export_gguf(model, tokenizer, tmp_path / "m.gguf", "Q8_0")
    assert not list(tmp_path.iterdir())


LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 10_000.0}
LONG = {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 512}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
REFUSED = [
    ("llama", {"attention_bias": True}, "has no place for this weight"),
    ("llama", {"hidden_act": "gelu"}, "'gelu'"),
    ("llama", {"rope_parameters": LINEAR}, "'linear'"),
    ("llama", {"rope_parameters": LONG}, "depend on the length"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "use_sliding_window"),
    ("qwen2", {"head_dim": 32}, "head_dim 32"),
    ("qwen2", {"kind": "Qwen3", "head_dim": 32}, "head_dim 32"),
    ("gemma3", {"layer_types": ["sliding_attention"] * 7}, "layer_types"),
    ("gemma3", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}}, "'linear'"),
    ("gemma3", {"rope_parameters": {"full_attention": LOCAL, "sliding_attention": LOCAL | {"rope_theta": 1e5}}},
     "rope_parameters"),
    ("gemma3", {"head_dim": 128}, "head_dim 128: a gemma3_text file is read with 256"),
    ("gemma3", {"query_pre_attn_scalar": 128}, "query_pre_attn_scalar 128"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("gemma3", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"vocab_size": 200}, "tokens: the model has rows for 200"),
    ("qwen2", {"model_type": "gpt_neox"}, "'gpt_neox': only llama, qwen2, qwen3, gemma3_text"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "said"), REFUSED, ids=[f"{k} {next(iter(c))}" for k, c, _ in REFUSED])
def test_what_the_file_cannot_hold_is_refused(
    make_llama, make_qwen2, make_gemma3, qwen2_tokenizer, tmp_path, kind, changes, said
):
    model = {"llama": make_llama, "qwen2": make_qwen2, "gemma3": make_gemma3}[kind](**changes)
    model.config.model_type = changes.get("model_type", model.config.model_type)
    with pytest.raises(ExportError, match=said):
        gguf_export.export_gguf(model, qwen2_tokenizer, tmp_path / "student.gguf", "F16")
    assert list(tmp_path.iterdir()) == []


def test_the_same_model_makes_the_same_file(make_llama, tokenizer, tmp_path):
    paths = [gguf_export.export_gguf(make_llama(layers=1), tokenizer, tmp_path / f"{i}.gguf") for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


DAMAGES = {
    "one bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "no file": lambda path: path.unlink(),
    "no manifest": lambda path: path.with_suffix(gguf_export.MANIFEST).unlink(),
    "an empty manifest": lambda path: path.with_suffix(gguf_export.MANIFEST).write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_the_one_exported_is_noticed(make_llama, tokenizer, tmp_path, damage):
    path = gguf_export.export_gguf(make_llama(layers=1), tokenizer, tmp_path / "student.gguf", "F16")
    DAMAGES[damage](path)
    said = r"student\.manifest\.json: cannot be read" if "manifest" in damage else "is missing, cut or changed"
    with pytest.raises(ExportError, match=said):
        gguf_export.check_manifest(path)


MODELFILE = re.compile(
    r'# .+\nFROM \./(\S+\.gguf)\nSYSTEM """(.+)"""\nTEMPLATE """(.+)"""\n'
    r"(?:PARAMETER (?:temperature|num_ctx|stop) \S+\n)+",
    re.S,
)
TURNS = re.compile(r"\{\{ range \$i, \$turn := \.Messages \}\}\{\{ (if eq .+)\{\{ end \}\}\{\{ end \}\}(.*)", re.S)
SPLIT = re.compile(r'(?:\{\{ else )?if eq \.Role "(\w+)" \}\}')
FIRST_OR_LATER = re.compile(r"\{\{ if le \$i 1 \}\}(.*)\{\{ else \}\}(.*)\{\{ end \}\}", re.S)


@pytest.mark.parametrize("base", [False, True])
def test_ollama_and_others_find_their_files_beside_it(make_llama, make_tokenizer, tokenizer, tmp_path, base):
    """The Modelfile's turns, put together as Ollama does, are the prompt of training."""
    model = make_tokenizer(chat_template=None if base else tokenizer.chat_template)
    (tmp_path / f"student{TASKS}").write_text("{}")
    path = gguf_export.export_gguf(make_llama(layers=1), model, tmp_path / "student.gguf")
    name, system, template = MODELFILE.fullmatch((tmp_path / "Modelfile").read_text()).groups()
    assert (tmp_path / name) == path
    branches, end = TURNS.fullmatch(template).groups()
    _, *parts = SPLIT.split(branches)
    turn = dict(zip(parts[::2], parts[1::2], strict=True))
    assert set(turn) == {"system", "user", "assistant"}
    roles, texts = ("system", "user", "assistant", "user"), (system, "Which?", "C", "Why?")
    prompt = ""
    for number, (role, text) in enumerate(zip(roles, texts, strict=True)):
        part = FIRST_OR_LATER.sub(rf"\{1 if number <= 1 else 2}", turn[role])
        prompt += part.replace("{{ .Content }}", text)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    assert model(prompt + end).input_ids == encode(model, messages)[0]
    use = (tmp_path / "USE.md").read_text()
    assert DISCLAIMER in use and use.count(path.name) == 3 and use.count("\n| ") == 4
    assert not (tmp_path / f"student{TASKS}").exists(), "scores of an earlier file go"


def test_a_template_without_turns_has_no_modelfile(make_tokenizer):
    assert make_modelfile("student.gguf", make_tokenizer(chat_template="one")) is None
