"""4-bit weights with bitsandbytes.

NF4 (arXiv 2305.14314): blocks of 64 weights are divided by their largest magnitude and rounded to the nearest of
sixteen levels, the quantiles of a normal distribution; double quantization stores the scales in 8 bits as well.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from medkit import models
from medkit.params import ModelsParams, QuantizationParams


def nf4_config(section: QuantizationParams, dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 said out loud: the library's defaults are fp4 and float32 arithmetic."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def load_nf4(folder: Path, params: ModelsParams, section: QuantizationParams) -> nn.Module:
    """The model in `folder` with every linear layer but the head in NF4."""
    return models.load_model(folder, params, quantization_config=nf4_config(section, getattr(torch, params.dtype)))
