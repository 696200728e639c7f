"""Students cut from their teacher, and examples from easy to hard."""

import copy

import numpy as np
import pytest
import torch

from medkit.distillation import pruning
from medkit.modeling import batches, loading
from medkit.stage import MedkitError


def test_importance_is_the_loss_of_the_model_without_the_layer(make_llama, make_examples):
    model, examples = make_llama(layers=4), make_examples(5)

    def nll(model):
        return np.mean(batches.collect_nll(model, examples))

    without = [loading.keep_layers(copy.deepcopy(model), [i for i in range(4) if i != cut]) for cut in range(4)]
    expected = [nll(cut) - nll(model) for cut in without]
    assert pruning.measure_layer_importance(model, examples) == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, expected)) > 1e-3


def test_measuring_importance_leaves_the_model_as_it_was(make_llama, make_examples):
    model, examples = make_llama(), make_examples(3)
    before = batches.collect_logits(model, examples)
    pruning.measure_layer_importance(model, examples)
    assert torch.equal(batches.collect_logits(model, examples), before)
    assert not [layer for layer in model.get_decoder().layers if "forward" in vars(layer)]


def test_the_most_important_layers_stay_in_their_order():
    assert pruning.choose_layers([0.3, -0.1, 0.9, 0.2], 2) == [0, 2]
    assert pruning.choose_layers([0.3, -0.1, 0.9, 0.2], 4) == [0, 1, 2, 3]
    with pytest.raises(MedkitError, match="num_layers is 5, the model has 4"):
        pruning.choose_layers([0.3, -0.1, 0.9, 0.2], 5)


def test_an_answer_is_hard_if_unlikely_or_full_of_entities():
    found = pruning.order_by_difficulty([0.1, 0.2, 5.0, 0.3, 900.0], [0.0, 0.5, 0.0, 1.0, 0.0])
    assert np.argsort(found, kind="stable").tolist() == [0, 1, 2, 4, 3]
    assert found == pytest.approx([(0 + 1) / 8, (1 + 3) / 8, (3 + 1) / 8, (2 + 4) / 8, (4 + 1) / 8])


def test_only_the_order_of_either_counts():
    nll, density = np.random.default_rng(0).random((2, 50))
    found = pruning.order_by_difficulty(nll, density)
    assert found == pruning.order_by_difficulty(np.exp(5 * nll), density**3)
    assert 0 <= min(found) < max(found) <= 1


def test_one_example_has_a_place():
    assert pruning.order_by_difficulty([2.0], [0.5]) == [0.0]
