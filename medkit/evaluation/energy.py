"""Energy of a block of work, and what 1,000 answers and one correct answer cost in energy and money.

codecarbon meters what the hardware lets it read and takes the rest from constants; `method` says which. It counts this
process: its share of the processor's time and its memory, not the machine's idle power, fans, disks or other tenants.
A meter on the chip (RAPL, NVML) cannot tell processes apart: what it reads is everyone's. No CO₂ here: it hangs on the
grid that feeds the machine, and where that stands is not known. No network is asked and no file written.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd

from medkit.stage import MedkitError
from medkit.statistics import wilson

METERED_CPU = {
    "intel_rapl": "RAPL",
    "intel_power_gadget": "Power Gadget",
    "windows_emi": "the Windows energy meter",
}  # codecarbon's modes of a processor that read a meter; the others use its rated watts
METERED_GPU = {"NvidiaGPUDevice": "NVML", "AMDGPUDevice": "AMD SMI"}
JOULES_PER_KWH = 3.6e6
NOT_MEASURED = "not measured"


class EnergyError(MedkitError):
    """Counts or prices no cost can be made of."""


@dataclass
class Energy:
    """What a block used; filled when it ends. NaN and `not measured` if codecarbon could not start or finish.

    `method` names the meter or the constant behind each part. `estimated` unless every part was read from a meter.
    """

    energy_kwh: float = math.nan
    duration_s: float = math.nan
    method: str = NOT_MEASURED
    estimated: bool = True


@contextmanager
def meter() -> Iterator[Energy]:
    """Measure what runs inside: `with energy.meter() as used: …`, then read `used`.

    Blocks under a second are mostly rounding: processor time comes in ticks of 10 ms. The first use in a process looks
    the hardware up (one to three seconds, before the clock starts); later ones start at once.
    """
    # imported where it is used: reading a cost table needs no tracker
    from codecarbon import OfflineEmissionsTracker

    used = Energy()
    # it warns about its own defaults before `log_level` is read
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    tracker = OfflineEmissionsTracker(
        # of the machine, a neighbour's load would be charged to the variant that happened to run beside it
        tracking_mode="process",
        # nothing leaves this process, whatever a .codecarbon.config asks for: no file, no upload, no price of CO₂
        output_methods=[],
        output_handlers=[],
        emissions_endpoint=None,
        cloud_provider=None,
        force_carbon_intensity_g_co2e_kwh=0.0,  # it asks a server or looks a country up otherwise
        allow_multiple_runs=True,  # a lock file otherwise
        log_level="critical",
    )
    tracker.start()
    started = time.perf_counter()
    try:
        yield used
    finally:
        used.duration_s = time.perf_counter() - started
        tracker.stop()  # logs what goes wrong and raises nothing: a finished run is not lost to its meter
        found = getattr(tracker, "final_emissions_data", None)
        if found is not None:
            used.energy_kwh = found.energy_consumed
            used.method, used.estimated = _describe(tracker._hardware)


def _describe(hardware: list) -> tuple[str, bool]:
    """How each part of the machine was metered, in words, and whether any part rests on a constant."""
    parts, estimated = [], False
    for part in hardware:
        kind, mode = type(part).__name__, getattr(part, "_mode", None)
        if kind == "CPU" and mode in METERED_CPU:
            parts.append(f"CPU by {METERED_CPU[mode]}")
        elif kind == "GPU":
            meters = {METERED_GPU.get(type(device).__name__, "its driver") for device in part.devices.devices}
            parts.append(f"GPU by {' and '.join(sorted(meters))}")
        elif kind in ("AppleSiliconChip", "Raspberry"):
            parts.append(f"{part.chip_part} by the board's meter")
        elif kind == "CPU":
            estimated = True
            parts.append(f"CPU from {part._tdp:g} W at full load and this process's share of it")
        else:
            estimated = True
            parts.append(f"{kind} from {part.total_power().W:g} W for its size")
    return f"{'estimated' if estimated else 'metered'}: {', '.join(parts)}", estimated


def cost_table(
    measured: pd.DataFrame, price_per_kwh: float, machine_price_per_hour: float, confidence: float
) -> pd.DataFrame:
    """Energy and money per 1,000 answers and per correct answer; one row per variant and metric.

    `measured` has a row per variant: variant, answers, correct, energy_kwh, duration_s, method. Cost is
    energy_kwh · price_per_kwh + duration_s / 3600 · machine_price_per_hour, in the currency of the prices: set the
    first price to 0 where the rent of the machine includes its power. Columns: variant, metric, value, ci_low, ci_high,
    n, unit, method. Per correct answer the interval is the value at the two ends of the Wilson interval of the
    accuracy (the sampling of questions, not the error of the meter); per 1,000 answers there is none, so NaN. With no
    correct answer there is no price of one: NaN. Raises EnergyError for negative prices and impossible counts.
    """
    for name, price in (("price_per_kwh", price_per_kwh), ("machine_price_per_hour", machine_price_per_hour)):
        if not 0 <= price < math.inf:
            raise EnergyError(f"{name} is {price}: give a price of zero or more")
    rows = []
    for row in measured.itertuples():
        answers, correct = int(row.answers), int(row.correct)
        if not 0 <= correct <= answers or answers == 0:
            raise EnergyError(f"{row.variant}: {correct} correct of {answers} answers; give counts of one run")
        if row.energy_kwh < 0 or row.duration_s < 0:
            raise EnergyError(f"{row.variant}: {row.energy_kwh} kWh in {row.duration_s} s; neither can be below zero")
        cost = row.energy_kwh * price_per_kwh + row.duration_s / 3600 * machine_price_per_hour
        low, high = wilson(correct, answers, confidence)
        for name, total, unit in (("energy_wh", 1000 * row.energy_kwh, "Wh"), ("cost", cost, "currency")):
            each = total / answers
            of_correct = (answers / correct, 1 / high, 1 / low) if correct else (math.nan,) * 3
            rows.append((row.variant, f"{name}_per_1000_answers", 1000 * each, math.nan, math.nan, answers, unit))
            rows.append((row.variant, f"{name}_per_correct_answer", *(each * f for f in of_correct), answers, unit))
    names = ["variant", "metric", "value", "ci_low", "ci_high", "n", "unit"]
    table = pd.DataFrame(rows, columns=names)
    return table.merge(measured[["variant", "method"]], on="variant", how="left", validate="many_to_one")
