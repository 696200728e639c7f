"""Low-rank adapters: attach, train, merge, and measure the update."""

from medkit.lora.adapters import (
    attach,
    count_parameters,
    load_adapter,
    load_merged,
    merge,
    rank_of_energy,
    singular_values,
    train_adapter,
    truncate,
)
from medkit.lora.plots import plot_changes, plot_spectrum, tabulate_spectrum
