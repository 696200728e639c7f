"""Students cut from their teacher by removing a block of layers, and the order of examples from easy to hard."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from medkit.modeling.batches import Example, iterate_predicted
from medkit.stage import MedkitError


def measure_blocks(model: nn.Module, examples: Sequence[Example], num_removed: int) -> list[float]:
    """How much each block of `num_removed` consecutive decoder layers turns the hidden state, from one forward pass.

    Entry l is the mean of arccos(cos(h_l, h_{l+n})) / π over the predicted positions, in [0, 1]: h_l goes into layer l,
    h_{l+n} comes out of the block (arXiv 2403.17887). The last layer is in no block, since its output is normalised.
    Raises MedkitError if no layer would stay, or more than there are.
    """
    depth = len(model.get_decoder().layers)
    if not 0 <= num_removed < depth:
        raise MedkitError(
            f"distillation.num_layers is {depth - num_removed}; this model has 1 to {depth} layers to keep"
        )
    states = [predicted.hidden for _, predicted in iterate_predicted(model, examples, hidden_layers=range(depth))]
    hidden = torch.stack([torch.cat([part[layer] for part in states]) for layer in range(depth)])  # (layers, N, H)
    cosines = nn.functional.cosine_similarity(hidden[: depth - num_removed], hidden[num_removed:], dim=-1)
    return (cosines.clamp(-1, 1).arccos() / math.pi).mean(-1).tolist()


def remove_block(distances: Sequence[float], num_removed: int) -> list[int]:
    """Numbers of the layers that stay when the block of the smallest distance (`measure_blocks`) is removed."""
    first = min(range(len(distances)), key=lambda start: distances[start])
    return [layer for layer in range(len(distances) + num_removed) if not first <= layer < first + num_removed]


def order_by_difficulty(teacher_nll: Sequence[float], entity_density: Sequence[float]) -> list[float]:
    """Each example's place between the easiest (0) and the hardest (1), for the `difficulty` of a training.

    An answer is hard if the teacher finds it unlikely and if many of its tokens are doses, drugs and diagnoses: the
    mean of the two ranks, with equal ranks for ties. The paper orders by "medical concept complexity" and does not
    define it. teacher_nll: mean −log p of each answer's tokens under the teacher, in nats; entity_density:
    `Entities.densities`.
    """
    ranks = [rankdata(values) - 1 for values in (teacher_nll, entity_density)]
    return (np.mean(ranks, axis=0) / max(len(teacher_nll) - 1, 1)).tolist()
