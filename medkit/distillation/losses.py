"""What a student learns from besides the answers: the teacher's distribution, its hidden states, its whole entities.

A student is trained on λ1·CE + λ2·T²·D + λ3·MSE(hidden) + λ4·Σ_e w_e·|P_S(e) − P_T(e)| (arXiv 2505.00025, eq. 6; T²
after arXiv 1503.02531). `DistillationLoss` is that sum; the functions before it are its terms. Each is a sum over the
predicted positions of a slice, so that slices of a batch and batches of a step add up. Nothing here trains, reads
signals from disk or finds entities: they arrive as `extras`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from medkit.modeling.batches import Predicted
from medkit.params import DistillationParams

FLOOR = 1e-6
PROJECTIONS = "hidden_projections"
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


# --- from the distribution -----------------------------------------------------------------------------------------


def divergence(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalised Jensen–Shannon divergence of two log-distributions (N, buckets) in nats, shape (N,).

    With the mixture m = β·teacher + (1 − β)·student it is β·KL(teacher ‖ m) + (1 − β)·KL(student ‖ m) (arXiv
    2306.13649, eq. 1). That vanishes at both ends of β, so there the limits of its slope are meant, as in TRL: β = 0 is
    the forward KL(teacher ‖ student) = lim JSD/β, β = 1 the reverse KL(student ‖ teacher) = lim JSD/(1 − β).
    """
    if beta == 0.0:
        return _kl(teacher, student)
    if beta == 1.0:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def sparse_divergence(
    logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    beta: float,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The divergence of teacher and student per position, (N,), over the k kept tokens and one bucket for the others.

    logits (N, V); teacher_ids, teacher_logprobs (N, k), the log-probabilities at temperature 1. With k = V this is the
    dense divergence; it is 0 iff the teacher's kept probabilities and tail mass equal the student's, at any
    temperature: both tails count as even over their V − k tokens when they are tempered. At temperature 1 it is never
    above the dense one: merging tokens into a bucket can only lower it (data-processing inequality).
    """
    rest = logits.shape[-1] - teacher_ids.shape[-1]
    kept = logits.log_softmax(-1).gather(-1, teacher_ids)
    return divergence(*(_buckets(found, rest, temperature) for found in (teacher_logprobs, kept)), beta)


def sparse_kl(logits, teacher_ids, teacher_logprobs, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher ‖ student): the student must cover all that the teacher says. See `sparse_divergence`."""
    return sparse_divergence(logits, teacher_ids, teacher_logprobs, 0.0, temperature)


def sparse_reverse_kl(logits, teacher_ids, teacher_logprobs, temperature: float = 1.0) -> torch.Tensor:
    """KL(student ‖ teacher): the student must say nothing that the teacher would not. See `sparse_divergence`."""
    return sparse_divergence(logits, teacher_ids, teacher_logprobs, 1.0, temperature)


def sparse_jsd(logits, teacher_ids, teacher_logprobs, temperature: float = 1.0, beta: float = 0.5) -> torch.Tensor:
    """Between the two, for 0 < β < 1, and bounded. See `sparse_divergence`."""
    return sparse_divergence(logits, teacher_ids, teacher_logprobs, beta, temperature)


def _buckets(kept: torch.Tensor, rest: int, temperature: float) -> torch.Tensor:
    """Log-probabilities (N, k) at temperature 1 → at a temperature, with a bucket for the `rest` other tokens."""
    if not rest:
        return (kept / temperature).log_softmax(-1)
    # rounding blurs what the kept tokens leave, and can leave nothing: both tails get a millionth more
    tail = (-torch.expm1(kept.logsumexp(-1, keepdim=True))).clamp(min=0).add(FLOOR).log()
    buckets = torch.cat([kept / temperature, (tail - math.log(rest)) / temperature + math.log(rest)], -1)
    return buckets.log_softmax(-1)


# --- from hidden states --------------------------------------------------------------------------------------------


def hidden_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error of hidden states (N, H), mean over units, as a share of the teacher's mean square; (N,).

    0 is equal, 1 is as far as saying nothing. The states of a model grow from layer to layer, so a plain MSE (arXiv
    1909.10351, eq. 8) would hear the last ones most. Each position is scaled by itself, as in arXiv 1908.09355, eq. 7,
    and not by a variance over the batch: its loss then is the same in any slice.
    """
    return (student - teacher).square().mean(-1) / teacher.square().mean(-1).clamp(min=1e-12)


@contextmanager
def hidden_projections(
    student: nn.Module, layers: Collection[int], teacher_size: int, seed: int = 0
) -> Iterator[nn.Module]:
    """Within the block the student's hidden states of these layers are learned linear images with `teacher_size` units.

    The projections are parameters of the student: its optimizer trains them, its checkpoints hold them, and they run
    inside its forward pass, where DDP and FSDP look. They start as the identity where the sizes agree, else as a random
    orthogonal map. After the block they are gone, whatever happened: save the student then.
    Raises ValueError for a layer that the student does not have and for an adapter model, whose checkpoints hold only
    the adapter.
    """
    if hasattr(student, "peft_config"):
        raise ValueError("hidden states are learned by a whole student, not by an adapter; set hidden_weight to 0")
    config, like = student.config.get_text_config(), next(student.parameters())
    if odd := sorted(layer for layer in layers if layer > config.num_hidden_layers):
        raise ValueError(
            f"hidden_layers: the student has layers 0 (embeddings) to {config.num_hidden_layers}, not {odd}"
        )
    generator = torch.Generator().manual_seed(seed)
    projections = nn.ModuleDict()
    for layer in sorted(layers):
        start = torch.eye(teacher_size, config.hidden_size)
        if teacher_size != config.hidden_size:
            nn.init.orthogonal_(start, generator=generator)
        projection = nn.Linear(config.hidden_size, teacher_size, bias=False)
        projection.weight = nn.Parameter(start.to(like.device, like.dtype))
        projections[str(layer)] = projection

    def project(module: nn.Module, args: tuple, kwargs: dict, output):
        if output.hidden_states is not None:
            states = list(output.hidden_states)
            for layer, projection in projections.items():  # only of the positions that get logits, as the head does
                states[int(layer)] = projection(states[int(layer)][:, -kwargs.get("logits_to_keep", 0) :])
            output.hidden_states = tuple(states)
        return output

    student.add_module(PROJECTIONS, projections)
    hook = student.register_forward_hook(project, with_kwargs=True)
    try:
        yield student
    finally:
        hook.remove()
        delattr(student, PROJECTIONS)


# --- from entities -------------------------------------------------------------------------------------------------


def entity_gaps(
    student: torch.Tensor, teacher: torch.Tensor, entity: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """w_e·|P_S(e) − P_T(e)| of each entity, (E,), with P(e) the product of its tokens' probabilities (chain rule).

    student, teacher (N,): log-probabilities of the target tokens; entity (N,): the entity a position belongs to, −1 for
    none; weights (E,).
    """
    inside = entity >= 0

    def chances(logprobs: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(weights), device=logprobs.device, dtype=logprobs.dtype)
        return sums.index_add(0, entity[inside], logprobs[inside]).exp()

    return weights * (chances(student) - chances(teacher)).abs()


# --- the sum -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillationLoss:
    """A `training.Loss`: the weighted sum of the terms. A term of weight 0 is not computed and needs no extras.

    Terms are logged unweighted under `ce`, the divergence's name, `hidden` and `entity`: their magnitudes tell whether
    a weight does anything. The fields identify the loss to a checkpoint.
    """

    ce_weight: float = 0.0
    kl_weight: float = 0.0
    """Of the divergence, whichever it is."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    jsd_beta: float = 0.5
    """In (0, 1), for `jsd` alone."""
    temperature: float = 1.0
    hidden_weight: float = 0.0
    layers: tuple[tuple[int, int], ...] = ()
    """Pairs of a student's and a teacher's layer, counted as in `output_hidden_states`; the term is their mean."""
    entity_weight: float = 0.0

    @classmethod
    def from_params(cls, section: DistillationParams) -> DistillationLoss:
        return cls(
            ce_weight=section.ce_weight,
            kl_weight=section.kl_weight,
            divergence=section.divergence,
            jsd_beta=section.jsd_beta,
            temperature=section.temperature,
            hidden_weight=section.hidden_weight,
            layers=tuple((ours, theirs) for ours, theirs in section.hidden_layers),
            entity_weight=section.entity_weight,
        )

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Layers of the student whose states are needed."""
        return tuple(layer for layer, _ in self.layers) if self.hidden_weight else ()

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Layers of the teacher whose states the signals must hold."""
        return tuple(sorted({layer for _, layer in self.layers})) if self.hidden_weight else ()

    def __call__(self, predicted: Predicted, extras: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs = predicted.logits.log_softmax(-1)
        wanted = predicted.targets[:, None]
        if self.kl_weight:
            wanted = torch.cat([extras["teacher_ids"], wanted], -1)
        *kept, target = logprobs.gather(-1, wanted).split([wanted.shape[-1] - 1, 1], -1)
        kept, target = kept[0], target[:, 0]

        weighted = {}
        if self.ce_weight:
            weighted["ce"] = self.ce_weight, -target.sum()
        if self.kl_weight:
            rest, beta = logprobs.shape[-1] - kept.shape[-1], BETAS.get(self.divergence, self.jsd_beta)
            both = (_buckets(found, rest, self.temperature) for found in (extras["teacher_logprobs"], kept))
            weighted[self.divergence] = self.kl_weight * self.temperature**2, divergence(*both, beta).sum()
        if self.hidden_weight:
            pairs = [(predicted.hidden[ours], extras["teacher_hidden"][theirs]) for ours, theirs in self.layers]
            weighted["hidden"] = self.hidden_weight, sum(hidden_error(*pair).sum() for pair in pairs) / len(pairs)
        if self.entity_weight:
            gaps = entity_gaps(target, extras["teacher_target_logprobs"], extras["entity"], extras["entity_weights"])
            weighted["entity"] = self.entity_weight, gaps.sum()
        total = sum(weight * term for weight, term in weighted.values())
        return total, {name: term.detach() for name, (_, term) in weighted.items()}
