"""Static promises of every committed notebook; no kernel needed."""

import re

import nbformat
import papermill
import pytest

from medkit.reporting import STAGES
from medkit.runner import PARAMETERS, notebooks, stage_names

CHECKED = {"nbval-check-output", "keep_output"}
FORBIDDEN = re.compile(r"^\s*[!%]|sys\.path|^/|['\"]/(?:home|root|tmp|work)\b", re.MULTILINE)


def read(path):
    return nbformat.read(path, as_version=4).cells


def code(path):
    return [cell for cell in read(path) if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def test_the_six_are_there():
    assert stage_names() == STAGES


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
class TestNotebook:
    def test_ran_top_to_bottom(self, path):
        # nbval compares only cells with a count: a stripped notebook would pass with any output
        assert [cell.execution_count for cell in code(path)] == list(range(1, len(code(path)) + 1))

    def test_keeps_output_if_and_only_if_it_is_checked(self, path):
        for cell in code(path):
            assert tags(cell) & CHECKED in (set(), CHECKED), "the two tags go together"
            assert bool(cell.outputs) == bool(tags(cell) & CHECKED), cell.source
        assert any(tags(cell) & CHECKED for cell in code(path))

    def test_checked_output_is_portable(self, path):
        for cell in code(path):
            for output in cell.outputs:
                assert output.output_type == "stream" and output.name == "stdout"
                assert not re.search(r"/\w+/\w+/|\b\d+\.\d{3,}|\b\d+ ms\b", output.text), "no path, raw float or time"

    def test_parameters_cell(self, path):
        places = [i for i, cell in enumerate(code(path)) if "parameters" in tags(cell)]
        assert places == [0]
        found = papermill.inspect_notebook(str(path))
        assert set(found) == PARAMETERS
        assert found["params_file"]["default"] == '"../params/smoke.yaml"', (
            "nbval injects nothing: defaults are what it runs"
        )

    def test_shape_of_the_story(self, path):
        text = "\n".join(cell.source for cell in read(path))
        for promise in (
            "| **Reads** |",
            "| **Writes** |",
            "| **Time** |",
            "**You will learn**",
            "## What we see",
            "**Exercises**",
        ):
            assert promise in text
        assert "stage.commit(" in code(path)[-1].source, "the manifest is written last"

    def test_no_magic_and_no_absolute_path(self, path):
        for cell in code(path):
            assert not FORBIDDEN.search(cell.source), cell.source
