"""The thin package behind the notebooks. Import the room you need: `from medkit import evaluation`."""

import logging

__version__ = "0.1.0"
# at its import it asks for a package that would download code from the hub, on processors with AVX512-BF16 alone
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
