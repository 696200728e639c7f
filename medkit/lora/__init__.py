"""Low-rank adapters: attach, train, merge, and look at the update."""

from medkit.lora.adapters import (
    adapter_rows,
    attach,
    check_targets,
    load_adapter,
    load_merged,
    merge,
    singular_values,
    train_adapter,
)
from medkit.lora.plots import plot_changes, plot_rates, plot_spectrum, tabulate_spectrum
