"""Workloads of real questions, and what is measured on them over any engine of `engines`.

Contenders get the same prompts and write exactly as many tokens as asked: an end token stops no clock. Prompts are
questions, lengths and arrivals are drawn. Which engine to take is for `engine_choice`; nothing here knows a model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm

from medkit.modeling.engine import Engine, EngineError, Generation, Request
from medkit.prompts import templates
from medkit.quantization import activation_memory

# --- requests ------------------------------------------------------------------------------------------------------


def encode_prompts(tokenizer, questions: pd.DataFrame, shots: Sequence[dict] = ()) -> list[list[int]]:
    """The prompt of each question row, which asks for an option's text; solved rows in `shots` come before them all.

    Chat templates render turn by turn, so prompts with the same shots begin with the same tokens: a shared prefix.
    """
    rows = questions.to_dict("records")
    asked = (templates.render(row, templates.pick_template(row["kind"], "option_text"), shots) for row in rows)
    return [templates.encode(tokenizer, messages)[0] for messages in asked]


def equal(prompt_ids: Sequence[Sequence[int]], new_tokens: int) -> list[Request]:
    """Everyone wants the same number of tokens and is there from the start."""
    return [Request(ids, new_tokens) for ids in prompt_ids]


def skewed(prompt_ids: Sequence[Sequence[int]], median: int, longest: int, seed: int) -> list[Request]:
    """Lengths of answers as people's are: log-normal, the largest `longest` tokens, half of them above `median`.

    They are the distribution's evenly spaced quantiles, (i + ½)/n, and not a draw: the same lengths for every seed,
    which says only who wants which. The shortest is near median²/longest and at least 2.
    """
    if not 2 <= median <= longest:
        raise ValueError(f"lengths of a median of {median} and at most {longest}: give 2 ≤ median ≤ longest")
    number = len(prompt_ids)
    steps = norm.ppf((np.arange(number) + 0.5) / number)
    widest = steps[-1] if number > 1 else math.inf
    lengths = np.maximum(2, np.rint(median * (longest / median) ** (steps / widest))).astype(int)
    shuffled = np.random.default_rng(seed).permutation(lengths).tolist()
    return [Request(ids, length) for ids, length in zip(prompt_ids, shuffled, strict=True)]


def arriving(requests: Sequence[Request], rate_per_s: float, seed: int) -> list[Request]:
    """The same requests one after the other, the first at once, at Poisson's times of a mean rate."""
    waits = np.random.default_rng(seed).exponential(1 / rate_per_s, len(requests))
    waits[:1] = 0
    return [replace(request, arrival_s=at) for request, at in zip(requests, waits.cumsum().tolist(), strict=True)]


# --- measuring -----------------------------------------------------------------------------------------------------


class PassError(EngineError):
    """A pass that gave no measurement; `engine` is the name of the contender that failed."""

    def __init__(self, engine: str, message: str):
        super().__init__(f"{engine}: {message}")
        self.engine = engine


def measure(
    name: str, engine: Engine, requests: Sequence[Request], alone: bool = False
) -> tuple[dict, list[Generation]]:
    """One timed pass: what `summarise` tells of it with `peak_memory_bytes` of this process meanwhile, and the answers.

    Nothing is warmed up, and an engine that was asked the same before may remember; `take_turns` sees to both.
    `alone`: each request by itself after the one before, whenever it would arrive. The peak is that of CUDA's allocator
    once torch uses CUDA, else of the resident set with all libraries and whatever else is loaded; NaN where the system
    does not tell. To compare engines by it, give each a process of its own. Raises PassError.
    """
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    try:
        activation_memory.reset_peak(device)
    except OSError:  # no /proc, or not ours to write to
        device = None
    asked, generations, duration_s = _run(name, engine, requests, alone)
    peak_bytes = activation_memory.read_peak(device) if device else math.nan
    return {**summarise(name, asked, generations, duration_s), "peak_memory_bytes": peak_bytes}, generations


def take_turns(
    engines: Mapping[str, Engine],
    requests: Sequence[Request],
    repeats: int,
    alone: bool = False,
    warm_up: int | None = None,
) -> tuple[pd.DataFrame, dict[str, list[Generation]]]:
    """Timed passes, the engines in turns so that a busy minute hits all of them, and the last answers of each.

    A row per engine and repeat, as `measure` tells it. An engine's first pass, over the first `warm_up` requests (None:
    over all), is no row; its duration stands in `warm_up_s`.
    In every pass the words of the questions stand in another order, alike for all engines: one that keeps what it has
    read for later requests would otherwise read nothing from the second pass on. What all prompts share stays.
    """
    warm_up_s = {name: _run(name, engine, requests[:warm_up], alone)[2] for name, engine in engines.items()}
    rows, answers = [], {}
    for repeat in range(repeats):
        varied = _rotated(requests, repeat + 1)
        for name, engine in engines.items():
            found, answers[name] = measure(name, engine, varied, alone)
            rows.append({**found, "repeat": repeat, "warm_up_s": warm_up_s[name]})
    return pd.DataFrame(rows), answers


def _rotated(requests: Sequence[Request], by: int) -> list[Request]:
    """The same requests, each prompt rotated by `by` tokens between what all of them begin and end with."""
    begin = _common([request.prompt_ids for request in requests])
    end = _common([request.prompt_ids[: begin - 1 if begin else None : -1] for request in requests])
    varied = []
    for request in requests:
        ids = list(request.prompt_ids)
        question = ids[begin : len(ids) - end]
        turn = by % max(1, len(question))
        turned = [*ids[:begin], *question[turn:], *question[:turn], *ids[len(ids) - end :]]
        varied.append(replace(request, prompt_ids=turned))
    return varied


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all sequences have in common; 0 if one of them is only that."""
    return next((i for i, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1), 0)


def _run(
    name: str, engine: Engine, requests: Sequence[Request], alone: bool
) -> tuple[Sequence[Request], list[Generation], float]:
    """The requests as they were put, their answers, and the seconds it took."""
    if alone:
        requests = [replace(request, arrival_s=0.0) for request in requests]
    began = time.perf_counter()
    try:
        generations = [engine.generate([r])[0] for r in requests] if alone else engine.generate(requests)
    except EngineError as error:
        raise PassError(name, str(error)) from error
    return requests, generations, time.perf_counter() - began


def summarise(name: str, requests: Sequence[Request], generations: Sequence[Generation], duration_s: float) -> dict:
    """What one pass was and took.

    `ttft_s` is the time from a request's arrival to its first token, so waiting in a queue counts. A request's
    `latency_s_per_token` is the time from its first token to its last over the steps between. Both are medians over the
    requests, with 95th percentiles beside them; `throughput_tokens_per_s` is of all written tokens over the whole pass.
    Raises PassError for answers of other lengths than asked, and for one that was begun before it was asked for.
    """
    asked = [request.max_new_tokens for request in requests]
    written = [len(generation.token_ids) for generation in generations]
    if written != asked:
        raise PassError(name, f"asked for {asked} tokens, got {written}; timings would not compare")
    waits = [g.token_times_s[0] - r.arrival_s for g, r in zip(generations, requests, strict=True)]
    if min(waits) < 0:
        raise PassError(name, f"wrote a token {-min(waits):.3f} s before its request came; check its clock")
    spans = [(g.token_times_s[-1] - g.token_times_s[0], len(g.token_times_s) - 1) for g in generations]
    steps = [span / count for span, count in spans if count] or [math.nan]
    return {
        "engine": name,
        "requests": len(requests),
        "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
        "output_tokens": sum(asked),
        "ttft_s": float(np.median(waits)),
        "ttft_p95_s": float(np.percentile(waits, 95)),
        "latency_s_per_token": float(np.median(steps)),
        "latency_p95_s_per_token": float(np.percentile(steps, 95)),
        "duration_s": duration_s,
        "throughput_tokens_per_s": sum(asked) / duration_s,
    }


# --- looking ---------------------------------------------------------------------------------------------------------


def timeline(generations: Sequence[Generation], requests: Sequence[Request]) -> pd.DataFrame:
    """A row per token: request, arrival_s, begun_s, token (from 0), time_s, and the phase that made it.

    A request waits from arrival to begun_s (NaN if unknown). The first token is what `prefill` ends with, all others
    are `decode` steps.
    """
    rows = [
        {
            "request": number,
            "arrival_s": request.arrival_s,
            "begun_s": generation.begun_s,
            "token": token,
            "time_s": time_s,
        }
        for number, (generation, request) in enumerate(zip(generations, requests, strict=True))
        for token, time_s in enumerate(generation.token_times_s)
    ]
    table = pd.DataFrame(rows, columns=["request", "arrival_s", "begun_s", "token", "time_s"])
    return table.astype({"begun_s": float}).assign(phase=np.where(table.token == 0, "prefill", "decode"))


def agreement(reference: Sequence[Generation], other: Sequence[Generation]) -> dict[str, float]:
    """Shares of answers that are the same token by token, and of the reference's tokens before the first difference.

    After one different token the rest is another text, so what follows it is not compared.
    """
    same = before = total = 0
    for a, b in zip((g.token_ids for g in reference), (g.token_ids for g in other), strict=True):
        same += a == b
        before += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        total += len(a)
    return {"answers_equal": same / len(reference), "tokens_before_difference": before / total}
