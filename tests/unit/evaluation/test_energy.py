"""What answers cost: the arithmetic by hand, and one real tracker that may reach neither network nor disk."""

import logging
import math
import time

import pandas as pd
import pytest

from medkit.evaluation import energy

PRICES = {"price_per_kwh": 0.25, "machine_price_per_hour": 2.0}


def test_a_case_worked_by_hand_with_the_interval_of_the_accuracy():
    row = {"variant": "lora", "answers": 200, "energy_kwh": 0.004, "duration_s": 90.0, "method": "CPU"}
    row |= {"accuracy": 0.25, "ci_low": 0.2, "ci_high": 0.32}
    table = energy.cost_table(pd.DataFrame([row]), **PRICES).set_index("metric")
    # 4 Wh over 200 answers, 50 right; 0.004 · 0.25 + 90/3600 · 2 = 0.051
    by_hand = {"energy_wh_per_correct_answer": 0.08, "cost_per_correct_answer": 0.00102}
    assert table.value.to_dict() == pytest.approx(by_hand)
    energy_row = table.loc["energy_wh_per_correct_answer"]
    assert (energy_row.ci_low, energy_row.ci_high) == pytest.approx((4 / 200 / 0.32, 4 / 200 / 0.2))
    no_end = energy.cost_table(pd.DataFrame([row | {"ci_low": 0.0}]), **PRICES)
    assert no_end.ci_high.isna().all() and no_end.ci_low.notna().all()
    none = energy.cost_table(pd.DataFrame([row | {"accuracy": 0.0, "ci_low": 0.0}]), **PRICES)
    assert none[["value", "ci_low", "ci_high"]].isna().all(axis=None)


@pytest.fixture
def closed(monkeypatch, no_network, tmp_path):
    """An empty folder to work in, a home with a config that asks for files and uploads, and no network."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    asked = ["output_methods = csv,api", "emissions_endpoint = http://127.0.0.1:9", "allow_multiple_runs = false"]
    asked += ["country_iso_code = FRA", "country_2letter_iso_code = FR", "electricitymaps_api_token = token"]
    (home / ".codecarbon.config").write_text("\n".join(["[codecarbon]", *asked]))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(work))
    monkeypatch.chdir(work)
    yield
    assert no_network == [] and list(work.iterdir()) == []


def busy(seconds: float) -> float:
    started, before = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        pass
    return time.process_time() - before


def test_a_real_block_is_metered_quietly_and_leaves_nothing(closed, capfd):
    with energy.meter() as used:
        assert math.isnan(used.energy_kwh)
        busy(0.3)
    assert used.energy_kwh > 0
    assert 0.3 <= used.duration_s < 5
    assert used.method.startswith("estimated: ")
    assert "CPU" in used.method and "RAM" in used.method
    assert used.energy_kwh * 3.6e6 / used.duration_s < 5000  # watts of one machine
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("codecarbon").isEnabledFor(logging.WARNING)


def test_a_tracker_that_cannot_start_costs_no_result(closed, monkeypatch):
    monkeypatch.setattr("codecarbon.core.resource_tracker.ResourceTracker.set_CPU_GPU_ram_tracking", lambda self: 1 / 0)
    with energy.meter() as used:
        answer = busy(0.1)
    assert answer > 0 and used.duration_s > 0
    assert math.isnan(used.energy_kwh) and used.method == "not measured"
