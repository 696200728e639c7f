"""`medkit serve` on a run's edge file, asked by many clients at once: no answer is lost, and none is another client's.

Each client asks a diagnosis of its own, again and again, through OpenAI's client, and compares each answer with the
one that the server gave when nobody else asked: the same words, and a confidence that is nearly the same, because the
order of sums depends on what else is in a batch. Every tenth answer is streamed. Memory is the resident size of
llama.cpp's process, at half the time and at the end. Units: seconds, bytes.
"""

import asyncio
import re
import time
from contextlib import contextmanager
from itertools import count
from threading import Thread

import openai
import pandas as pd
import psutil
import uvicorn

from benchmarks.inputs import make_parser, read_rows
from benchmarks.record import Ratio, versions, write
from medkit.inference import serve
from medkit.inference.server_engine import llama_server
from medkit.inference.tasks import read_tasks
from medkit.params import load_params

NEARLY = 0.02


@contextmanager
def serving(path, slots: int, threads: int):
    """The router before llama.cpp's server: its URL, and llama.cpp's process."""
    with llama_server(path, slots=slots, context_tokens=512, threads=threads) as address:
        llama = psutil.Process().children()[-1]
        router = serve.make_router(address, None, read_tasks(path), serve.control_tokens(path))
        server = uvicorn.Server(uvicorn.Config(router, port=0, log_level="error"))
        thread = Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", llama
        server.should_exit = True
        thread.join()


async def ask(client: openai.AsyncOpenAI, question: str, stream: bool) -> tuple[str, float]:
    """The words of the answer without its numbers, and its confidence."""
    settings = {"model": "edge", "messages": [{"role": "user", "content": question}], "temperature": 0}
    answer = await client.chat.completions.create(**settings, stream=stream)
    turns = [chunk async for chunk in answer] if stream else [answer]
    text = "".join(getattr(c, "delta" if stream else "message").content for turn in turns for c in turn.choices)
    return re.sub(r"[\d.]+", "", text), turns[0].metadata["confidence"]


async def load(url: str, questions: list[str], duration_s: float, llama: psutil.Process) -> dict:
    """Ask for `duration_s` seconds, one client per question; an answer that has begun is waited for."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        alone = {question: await ask(client, question, stream=False) for question in questions}
        rows, end = [], time.monotonic() + duration_s

        async def keep_asking(question: str) -> None:
            for number in count():
                if (began := time.monotonic()) > end:
                    return
                try:
                    text, confidence = await ask(client, question, stream=number % 10 == 9)
                    same = text == alone[question][0] and abs(confidence - alone[question][1]) < NEARLY
                    fault = None if same else "another answer"
                except openai.OpenAIError as error:
                    fault = repr(error)
                rows.append({"latency_s": time.monotonic() - began, "fault": fault})

        async def memory_at(seconds: float) -> int:
            await asyncio.sleep(seconds)
            return llama.memory_info().rss

        early, late, *_ = await asyncio.gather(
            memory_at(duration_s / 2), memory_at(duration_s), *map(keep_asking, questions)
        )
    table = pd.DataFrame(rows)
    return {
        "answers": len(table), "faults": table.fault.value_counts().to_dict(), "memory_over_half": late / early,
        "latency_p50_s": table.latency_s.median(), "latency_p95_s": table.latency_s.quantile(0.95),
    }  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=4)
    args = parser.parse_args()

    params = load_params(args.params)
    texts = read_rows(args, params, "valid", "test", number=args.clients).question.tolist()
    path = args.run / "04_quantization" / "edge" / "student.gguf"
    with serving(path, args.slots, args.threads) as (url, llama):
        found = asyncio.run(load(url, texts, args.seconds, llama))
    faults = sum(found["faults"].values())
    ratios = {
        "answers_lost_or_mixed_up": Ratio(faults / found["answers"], 0.0, "lower", 1),
        "memory_end_over_middle": Ratio(found["memory_over_half"], 1.02, "lower", 1),
    }
    setup = {
        "run": args.run.name, "clients": args.clients, "seconds": args.seconds, "slots": args.slots,
        "threads": args.threads, "questions": "diagnoses without options: 21 chapters are scored", **found,
        "versions": versions("openai", "starlette", "uvicorn", "xllamacpp"),
    }  # fmt: skip
    write("serve_load", setup, ratios, {}, args.output)


if __name__ == "__main__":
    main()
