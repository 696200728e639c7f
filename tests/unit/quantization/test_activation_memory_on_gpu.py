"""What the ledger computes from shapes is what CUDA's allocator counted: the committed 7B runs on an H100."""

import json

import pytest

from medkit.quantization import memory_budget, memory_ledger, plans
from medkit.stage import ROOT

STUDENT = "DeepSeek-R1-Distill-Qwen-7B"
TOLERANCE = 0.05
STATIC = "a static cache, whole from the start, beside a CUDA graph's own pool"
NOT_COVERED = {"bf16_eager": "eager attention holds its scores", "bf16_static_compiled": STATIC}


def covered(shapes):
    """Contender → the plan whose format it has; all of them decode by `generate`, with SDPA and a growing cache."""
    matrices = {weight.module: weight.shape for weight in shapes if len(weight.shape) == 2}
    return {
        "bf16_sdpa": {},
        "nf4_library": plans.nf4_plan(matrices).schemes,
        "paper_mix": plans.paper_plan(matrices).schemes | {"lm_head": "nf4"},  # LLM.int8() stores what int8 does
    }


def measured():
    """(run, contender) → what was measured, and the setup it was measured in."""
    found = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("shape7b*.json")):
        record = json.loads(path.read_text())
        for part in ("contenders", "contenders_of_another_run"):
            for name, result in record["raw"].get(part, {}).items():
                if "error" not in result:
                    found[f"{path.name.partition('.')[0]}/{part}", name] = (result, record["setup"])
    return found


MEASURED = measured()
CONFIG = memory_budget.read_config(STUDENT)
SDPA = [key for key in MEASURED if key[1] not in NOT_COVERED]


@pytest.mark.parametrize(("run", "name"), SDPA, ids=[f"{name} of {run.partition('/')[0]}" for run, name in SDPA])
def test_the_peak_of_a_generation_is_what_the_ledger_computes(run, name):
    """The total, and what stands beside the weights by itself: of 14 GiB alone, 5 % would hide any activation."""
    shapes, (result, setup) = memory_ledger.model_shapes(CONFIG), MEASURED[run, name]
    schemes, batch, prompt = covered(shapes)[name], setup["batch"], setup["prompt_tokens"]
    last = prompt + setup["new_tokens"] - 1  # tokens in the cache at the last step
    weights = int(memory_ledger.plan_bytes(shapes, schemes).bytes.sum())
    beside = max(
        memory_ledger.kv_cache_bytes(CONFIG, batch, tokens, 2)
        + memory_ledger.activation_bytes(CONFIG, shapes, schemes, batch, tokens)[of]
        for of, tokens in (("prefill", prompt), ("decode", last))
    )
    ratios = {
        "total": (weights + beside) / result["generation_peak_bytes"],
        "weights": weights / result["weight_bytes"],
        "beside them": beside / (result["generation_peak_bytes"] - result["weight_bytes"]),
    }
    print(f"{run} {name}: computed over measured", {part: round(ratio, 4) for part, ratio in ratios.items()})
    assert ratios == pytest.approx(dict.fromkeys(ratios, 1.0), abs=TOLERANCE)
