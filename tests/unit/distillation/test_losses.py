"""Divergences on top-k log-probabilities against the dense ones and TRL's, hidden states, entities, and their sum."""

import pytest
import torch
from toys import assert_same_weights

from medkit.distillation import losses
from medkit.distillation.entities import Entities
from medkit.distillation.losses import DistillationLoss, sparse_divergence
from medkit.distillation.teacher_cache import capture_teacher, top_k_logprobs
from medkit.modeling import batches, trainer
from medkit.modeling.batches import Predicted
from medkit.params import load_params
from medkit.stage import ROOT, MedkitError

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def random_logits(rows, vocab, seed=0, scale=3.0, dtype=torch.float32):
    return scale * torch.randn(rows, vocab, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_k_equal_to_the_vocabulary_it_is_trl_s(temperature):
    theirs = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    student, teacher = random_logits(6, 50), random_logits(6, 50, seed=1)
    for beta in BETAS:
        expected = theirs(student[None], teacher[None], beta=beta, temperature=temperature, reduction="sum")
        found = sparse_divergence(student, *top_k_logprobs(teacher, 50), beta, temperature).sum()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_zero_where_student_and_teacher_are_equal_and_leaves_the_student_alone(beta):
    for k in (1, 10, 49, 50):
        for temperature in (1.0, 4.0):
            student = random_logits(20, 50, dtype=torch.float64).requires_grad_()
            found = sparse_divergence(student, *top_k_logprobs(student.detach(), k), beta, temperature)
            torch.testing.assert_close(found.detach(), torch.zeros(20).double(), rtol=0, atol=2e-5)
            found.sum().backward()
            torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_four_tokens_by_hand(temperature):
    """Teacher ½ ¼ ⅛ ⅛ with two tokens kept, student ¼ each. The tail's tokens are alike, so tempering it is exact."""
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    cached = top_k_logprobs(teacher.log(), 2)
    tempered = (teacher ** (1 / temperature)).squeeze()
    p = torch.stack([tempered[0], tempered[1], tempered[2:].sum()]) / tempered.sum()
    q = torch.tensor([0.25, 0.25, 0.5])
    for beta, expected in ((0.0, (p * (p / q).log()).sum()), (1.0, (q * (q / p).log()).sum())):
        found = sparse_divergence(torch.zeros(1, 4), *cached, beta, temperature)
        assert found.item() == pytest.approx(expected.item(), abs=3e-6)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0], ids=["flat", "usual", "sure of itself"])
def test_half_precision_keeps_it_near_zero_and_finite(scale):
    logits = random_logits(200, 100, scale=scale).requires_grad_()
    ids, logprobs = top_k_logprobs(logits.detach(), 20)
    for beta in BETAS:
        found = sparse_divergence(logits, ids, logprobs.half().float(), beta)
        assert found.min() > -1e-5 and found.max() < 1e-2
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert torch.isfinite(gradient).all()


def test_hidden_error_is_the_mse_as_a_share_of_the_teacher_s_mean_square():
    teacher = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    student = torch.tensor([[3.0, 2.0], [30.0, 20.0]])
    expected = (2.0**2 / 2) / ((3.0**2 + 4.0**2) / 2)
    assert losses.hidden_error(student, teacher).tolist() == pytest.approx([expected, expected])
    assert torch.isfinite(losses.hidden_error(student, 0 * teacher)).all()


def test_projections_start_as_the_identity_or_keep_lengths_as_they_can(make_llama, make_examples):
    model, batch = make_llama(), batches.collate(make_examples(4), 0)
    before = batches.predict(model, batch, [0, 2])
    with losses.hidden_projections(model, {0: 2, 2: 5}, 64):
        within = batches.predict(model, batch, [0, 2])
    torch.testing.assert_close(within.hidden, before.hidden)
    assert torch.equal(within.logits, before.logits)
    with losses.hidden_projections(model, [2], 100) as student:
        within = batches.predict(student, batch, [0, 2])
        weight = student.hidden_projections["2"].weight
        torch.testing.assert_close(weight.T @ weight, torch.eye(64), rtol=0, atol=1e-5)
    torch.testing.assert_close(within.hidden[2], before.hidden[2] @ weight.T)
    torch.testing.assert_close(within.hidden[0], before.hidden[0])


def test_after_the_block_the_student_is_as_it_was(make_llama):
    model = make_llama()
    names = set(model.state_dict())
    with pytest.raises(KeyError), losses.hidden_projections(model, [1], 32):
        assert set(model.state_dict()) - names == {"hidden_projections.1.weight"}
        assert any(p is model.hidden_projections["1"].weight for p in model.parameters())
        raise KeyError
    assert set(model.state_dict()) == names and not model._forward_hooks
    with pytest.raises(MedkitError, match=r"0 \(embeddings\) to 3, not \[4\]"):
        losses.hidden_projections(model, [2, 4], 64).__enter__()


FULL = DistillationLoss(
    ce_weight=0.7, kl_weight=0.5, temperature=3.0, hidden_weight=0.2, layers=((1, 4), (2, 6)), entity_weight=0.4
)


@pytest.fixture
def predicted():
    return Predicted(random_logits(6, 20), torch.arange(6), {layer: random_logits(6, 8, layer) for layer in (1, 2)})


@pytest.fixture
def extras():
    teacher = random_logits(6, 20, seed=1)
    ids, logprobs = top_k_logprobs(teacher, 4)
    return {
        "teacher_ids": ids,
        "teacher_logprobs": logprobs,
        "teacher_target_logprobs": teacher.log_softmax(-1)[range(6), range(6)],
        **{f"teacher_hidden_{layer}": random_logits(6, 8, layer) for layer in (4, 6)},
        "entity": torch.tensor([-1, 0, 0, 1, -1, -1]),
        "entity_weights": torch.tensor([2.0, 1.0]),
    }


def test_the_loss_is_the_weighted_sum_of_its_terms(predicted, extras):
    loss, terms = FULL(predicted, extras)
    target = predicted.logits.log_softmax(-1)[range(6), range(6)]
    ours, theirs = target.exp(), extras["teacher_target_logprobs"].exp()
    gaps = 2 * (ours[1] * ours[2] - theirs[1] * theirs[2]).abs() + (ours[3] - theirs[3]).abs()
    errors = [losses.hidden_error(predicted.hidden[a], extras[f"teacher_hidden_{b}"]).sum() for a, b in FULL.layers]
    kl = sparse_divergence(predicted.logits, extras["teacher_ids"], extras["teacher_logprobs"], 0.0, 3.0)
    ce = trainer.cross_entropy(predicted, {})[0]
    expected = {"ce": ce, "forward_kl": kl.sum(), "hidden": sum(errors) / 2, "entity": gaps}
    assert list(terms) == list(expected)
    for name, term in expected.items():
        assert terms[name].item() == pytest.approx(term.item(), rel=1e-5), name
        assert not terms[name].requires_grad
    weights = {"ce": 0.7, "forward_kl": 0.5 * 9, "hidden": 0.2, "entity": 0.4}
    assert loss.item() == pytest.approx(sum(weights[name] * term.item() for name, term in expected.items()), rel=1e-5)


def test_each_divergence_goes_by_its_name(predicted, extras):
    for name, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)):
        total, terms = DistillationLoss(kl_weight=1.0, divergence=name, jsd_beta=0.3)(predicted, extras)
        expected = sparse_divergence(predicted.logits, extras["teacher_ids"], extras["teacher_logprobs"], beta).sum()
        assert list(terms) == [name] and total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_settings_come_from_params():
    changes = {"divergence": "jsd", "jsd_beta": 0.2, "hidden_weight": 0.1, "hidden_layers": [[1, 2], [3, 4]]}
    changes = {f"distillation.{name}": value for name, value in {**changes, "entity_weight": 0.3}.items()}
    loss = DistillationLoss.from_params(load_params(ROOT / "params" / "smoke.yaml", changes).distillation)
    assert loss == DistillationLoss(0.5, 0.5, "jsd", 0.2, 1.0, 0.1, ((1, 2), (3, 4)), 0.3)
    assert loss.hidden_layers == (1, 3) and loss.teacher_layers == (2, 4)


LOSS = DistillationLoss(
    ce_weight=0.5, kl_weight=0.5, divergence="jsd", hidden_weight=1.0, layers=((1, 1), (2, 3)), entity_weight=1.0
)


def test_slices_and_a_kill_change_neither_the_terms_nor_the_weights(make_llama, make_examples, make_section, tmp_path):
    """A teacher's cache, with the first two tokens of each answer as an entity; the projections are learned too."""
    examples = [e for e in make_examples(14) if e.num_predicted > 1][:10]
    teacher = make_llama(seed=7, layers=3, hidden_size=48, initializer_range=0.3)
    cache = capture_teacher(lambda: teacher, examples, tmp_path / "cache", 8, 4, "key", LOSS.teacher_layers)
    marked = Entities([[(0, 2, 1.0 + n % 2)] for n in range(10)], [e.num_predicted for e in examples])

    def train(name, model=None, **settings):
        model = model or make_llama(layers=2)
        with losses.hidden_projections(model, LOSS.hidden_layers, 48):
            start = model.hidden_projections["1"].weight.detach().clone()
            add_extras = lambda numbers: cache.batch(numbers) | marked.batch(numbers)  # noqa: E731
            log = trainer.train(model, examples, make_section(**settings), LOSS, tmp_path / name, 0, add_extras)
            assert not torch.equal(start, model.hidden_projections["1"].weight)
            return log, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    (log, whole), (cut_log, cut) = train("whole"), train("cut", slice_tokens=25)
    for column in ("loss", "ce", "jsd", "hidden", "entity"):
        assert (log[column] > 0).all()
        assert cut_log[column].to_numpy() == pytest.approx(log[column].to_numpy(), abs=5e-5), column
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=0, atol=1e-4, msg=name)

    killed, calls = make_llama(layers=2), iter(range(1, 100))

    def die(*args):
        if next(calls) == 4:
            raise KeyboardInterrupt

    killed.register_forward_pre_hook(die)
    with pytest.raises(KeyboardInterrupt):
        train("killed", killed)
    _, resumed = train("killed")
    assert "hidden_projections.1.weight" in whole
    assert_same_weights(resumed, whole)
