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


def test_a_figure_is_saved_with_its_table(tmp_path):
    plotting.save_figure(drawn(), tmp_path / "figures", "steps", TABLE)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["steps.csv", "steps.png", "steps.svg"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "figures/steps.csv"), TABLE)
    assert (tmp_path / "figures/steps.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figures/steps.svg").read_text()


def test_the_same_figure_is_the_same_bytes(tmp_path):
    for name in ("first", "second"):
        plotting.save_figure(drawn(), tmp_path, name, TABLE)
        plt.close("all")
    for ending in ("svg", "png", "csv"):
        assert (tmp_path / f"first.{ending}").read_bytes() == (tmp_path / f"second.{ending}").read_bytes(), ending


def test_every_variant_has_its_own_colour_and_label():
    assert len({to_rgb(colour) for colour in [v.colour for v in VARIANTS.values()]}) == len(VARIANTS)
    assert len({v.label for v in VARIANTS.values()}) == len(VARIANTS)
    assert {v for step in STEPS for v in step[:2]} <= set(VARIANTS)


def test_colours_of_compared_variants_can_be_told_apart():
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
