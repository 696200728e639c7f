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


@pytest.fixture(scope="module")
def evaluate(tokenizer, tmp_path_factory):
    """evaluate(model, address, rows, **task): its metrics for rows of `question` and `answer`."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(variable, "1")
        import lm_eval
        from lm_eval.tasks import TaskManager

        no_tasks = TaskManager(include_defaults=False)  # reading its own thousands takes a minute

        def run(model, address, rows, **task):
            patch.setenv("OPENAI_API_KEY", address[1])
            file = folder / f"{len(list(folder.iterdir()))}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            place = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
            task |= {"task": "toy", "dataset_path": "json", "dataset_kwargs": place, "test_split": "test"}
            task |= {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
            path = "/chat/completions" if "chat" in model else "/completions"
            settings = {"model": "edge", "base_url": address[0] + path, "max_retries": 1}
            if "chat" not in model:
                settings |= {"tokenizer": str(folder / "tokenizer"), "tokenizer_backend": "huggingface"}
                settings |= {"num_concurrent": 2, "max_length": 512}
            told = lm_eval.simple_evaluate(
                model=model, model_args=settings, tasks=[task], task_manager=no_tasks, bootstrap_iters=0,
                apply_chat_template="chat" in model,
            )  # fmt: skip
            return told["results"]["toy"]

        yield run


@pytest.mark.parametrize("model", ["local-completions", "local-chat-completions"])
def test_the_harness_reads_what_the_client_reads(evaluate, address, client, model):
    """Of three answers that the client got, one is replaced: two of three are right."""
    if "chat" in model:
        texts = [client.chat.completions.create(messages=as_chat(q), **SETTINGS) for q in QUESTIONS]
        texts = [answer.choices[0].message.content for answer in texts]
    else:
        texts = [client.completions.create(prompt=q, **SETTINGS).choices[0].text for q in QUESTIONS]
    rows = [{"question": q, "answer": text} for q, text in zip(QUESTIONS, [*texts[:2], "no"], strict=True)]
    generation = {"until": ["<|endoftext|>"], "max_gen_toks": SETTINGS["max_tokens"]}
    found = evaluate(
        model, address, rows,
        output_type="generate_until", generation_kwargs=generation, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    assert found["exact_match,none"] == pytest.approx(2 / 3)


def test_options_cannot_be_scored_through_a_server(evaluate, upstream, caplog):
    """llama.cpp tells the log-probability of what it writes and not of a prompt, in silence; the router says so."""
    rows = [{"question": QUESTIONS[0], "answer": 1}]
    choice = {"output_type": "multiple_choice", "doc_to_choice": ["A", "B"], "metric_list": [{"metric": "acc"}]}
    with running_app(serve.make_router(upstream, KEY, [])) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match=re.escape(serve.NO_ECHO)):
                client.completions.create(prompt=QUESTIONS[0], echo=True, logprobs=1, **SETTINGS)
            assert client.completions.create(prompt=QUESTIONS[0], echo=False, **SETTINGS).choices[0].text
        with pytest.raises(Exception, match="400"):
            evaluate("local-completions", (f"{url}/v1", KEY), rows, **choice)
    assert serve.NO_ECHO in caplog.text
