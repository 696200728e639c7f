"""The remote engine against a real HTTP server with a toy model: one that speaks as vLLM does, and lesser ones."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from medkit.inference.server_engine import RemoteEngine
from medkit.modeling.engine import EngineError, Request
from medkit.modeling.option_scoring import Item, score_options

MODEL, KEY = "toy", "secret"
PROMPTS = [[5, 9, 17, 33], [40, 41], [7] * 30]
LENGTH = 12
EXTRAS = {"return_token_ids", "stop_token_ids", "ignore_eos"}


class Toy:
    """A model and its server. It writes tokens whose text is read back as the same token, so text mode can be exact."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.eos = model, tokenizer, tokenizer.eos_token_id
        alone = [i for i in range(3, len(tokenizer)) if self.read(tokenizer.decode([i])) == [i]]
        self.barred = torch.ones(model.config.vocab_size, dtype=torch.bool).index_fill(0, torch.tensor(alone), False)
        self.steps = self.at_once = self.most_at_once = 0
        self.bodies, self.lock = [], threading.Lock()

    def read(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def write(self, prompt_ids, length, ends=()):
        ids = list(prompt_ids)
        for _ in range(length):
            logits = self.model(torch.tensor([ids])).logits[0, -1].masked_fill(self.barred, -torch.inf)
            ids.append(int(logits.argmax()))
            self.steps += 1
            yield ids[-1]
            if ids[-1] in ends:
                return

    @torch.inference_mode()
    def echo(self, ids):
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return [None, *logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), -0.5]


def make_app(toy, *, extras=True, ids=True, listed=True, silent_s=0.0, breaks=None, busy=0):
    """extras: takes token ids and vLLM's fields; ids: returns token ids; breaks: how it stops after three tokens.

    busy: how many requests it sends away first.
    """
    away = iter(range(busy))

    def refuse(status, message):
        return JSONResponse({"error": {"message": message, "type": "x"}}, status_code=status)

    async def complete(request):
        if request.headers["authorization"] != f"Bearer {KEY}":
            return refuse(401, "bad key")
        body = await request.json()
        toy.bodies.append(body)
        if next(away, None) is not None:
            return JSONResponse({"error": {"message": "too busy"}}, status_code=429, headers={"retry-after": "0.2"})
        if not extras and (not isinstance(body["prompt"], str) or EXTRAS & set(body)):
            return refuse(422, "extra fields")
        prompt = toy.read(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]
        if len(prompt) > 900:
            return refuse(400, "the context holds 900 tokens")
        await asyncio.sleep(silent_s)
        if body.get("echo"):
            logprobs = {"token_logprobs": toy.echo(prompt)} if ids else None
            choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": logprobs}
            return JSONResponse({"choices": [choice]})
        ends = set(body.get("stop_token_ids", ())) | (set() if body.get("ignore_eos") else {toy.eos})

        def events():
            with toy.lock:
                toy.at_once += 1
                toy.most_at_once = max(toy.most_at_once, toy.at_once)
            token = None
            for number, token in enumerate(toy.write(prompt, body["max_tokens"], ends)):
                if number == 3 and breaks == "rudely":
                    raise RuntimeError("out of order")
                if number == 3 and breaks == "quietly":
                    return
                choice = {"index": 0, "text": toy.tokenizer.decode([token]), "finish_reason": None}
                yield event(choice | ({"token_ids": [token]} if ids and body.get("return_token_ids") else {}))
            yield event({"index": 0, "text": "", "finish_reason": "stop" if token in ends else "length"})
            yield "data: [DONE]\n\n"
            with toy.lock:
                toy.at_once -= 1

        def event(choice):
            return f"data: {json.dumps({'id': 'x', 'object': 'text_completion', 'choices': [choice]})}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def models(request):
        if request.headers["authorization"] != f"Bearer {KEY}":
            return refuse(401, "bad key")
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}, {"id": "other"}]})

    routes = [Route("/v1/completions", complete, methods=["POST"])]
    return Starlette(routes=routes + ([Route("/v1/models", models)] if listed else []))


@contextmanager
def running(app):
    with socket.create_server(("127.0.0.1", 0)) as port:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def toy(make_llama, tokenizer):
    return Toy(make_llama(layers=1), tokenizer)


@pytest.fixture
def connect(toy, tokenizer):
    """connect(**of the server): an engine that speaks to a server made so; `engine` changes the engine's arguments."""
    open_now = []

    def make(engine=None, **server):
        context = running(make_app(toy, **server))
        url = context.__enter__()
        open_now.append(context)
        settings = {"model": MODEL, "tokenizer": tokenizer, "api_key": KEY, "timeout_s": 20.0, **(engine or {})}
        made = RemoteEngine(url, **settings)
        open_now.append(made)
        return made

    yield make
    for one in reversed(open_now):
        one.close() if isinstance(one, RemoteEngine) else one.__exit__(None, None, None)


@pytest.fixture
def answers(toy):
    return [list(toy.write(prompt, LENGTH)) for prompt in PROMPTS]


KINDS = [{}, {"ids": False}, {"extras": False}, {"extras": False, "ids": False}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_answers_are_the_model_s_whatever_the_server_understands(connect, answers, kind):
    engine = connect(**kind)
    for _ in range(2):
        found = engine.generate([Request(prompt, LENGTH) for prompt in PROMPTS])
        assert [g.token_ids for g in found] == answers
        for generation in found:
            assert len(generation.token_times_s) == LENGTH
            assert 0 < generation.token_times_s[0] <= generation.token_times_s[-1]
    assert [list(engine.stream(Request(prompt, LENGTH))) for prompt in PROMPTS] == answers


def test_a_server_that_takes_no_ids_is_asked_for_them_only_once(connect, toy):
    engine = connect(extras=False)
    for _ in range(3):
        list(engine.stream(Request(PROMPTS[0], 1)))
    assert [isinstance(body["prompt"], str) for body in toy.bodies] == [False, True, True, True]


@pytest.mark.parametrize("kind", [{}, {"ids": False}], ids=str)
def test_an_answer_ends_with_its_end_token(connect, toy, answers, kind):
    end = answers[0][5]
    expected = answers[0][: answers[0].index(end) + 1]
    engine = connect(**kind)
    assert engine.generate([Request(PROMPTS[0], LENGTH, end_ids=(end,))])[0].token_ids == expected
    assert toy.bodies[-1]["stop_token_ids"] == [end] and toy.bodies[-1]["ignore_eos"]


def test_the_end_token_that_text_does_not_show_is_put_back(connect, toy, answers, tokenizer):
    """A plain server ends at the model's own end token, whose text it leaves out."""
    toy.eos = answers[0][5]
    said = answers[0][: answers[0].index(toy.eos)]
    decode = tokenizer.decode
    toy.tokenizer = type("Quiet", (), {"decode": lambda self, ids: "" if ids == [toy.eos] else decode(ids)})()
    toy.read = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    engine = connect(extras=False, ids=False)
    assert list(engine.stream(Request(PROMPTS[0], LENGTH, end_ids=(tokenizer.eos_token_id,)))) == [
        *said,
        tokenizer.eos_token_id,
    ]


def test_requests_are_sent_together_and_not_before_they_come(connect, toy):
    engine = connect()
    late, early, other = engine.generate(
        [Request(PROMPTS[0], 3, arrival_s=0.4), Request(PROMPTS[1], 60), Request(PROMPTS[2], 60)]
    )
    assert late.token_times_s[0] > 0.4
    assert early.token_times_s[0] < other.token_times_s[-1] and other.token_times_s[0] < early.token_times_s[-1]
    assert toy.most_at_once >= 2
    assert engine.generate([]) == []


def test_many_threads_stream_at_once(connect, answers):
    engine = connect()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: list(engine.stream(Request(PROMPTS[n % 3], LENGTH))), range(16)))
    assert found == [answers[n % 3] for n in range(16)]


def test_a_closed_stream_hangs_up(connect, toy, answers):
    stream = connect().stream(Request(PROMPTS[0], 850))
    toy.steps = 0
    assert list(islice(stream, 3)) == answers[0][:3]
    stream.close()
    time.sleep(0.5)
    stopped_at = toy.steps
    time.sleep(0.3)
    assert toy.steps == stopped_at < 800


def test_scores_are_the_model_s(connect, toy):
    items = [Item(PROMPTS[0], [[7, 9, 30], [250]]), Item(PROMPTS[1], [[5, 6], [8], [9]])]
    found = connect().score(items)
    for ours, theirs in zip(found, score_options(toy.model, items, 1024, pad_token_id=0), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_a_server_without_log_probabilities_cannot_score(connect):
    with pytest.raises(EngineError, match="echoes no log-probabilities"):
        connect(ids=False).score([Item(PROMPTS[0], [[7]])])


def test_no_server_there(tokenizer):
    with socket.create_server(("127.0.0.1", 0)) as port:
        url = f"http://127.0.0.1:{port.getsockname()[1]}/v1"
    with pytest.raises(EngineError, match=r"/v1 cannot be reached, or hung up \(.*refused.*\): is the server running"):
        RemoteEngine(url, MODEL, tokenizer)


def test_a_wrong_key(connect):
    with pytest.raises(EngineError, match=r"refuses the API key \(401\)"):
        connect(engine={"api_key": None})


def test_a_model_that_is_not_served_is_answered_with_those_that_are(connect):
    with pytest.raises(EngineError, match="no model 'mine': it serves toy, other"):
        connect(engine={"model": "mine"})


def test_a_server_that_lists_nothing_is_taken_at_its_word(connect, answers):
    assert list(connect(listed=False).stream(Request(PROMPTS[0], LENGTH))) == answers[0]


def test_a_server_without_completions(tokenizer):
    with running(Starlette()) as url, pytest.raises(EngineError, match=r"no completions of 'toy' \(404\)"):
        list(RemoteEngine(url, MODEL, tokenizer).stream(Request(PROMPTS[0], 2)))


def test_silence_is_cut_short(connect):
    engine = connect(engine={"timeout_s": 0.3}, silent_s=2.0)
    with pytest.raises(EngineError, match=r"silent for 0\.3 s: raise timeout_s"):
        engine.generate([Request(PROMPTS[0], 2)])


def test_a_busy_server_is_asked_again_when_it_says(connect, answers):
    engine = connect(busy=5)
    began = time.perf_counter()
    found = engine.generate([Request(prompt, LENGTH) for prompt in PROMPTS])
    assert [g.token_ids for g in found] == answers and time.perf_counter() - began > 0.2


def test_a_server_that_stays_busy_is_given_up(connect):
    engine = connect(busy=1000, engine={"timeout_s": 1.0})
    with pytest.raises(EngineError, match="429: too busy"):
        list(engine.stream(Request(PROMPTS[0], 3)))


def test_the_server_s_own_reason_is_told_without_a_tokenizer_too(connect):
    engine = connect(engine={"tokenizer": None})
    with pytest.raises(EngineError, match=r"1000 token ids \(the context holds 900 tokens\)"):
        list(engine.stream(Request([5] * 1000, 3)))


def test_the_server_s_own_reason_is_told(connect):
    with pytest.raises(EngineError, match="400: the context holds 900 tokens"):
        next(connect().stream(Request([5] * 1000, 2)))


@pytest.mark.parametrize(("breaks", "sentence"), [("rudely", "hung up"), ("quietly", "broke off after 3 tokens")])
def test_an_answer_that_breaks_off_is_no_answer(connect, breaks, sentence):
    with pytest.raises(EngineError, match=sentence):
        list(connect(breaks=breaks).stream(Request(PROMPTS[0], LENGTH)))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [({"ids": False}, "returns no token ids"), ({"extras": False}, r"refuses a prompt of 4 token ids \(extra")],
)
def test_without_a_tokenizer_token_ids_are_needed(connect, answers, kind, sentence):
    assert list(connect(engine={"tokenizer": None}).stream(Request(PROMPTS[0], LENGTH))) == answers[0]
    with pytest.raises(EngineError, match=f"{sentence}.*give this engine a tokenizer"):
        list(connect(engine={"tokenizer": None}, **kind).stream(Request(PROMPTS[0], LENGTH)))
