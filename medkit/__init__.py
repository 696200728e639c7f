"""The thin package behind the notebooks. Import the module you need: `from medkit import evaluation`."""

import logging
import warnings

__version__ = "0.1.0"

# noise that no reader can act on: an optional kernel, a name that transformers is renaming, progress without widgets
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
