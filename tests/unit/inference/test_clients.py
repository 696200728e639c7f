"""lm-evaluation-harness and OpenAI's own client before the router."""

import asyncio
import json
import re

import openai
import pytest
from app_thread import running_app

from medkit.inference import serve

KEY = "secret"
QUESTIONS = ["Which vitamin prevents scurvy?", "Does aspirin reduce fever?", "Give 325 mg at 09:30."]
SETTINGS = {"model": "edge", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def address(upstream):
    """(url that ends in /v1, API key)"""
    with running_app(serve.make_router(upstream, KEY)) as url:
        yield f"{url}/v1", KEY


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address[0], api_key=address[1], max_retries=0) as client:
        yield client


def as_chat(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


# --- OpenAI's client -------------------------------------------------------------------------------------------------


def test_many_may_ask_at_once(address, client):
    expected = [client.chat.completions.create(messages=as_chat(q), **SETTINGS).choices[0].message for q in QUESTIONS]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=address[0], api_key=address[1]) as client:
            asked = [client.chat.completions.create(messages=as_chat(q), **SETTINGS) for q in QUESTIONS * 4]
            return [answer.choices[0].message for answer in await asyncio.gather(*asked)]

    assert [m.content for m in asyncio.run(ask_all())] == [m.content for m in expected] * 4


# --- lm-evaluation-harness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["local-completions", "local-chat-completions"])
def test_the_harness_reads_what_the_client_reads(address, client, tokenizer, tmp_path, monkeypatch, model):
    """Of three answers that the client got, one is replaced: two of three are right."""
    pytest.importorskip("lm_eval")
    for variable, value in {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": address[1]}.items():
        monkeypatch.setenv(variable, value)
    import lm_eval
    from lm_eval.tasks import TaskManager

    if is_chat := "chat" in model:
        texts = [client.chat.completions.create(messages=as_chat(q), **SETTINGS) for q in QUESTIONS]
        texts = [answer.choices[0].message.content for answer in texts]
        settings = {"base_url": f"{address[0]}/chat/completions"}
    else:
        texts = [client.completions.create(prompt=q, **SETTINGS).choices[0].text for q in QUESTIONS]
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        settings = {"base_url": f"{address[0]}/completions", "num_concurrent": 2, "max_length": 512}
        settings |= {"tokenizer": str(tmp_path / "tokenizer"), "tokenizer_backend": "huggingface"}
    rows = [{"question": q, "answer": text} for q, text in zip(QUESTIONS, [*texts[:2], "no"], strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    task = {"task": "toy", "dataset_path": "json", "dataset_kwargs": place, "test_split": "test"}
    task |= {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "output_type": "generate_until"}
    task |= {"generation_kwargs": {"until": ["<|endoftext|>"], "max_gen_toks": SETTINGS["max_tokens"]}}
    told = lm_eval.simple_evaluate(
        model=model, model_args={"model": "edge", "max_retries": 1, **settings}, bootstrap_iters=0,
        tasks=[task | {"metric_list": [{"metric": "exact_match"}]}], apply_chat_template=is_chat,
        task_manager=TaskManager(include_defaults=False),  # reading its own thousands takes a minute
    )  # fmt: skip
    assert told["results"]["toy"]["exact_match,none"] == pytest.approx(2 / 3)


def test_options_cannot_be_scored_through_a_server(upstream):
    """llama.cpp tells the log-probability of what it writes and not of a prompt, in silence; the router says so."""
    with (
        running_app(serve.make_router(upstream, KEY, [])) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(serve.NO_ECHO)):
            client.completions.create(prompt=QUESTIONS[0], echo=True, logprobs=1, **SETTINGS)
        assert client.completions.create(prompt=QUESTIONS[0], echo=False, **SETTINGS).choices[0].text
