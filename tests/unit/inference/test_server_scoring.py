"""Options scored through llama.cpp's server against torch on the same file."""

import asyncio

import httpx
import numpy as np
import pytest
import toys

from medkit.inference import server_scoring
from medkit.modeling.option_scoring import Item, score_options
from medkit.prompts import templates

OPTIONS = ["Diseases of the eye", "Diseases of the ear", "Diseases of the eye and adnexa", "Injury", "Neoplasms", "A"]


@pytest.mark.parametrize("scoring", ["option_text", "option_text_norm"])
def test_scores_are_those_of_torch_and_the_far_ones_are_bounds(edge_file, upstream, tokenizer, scoring, monkeypatch):
    """One option begins like others and one is the beginning of another; the far ones are not asked for alone."""
    messages = templates.render({"question": "What is gout?", "context": "", "options": OPTIONS}, templates.TEXT)
    encoded = [templates.encode(tokenizer, messages, option) for option in OPTIONS]
    answers = [ids for _, ids in encoded]
    expected = np.array(score_options(toys.read_gguf(edge_file), [Item(encoded[0][0], answers)])[0])
    if scoring == "option_text_norm":
        expected /= [len(ids) for ids in answers]
    monkeypatch.setattr(server_scoring, "TOP", len(tokenizer))  # random weights hold no end token to be likely
    asked = []

    async def score() -> list[float]:
        root, headers = upstream.url.removesuffix("/v1"), {"authorization": f"Bearer {upstream.api_key}"}
        hooks = {"request": [lambda request: note(request)]}
        async with httpx.AsyncClient(base_url=root, headers=headers, timeout=60, event_hooks=hooks) as client:
            return await server_scoring.score_options(client, {"messages": messages}, OPTIONS, scoring, {})

    async def note(request: httpx.Request) -> None:
        asked.append(request.url.path)

    for negligible, near in [(np.inf, expected > -np.inf), (2.0, expected > expected.max() - 2.0)]:
        monkeypatch.setattr(server_scoring, "NEGLIGIBLE", negligible)
        asked.clear()
        found = np.array(asyncio.run(score()))
        assert found[near] == pytest.approx(expected[near], abs=0.01)
        assert (found >= expected - 0.01).all() and found.argmax() == expected.argmax()
    assert asked.count("/v1/chat/completions") <= len(OPTIONS)
    monkeypatch.setattr(server_scoring, "TOP", 1)  # now an end token may not be told, and bounds are all there is
    assert (np.array(asyncio.run(score())) >= expected - 0.01).all()
