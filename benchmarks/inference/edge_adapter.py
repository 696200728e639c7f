"""One edge file with an adapter that each request switches on or off, against a merged file for every form.

The distilled student of a finished run becomes an edge file, and its adapter a GGUF file beside it; the student with
the adapter merged becomes another edge file. llama.cpp writes the second form's test records with each, greedy, and
their right fields are compared, paired, with those of the run's merged student in torch. Edge file and adapter write
once more under a grammar of the form, and so does the edge file alone, which never learned the form. Then the same
questions are answered at equal lengths, one request at a time and in turns: edge file alone, with the adapter, merged.
Bytes are those of files. Units: seconds, bytes, shares.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import openai
import pandas as pd

from benchmarks.inputs import STUDENT, load_student, make_parser
from benchmarks.record import Ratio, versions, write
from medkit.data import splits
from medkit.evaluation import records
from medkit.inference import workloads
from medkit.inference.server_engine import ADAPTER_OFF, ADAPTER_ON, RETURN_IDS, llama_server
from medkit.lora import adapters
from medkit.modeling import loading
from medkit.prompts import templates
from medkit.quantization import gguf_export


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--format", default="Q5_0", help="of both files, rounded to nearest")
    parser.add_argument("--prompts", type=int, default=6, help="requests that are timed")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each timed request")
    args = parser.parse_args()

    tokenizer, model, params = load_student(args)
    questions = pd.read_parquet(args.run / "01_data" / "questions.parquet")
    answers = pd.read_parquet(args.run / "05_inference" / "predictions.parquet").query("variant == 'lora'")
    answers = answers.merge(questions.loc[questions.kind == splits.SECOND_FORM, ["id"]])
    asked = questions.set_index("id").loc[answers.id].reset_index().assign(scoring="generated")
    prompts = workloads.encode_prompts(tokenizer, asked)
    ends = tokenizer.convert_ids_to_tokens(templates.end_ids(tokenizer))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        edge = gguf_export.export_gguf(model, tokenizer, scratch / "edge" / "student.gguf", args.format)
        folder = args.run / "03_lora" / "adapter"
        adapter = gguf_export.export_adapter(adapters.load_adapter(model, folder), scratch / "edge" / "adapter.gguf")
        student = loading.load_model(args.run / STUDENT, params.models)
        merged = adapters.load_merged(student, folder)
        other = gguf_export.export_gguf(merged, tokenizer, scratch / "merged" / "student.gguf", args.format)
        size = {"threads": args.threads}
        both = stack.enter_context(llama_server(edge, **size, adapter=adapter))
        alone = stack.enter_context(llama_server(other, **size))
        variants = {"edge": (both, ADAPTER_OFF), "edge_lora": (both, ADAPTER_ON), "merged_edge": (alone, {})}
        clients = {at: openai.OpenAI(base_url=at.url, api_key=at.api_key) for at in (both, alone)}

        form = templates.FORMS[splits.SECOND_FORM].model_json_schema()

        def write_answer(variant: str, prompt: list[int], max_tokens: int, grammar: bool = False, **more):
            at, settings = variants[variant]
            settings = settings | ({"json_schema": form} if grammar else {})
            return clients[at].completions.create(
                model="edge", prompt=prompt, max_tokens=max_tokens, temperature=0, **more,
                extra_body=RETURN_IDS | settings | {"cache_prompt": False, "ignore_eos": not more},
            )  # fmt: skip

        written = [answers]
        wanted = [("edge_lora", False), ("merged_edge", False), ("edge", True), ("edge_lora", True)]
        for variant, grammar in wanted:
            texts = [
                write_answer(variant, prompt, params.inference.max_new_tokens, grammar, stop=ends[:4]).choices[0].text
                for prompt in prompts
            ]
            name = f"{variant}, grammar" if grammar else variant
            written.append(answers.assign(variant=name, text=texts, answer_tokens=None))
        timed = {variant: [] for variant in variants}
        for repeat in range(args.repeats + 1):  # the first one warms up
            for variant in variants:
                for prompt in prompts[: args.prompts]:
                    times = write_answer(variant, prompt, args.new_tokens).model_extra["timings"]
                    if repeat:
                        timed[variant].append((times["predicted_per_token_ms"] / 1000, times["prompt_ms"] / 1000))
        num_bytes = {"edge": edge.stat().st_size, "adapter": adapter.stat().st_size, "merged": other.stat().st_size}

    judging = params.evaluation
    scores = records.score_records(pd.concat(written), questions)
    rates = records.measure_records(scores, judging.confidence).set_index(["variant", "metric"])
    rates = rates.drop("tokens", level="metric")[["value", "ci_low", "ci_high", "n"]]
    by_variant = rates.groupby("variant")
    table = {name: {metric: row.tolist() for (_, metric), row in part.iterrows()} for name, part in by_variant}
    ratios = {}
    for variant, baseline in (("edge_lora", "lora"), ("merged_edge", "lora"), ("edge_lora, grammar", "edge_lora")):
        steps = [(variant, baseline, "")]
        row = records.compare_records(scores, judging.confidence, judging.power, judging.margin, steps).iloc[0]
        change = row[["difference", "ci_low", "ci_high"]].tolist()
        table[variant] |= {f"field_accuracy_minus_{baseline}": change}
        ratios[f"{variant}_minus_{baseline}/field_accuracy"] = Ratio(row.difference, None, "higher", len(asked))
    for name, place in (("latency", 0), ("prompt", 1)):
        times = {variant: median(row[place] for row in rows) for variant, rows in timed.items()}
        for variant in ("edge", "merged_edge"):
            ratios[f"edge_lora_over_{variant}/{name}"] = Ratio(
                times["edge_lora"] / times[variant], None, "lower", args.repeats
            )
    two_forms = (num_bytes["edge"] + num_bytes["adapter"]) / (num_bytes["edge"] + num_bytes["merged"])
    ratios["edge_lora_over_merged_edge/bytes_of_two_forms"] = Ratio(two_forms, None, "lower", 1)
    setup = {
        "student": f"{STUDENT} of a finished run", "format": args.format, "threads": args.threads,
        "prompt_tokens": [len(prompt) for prompt in prompts[: args.prompts]], "new_tokens": args.new_tokens,
        "records": len(asked), "bytes": num_bytes, "batch": 1, "warm_up": 1,
        "versions": versions("torch", "peft", "gguf", "xllamacpp"),
    }  # fmt: skip
    write("edge_adapter", setup, ratios, {"table": table, "timed": timed}, args.output, {"table": table})


if __name__ == "__main__":
    main()
