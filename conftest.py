"""Settings that must be in place before torch or a kernel starts."""

import os
import tempfile


def pytest_configure(config):
    """Notebook tests write to a folder of their own, never to outputs/; waiting threads spin only a little."""
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if getattr(config.option, "nbval", False) or getattr(config.option, "nbval_lax", False):
        os.environ["MEDKIT_OUTPUTS"] = tempfile.mkdtemp(prefix="medkit-nbval-")
