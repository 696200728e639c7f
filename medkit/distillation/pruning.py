"""Who learns and in which order: students cut from their teacher, and examples from easy to hard.

What the teacher says is `signals`, what is learned from it `losses`. Nothing here trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata
from torch import nn
from tqdm import tqdm

from medkit.distillation.teacher_cache import SignalsError
from medkit.modeling.batches import Example, collect_nll


def check_same_vocabulary(teacher_tokenizer, student_tokenizer) -> None:
    """Raise SignalsError unless every token has the same id in both: only then do token ids mean the same."""
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    if teacher != student:
        odd = next(iter(teacher.items() ^ student.items()))
        raise SignalsError(
            f"teacher and student have different tokenizers (e.g. {odd}): KL over token ids is not defined "
            f"between them; choose a pair with one vocabulary"
        )


# --- students ------------------------------------------------------------------------------------------------------


def measure_layer_importance(model: nn.Module, examples: Sequence[Example]) -> list[float]:
    """What each decoder layer is worth: rise of the mean answer NLL (nats per token) when it alone is skipped."""
    layers = model.get_decoder().layers
    full = np.mean(collect_nll(model, examples))
    importance = []
    for layer in tqdm(list(layers), desc="layer importance", unit="layer", delay=2, mininterval=10):
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        try:
            importance.append(float(np.mean(collect_nll(model, examples)) - full))
        finally:
            del layer.forward  # the class's own again
    return importance


def choose_layers(importance: Sequence[float], num_layers: int) -> list[int]:
    """The `num_layers` most important layers, in order. Raises ValueError if there are fewer."""
    if num_layers > len(importance):
        raise ValueError(f"distillation.num_layers is {num_layers}, the model has {len(importance)}")
    best = sorted(range(len(importance)), key=lambda i: importance[i], reverse=True)[:num_layers]
    return sorted(best)


# --- the order -----------------------------------------------------------------------------------------------------


def order_by_difficulty(teacher_nll: Sequence[float], entity_density: Sequence[float]) -> list[float]:
    """Each example's place between the easiest (0) and the hardest (1), for `training.train`'s `difficulty`.

    An answer is hard if its teacher finds it unlikely and if much of it is doses, drugs and diagnoses: the mean of the
    two ranks, ties sharing theirs. The paper orders by "medical concept complexity" and does not define it.
    teacher_nll: mean −log p of each answer's tokens under the teacher, in nats; entity_density: `Entities.densities`.
    """
    ranks = [rankdata(values) - 1 for values in (teacher_nll, entity_density)]
    return (np.mean(ranks, axis=0) / max(len(teacher_nll) - 1, 1)).tolist()
