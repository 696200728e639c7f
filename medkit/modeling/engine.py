"""Engines, which turn token ids into new token ids whatever runs underneath, and `write`, which asks one for texts.

An engine is greedy unless it was made with a temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from medkit.prompts import templates
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


class Engine(Protocol):
    """One loaded model. Free it with `close`; nothing else may be called after that."""

    name: str

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """The answers, in the order of the requests. Raises EngineError for a request that does not fit."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Written:
    """What a model wrote to one prompt. Lengths are in tokens, with the tokens that end thought and answer."""

    thought: str
    answer: str
    thinking_tokens: int
    answer_tokens: int
    finished: bool  # The model itself ended its thought, and its answer, which is not empty


def write(
    engine: Engine,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_thinking_tokens: int | None = None,
) -> list[Written]:
    """The engine's answer to each prompt, of at most `max_new_tokens` tokens.

    With `max_thinking_tokens` the prompts of a model that thinks end in an opened thought (`templates.encode` with a
    thought). It is closed when it has that many tokens (budget forcing, s1, arXiv 2501.19393), and then the answer is
    written. Raises MedkitError if the mark that closes a thought is not one token: then nothing tells the engine where
    to stop.
    """
    ends, thoughts, closed = templates.end_ids(tokenizer), [[] for _ in prompts], [True] * len(prompts)
    closing = templates.thinking_of(tokenizer).closing
    if max_thinking_tokens and closing:
        mark_ids, forced_ids = (tokenizer(t, add_special_tokens=False).input_ids for t in (closing.strip(), closing))
        if len(mark_ids) != 1:
            raise MedkitError(
                f"{closing.strip()!r} is {len(mark_ids)} tokens of this tokenizer, so no engine can stop at it; add it "
                f"to the tokenizer, or set inference.max_thinking_tokens to null"
            )
        requests = [Request(prompt, max_thinking_tokens, (*mark_ids, *ends)) for prompt in prompts]
        thoughts = [generation.token_ids for generation in engine.generate(requests)]
        closed = [ids[-1:] == mark_ids for ids in thoughts]
        thoughts = [
            ids if whole else [*(token for token in ids if token not in ends), *forced_ids]
            for ids, whole in zip(thoughts, closed, strict=True)
        ]
    requests = [Request([*p, *ids], max_new_tokens, ends) for p, ids in zip(prompts, thoughts, strict=True)]
    written = []
    for generation, ids, whole in zip(engine.generate(requests), thoughts, closed, strict=True):
        thought = tokenizer.decode(ids, skip_special_tokens=False).rstrip().removesuffix(closing.strip()) if ids else ""
        answer = tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        finished = whole and bool(answer.strip()) and generation.token_ids[-1] in ends
        written.append(Written(thought.strip(), answer, len(ids), len(generation.token_ids), finished))
    return written
