"""An engine behind an OpenAI-compatible server: `vllm serve` on a GPU, llama.cpp's server, or `medkit serve`.

Plain completions only: the prompt is finished token ids, so no server puts a chat template of its own around it. What
is measured here includes the network. This module starts no server.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import openai

from medkit.modeling.engine import EngineError, Generation, PromptLogprobs, Request

if TYPE_CHECKING:
    from medkit.modeling.option_scoring import Item

GREETING_S = 10.0  # a server that is there says at once what it serves; nobody waits minutes to hear of a wrong address
AT_ONCE = 256  # requests in flight; the server decides how many of them it works on


class RemoteEngine:
    """The model `model` of the server at `base_url` (which ends in /v1). Safe to use from many threads.

    The server is asked, as vLLM understands it, to take the prompt as token ids, to return the answer's token ids, and
    to write on past the end token where no end is wanted. One that knows none of this is asked in plain text: the ids
    are then `tokenizer`'s reading of each piece of text, which may differ from what the model wrote, and an answer may
    end early. `tokenizer` None refuses such servers. A server too busy (429) is asked again when it says, for
    `timeout_s`; a silence as long is an error, and whatever else failed is not repeated. Greedy, unless a `temperature`
    above 0 has the server draw its tokens.

    Raises EngineError if the server cannot be reached, refuses `api_key`, or serves no such model.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        tokenizer,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        temperature: float = 0.0,
    ):
        self.name = "remote"
        self._decoding = {"temperature": temperature} | ({"top_p": 1.0} if temperature else {})
        self._url, self._model, self._tokenizer, self._timeout_s = base_url, model, tokenizer, timeout_s
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key or "none", timeout=timeout_s, max_retries=0)
        self._greeting_s = min(timeout_s, GREETING_S)
        self._takes_ids = True
        try:
            served = self._served()
            if served and model not in served:
                raise EngineError(f"{base_url} serves no model {model!r}: it serves {', '.join(served)}")
        except EngineError:
            self.close()
            raise

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """See `engines.Engine`; each request is sent when it arrives, and a token's time is when it was received."""
        began = time.perf_counter()

        def answer(request: Request) -> Generation:
            time.sleep(max(0.0, began + request.arrival_s - time.perf_counter()))
            found = Generation()
            for token in self._stream(request):
                found.token_ids.append(token)
                found.token_times_s.append(time.perf_counter() - began)
            return found

        with ThreadPoolExecutor(min(AT_ONCE, max(1, len(requests)))) as pool:
            order = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)  # none waits behind a later one
            sent = {i: pool.submit(answer, requests[i]) for i in order}
            return [sent[i].result() for i in range(len(requests))]

    def stream(self, request: Request) -> Iterator[int]:
        """See `engines.Engine`. The request is sent when the first token is asked for; closing hangs up."""
        return self._stream(request)

    def score(self, items: Sequence[Item]) -> list[list[float]]:
        """See `engines.Engine`. Needs a server that echoes the prompt with its log-probabilities, as vLLM does."""

        def score(pair: tuple[list[int], list[int]]) -> float:
            prompt_ids, answer_ids = pair
            size = len(prompt_ids) + len(answer_ids)
            asked = {"prompt": [*prompt_ids, *answer_ids], "echo": True, "logprobs": 1, "max_tokens": 1}
            with self._explained():
                choice = self._ask(model=self._model, temperature=0, **asked).choices[0]
            found = choice.logprobs.token_logprobs if choice.logprobs else None
            if not found or len(found) not in (size, size + 1):  # the token written after them may be there too
                raise EngineError(f"{self._url} echoes no log-probabilities of the prompt: score with another engine")
            return float(sum(found[len(prompt_ids) : size]))

        pairs = [(item.prompt_ids, answer_ids) for item in items for answer_ids in item.answer_ids]
        with ThreadPoolExecutor(min(AT_ONCE, max(1, len(pairs)))) as pool:
            scores = iter(list(pool.map(score, pairs)))
        return [[next(scores) for _ in item.answer_ids] for item in items]

    def prompt_logprobs(self, prompt_ids: Sequence[int], k: int) -> PromptLogprobs:
        """See `engines.PromptReader`. Needs a server that echoes the prompt with k log-probabilities of every token.

        vLLM does, up to its own `--max-logprobs` (20 unless told), and names tokens by their ids when it is asked to.
        """
        asked = {"prompt": list(prompt_ids), "echo": True, "logprobs": k, "max_tokens": 1, "temperature": 0}
        more = {"return_tokens_as_token_ids": True}  # as text two tokens can look alike
        try:
            with self._explained():
                choice = self._ask(model=self._model, extra_body=more, **asked).choices[0]
            return _read_echo(choice.logprobs, list(prompt_ids), k)
        except EngineError as error:
            if isinstance(error.__cause__, openai.BadRequestError):
                cure = f"vLLM tells {k} log-probabilities of a token if it was started with --max-logprobs {k}"
                raise EngineError(f"{error}; {cure}") from error
            raise
        except ValueError as error:
            raise EngineError(f"{self._url} {error}") from error

    def close(self) -> None:
        self._client.close()

    def _stream(self, request: Request) -> Iterator[int]:
        written = 0
        with self._explained(), self._open(request) as chunks:
            reason = None
            for chunk in chunks:
                for choice in chunk.choices:
                    reason = choice.finish_reason or reason
                    for token in self._token_ids(choice):
                        yield token
                        written += 1
                        if written == request.max_new_tokens or token in request.end_ids:
                            return
            if reason == "stop" and request.end_ids:
                yield request.end_ids[0]  # the end token has no text
            elif reason is None:
                raise EngineError(f"{self._url} broke off after {written} tokens: look into the server's log")

    def _open(self, request: Request) -> openai.Stream:
        """The server's answer, asked for in the way that it understands."""
        plain = {"model": self._model, "max_tokens": request.max_new_tokens, "stream": True, **self._decoding}
        if self._takes_ids:
            more = {"return_token_ids": True, "stop_token_ids": list(request.end_ids)}
            more["ignore_eos"] = getattr(self._tokenizer, "eos_token_id", None) not in request.end_ids
            try:
                return self._ask(prompt=list(request.prompt_ids), extra_body=more, **plain)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if self._tokenizer is None:
                    raise EngineError(
                        f"{self._url} refuses a prompt of {len(request.prompt_ids)} token ids ({_said(error)}): "
                        f"give this engine a tokenizer, which sends text, or ask for less"
                    ) from error
        answer = self._ask(prompt=self._tokenizer.decode(request.prompt_ids), **plain)
        self._takes_ids = False  # only now is it known that this was the reason
        return answer

    def _ask(self, **wanted) -> openai.Stream | openai.types.Completion:
        """One completion, asked for again while the server is too busy."""
        until = time.monotonic() + self._timeout_s
        while True:
            try:
                return self._client.completions.create(**wanted)
            except openai.RateLimitError as error:
                wait_s = _wait_s(error.response.headers.get("retry-after"))
                if time.monotonic() + wait_s > until:
                    raise
                time.sleep(wait_s)

    def _token_ids(self, choice) -> list[int]:
        found = (choice.model_extra or {}).get("token_ids")
        if found is None and choice.text and self._tokenizer is None:
            raise EngineError(f"{self._url} returns no token ids: give this engine a tokenizer, or take another server")
        return self._tokenizer(choice.text, add_special_tokens=False).input_ids if found is None else found

    def _served(self) -> list[str]:
        """Names of the models, empty for a server that does not list them."""
        with self._explained(greeting=True):
            try:
                return [model.id for model in self._client.with_options(timeout=self._greeting_s).models.list()]
            except openai.NotFoundError:
                return []

    @contextmanager
    def _explained(self, greeting: bool = False) -> Iterator[None]:
        """What can go wrong, in one sentence each."""
        try:
            yield
        except openai.APITimeoutError as error:
            cure = "is the server running, and the address right?" if greeting else "raise timeout_s or ask less"
            silence_s = self._greeting_s if greeting else self._timeout_s
            raise EngineError(f"{self._url} was silent for {silence_s:g} s: {cure}") from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise EngineError(f"{self._url} cannot be reached, or hung up ({cause}): is the server running?") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EngineError(f"{self._url} refuses the API key ({error.status_code}): give the right one") from error
        except openai.NotFoundError as error:
            raise EngineError(f"{self._url} has no completions of {self._model!r} (404): see its /models") from error
        except openai.APIStatusError as error:
            raise EngineError(f"{self._url} answered {error.status_code}: {_said(error)}") from error
        except openai.APIError as error:
            raise EngineError(f"{self._url} failed: {error.message}") from error


def _said(error: openai.APIStatusError) -> str:
    """The server's own words."""
    return (error.body.get("message") if isinstance(error.body, dict) else None) or error.message


def _wait_s(retry_after: str | None) -> float:
    """Seconds that a busy server asks for; one where it names none, or a date."""
    try:
        return max(0.1, float(retry_after))
    except (TypeError, ValueError):
        return 1.0


def _read_echo(logprobs, prompt_ids: list[int], k: int) -> PromptLogprobs:
    """Log-probabilities of an echoed prompt. Raises ValueError for an answer that is not what was asked for."""
    size = len(prompt_ids)
    if logprobs is None or not logprobs.top_logprobs or len(logprobs.token_logprobs or []) != size + 1:
        raise ValueError("echoes no log-probabilities of the prompt: ask vLLM or `medkit serve`")
    echoed = [_token_id(token) for token in logprobs.tokens[:size]]
    if echoed != prompt_ids:
        raise ValueError("read other tokens than were sent: it must take a prompt of token ids as it is")
    said = PromptLogprobs([], [], list(logprobs.token_logprobs[1:size]))
    for token, named in zip(logprobs.tokens[1:], logprobs.top_logprobs[1:], strict=True):
        top = sorted(named.items(), key=lambda pair: -pair[1])
        if len(top) > k:  # the token that stands there comes along where it is not among the likeliest
            top = [pair for pair in top if pair[0] != token]
        if len(top) < k:
            raise ValueError(f"tells {len(top)} log-probabilities of a token, {k} are asked for: ask for fewer")
        said.top_ids.append([_token_id(name) for name, _ in top[:k]])
        said.top_logprobs.append([value for _, value in top[:k]])
    return said


def _token_id(name: str) -> int:
    kind, _, number = name.rpartition(":")
    if kind != "token_id" or not number.isdigit():
        raise ValueError(f"names the token {name!r} and not its id: ask vLLM or `medkit serve`")
    return int(number)
