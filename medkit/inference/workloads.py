"""Workloads of real questions, and what is measured on them over any engine.

All engines get the same prompts and write exactly as many tokens as asked: an end token does not stop the writing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.stats import norm

from medkit.modeling.engine import Engine, EngineError, Generation, Request
from medkit.prompts import templates
from medkit.stage import MedkitError


def encode_prompts(tokenizer, questions: pd.DataFrame, shots: Sequence[dict] = ()) -> list[list[int]]:
    """The prompt of each question row, which asks for an option's text; solved rows in `shots` come before all of them.

    Prompts with the same shots begin with the same tokens: a shared prefix.
    """
    rows = questions.to_dict("records")
    messages = (templates.render(row, templates.pick_template(row["kind"], "option_text"), shots) for row in rows)
    return [templates.encode(tokenizer, turns)[0] for turns in messages]


def equal(prompt_ids: Sequence[Sequence[int]], new_tokens: int) -> list[Request]:
    """Requests for answers of the same length."""
    return [Request(ids, new_tokens) for ids in prompt_ids]


def skewed(prompt_ids: Sequence[Sequence[int]], median: int, longest: int, seed: int) -> list[Request]:
    """Requests for answers of log-normal lengths, as people's are: half above `median`, the largest `longest` tokens.

    The lengths are the evenly spaced quantiles (i + ½)/n, and not a draw: they are the same for every seed, which only
    decides who gets which. Raises MedkitError unless 2 ≤ median ≤ longest.
    """
    if not 2 <= median <= longest:
        raise MedkitError(f"lengths with a median of {median} and at most {longest}: give 2 ≤ median ≤ longest")
    number = len(prompt_ids)
    quantiles = norm.ppf((np.arange(number) + 0.5) / number)
    widest = quantiles[-1] if number > 1 else math.inf
    lengths = np.maximum(2, np.rint(median * (longest / median) ** (quantiles / widest))).astype(int)
    shuffled = np.random.default_rng(seed).permutation(lengths).tolist()
    return [Request(ids, length) for ids, length in zip(prompt_ids, shuffled, strict=True)]


def time_in_turns(
    engines: Mapping[str, Engine],
    requests: Sequence[Request],
    repeats: int,
    alone: bool = False,
    warm_up: int | None = None,
) -> tuple[pd.DataFrame, dict[str, list[Generation]]]:
    """Timed passes, the engines in turns so that other work slows all of them, and the last answers of each.

    A row per engine and repeat (`summarise`). `alone` asks each request by itself, after the one before. An engine's
    first pass, over the first `warm_up` requests (None: over all), is not counted. In every pass the words of the
    questions stand in another order, the same for all engines: else an engine that caches prompts reads nothing from
    the second pass on.
    """
    for engine in engines.values():
        _generate(engine, requests[:warm_up], alone)
    rows, answers = [], {}
    for repeat in range(repeats):
        varied = _rotate(requests, repeat + 1)
        for name, engine in engines.items():
            answers[name], duration_s = _generate(engine, varied, alone)
            rows.append({**summarise(name, varied, answers[name], duration_s), "repeat": repeat})
    return pd.DataFrame(rows), answers


def _rotate(requests: Sequence[Request], by: int) -> list[Request]:
    """The same requests, each prompt rotated by `by` tokens between what all of them begin and end with."""
    begin = _common([request.prompt_ids for request in requests])
    end = _common([request.prompt_ids[: begin - 1 if begin else None : -1] for request in requests])
    varied = []
    for request in requests:
        ids = list(request.prompt_ids)
        question = ids[begin : len(ids) - end]
        turn = by % max(1, len(question))
        rotated = [*ids[:begin], *question[turn:], *question[:turn], *ids[len(ids) - end :]]
        varied.append(replace(request, prompt_ids=rotated))
    return varied


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences have in common; 0 if one of them has no other tokens."""
    return next((i for i, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1), 0)


def _generate(engine: Engine, requests: Sequence[Request], alone: bool) -> tuple[list[Generation], float]:
    """The answers and the seconds until the last token came; the start of an engine's own thread is not counted."""
    calls = [[request] for request in requests] if alone else [requests]
    answers = [engine.generate(call) for call in calls]
    duration_s = sum(max(a.token_times_s[-1] for a in answered) for answered in answers)
    return [generation for answered in answers for generation in answered], duration_s


def summarise(name: str, requests: Sequence[Request], generations: Sequence[Generation], duration_s: float) -> dict:
    """The times of one pass.

    `ttft_s` is the time to a request's first token, so waiting in a queue counts. `latency_s_per_token` is the time
    from the first token to the last over the steps between. Both are medians over the requests, with 95th percentiles;
    throughput is of all tokens over the whole pass. Raises EngineError for answers of another length than asked.
    """
    wanted = [request.max_new_tokens for request in requests]
    written = [len(generation.token_ids) for generation in generations]
    if written != wanted:
        raise EngineError(f"{name}: asked for {wanted} tokens, got {written}; such times cannot be compared")
    waits = [generation.token_times_s[0] for generation in generations]
    spans = [(g.token_times_s[-1] - g.token_times_s[0], len(g.token_times_s) - 1) for g in generations]
    steps = [span / count for span, count in spans if count] or [math.nan]
    return {
        "engine": name,
        "requests": len(requests),
        "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
        "output_tokens": sum(wanted),
        "ttft_s": float(np.median(waits)),
        "ttft_p95_s": float(np.percentile(waits, 95)),
        "latency_s_per_token": float(np.median(steps)),
        "latency_p95_s_per_token": float(np.percentile(steps, 95)),
        "duration_s": duration_s,
        "throughput_tokens_per_s": sum(wanted) / duration_s,
    }


def timeline(generations: Sequence[Generation]) -> pd.DataFrame:
    """A row per token: request, begun_s (when its prompt was begun), token (from 0), time_s, all from the start."""
    rows = [
        (number, generation.begun_s, token, time_s)
        for number, generation in enumerate(generations)
        for token, time_s in enumerate(generation.token_times_s)
    ]
    return pd.DataFrame(rows, columns=["request", "begun_s", "token", "time_s"]).astype({"begun_s": float})


def agreement(reference: Sequence[Generation], other: Sequence[Generation]) -> float:
    """Share of answers that are equal token by token."""
    return sum(a.token_ids == b.token_ids for a, b in zip(reference, other, strict=True)) / len(reference)
