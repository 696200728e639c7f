"""The router between a client and a server that may both write anything, and the engine behind such a server."""

import asyncio
import json
import platform
from functools import partial

import httpx
import openai
import pytest
from hostile import assert_promise, changed, damaged, tries, watched
from hypothesis import example, given
from hypothesis import strategies as st

from medkit.inference import serve, server_engine
from medkit.inference.server_engine import ServerAddress, ServerEngine
from medkit.inference.tasks import Task
from medkit.modeling.engine import Generation, Request
from medkit.stage import DISCLAIMER

CHATS = [
    {"model": "edge", "messages": [{"role": "user", "content": "How is aspirin taken?"}], "tools": None, "n": 1},
    {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]}]},
]
QUESTION = "Which ICD-10-CM chapter lists “rash”?\nA. skin\nB. blood"
CHATS += [
    {"messages": [{"role": "user", "content": text}], "stream": False} for text in (QUESTION, "D: Hello.\nP: Hi.")
]
ANSWERS = [
    {"choices": [{"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}], "metadata": None},
    {"error": {"message": "no", "type": "x", "param": None, "code": 400}},
    {"tokens": [5, 6], "choices": [{"message": {"content": "a"}, "logprobs": {"content": [{"logprob": -1.0}] * 2}}]},
]
as_json = partial(json.dumps, default=str)  # NaN and lone surrogates stay what they are
PATHS = ["/v1/chat/completions", "/v1/completions", "/health"]
PATHS += ["//evil.example/v1", "/:80", "/\0", "/\udcff", "/%2f..", "/é"]
TYPES = ["application/json", "application/json; charset=utf-16", "text/event-stream", "", "\xff"]


KNOWN = {"metric": "accuracy", "value": 0.5, "n": 9, "options": ["skin", "blood"], "least_confidence": None}
LONG_LINE = as_json({"messages": [{"role": "user", "content": f"A. a{' ' * 10**5}b"}]}).encode()
TASKS = [
    Task(source=kind, kind=kind, scoring="option_text_norm", **KNOWN) for kind in ("icd_chapter", "record", "choice")
]


def tree_or_bytes(trees: list):
    return changed(trees).map(as_json).map(str.encode) | damaged([as_json(tree).encode() for tree in trees])


async def ask_router(asked: list, tasks, method: str, path: str, query: bytes, body: bytes, answer: dict):
    """The router's answer; what it asks of the server behind it is written down."""

    def upstream(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(**answer)

    router = serve.make_router(ServerAddress("http://127.0.0.1:9/v1", "none"), "secret", tasks, ["<|im_end|>"])
    router.state.client = httpx.AsyncClient(base_url="http://127.0.0.1:9", transport=httpx.MockTransport(upstream))

    async def app(scope, receive, send):
        await router(scope | {"path": path, "query_string": query}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        headers = {"authorization": "Bearer secret"}
        async with client.stream(method, "/", content=body, headers=headers) as got:
            content = b"".join([chunk async for chunk in got.aiter_raw()])
        got.headers.pop("content-encoding", None)
        return httpx.Response(got.status_code, headers=got.headers, content=content)


@tries(60, 1500)
@given(
    tasks=st.sampled_from([None, TASKS, TASKS[:1]]),
    method=st.sampled_from(["POST", "POST", "GET", "PUT"]),
    path=st.sampled_from(PATHS[:1] * 4 + PATHS),
    query=st.sampled_from([b"", b"", b"a=%00", b"\xff=1", b"\0", b"a#b"]),
    body=tree_or_bytes(CHATS),
    answer=tree_or_bytes(ANSWERS),
    status=st.sampled_from([200, 200, 200, 404, 503]),
    kind=st.sampled_from(TYPES),
    encoding=st.sampled_from([None, None, None, "gzip", "br"]),
)
@example(None, "POST", PATHS[0], b"", LONG_LINE, b"{}", 200, "application/json", None)
@example(None, "POST", PATHS[0], b"", as_json(CHATS[0] | {"model": "\ud800"}).encode(), b"{}", 200, TYPES[0], None)
@example(TASKS, "POST", PATHS[0], b"", as_json(CHATS[0] | {"n": 1.0}).encode(), b"{}", 200, "application/json", None)
def test_the_router(tasks, method, path, query, body, answer, status, kind, encoding):
    headers = {"content-type": kind.encode("latin-1")} | ({"content-encoding": encoding} if encoding else {})
    asked, server = [], {"status_code": status, "headers": headers, "stream": httpx.ByteStream(answer)}
    with watched():
        got = asyncio.run(ask_router(asked, tasks, method, path, query, body, server))
    assert got.headers["x-medkit-disclaimer"] == DISCLAIMER
    assert all((r.url.scheme, r.url.host, r.url.port) == ("http", "127.0.0.1", 9) for r in asked)
    if got.status_code >= 400 and (got.status_code != status or not asked):
        error = got.json()["error"]
        assert error["code"] == got.status_code != 500 and error["message"].isprintable()
    elif got.headers.get("content-type", "").startswith("application/json") and path == PATHS[0] and status == 200:
        assert got.json()["metadata"]["disclaimer"] == DISCLAIMER


# --- the engine ------------------------------------------------------------------------------------------------------

MODELS = {"object": "list", "data": [{"id": "edge", "object": "model", "created": 1, "owned_by": "llamacpp"}]}
LLAMA = {"id": "c", "object": "text_completion", "created": 1, "model": "edge", "choices": [{"index": 0, "text": "a"}]}
LLAMA |= {"timings": {"predicted_ms": 4.0, "prompt_ms": 2.0}, "__verbose": {"tokens": [5, 6, 2]}}
CHUNK = {"choices": [{"index": 0, "text": "a", "token_ids": [5, 2], "finish_reason": "stop"}]}


def ask_engine(models: bytes, answer: bytes) -> Generation:
    return ServerEngine("http://127.0.0.1:9/v1").generate([Request([5, 6], 3, (2,))])[0]


@pytest.fixture
def engine(monkeypatch):
    """engine(models, answer, stream): what the engine makes of a server that lists `models` and gives this answer."""

    def ask(models: bytes, answer: bytes, stream: bool):
        def server(request: httpx.Request) -> httpx.Response:
            kind = "text/event-stream" if stream and request.url.path.endswith("completions") else "application/json"
            content = models if request.url.path.endswith("/models") else answer
            return httpx.Response(200, headers={"content-type": kind}, content=content)

        client = httpx.Client(transport=httpx.MockTransport(server))
        monkeypatch.setattr(server_engine.openai, "OpenAI", partial(OPENAI, http_client=client))
        return assert_promise(Generation, ask_engine, models, answer)

    return ask


OPENAI = openai.OpenAI
platform.processor()  # which OpenAI's client sends to the server: Python asks `uname` once


@tries(40, 1000)
@given(models=st.just(as_json(MODELS).encode()) | tree_or_bytes([MODELS]), answer=tree_or_bytes([LLAMA]))
@example(models=b"[]", answer=b"{}")
def test_the_engine_on_llama_cpp(engine, models, answer):
    generation = engine(models, answer, False)
    assert generation is None or all(type(token) is int and token >= 0 for token in generation.token_ids)


@tries(40, 1000)
@given(answer=tree_or_bytes([CHUNK]), first=st.booleans())
def test_the_engine_on_a_stream(engine, answer, first):
    models = as_json(MODELS).replace("llamacpp", "vllm").encode()
    whole = b"data: " + as_json(CHUNK | {"choices": [CHUNK["choices"][0] | {"finish_reason": None}]}).encode() + b"\n\n"
    stream = whole * first + b"data: " + answer + b"\n\ndata: [DONE]\n\n"
    generation = engine(models, stream, True)
    assert generation is None or all(type(token) is int and token >= 0 for token in generation.token_ids)
