"""`report.html`: the summary and tables of a finished run, and its executed notebooks as pages beside it.

The pages are self-contained. Their content security policy lets the browser load nothing and run no script.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pandas as pd
import yaml

from medkit.reporting import paper_claims, tables
from medkit.reporting.results import load_results
from medkit.stage import DISCLAIMER, MANIFEST, write_text
from medkit.variants import STEPS

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"
NOTEBOOK = f"""{{%- extends 'lab/index.html.j2' -%}}
{{%- block html_head_js -%}}<meta http-equiv="Content-Security-Policy" content="{POLICY}">{{%- endblock -%}}
{{%- block jupyter_widgets -%}}{{%- endblock -%}}
{{%- block html_head_js_mathjax -%}}{{%- endblock -%}}
{{%- block html_head_js_mermaidjs -%}}{{%- endblock -%}}
{{%- block body_header -%}}{{{{ super() }}}}<p><a href="../report.html">← report of the run</a> · {DISCLAIMER}</p>
{{%- endblock -%}}"""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` and one page per executed notebook into a run's folder; returns the path of the report.

    Raises StageError if the run's results are missing or damaged.
    """
    from nbconvert.filters import markdown2html  # nbconvert takes three seconds to import

    results, facts = load_results(run_folder / "results.json")
    notebooks = {page.stem: page for page in export_notebooks(run_folder)}
    stages = [json.loads(path.read_text()) for path in sorted(run_folder.glob(f"*/{MANIFEST}"))]
    parts = tables.run_tables(results, facts)
    parts["Beside the paper (arXiv 2505.00025)"] = paper_claims.paper_table(results, facts)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report_page.html.j2").render(
        policy=POLICY,
        disclaimer=DISCLAIMER,
        facts=facts,
        steps=list(_steps(results, facts)),
        tables={title: markdown2html(text) for title, text in parts.items()},
        stages=[(s, f"notebooks/{s['stage']}.html" if s["stage"] in notebooks else None) for s in stages],
        params=yaml.safe_dump(facts.get("params", {}), sort_keys=False, allow_unicode=True),
    )
    return write_text(run_folder / "report.html", page)


def export_notebooks(run_folder: Path) -> list[Path]:
    """Write each executed notebook of a run as a page beside it, with formulas as MathML; returns the pages."""
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        """nbconvert leaves formulas to MathJax, which it would load from the network."""

        def inline_math(self, body: str) -> str:
            return convert(body)

        def block_math(self, body: str) -> str:
            return convert(body, display="block")

    exporter = HTMLExporter(raw_template=NOTEBOOK, embed_images=True)
    exporter.register_filter("markdown2html", lambda text: MarkdownWithMath(Renderer(escape=False)).render(text))
    pages = []
    for notebook in sorted((run_folder / "notebooks").glob("*.ipynb")):
        page = re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', exporter.from_filename(str(notebook))[0])
        pages.append(write_text(notebook.with_suffix(".html"), page))
    return pages


def _steps(results: pd.DataFrame, facts: dict) -> Iterator[dict]:
    """Each step of the method on the headline task: its question, its verdict, and the numbers behind it."""
    source = facts["headline_source"]
    scored = results[results.metric == facts["headline_scoring"]]
    questions = {(variant, baseline): question for variant, baseline, question in STEPS}
    for row in scored[scored.result == f"accuracy_delta/{source}"].itertuples():
        equivalent = f"equivalent within {100 * row.margin:g} points" if row.verdict == "equivalent" else None
        yield {
            "step": f"{tables.label(row.baseline)} → {tables.label(row.variant)}",
            "question": questions.get((row.variant, row.baseline), ""),
            "verdict": equivalent or row.verdict,
            "accuracies": f"{row.accuracy_baseline:.2f} → {row.accuracy:.2f}" if "accuracy_baseline" in scored else "",
            "evidence": f"{100 * row.value:+.1f} points, interval {100 * row.ci_low:+.1f} to {100 * row.ci_high:+.1f}, "
            f"n = {row.n:.0f}, p = {row.p_holm:.2g} after Holm",
        }
