"""The numbers that arXiv 2505.00025 states, as data, and what follows from them by its own arithmetic.

Whether they hold is for `paper` to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PaperClaim:
    """A statement of the paper; `value` is None where it claims without a number, `digits` are its printed decimals.

    unit: share is a change relative to the 16-bit 7B model; GB is as printed. reach: on which side of it success lies.
    """

    id: str
    where: str
    what: str
    value: float | None
    unit: Literal["share", "GB", "s", "tokens/s", "accuracy"]
    digits: int
    reach: Literal["lower", "higher", "near"]


PAPER_CLAIMS = [
    PaperClaim("memory_change", "abstract", "memory, 4-bit against 16-bit", -0.647, "share", 3, "lower"),
    PaperClaim("latency_change", "abstract", "inference latency, 4-bit against 16-bit", -0.124, "share", 3, "lower"),
    PaperClaim("usmle", "abstract", "accuracy on USMLE examinations", 0.921, "accuracy", 3, "higher"),
    PaperClaim("accuracy_kept", "abstract, v1", "professional accuracy is maintained", None, "accuracy", 0, "higher"),
    PaperClaim("teacher_memory", "results table", "memory of the 70B model, FP16", 78.6, "GB", 1, "near"),
    PaperClaim("teacher_latency", "results table", "seconds per problem, 70B", 2.06, "s", 2, "near"),
    PaperClaim("teacher_rate", "results table", "tokens per second, 70B", 25.13, "tokens/s", 2, "near"),
    PaperClaim("student_memory", "results table", "memory of the 7B model, FP16", 14.9, "GB", 1, "near"),
    PaperClaim("student_latency", "results table", "seconds per problem, 7B FP16", 1.45, "s", 2, "near"),
    PaperClaim("student_rate", "results table", "tokens per second, 7B FP16", 28.13, "tokens/s", 2, "near"),
    PaperClaim("method_memory", "results table", "memory of the 7B model, 4-bit", 5.25, "GB", 2, "lower"),
    PaperClaim("method_latency", "results table", "seconds per problem, 7B 4-bit", 1.27, "s", 2, "lower"),
    PaperClaim("method_rate", "results table", "tokens per second, 7B 4-bit", 24.96, "tokens/s", 2, "higher"),
]
"""Abstracts of v1 and v2, and the results table of v2. The v2 table has accuracies for no untuned or unquantised 7B."""
CLAIM = {claim.id: claim for claim in PAPER_CLAIMS}


def tokens_per_problem(stage: Literal["teacher", "student", "method"]) -> float:
    """Length of the paper's answers, from its own columns: seconds per problem times tokens per second."""
    return CLAIM[f"{stage}_latency"].value * CLAIM[f"{stage}_rate"].value


def change_per_token() -> float:
    """Change of the paper's time per token from FP16 to 4 bits, from its own tokens per second; above 0 is slower."""
    return CLAIM["student_rate"].value / CLAIM["method_rate"].value - 1
