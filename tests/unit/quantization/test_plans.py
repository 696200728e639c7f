"""No plan within a budget has a smaller summed KL."""

import ctypes
import itertools

import numpy as np
import pandas as pd
import pytest

from medkit.quantization import plans
from medkit.stage import MedkitError

OUTSIDE = ["model.embed_tokens", "lm_head"]
LINEAR = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.up_proj": (128, 64)}
BITS = {"unquantized": 16, "int8": 8, "nf4": 4}


def make_shapes(layers=3, tied=False):
    inner = {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in LINEAR.items()}
    return {OUTSIDE[0]: (300, 64), **inner} | ({} if tied else {OUTSIDE[1]: (300, 64)})


def make_choices(shapes, seed=0):
    """A table as `measure_sensitivity` makes it: random KL, larger for fewer bits."""
    draw, rows = np.random.default_rng(seed), []
    for (module, (columns, width)), (scheme, bits) in itertools.product(shapes.items(), BITS.items()):
        kl = 0.0 if scheme == "unquantized" else draw.exponential(1e-3) * 4 ** (8 - bits)
        rows.append((module, scheme, kl, columns * width * bits // 8))
    return pd.DataFrame(rows, columns=["module", "scheme", "kl_nats", "bytes"])


def totals(choices, plan):
    taken = choices.set_index(["module", "scheme"]).loc[list(plan.schemes.items())]
    return taken.kl_nats.sum(), int(taken.bytes.sum())


@pytest.fixture
def choices():
    return make_choices(make_shapes())


def least_and_most(choices):
    by_module = choices.groupby("module").bytes
    return int(by_module.min().sum()), int(by_module.max().sum())


def test_nf4_spares_the_ends_and_the_papers_plan_has_8_bits_in_attention():
    shapes = make_shapes()
    for ends in BITS:
        plan = plans.nf4_plan(shapes, ends).schemes
        assert plan == {m: ends if m in OUTSIDE else "nf4" for m in shapes}
    scheme_of = {"self_attn": "int8", "mlp": "nf4"}
    paper = plans.paper_plan(shapes).schemes
    assert paper == {m: "unquantized" if m in OUTSIDE else scheme_of[m.split(".")[3]] for m in shapes}


def test_budget_plan_is_the_best_of_all_plans():
    choices = make_choices({m: s for m, s in make_shapes(layers=2).items() if m not in OUTSIDE})
    by_module = [rows[["kl_nats", "bytes"]].to_numpy() for _, rows in choices.groupby("module")]
    every = np.array([np.sum(picked, axis=0) for picked in itertools.product(*by_module)])
    least, most = least_and_most(choices)
    for budget in np.linspace(least, most, 9).astype(int):
        kl, size = totals(choices, plans.budget_plan(choices, budget))
        assert size <= budget
        assert kl == pytest.approx(every[every[:, 1] <= budget, 0].min(), rel=1e-9, abs=1e-15)


def test_the_solver_prints_nothing(capfd):
    """With presolve it prints "HighsMipSolverData::transformNewIntegerFeasibleSolution" here, whatever `disp` says."""
    linear = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "gate": (1536, 576)}
    linear |= {"up": (1536, 576), "down": (576, 1536)}  # of SmolLM2-135M
    inner = {f"model.layers.{n}.{name}": shape for n in range(24) for name, shape in linear.items()}
    choices = make_choices({OUTSIDE[0]: (49152, 576), **inner}, seed=3)
    scales = (choices.bytes * 0.004).astype(int) + 7
    choices.bytes += scales.where(choices.scheme != "unquantized", 0)
    flush = ctypes.CDLL(None).fflush  # the buffer of C's printf, which Python does not know
    flush(None), capfd.readouterr()
    plans.budget_plan(choices, int(0.35 * least_and_most(choices)[1]))
    flush(None)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_the_choice_does_not_depend_on_the_unit_of_kl(choices, scale):
    budget = sum(least_and_most(choices)) // 2
    same = plans.budget_plan(choices.assign(kl_nats=choices.kl_nats * scale), budget)
    assert same == plans.budget_plan(choices, budget)


@pytest.mark.parametrize("share", [0.3, 0.77])
def test_a_random_plan_leaves_no_room_and_is_no_better_than_the_budgeted_one(choices, share):
    least, most = least_and_most(choices)
    budget, by_scheme = int(least + share * (most - least)), choices.set_index(["module", "scheme"]).bytes
    best, _ = totals(choices, plans.budget_plan(choices, budget))
    for seed in range(8):
        plan = plans.random_plan(choices, budget, seed)
        kl, size = totals(choices, plan)
        now = choices.module.map(by_scheme.loc[list(plan.schemes.items())].droplevel(1))
        assert size <= budget and not ((choices.bytes > now) & (choices.bytes - now <= budget - size)).any()
        assert best <= kl * (1 + 1e-9)


def test_a_budget_that_nothing_meets_is_an_error(choices):
    least, _ = least_and_most(choices)
    assert totals(choices, plans.budget_plan(choices, least))[1] == least
    for choose in (lambda b: plans.budget_plan(choices, b), lambda b: plans.random_plan(choices, b, 0)):
        with pytest.raises(MedkitError, match=f"{least - 1} bytes: the smallest plan takes {least}"):
            choose(least - 1)
