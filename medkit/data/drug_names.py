"""Common drugs: generic name, brand name, and another drug that a reader may mistake it for."""

from pathlib import Path

import pandas as pd

DRUGS: list[tuple[str, str, str]] = list(
    pd.read_csv(Path(__file__).with_name("drug_names.csv")).itertuples(index=False, name=None)
)
