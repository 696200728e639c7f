"""`auto`: the engine that is fastest here, found by trying the candidates once and written down with its reason.

The choice belongs to one machine, one model file and one shape of workload; asked again it is read, not measured. It
knows engines as callables that load them. It judges by time alone: whether answers differ is recorded beside it, and
whether that matters is for whoever asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from medkit.inference import workloads
from medkit.modeling.engine import Engine, EngineError, Generation, Request
from medkit.params import digest
from medkit.stage import atomic_path, device_name


@dataclass(frozen=True)
class Choice:
    """What was chosen and what it was chosen from."""

    engine: str
    reason: str
    """One sentence."""
    judged_by: str
    """The column of `timed` that decided: `latency_s_per_token` for requests alone, else `throughput_tokens_per_s`."""
    timed: list[dict]
    """A row per candidate that ran, best first: medians over the repeats, and agreement with the first candidate."""
    passes: list[dict]
    """What the medians are of: a row per candidate and repeat, as `workloads.take_turns` gives them."""
    refused: dict[str, str]
    """Candidates that cannot be had here, and why."""
    date: str
    """Of the measurement (UTC)."""


def choose(
    candidates: Mapping[str, Callable[[], Engine]],
    requests: Sequence[Request],
    repeats: int,
    folder: Path,
    identity: Mapping[str, str],
    alone: bool = False,
    together: bool = True,
    anew: bool = False,
) -> Choice:
    """The best candidate for these requests on this machine: read from `folder` if known, else measured and kept there.

    `anew` measures in any case: for times that stand beside others of the same hour.

    `identity` tells one measurement from another beside machine, candidates and lengths of the requests: the sha256 of
    the model's file, versions of the engines' packages. The first candidate is the reference of agreement. `together`
    holds all engines in memory and lets them take turns, else one is closed before the next is loaded. Whoever raises
    EngineError or ImportError, when loaded or when timed, is listed in `refused`. Raises EngineError if nobody is left.
    """
    shape = [[len(r.prompt_ids), r.max_new_tokens, round(r.arrival_s, 3)] for r in requests]
    key = {"device": device_name(), "candidates": sorted(candidates), "requests": shape, "alone": alone, **identity}
    key["record"] = [field.name for field in fields(Choice)]  # what an older version wrote down is not read
    path = folder / f"{digest(key)}.json"
    if path.exists() and not anew:
        return Choice(**json.loads(path.read_text()))
    found = _measure(candidates, requests, repeats, alone, together)
    with atomic_path(path) as scratch:
        scratch.write_text(json.dumps(asdict(found), indent=2) + "\n")
    return found


def _measure(
    candidates: Mapping[str, Callable[[], Engine]],
    requests: Sequence[Request],
    repeats: int,
    alone: bool,
    together: bool,
) -> Choice:
    tables: list[pd.DataFrame] = []
    answers: dict[str, list[Generation]] = {}
    refused: dict[str, str] = {}
    for names in [list(candidates)] if together else [[name] for name in candidates]:
        engines = {}
        try:
            for name in names:
                engine = _load(name, candidates[name], requests, refused)
                if engine is not None:
                    engines[name] = engine
            warm_up = 1 if alone else None  # alone, each has just answered the longest; together, shapes are others
            while engines:
                try:
                    table, said = workloads.take_turns(engines, requests, repeats, alone, warm_up)
                except workloads.PassError as error:  # the others begin again, without it
                    refused[error.engine] = str(error)
                    engines.pop(error.engine).close()
                    continue
                tables.append(table)
                answers |= said
                break
        finally:
            for engine in engines.values():
                engine.close()
    if not answers:
        raise EngineError(f"no engine can be had here: {_listed(refused)}; install one of them")
    return _judge(pd.concat(tables), answers, refused, alone)


def _load(name: str, make: Callable[[], Engine], requests: Sequence[Request], refused: dict[str, str]) -> Engine | None:
    """A candidate that has answered the longest request, or None and its reason in `refused`."""
    engine = None
    try:
        engine = make()
        engine.generate([replace(max(requests, key=lambda r: len(r.prompt_ids) + r.max_new_tokens), arrival_s=0.0)])
    except (EngineError, ImportError) as error:
        refused[name] = str(error)
        if engine is not None:
            engine.close()
        return None
    return engine


def _judge(
    table: pd.DataFrame, answers: Mapping[str, Sequence[Generation]], refused: dict[str, str], alone: bool
) -> Choice:
    column = "latency_s_per_token" if alone else "throughput_tokens_per_s"
    reference = next(iter(answers))
    timed = table.drop(columns="repeat").groupby("engine", sort=False).median(numeric_only=True)
    timed = timed.sort_values(column, ascending=alone)
    agreed = [workloads.agreement(answers[reference], answers[name]) for name in timed.index]
    timed = timed.join(pd.DataFrame(agreed, index=timed.index)).reset_index()
    return Choice(
        engine=timed.engine[0],
        reason=_explain(timed, reference, refused, alone),
        judged_by=column,
        timed=timed.to_dict("records"),
        passes=table.to_dict("records"),
        refused=refused,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _explain(timed: pd.DataFrame, reference: str, refused: Mapping[str, str], alone: bool) -> str:
    """What the first row of `timed` reached and what it was compared with, in one sentence."""
    best = timed.iloc[0]
    if alone:
        said = f"{best.engine} takes {1000 * best.latency_s_per_token:.1f} ms per token, one request at a time"
        behind = [(r.engine, r.latency_s_per_token / best.latency_s_per_token) for r in timed[1:].itertuples()]
        said += "".join(f"; {name} takes {ratio:.1f} times as long" for name, ratio in behind)
    else:
        said = f"{best.engine} writes {best.throughput_tokens_per_s:.0f} tokens/s at {best.requests:.0f} requests"
        behind = [(r.engine, best.throughput_tokens_per_s / r.throughput_tokens_per_s) for r in timed[1:].itertuples()]
        said += "".join(f", {ratio:.1f} times as many as {name}" for name, ratio in behind)
    if best.answers_equal < 1:
        said += f"; {best.answers_equal:.0%} of its answers are those of {reference}, token by token"
    return said + (f"; not to be had here: {_listed(refused)}" if refused else "") + "."


def _listed(refused: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({reason.rstrip('.')})" for name, reason in refused.items())
