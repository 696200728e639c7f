"""GGUF and safetensors headers, configs, tokenizers and chat templates of models that others made."""

import json
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
import toys
from hostile import assert_promise, changed, damaged, tries
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from medkit.modeling import loading
from medkit.params import Local, ModelParams, ModelsParams
from medkit.prompts import templates
from medkit.quantization import gguf_export

CHATML = toys.CHATML.removesuffix("{% endif %}")
CHATML += "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"


@pytest.fixture(scope="module")
def tokenizer():
    return toys.make_tokenizer(chat_template=CHATML)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> Path:
    """A model as a folder, and beside it the same one as student.gguf."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder, model = tmp_path_factory.mktemp("models") / "whole", loading.make_toy_model(len(tokenizer))
    loading.save_model(model, tokenizer, folder)
    gguf_export.export_gguf(model, tokenizer, folder.with_name("student.gguf"), "F16")
    return folder


def load(path: Path) -> nn.Module:
    """What every notebook does with a model: its folder, its tokenizer, its weights."""
    source = Local(kind="local", path=str(path))
    teacher = ModelParams(source=source, keep_layers=[])
    sides = {"teacher": teacher, "student": "pruned_teacher", "embedder": source}
    params = ModelsParams(**sides, device="cpu", dtype="float32", attention="sdpa")
    folder = loading.local_folder(teacher)
    tokenizer, model = loading.load_tokenizer(folder), loading.load_model(folder, params)
    templates.encode(tokenizer, [{"role": "user", "content": "?"}], "A")
    return model


@pytest.fixture
def assert_whole_or_refused(folder, tmp_path, monkeypatch):
    """assert_whole_or_refused(file, content): the model with this file in place of its own is whole, or refused."""
    monkeypatch.setenv("MEDKIT_CACHE", str(tmp_path / "cache"))

    def assert_whole_or_refused(file: str, content: bytes) -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        path = tmp_path / "student.gguf" if file == "student.gguf" else tmp_path / "model"
        if path.suffix != ".gguf":
            shutil.copytree(folder, path, dirs_exist_ok=True)
        (path / file if path.suffix != ".gguf" else path).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = assert_promise(nn.Module, load, path, folder=tmp_path / "cache")
        assert model is None or not any(p.is_meta for p in model.parameters())
        converted = tmp_path / "cache" / "converted"
        assert model or not converted.exists() or not [p for p in converted.iterdir() if p.suffix != ".lock"]

    return assert_whole_or_refused


@tries(12, 250)
@given(data=st.data())
def test_a_gguf_header(assert_whole_or_refused, folder, data):
    content = folder.with_name("student.gguf").read_bytes()
    within = content.index(b"tokenizer.ggml.tokens") if data.draw(st.booleans()) else 20_000
    assert_whole_or_refused("student.gguf", data.draw(damaged([content], within)))


@tries(12, 250)
@given(data=st.data())
def test_a_safetensors_header(assert_whole_or_refused, folder, data):
    content = (folder / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        header = json.dumps(data.draw(changed([json.loads(content[8:size])])), default=str).encode()
        assert_whole_or_refused("model.safetensors", len(header).to_bytes(8, "little") + header + content[size:])
    else:
        assert_whole_or_refused("model.safetensors", data.draw(damaged([content], size)))


def test_a_config_of_many_layers_or_with_code_of_its_own(assert_whole_or_refused, folder):
    config = json.loads((folder / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    for changes in ({"num_hidden_layers": 2**31}, {"vocab_size": 2**34}, code):
        assert_whole_or_refused("config.json", json.dumps(config | changes).encode())
    gguf = folder.with_name("student.gguf").read_bytes()
    for name, head in ((b"llama.block_count", (4, 2**31)), (b"tokenizer.ggml.token_type", (9, 5, 0, 2**28))):
        start = gguf.index(name) + len(name)
        packed = struct.pack(f"<{len(head)}I", *head)
        assert_whole_or_refused("student.gguf", gguf[:start] + packed + gguf[start + len(packed) :])


@tries(30, 500)
@given(data=st.data(), name=st.sampled_from(["config", "generation_config", "tokenizer_config", "tokenizer"]))
def test_a_config_or_a_tokenizer(assert_whole_or_refused, folder, data, name):
    content = (folder / f"{name}.json").read_bytes()
    tree = changed([json.loads(content)]).map(lambda tree: json.dumps(tree, default=str).encode())
    inputs = damaged([content]) if name == "tokenizer" else tree | damaged([content])
    assert_whole_or_refused(f"{name}.json", data.draw(inputs))


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is <|im_end|> \u200b\0 a sign?"}]


@tries(30, 750)
@given(template=damaged([CHATML.encode(), b"{{ strftime_now('%d %b') }}" + CHATML.encode()]), name=st.text(max_size=9))
@example(template=b"{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}", name="default")
@example(template=b"{{ 1 // 0 }}", name="default")
@example(template=b"{% for i in range(10**9) %}{% endfor %}", name="default")
def test_a_chat_template(tokenizer, template, name):
    tokenizer.chat_template = template.decode("latin-1")
    named = {name: template.decode("latin-1")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for tokenizer.chat_template in (template.decode("latin-1"), named):
            ids = assert_promise(tuple, templates.encode, tokenizer, MESSAGES, "yes")
            assert ids is None or ids[1][-1] == tokenizer.eos_token_id
