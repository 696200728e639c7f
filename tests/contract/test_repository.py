"""Promises of the repository as a whole: README is fresh and true, the environment is named once."""

import json
import re
import subprocess
import tomllib

import pytest
import yaml
from cogapp import Cog

from medkit.reporting import readme
from medkit.reporting.results import load_results
from medkit.stage import DISCLAIMER, ROOT, STAGES

README = (ROOT / "README.md").read_text()
TRACKED = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize(
    "page",
    ["README.md", *(f"docs/{name}.md" for name in ("results", "benchmarks", "teaching", "licences", "glossary"))],
)
def test_tables_are_fresh(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert Cog().main(["cog", "--check", page]) == 0, "run `make readme`"


def test_times_in_the_notebooks_are_fresh():
    results, facts = load_results(readme.RESULTS)
    for path in (ROOT / "notebooks" / f"{name}.ipynb" for name in STAGES):
        notebook = json.loads(path.read_text())
        assert readme.tell_times(path.stem, notebook, results, facts) == notebook, "run `make readme`"


def test_readme_is_short_says_what_it_is_not_and_names_no_file_of_the_package():
    assert len(README.encode()) <= 6_000 and DISCLAIMER in README
    assert not re.search(r"\w+\.py\b", README)


def test_the_lock_pins_every_dependency_and_the_environment_uses_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split("\n") if "==" in line)
    locked = {re.sub(r"[-_.]+", "-", name).lower() for name in lock}
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["dev"]]:
        name = re.match(r"[\w.-]+", requirement)[0]
        assert name in ("pip", "medkit") or re.sub(r"[-_.]+", "-", name).lower() in locked, name
    assert lock["torch"] == "2.13.0"
    (bound,) = (line for line in project["dependencies"] if line.startswith("bitsandbytes"))
    assert "<" in bound, "its byte layout of NF4 is not documented: a new version must be tried first"


def test_every_package_model_and_dataset_has_a_licence():
    sources, _, libraries = (ROOT / "docs" / "licences.md").read_text().partition("## Libraries")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", libraries.partition("]]] -->")[2], re.MULTILINE))
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert sorted(locked) == sorted(name for names in list(rows.values())[1:] for name in names.split(", "))
    assert not [licence for licence in rows if "unknown" in licence.lower() or "copyright" in licence.lower()]
    profiles = "".join(path.read_text() for path in (ROOT / "params").glob("*.yaml"))
    named = re.findall(r"(?:package|repo): ([\w./-]+)", profiles)
    assert named and [name for name in set(named) if f"`{name}`" not in sources] == []
    pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert pip == ["-r requirements.lock", "-e ."]


def test_no_unsafe_loading():
    unsafe = re.compile(r"trust_remote_code\s*=\s*True|yaml\.load\(|pickle\.loads?\(|torch\.load\(")
    paths = [p for p in TRACKED if p.endswith((".py", ".yaml", ".ipynb")) and p != "tests/contract/test_repository.py"]
    assert paths and [path for path in paths if unsafe.search((ROOT / path).read_text())] == []


def test_no_large_file_is_tracked():
    assert [p for p in TRACKED if (ROOT / p).stat().st_size > 1_000_000] == []
