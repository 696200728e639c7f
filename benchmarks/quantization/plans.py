"""What compressed forms of a run's student keep: KL to it on validation rows, changed top tokens, bytes of all weights.

Plans are chosen by sensitivities measured on training rows, and rounded to the nearest level or calibrated on training
rows; no test question is read. Weights that are rounded to the nearest are simulated: what a quantised module
multiplies with, in the run's dtype; calibrated ones are those of a quantised copy.
Beside it: how far estimated sensitivities are from one whole run per module. Units: nats, seconds.
"""

import copy
import os
import time

import pandas as pd
import torch
from scipy.stats import spearmanr

from benchmarks.inputs import STUDENT, load_student, make_parser, read_rows
from benchmarks.record import Ratio, versions, write
from medkit.modeling import batches
from medkit.quantization import memory_ledger, plans, quantize, sensitivity

GOAL_SHARE = 0.30  # of the student's bf16 bytes
CHECKED = 8  # modules whose sensitivity is also measured by a run of its own, evenly spread over the estimates


def check_estimates(model, examples, double_quant: bool, estimated: pd.DataFrame) -> pd.DataFrame:
    """Estimated and measured damage in NF4 on the same examples, for modules from the least to the most sensitive."""
    table = estimated[estimated.scheme == "nf4"].sort_values("kl_nats", ignore_index=True)
    table = table.iloc[[round(i * (len(table) - 1) / (CHECKED - 1)) for i in range(CHECKED)]]
    exact, measured = batches.collect_logits(model, examples), []
    for module in table.module:
        with sensitivity.fake_quantized(model, {module: "nf4"}, double_quant):
            drift = batches.measure_drift(exact, batches.collect_logits(model, examples))
        measured.append(drift["kl_nats"])
    return table[["module", "kl_nats"]].rename(columns={"kl_nats": "estimated"}).assign(measured=measured)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.28, GOAL_SHARE, 0.33])
    parser.add_argument("--random", type=int, default=5, help="random plans of the goal's size")
    parser.add_argument("--random-calibrated", type=int, default=2, help="of these, how many are calibrated as well")
    parser.add_argument("--valid-rows", type=int, default=64)
    args = parser.parse_args()

    tokenizer, model, params = load_student(args)
    section = params.quantization
    training, judged = (read_rows(args, params, split) for split in ("labelled", "valid"))
    calibration = batches.encode_questions(tokenizer, training.head(section.calibration_examples))
    valid = batches.encode_questions(tokenizer, judged.head(args.valid_rows))

    load, began, cpu = os.getloadavg(), time.perf_counter(), time.process_time()
    damage = sensitivity.measure_sensitivity(model, calibration, section.double_quant)
    sensitivity_s = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    print("sensitivity", sensitivity_s, flush=True)
    checked = check_estimates(model, calibration, section.double_quant, damage)
    print(checked.to_string(), flush=True)

    shapes = quantize.weight_shapes(model)
    bf16 = int(memory_ledger.plan_bytes(memory_ledger.model_shapes(model.config), {}).bytes.sum())
    norms = bf16 - int(damage[damage.scheme == "unquantized"].bytes.sum())
    fixed = [plans.nf4_plan(shapes, ends) for ends in ("unquantized", "int8", "nf4")] + [plans.paper_plan(shapes)]
    budgets = {share: int(share * bf16) - norms for share in args.shares}
    ours = [plans.budget_plan(damage, size, f"budget_{share:.2f}") for share, size in budgets.items()]
    goal = int(GOAL_SHARE * bf16) - norms
    randoms = [plans.random_plan(damage, goal, seed) for seed in range(args.random)]
    library, _, all_nf4, _ = fixed
    runs = [("nearest", plan) for plan in (*fixed, *ours, *randoms)]
    runs += [("calibrated", plan) for plan in (library, all_nf4, *ours, *randoms[: args.random_calibrated])]
    tables, exact = [], batches.collect_logits(model, valid)
    for kind, plan in runs:
        began, cpu = time.perf_counter(), time.process_time()
        table = sensitivity.measure_plans(model, valid, section.double_quant, [plan], damage)
        if kind == "calibrated":
            quantized = quantize.apply_plan(copy.deepcopy(model), plan, section.double_quant, calibration)
            drift = batches.measure_drift(exact, batches.collect_logits(quantized, valid))
            table = table.assign(kl_nats=drift["kl_nats"], top1_changed=drift["top1_changed"])
        table["rounding"], table["load"] = kind, os.getloadavg()[0]
        table["wall_s"], table["cpu_s"] = time.perf_counter() - began, time.process_time() - cpu
        tables.append(table)
        print(table.to_string(header=len(tables) == 1), flush=True)
    found = pd.concat(tables, ignore_index=True)
    found["share"] = (found.bytes + norms) / bf16

    kl = found.set_index(["plan", "rounding"]).kl_nats
    best = f"budget_{GOAL_SHARE:.2f}"
    of_random = found[found.plan.str.startswith("random")].groupby("rounding").kl_nats
    ratios = {
        "budget/share_of_bf16": Ratio(found.share[found.plan == best].max(), GOAL_SHARE, "lower", 1),
        "budget_calibrated/kl_over_library_nf4": Ratio(kl[best, "calibrated"] / kl["nf4", "nearest"], 1.0, "lower", 1),
        "budget_calibrated/kl_over_nearest": Ratio(kl[best, "calibrated"] / kl[best, "nearest"], None, "lower", 1),
        "nf4_all_calibrated/kl_over_nearest": Ratio(
            kl["nf4_all", "calibrated"] / kl["nf4_all", "nearest"], None, "lower", 1
        ),
    }
    for kind, values in of_random:
        ratios[f"budget/kl_over_best_random/{kind}"] = Ratio(kl[best, kind] / values.min(), 1.0, "lower", len(values))
    agree = float(spearmanr(checked.estimated, checked.measured).statistic)
    ratios["sensitivity/rank_correlation_with_runs"] = Ratio(agree, None, "higher", len(checked))
    setup = {
        "student": f"{STUDENT} of a tiny run", "validation_rows": len(valid), "calibration_rows": len(calibration),
        "validation_positions": sum(e.num_predicted for e in valid),
        "calibration_tokens": sum(len(e.input_ids) for e in calibration),
        "threads": torch.get_num_threads(), "load_at_start": load, "bf16_bytes": bf16,
        "versions": versions("torch", "transformers", "bitsandbytes"),
    }  # fmt: skip
    raw = {"sensitivity_s": sensitivity_s, "checked": checked.to_dict("records"), "plans": found.to_dict("records")}
    write("plans", setup, ratios, raw, args.output)


if __name__ == "__main__":
    main()
