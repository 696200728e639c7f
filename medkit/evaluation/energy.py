"""Energy of a block of work, and what one correct answer costs in energy and money.

codecarbon reads a meter where the hardware has one (it counts what all processes use) and estimates the rest from rated
power and this process's share; `method` says which. Idle power, fans and disks are not in it. No network, no file.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd


@dataclass
class Energy:
    """What a block used, filled when it ends; NaN and `not measured` if codecarbon could not start or finish."""

    energy_kwh: float = math.nan
    duration_s: float = math.nan
    method: str = "not measured"


@contextmanager
def meter() -> Iterator[Energy]:
    """Measure a block: `with evaluation.meter() as used: …`, then read `used`.

    Blocks under a second are mostly rounding: processor time comes in ticks of 10 ms. The first use in a process looks
    for the hardware, which takes one to three seconds before the clock starts.
    """
    from codecarbon import OfflineEmissionsTracker
    from codecarbon.core.cpu import is_powergadget_available, is_rapl_available

    used = Energy()
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it warns before it reads `log_level`
    tracker = OfflineEmissionsTracker(
        tracking_mode="process",  # "machine" would charge a variant for whatever else ran at that time
        output_methods=[],  # no file and no upload, whatever a .codecarbon.config says
        output_handlers=[],
        emissions_endpoint=None,
        cloud_provider=None,
        force_carbon_intensity_g_co2e_kwh=0.0,  # otherwise it asks a server for the grid's CO₂
        allow_multiple_runs=True,  # otherwise it writes a lock file
        log_level="critical",
    )
    tracker.start()
    started = time.perf_counter()
    try:
        yield used
    finally:
        used.duration_s = time.perf_counter() - started
        tracker.stop()  # logs its errors and raises none, so a finished run is not lost
        if data := getattr(tracker, "final_emissions_data", None):
            used.energy_kwh = data.energy_consumed
            metered = is_rapl_available() or is_powergadget_available()
            cpu = "by its meter" if metered else "from its rated power and this process's share of it"
            gpu = ", GPU by its driver" if data.gpu_energy else ""
            used.method = f"estimated: CPU {cpu}{gpu}, RAM from {data.ram_power:.3g} W for its size"


def cost_table(measured: pd.DataFrame, price_per_kwh: float, machine_price_per_hour: float) -> pd.DataFrame:
    """Energy and money per correct answer; a row for each variant and metric.

    `measured`: one row per variant with answers, energy_kwh, duration_s, method, and accuracy, ci_low and ci_high of
    `accuracy.measure_accuracy`. cost = energy_kwh · price_per_kwh + duration_s / 3600 · machine_price_per_hour, in the
    currency of the prices; set the first to 0 where the rent includes power. Columns variant, metric, value, ci_low,
    ci_high, n, unit, method. The interval is the cost at the two ends of that of the accuracy; NaN at an end of 0.
    Without a correct answer all are NaN.
    """
    rows = []
    for row in measured.itertuples():
        cost = row.energy_kwh * price_per_kwh + row.duration_s / 3600 * machine_price_per_hour
        for name, total, unit in (("energy_wh", 1000 * row.energy_kwh, "Wh"), ("cost", cost, "currency")):
            shares = (row.accuracy, row.ci_high, row.ci_low)
            each = [total / row.answers / share if share and row.accuracy else math.nan for share in shares]
            rows.append((row.variant, f"{name}_per_correct_answer", *each, row.answers, unit, row.method))
    return pd.DataFrame(rows, columns=["variant", "metric", "value", "ci_low", "ci_high", "n", "unit", "method"])
