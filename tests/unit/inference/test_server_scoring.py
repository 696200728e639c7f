"""Options scored through llama.cpp's server against torch on the same file."""

import asyncio

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from medkit.inference import server_scoring
from medkit.inference.server_engine import llama_server
from medkit.modeling.option_scoring import Item, score_options
from medkit.prompts import templates
from medkit.quantization import gguf_export

OPTIONS = ["Diseases of the eye", "Diseases of the ear", "Diseases of the eye and adnexa", "Injury", "Neoplasms", "A"]


@pytest.fixture(scope="module")
def path(make_llama, tokenizer, tmp_path_factory):
    return gguf_export.export_gguf(make_llama(), tokenizer, tmp_path_factory.mktemp("edge") / "student.gguf", "F16")


@pytest.fixture(scope="module")
def upstream(path):
    with llama_server(path, slots=2, context_tokens=512, threads=1) as address:
        yield address


@pytest.mark.parametrize("scoring", ["option_text", "option_text_norm", "letter"])
def test_scores_are_those_of_torch_and_the_far_ones_are_bounds(path, upstream, tokenizer, scoring, monkeypatch):
    """One option begins like others and one is the beginning of another; the far ones are not asked for alone."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    options = list("ABCD") if scoring == "letter" else OPTIONS
    messages = templates.render({"question": "What is gout?", "context": "", "options": options}, templates.TEXT)
    encoded = [templates.encode(tokenizer, messages, option) for option in options]
    answers = [ids[:1] if scoring == "letter" else ids for _, ids in encoded]
    expected = np.array(score_options(model.eval(), [Item(encoded[0][0], answers)], 512, 0)[0])
    if scoring == "option_text_norm":
        expected /= [len(ids) for ids in answers]
    monkeypatch.setattr(server_scoring, "TOP", len(tokenizer))  # random weights hold no end token to be likely
    asked = []

    async def score() -> list[float]:
        root, headers = upstream.url.removesuffix("/v1"), {"authorization": f"Bearer {upstream.api_key}"}
        hooks = {"request": [lambda request: note(request)]}
        async with httpx.AsyncClient(base_url=root, timeout=60, event_hooks=hooks) as client:
            return await server_scoring.score_options(client, headers, messages, options, scoring, {})

    async def note(request: httpx.Request) -> None:
        asked.append(request.url.path)

    for negligible, near in [(np.inf, expected > -np.inf), (2.0, expected > expected.max() - 2.0)]:
        monkeypatch.setattr(server_scoring, "NEGLIGIBLE", negligible)
        asked.clear()
        found = np.array(asyncio.run(score()))
        assert found[near] == pytest.approx(expected[near], abs=0.01)
        assert (found >= expected - 0.01).all() and found.argmax() == expected.argmax()
    assert asked.count("/v1/chat/completions") <= (1 if scoring == "letter" else len(options))
