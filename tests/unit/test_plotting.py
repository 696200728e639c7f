"""One way to save a figure: three files, the same bytes for the same figure, a colour and a label for every variant."""

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

mpl.use("Agg")

import matplotlib.pyplot as plt

from medkit import plotting
from medkit.variants import STEPS, VARIANTS

TABLE = pd.DataFrame({"variant": ["teacher", "lora", "edge"], "accuracy": [0.8, 0.55, 0.5],
                      "ci_low": [0.7, 0.5, 0.42], "ci_high": [0.9, 0.6, 0.58], "n": [100, 100, 80]})  # fmt: skip


@pytest.fixture(autouse=True)
def style():
    with mpl.rc_context():
        plotting.set_style()
        yield
    plt.close("all")


def drawn():
    return plotting.plot_intervals(TABLE, "accuracy", "accuracy on exam, 95 % interval").figure


def test_a_figure_is_saved_with_its_table_and_the_same_figure_is_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        plotting.save_figure(drawn(), tmp_path / name, "steps", TABLE)
        plt.close("all")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second and sorted(first) == ["steps.csv", "steps.png", "steps.svg"]
    assert first["steps.png"].startswith(b"\x89PNG") and b"<svg" in first["steps.svg"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "first" / "steps.csv"), TABLE)


def test_every_variant_has_its_own_label_and_colours_of_compared_ones_can_be_told_apart():
    assert len({variant.label for variant in VARIANTS.values()}) == len(VARIANTS)
    assert len({to_rgb(variant.colour) for variant in VARIANTS.values()}) == len(VARIANTS)
    for variant, baseline, _ in STEPS:
        a, b = (to_rgb(VARIANTS[v].colour) for v in (variant, baseline))
        assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) > 0.05, (variant, baseline)


def test_intervals_show_value_n_and_what_is_measured():
    ax = plotting.plot_intervals(TABLE, "accuracy", "accuracy on exam")
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        f"{VARIANTS[v].label}  (n={n})" for v, n in zip(TABLE.variant, TABLE.n, strict=True)
    ]
    assert ax.get_xlabel() == "accuracy on exam"
    assert [text.get_text() for text in ax.texts] == ["0.80", "0.55", "0.50"]
    spans = [tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2]
    assert spans == list(zip(TABLE.ci_low, TABLE.ci_high, strict=True))
    bottom, top = ax.get_ylim()
    assert bottom > top  # the first row of the table stands on top
