"""Static promises of every committed notebook; no kernel needed."""

import re
import sys
import tomllib

import matplotlib.pyplot as plt
import nbformat
import papermill
import pytest
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelspec import get_kernel_dict

from medkit.checks import EXERCISES
from medkit.runner import PARAMETERS, notebooks
from medkit.stage import ROOT, MedkitError, reading

SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
LABS = sorted((ROOT / "notebooks" / "labs").glob("*.ipynb"))
EVERY = [*sorted((ROOT / "notebooks").glob("*.ipynb")), *LABS, *SOLUTIONS]
COPIES = [ROOT / "notebooks" / "exercises" / path.name for path in SOLUTIONS]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
LABS_LIBRARIES = [re.match(r"\w+", requirement)[0] for requirement in EXTRAS["labs"]]
CHECKED = {"nbval-check-output", "keep_output"}
FORBIDDEN = re.compile(r"^\s*[!%]|sys\.path|^/|['\"]/(?:home|root|tmp|work)\b", re.MULTILINE)


def read(path):
    return nbformat.read(path, as_version=4).cells


def code(path):
    return [cell for cell in read(path) if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


@pytest.mark.parametrize("path", [*EVERY, *COPIES], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_opening_it_changes_nothing(path):
    """JupyterLab writes the kernel's names and language into an open notebook, and ids into its cells."""
    notebook, kernel = nbformat.read(path, as_version=4), get_kernel_dict()
    names = {"name": "python3", "display_name": kernel["display_name"], "language": kernel["language"]}
    language = IPythonKernel.language_info | {"version": notebook.metadata.language_info.version}
    assert notebook.metadata == {"kernelspec": names, "language_info": language}
    assert notebook.nbformat_minor == 5 and all(cell.id for cell in notebook.cells)


def test_start_shows_the_last_run_or_how_to_make_one(make_run, tmp_path, monkeypatch, capsys):
    start = code(ROOT / "notebooks" / "00_start.ipynb")
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(plt, "show", lambda: print(f"{len(plt.gcf().axes)} panels"))
    monkeypatch.setattr("IPython.display.display", lambda shown: print(getattr(shown, "data", shown)))
    printed = []
    for prepare in (lambda: None, lambda: make_run(tmp_path / "toy")):
        prepare()
        exec("\n".join(cell.source for cell in start), {})
        printed.append(capsys.readouterr().out)
    assert "01_data.ipynb" in printed[0] and "`make run`" in printed[0]
    assert "open 03_lora.ipynb" in printed[1] and "2 panels" in printed[1] and "Accuracy on icd_chapter" in printed[1]


@pytest.mark.parametrize("path", EVERY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_it_ran_top_to_bottom_and_keeps_portable_output_iff_that_is_checked(path):
    # nbval compares only cells with a count: a stripped notebook would pass with any output
    assert [cell.execution_count for cell in code(path)] == list(range(1, len(code(path)) + 1))
    for cell in code(path):
        assert not FORBIDDEN.search(cell.source), cell.source
        assert tags(cell) & CHECKED in (set(), CHECKED), "the two tags go together"
        assert bool(cell.outputs) == bool(tags(cell) & CHECKED), cell.source
        for output in cell.outputs:
            assert output.output_type == "stream" and output.name == "stdout"
            assert not re.search(r"/\w+/\w+/|\b\d+\.\d{3,}|\b\d+ ms\b", output.text), "no path, raw float or time"
    assert any(tags(cell) & CHECKED for cell in code(path))


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
def test_the_first_cell_asks_for_the_smoke_profile(path):
    """nbval injects nothing: defaults are what it runs. The names of all parameters are checked by the runner."""
    assert ["parameters" in tags(cell) for cell in code(path)] == [True] + [False] * (len(code(path)) - 1)
    assert papermill.inspect_notebook(str(path))["params_file"]["default"] == '"../params/smoke.yaml"'


@pytest.mark.parametrize("path", LABS, ids=lambda p: p.stem)
class TestLab:
    def test_reads_a_run_and_changes_nothing_in_it(self, path):
        cells, text = code(path), "\n".join(cell.source for cell in read(path))
        found = papermill.inspect_notebook(str(path))
        assert "parameters" in tags(cells[0]) and PARAMETERS - {"overrides"} <= set(found)
        assert found["params_file"]["default"] == '"../../params/smoke.yaml"' and found["run"]["default"] == '"smoke"'
        for promise in ("| **Writes** | nothing", "| **Time** |", "## What we see", "Limits: ", "**Exercises**"):
            assert promise in text
        for cell in cells:
            assert not re.search(r"\.path\(|\bwrite_|\bcommit\(|\bto_(csv|parquet)\b|save_figure", cell.source)
        if "from trl import" in (imports := cells[1].source):  # its trainers report to their maker
            assert 0 <= imports.find('os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"') < imports.find("import matplotlib")

    def test_without_the_extra_it_says_what_to_install_or_starts(self, path, monkeypatch):
        for library in LABS_LIBRARIES:
            monkeypatch.setitem(sys.modules, library, None)
        says, error = r"`labs`.*pip install.*\[labs\]", MedkitError
        if "It needs the extra `labs`" not in "\n".join(cell.source for cell in read(path)):
            says, error = "params_file", NameError  # all of its imports were there: it stops at the first parameter
        with pytest.raises(error, match=says):
            exec(code(path)[1].source, {})


def test_an_exercise_without_the_extra_says_what_to_install(monkeypatch):
    imports = re.compile(rf"\b(?:from|import) (?:{'|'.join(LABS_LIBRARIES)})\b")
    needing = [cell for path in COPIES for cell in code(path) if imports.search(cell.source)]
    for library in LABS_LIBRARIES:
        monkeypatch.setitem(sys.modules, library, None)
    assert needing
    for cell in needing:
        with pytest.raises(MedkitError, match=r"`labs`.*pip install.*\[labs\]"):
            exec(cell.source, {"reading": reading, "MedkitError": MedkitError})


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
class TestExercises:
    def test_a_student_gets_all_but_the_solutions(self, path):
        copy = ROOT / "notebooks" / "exercises" / path.name
        shown = [cell for cell in read(path) if "solution" not in tags(cell)]
        assert [(c.id, c.source) for c in read(copy)] == [(c.id, c.source) for c in shown], "run `make student-copy`"
        assert all(cell.execution_count is None and not cell.outputs for cell in code(copy))
        text = "\n".join(cell.source for cell in read(copy))
        hidden = [line.strip() for cell in read(path) if "solution" in tags(cell) for line in cell.source.splitlines()]
        assert not [line for line in hidden if len(line) > 30 and line in text]

    def test_every_exercise_is_there_with_its_points(self, path):
        number = path.name[1]
        exercises = {name: e for name, e in EXERCISES.items() if name.startswith(number)}
        assert len(exercises) >= 4
        text = "\n".join(cell.source for cell in read(path))
        points, minutes = (sum(e[key] for e in exercises.values()) for key in ("points", "minutes"))
        assert f"{len(exercises)} exercises, {points} points, about {minutes} minutes" in text
        for name, exercise in exercises.items():
            heading = rf"^## {name} · .+ \({exercise['points']} points, {exercise['minutes']} minutes\)$"
            assert re.search(heading, text, re.MULTILINE) and f'check("{name}", ' in text

    def test_cells(self, path):
        cells = code(path)
        assert set(papermill.inspect_notebook(str(path))) == {"params_file", "run"} and "parameters" in tags(cells[0])
        assert "medkit.stage" in cells[1].source and ".path(" not in "".join(c.source for c in cells), (
            "nothing is written"
        )
        assert {tag for cell in cells for tag in tags(cell)} == CHECKED | {"parameters", "solution"}
        assert all(tags(c) == CHECKED for c in cells if c.source.startswith("check"))
