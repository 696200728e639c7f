"""Plans: which number format each weight matrix of a model gets.

A plan maps every matrix, embeddings and head included, to one of three schemes. Some plans follow from the names of the
modules. Others are chosen from a table with the sensitivity and the size of every choice, as an exact knapsack.
This file touches no model: `sensitivity` measures the table, `quantize` applies a plan.
"""

import random
import re
from typing import Literal, get_args

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp

from medkit.params import Section
from medkit.stage import MedkitError

Scheme = Literal["unquantized", "int8", "nf4"]
"""As loaded · 8-bit integers, one scale per row · 4-bit NormalFloat (arXiv 2305.14314), one scale per block of 64."""
SCHEMES = get_args(Scheme)
Shapes = dict[str, tuple[int, int]]
"""module → (rows, columns) of its weight. An embedding has one row per token, a linear layer one row per output."""


class Plan(Section):
    """The scheme of every module. To and from JSON: `model_dump_json`, `model_validate_json`."""

    name: str
    schemes: dict[str, Scheme]


def layer_of(module: str) -> int | None:
    """Number of the decoder layer that contains a module; None for embeddings and head."""
    match = re.search(r"\blayers\.(\d+)\.", module)
    return int(match[1]) if match else None


def nf4_plan(shapes: Shapes, embeddings: Scheme = "unquantized") -> Plan:
    """Every linear layer of the decoder in NF4. Embeddings and head get the scheme `embeddings`.

    bitsandbytes leaves embeddings and head unquantized, and so does the default.
    """
    name = {"unquantized": "nf4", "int8": "nf4_int8_embed", "nf4": "nf4_all"}[embeddings]
    return Plan(name=name, schemes={m: embeddings if layer_of(m) is None else "nf4" for m in shapes})


def paper_plan(shapes: Shapes) -> Plan:
    """The mix of arXiv 2505.00025: attention in 8 bits, the other linear layers in NF4.

    The paper does not say what happens to embeddings and head; here they stay unquantized.
    """
    layers = {m: "int8" if "attn" in m else "nf4" for m in shapes if layer_of(m) is not None}
    return Plan(name="paper_mix", schemes={m: layers.get(m, "unquantized") for m in shapes})


def budget_plan(choices: pd.DataFrame, budget_bytes: int, name: str = "plan") -> Plan:
    """The plan with the least summed KL that takes at most `budget_bytes`: an exact multiple-choice knapsack.

    `choices` has one row per module and possible scheme: `module`, `scheme`, `kl_nats` (when only this module is
    quantized), `bytes`. Raises MedkitError if even the smallest plan is too large.
    """
    choices = choices.reset_index(drop=True)
    check_budget(choices, budget_bytes)
    modules = choices.module.to_numpy(object)
    one_scheme_each = LinearConstraint((pd.unique(modules)[:, None] == modules).astype(float), 1, 1)
    # the solver's tolerances are absolute (1e-6): scale KL up and bytes down until the tolerances do not matter
    cost = 1e4 * (choices.kl_nats.to_numpy() / max(choices.kl_nats.abs().max(), np.finfo(float).tiny))
    unit, allowed = choices.bytes.median(), budget_bytes
    while True:
        small_enough = LinearConstraint(choices.bytes.to_numpy()[None] / unit, ub=allowed / unit)
        solution = milp(
            cost, integrality=np.ones(len(choices)), bounds=Bounds(0, 1), constraints=[one_scheme_each, small_enough],
            options={"mip_rel_gap": 0.0, "presolve": False},  # after a presolve HiGHS now and then prints a line
        )  # fmt: skip
        if solution.x is None:
            raise MedkitError(f"no plan of {budget_bytes} bytes was found: {solution.message}; change the budget")
        chosen = choices[solution.x > 0.5]
        excess = int(chosen.bytes.sum()) - budget_bytes
        if excess <= 0:
            return Plan(name=name, schemes=dict(zip(chosen.module, chosen.scheme, strict=True)))
        allowed -= excess  # the tolerance of the solver allowed a few bytes too many


def random_plan(choices: pd.DataFrame, budget_bytes: int, seed: int) -> Plan:
    """Random schemes that take at most `budget_bytes`, so near to it that no module's next larger scheme fits.

    Starts with the smallest scheme of each module; then random modules get a random larger scheme while one fits.
    Raises MedkitError as above.
    """
    check_budget(choices, budget_bytes)
    draw, chosen = random.Random(seed), choices.loc[choices.groupby("module", sort=False).bytes.idxmin()]
    size, left = dict(zip(chosen.module, chosen.bytes, strict=True)), budget_bytes - chosen.bytes.sum()
    schemes = dict(zip(chosen.module, chosen.scheme, strict=True))
    options = list(choices[["module", "scheme", "bytes"]].itertuples(index=False))
    while fitting := [o for o in options if 0 < o.bytes - size[o.module] <= left]:
        option = draw.choice(fitting)
        left -= option.bytes - size[option.module]
        size[option.module], schemes[option.module] = option.bytes, option.scheme
    return Plan(name=f"random_{seed}", schemes=schemes)


def check_budget(choices: pd.DataFrame, budget_bytes: int) -> None:
    """Raise MedkitError if the smallest scheme of every module is too large together."""
    smallest = int(choices.groupby("module").bytes.min().sum())
    if smallest > budget_bytes:
        raise MedkitError(f"a budget of {budget_bytes} bytes: the smallest plan takes {smallest} bytes; raise it")
