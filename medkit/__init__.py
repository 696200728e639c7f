"""The thin package behind the notebooks. Import the room you need: `from medkit import evaluation`."""

__version__ = "0.1.0"

import logging

# on some processors it asks at its import for a package that would load code from the hub; nothing here needs it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
