"""Students cut from their teacher by the importance of layers, and the order of examples from easy to hard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata
from torch import nn
from tqdm import tqdm

from medkit.modeling.batches import Example, collect_nll
from medkit.stage import MedkitError


def measure_layer_importance(model: nn.Module, examples: Sequence[Example]) -> list[float]:
    """Importance of each decoder layer: rise of the mean answer NLL (nats per token) when this layer is skipped."""
    layers = model.get_decoder().layers
    full = np.mean(collect_nll(model, examples))
    importance = []
    for layer in tqdm(list(layers), desc="layer importance", unit="layer", delay=2, mininterval=10):
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        try:
            importance.append(float(np.mean(collect_nll(model, examples)) - full))
        finally:
            del layer.forward  # the method of the class is visible again
    return importance


def choose_layers(importance: Sequence[float], num_layers: int) -> list[int]:
    """Numbers of the `num_layers` most important layers, in order. Raises MedkitError if the model has fewer."""
    if num_layers > len(importance):
        raise MedkitError(f"distillation.num_layers is {num_layers}, the model has {len(importance)}; choose fewer")
    return sorted(sorted(range(len(importance)), key=lambda i: importance[i], reverse=True)[:num_layers])


def order_by_difficulty(teacher_nll: Sequence[float], entity_density: Sequence[float]) -> list[float]:
    """Each example's place between the easiest (0) and the hardest (1), for the `difficulty` of a training.

    An answer is hard if the teacher finds it unlikely and if many of its tokens are doses, drugs and diagnoses: the
    mean of the two ranks, with equal ranks for ties. The paper orders by "medical concept complexity" and does not
    define it. teacher_nll: mean −log p of each answer's tokens under the teacher, in nats; entity_density:
    `Entities.densities`.
    """
    ranks = [rankdata(values) - 1 for values in (teacher_nll, entity_density)]
    return (np.mean(ranks, axis=0) / max(len(teacher_nll) - 1, 1)).tolist()
