"""A finished run's folder, small and made up: what tests of the report need, in a browser and without one."""

import base64
import json

import nbformat
import numpy as np
import pandas as pd
import pytest

SCRIPT = "<script>window.attacked = true</script>"
BREAKOUT = "</script><img src=x onerror='window.attacked = true'>"
VARIANTS = ["teacher_base", "teacher", "base", "student_ce", "student_kd", "lora", "nf4", "edge"]


@pytest.fixture(scope="session")
def make_run():
    """run(folder, num_questions=60): every kind of file the report reads; texts try to break out of the page."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from medkit import plotting
    from medkit.reporting import tables
    from medkit.stage import DISCLAIMER
    from medkit.variants import STEPS

    def make(folder, num_questions=60):
        draw = np.random.default_rng(0)
        questions = _questions(num_questions)
        (folder / "01_data").mkdir(parents=True)
        questions.to_parquet(folder / "01_data/questions.parquet", index=False)

        choices = {v: draw.integers(-2, questions.options.map(len).to_numpy()) for v in VARIANTS}
        right = {v: choices[v] == questions.answer for v in VARIANTS}
        rows, flips = [], []
        for source, mine in questions.groupby("source"):
            for scoring in ("option_text", "generated"):
                where = {"metric": scoring, "n": len(mine), "stage": "06_evaluation"}
                for v in VARIANTS:
                    share = float(right[v][mine.index].mean())
                    ends = {"ci_low": max(0.0, share - 0.1), "ci_high": min(1.0, share + 0.1), "unit": "fraction"}
                    more = where | ends | {"file": "metrics.parquet"}
                    rows.append({"claim": f"accuracy/{source}", "variant": v, "value": share, **more})
                for v, b in ((v, b) for v, b, _ in STEPS if {v, b} <= set(VARIANTS)):
                    after, before = right[v][mine.index], right[b][mine.index]
                    pair = {"variant": v, "baseline": b, "source": source, "scoring": scoring}
                    changed = mine[after != before]
                    chosen = {"choice_before": choices[b][changed.index], "choice_after": choices[v][changed.index]}
                    flip = np.where(right[v][changed.index], "gained", "lost")
                    flips.append(pd.DataFrame({**pair, "id": changed.id, **chosen, "flip": flip}))
                    delta = float(after.mean() - before.mean())
                    verdict = "equivalent" if delta == 0 else "better" if delta > 0.1 else "not detectable"
                    tested = {"p_holm": 0.04, "margin": 0.05, "mde": 0.12, "verdict": verdict, "baseline": b, **where}
                    tested |= {"ci_low": delta - 0.1, "ci_high": delta + 0.1, "unit": "fraction"}
                    rows.append({"claim": f"accuracy_delta/{source}", "variant": v, "value": delta,
                                 "file": "steps.parquet", **tested})  # fmt: skip
                    rows.append({"claim": f"flips/{source}", "variant": v, "value": len(changed), "baseline": b,
                                 "unit": "questions", "file": "flips.parquet", **where})  # fmt: skip
        for v, num_bytes, seconds in (("teacher_base", 269e6, 0.064), ("lora", 198e6, 0.051), ("nf4", 93e6, 0.033)):
            rows.append({"claim": "memory_bytes/weights", "variant": v, "value": num_bytes, "unit": "bytes"})
            rows.append({"claim": "latency_s_per_token", "variant": v, "value": seconds, "unit": "s", "n": 3,
                         "requests": 4, "prompt_tokens": 144, "output_tokens": 64})  # fmt: skip
        rows.append({"claim": "memory_ratio", "variant": "nf4", "baseline": "teacher_base", "value": 93 / 269,
                     "unit": "bytes of weights"})  # fmt: skip
        rows.append({"claim": "latency_ratio", "variant": "nf4", "baseline": "teacher_base", "value": 33 / 64,
                     "unit": "time per token"})  # fmt: skip
        rows.append({"claim": f"from_a_later_module/{SCRIPT}", "variant": "unheard_of", "value": 1.5e-7,
                     "unit": BREAKOUT, "some_new_column": "as it comes"})  # fmt: skip
        empty = {"metric": "", "ci_low": None, "ci_high": None, "n": None, "unit": "", "baseline": None,
                 "stage": "06_evaluation", "file": ""}  # fmt: skip
        facts = {"run": "toy", "headline_source": "chapters", "headline_scoring": "option_text", "chance": 0.25}
        facts["params"] = {"seed": 0, "note": BREAKOUT, "lora": {"adapter": {"rank": 16}}}
        tables.write_results(folder, [empty | row for row in rows], facts)

        for number, stage in enumerate(["01_data", "02_distillation", "06_evaluation"]):
            with mpl.rc_context():
                plotting.set_style()
                figure, ax = plt.subplots()
                ax.plot([1, 2, 3], [number, 2, 1])
                ax.set_title(f"Loss of stage {number} <i>& more</i>")
                table = pd.DataFrame({"step": range(200), "loss": np.linspace(1, 0, 200), "run": SCRIPT})
                plotting.save_figure(figure, folder / stage / "figures", "loss", table)
                plt.close(figure)
            manifest = {"stage": stage, "run": "toy", "fingerprint": "0123456789abcdef", "disclaimer": DISCLAIMER,
                        "files": {"figures/loss.svg": 40_000}, "duration_s": 61.5, "date": "2026-01-01 00:00 UTC",
                        "facts": {"kept_layers": [0, 1, 2], "drift": {"kl_nats": 0.031247, "note": BREAKOUT}},
                        "git_commit": "0" * 40, "device": "a processor, 2 cores"}  # fmt: skip
            (folder / stage / "manifest.json").write_text(json.dumps(manifest))
        pd.concat(flips).to_parquet(folder / "06_evaluation/flips.parquet", index=False)
        (folder / "06_evaluation/model_card.md").write_text("card\n")
        _write_notebook(folder / "notebooks" / "01_data.ipynb", folder / "01_data/figures/loss.png")
        return folder

    return make


@pytest.fixture(scope="module")
def built(make_run, tmp_path_factory):
    """A run's folder with its notebooks' pages and its report."""
    from medkit.reporting import report_page

    folder = make_run(tmp_path_factory.mktemp("report") / "toy")
    report_page.export_notebooks(folder)
    report_page.write_page(folder)
    return folder


def _questions(count: int) -> pd.DataFrame:
    rows = []
    for i in range(count):
        kind = ["chapters", "exam", "trials"][i % 3]
        question = (
            f"Which chapter lists condition number {i}, with a rather long name that goes on for more than a line?"
        )
        options = [
            f"Diseases of the {organ} and of what belongs to it ({i})" for organ in ("eye", "ear", "skin", "gut")
        ]
        context = ""
        if kind == "exam":
            question, options = f"A patient of {i} years is seen. {SCRIPT}", [*options, BREAKOUT]
        if kind == "trials":
            question, context, options = (
                f"does drug {i} help?",
                f"{BREAKOUT} of {i} patients. " * 20,
                ["yes", "no", "maybe"],
            )
        rows.append({"id": f"{kind}-{i:04}", "source": kind, "split": "test", "question": question, "context": context,
                     "options": options, "answer": i % len(options)})  # fmt: skip
    return pd.DataFrame(rows)


def _write_notebook(path, png):
    """An executed notebook: prose with formulas and a table, a print, a data frame, a figure, and an attack each."""
    v4 = nbformat.v4
    path.parent.mkdir()
    frame = pd.DataFrame({"step": [1, 2], "loss": [0.5, 0.25]})
    outputs = [
        v4.new_output("stream", text=f"2 questions {SCRIPT}\n"),
        v4.new_output("execute_result", {"text/html": f"<style>td {{}}</style>{frame.to_html()}{SCRIPT}{BREAKOUT}",
                                         "text/plain": "frame"}),
        v4.new_output("display_data", {"image/png": base64.b64encode(png.read_bytes()).decode()}),
        v4.new_output("display_data", {"application/javascript": "window.attacked = true"}),
    ]  # fmt: skip
    prose = (
        "# 1 · Data\n\n*A subtitle.*\n\n| | |\n|---|---|\n| **Reads** | nothing |\n\nA weight $W_0 < 1$ costs "
        f"$5 \\times 10^3$:\n\n$$L = \\sum_v p_T(v)\\,\\log\\frac{{p_T(v)}}{{p_S(v)}}$$\n\n{SCRIPT} {BREAKOUT}\n\n"
        "[itself](01_data.ipynb) [link](javascript:alert(1)) ![picture](https://example.org/picture.png)"
    )
    cells = [v4.new_markdown_cell(prose), v4.new_code_cell("print('<b>')\n" + "x = 1  # long " * 30, outputs=outputs)]
    nbformat.write(v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}}), path)
