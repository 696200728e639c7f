"""Plans: which weights are stored how.

A plan gives every matrix of a model, embeddings and head included, one of three schemes. Some plans follow from the
modules' names; others are chosen from a table of what each scheme damages and weighs, as an exact knapsack. No model
is touched here: `sensitivity` measures the table, `quantization` carries a plan out.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import Literal

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp

from medkit.params import Section
from medkit.stage import MedkitError

Scheme = Literal["unquantized", "int8", "nf4"]
"""As loaded · 8-bit integers, one scale a row · 4-bit NormalFloat (arXiv 2305.14314), one scale a block of 64."""
Shapes = dict[str, tuple[int, int]]
"""module → (rows, columns) of its weight; an embedding has a row per token, a linear layer one per output."""


class PlanError(MedkitError):
    """A plan that does not fit its model or its budget; the message names the module and the cure."""


class Plan(Section):
    """Which scheme each module's weight gets. JSON both ways: `model_dump_json`, `model_validate_json`."""

    name: str
    schemes: dict[str, Scheme]


def layer_of(module: str) -> int | None:
    """Number of the decoder layer that a module is in; None for embeddings and head."""
    found = re.search(r"\blayers\.(\d+)\.", module)
    return int(found[1]) if found else None


def nf4_plan(shapes: Shapes, ends: Scheme = "unquantized") -> Plan:
    """Every decoder linear in NF4; embeddings and head by `ends` (`keep` is what the library does)."""
    name = {"unquantized": "nf4", "int8": "nf4_int8_embed", "nf4": "nf4_all"}[ends]
    return Plan(name=name, schemes={m: ends if layer_of(m) is None else "nf4" for m in shapes})


def paper_plan(shapes: Shapes, head: Scheme = "unquantized") -> Plan:
    """The recipe of arXiv 2505.00025: attention in 8 bits, the other linears in NF4.

    The paper is silent about the ends, so embeddings are kept and so is the head, unless `head` says otherwise; where
    the two are tied, `head` speaks for both.
    """
    ends = [module for module in shapes if layer_of(module) is None]
    layers = {m: "int8" if "attn" in m else "nf4" for m in shapes if m not in ends}
    name = "paper_mix" if head == "unquantized" else f"paper_mix_{head}_head"
    return Plan(name=name, schemes={m: layers.get(m, head if m == ends[-1] else "unquantized") for m in shapes})


def budget_plan(choices: pd.DataFrame, budget_bytes: int, name: str = "plan") -> Plan:
    """The plan of the least summed damage that weighs `budget_bytes` or less: an exact multiple-choice knapsack.

    `choices` has a row per module and scheme that it may take: `module`, `scheme`, `kl_nats` (the damage when it alone
    is quantised), `bytes`. Raises PlanError when even the smallest plan is too big.
    """
    choices = choices.reset_index(drop=True)
    _check_budget(choices, budget_bytes)
    modules = choices.module.to_numpy(object)
    one_each = LinearConstraint((pd.unique(modules)[:, None] == modules).astype(float), 1, 1)
    # the solver's tolerances are absolute, 1e-6: damages are blown up, and bytes brought down, until they mean nothing
    cost = 1e4 * (choices.kl_nats.to_numpy() / max(choices.kl_nats.abs().max(), np.finfo(float).tiny))
    unit, allowed = choices.bytes.median(), budget_bytes
    while True:
        small_enough = LinearConstraint(choices.bytes.to_numpy()[None] / unit, ub=allowed / unit)
        solved = milp(
            cost,
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            constraints=[one_each, small_enough],
            options={"mip_rel_gap": 0.0},
        )
        if solved.x is None:
            raise PlanError(f"no plan of {budget_bytes} bytes was found: {solved.message}")
        taken = choices[solved.x > 0.5]
        over = int(taken.bytes.sum()) - budget_bytes
        if over <= 0:
            return _plan(name, taken)
        allowed -= over  # the solver's tolerance let some bytes through


def random_plan(choices: pd.DataFrame, budget_bytes: int, seed: int) -> Plan:
    """Random schemes that weigh `budget_bytes` or less, by less than the smallest step between two schemes if they can.

    Starts from each module's smallest scheme and gives random modules a random larger one while it fits. Where no plan
    comes that near (everything fits, or one large matrix leaves a gap), it is the largest of a hundred.
    """
    _check_budget(choices, budget_bytes)
    options = {
        m: sorted(zip(rows.bytes, rows.scheme, strict=True)) for m, rows in choices.groupby("module", sort=False)
    }
    steps = {b[0] - a[0] for sizes in options.values() for a, b in itertools.pairwise(sizes)} - {0}
    smallest_step = min(steps, default=float("inf"))
    budget_bytes = min(budget_bytes, sum(sizes[-1][0] for sizes in options.values()))
    draw, least_left, largest = random.Random(seed), float("inf"), {}
    for _ in range(100):
        taken = {module: sizes[0] for module, sizes in options.items()}
        left = budget_bytes - sum(size for size, _ in taken.values())
        while fitting := [
            (m, o) for m, sizes in options.items() for o in sizes if taken[m][0] < o[0] <= taken[m][0] + left
        ]:
            module = draw.choice(sorted({m for m, _ in fitting}))
            option = draw.choice([o for m, o in fitting if m == module])
            left -= option[0] - taken[module][0]
            taken[module] = option
        if left < least_left:
            least_left, largest = left, taken
        if left < smallest_step:
            break
    return Plan(name=f"random_{seed}", schemes={m: scheme for m, (_, scheme) in largest.items()})


def _plan(name: str, taken: pd.DataFrame) -> Plan:
    return Plan(name=name, schemes=dict(zip(taken.module, taken.scheme, strict=True)))


def _check_budget(choices: pd.DataFrame, budget_bytes: int) -> None:
    least = int(choices.groupby("module").bytes.min().sum())
    if least > budget_bytes:
        raise PlanError(f"a budget of {budget_bytes} bytes: the smallest plan weighs {least}; raise the budget")
