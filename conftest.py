"""Settings that must be in place before torch or a kernel starts."""

import os
import tempfile


def pytest_configure(config):
    """Notebook tests never write to outputs/; waiting threads spin only a little.

    They write to the folder of the smoke run if `make test` made one: what it trained from the same settings, inputs
    and code is read back there, and every cell runs all the same.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if getattr(config.option, "nbval", False) or getattr(config.option, "nbval_lax", False):
        os.environ["MEDKIT_OUTPUTS"] = os.environ.get("MEDKIT_SMOKE") or tempfile.mkdtemp(prefix="medkit-nbval-")
