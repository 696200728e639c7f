"""What goes over the wire: bodies of requests, answers and errors in the shapes of OpenAI's API.

A field that would change the answer and is not supported is refused with the reason; nothing is dropped in silence.
No engine, no tokenizer and no network here.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from medkit.engines import PromptLogprobs, Request

# --- errors ----------------------------------------------------------------------------------------------------------

CLIENT_GONE = 499  # nginx's number for a client that left; it is counted, nobody is there to read it
MOST_LOGPROBS = 256  # of one token: more than any teacher is asked for, less than would choke the network
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error: status, and the words OpenAI's clients look for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# --- requests --------------------------------------------------------------------------------------------------------


def _only(*allowed, why: str) -> AfterValidator:
    def check(value):
        if value not in allowed:
            raise ValueError(f"{value!r} is not supported here: {why}")
        return value

    return AfterValidator(check)


ONE_ANSWER = _only(None, 1, why="decoding is greedy, every further answer would be the same; ask for one")
GREEDY = _only(None, 0, why="decoding is greedy; send 0 or leave it out")
NO_PENALTY = _only(None, 0, why="decoding is greedy without penalties; send 0 or leave it out")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False


class Body(_Strict):
    """What both routes share. Greedy decoding needs no seed and no nucleus: these are accepted and change nothing."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    temperature: Annotated[float | None, GREEDY] = None
    n: Annotated[int | None, ONE_ANSWER] = 1
    frequency_penalty: Annotated[float | None, NO_PENALTY] = None
    presence_penalty: Annotated[float | None, NO_PENALTY] = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    user: str | None = None
    ignore_eos: bool | None = False
    """As in vLLM: write on to exactly `max_tokens`."""
    stop_token_ids: list[int] | None = None
    """As in vLLM: tokens that end the answer, beside the model's own."""
    return_token_ids: bool | None = False
    """As in vLLM: the answer brings `token_ids`, and once `prompt_token_ids`."""

    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in stops:
            raise ApiError(400, "stop holds an empty string, which ends every answer; leave it out", param="stop")
        return tuple(stops)


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16  # the default of OpenAI's own endpoint
    best_of: Annotated[int | None, ONE_ANSWER] = None
    echo: bool | None = False
    """With `logprobs`: what the model says about the prompt's tokens, and at most one more."""
    logprobs: Annotated[int, Field(ge=1, le=MOST_LOGPROBS)] | None = None
    return_tokens_as_token_ids: bool | None = False
    """As in vLLM: log-probabilities name tokens `token_id:<id>`, since as text two tokens can look alike."""

    def top_logprobs(self) -> int | None:
        """How many log-probabilities of each token of the prompt are wanted; None where an answer is."""
        if not self.echo:
            if self.logprobs is not None:
                raise ApiError(400, "log-probabilities are told of a prompt only; send echo too, or leave it out",
                               param="logprobs")  # fmt: skip
            if self.max_tokens == 0:
                raise ApiError(400, "max_tokens is 0; ask for 1 token or more, or send echo and logprobs",
                               param="max_tokens")  # fmt: skip
            return None
        if self.logprobs is None:
            raise ApiError(400, "echo without logprobs is not supported here: put the prompt before the answer "
                           "yourself", param="echo")  # fmt: skip
        if self.stream or self.max_tokens not in (0, 1):
            raise ApiError(400, "with echo the prompt is read, not answered; send max_tokens 0 or 1, and no stream",
                           param="stream" if self.stream else "max_tokens")  # fmt: skip
        return self.logprobs


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def as_turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[bool | None, _only(None, False, why="the engine writes tokens, not probabilities")] = None


B = TypeVar("B", bound=Body)


def read_body(kind: type[B], text: bytes) -> B:
    """The checked body. Raises ApiError (400) that names the first field that is wrong, and why."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        about = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
        # of text or a list the branch that was meant says what is wrong, the other one only that it was not meant
        first = next((e for e in about if e["type"] not in ("string_type", "list_type")), errors[0])
        path = [str(part) for part in first["loc"] if not re.match(r"str$|list\[", str(part))]
        reason = first["msg"].removeprefix("Value error, ")
        message = f"{'.'.join(path)}: {reason}" if path else f"the body is no object as expected: {reason}"
        raise ApiError(400, message, param=path[0] if path else None, code=first["type"]) from None


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One checked request: what the engine gets, and how the answer is to look."""

    request: Request
    chat: bool
    model: str
    template: str | None = None
    stops: tuple[str, ...] = ()
    include_usage: bool = False
    token_ids: bool = False
    top_logprobs: int | None = None
    """The prompt is to be read and not answered, with so many log-probabilities of each token."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _envelope(self, chunk: bool) -> dict:
        kind, prefix = ("chat.completion", "chatcmpl") if self.chat else ("text_completion", "cmpl")
        kind += ".chunk" if chunk and self.chat else ""
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _usage(self, written: int) -> dict:
        read = len(self.request.prompt_ids)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def whole(self, text: str, token_ids: list[int], finish_reason: str) -> dict:
        """The answer in one piece."""
        choice = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        answer = self._envelope(chunk=False) | {"choices": [choice], "usage": self._usage(len(token_ids))}
        return self._with_ids(answer, choice, token_ids, first=True)

    def chunk(self, text: str, token_ids: list[int], finish_reason: str | None, first: bool) -> dict:
        """One event of a stream; `first` brings the role, and the prompt's ids if asked for."""
        choice = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        role = {"role": "assistant"} if first else {}
        choice |= {"delta": role | {"content": text}} if self.chat else {"text": text}
        answer = self._envelope(chunk=True) | {"choices": [choice]} | ({"usage": None} if self.include_usage else {})
        return self._with_ids(answer, choice, token_ids, first)

    def echoed(self, said: PromptLogprobs, text: str, name: Callable[[int], str]) -> dict:
        """What was read, in one piece; `text` is the prompt's, `name` says how a token is called."""
        written = said.top_ids[-1][: self.request.max_new_tokens]
        tokens = [*self.request.prompt_ids, *written]
        found = [*said.token_logprobs, *said.top_logprobs[-1][: len(written)]]
        tops = [dict(zip(map(name, ids[::-1]), values[::-1], strict=True))  # the likeliest of two namesakes stays
                for ids, values in zip(said.top_ids, said.top_logprobs, strict=True)]  # fmt: skip
        for top, token, value in zip(tops, tokens[1:], found, strict=False):
            top.setdefault(name(token), value)
        logprobs = {"tokens": [name(token) for token in tokens], "token_logprobs": [None, *found]}
        logprobs |= {"top_logprobs": [None, *tops[: len(found)]], "text_offset": None}
        reason = "stop" if set(written) & set(self.request.end_ids) else "length"
        choice = {"index": 0, "logprobs": logprobs, "finish_reason": reason, "text": text}
        answer = self._envelope(chunk=False) | {"choices": [choice], "usage": self._usage(len(written))}
        return self._with_ids(answer, choice, written, first=True)

    def usage_chunk(self, written: int) -> dict:
        return self._envelope(chunk=True) | {"choices": [], "usage": self._usage(written)}

    def _with_ids(self, answer: dict, choice: dict, token_ids: list[int], first: bool) -> dict:
        """vLLM's places: the prompt's ids lie in a completion's choice, but beside a chat's choices."""
        if self.token_ids:
            choice["token_ids"] = token_ids
            if first:
                (answer if self.chat else choice)["prompt_token_ids"] = list(self.request.prompt_ids)
        return answer
