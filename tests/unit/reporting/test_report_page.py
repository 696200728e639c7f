"""The report page and the notebooks' pages: whole, self-contained, and deaf to scripts in the texts of a run."""

import html
import re

import pytest

from medkit import reporting
from medkit.reporting import report_page, tables
from medkit.stage import DISCLAIMER

PAGES = ("report.html", "notebooks/01_data.html")


def test_the_page_has_every_table_and_every_step(built):
    text = (built / "report.html").read_text()
    results, facts = reporting.load_results(built / "results.json")
    for title in tables.run_tables(results, facts):
        assert f"<h2>{title}</h2>" in text
    assert text.count('class="verdict ') == (results.result == "accuracy_delta/icd_chapter").sum()
    assert "0.31 → 0.36" in text and "equivalent within 5 points" in text
    assert "Beside the paper" in text and "70.55 B weights" in text
    assert "01_data.html" in text and "rank: 16" in text
    assert "<script" not in text and "&lt;script&gt;" in text  # in the params


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_loaded_no_script_may_run_and_links_lead_to_files(built, page):
    text = html.unescape((built / page).read_text())
    (policy,) = re.findall(r"<meta [^>]*Content-Security-Policy[^>]*>", text)
    assert f'content="{report_page.POLICY}"' in policy
    assert "script-src" not in report_page.POLICY and report_page.POLICY.startswith("default-src 'none'")
    assert "cdnjs" not in text and not re.search(r"<script[^>]* src=|<link[^>]*href=\"http", text)
    assert text.index("Content-Security-Policy") < text.index("<style")
    assert DISCLAIMER in text
    links = re.findall(r'href="([^"#][^"]*)"', (built / page).read_text())
    files = [link for link in links if not link.startswith(("data:", "https://")) and "02_lora" not in link]
    assert files
    for link in files:
        assert ((built / page).parent / link).is_file(), link


def test_a_notebook_keeps_its_outputs_and_its_formulas_are_mathml(built):
    text = (built / PAGES[1]).read_text()
    formulas = re.findall(r"<math\b.*?</math>", text, re.DOTALL)
    assert ['display="block"' in formula for formula in formulas] == [False, True]
    assert "<mfrac>" in formulas[1] and "<b>0.25</b>" in text
    assert 'href="02_lora.html"' in text  # a link to another notebook leads to its page


def test_a_run_that_has_less_has_a_page_too(make_run, tmp_path):
    folder = make_run(tmp_path / "toy")
    (folder / "02_distillation" / "manifest.json").unlink()
    (folder / "notebooks" / "01_data.ipynb").unlink()
    text = reporting.write_report(folder).read_text()
    assert "02_distillation" not in text and "notebooks/" not in text
    assert text == reporting.write_report(folder).read_text()  # the same files give the same bytes
