"""What an engine is: it turns prompts into new tokens, whatever runs underneath.

An engine knows token ids, and nothing of prompts, templates or questions. It is greedy unless it was made with a
temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from medkit.stage import MedkitError

WRITE_TOKENS = 4096  # at least, for a batch that writes: each step reads all weights, for 20 rows as for 70


class EngineError(MedkitError):
    """An engine that is not available or cannot do what is asked; the message names it and the cure."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    end_ids: tuple[int, ...] = ()
    """Tokens that end the answer; the end token is part of the answer. Empty: exactly `max_new_tokens` are written."""


@dataclass
class Generation:
    """The answer to one request. Times are seconds from the start of the call that asked for it."""

    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)  # When each token came
    begun_s: float | None = None  # When the engine began to read the prompt; None if it does not tell


@dataclass
class PromptLogprobs:
    """Log-probabilities (nats) of a prompt of n tokens. Entry i is about the token after the first i + 1 tokens."""

    top_ids: list[list[int]]
    """The k most likely tokens, most likely first. The last of the n entries is about the token that would follow."""
    top_logprobs: list[list[float]]
    token_logprobs: list[float]  # Of the tokens of the prompt: n − 1, since nothing predicts the first


class Engine(Protocol):
    """One loaded model. Free it with `close`; nothing else may be called after that."""

    name: str

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """The answers, in the order of the requests. Raises EngineError for a request that does not fit."""
        ...

    def close(self) -> None: ...


class PromptReader(Protocol):
    """An engine that returns the log-probabilities of a prompt: a teacher behind a server needs one."""

    def prompt_logprobs(self, prompt_ids: Sequence[int], k: int) -> PromptLogprobs:
        """Log-probabilities after the softmax over all tokens. Raises EngineError where they are not available."""
        ...
