"""What the 7B benchmark says of what it measured: ratios of a committed run, and one that goes on. Nothing is timed."""

import importlib
import json
import sys
from unittest.mock import MagicMock

import pytest

from medkit.stage import ROOT

RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = sorted(RESULTS.glob("shape7b*.json"))


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setitem(sys.modules, "matvec", MagicMock())  # GPU kernels, which no test here runs, ask for triton
        yield importlib.import_module("shape7b")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name.partition(".")[0])
def test_a_committed_run_goes_on_and_its_ratios_follow_from_what_it_measured(benchmark, path):
    record = json.loads(path.read_text())
    raw, told = benchmark.resume(path)
    found = benchmark.ratios(raw["contenders"], raw["prefill_attention"], record["setup"]["repeats"])
    assert {name: vars(ratio) for name, ratio in found.items()} == record["ratios"]
    assert raw["copy_bandwidth_bytes_per_s"] > 1e12
    assert told["resumed"]["versions"] == record["setup"]["versions"]
    assert told.get("note") == record["setup"].get("note")


def measured(memory, latency, ok=True):
    return {"generation_peak_bytes": memory, "latency_s_per_token": latency, "check": {"ok": ok}}


def test_the_plan_is_held_to_the_goals(benchmark):
    base = measured(100, 1.0)
    found = benchmark.ratios({"bf16_eager": base, "plan": measured(29, 0.5)}, {}, 5)
    assert found["plan/total_memory_below_bf16_eager"] == benchmark.Ratio(1 - 29 / 100, 0.70, "higher", 5)
    assert found["plan/latency_below_bf16_eager"] == benchmark.Ratio(0.5, 0.60, "higher", 5)
    for plan in ({"error": "not run"}, measured(29, 0.5, ok=False)):
        assert benchmark.ratios({"bf16_eager": base, "plan": plan}, {}, 5) == {}


def test_every_attention_kernel_is_compared_with_eager_in_both_phases(benchmark):
    times = {"eager": (8.0, 3.0), "sdpa": (2.0, 1.5), "flash_attention_2": (1.0, 1.0)}
    entries = {name: {"prefill_s": prefill, "decode_s": decode} for name, (prefill, decode) in times.items()}
    found = benchmark.ratios({}, {"layers": 4, "8192": entries}, 5)
    assert {name: ratio.value for name, ratio in found.items()} == {
        "sdpa_prefill_speedup_at_8192": 4.0,
        "sdpa_decode_speedup_at_8192": 2.0,
        "flash_attention_2_prefill_speedup_at_8192": 8.0,
        "flash_attention_2_decode_speedup_at_8192": 3.0,
    }
    assert benchmark.ratios({}, {"error": "out of memory"}, 5) == {}
