"""The endpoint is asked by OpenAI's own client, over a real socket, and answers what the engine answers alone."""

import ast
import asyncio
import http.client
import importlib
import json
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice

import openai
import pytest
import torch
from typer.testing import CliRunner

from medkit import __main__, models, prompts, serving, serving_http, variants
from medkit.__main__ import app as command_line
from medkit.engines import EngineError, Request
from medkit.outputs import DISCLAIMER, ROOT
from medkit.remote_engine import RemoteEngine
from medkit.serving_schema import ApiError, ChatBody, CompletionBody, read_body
from medkit.serving_text import TextStream, apply_template, pick_template

MODEL = "toy"
LIMITS = serving.Limits(context_tokens=1024, chat_tokens=12, max_running=4, max_waiting=4, grace_s=5.0)
QUESTIONS = [
    "How much aspirin may I take a day?",
    "What causes scurvy?",
    "What is a cell?",
    "I have chest pain and cannot breathe, should I call an ambulance?",
    "Wie hoch ist Fieber? 38 °C 🌡",
]


class ToyEngine:
    """Real greedy tokens of a toy model; it counts what it does, and can be made to wait."""

    name = "toy"

    def __init__(self, model, vocab, step_s=0.0):
        self.model, self.vocab, self.step_s = model, vocab, step_s
        self.begun = self.open = self.written = 0
        self.closed, self.go, self._lock = False, threading.Event(), threading.Lock()
        self.go.set()

    def _next(self, ids, cache):
        with self._lock, torch.no_grad():
            found = self.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            self.written += 1
            return int(found.logits[0, -1, : self.vocab].argmax()), found.past_key_values

    def stream(self, request):
        assert not self.closed
        self.begun += 1
        self.open += 1
        try:
            assert self.go.wait(20)
            ids, cache = list(request.prompt_ids), None
            for _ in range(request.max_new_tokens):
                token, cache = self._next(ids, cache)
                time.sleep(self.step_s)
                yield token
                if token in request.end_ids:
                    return
                ids = [token]
        finally:
            self.open -= 1

    def close(self):
        assert not self.open
        self.closed = True


class CountingEngine:
    """Counts up from the prompt's first token, without a model."""

    name, open = "counting", 0

    def stream(self, request):
        self.open += 1
        try:
            for number in range(request.max_new_tokens):
                yield 3 + (request.prompt_ids[0] + number) % 290
        finally:
            self.open -= 1

    def close(self):
        pass


class BrokenEngine(ToyEngine):
    """Fails on every prompt, naming it."""

    error = RuntimeError

    def stream(self, request):
        yield 5
        raise self.error(f"secret of {list(request.prompt_ids)}")


class RefusingEngine(CountingEngine):
    """Takes no request at all."""

    def stream(self, request):
        raise EngineError("the prompt does not fit")


@pytest.fixture
def engine(make_llama, tokenizer):
    return ToyEngine(make_llama(seed=3, initializer_range=0.5), len(tokenizer))


@pytest.fixture
def serve(tokenizer):
    """serve(engine, api_key=…, cached_answers=…, **limits): the running server; `.url` and `.port` are its address."""

    @contextmanager
    def run(engine, api_key=None, cached_answers=0, **limits):
        settings = {"limits": replace(LIMITS, **limits), "api_key": api_key, "cached_answers": cached_answers}
        app = serving.create_app(engine, tokenizer, model_name=MODEL, **settings)
        server = serving.make_server(app, port=0)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            wait_for(lambda: server.started)
            server.port = server.servers[0].sockets[0].getsockname()[1]
            server.url, server.thread, server.line = f"http://127.0.0.1:{server.port}/v1", thread, app.state.line
            yield server
        finally:
            server.should_exit = True
            thread.join(20)
        assert not thread.is_alive()

    return run


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def client_of(server, api_key="none"):
    """OpenAI's client; one per server, since making one takes longer than an answer."""
    if not hasattr(server, "client"):
        server.client = openai.OpenAI(base_url=server.url, api_key=api_key, max_retries=0, timeout=20)
    return server.client.with_options(api_key=api_key)


def post(server, body, path="/v1/completions", **headers):
    """Status, headers and body of a plain POST; `body` is text, or something to be written as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    text = body if isinstance(body, (str, bytes)) else json.dumps(body)
    connection.request("POST", path, text, {"content-type": "application/json", **headers})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, response.headers, answer


def get(server, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def chat(content):
    return [{"role": "user", "content": content}]


def alone(engine, tokenizer, ids, length, end=True):
    """What the engine says to a prompt with nobody else around, and that as text."""
    ends = (tokenizer.eos_token_id,) if end else ()
    tokens = list(engine.stream(Request(ids, length, end_ids=ends)))
    return tokens, tokenizer.decode(tokens, skip_special_tokens=True)


def prompt_ids(tokenizer, question):
    messages = prompts.render({"context": "", "question": question}, prompts.OPEN[prompts_kind(question)])
    return prompts.encode(tokenizer, messages)[0]


def prompts_kind(question):
    return pick_template(question).name


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spaces_tokenizer():
    """As Llama 2 has it: a leading space is dropped, unknown characters come byte by byte."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁dose", "s", "▁is", "ü", "."]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


REAL = "Fièvre de 39 °C, 体温, 🌡️👩🏽‍⚕️ — “no” dose  at  all.\n"


def check_stream(tokenizer, ids):
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=True)
    return pieces


def test_the_pieces_of_a_stream_are_the_tokenizers_text(tokenizer):
    draw = random.Random(0)
    for _ in range(300):  # mostly broken characters, special tokens among them
        check_stream(tokenizer, draw.choices(range(len(tokenizer)), k=draw.randint(0, 30)))
    ids = tokenizer.encode(REAL, add_special_tokens=False)
    for start in range(len(ids)):
        for end in range(start, len(ids)):
            check_stream(tokenizer, ids[start:end])
    pieces = check_stream(tokenizer, ids)
    assert "".join(pieces) == REAL and sum(map(bool, pieces)) > len(REAL) / 2  # it does come piece by piece


def test_spaces_and_bytes_of_other_tokenizers(spaces_tokenizer):
    vocab, draw = spaces_tokenizer.get_vocab(), random.Random(0)
    units = [[i] for piece, i in vocab.items() if not piece.startswith("<0x")]
    units += [[vocab[f"<0x{byte:02X}>"] for byte in letter.encode()] for letter in REAL]
    for _ in range(300):
        check_stream(spaces_tokenizer, [i for unit in draw.choices(units, k=draw.randint(0, 20)) for i in unit])
    assert "".join(check_stream(spaces_tokenizer, [i for unit in units[-len(REAL) :] for i in unit])) == REAL


def test_a_stop_string_ends_the_text_wherever_tokens_split_it(tokenizer):
    draw = random.Random(1)
    stopped = 0
    for _ in range(400):
        text = "".join(draw.choices("ab° ", k=draw.randint(1, 25)))
        stops = ["".join(draw.choices("ab° ", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        stream, found = TextStream(tokenizer, stops), ""
        for token in tokenizer.encode(text, add_special_tokens=False):
            found += stream.push(token)
            if stream.stopped:
                break
        found += "" if stream.stopped else stream.flush()
        stopped += stream.stopped
        assert not any(stop in found for stop in stops)
        assert text.startswith(found)
        assert stream.stopped == any(stop in text for stop in stops)
        assert any(text[len(found) :].startswith(stop) for stop in stops) if stream.stopped else found == text
    assert 100 < stopped < 400


def test_each_kind_of_question_gets_its_template():
    assert [prompts_kind(q) for q in QUESTIONS[:4]] == ["medication", "diagnosis", "other", "emergency"]
    exam = "Which vitamin prevents scurvy?\nA. vitamin A\nB. vitamin C"
    turns, name = apply_template(chat(exam))
    assert name == "letter"
    shown = {"context": "", "question": exam.partition("\n")[0], "options": ["vitamin A", "vitamin C"]}
    said = [turn["content"].split() for turn in prompts.render(shown, prompts.LETTER)]
    assert [turn["content"].split() for turn in turns] == said
    earlier = [*chat("Hello."), {"role": "assistant", "content": "Hello."}]
    turns, name = apply_template(earlier + chat(QUESTIONS[0]))
    assert turns == [{"role": "system", "content": prompts.SYSTEM}, *earlier, turns[-1]]
    assert turns[-1]["content"].startswith(QUESTIONS[0]) and prompts.OPEN_SUFFIXES[name] in turns[-1]["content"]
    own = [{"role": "system", "content": "Be kind."}, *chat(QUESTIONS[0])]
    assert apply_template(own) == (own, None)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_chat_answers_are_the_engines_whole_and_in_pieces(engine, tokenizer, serve):
    with serve(engine) as server:
        client = client_of(server)
        for question in QUESTIONS:
            ids = prompt_ids(tokenizer, question)
            tokens, text = alone(engine, tokenizer, ids, LIMITS.chat_tokens)
            raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=chat(question))
            assert raw.headers["x-medkit-disclaimer"] == DISCLAIMER
            assert raw.headers["x-medkit-template"] == prompts_kind(question)
            answer = raw.parse()
            assert answer.choices[0].message.content == text
            ended = tokens[-1] == tokenizer.eos_token_id
            assert answer.choices[0].finish_reason == ("stop" if ended else "length")
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(tokens))
            options = {"stream_options": {"include_usage": True}, "extra_body": {"return_token_ids": True}}
            events = list(client.chat.completions.create(model=MODEL, messages=chat(question), stream=True, **options))
            *pieces, usage = events
            assert "".join(piece.choices[0].delta.content for piece in pieces) == text
            assert [i for piece in pieces for i in piece.choices[0].token_ids] == tokens
            assert pieces[0].prompt_token_ids == ids and pieces[0].choices[0].delta.role == "assistant"
            assert [p.choices[0].finish_reason for p in pieces] == [None] * len(tokens) + [
                answer.choices[0].finish_reason
            ]
            assert usage.choices == [] and usage.usage == answer.usage


def test_completions_take_text_or_token_ids(engine, tokenizer, serve):
    ids = tokenizer("Which vitamin").input_ids
    tokens, text = alone(engine, tokenizer, ids, 40, end=False)
    with serve(engine) as server:
        client = client_of(server)
        more = {"model": MODEL, "max_tokens": 40, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
        for prompt in ("Which vitamin", ids):
            choice = client.completions.create(prompt=prompt, **more).choices[0]
            assert (choice.text, choice.token_ids, choice.prompt_token_ids) == (text, tokens, ids)
            assert choice.finish_reason == "length"
            pieces = [event.choices[0] for event in client.completions.create(prompt=prompt, stream=True, **more)]
            assert "".join(piece.text for piece in pieces) == text
            assert [i for piece in pieces for i in piece.token_ids] == tokens
        assert client.completions.create(prompt=ids, model=MODEL).usage.completion_tokens <= 16
        more["extra_body"] = {"ignore_eos": False, "stop_token_ids": [tokens[3]], "return_token_ids": True}
        ended = client.completions.create(prompt=ids, **more).choices[0]
        assert ended.token_ids == tokens[: tokens.index(tokens[3]) + 1] and ended.finish_reason == "stop"


def test_our_own_engine_for_servers_reads_it(engine, tokenizer, serve):
    asked = [Request(tokenizer(q).input_ids, 12, end_ids=ends) for q in QUESTIONS for ends in ((), (2,), (2, 9))]
    expected = [list(engine.stream(request)) for request in asked]
    with serve(engine, max_running=16) as server:
        remote = RemoteEngine(server.url, MODEL, tokenizer)
        assert [list(remote.stream(request)) for request in asked] == expected
        assert [answer.token_ids for answer in remote.generate(asked)] == expected
        remote.close()


def test_a_stop_string_stops_the_engine_too(engine, tokenizer, serve):
    ids = tokenizer("Which vitamin").input_ids
    tokens, text = alone(engine, tokenizer, ids, 200, end=False)
    stop = next(text[i : i + 2] for i in range(10, len(text)) if text[i : i + 2].isalpha())
    with serve(engine) as server:
        before = engine.written
        asked = {"model": MODEL, "prompt": ids, "max_tokens": 200, "stop": [stop], "extra_body": {"ignore_eos": True}}
        choice = client_of(server).completions.create(**asked).choices[0]
        assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"
        wait_for(lambda: not engine.open)
        assert engine.written - before < len(tokens)
        pieces = client_of(server).completions.create(stream=True, **asked)
        assert "".join(piece.choices[0].text for piece in pieces) == choice.text


def test_models_and_health_say_what_is_served(engine, serve):
    with serve(engine) as server:
        client = client_of(server)
        [model] = client.models.list().data
        assert (model.id, model.disclaimer, model.max_model_len) == (MODEL, DISCLAIMER, LIMITS.context_tokens)
        assert client.models.retrieve(MODEL) == model
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")
        assert get(server, "/health")[0] == 200


def test_the_health_of_an_engine_that_has_died(serve):
    engine = CountingEngine()
    with serve(engine) as server:
        engine.ended = False
        assert get(server, "/health")[0] == 200
        engine.ended = True
        status, answer = get(server, "/health")
        assert status == 503 and "start the server again" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("held", "promised"), [(32, 32), (None, LIMITS.context_tokens), (10**6, LIMITS.context_tokens)]
)
def test_what_is_promised_is_what_both_model_and_engine_hold(held, promised, tokenizer, serve):
    engine = CountingEngine()
    engine.max_tokens = held
    with serve(engine) as server:
        client = client_of(server)
        assert client.models.retrieve(MODEL).max_model_len == promised
        fits = {"model": MODEL, "prompt": [5] * 20, "max_tokens": promised - 20, "extra_body": {"ignore_eos": True}}
        assert client.completions.create(**fits).usage.total_tokens == promised
        with pytest.raises(openai.BadRequestError, match=str(promised)) as caught:
            client.completions.create(**fits | {"max_tokens": promised - 19})
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")


def test_64_clients_get_each_their_own_answer(engine, tokenizer, serve):
    draw = random.Random(0)
    asked = [draw.choices(range(3, len(tokenizer)), k=draw.randint(1, 40)) for _ in range(64)]
    lengths = [draw.randint(1, 20) for _ in asked]
    expected = [alone(engine, tokenizer, *pair, end=False)[0] for pair in zip(asked, lengths, strict=True)]
    with serve(engine, max_running=8, max_waiting=56) as server:
        client = client_of(server)

        def ask(number):
            more = {"ignore_eos": True, "return_token_ids": True}
            fields = {"model": MODEL, "prompt": asked[number], "max_tokens": lengths[number], "extra_body": more}
            if number % 2:
                return client.completions.create(**fields).choices[0].token_ids
            return [i for e in client.completions.create(stream=True, **fields) for i in e.choices[0].token_ids]

        with ThreadPoolExecutor(64) as clients:
            assert list(clients.map(ask, range(64))) == expected
        wait_for(lambda: not server.line.inside)
        metrics = get(server, "/metrics")[1]
        assert 'medkit_requests_total{route="/v1/completions",status="200"} 64.0' in metrics
        assert f"medkit_prompt_tokens_total {float(sum(map(len, asked)))}" in metrics
        assert f"medkit_answer_tokens_total {float(sum(lengths))}" in metrics
        assert "medkit_ttft_seconds_count 64.0" in metrics
        assert f"medkit_latency_seconds_per_token_count {float(sum(n > 1 for n in lengths))}" in metrics
        assert "medkit_running 0.0" in metrics and "medkit_waiting 0.0" in metrics


# --- refusals --------------------------------------------------------------------------------------------------------

GOOD = {"model": MODEL, "prompt": "A", "max_tokens": 2}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
BAD = [
    ({"temperature": 0.7}, "temperature", "greedy"),
    ({"n": 2}, "n", "greedy"),
    ({"logprobs": 1}, "logprobs", "probabilities"),
    ({"presence_penalty": 0.5}, "presence_penalty", "penalties"),
    ({"echo": True}, "echo", "prompt"),
    ({"stop": ["ok", ""]}, "stop", "empty"),
    ({"stop": ["x"] * 17}, "stop", "16"),
    ({"max_tokens": 0}, "max_tokens", "1"),
    ({"max_tokens": "2"}, "max_tokens", "integer"),
    ({"max_tokens": True}, "max_tokens", "integer"),
    ({"max_tokens": 1024}, "max_tokens", "1024"),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "at least 1"),
    ({"prompt": [-1]}, "prompt", "0"),
    ({"prompt": [10**6]}, "prompt", "unknown"),
    ({"prompt": [3] * 1024}, "prompt", "1024"),
    ({"prompt": None}, "prompt", "string"),
    ({"tools": []}, "tools", "not permitted"),
    ({"model": None}, "model", "string"),
]


def error_of(answer):
    error = json.loads(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.fixture(scope="module")
def quiet_server(make_llama, tokenizer):
    """One server for what never reaches the engine."""
    engine = ToyEngine(make_llama(seed=3, initializer_range=0.5), len(tokenizer))
    app = serving.create_app(engine, tokenizer, model_name=MODEL, limits=replace(LIMITS, max_body_bytes=20_000))
    server = serving.make_server(app, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    server.port = server.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{server.port}/v1"
    yield server
    server.should_exit = True
    thread.join(20)
    assert engine.begun == 0 and engine.closed


@pytest.mark.parametrize(("change", "param", "word"), BAD, ids=[str(next(iter(c.items())))[:40] for c, _, _ in BAD])
def test_what_cannot_be_done_is_refused_with_the_reason(change, param, word, quiet_server):
    for stream in (False, True):
        status, _, answer = post(quiet_server, GOOD | change | {"stream": stream})
        error = error_of(answer)
        assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
        assert word in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00",
        '{"model": "toy"',
        "[" * 5000,
        b"\xff\xfe",
        '{"prompt": "\\ud800"}',
        '"' + "a" * 99,
    ],
)
def test_malformed_bodies_are_answered(body, quiet_server):
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, _, answer = post(quiet_server, body, path)
        assert (status, error_of(answer)["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "at least 1"),
        ([{"role": "tool", "content": "x"}], "role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "content"),
        ([*chat("Hi."), {"role": "assistant", "content": "Hello."}], "last message"),
        (chat("fever " * 1100), "1024"),
    ],
)
def test_chats_that_cannot_be_answered(messages, word, quiet_server):
    with pytest.raises(openai.BadRequestError) as caught:
        client_of(quiet_server).chat.completions.create(model=MODEL, messages=messages)
    assert caught.value.param == "messages" and word in caught.value.message


def test_other_wrong_requests_have_their_own_status(quiet_server):
    cases = [
        (post(quiet_server, GOOD | {"model": "gpt"}), 404, "model_not_found"),
        (post(quiet_server, {}, "/v1/embeddings"), 404, None),
        (post(quiet_server, "x" * 20_001), 413, None),
        (post(quiet_server, json.dumps(GOOD), **{"content-type": "text/plain"}), 415, None),
        (post(quiet_server, json.dumps(GOOD), **{"content-type": "application/json2"}), 415, None),
    ]
    for (status, _, answer), expected, code in cases:
        assert (status, error_of(answer)["code"]) == (expected, code)
    status, answer = get(quiet_server, "/v1/completions")
    assert status == 405 and error_of(answer)
    with pytest.raises(openai.NotFoundError):
        client_of(quiet_server).completions.create(model="gpt", prompt="A")
    get(quiet_server, "/no/such/path")
    assert 'medkit_requests_total{route="other",status="404"} 2.0' in get(quiet_server, "/metrics")[1]


@pytest.mark.parametrize("said", ["application/json ; charset=utf-8", "Application/JSON", "application/json;"])
def test_json_is_json_however_it_is_written(said, quiet_server):
    status, _, answer = post(quiet_server, "{", **{"content-type": said})
    assert status == 400, answer


def test_a_large_body_is_refused_while_it_still_comes(quiet_server):
    with socket.create_connection(("127.0.0.1", quiet_server.port), timeout=10) as raw:
        raw.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(30):
            raw.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_accepted_fields_that_change_nothing():
    same = {"top_p": 0.5, "seed": 7, "user": "me", "temperature": 0, "n": 1, "frequency_penalty": 0.0, "best_of": 1}
    read_body(CompletionBody, json.dumps(GOOD | same).encode())
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    body = read_body(ChatBody, json.dumps({"model": MODEL, "messages": parts, "max_completion_tokens": 3}).encode())
    assert [message.as_turn() for message in body.messages] == chat("ab")
    with pytest.raises(ApiError, match="stream_options"):
        read_body(CompletionBody, json.dumps(GOOD | {"stream_options": {"x": 1}}).encode())


def test_the_key_is_asked_for_everywhere_but_health(engine, serve, caplog):
    caplog.set_level(logging.DEBUG)
    with serve(engine, api_key="sesame-ü") as server:
        for wrong in ("none", "sesame", "sesame-u"):
            with pytest.raises(openai.AuthenticationError):
                client_of(server, wrong).models.list()
        assert [get(server, path)[0] for path in ("/health", "/metrics", "/v1/models")] == [200, 401, 401]
        assert post(server, GOOD)[0] == 401 and engine.begun == 0
        assert get(server, "/v1/models", authorization="Bearer sesame-ü".encode())[0] == 200
        assert post(server, GOOD, authorization="bearer sesame-ü".encode())[0] == 200
    assert "sesame" not in caplog.text


OWN = ["localhost", "localhost:8000", "LocalHost:1", "127.0.0.1", "127.0.0.1:8000", "127.0.0.2", "[::1]", "[::1]:8000"]
FOREIGN = [
    *["evil.example", "evil.example:8000", "192.168.1.4", "[::2]", "localhost.", "localhost.:8000", "127.0.0.1."],
    *["", ":8000", "::1", "[::1", "localhost:", "localhost:x", "localhost@evil.example", "localhost:1:2"],
    *["localhost.evil.example", "127.0.0.1.evil.example", "evil.example/localhost"],
]


def test_without_a_key_other_hosts_are_refused(quiet_server):
    for host in OWN:
        assert [get(quiet_server, path, host=host)[0] for path in ("/v1/models", "/health", "/no")] == [200, 200, 404]
        assert post(quiet_server, GOOD | {"model": "gpt"}, host=host)[0] == 404
    for host in FOREIGN:
        for path in ("/v1/models", "/health", "/metrics", "/no"):
            status, answer = get(quiet_server, path, host=host)
            assert status == 403 and "localhost" in error_of(answer)["message"], host
        assert post(quiet_server, GOOD | {"model": "gpt"}, host=host)[0] == 403
    with pytest.raises(openai.PermissionDeniedError):
        client_of(quiet_server).models.list(extra_headers={"host": "evil.example"})
    with socket.create_connection(("127.0.0.1", quiet_server.port), timeout=10) as raw:
        raw.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")  # only there may it be missing
        assert raw.recv(100).startswith(b"HTTP/1.1 403")


def test_with_a_key_every_host_is_served(serve):
    with serve(CountingEngine(), api_key="sesame") as server:
        for host in OWN + FOREIGN:
            assert get(server, "/v1/models", host=host, authorization="Bearer sesame")[0] == 200


def test_only_loopback_goes_without_a_key(engine, tokenizer):
    def make(key, host):
        app = serving.create_app(engine, tokenizer, model_name=MODEL, limits=LIMITS, api_key=key)
        return serving.make_server(app, host)

    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org", ""):
        with pytest.raises(EngineError, match="MEDKIT_API_KEY"):
            make(None, host)
        with pytest.raises(EngineError, match="MEDKIT_API_KEY"):
            make("", host)
        make("key", host)
    for host in ("127.0.0.1", "::1", "localhost"):
        make(None, host)


# --- crowds, leavers, the slow ---------------------------------------------------------------------------------------


def test_beyond_the_line_clients_are_sent_away_and_the_others_answered(engine, tokenizer, serve):
    _, text = alone(engine, tokenizer, tokenizer("A").input_ids, 2)
    with serve(engine, max_running=1, max_waiting=1) as server, ThreadPoolExecutor(2) as pool:
        engine.go.clear()
        client = client_of(server)
        first, second = (pool.submit(client.completions.create, **GOOD) for _ in range(2))
        wait_for(lambda: server.line.inside == 2 and engine.open == 1)
        assert "medkit_running 1.0\n" in (metrics := get(server, "/metrics")[1]) and "medkit_waiting 1.0\n" in metrics
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**GOOD)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        engine.go.set()
        assert [f.result(10).choices[0].text for f in (first, second)] == [text, text]
        assert client.completions.create(**GOOD).choices[0].text == text


def test_a_client_that_leaves_stops_the_engine(make_llama, tokenizer, serve):
    engine = ToyEngine(make_llama(seed=3, initializer_range=0.5), len(tokenizer), step_s=0.01)
    long = {"model": MODEL, "prompt": "A", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    with serve(engine, max_running=1) as server:
        stream = client_of(server).completions.create(stream=True, **long)
        next(iter(stream))
        stream.close()
        wait_for(lambda: not engine.open and not server.line.inside)
        assert engine.written < 100

        with pytest.raises(openai.APITimeoutError):
            client_of(server).with_options(timeout=0.3).completions.create(**long)
        wait_for(lambda: not engine.open and not server.line.inside)
        assert engine.written < 200

        engine.go.clear()  # someone is answered, someone waits and leaves: the engine never hears of him
        begun = engine.begun
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(client_of(server).completions.create, **GOOD)
            wait_for(lambda: engine.open == 1)
            with pytest.raises(openai.APITimeoutError):
                client_of(server).with_options(timeout=0.3).completions.create(**long)
            wait_for(lambda: server.line.inside == 1)
            engine.go.set()
            first.result(10)
        assert engine.begun == begun + 1
        assert 'route="/v1/completions",status="499"} 3.0' in get(server, "/metrics")[1]


def test_a_client_that_leaves_before_the_first_token_frees_its_place(engine, serve):
    stream = GOOD | {"max_tokens": 900, "stream": True, "extra_body": {"ignore_eos": True}}
    with serve(engine, max_running=1) as server, ThreadPoolExecutor(1) as pool:
        hurried = client_of(server).with_options(timeout=0.3)
        engine.go.clear()
        with pytest.raises(openai.APITimeoutError):  # the engine has begun with it
            hurried.completions.create(**stream)
        wait_for(lambda: not server.line.inside)
        assert engine.open == 1
        engine.go.set()
        wait_for(lambda: not engine.open and not server.line.running)
        assert engine.written <= 1

        engine.go.clear()
        first = pool.submit(client_of(server).completions.create, **GOOD)
        wait_for(lambda: engine.open == 1)
        with pytest.raises(openai.APITimeoutError):  # it is still in line
            hurried.completions.create(**stream)
        wait_for(lambda: server.line.inside == 1)
        engine.go.set()
        assert first.result(10).choices and engine.begun == 2
        assert 'route="/v1/completions",status="499"} 2.0' in get(server, "/metrics")[1]


def test_a_client_that_leaves_with_the_first_event_closes_the_source():
    """The response then never begins, and nobody would iterate the rest."""
    closed, gone = [], asyncio.Event()

    async def source():
        try:
            gone.set()
            yield "first"
        finally:
            closed.append(True)

    async def receive():
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.sleep(0)

    async def ask():
        kept = source()
        await serving_http.Events(kept)({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        assert closed  # at once, not when the garbage is collected

    asyncio.run(ask())


def test_an_error_before_the_first_token_has_its_status_in_a_stream_too(engine, serve):
    def status_of(server, **more):
        status, headers, answer = post(server, GOOD | {"stream": True} | more)
        assert headers["content-type"] == "application/json"
        return status, error_of(answer)["code"]

    with serve(RefusingEngine()) as server:
        assert status_of(server) == (400, "engine_error")
        assert 'route="/v1/completions",status="400"} 1.0' in get(server, "/metrics")[1]
    with serve(engine, request_timeout_s=0.2) as server:
        engine.go.clear()
        assert status_of(server) == (504, "timeout")
        engine.go.set()
    engine.closed = False
    with serve(engine, grace_s=0.2, max_running=1) as server, ThreadPoolExecutor(1) as pool:
        engine.go.clear()
        waiting = pool.submit(status_of, server)
        wait_for(lambda: server.line.inside == 1)
        server.should_exit = True
        assert waiting.result(10) == (503, "shutting_down")
        engine.go.set()


def test_an_answer_that_takes_too_long_is_ended(make_llama, tokenizer, serve):
    engine = ToyEngine(make_llama(seed=3, initializer_range=0.5), len(tokenizer), step_s=0.02)
    long = {"model": MODEL, "prompt": "A", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
    with serve(engine, request_timeout_s=0.3) as server:
        with pytest.raises(openai.InternalServerError, match=r"0\.3 s") as caught:
            client_of(server).completions.create(**long)
        assert caught.value.status_code == 504
        pieces = []
        with pytest.raises(openai.APIError, match=r"0\.3 s"):
            pieces.extend(client_of(server).completions.create(stream=True, **long))
        wait_for(lambda: not engine.open and not server.line.inside)
        assert engine.written < 100
        assert 'route="/v1/completions",status="504"} 2.0' in get(server, "/metrics")[1]


def test_a_slow_body_and_a_silent_connection_are_cut(engine, serve, monkeypatch):
    monkeypatch.setattr(serving_http, "SILENCE_S", 0.4)
    head = HEAD + b"content-length: 100\r\n"
    with serve(engine, body_timeout_s=0.3) as server:
        for sent, answer in ((head + b'\r\n{"model"', b"HTTP/1.1 408"), (head, b""), (b"", b"")):
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
                raw.sendall(sent)
                try:
                    assert raw.recv(1000).startswith(answer) and (answer or not raw.recv(1))
                except ConnectionResetError:
                    assert not answer
        wait_for(lambda: not server.server_state.connections and not server.line.inside)
        assert client_of(server).completions.create(**GOOD).choices


def test_a_slow_reader_holds_neither_the_engine_nor_memory(tokenizer, serve, monkeypatch):
    monkeypatch.setattr(serving_http, "SILENCE_S", 0.5)
    engine = CountingEngine()
    tokens, _ = alone(engine, tokenizer, tokenizer("A").input_ids, 1000, end=False)
    more = {"stream": True, "max_tokens": 1000, "ignore_eos": True, "return_token_ids": True}
    body = json.dumps(GOOD | more).encode()
    head = HEAD + b"content-length: %d\r\n\r\n"
    with serve(engine) as server:
        server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

        def ask(buffer):
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            raw.connect(("127.0.0.1", server.port))
            raw.sendall(head % len(body) + body)
            return raw

        with ask(4096) as never, ask(2**16) as slow:
            slow.settimeout(5)
            got = b""
            while b"[DONE]" not in got:
                part = slow.recv(8192)
                assert part
                got += part
                time.sleep(0.002)
            events = [json.loads(line[6:]) for line in got.split(b"\n") if line.startswith(b'data: {"id"')]
            assert [i for event in events for i in event["choices"][0]["token_ids"]] == tokens
            wait_for(lambda: not engine.open and not server.line.inside)
            never.settimeout(5)
            got = b""
            with suppress(ConnectionResetError):
                while part := never.recv(8192):
                    got += part
            assert b"[DONE]" not in got


@pytest.mark.parametrize("error", [RuntimeError, EngineError])
def test_an_engine_that_fails_ends_one_answer_and_logs_no_prompt(error, make_llama, tokenizer, serve, caplog):
    engine = BrokenEngine(make_llama(seed=3, initializer_range=0.5), len(tokenizer))
    engine.error = error
    with serve(engine) as server:
        for _ in range(LIMITS.max_running + 1):  # every thread survives
            with pytest.raises(openai.InternalServerError, match=r"failed|secret") as caught:
                client_of(server).completions.create(**GOOD)
            assert caught.value.status_code == 500 and caught.value.code == "engine_error"
            with pytest.raises(openai.APIError):
                list(client_of(server).completions.create(stream=True, **GOOD))
        assert get(server, "/health")[0] == 200
    assert "the engine failed" in caplog.text or error is EngineError
    assert "secret of [" not in caplog.text


# --- the cache -------------------------------------------------------------------------------------------------------


def cache_of(server):
    """Hits, misses and answers kept, as /metrics tells them."""
    lines = dict(line.rsplit(" ", 1) for line in get(server, "/metrics")[1].splitlines() if line[0] != "#")
    names = [f'medkit_cache_lookups_total{{result="{result}"}}' for result in ("hit", "miss")]
    return [float(lines.get(name, 0)) for name in (*names, "medkit_cache_answers")]


def asked(client, **body):
    """What the cache did, and the answer."""
    raw = client.completions.with_raw_response.create(**{**GOOD, "max_tokens": 8, **body})
    return raw.headers.get("x-medkit-cache"), raw.parse()


def test_the_same_request_gets_the_same_answer_without_the_engine(engine, tokenizer, serve):
    tokens, text = alone(engine, tokenizer, tokenizer("A").input_ids, 8)
    begun = engine.begun
    with serve(engine, cached_answers=8) as server:
        client = client_of(server)
        more = {"extra_body": {"return_token_ids": True}}
        found = [asked(client, **more) for _ in range(3)]
        assert [state for state, _ in found] == ["miss", "hit", "hit"]
        assert all((a.choices[0].text, a.choices[0].token_ids) == (text, tokens) for _, a in found)
        assert len({a.choices[0].finish_reason for _, a in found}) == len({a.id for _, a in found}) - 2 == 1
        assert len({str(a.usage) for _, a in found}) == 1

        raw = client.completions.with_raw_response.create(**GOOD | {"max_tokens": 8}, stream=True, **more)
        *pieces, last = [event.choices[0] for event in raw.parse()]
        assert raw.headers["x-medkit-cache"] == "hit" and last.finish_reason == found[0][1].choices[0].finish_reason
        assert "".join(piece.text for piece in [*pieces, last]) == text and [p.token_ids for p in pieces] == [
            [token] for token in tokens
        ]
        assert engine.begun == begun + 1 and cache_of(server) == [3, 1, 1]

        question = {"model": MODEL, "messages": chat(QUESTIONS[0])}  # a stream's answer is kept as well
        said = "".join(e.choices[0].delta.content for e in client.chat.completions.create(**question, stream=True))
        raw = client.chat.completions.with_raw_response.create(**question)
        assert raw.headers["x-medkit-cache"] == "hit" and raw.parse().choices[0].message.content == said
        assert engine.begun == begun + 2 and cache_of(server) == [4, 2, 2]


def test_another_request_is_another_answer(engine, tokenizer, serve):
    with serve(engine, cached_answers=99) as server:
        client = client_of(server)
        tokens = asked(client, extra_body={"ignore_eos": True, "return_token_ids": True})[1].choices[0].token_ids
        stop = tokenizer.decode(tokens[2:5])
        others = [{"prompt": "B"}, {"max_tokens": 9}, {"stop": stop}, {"extra_body": {"stop_token_ids": [tokens[3]]}}]
        for other in [{}, *others]:
            state, answer = asked(client, **other)
            again = asked(client, **other)
            assert (state, again[0]) == ("miss", "hit")
            assert again[1].choices[0].text == answer.choices[0].text
            assert again[1].choices[0].finish_reason == answer.choices[0].finish_reason
        assert stop not in asked(client, stop=stop)[1].choices[0].text
        assert asked(client, user="someone else", seed=3)[0] == "hit"  # what changes nothing


def test_the_cache_is_off_unless_asked_for_and_never_full(engine, serve):
    with serve(engine) as server:
        client, begun = client_of(server), engine.begun
        assert [asked(client)[0] for _ in range(2)] == [None, None] and engine.begun == begun + 2
        assert "medkit_cache" not in get(server, "/metrics")[1]
    engine.closed = False
    with serve(engine, cached_answers=2) as server:
        client = client_of(server)
        states = [asked(client, prompt=prompt)[0] for prompt in "ABABCABC"]
        assert states == ["miss", "miss", "hit", "hit", "miss", "miss", "miss", "miss"]  # the least recently used goes
        assert cache_of(server) == [2, 6, 2]


def test_answers_cut_off_are_not_kept(make_llama, tokenizer, serve):
    engine = ToyEngine(make_llama(seed=3, initializer_range=0.5), len(tokenizer), step_s=0.01)
    long = {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
    with serve(engine, cached_answers=9, request_timeout_s=1.0) as server:
        client = client_of(server)
        stream = client.completions.create(**{**GOOD, **long}, stream=True)
        next(iter(stream))
        stream.close()  # the client leaves
        wait_for(lambda: not server.line.inside)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).completions.create(**{**GOOD, **long})
        wait_for(lambda: not server.line.inside)
        with pytest.raises(openai.InternalServerError, match="1 s"):  # too slow
            client.completions.create(**{**GOOD, **long})
        assert cache_of(server) == [0, 3, 0]
    broken = BrokenEngine(engine.model, len(tokenizer))
    with serve(broken, cached_answers=9) as server:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError):
                client_of(server).completions.create(**GOOD)
        assert cache_of(server) == [0, 2, 0]


class ShortEngine(ToyEngine):
    """Ends before it should, without a word."""

    def stream(self, request):
        yield from islice(super().stream(request), request.max_new_tokens - 1)


def test_an_answer_that_an_engine_broke_off_is_not_kept(make_llama, tokenizer, serve):
    engine = ShortEngine(make_llama(seed=3, initializer_range=0.5), len(tokenizer))
    with serve(engine, cached_answers=9) as server:
        more = {"extra_body": {"ignore_eos": True}}
        assert [asked(client_of(server), **more)[0] for _ in range(2)] == ["miss", "miss"]
        assert cache_of(server) == [0, 2, 0]


def test_hits_and_misses_of_many_at_once(engine, tokenizer, serve):
    prompts = ["A", "B", "C", "D"]
    expected = {p: alone(engine, tokenizer, tokenizer(p).input_ids, 8)[1] for p in prompts}
    with serve(engine, cached_answers=3, max_waiting=40) as server, ThreadPoolExecutor(8) as pool:
        order = random.Random(0).choices(prompts, k=60)
        client = client_of(server)
        found = list(pool.map(lambda p: asked(client, prompt=p)[1].choices[0].text, order))
        assert found == [expected[p] for p in order]
        hits, misses, kept = cache_of(server)
        assert hits + misses == 60 and hits > 0 and kept == 3


@pytest.mark.parametrize(("arguments", "cached"), [([], False), (["--cache", "3"], True)])
def test_the_command_line_keeps_answers_if_told_to(arguments, cached, engine, tokenizer, monkeypatch):
    apps = []
    monkeypatch.setattr(variants, "load_engine", lambda *_: (engine, tokenizer, 64))
    monkeypatch.setattr(serving, "serve", lambda app, host, port: apps.append(app))
    done = CliRunner().invoke(command_line, ["serve", *arguments])
    assert done.exit_code == 0, done.output
    names = {family.name for family in apps[0].state.line.metrics.registry.collect()}
    assert {"medkit_cache_answers", "medkit_cache_lookups"} <= names if cached else "cache" not in str(names)


# --- the command line ------------------------------------------------------------------------------------------------


def errors_of_the_package():
    """Every class of medkit that is an error by name."""
    trees = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "medkit").glob("*.py")}
    names = [(module, node.name) for module, tree in trees.items() for node in tree.body
             if isinstance(node, ast.ClassDef) and node.name.endswith("Error")]  # fmt: skip
    return [getattr(importlib.import_module(f"medkit.{module}"), name) for module, name in names]


def main(monkeypatch, capsys, *arguments):
    """Exit code and errors of `python -m medkit …`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["medkit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        __main__.main()
    return stopped.value.code, capsys.readouterr().err


def test_every_error_of_the_package_ends_the_command_in_a_sentence(monkeypatch, capsys):
    found = errors_of_the_package()
    assert len(found) > 20
    for kind in found:

        def fail(*_, kind=kind):
            raise kind.__new__(kind, "what is wrong; the cure")

        monkeypatch.setattr(variants, "load_engine", fail)
        assert main(monkeypatch, capsys, "serve") == (1, "medkit: what is wrong; the cure\n"), kind


def test_a_device_that_is_not_there_ends_the_command_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(variants, "load_engine", lambda *_: models.pick_device("cuda"))
    code, said = main(monkeypatch, capsys, "serve", "--variant", "lora")
    assert code == 1 and said.startswith("medkit: ") and said.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(variants, "load_engine", lambda *_: [].pop())
    monkeypatch.setattr(sys, "argv", ["medkit", "serve"])
    with pytest.raises(IndexError):
        __main__.main()


# --- the end ---------------------------------------------------------------------------------------------------------


def test_running_answers_end_before_the_server_does(make_llama, tokenizer, serve):
    engine = ToyEngine(make_llama(seed=3, initializer_range=0.5), len(tokenizer), step_s=0.01)
    _, text = alone(engine, tokenizer, tokenizer("A").input_ids, 60, end=False)
    with serve(engine) as server:
        asked = GOOD | {"max_tokens": 60, "extra_body": {"ignore_eos": True}}
        stream = iter(client_of(server).completions.create(stream=True, **asked))
        said = next(stream).choices[0].text
        server.should_exit = True
        wait_for(lambda: not server.servers[0].is_serving())
        with pytest.raises(openai.APIConnectionError):
            client_of(server).models.list()
        assert said + "".join(event.choices[0].text for event in stream) == text
        server.thread.join(10)
        assert engine.closed


def test_answers_that_outlast_the_grace_time_end_in_an_error(make_llama, tokenizer, serve):
    engine = ToyEngine(make_llama(seed=3, initializer_range=0.5), len(tokenizer), step_s=0.02)
    asked = GOOD | {"max_tokens": 900, "extra_body": {"ignore_eos": True}}
    with serve(engine, grace_s=0.3, max_running=2) as server, ThreadPoolExecutor(2) as pool:
        stream = iter(client_of(server).completions.create(stream=True, **asked))
        next(stream)
        whole, waiting = (pool.submit(client_of(server).completions.create, **asked) for _ in range(2))
        wait_for(lambda: server.line.inside == 3)
        server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        for other in (whole, waiting):
            with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
                other.result(10)
            assert caught.value.status_code == 503
        server.thread.join(10)
        assert engine.closed


SCRIPT = """
import sys, time
from transformers import AutoTokenizer
from medkit import serving

class Counting:
    name = "counting"
    def stream(self, request):
        for token in range(40, 40 + request.max_new_tokens):
            time.sleep(0.05)
            yield token
    def close(self):
        print("closed", flush=True)

limits = serving.Limits(context_tokens=100)
serving.serve(serving.create_app(Counting(), AutoTokenizer.from_pretrained(sys.argv[1]), model_name="toy",
                                 limits=limits), port=int(sys.argv[2]))
"""


def test_sigterm_ends_the_process_in_order(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

        def answers():
            try:
                return client.models.list()
            except openai.APIConnectionError:
                assert process.poll() is None, process.communicate()
                return None

        wait_for(answers, 60)
        stream = iter(client.completions.create(**GOOD | {"max_tokens": 10}, stream=True))
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert [event.choices[0].finish_reason for event in stream][-1] == "length"
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 0 and out == "closed\n"
    finally:
        process.kill()
