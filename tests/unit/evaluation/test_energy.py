"""What answers cost: the arithmetic by hand, and one real tracker that may reach neither network nor disk."""

import logging
import math
import socket
import time
from types import SimpleNamespace

import pandas as pd
import pytest

from medkit.evaluation import energy
from medkit.evaluation.energy import EnergyError
from medkit.statistics import wilson

PRICES = {"price_per_kwh": 0.25, "machine_price_per_hour": 2.0, "confidence": 0.95}


def measured(**changes):
    row = {
        "variant": "lora", "answers": 200, "correct": 50, "energy_kwh": 0.004, "duration_s": 90.0,
        "method": "estimated: CPU",
    }  # fmt: skip
    return pd.DataFrame([{**row, **changes}])


def values(table):
    return table.set_index("metric").value


# --- the table -----------------------------------------------------------------------------------------------------


def test_a_case_worked_by_hand():
    found = values(energy.cost_table(measured(), **PRICES))
    # 4 Wh over 200 answers, 50 right; 0.004 · 0.25 + 90/3600 · 2 = 0.051
    assert found.to_dict() == pytest.approx({
        "energy_wh_per_1000_answers": 20.0,
        "energy_wh_per_correct_answer": 0.08,
        "cost_per_1000_answers": 0.255,
        "cost_per_correct_answer": 0.00102,
    })  # fmt: skip


def test_the_columns_and_what_they_carry():
    table = energy.cost_table(pd.concat([measured(), measured(variant="nf4", method="metered: GPU")]), **PRICES)
    assert list(table) == ["variant", "metric", "value", "ci_low", "ci_high", "n", "unit", "method"]
    assert table.groupby("variant").metric.nunique().to_dict() == {"lora": 4, "nf4": 4}
    assert table.groupby("variant").method.first().to_dict() == {"lora": "estimated: CPU", "nf4": "metered: GPU"}
    assert set(table.n) == {200}


def test_the_interval_is_that_of_the_accuracy():
    table = energy.cost_table(measured(), **PRICES).set_index("metric")
    low, high = wilson(50, 200, 0.95)
    row = table.loc["energy_wh_per_correct_answer"]
    assert (row.ci_low, row.ci_high) == pytest.approx((4 / 200 / high, 4 / 200 / low))
    assert row.ci_low < row.value < row.ci_high
    assert (
        table.loc[["energy_wh_per_1000_answers", "cost_per_1000_answers"], ["ci_low", "ci_high"]].isna().all(axis=None)
    )


def test_all_correct_is_the_lower_end():
    row = energy.cost_table(measured(correct=200), **PRICES).set_index("metric").loc["cost_per_correct_answer"]
    assert row.ci_low == pytest.approx(row.value) and row.ci_high > row.value


def test_more_energy_time_and_price_cost_more_and_more_right_answers_less():
    base = values(energy.cost_table(measured(), **PRICES)).cost_per_correct_answer
    for worse in (measured(energy_kwh=0.005), measured(duration_s=91), measured(correct=49)):
        assert values(energy.cost_table(worse, **PRICES)).cost_per_correct_answer > base
    for price in ("price_per_kwh", "machine_price_per_hour"):
        assert values(energy.cost_table(measured(), **{**PRICES, price: 3.0})).cost_per_correct_answer > base


def test_twice_the_work_costs_the_same_each():
    twice = measured(answers=400, correct=100, energy_kwh=0.008, duration_s=180.0)
    once, doubled = (values(energy.cost_table(t, **PRICES)) for t in (measured(), twice))
    assert once.to_dict() == pytest.approx(doubled.to_dict())


def test_without_a_correct_answer_there_is_no_price_of_one():
    table = energy.cost_table(measured(correct=0), **PRICES).set_index("metric")
    assert table.loc["cost_per_correct_answer", ["value", "ci_low", "ci_high"]].isna().all()
    assert table.value.cost_per_1000_answers == pytest.approx(0.255)


def test_what_was_not_measured_has_no_cost():
    assert values(energy.cost_table(measured(energy_kwh=math.nan), **PRICES)).isna().all()


@pytest.mark.parametrize("price", [-0.01, math.nan, math.inf])
@pytest.mark.parametrize("name", ["price_per_kwh", "machine_price_per_hour"])
def test_impossible_prices_are_refused(name, price):
    with pytest.raises(EnergyError, match=name):
        energy.cost_table(measured(), **{**PRICES, name: price})


@pytest.mark.parametrize("wrong", [{"answers": 0, "correct": 0}, {"correct": 201}, {"energy_kwh": -1.0}])
def test_impossible_counts_are_refused(wrong):
    with pytest.raises(EnergyError, match="lora"):
        energy.cost_table(measured(**wrong), **PRICES)


# --- the tracker ---------------------------------------------------------------------------------------------------


@pytest.fixture
def closed(monkeypatch, tmp_path):
    """An empty folder to work in, a home with a config that asks for files and uploads, and no network."""
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    asked = ["output_methods = csv,api", "emissions_endpoint = http://127.0.0.1:9", "allow_multiple_runs = false"]
    asked += ["country_iso_code = FRA", "country_2letter_iso_code = FR", "electricitymaps_api_token = token"]
    (home / ".codecarbon.config").write_text("\n".join(["[codecarbon]", *asked]))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(work))
    monkeypatch.chdir(work)
    opened = []

    def refuse(*address):
        opened.append(address)
        raise OSError(f"no network in tests: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **more: refuse(*address))
    yield SimpleNamespace(work=work, opened=opened)
    assert opened == []
    assert list(work.iterdir()) == []


def busy(seconds: float) -> float:
    started, before = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        pass
    return time.process_time() - before


def test_a_real_block_is_metered_quietly_and_leaves_nothing(closed, capfd):
    with energy.meter() as used:
        assert math.isnan(used.energy_kwh)
        busy(0.6)
    assert used.energy_kwh > 0
    assert 0.6 <= used.duration_s < 5
    assert used.method.startswith("estimated: " if used.estimated else "metered: ")
    assert "CPU" in used.method and "RAM" in used.method
    assert used.energy_kwh * energy.JOULES_PER_KWH / used.duration_s < 5000  # watts of one machine
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("codecarbon").isEnabledFor(logging.WARNING)


def test_a_block_that_fails_is_still_metered_and_fails(closed):
    with pytest.raises(KeyError, match="ours"), energy.meter() as used:
        busy(0.2)
        raise KeyError("ours")
    assert used.energy_kwh > 0


def test_a_meter_may_run_inside_another(closed):
    with energy.meter() as whole:
        with energy.meter() as part:
            busy(0.2)
        busy(0.2)
    assert 0 < part.energy_kwh < whole.energy_kwh


def test_a_tracker_that_cannot_start_costs_no_result(closed, monkeypatch):
    monkeypatch.setattr("codecarbon.core.resource_tracker.ResourceTracker.set_CPU_GPU_ram_tracking", lambda self: 1 / 0)
    with energy.meter() as used:
        answer = busy(0.1)
    assert answer > 0 and used.duration_s > 0
    assert math.isnan(used.energy_kwh) and used.method == "not measured" and used.estimated


def device(kind, **values):
    return type(kind, (), values)()


def test_the_method_names_meters_and_constants():
    watts = device("Power", W=10.0)
    ram = device("RAM", total_power=lambda self: watts)
    rated, metered = device("CPU", _mode="cpu_load", _tdp=65), device("CPU", _mode="intel_rapl", _tdp=65)
    gpu = device("GPU", devices=SimpleNamespace(devices=[device("NvidiaGPUDevice")] * 2))
    assert energy._describe([ram, rated]) == (
        "estimated: RAM from 10 W for its size, CPU from 65 W at full load and this process's share of it", True
    )  # fmt: skip
    assert energy._describe([ram, metered, gpu]) == (
        "estimated: RAM from 10 W for its size, CPU by RAPL, GPU by NVML", True
    )  # fmt: skip
    assert energy._describe([metered, gpu]) == ("metered: CPU by RAPL, GPU by NVML", False)
