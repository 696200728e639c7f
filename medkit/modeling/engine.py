"""What an engine is: something that turns requests into tokens, whatever runs underneath.

`torch_engine`, `edge_engine` and `remote_engine` fill this in; `workloads` times them and `serving` puts one on a
port. An engine knows token ids and nothing of prompts, templates or questions. It is greedy unless it was made with a
temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from medkit.stage import MedkitError

if TYPE_CHECKING:
    from medkit.modeling.option_scoring import Item


class EngineError(MedkitError):
    """An engine that cannot be had or cannot do what is asked; the message names it and the cure."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    end_ids: tuple[int, ...] = ()
    """Tokens that end the answer, which contains the one that did. Empty: exactly `max_new_tokens` are written."""
    arrival_s: float = 0.0
    """When it comes, from the start of its workload. An engine must not begin earlier."""


@dataclass
class Generation:
    """One request's answer and, relative to the start of its workload, when each token came (seconds)."""

    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    begun_s: float | None = None
    """When the engine began to read the prompt; None from one that does not tell."""


@dataclass
class PromptLogprobs:
    """What a model says as it reads a prompt of n tokens, in nats. Entry i is about the token after the first i + 1."""

    top_ids: list[list[int]]
    """The k likeliest tokens, likeliest first. The last of the n entries is about the token that would follow."""
    top_logprobs: list[list[float]]
    token_logprobs: list[float]
    """Of the tokens that stand there: n − 1, since nothing is said about the first."""


class Engine(Protocol):
    """One loaded model. Free it with `close`, after which nothing else may be called."""

    name: str

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Answers in the order of the requests. Raises EngineError for a prompt that does not fit."""
        ...

    def stream(self, request: Request) -> Iterator[int]:
        """Tokens of one answer as they come. Many threads may stream at once; closing the iterator cancels."""
        ...

    def score(self, items: Sequence[Item]) -> list[list[float]]:
        """Summed log-probability of each answer of each item, in nats. Raises EngineError where it cannot be had."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class PromptReader(Protocol):
    """An engine that also tells what it reads: teachers and servers of log-probabilities need one."""

    def prompt_logprobs(self, prompt_ids: Sequence[int], k: int) -> PromptLogprobs:
        """Log-probabilities after the softmax over all tokens. Raises EngineError where they cannot be had."""
        ...
