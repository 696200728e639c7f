"""The worked examples of CONTRIBUTING.md do what they print."""

import doctest

from medkit.stage import ROOT


def test_every_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testfile(str(ROOT / "CONTRIBUTING.md"), module_relative=False)
    assert found.failed == 0 and found.attempted > 20
