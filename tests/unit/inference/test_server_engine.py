"""The server engine, against llama.cpp's own server on a toy file and against small servers that speak as others do."""

import asyncio
import json
from random import Random

import pytest
import torch
import toys
from app_thread import running_completions
from starlette.responses import JSONResponse, StreamingResponse

from medkit.inference import server_engine
from medkit.inference.server_engine import ServerEngine, llama_engine, llama_server
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling.engine import EngineError, Request
from medkit.quantization import gguf_export
from medkit.stage import MedkitError

VOCAB, END = 300, 2
PROMPTS = [Random(length).choices(range(3, VOCAB), k=length) for length in (1, 7, 33, 100)]
LENGTHS = [24, 3, 1, 17]


# --- llama.cpp -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(edge_file):
    with llama_server(edge_file, slots=2, context_tokens=256, threads=1) as (url, api_key):
        engine = ServerEngine(url, api_key=api_key)
        yield engine
        engine.close()


def in_transformers(path, requests):
    """What transformers writes from the same file."""
    return TorchEngine(toys.read_gguf(path), 0, scheduler="static", batch_tokens=1024).generate(requests)


def test_llama_cpp_writes_the_tokens_of_transformers(edge_file):
    """Random weights write broken characters too: a server that sends text loses such tokens."""
    requests = [Request(prompt, length) for prompt, length in zip(PROMPTS, LENGTHS, strict=True)]
    with llama_server(edge_file, slots=3, context_tokens=256, threads=1) as (url, api_key):
        answers = ServerEngine(url, api_key=api_key).generate(requests)
    expected = in_transformers(edge_file, requests)
    assert not {0, END} & {token for answer in expected for token in answer.token_ids}  # llama.cpp writes no end token
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    for answer in answers:
        assert len(answer.token_times_s) == len(answer.token_ids)
        assert answer.token_times_s == sorted(answer.token_times_s)
        assert 0 <= answer.begun_s < answer.token_times_s[0]


def test_an_answer_ends_with_the_first_end_token(engine, edge_file):
    """With the file's own end token, and with another one."""
    prompts = [Random(seed).choices(range(3, VOCAB), k=9) for seed in range(300)]
    answers = in_transformers(edge_file, [Request(prompt, 6) for prompt in prompts])
    texts = [(p, a.token_ids) for p, a in zip(prompts, answers, strict=True) if 0 not in a.token_ids]
    prompt, text = next(pair for pair in texts if END in pair[1][1:-1])
    other_prompt, other = next(pair for pair in texts if len(set(pair[1])) > 3 and END not in pair[1])
    requests = [Request(prompt, 6, (END,)), Request(other_prompt, 6, (other[2], END))]
    expected = [text[: text.index(END) + 1], other[: other.index(other[2]) + 1]]
    assert [answer.token_ids for answer in engine.generate(requests)] == expected


def test_an_end_token_that_the_request_does_not_name_ends_the_answer(make_llama, tokenizer, tmp_path):
    """llama.cpp ends at `<|endoftext|>` too, token 0, whatever the file calls its end token."""
    model, prompt = make_llama(), PROMPTS[1]
    (answer,) = TorchEngine(model, 0, scheduler="static", batch_tokens=1024).generate([Request(prompt, 6)])
    first, second, third = answer.token_ids[:3]
    assert third not in (first, second)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[0] = 1.01 * head[third]
    file = gguf_export.export_gguf(model, tokenizer, tmp_path / "student.gguf", "F16")
    with llama_engine(file, context_tokens=256, threads=1) as engine:
        (ended,) = engine.generate([Request(prompt, 6, (END,))])
    assert ended.token_ids == [first, second, END] and len(ended.token_times_s) == 3


def test_an_answer_that_the_context_cuts_off_is_an_error(engine):
    with pytest.raises(EngineError, match="exceeds the available context size"):
        engine.generate([Request([5] * 300, 4)])
    with pytest.raises(EngineError, match=r"wrote \d+ of 40 tokens: its context is full"):
        engine.generate([Request([5] * 240, 40)])


def test_the_server_is_gone_after_the_block_and_its_key_is_secret(edge_file):
    with llama_server(edge_file, threads=1) as (url, api_key):
        assert ServerEngine(url, api_key=api_key).name == "llama.cpp"
        with pytest.raises(EngineError, match="refuses the API key"):
            ServerEngine(url, api_key="guessed").generate([Request([5], 1)])
        with pytest.raises(EngineError, match="has no model 'other': it has edge"):
            ServerEngine(url, "other", api_key)
    with pytest.raises(EngineError, match="cannot be reached"):
        ServerEngine(url, api_key=api_key)


def test_a_file_that_cannot_be_served_is_an_error(edge_file, tmp_path, monkeypatch):
    broken = tmp_path / edge_file.name
    broken.write_bytes(edge_file.read_bytes()[:5000])
    with pytest.raises(MedkitError), llama_server(broken):
        pass
    monkeypatch.setattr(server_engine, "check_manifest", lambda path: {})
    with pytest.raises(EngineError, match=r"llama\.cpp cannot serve"), llama_server(broken):
        pass


# --- other servers ---------------------------------------------------------------------------------------------------


def chunk(text="", token_ids=None, reason=None):
    return {"index": 0, "text": text, "finish_reason": reason, **({"token_ids": token_ids} if token_ids else {})}


def test_vllm_gets_token_ids_and_gives_token_ids_as_they_come():
    bodies = []

    def answer(body):
        bodies.append(body)
        return [chunk("a", [7]), chunk("bc", [8, END]), chunk(reason="stop")]

    with running_completions(answer) as url:
        (found,) = ServerEngine(url).generate([Request([5, 6], 9, (END,))])
    assert found.token_ids == [7, 8, END] and found.token_times_s == sorted(found.token_times_s)
    (body,) = bodies
    assert body["prompt"] == [5, 6] and body["temperature"] == 0 and body["max_tokens"] == 9
    assert body["stop_token_ids"] == [END] and body["ignore_eos"] is False and body["return_token_ids"] is True


def test_a_server_without_token_ids_is_refused():
    with (
        running_completions(lambda body: [chunk("Vitamin C."), chunk(reason="stop")], owner="someone") as url,
        pytest.raises(EngineError, match="returns no token ids: serve the model with vLLM"),
    ):
        ServerEngine(url).generate([Request([5], 50, (END,))])


def test_a_busy_server_is_asked_again_and_an_error_is_told():
    refusals = iter([429, 503])

    def answer(body):
        status = next(refusals, None)
        if body["prompt"] == [9]:
            return JSONResponse({"error": {"message": "no such token"}}, status_code=400)
        if status is None:
            return [chunk("a", [7], "length")]
        return JSONResponse({"error": {"message": "busy"}}, status_code=status, headers={"retry-after-ms": "1"})

    with running_completions(answer) as url:
        engine = ServerEngine(url)
        assert engine.generate([Request([5], 1)])[0].token_ids == [7]
        with pytest.raises(EngineError, match="answered 400: no such token"):
            engine.generate([Request([9], 1)])
        with pytest.raises(EngineError, match=r"wrote 1 of 3 tokens"):
            engine.generate([Request([5], 3)])


def test_a_slow_server_and_half_a_stream_are_one_sentence():
    """The text of the answer is lost; what was written before stays in the file of its part (`collect_answers`)."""

    async def cut_off():
        yield f"data: {json.dumps({'choices': [chunk('a', [7])]})}\n\n"
        raise ConnectionError("the server died")

    async def never():
        await asyncio.sleep(5)
        yield ""

    for events, reason in {cut_off: "closed connection", never: "timed out"}.items():
        stream = StreamingResponse(events(), media_type="text/event-stream")
        with running_completions(lambda body, stream=stream: stream) as url:
            engine = ServerEngine(url)
            engine._client = engine._client.with_options(timeout=0.5, max_retries=0)
            with pytest.raises(EngineError, match=f"cannot be reached .*{reason}"):
                engine.generate([Request([5], 3, (END,))])
