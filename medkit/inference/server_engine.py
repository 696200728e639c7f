"""An engine behind an OpenAI-compatible server, and llama.cpp's own server on a GGUF file.

Prompts are sent as token ids, so no server puts a chat template of its own around them. llama.cpp comes in the wheel
`xllamacpp`; `vllm serve` and others are reached by their URL.
"""

import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import openai

from medkit.inference import llama_process
from medkit.modeling.engine import EngineError, Generation, Request
from medkit.quantization.gguf_export import check_manifest
from medkit.stage import count_cores

# in a request to llama.cpp's server; a request that says nothing would go on from what an adapter has read before it
ADAPTER_ON, ADAPTER_OFF = ({"lora": [{"id": 0, "scale": scale}]} for scale in (1.0, 0.0))
AT_ONCE = 256  # requests in flight; the server decides how many of them it works on
ANSWER_S = 1800.0  # with one slot and a large file on a CPU the last of them waits for all others
# vLLM's names, then llama.cpp's: return token ids
RETURN_IDS = {"return_token_ids": True, "return_tokens": True, "verbose": True}

# drawn from the whole vocabulary, as in `TorchEngine`: servers have defaults of their own
WHOLE = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


class ServerAddress(NamedTuple):
    url: str  # Ends in /v1
    api_key: str


@contextmanager
def llama_server(
    path: Path,
    slots: int = 1,
    context_tokens: int = 4096,
    threads: int | None = None,
    adapter: Path | None = None,
    options: Mapping[str, object] | None = None,
) -> Iterator[ServerAddress]:
    """llama.cpp's server on a GGUF file, on a free port of this machine; it ends with the block.

    `slots` requests are answered at once, each of at most `context_tokens` tokens, prompt and answer together; memory
    for all of them is taken at the start. `threads` None takes all processors. With the file `adapter`
    (`gguf_export.export_adapter`) every request must say ADAPTER_ON or ADAPTER_OFF. `options` are more of llama.cpp's
    own parameters, by their names in `xllamacpp.CommonParams`, such as {"n_ubatch": 128}. The key is random: on a
    shared machine nobody else may use the server.

    Raises EngineError if llama.cpp cannot open the file, and the error of `check_manifest` if a file is not the one
    that its manifest describes.
    """
    for file in filter(None, (path, adapter)):
        check_manifest(file)
    address_key = secrets.token_urlsafe(16)
    settings = {"path": str(path), "slots": slots, "context_tokens": context_tokens}
    settings |= {"threads": threads or count_cores(), "api_key": address_key}
    settings |= {"adapter": adapter and str(adapter), "options": dict(options or {})}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, llama_process.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            process.stdin.write(json.dumps(settings) + "\n")
            process.stdin.flush()
            address = process.stdout.readline().strip()
            if not address:
                raise EngineError(f"llama.cpp cannot serve {path}: {_last_line(log)}; export the file again")
            try:
                yield ServerAddress(f"{address}/v1", address_key)
            except EngineError as error:
                if process.poll() is None:
                    raise
                reason = f"{_last_line(log)}, exit code {process.returncode}"
                raise EngineError(f"llama.cpp ended while it served {path} ({reason}): is memory enough?") from error
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    return (log.read().strip().splitlines() or ["no message"])[-1]


class ServerEngine:
    """An engine (`modeling.engine.Engine`) over the model `model` of the server at `url`, which ends in /v1.

    `model` None takes the first one listed. Greedy, unless `temperature` is above 0. The server must return token ids,
    as llama.cpp and vLLM do; where no end token is wanted, vLLM writes on after one and llama.cpp writes none. Raises
    EngineError if it cannot be reached, refuses the key, or has no such model.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None, temperature: float = 0.0):
        self._url, self._temperature = url, temperature
        timeout = openai.Timeout(ANSWER_S, connect=10.0)
        self._client = openai.OpenAI(base_url=url, api_key=api_key or "none", timeout=timeout, max_retries=2)
        with self._explain():
            listed = self._client.with_options(timeout=10.0, max_retries=0).models.list()
            owners = {str(model.id): str(model.owned_by) for model in listed}
        if not owners or model not in (None, *owners):
            raise EngineError(f"{url} has no model {model!r}: it has {', '.join(owners) or 'none'}")
        self._model = model or next(iter(owners))
        self.name = "llama.cpp" if owners[self._model] == "llamacpp" else owners[self._model]

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """The answers, in the order of the requests, which are all sent at once. Times include the network.

        llama.cpp's streams leave out token ids, so it is asked without a stream and tells its times itself: first and
        last token are measured, the tokens between are spread evenly.
        """
        if not requests:
            return []
        ask = self._ask_llama_cpp if self.name == "llama.cpp" else self._ask_stream
        began = time.perf_counter()
        with ThreadPoolExecutor(min(AT_ONCE, len(requests))) as pool:
            return list(pool.map(lambda request: self._checked(request, ask, began), requests))

    def close(self) -> None:
        self._client.close()

    def _create(self, request: Request, **settings):
        extra = {"ignore_eos": not request.end_ids, "stop_token_ids": list(request.end_ids)} | RETURN_IDS | WHOLE
        return self._client.completions.create(
            model=self._model, prompt=list(request.prompt_ids), max_tokens=request.max_new_tokens,
            temperature=self._temperature, extra_body=extra, **settings,
        )  # fmt: skip

    def _ask_llama_cpp(self, request: Request, began: float) -> Generation:
        answer = self._create(request)
        done_s, times_s = time.perf_counter() - began, answer.model_extra["timings"]
        token_ids = answer.model_extra["__verbose"]["tokens"]
        if answer.choices[0].finish_reason == "stop" and not set(token_ids[-1:]) & set(request.end_ids):
            token_ids[-1:] = request.end_ids[:1]  # it ends at every end token of the file, such as <|endoftext|>
        first_s = done_s - times_s["predicted_ms"] / 1000
        token_times_s = np.linspace(first_s, done_s, len(token_ids)).tolist()
        return Generation(token_ids, token_times_s, first_s - times_s["prompt_ms"] / 1000)

    def _ask_stream(self, request: Request, began: float) -> Generation:
        generation = Generation()
        with self._create(request, stream=True) as chunks:
            for choice in (choice for chunk in chunks for choice in chunk.choices):
                token_ids = (choice.model_extra or {}).get("token_ids")
                if token_ids is None and choice.text:
                    raise EngineError(f"{self._url} returns no token ids: serve the model with vLLM or llama.cpp")
                token_ids = list(token_ids or [])
                last = [*generation.token_ids, *token_ids][-1:]
                if choice.finish_reason == "stop" and request.end_ids and not set(last) & set(request.end_ids):
                    token_ids.append(request.end_ids[0])  # an end token has no text
                generation.token_ids += token_ids
                generation.token_times_s += [time.perf_counter() - began] * len(token_ids)
        return generation

    def _checked(self, request: Request, ask: Callable[[Request, float], Generation], began: float) -> Generation:
        """The answer up to its first end token. Raises EngineError for one that is cut off, or none."""
        with self._explain():
            answer = ask(request, began)
            if not all(type(token) is int and 0 <= token < 2**31 for token in answer.token_ids):
                raise ValueError("token ids are no whole numbers")
        ends = [place for place, token in enumerate(answer.token_ids) if token in request.end_ids]
        length = min([*(place + 1 for place in ends[:1]), request.max_new_tokens])
        if len(answer.token_ids) < length:
            raise EngineError(
                f"{self._url} wrote {len(answer.token_ids)} of {length} tokens: its context is full, or it broke off; "
                f"shorten the prompt ({len(request.prompt_ids)} tokens) or give the server more context"
            )
        return Generation(answer.token_ids[:length], answer.token_times_s[:length], answer.begun_s)

    @contextmanager
    def _explain(self) -> Iterator[None]:
        """Turn the client's errors into one sentence."""
        try:
            yield
        except openai.APIConnectionError as error:
            # an error of the protocol may hold the header with the key; its class is of the library that openai brings
            kinds = {kind.__name__ for kind in type(error.__cause__).__mro__}
            reason = type(error.__cause__).__name__ if "LocalProtocolError" in kinds else error.__cause__ or error
            raise EngineError(f"{self._url} cannot be reached ({reason}): start the server") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EngineError(f"{self._url} refuses the API key ({error.status_code}): give the right one") from error
        except openai.APIStatusError as error:
            message = error.body.get("message") if isinstance(error.body, dict) else None
            raise EngineError(f"{self._url} answered {error.status_code}: {message or error.message}") from error
        except openai.APIError as error:
            raise EngineError(f"{self._url} failed: {error.message}") from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise EngineError(f"{self._url} does not answer as OpenAI's servers do ({error!r}): use another") from error


@contextmanager
def llama_engine(path: Path, *args, **settings) -> Iterator[ServerEngine]:
    """An engine over `llama_server` with these settings; engine and server end with the block."""
    with llama_server(path, *args, **settings) as (url, key), closing(ServerEngine(url, api_key=key)) as engine:
        yield engine
