"""K-quants of the edge file, by llama.cpp's own quantiser: where its binding `llama_cpp` is installed (extra llama).

They mix formats of 4 to 8 bits in blocks of 256 weights, each matrix as llama.cpp sees fit. A matrix whose rows are no
multiple of 256 takes one of the older formats instead, often of 5 bits, which OpenVINO GenAI does not read; llama.cpp
reads all of them.
"""

from __future__ import annotations

import logging
from pathlib import Path

from medkit.quantization.gguf_tokenizer import ExportError

K_QUANTS = ("Q4_K_M", "Q5_K_M", "Q6_K")


def require(weight_type: str):
    """llama.cpp's binding. Raises ExportError where it is missing."""
    try:
        import llama_cpp
    except ImportError as error:
        raise ExportError(
            f"weight type {weight_type}: only llama.cpp makes it, and llama_cpp cannot be imported ({error}); "
            f"pip install -e '.[llama]', or take Q4_0"
        ) from error
    return llama_cpp


def quantise(source: Path, target: Path, weight_type: str) -> None:
    """Write the GGUF file `source`, in 16 or 32 bits, to `target` in one of K_QUANTS. Raises ExportError."""
    llama_cpp = require(weight_type)
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # a line per matrix otherwise
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{weight_type}")
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target), settings):
        raise ExportError(f"llama.cpp could not quantise {source.name} to {weight_type}: its reason is above")
