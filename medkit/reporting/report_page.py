"""`report.html`: a finished run as one page that needs no network, and its executed notebooks as pages beside it.

Numbers come from `results.json`, tables from `report`, questions and flips from the stages' own files: nothing is
measured here, and a claim or a figure that is added anywhere appears without a change of this module. All text is
escaped; the page may run its own script only and can load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import mistune
import pandas as pd
import yaml
from markupsafe import Markup

from medkit.reporting import paper_claims, tables
from medkit.reporting.results import COLUMNS
from medkit.stage import DISCLAIMER, MANIFEST, ROOT, atomic_path
from medkit.variants import STEPS, VARIANTS

QUESTIONS_PER_SOURCE = 300  # 10 variants and 7,000 questions then make a page of about 3 MB, which a phone opens
LARGEST_SVG_BYTES = 300_000  # a drawing of thousands of points is smaller as pixels
LARGEST_CSV_BYTES = 100_000
CSV_ROWS_SHOWN = 30
BENCHMARKS = ROOT / "benchmarks" / "results"
NOTEBOOK_TAGS = {
    *[
        "a",
        "b",
        "blockquote",
        "br",
        "code",
        "del",
        "div",
        "em",
        "hr",
        "i",
        "img",
        "li",
        "ol",
        "p",
        "pre",
        "span",
        "strong",
    ],
    *["sub", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul", *(f"h{level}" for level in range(1, 7))],
}
NOTEBOOK_ATTRIBUTES = {
    "*": ["class", "id"],
    "a": lambda tag, name, value: name == "href" and (":" not in value or value.startswith("https://")),
    "img": lambda tag, name, value: name == "alt" or (name == "src" and value.startswith("data:image/")),
}


def write_page(run_folder: Path) -> Path:
    """Write `report.html` into a run's folder, whole or not at all; StageError if its results are missing or damaged.

    Call it after `export_notebooks`: it links the notebooks' pages that are there. At most `QUESTIONS_PER_SOURCE`
    questions of each source are listed with their flips, the same ones for every run; counts are of all.
    """
    claims, facts = tables.load_results(run_folder / "results.json")
    stages = [_stage(folder) for folder in _stage_folders(run_folder)]
    page = _environment().get_template("page.html.j2")
    content = page.render(
        title=f"medkit · run {facts['run']}",
        facts=facts,
        steps=list(_steps(claims, facts)),
        comparisons=claims.claim.str.startswith("accuracy_delta/").sum(),
        cost=_cost_line(claims),
        duration=_duration(sum(s["duration_s"] for s in stages)),
        tables=_tables(claims, facts),
        claims=_claims(claims),
        flips=_flips(run_folder, claims, facts),
        stages=stages,
        documents=[name for name in ("results.json", "06_evaluation/model_card.md") if (run_folder / name).is_file()],
        params=yaml.safe_dump(facts["params"], sort_keys=False, allow_unicode=True) if "params" in facts else None,
    )
    with atomic_path(run_folder / "report.html") as scratch:
        scratch.write_text(content)
    return run_folder / "report.html"


def export_notebooks(run_folder: Path) -> list[Path]:
    """Write every executed notebook of a run as a page beside it, without scripts; formulas become MathML."""
    from bleach import clean
    from nbconvert import HTMLExporter  # three seconds to import
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from pygments.formatters import HtmlFormatter

    formulas = []

    class Renderer(IPythonRenderer):
        """Keeps each formula's place with a mark that no sanitiser touches."""

        def inline_math(self, body: str) -> str:
            formulas.append(_mathml(body, "inline"))
            return f"\ue000{len(formulas) - 1}\ue001"

        def block_math(self, body: str) -> str:
            formulas.append(_mathml(body, "block"))
            return f"\ue000{len(formulas) - 1}\ue001"

    def sanitise(element) -> str:
        without_styles = re.sub(r"<(style|script)\b.*?</\1>", "", str(element), flags=re.DOTALL)
        return clean(without_styles, tags=NOTEBOOK_TAGS, attributes=NOTEBOOK_ATTRIBUTES, protocols={"data", "https"})

    exporter = HTMLExporter(template_name="basic", sanitize_html=True)
    # the exporter's own list of safe tags knows neither headings nor paragraphs
    exporter.register_filter("clean_html", sanitise)
    exporter.register_filter(
        "markdown2html", lambda text: MarkdownWithMath(Renderer(escape=False, exclude_anchor_links=True)).render(text)
    )
    colours = [HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark")]
    page, written = _environment().get_template("page.html.j2"), []
    for notebook in sorted((run_folder / "notebooks").glob("*.ipynb")):
        formulas.clear()
        body = exporter.from_filename(str(notebook))[0]
        body = re.sub("\ue000(\\d+)\ue001", lambda mark: formulas[int(mark[1])], body)
        body = re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', body)
        with atomic_path(notebook.with_suffix(".html")) as scratch:
            scratch.write_text(page.render(title=notebook.stem, notebook=Markup(_boxed(body)), code_colours=colours))
        written.append(notebook.with_suffix(".html"))
    return written


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.globals |= {"disclaimer": DISCLAIMER, "notebook": None}
    environment.filters |= {"csp_hash": _csp_hash, "size": _size, "duration": _duration, "spaced": _spaced}
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    return environment


def _csp_hash(script: str) -> str:
    """What a content security policy calls an inline script that it lets run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _mathml(tex: str, display: str) -> Markup:
    """A formula as MathML, or its source where that cannot be made."""
    try:
        from latex2mathml.converter import convert

        return Markup(convert(tex, display=display))
    except Exception:  # whatever a formula does to the converter, its source can be read
        return Markup('<code class="tex">{}</code>').format(tex)


def _boxed(markup: str) -> str:
    """Every table in a box that scrolls by itself and that a keyboard reaches."""
    box = '<div class="scroll" tabindex="0" role="region" aria-label="Table">'
    return re.sub(r"(<table\b.*?</table>)", rf"{box}\1</div>", markup, flags=re.DOTALL)


# --- numbers as text -----------------------------------------------------------------------------------------------


def _label(variant) -> str:
    """A variant's name for people; "+ LoRA" does not break after its sign."""
    return (
        (VARIANTS[variant].label if variant in VARIANTS else variant).replace("+ ", "+\u00a0")
        if isinstance(variant, str)
        else ""
    )


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} bytes"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _text(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _leaves(value, name: str = "") -> Iterator[tuple[str, str]]:
    """The nested facts of a manifest as (name with its path, text)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name} · {key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(_text(v) for v in value)
    else:
        yield name, _text(value)


# --- the parts of the page -----------------------------------------------------------------------------------------


def _steps(claims: pd.DataFrame, facts: dict) -> Iterator[dict]:
    """Each step of the method on the headline task: its question, its verdict, and the numbers behind it."""
    questions = {(variant, baseline): question for variant, baseline, question in STEPS}
    headline = claims[claims.metric == facts["headline_scoring"]]
    accuracy = headline[headline.claim == f"accuracy/{facts['headline_source']}"].groupby("variant").value.first()
    for c in headline[headline.claim == f"accuracy_delta/{facts['headline_source']}"].itertuples():
        yield {
            "step": f"{_label(c.baseline)} → {_label(c.variant)}",
            "question": questions.get((c.variant, c.baseline), ""),
            "verdict": f"equivalent within {100 * c.margin:g} points" if c.verdict == "equivalent" else c.verdict,
            "accuracies": [f"{accuracy[v]:.2f}" for v in (c.baseline, c.variant) if v in accuracy.index],
            "evidence": f"{100 * c.value:+.1f} points, interval {100 * c.ci_low:+.1f} to {100 * c.ci_high:+.1f}, "
            f"n\u00a0=\u00a0{c.n:.0f}, p\u00a0=\u00a0{c.p_holm:.2g} after Holm".replace("-", "−"),
        }


def _cost_line(claims: pd.DataFrame) -> str:
    """What the last step of the method saves against where it started, or the first pair that was measured."""
    ratios = claims[claims.claim.isin(["memory_ratio", "latency_ratio"])]
    if ratios.empty:
        return ""
    whole = ratios[(ratios.variant == STEPS[-1][0]) & (ratios.baseline == STEPS[-1][1])]
    first = (whole if len(whole) else ratios).iloc[0]
    pair = ratios[(ratios.variant == first.variant) & (ratios.baseline == first.baseline)]
    changes = ", ".join(f"{c.value - 1:+.0%} {c.unit}" for c in pair.itertuples()).replace("-", "−")
    return f"{_label(first.variant)} against {_label(first.baseline)}: {changes}"


def _tables(claims: pd.DataFrame, facts: dict) -> list[dict]:
    """The tables of `report`, as html."""
    source, scoring = facts["headline_source"], facts["headline_scoring"]
    convert = mistune.create_markdown(escape=True, plugins=["table"])
    made = {
        f"Accuracy, read by {_spaced(scoring)}, with intervals": tables.accuracy_table(claims, scoring),
        f"Each step against the one it starts from, on {source}": tables.steps_table(claims, source, scoring),
        "Cost": tables.cost_table(claims),
        "Beside the paper (arXiv 2505.00025)": paper_claims.paper_table(claims, facts, BENCHMARKS),
    }
    return [
        {"title": title, "html": Markup(_boxed(convert(table).replace("&lt;br&gt;", "<br>")))}
        for title, table in made.items()
    ]


def _claims(claims: pd.DataFrame) -> dict:
    """All claims for the page's script: texts as places in `words`, numbers to six digits, what is special as text."""
    special = [name for name in claims.columns if name not in COLUMNS]
    words: dict[str, int] = {}
    rows = []
    for c in claims.astype(object).where(claims.notna(), None).to_dict("records"):
        more = ", ".join(f"{_spaced(name)} {_text(c[name])}" for name in special if c[name] is not None)
        file = f"{c['stage']}/{c['file']}"
        texts = (c["claim"], _label(c["variant"]), _label(c["baseline"]), c["metric"], c["unit"], file, more)
        numbers = (None if c[k] is None else float(f"{c[k]:.6g}") for k in ("value", "ci_low", "ci_high", "n"))
        rows.append([*(words.setdefault(text or "", len(words)) for text in texts), *numbers])
    return {"words": list(words), "rows": rows}


def _flips(folder: Path, claims: pd.DataFrame, facts: dict) -> dict | None:
    """Flips by step, source and scoring, and the questions they are of; None if the run kept none."""
    found, asked = folder / "06_evaluation" / "flips.parquet", folder / "01_data" / "questions.parquet"
    if not (found.is_file() and asked.is_file()):
        return None
    flips = pd.read_parquet(found)
    questions = pd.read_parquet(asked, columns=["id", "source", "question", "context", "options", "answer"])
    questions = questions[questions.id.isin(flips.id)]
    # by a hash of the id: a random choice, and the same one in every run
    drawn = questions.assign(order=pd.util.hash_array(questions.id.to_numpy(object))).sort_values("order")
    listed = drawn.groupby("source").head(QUESTIONS_PER_SOURCE).reset_index(drop=True)
    flips["place"] = flips.id.map(pd.Series(listed.index, listed.id))
    steps = [(v, b) for v, b, _ in STEPS if ((flips.variant == v) & (flips.baseline == b)).any()]
    counted = claims[claims.claim.str.startswith("flips/") & claims.n.notna()]
    asked_in_all = {(c.variant, c.baseline, c.claim, c.metric): int(c.n) for c in counted.itertuples()}
    groups = []
    for (variant, baseline, source, scoring), group in flips.groupby(["variant", "baseline", "source", "scoring"]):
        shown = group[group.place.notna()]
        groups.append(
            {
                "step": steps.index((variant, baseline)),
                "source": source,
                "scoring": scoring,
                "n": asked_in_all.get((variant, baseline, f"flips/{source}", scoring)),
                "gained": int((group.flip == "gained").sum()),
                "lost": int((group.flip == "lost").sum()),
                "rows": shown[["place", "choice_before", "choice_after"]].astype(int).to_numpy().tolist(),
            }
        )
    return {
        "steps": [f"{_label(b)} → {_label(v)}" for v, b in steps],
        "start": [facts["headline_source"], facts["headline_scoring"]],
        "listed": len(listed),
        "of": len(questions),
        "groups": groups,
        "questions": [[q.id, q.question, q.context, list(q.options), int(q.answer)] for q in listed.itertuples()],
    }


def _stage_folders(run_folder: Path) -> list[Path]:
    found = {path.parent for path in run_folder.glob(f"*/{MANIFEST}")}
    return sorted(found | {path.parent for path in run_folder.glob("*/figures")})


def _stage(folder: Path) -> dict:
    """A stage's manifest and figures; a stage that has not been closed has figures only."""
    manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).is_file() else {}
    drawn = sorted({path.stem for path in (folder / "figures").glob("*.*") if path.suffix in (".svg", ".png")})
    pages = [folder.parent / "notebooks" / f"{folder.name}{ending}" for ending in (".html", ".ipynb")]
    sizes = manifest.get("files", {}).values()
    return {
        "name": folder.name,
        "closed": manifest.get("date"),
        "device": manifest.get("device"),
        "commit": manifest.get("git_commit"),
        "fingerprint": manifest.get("fingerprint"),
        "duration_s": manifest.get("duration_s", 0),
        "files": f"{len(sizes)} files, {_size(sum(sizes))}",
        "facts": list(_leaves(manifest.get("facts", {}))),
        "figures": [_figure(folder / "figures" / name) for name in drawn],
        "notebook": next((str(page.relative_to(folder.parent)) for page in pages if page.is_file()), None),
    }


def _figure(path: Path) -> dict:
    """A figure as a data address with its caption, and the head of its table."""
    svg, png, csv = (path.with_name(f"{path.name}.{ending}") for ending in ("svg", "png", "csv"))
    drawing = svg.read_bytes() if svg.is_file() else b""
    titled = re.search(rb"<title>(.*?)</title>", drawing[:4000], re.DOTALL)
    if not drawing or (len(drawing) > LARGEST_SVG_BYTES and png.is_file()):
        image = _data_address("image/png", png.read_bytes())
    else:
        image = _data_address("image/svg+xml", drawing)
    return {
        "caption": html.unescape(titled[1].decode()) if titled else _spaced(path.name).capitalize(),
        "image": image,
        "id": f"{path.parent.parent.name}-{path.name}",
        "table": _csv(csv) if csv.is_file() else None,
    }


def _csv(path: Path) -> dict:
    table, whole = pd.read_csv(path), path.read_bytes()
    embedded = len(whole) <= LARGEST_CSV_BYTES
    return {
        "file": path.name,
        "link": _data_address("text/csv", whole) if embedded else "/".join(path.parts[-3:]),
        "columns": list(table.columns),
        "rows": [
            ["–" if pd.isna(v) else _text(v) for v in row] for row in table.head(CSV_ROWS_SHOWN).itertuples(False)
        ],
        "num_rows": len(table),
    }


def _data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
