"""The thin package behind the notebooks. Import the module you need: `from medkit import evaluation`."""

import logging
import warnings

__version__ = "0.1.0"

# noise at import that no reader can act on: an optional kernel of bitsandbytes, a name transformers is renaming
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
