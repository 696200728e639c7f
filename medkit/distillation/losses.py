"""The distillation loss: λ1·CE + λ2·T²·D + λ3·MSE(hidden) + λ4·Σ_e w_e·|P_S(e) − P_T(e)| (arXiv 2505.00025, eq. 6).

Each term is a sum over predicted positions, so slices of a batch add up to the batch. T² is after arXiv 1503.02531.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import nn

from medkit.modeling.batches import Predicted
from medkit.params import DistillationParams
from medkit.stage import MedkitError

FLOOR = 1e-6
PROJECTIONS = "hidden_projections"
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}


def divergence(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalised Jensen–Shannon divergence of two log-distributions (N, buckets) in nats, shape (N,).

    With the mixture m = β·teacher + (1 − β)·student it is β·KL(teacher ‖ m) + (1 − β)·KL(student ‖ m) (arXiv
    2306.13649, eq. 1). This is zero at both ends of β. As in TRL, the ends mean the limits of its slope instead: β = 0
    is the forward KL(teacher ‖ student) = lim JSD/β, β = 1 the reverse KL(student ‖ teacher) = lim JSD/(1 − β).
    """

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(-1)

    if beta in (0.0, 1.0):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def sparse_divergence(
    logits: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Divergence of teacher and student per position in nats, (N,), over the teacher's k tokens and one bucket.

    logits (N, V) of the student; teacher_ids, teacher_logprobs (N, k), the log-probabilities at temperature 1; beta: 0
    forward KL, 1 reverse KL, between them JSD. With k = V it is the dense divergence. It is 0 iff the k probabilities
    and the rest are equal, at any temperature: with a temperature both models' rest counts as uniform over V − k
    tokens. At temperature 1 it is never above the dense divergence (data-processing inequality).
    """
    rest = logits.shape[-1] - teacher_ids.shape[-1]
    student_logprobs = logits.log_softmax(-1).gather(-1, teacher_ids)
    both = (with_rest(logprobs, rest, temperature) for logprobs in (teacher_logprobs, student_logprobs))
    return divergence(*both, beta)


def with_rest(logprobs: torch.Tensor, rest: int = 1, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities (N, k) at temperature 1 → at another one, with a bucket for the `rest` other tokens."""
    if not rest:
        return (logprobs / temperature).log_softmax(-1)
    # rounding can leave the bucket less than nothing: that of both models gets a millionth more
    tail = (-torch.expm1(logprobs.logsumexp(-1, keepdim=True))).clamp(min=0).add(FLOOR).log()
    buckets = torch.cat([logprobs / temperature, (tail - math.log(rest)) / temperature + math.log(rest)], -1)
    return buckets.log_softmax(-1)


def hidden_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error of hidden states (N, H), mean over units, divided by the teacher's mean square; (N,).

    0: equal; 1: as large as for a student of zeros. Hidden states grow from layer to layer, so a plain MSE (arXiv
    1909.10351, eq. 8) gives the last layers the most weight. Each position has its own scale (arXiv 1908.09355, eq. 7),
    so the loss of a position does not depend on its batch.
    """
    return (student - teacher).square().mean(-1) / teacher.square().mean(-1).clamp(min=1e-12)


@contextmanager
def hidden_projections(student: nn.Module, layers: Collection[int], teacher_size: int) -> Iterator[nn.Module]:
    """Within the block, the student's hidden states of these layers pass a learned projection to `teacher_size` units.

    The projections are parameters of the student: its optimizer trains them and its checkpoints hold them. They start
    as the identity where the sizes agree, else as a random orthogonal map, and are removed after the block: save the
    student then. Raises MedkitError for a layer that the student does not have.
    """
    config, like = student.config.get_text_config(), next(student.parameters())
    if unknown := sorted(layer for layer in layers if layer > config.num_hidden_layers):
        raise MedkitError(
            f"distillation.hidden_layers: the student has layers 0 (embeddings) to {config.num_hidden_layers}, not "
            f"{unknown}; name layers that it has"
        )
    generator = torch.Generator().manual_seed(0)
    projections = nn.ModuleDict()
    for layer in sorted(layers):
        start = torch.eye(teacher_size, config.hidden_size)
        if teacher_size != config.hidden_size:
            nn.init.orthogonal_(start, generator=generator)
        projection = nn.Linear(config.hidden_size, teacher_size, bias=False)
        projection.weight = nn.Parameter(start.to(like.device, like.dtype))
        projections[str(layer)] = projection

    def project(module: nn.Module, args: tuple, output):  # in the forward pass, as DDP and FSDP need it
        if output.hidden_states is not None:
            states = list(output.hidden_states)
            for layer, projection in projections.items():
                states[int(layer)] = projection(states[int(layer)])
            output.hidden_states = tuple(states)
        return output

    student.add_module(PROJECTIONS, projections)
    try:
        with student.register_forward_hook(project):
            yield student
    finally:
        delattr(student, PROJECTIONS)


def entity_gaps(
    student: torch.Tensor, teacher: torch.Tensor, entity: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """w_e·|P_S(e) − P_T(e)| of each entity, (E,), with P(e) the product of its tokens' probabilities (chain rule).

    student, teacher (N,): log-probabilities of the target tokens; entity (N,): number of the entity at a position, −1
    for none; weights (E,).
    """
    inside = entity >= 0

    def probabilities(logprobs: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(len(weights), device=logprobs.device, dtype=logprobs.dtype)
        return sums.index_add(0, entity[inside], logprobs[inside]).exp()

    return weights * (probabilities(student) - probabilities(teacher)).abs()


@dataclass(frozen=True)
class DistillationLoss:
    """The weighted sum of the terms, for `modeling.train`. A term of weight 0 is not computed and needs no extras.

    Terms are logged without their weights, as `ce`, the divergence's name, `hidden` and `entity`.
    """

    ce_weight: float = 0.0
    kl_weight: float = 0.0  # Of the divergence, also if it is not a KL
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    jsd_beta: float = 0.5  # In (0, 1), for `jsd` alone
    temperature: float = 1.0
    hidden_weight: float = 0.0
    layers: tuple[tuple[int, int], ...] = ()
    """Pairs of a student's and a teacher's layer, counted as in `output_hidden_states`; the term is their mean."""
    entity_weight: float = 0.0

    @classmethod
    def from_params(cls, section: DistillationParams) -> Self:
        names = set(cls.__dataclass_fields__) - {"layers"}
        layers = tuple((student, teacher) for student, teacher in section.hidden_layers)
        return cls(**section.model_dump(include=names), layers=layers)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """Layers of the student whose states are needed."""
        return tuple(layer for layer, _ in self.layers) if self.hidden_weight else ()

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Layers of the teacher whose states the cache must hold."""
        return tuple(sorted({layer for _, layer in self.layers})) if self.hidden_weight else ()

    def __call__(self, predicted: Predicted, extras: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs = predicted.logits.log_softmax(-1)
        ids = predicted.targets[:, None]
        if self.kl_weight:
            ids = torch.cat([extras["teacher_ids"], ids], -1)
        top, target = logprobs.gather(-1, ids).split([ids.shape[-1] - 1, 1], -1)
        target = target[:, 0]

        weighted = {}
        if self.ce_weight:
            weighted["ce"] = self.ce_weight, -target.sum()
        if self.kl_weight:
            rest, beta = logprobs.shape[-1] - top.shape[-1], BETAS.get(self.divergence, self.jsd_beta)
            both = (with_rest(each, rest, self.temperature) for each in (extras["teacher_logprobs"], top))
            weighted[self.divergence] = self.kl_weight * self.temperature**2, divergence(*both, beta).sum()
        if self.hidden_weight:
            pairs = [(predicted.hidden[ours], extras[f"teacher_hidden_{theirs}"]) for ours, theirs in self.layers]
            weighted["hidden"] = self.hidden_weight, sum(hidden_error(*pair).sum() for pair in pairs) / len(pairs)
        if self.entity_weight:
            gaps = entity_gaps(target, extras["teacher_target_logprobs"], extras["entity"], extras["entity_weights"])
            weighted["entity"] = self.entity_weight, gaps.sum()
        total = sum(weight * term for weight, term in weighted.values())
        return total, {name: term.detach() for name, (_, term) in weighted.items()}
