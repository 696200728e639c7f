"""Students cut from their teacher, and examples from easy to hard."""

import numpy as np
import pytest
import torch
from torch import nn

from medkit.distillation import pruning
from medkit.modeling import batches, loading
from medkit.stage import MedkitError


def test_distance_of_a_block_is_the_angle_between_its_input_and_its_output(make_llama, make_examples):
    model, examples = make_llama(layers=4), make_examples(5)
    expected = []
    for start in range(3):
        angles = []
        for example in examples:
            output = model(torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states
            before, after = (output[layer][0, example.loss_start - 1 : -1] for layer in (start, start + 1))
            angles += (nn.functional.cosine_similarity(before, after, dim=-1).arccos() / np.pi).tolist()
        expected.append(np.mean(angles))
    assert pruning.measure_blocks(model, examples, 1) == pytest.approx(expected, abs=1e-4)


def test_a_block_that_does_nothing_is_the_one_to_go(make_llama, make_examples):
    model, examples = make_llama(layers=5), make_examples(3)
    for layer in model.get_decoder().layers[1:3]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    before = batches.collect_logits(model, examples)
    kept = pruning.remove_block(pruning.measure_blocks(model, examples, 2), 2)
    assert kept == [0, 3, 4]
    assert torch.allclose(batches.collect_logits(loading.keep_layers(model, kept), examples), before, atol=1e-5)


def test_nothing_to_remove_keeps_all_and_all_is_too_many(make_llama, make_examples):
    model, examples = make_llama(layers=4), make_examples(3)
    assert pruning.remove_block(pruning.measure_blocks(model, examples, 0), 0) == [0, 1, 2, 3]
    for removed, kept in ((4, 0), (-1, 5)):
        with pytest.raises(MedkitError, match=f"num_layers is {kept}; this model has 1 to 4"):
            pruning.measure_blocks(model, examples, removed)


def test_an_answer_is_hard_if_unlikely_or_full_of_entities():
    found = pruning.order_by_difficulty([0.1, 0.2, 5.0, 0.3, 900.0], [0.0, 0.5, 0.0, 1.0, 0.0])
    assert np.argsort(found, kind="stable").tolist() == [0, 1, 2, 4, 3]
    assert found == pytest.approx([(0 + 1) / 8, (1 + 3) / 8, (3 + 1) / 8, (2 + 4) / 8, (4 + 1) / 8])
    assert found == pruning.order_by_difficulty(np.log([0.1, 0.2, 5.0, 0.3, 900.0]), [0.0, 0.25, 0.0, 1.0, 0.0])
    assert pruning.order_by_difficulty([2.0], [0.5]) == [0.0]
