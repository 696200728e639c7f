"""The report shows all that the run's files say, lets no text become markup, and asks no network for anything."""

import base64
import hashlib
import itertools
import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest

from medkit.reporting import report_page
from medkit.reporting import tables as report
from medkit.stage import DISCLAIMER, StageError
from medkit.variants import VARIANTS

LOADING = {"src", "srcset", "poster", "action", "formaction", "data", "background"}


class Parsed(HTMLParser):
    """Elements with their attributes, in order, and the text inside scripts and json blocks."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.scripts, self.ids, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "script":
            self.scripts.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1][1] += data

    def json(self, name: str):
        return next(json.loads(text) for attrs, text in self.scripts if attrs.get("id") == name)

    def links(self) -> list[str]:
        return [attrs["href"] for tag, attrs in self.elements if tag == "a" and "href" in attrs]


@pytest.fixture(scope="module")
def parsed(built):
    return Parsed((built / "report.html").read_text())


@pytest.fixture
def run(built, tmp_path):
    """The same folder again, for a test to change; its report not yet written."""
    shutil.copytree(built, tmp_path / "toy")
    (tmp_path / "toy/report.html").unlink()
    return tmp_path / "toy"


def shown_claims(parsed) -> list[dict]:
    data = parsed.json("claims-data")
    names = ["claim", "variant", "baseline", "metric", "unit", "file", "more", "value", "ci_low", "ci_high", "n"]
    return [dict(zip(names, [*(data["words"][i] for i in row[:7]), *row[7:]], strict=True)) for row in data["rows"]]


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_every_claim_is_on_the_page(built, parsed):
    claims, _ = report.load_results(built / "results.json")
    shown = shown_claims(parsed)
    assert len(shown) == len(claims)
    for row, claim in zip(shown, claims.itertuples(), strict=True):
        assert row["claim"] == claim.claim
        assert row["variant"].replace("\xa0", " ") == (
            VARIANTS[claim.variant].label if claim.variant in VARIANTS else claim.variant
        )
        assert row["value"] == pytest.approx(claim.value, rel=1e-5)
        for name in ("ci_low", "ci_high", "n"):
            known = getattr(claim, name)
            assert (row[name] is None) == pd.isna(known)
            assert row[name] is None or row[name] == pytest.approx(known, rel=1e-5)
    assert "some new column as it comes" in [row["more"] for row in shown]


def test_the_summary_follows_the_claims(built, run):
    claims, facts = report.load_results(run / "results.json")
    steps = list(report_page._steps(claims, facts))
    deltas = claims[(claims.claim == "accuracy_delta/chapters") & (claims.metric == "option_text")]
    assert [s["evidence"].split(" points")[0].replace("−", "-") for s in steps] == [
        f"{100 * value:+.1f}" for value in deltas.value
    ]
    for step, verdict in zip(steps, deltas.verdict, strict=True):
        assert step["verdict"].startswith(verdict)
        assert ("within 5 points" in step["verdict"]) == (verdict == "equivalent")
    assert report_page._cost_line(claims).replace("\xa0", " ") == (
        "+ NF4 against teacher, uncorrected: −65% bytes of weights, −48% time per token"
    )
    text = report_page.write_page(run).read_text()
    assert all(step["evidence"] in text for step in steps)
    assert text == (built / "report.html").read_text()  # the same files, the same bytes


def test_flips_are_counted_whole_and_joined_with_their_questions(built, parsed):
    data = parsed.json("flips-data")
    flips = pd.read_parquet(built / "06_evaluation/flips.parquet")
    questions = pd.read_parquet(built / "01_data/questions.parquet").set_index("id")
    assert sum(g["gained"] + g["lost"] for g in data["groups"]) == sum(len(g["rows"]) for g in data["groups"])
    assert sum(g["gained"] for g in data["groups"]) == (flips.flip == "gained").sum()
    assert sum(g["lost"] for g in data["groups"]) == (flips.flip == "lost").sum()
    assert data["listed"] == data["of"] == flips.id.nunique()
    for name, question, context, options, answer in data["questions"]:
        asked = questions.loc[name]
        assert (question, context, options, answer) == (
            asked.question, asked.context, list(asked.options), asked.answer,
        )  # fmt: skip
    for group in data["groups"]:
        for place, before, after in group["rows"]:
            assert (before == data["questions"][place][4]) != (after == data["questions"][place][4])
        asked = (questions.source == group["source"]).sum()
        assert group["n"] == asked


def test_more_questions_than_a_page_holds_are_drawn_and_counted(run, monkeypatch):
    monkeypatch.setattr(report_page, "QUESTIONS_PER_SOURCE", 4)
    text = report_page.write_page(run).read_text()
    data = Parsed(text).json("flips-data")
    flips = pd.read_parquet(run / "06_evaluation/flips.parquet")
    assert pd.Series([q[0].split("-")[0] for q in data["questions"]]).value_counts().to_dict() == {
        "chapters": 4, "exam": 4, "trials": 4,
    }  # fmt: skip
    assert sum(g["gained"] + g["lost"] for g in data["groups"]) == len(flips)
    drawn = {q[0] for q in data["questions"]}
    assert sum(len(g["rows"]) for g in data["groups"]) == flips.id.isin(drawn).sum()
    assert f"listed are 12 of the {flips.id.nunique()} questions" in text
    shuffled = pd.read_parquet(run / "01_data/questions.parquet").sample(frac=1, random_state=1)
    shuffled.to_parquet(run / "01_data/questions.parquet", index=False)
    again = Parsed(report_page.write_page(run).read_text()).json("flips-data")
    assert {q[0] for q in again["questions"]} == drawn


def test_every_figure_stands_there_with_its_title_and_its_table(built, parsed):
    images = [attrs for tag, attrs in parsed.elements if tag == "img"]
    drawn = sorted(built.glob("*/figures/*.svg"))
    assert [base64.b64decode(i["src"].partition(",")[2]) for i in images] == [path.read_bytes() for path in drawn]
    for number, attrs in enumerate(images):
        assert attrs["src"].startswith("data:image/svg+xml;base64,")
        assert f"Loss of stage {number} <i>& more</i>" in attrs["alt"]
    tables = [attrs for tag, attrs in parsed.elements if tag == "a" and "download" in attrs]
    assert [base64.b64decode(a["href"].partition(",")[2]) for a in tables] == [
        path.with_suffix(".csv").read_bytes() for path in drawn
    ]
    assert (built / "report.html").read_text().count("200 rows, the first 30 here") == len(drawn)


def test_a_large_drawing_comes_as_pixels_and_a_large_table_as_a_file(run, monkeypatch):
    monkeypatch.setattr(report_page, "LARGEST_SVG_BYTES", 10)
    monkeypatch.setattr(report_page, "LARGEST_CSV_BYTES", 10)
    found = Parsed(report_page.write_page(run).read_text())
    images = [attrs["src"] for tag, attrs in found.elements if tag == "img"]
    assert images and all(src.startswith("data:image/png;base64,") for src in images)
    files = [attrs["href"] for tag, attrs in found.elements if tag == "a" and "download" in attrs]
    assert files == [f"{stage}/figures/loss.csv" for stage in ("01_data", "02_distillation", "06_evaluation")]
    assert all((run / name).is_file() for name in files)


def test_a_run_that_kept_less_has_a_page_too(run):
    (run / "06_evaluation/flips.parquet").unlink()
    (run / "02_distillation/manifest.json").unlink()
    content = json.loads((run / "results.json").read_text())
    content["claims"] = content["claims"][:1]
    del content["params"]
    (run / "results.json").write_text(json.dumps(content))
    for notebook in (run / "notebooks").iterdir():
        notebook.unlink()
    text = report_page.write_page(run).read_text()
    found = Parsed(text)
    assert "flips" not in found.ids
    assert "not closed: no manifest" in text
    assert len(shown_claims(found)) == 1
    assert "Params of the run" not in text
    assert not [link for link in found.links() if "notebooks" in link]


def test_no_results_no_page_and_the_old_one_stays(run):
    report_page.write_page(run)
    before = (run / "report.html").read_text()
    (run / "results.json").write_text("{")
    with pytest.raises(StageError, match="not a whole results file"):
        report_page.write_page(run)
    assert (run / "report.html").read_text() == before
    assert not list(run.glob("*.part"))


# --- what it lets through --------------------------------------------------------------------------------------------


def pages(folder) -> list:
    return [folder / "report.html", *sorted((folder / "notebooks").glob("*.html"))]


def test_no_text_of_the_run_becomes_markup(built, parsed):
    """Questions, options, claims, facts, params and tables of the made-up run all try to."""
    text = (built / "report.html").read_text()
    assert len(parsed.scripts) == 3  # claims, flips, and the page's own
    assert "<script>window.attacked" not in text
    assert "<img src=x" not in text
    assert [a for a in parsed.elements if any(name.startswith("on") for name in a[1])] == []
    written = [question for _, question, *_ in parsed.json("flips-data")["questions"]]
    assert any("<script>window.attacked" in question for question in written)  # as text it is all there


@pytest.mark.parametrize("number", [0, 1])
def test_nothing_is_loaded_from_anywhere(built, number):
    path = pages(built)[number]
    found = Parsed(path.read_text())
    for tag, attrs in found.elements:
        for name, value in attrs.items():
            if name in LOADING or (tag == "link" and name == "href"):
                assert value.startswith("data:"), (tag, name, value[:80])
    css = "".join(re.findall(r"<style>(.*?)</style>", path.read_text(), re.DOTALL))
    assert "url(" not in css and "@import" not in css
    policy = next(attrs["content"] for tag, attrs in found.elements if "Content-Security-Policy" in attrs.values())
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    own = [text for attrs, text in found.scripts if "type" not in attrs]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in own]
    assert rules["script-src"] == (f"'sha256-{digests[0]}'" if own else "'none'")
    assert len(own) == (number == 0)


@pytest.mark.parametrize("number", [0, 1])
def test_names_are_unique_and_links_lead_somewhere(built, number):
    path = pages(built)[number]
    found = Parsed(path.read_text())
    assert len(found.ids) == len(set(found.ids))
    assert found.links()
    for link in found.links():
        if link.startswith("#"):
            assert link[1:] in found.ids
        elif not link.startswith("data:"):
            assert (path.parent / link).is_file(), link
    named = [attrs["aria-labelledby"] for _, attrs in found.elements if "aria-labelledby" in attrs]
    assert set(named) <= set(found.ids)
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("number", [0, 1])
def test_it_says_what_it_is_not_above_and_below(built, number):
    text = pages(built)[number].read_text()
    head, _, body = text.partition("<body>")
    assert f'content: "{DISCLAIMER}"' in head  # at the foot of every printed page
    assert body.index(DISCLAIMER) < body.index("<main")
    assert DISCLAIMER in body.partition("</main>")[2]


# --- notebooks -------------------------------------------------------------------------------------------------------


def test_an_executed_notebook_keeps_its_content_and_loses_its_scripts(built):
    (path,) = sorted((built / "notebooks").glob("*.html"))
    text = path.read_text()
    found = Parsed(text)
    assert found.scripts == []
    assert "attacked" not in re.sub(r"&lt;script&gt;window\.attacked = true&lt;/script&gt;", "", text)
    assert [a for a in found.elements if any(name.startswith("on") for name in a[1])] == []
    assert not [link for link in found.links() if "javascript" in link]
    assert "example.org" not in text
    tags = [tag for tag, _ in found.elements]
    assert {"h1", "em", "strong", "table", "thead", "th", "td"} <= set(tags)
    assert "td {}" not in text  # a data frame's own style is dropped, not shown
    assert "0.25" in text and "2 questions" in text
    image = next(attrs["src"] for tag, attrs in found.elements if tag == "img" and attrs.get("src"))
    assert base64.b64decode(image.partition(",")[2]) == (built / "01_data/figures/loss.png").read_bytes()


def test_formulas_are_mathml(built):
    pytest.importorskip("latex2mathml")
    text = next((built / "notebooks").glob("*.html")).read_text()
    formulas = re.findall(r"<math\b.*?</math>", text, re.DOTALL)
    assert ['display="block"' in formula for formula in formulas] == [False, False, True]
    assert "<mfrac>" in formulas[2] and "&#x0003C;" in formulas[0]
    assert "$" not in re.sub(r"<pre>.*?</pre>", "", text.partition("<body>")[2], flags=re.DOTALL)


def test_a_formula_that_cannot_be_made_stays_readable(monkeypatch):
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", None)
    assert report_page._mathml(r"a < \frac{b}{c}", "inline") == r'<code class="tex">a &lt; \frac{b}{c}</code>'


# --- numbers as text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "said"), [(2.34, "2.34 s"), (61.5, "1 min 2 s"), (3600, "1 h 0 min"), (59.9, "1 min 0 s"), (0, "0 s")]
)
def test_durations(seconds, said):
    assert report_page._duration(seconds) == said


def test_nested_facts_become_named_leaves():
    facts = {"a": 1, "b": {"c": [1, 0.123456], "d": {"e": None, "f": True}}}
    assert list(report_page._leaves(facts)) == [
        ("a", "1"),
        ("b · c", "1, 0.1235"),
        ("b · d · e", "None"),
        ("b · d · f", "yes"),
    ]
