"""The parts of the paper's inference engine (it is called MIEO), each alone: with it against without it.

Questions of a finished run behind the same solved ones, with answers of log-normal lengths, all there at once; a ratio
is of the times until the last token is there. transformers runs float32, llama.cpp the same weights as F16; without
any part both answer one request after the other and read every prompt whole. `templates`: patients' questions with and
without the text for their problem type, up to the end token. `similar answers`: how often a cache would give the answer
to the most similar earlier question, and how often that answer is wrong. All engines in turns. Units: seconds, tokens.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer

from benchmarks.inputs import STUDENT, load_student, make_parser, read_rows
from benchmarks.record import Ratio, versions, write
from medkit import modeling, prompts, quantization, sources
from medkit.data import problem_types
from medkit.inference import workloads
from medkit.inference.server_engine import ServerEngine, llama_engine
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling.engine import Engine, Generation, Request
from medkit.prompts import templates
from medkit.statistics import wilson

BATCH_TOKENS = 4096  # four times as many in the cache at once: room for every request
SLOTS, SHOTS = 8, 8  # of llama.cpp; solved questions in the shared prefix
PLAIN = {"flash_attn_type": 1, "cache_prompt": False}
PARTS = {  # part: engines with it and without it
    "fused attention": [("transformers", "transformers, eager"), ("llama.cpp", "llama.cpp, eager")],
    "static cache of keys and values": [("transformers, static", "transformers")],
    "continuous batching": [("transformers, batched", "transformers"), ("llama.cpp, batched", "llama.cpp")],
    "shared prefix": [("transformers, prefix", "transformers, batched"), ("llama.cpp, prefix", "llama.cpp")],
    "4-bit weights": [("transformers, 4 bits", "transformers"), ("llama.cpp, 4 bits", "llama.cpp")],
}
THRESHOLDS = (0.7, 0.8, 0.9)  # of ½ Jaccard + ½ cosine


class Eager:
    """An engine whose model computes attention step by step while it writes."""

    def __init__(self, engine: TorchEngine):
        self.engine, self.name = engine, "eager"

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        model, before = self.engine.model, self.engine.model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            return self.engine.generate(requests)
        finally:
            model.set_attn_implementation(before)


class Static(TorchEngine):
    """Keys and values have a place of their own from the start, in place of growing by one with each token."""

    def _config(self, max_new_tokens: int | None = None):
        config = super()._config(max_new_tokens)
        config.cache_implementation = "static"
        return config


def time_parts(engines: dict[str, Engine], requests: Sequence[Request], repeats: int) -> tuple[dict, dict]:
    """The ratio of times of each part, and the share of answers that it leaves as they are."""
    table, answers = workloads.time_in_turns(engines, requests, repeats, warm_up=2)
    median = table.groupby("engine").duration_s.median()
    print(median.to_string(float_format="{:.2f}".format), flush=True)
    ratios, same = {}, {}
    for part, places in PARTS.items():
        for with_it, without in places:
            name = f"{part}/{without.split(',')[0]}"
            ratios[f"{name}/time_with_over_without"] = median[with_it] / median[without]
            same[name] = workloads.agreement(answers[without], answers[with_it])
    return ratios, same


def time_templates(engines: dict[str, Engine], tokenizer, questions: pd.DataFrame, new_tokens: int) -> pd.DataFrame:
    """A row per library and problem type: tokens and seconds of an answer, without and with the template; means."""
    ends, rows = templates.end_ids(tokenizer), []
    for row in questions.itertuples():
        question = {"context": "", "question": row.question, "options": [], "kind": ""}
        for name, template in {"without": prompts.TEXT, "with": templates.OPEN[row.problem]}.items():
            ids, _ = prompts.encode(tokenizer, prompts.render(question, template))
            for library, engine in engines.items():
                [answer] = engine.generate([Request(ids, new_tokens, ends)])
                found = {"prompt_tokens": len(ids), "answer_tokens": len(answer.token_ids)}
                found |= {"seconds": answer.token_times_s[-1]}
                rows.append({"library": library, "problem": row.problem, "template": name, **found})
    table = pd.DataFrame(rows).groupby(["library", "problem", "template"]).mean().unstack("template")
    table.columns = ["_".join(column) for column in table.columns]
    return table.assign(n=questions.problem.value_counts().reindex(table.index, level="problem")).reset_index()


def similar_answers(
    asked: pd.DataFrame, known: pd.DataFrame, embed: Callable[[Sequence[str]], np.ndarray], confidence: float
) -> list[dict]:
    """For each threshold the share of `asked` questions that a cache of the `known` ones, with their right answers,
    would answer, and the share of these answers that are wrong, with intervals. Similarity as in the paper.
    """
    words = CountVectorizer(binary=True).fit([*asked.question, *known.question])
    first, second = words.transform(asked.question).astype(float), words.transform(known.question).astype(float)
    common = (first @ second.T).toarray()
    either = np.asarray(first.sum(1)) + np.asarray(second.sum(1)).T - common
    similarity = (common / either + embed(list(asked.question)) @ embed(list(known.question)).T) / 2
    nearest, answers = similarity.argmax(1), [
        [options[answer] for options, answer in zip(table.options, table.answer, strict=True)]
        for table in (asked, known)
    ]  # fmt: skip
    wrong = np.array([answers[0][i] != answers[1][j] for i, j in enumerate(nearest)])
    rows = []
    for threshold in THRESHOLDS:
        hit = similarity.max(1) >= threshold
        row = {"threshold": threshold, "n": len(asked), "hits": int(hit.sum()), "wrong": int(wrong[hit].sum())}
        row["hit_interval"] = wilson(row["hits"], row["n"], confidence)
        row["wrong_interval"] = wilson(row["wrong"], row["hits"], confidence) if row["hits"] else None
        rows.append(row)
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--requests", type=int, default=16, help="their answers have log-normal lengths")
    parser.add_argument("--median", type=int, default=16, help="tokens of the middle answer")
    parser.add_argument("--longest", type=int, default=96, help="tokens of the longest answer")
    parser.add_argument("--open", type=int, default=4, help="patients' questions of each problem type")
    args = parser.parse_args()

    tokenizer, model, params = load_student(args)
    (_, batched, _), (_, four_bits, _) = load_student(args), load_student(args)
    plan = quantization.nf4_plan(quantization.weight_shapes(four_bits))
    quantization.apply_plan(four_bits, plan, params.quantization.double_quant)
    questions = read_rows(args, params, "valid", "test", number=args.requests)
    shots = read_rows(args, params, "labelled", number=SHOTS).to_dict("records")
    requests = workloads.skewed(
        workloads.encode_prompts(tokenizer, questions, shots), args.median, args.longest, seed=0
    )
    with ExitStack() as stack:

        def in_torch(model, scheduler="sequential", kind=TorchEngine, **settings) -> TorchEngine:
            settings |= {"scheduler": scheduler, "batch_tokens": BATCH_TOKENS}
            return stack.enter_context(closing(kind(model, tokenizer.pad_token_id, **settings)))

        def in_llama(path: Path, slots: int = 1, **options) -> ServerEngine:
            settings = {"threads": args.threads, "options": PLAIN | options}
            return stack.enter_context(llama_engine(path, slots, 2048, **settings))

        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        whole = quantization.export_gguf(model, tokenizer, scratch / "student.gguf", "F16")
        engines = {
            "transformers": in_torch(model),
            "transformers, eager": Eager(in_torch(model)),
            "transformers, static": in_torch(model, kind=Static),
            "transformers, batched": in_torch(batched, "continuous", prefix_sharing=False),
            "transformers, prefix": in_torch(batched, "continuous"),
            "transformers, 4 bits": in_torch(four_bits),
            "llama.cpp": in_llama(whole),
            "llama.cpp, eager": in_llama(whole, flash_attn_type=0),
            "llama.cpp, batched": in_llama(whole, SLOTS),
            "llama.cpp, prefix": in_llama(whole, cache_prompt=True),
            "llama.cpp, 4 bits": in_llama(args.run / "04_quantization" / "edge_small" / "student.gguf"),
        }
        ratios, same = time_parts(engines, requests, args.repeats)
        people = pd.read_parquet(args.run / "01_data" / "open_questions.parquet")
        people = people.assign(problem=people.question.map(problem_types.classify_by_keywords))
        people = people.sample(frac=1, random_state=params.seed).groupby("problem").head(args.open)
        plain = {name: engines[name] for name in ("transformers", "llama.cpp")}
        by_problem = time_templates(plain, tokenizer, people, params.inference.max_new_tokens)
    print(by_problem.to_string(float_format="{:.2f}".format), flush=True)
    for library, table in by_problem.groupby("library"):
        weights = table.n / table.n.sum()
        for what in ("seconds", "prompt_tokens", "answer_tokens"):
            over = (table[f"{what}_with"] * weights).sum() / (table[f"{what}_without"] * weights).sum()
            ratios[f"templates by problem type/{library}/{what}_with_over_without"] = over
    encoder = sources.fetch(params.models.embedder)
    similar = similar_answers(
        read_rows(args, params, "test"), read_rows(args, params, "private", "labelled"),
        lambda texts: modeling.embed_texts(encoder, texts), params.evaluation.confidence,
    )  # fmt: skip
    setup = {
        "student": f"{STUDENT} of a finished run, float32; llama.cpp: the same weights in F16, and the edge file",
        "threads": args.threads, "slots": SLOTS, "shots": SHOTS, "requests": len(requests),
        "prompt_tokens": sum(len(r.prompt_ids) for r in requests),
        "answer_tokens": sum(r.max_new_tokens for r in requests), "patients_questions": len(people),
        "new_tokens": params.inference.max_new_tokens, "statistic": "median over repeats",
        "versions": versions("torch", "transformers", "bitsandbytes", "xllamacpp"),
    }  # fmt: skip
    summary = {"similar": similar, "templates": by_problem.to_dict("records"), "answers_equal": same}
    found = {name: Ratio(value, None, "lower", args.repeats) for name, value in ratios.items()}
    write("mieo", setup, found, summary, args.output, summary)


if __name__ == "__main__":
    main()
