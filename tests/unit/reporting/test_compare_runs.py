"""Two runs: known flips give known differences, a run equals itself, and nothing is said to differ that does not."""

import json

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")

from medkit.reporting import compare_runs
from medkit.stage import DISCLAIMER, StageError
from medkit.statistics import paired_difference

SETTINGS = (0.95, 0.8, 0.05)
PARAMS = {
    "seed": 0,
    "lora": {"adapter": {"rank": 16, "target_modules": ["q_proj", "v_proj"]}, "train": {"epochs": 0.5}},
    "data": {"datasets": {"exam": {"test": 400}}},
}
COSTS = [
    ("memory_bytes/weights", "lora", 200e6),
    ("memory_bytes/weights", "nf4", 100e6),
    ("latency_s_per_token", "lora", 0.05),
    ("latency_s_per_token", "nf4", 0.04),
]


def judged(ids=range(400), flips=(), variants=("lora", "nf4"), source="exam") -> pd.DataFrame:
    """Every second question right, those in `flips` the other way round for nf4."""
    rows = [
        (variant, source, "letter", f"{source}-{i}", f"g{i}", (i % 2 == 0) != (variant == "nf4" and i in flips))
        for variant in variants
        for i in ids
    ]
    return pd.DataFrame(rows, columns=["variant", "source", "scoring", "id", "group", "correct"])


@pytest.fixture
def run(tmp_path):
    def make(name, table=None, costs=COSTS, params=PARAMS, **facts):
        folder = tmp_path / name
        (folder / "06_evaluation").mkdir(parents=True)
        if table is not None:
            table.to_parquet(folder / compare_runs.JUDGED)
        claims = [{"claim": c, "variant": v, "metric": "", "value": x} for c, v, x in costs]
        facts = {"run": name, "headline_source": "exam", "headline_scoring": "letter", "device": "toy", "date": "now",
                 "git_commit": "c0ffee", "versions": {"torch": "2.0"}, "params": params, **facts}  # fmt: skip
        (folder / "results.json").write_text(json.dumps({**facts, "claims": claims}))
        return folder

    return make


def compared(a, b) -> compare_runs.Comparison:
    return compare_runs.compare_runs(a, b, *SETTINGS)


# --- answers -------------------------------------------------------------------------------------------------------


def test_a_run_equals_itself(run):
    folder = run("a", pd.concat([judged(), judged(range(8), source="few")]))
    found = compared(folder, folder)
    assert (found.deltas.difference == 0).all()
    assert (found.deltas[["gained", "lost"]] == 0).all(axis=None)
    verdict = found.deltas.set_index(["source", "variant"]).verdict
    assert verdict["exam", "nf4"] == "equivalent"
    assert verdict["few", "nf4"] == "not detectable"  # eight questions show nothing
    assert found.params.empty
    assert found.environment.empty
    assert (found.coverage[["only_a", "only_b"]] == 0).all(axis=None)
    assert (found.costs.ratio_a == found.costs.ratio_b).all()


def test_known_flips_are_found_with_their_sign(run):
    flips = [*range(1, 101, 2), 0, 2, 4]  # 50 wrong ones turn right, 3 right ones wrong
    deltas = compared(run("a", judged()), run("b", judged(flips=flips))).deltas.set_index("variant")
    assert deltas.difference.to_dict() == {"lora": 0.0, "nf4": 47 / 400}
    assert (deltas.gained["nf4"], deltas.lost["nf4"], deltas.n["nf4"]) == (50, 3, 400)
    assert (deltas.accuracy_a["nf4"], deltas.accuracy_b["nf4"]) == (0.5, 247 / 400)
    assert deltas.verdict.to_dict() == {"lora": "equivalent", "nf4": "better"}
    ours, theirs = judged(flips=flips).correct[400:], judged().correct[400:]
    alone = paired_difference(ours, theirs, *SETTINGS[:2])
    assert (deltas.ci_low["nf4"], deltas.ci_high["nf4"]) == (alone["ci_low"], alone["ci_high"])


def test_turned_round_the_signs_turn(run):
    a, b = run("a", judged()), run("b", judged(flips=range(1, 101, 2)))
    there, back = compared(a, b).deltas, compared(b, a).deltas
    assert (there.difference == -back.difference).all()
    assert back.verdict[back.variant == "nf4"].item() == "worse"


def test_holm_runs_over_all_rows(run):
    b = pd.concat([judged(flips=range(1, 31, 4)), *(judged(source=f"other{i}") for i in range(9))])
    a = pd.concat([judged(), *(judged(source=f"other{i}") for i in range(9))])
    deltas = compared(run("a", a), run("b", b)).deltas
    (one,) = deltas[deltas.gained > 0].itertuples()
    assert one.p_clustered < 0.05 < one.p_holm
    assert one.p_holm == pytest.approx(one.p_clustered * len(deltas))
    assert one.verdict not in ("better", "worse")


def test_near_duplicates_count_as_one(run):
    flips = range(1, 81, 2)
    a, b = judged(), judged(flips=flips)
    alone = compared(run("a", a), run("b", b)).deltas.set_index("variant")
    a["group"] = b["group"] = [f"g{int(i.rpartition('-')[2]) // 20}" for i in a.id]
    grouped = compared(run("c", a), run("d", b)).deltas.set_index("variant")
    assert grouped.p_clustered["nf4"] > alone.p_clustered["nf4"]
    assert grouped.design_effect["nf4"] > 1.5 > alone.design_effect["nf4"]


def test_only_questions_of_both_are_paired_and_the_others_counted(run):
    a, b = judged(range(300)), judged(range(100, 450), variants=("lora", "nf4", "edge"))
    found = compared(run("a", a), run("b", b))
    assert set(found.deltas.variant) == {"lora", "nf4"}
    assert (found.deltas.n == 200).all()
    counts = found.coverage.set_index("variant")[["both", "only_a", "only_b"]]
    assert counts.loc["nf4"].tolist() == [200, 100, 150]
    assert counts.loc["edge"].tolist() == [0, 0, 350]


def test_order_of_rows_does_not_matter(run):
    b = judged(flips=range(1, 31, 2))
    a = compared(run("a", judged()), run("b", b)).deltas
    mixed = compared(
        run("c", judged().sample(frac=1, random_state=1)), run("d", b.sample(frac=1, random_state=2))
    ).deltas
    pd.testing.assert_frame_equal(a, mixed)


def test_runs_without_a_common_question_are_refused_in_one_sentence(run):
    with pytest.raises(StageError, match="no question in common") as error:
        compared(run("a", judged(range(10))), run("b", judged(range(10, 20))))
    assert "\n" not in str(error.value)
    with pytest.raises(StageError, match="no question in common"):
        compared(run("c", judged(variants=["nf4"])), run("d", judged(variants=["lora"])))


def test_a_run_without_judged_answers_is_named_with_the_cure(run):
    with pytest.raises(StageError, match=r"--run b --from 06_evaluation"):
        compared(run("a", judged()), run("b"))


def test_a_run_without_results_is_named(run, tmp_path):
    with pytest.raises(StageError, match="nowhere"):
        compared(run("a", judged()), tmp_path / "nowhere")


def test_without_the_headline_the_largest_source_leads(run):
    table = pd.concat([judged(source="small", ids=range(9)), judged(source="large")])
    found = compared(run("a", table), run("b", table))
    assert (found.source, found.scoring) == ("large", "letter")
    assert len(compare_runs.headline(found)) == 2


# --- costs and settings --------------------------------------------------------------------------------------------


def test_times_are_never_divided_between_runs(run):
    slower = [(c, v, x * (3 if c.startswith("latency") else 2)) for c, v, x in COSTS]
    costs = compared(run("a", judged()), run("b", judged(), costs=slower)).costs.set_index(["claim", "variant"])
    assert costs.b_over_a["memory_bytes/weights", "nf4"] == 2
    assert np.isnan(costs.b_over_a["latency_s_per_token", "nf4"])
    assert costs.ratio_a.tolist() == pytest.approx(costs.ratio_b.tolist())
    assert costs.ratio_a["latency_s_per_token", "nf4"] == pytest.approx(0.8)
    assert costs.b["latency_s_per_token", "lora"] == pytest.approx(0.15)


def test_a_cost_of_one_run_stands_alone(run):
    costs = compared(run("a", judged()), run("b", judged(), costs=COSTS[:1])).costs
    assert costs.claim.tolist() == ["memory_bytes/weights"] * 2 + ["latency_s_per_token"] * 2
    assert costs.b.isna().tolist() == [False, True, True, True]


def test_a_nested_change_of_settings_is_found_and_nothing_else(run):
    other = json.loads(json.dumps(PARAMS))
    other["lora"]["adapter"]["rank"] = 4
    other["data"]["datasets"]["exam2"] = {"test": 5}
    found = compared(run("a", judged()), run("b", judged(), params=other)).params
    assert found.to_numpy().tolist() == [["lora.adapter.rank", "16", "4"], ["data.datasets.exam2.test", "–", "5"]]


def test_another_machine_and_version_are_named(run):
    b = run("b", judged(), device="other", versions={"torch": "2.1", "numpy": "2"})
    found = compared(run("a", judged()), b).environment
    assert found.to_numpy().tolist() == [
        ["device", "toy", "other"], ["torch version", "2.0", "2.1"], ["numpy version", "–", "2"],
    ]  # fmt: skip


# --- for people ----------------------------------------------------------------------------------------------------


def test_what_is_written_holds_every_section_and_delta(run, tmp_path):
    found = compared(run("a", judged()), run("b", judged(flips=range(1, 101, 2))))
    path = compare_runs.write_comparison(found, tmp_path / "out")
    text = path.read_text()
    assert DISCLAIMER in text
    assert "1 better" in text
    assert "1 equivalent" in text
    assert f"{50 / 400:+.3f} [" in text
    assert "Times of two runs cannot be compared" in text
    for word in ("nan", "None", "NaN"):
        assert word not in text.replace("None, as far as the results tell.", "")
    names = ["comparison.md", "deltas.csv", *(f"headline_deltas.{e}" for e in ("csv", "png", "svg"))]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    written = pd.read_csv(tmp_path / "out" / "deltas.csv")
    assert written.difference.tolist() == found.deltas.difference.tolist()
    for line in text.splitlines():
        if line.startswith("|---"):
            assert set(line) == {"|", "-"}


def test_the_figure_shows_each_interval_and_verdict(run):
    found = compared(run("a", judged()), run("b", judged(flips=range(1, 101, 2))))
    shown, ax = compare_runs.headline(found), compare_runs.draw(found).axes[0]
    spans = [tuple(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) == 2 and line.get_lw() == 2.5]
    assert spans == list(zip(shown.ci_low, shown.ci_high, strict=True))
    assert [t.get_text() for t in ax.texts if t.get_text() != "after Holm:"] == shown.verdict.tolist()
    assert "b minus a" in ax.get_xlabel()
    assert "±0.05" in ax.get_xlabel()
