"""The room depends on bitsandbytes' storage format of a bounded version."""

import tomllib

from medkit.stage import ROOT


def test_bitsandbytes_has_an_upper_bound():
    """`packing_format_for_cpu` and the byte layout of NF4 are not documented, so a new version must be tried first."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (bound,) = (line for line in dependencies if line.startswith("bitsandbytes"))
    assert "<" in bound
