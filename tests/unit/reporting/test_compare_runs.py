"""Two runs: known flips give known differences, a run equals itself, and nothing is said to differ that does not."""

import json

import pandas as pd
import pytest

from medkit.reporting import compare_runs
from medkit.stage import StageError
from medkit.statistics import paired_difference

PARAMS = {
    "evaluation": {"confidence": 0.95, "power": 0.8, "margin": 0.05},
    "seed": 0,
    "lora": {"adapter": {"rank": 16, "target_modules": ["q_proj", "v_proj"]}, "train": {"epochs": 0.5}},
    "data": {"datasets": {"exam": {"test": 400}}},
}


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
    def make(name, table=None, params=PARAMS, **facts):
        folder = tmp_path / name
        (folder / "06_evaluation").mkdir(parents=True)
        if table is not None:
            table.to_parquet(folder / compare_runs.JUDGED)
        rows = [{"result": "accuracy/exam", "variant": "lora", "metric": "", "value": 0.5}]
        facts = {"run": name, "headline_source": "exam", "headline_scoring": "letter", "device": "toy", "date": "now",
                 "git_commit": "c0ffee", "versions": {"torch": "2.0"}, "params": params, **facts}  # fmt: skip
        (folder / "results.json").write_text(json.dumps({**facts, "results": rows}))
        return folder

    return make


def test_known_flips_are_found_with_their_sign(run):
    flips = [*range(1, 101, 2), 0, 2, 4]  # 50 wrong ones turn right, 3 right ones wrong
    deltas = compare_runs.compare(run("a", judged()), run("b", judged(flips=flips))).deltas.set_index("variant")
    assert deltas.difference.to_dict() == {"lora": 0.0, "nf4": 47 / 400}
    assert (deltas.gained["nf4"], deltas.lost["nf4"], deltas.n["nf4"]) == (50, 3, 400)
    assert (deltas.accuracy_a["nf4"], deltas.accuracy_b["nf4"]) == (0.5, 247 / 400)
    assert deltas.verdict.to_dict() == {"lora": "equivalent", "nf4": "better"}
    ours, theirs = judged(flips=flips).correct[400:], judged().correct[400:]
    alone = paired_difference(ours, theirs, 0.95, 0.8)
    assert (deltas.ci_low["nf4"], deltas.ci_high["nf4"]) == (alone["ci_low"], alone["ci_high"])


def test_only_questions_of_both_are_paired(run):
    a, b = judged(range(300)), judged(range(100, 450), variants=("lora", "nf4", "edge"))
    found = compare_runs.compare(run("a", a), run("b", b))
    assert set(found.deltas.variant) == {"lora", "nf4"}
    assert (found.deltas.n == 200).all()
    assert "Only one of the runs has: edge/exam/letter." in compare_runs.comparison_text(found)
    text = compare_runs.comparison_text(compare_runs.compare(run("c", judged()), run("d", judged(flips=[1]))))
    assert "**1 of 2 accuracies are not the same.**" in text and "to the digit" not in text
    itself = compare_runs.compare(run("e", judged()), run("f", judged()))
    assert "All 2 accuracies are the same to the digit." in compare_runs.comparison_text(itself)


def test_runs_without_a_common_question_are_refused_in_one_sentence(run):
    with pytest.raises(StageError, match=r"\A.*no common question.*\Z"):
        compare_runs.compare(run("a", judged(range(10))), run("b", judged(range(10, 20))))
    with pytest.raises(StageError, match=r"--run d --from 06_evaluation"):
        compare_runs.compare(run("c", judged()), run("d"))


def test_changed_settings_and_versions_are_found_and_nothing_else(run):
    other = json.loads(json.dumps(PARAMS))
    other["lora"]["adapter"]["rank"] = 4
    other["data"]["datasets"]["exam2"] = {"test": 5}
    b = run("b", judged(), params=other, device="other", versions={"torch": "2.1", "numpy": "2"})
    found = {row.setting: (row.a, row.b) for row in compare_runs.compare(run("a", judged()), b).differing.itertuples()}
    assert found == {
        "params.lora.adapter.rank": ("16", "4"), "params.data.datasets.exam2.test": ("–", "5"),
        "device": ("toy", "other"), "versions.torch": ("2.0", "2.1"), "versions.numpy": ("–", "2"),
    }  # fmt: skip
