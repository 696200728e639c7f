"""Where the attention backend matters: a prefill and one decode step over contexts, for every backend that runs here.

`without` is the same model with attention taken out (each token's query is passed on as the result): what a backend
takes beyond it is attention's own time, scores, softmax and mask included. Random tokens: time does not depend on them.
The next step after a prefill reads its whole cache. All contenders in turns, in one process. Units: seconds.
"""

import importlib.util
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache

from benchmarks.inputs import STUDENT, make_parser
from benchmarks.record import Ratio, versions, write
from medkit import plotting
from medkit.modeling import loading
from medkit.params import load_params
from medkit.stage import ROOT

CONTEXTS = (512, 1024, 2048, 4096, 8192)
WITHOUT = "without"
STEPS = 4  # decode steps per pass; the median counts


def pass_on(module: nn.Module, query: torch.Tensor, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, None]:
    """In the place of attention (B, heads, S, D) → (B, S, heads, D), without looking at a key or a value."""
    return query.transpose(1, 2).contiguous(), None


def backends(model: nn.Module) -> list[str]:
    found = ["eager", "sdpa"]
    if model.device.type == "cuda":
        packages = {"flash_attn": "flash_attention_2", "flash_attn_interface": "flash_attention_3"}
        found += [name for package, name in packages.items() if importlib.util.find_spec(package)]
    return [*found, WITHOUT]


@torch.inference_mode()
def time_pass(model: nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of the prefill of (1, S), and the median of STEPS steps after it."""
    cache, times_s = DynamicCache(config=model.config), []
    for tokens in (ids, *[ids[:, :1]] * STEPS):
        wait(model)
        began = time.perf_counter()
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        wait(model)
        times_s.append(time.perf_counter() - began)
    return {"prefill_s": times_s[0], "decode_s": float(torch.tensor(times_s[1:]).median())}


def wait(model: nn.Module) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def time_contexts(model: nn.Module, contexts: list[int], repeats: int, longest_eager: int) -> pd.DataFrame:
    """A row per context, repeat and backend. Eager holds all scores of a layer, so it stops at a length of its own."""
    rows = []
    for context in contexts:
        ids = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(context))
        for repeat in range(-1, repeats):
            for backend in backends(model):
                if backend == "eager" and context > longest_eager:
                    continue
                model.set_attn_implementation(backend)
                found = time_pass(model, (ids[:, :64] if repeat < 0 else ids).to(model.device))
                if repeat >= 0:  # the first, short one warms up
                    rows.append({"context": context, "repeat": repeat, "backend": backend, **found})
        print(pd.DataFrame(rows).query("context == @context").to_string(), flush=True)
    return pd.DataFrame(rows)


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """Medians per context and backend, and the share of them that is attention's own."""
    wide = table.groupby(["context", "backend"], sort=False)[["prefill_s", "decode_s"]].median()
    without = wide.xs(WITHOUT, level="backend")
    attention = 1 - without.reindex(wide.index, level="context") / wide
    return wide.join(attention.clip(lower=0).add_suffix("_share")).reset_index()


def draw(found: pd.DataFrame, path: Path) -> None:
    """The share of attention in both phases over the length of the context, one line per backend."""
    plotting.set_style()
    colours = {"eager": "#bdbdbd", "sdpa": "#08519c", "flash_attention_2": "#d55e00", "flash_attention_3": "#009e73"}
    fig, axes = plt.subplots(1, 2, sharey=True, figsize=plotting.SIZE, layout="constrained")
    for ax, phase, title in zip(
        axes, ("prefill", "decode"), ("Reading a prompt", "One more token after it"), strict=True
    ):
        for backend, table in found[found.backend != WITHOUT].groupby("backend"):
            ax.plot(table.context, 100 * table[f"{phase}_s_share"], "o-", color=colours[backend], label=backend)
        ax.set_xscale("log", base=2)
        ax.set_xticks(contexts := sorted(found.context.unique()), contexts)
        ax.set(title=title, xlabel="tokens in the context", ylim=(0, 100))
    axes[0].set_ylabel("attention's share of the time, %")
    axes[0].legend()
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, dpi=100)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--max-context", type=int, default=CONTEXTS[-1])
    parser.add_argument("--longest-eager", type=int, default=CONTEXTS[-1], help="eager holds S² scores per head")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "attention.png")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    AttentionInterface.register(WITHOUT, pass_on)
    load = os.getloadavg()
    params = load_params(args.params).models
    if loading.pick_device(params.device).type == "cuda":  # FlashAttention takes 16 bits only
        params = params.model_copy(update={"dtype": "bfloat16"})
    model = loading.load_model(args.run / STUDENT, params)
    contexts = [c for c in CONTEXTS if c <= min(args.max_context, model.config.max_position_embeddings)]
    table = time_contexts(model, contexts, args.repeats, args.longest_eager)
    found = shares(table)
    print(found.to_string(float_format="{:.4f}".format))
    ratios = {}
    by = found.set_index(["context", "backend"])
    for context in contexts:
        for phase in ("prefill", "decode"):
            share = by[f"{phase}_s_share"][context, "sdpa"]
            ratios[f"{phase}/{context}/sdpa_share_of_time"] = Ratio(share, None, "lower", args.repeats)
            for backend in by.index.get_level_values("backend").unique().difference(["sdpa", WITHOUT]):
                if (context, backend) in by.index:
                    ratio = by[f"{phase}_s"][context, backend] / by[f"{phase}_s"][context, "sdpa"]
                    ratios[f"{phase}/{context}/{backend}_over_sdpa"] = Ratio(ratio, None, "lower", args.repeats)
    setup = {
        "model": f"{STUDENT} of a tiny run", "dtype": str(model.dtype), "batch": 1, "threads": args.threads,
        "decode": f"median of {STEPS} steps after the prefill", "without": "attention replaced by its query",
        "statistic": "median over repeats, backends in turns", "load_before": load, "load_after": os.getloadavg(),
        "versions": versions("torch", "transformers", "flash-attn"),
    }  # fmt: skip
    raw = {"passes": table.to_dict("records"), "medians": found.to_dict("records")}
    write("attention", setup, ratios, raw, args.output)
    draw(found, args.figure)


if __name__ == "__main__":
    main()
