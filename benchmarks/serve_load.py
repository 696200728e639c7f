"""Does the server keep its promises under load? 64 clients of OpenAI's own for a minute, against a finished run.

Every answer is compared with the engine's own answer to the same question, asked when nobody else was there. Some
clients hang up after the first token. Server and clients share the machine's cores, so times are those of a crowd at
one table, not of a network. Units: seconds, bytes, tokens.
"""

import argparse
import asyncio
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import openai
import pandas as pd
import psutil
from record import RESULTS, Ratio, result_path, versions, write

from medkit.outputs import ROOT, Stage, StageError

SERVER = [sys.executable, "-m", "medkit", "serve"]
SETTLING_S = 10.0  # memory grows until every client has been answered once; flat is judged from here on
SAMPLE_S = 0.5
LEAVE = 16  # one request in so many is left after its first token
MODEL_WAIT_S = 180


class Server:
    """The command as a process of its own, on a free port, with its memory sampled."""

    def __init__(self, run: str, variant: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [*SERVER, "--run", run, "--variant", variant, "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT)
        self.url, self.samples = f"http://127.0.0.1:{self.port}/v1", []

    def wait(self) -> str:
        """The name of the model that it serves, once it does."""
        client, ends = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0), time.monotonic() + MODEL_WAIT_S
        while True:
            try:
                return client.models.list().data[0].id
            except openai.APIConnectionError:
                if self.process.poll() is not None or time.monotonic() > ends:
                    sys.exit("serve_load: the server did not start; its last words are above")
                time.sleep(0.2)

    async def sample(self, began: float) -> None:
        process = psutil.Process(self.process.pid)
        while True:
            self.samples.append((time.perf_counter() - began, process.memory_info().rss))
            await asyncio.sleep(SAMPLE_S)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


async def ask(client: openai.AsyncOpenAI, question: str, common: dict, stream: bool, leave: bool = False) -> dict:
    """One chat: text, token times (seconds from sending, streamed answers only), and how it ended."""
    began, text, times_s = time.perf_counter(), [], []
    fields = {"messages": [{"role": "user", "content": question}], **common}
    try:
        if not stream:
            answer = await client.chat.completions.create(**fields)
            return {"status": "200", "text": answer.choices[0].message.content, "times_s": [],
                    "tokens": answer.usage.completion_tokens}  # fmt: skip
        async with await client.chat.completions.create(stream=True, **fields) as chunks:
            async for chunk in chunks:
                text.append(chunk.choices[0].delta.content)
                times_s += [time.perf_counter() - began] * len(chunk.choices[0].token_ids)
                if leave:
                    return {"status": "left", "text": None, "times_s": times_s, "tokens": len(times_s)}
        return {"status": "200", "text": "".join(text), "times_s": times_s, "tokens": len(times_s)}
    except openai.APIStatusError as error:
        status = str(error.status_code)
    except openai.APIError as error:
        status = type(error).__name__
    return {"status": status, "text": None, "times_s": times_s, "tokens": 0}


async def load(server: Server, questions: list[str], common: dict, clients: int, seconds: float) -> dict:
    """Everything raw: the answers asked alone, then `clients` asking without pause for `seconds`."""
    async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120) as client:
        alone = {question: (await ask(client, question, common, stream=False))["text"] for question in questions}
        answers, began = [], time.perf_counter()

        async def visit(number: int) -> None:
            draw = random.Random(number)
            while time.perf_counter() - began < seconds:
                question, stream = draw.choice(questions), draw.random() < 0.5
                leave = stream and draw.random() < 2 / LEAVE
                answer = await ask(client, question, common, stream, leave)
                answers.append(answer | {"question": question, "equal": answer["text"] == alone[question]})

        sampling = asyncio.create_task(server.sample(began))
        await asyncio.gather(*(visit(number) for number in range(clients)))
        duration_s = time.perf_counter() - began
        sampling.cancel()
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/metrics")
    metrics = connection.getresponse().read().decode()
    return {"alone": alone, "answers": answers, "duration_s": duration_s, "metrics": metrics}


def summarise(found: dict, samples: list[tuple[float, int]], last_s: float) -> dict:
    """Statuses, times and memory of one pass. Memory is judged from SETTLING_S to the last second of full load."""
    whole = [answer for answer in found["answers"] if answer["status"] == "200"]
    wrong = [answer for answer in whole if not answer["equal"]]
    others = set(found["alone"].values())
    timed = [answer["times_s"] for answer in whole if len(answer["times_s"]) > 1]
    ttft_s, latency_s = ([t[0] for t in timed], [(t[-1] - t[0]) / (len(t) - 1) for t in timed])
    memory = np.array([sample for sample in samples if SETTLING_S <= sample[0] <= last_s])
    late = memory[memory[:, 0] >= last_s / 2]
    slopes = [float(np.polyfit(part[:, 0], part[:, 1], 1)[0]) for part in (memory, late)]
    return {
        "sent": len(found["answers"]),
        "statuses": dict(Counter(answer["status"] for answer in found["answers"])),
        "answered": len(whole),
        "different": len(wrong),
        "different_questions": len({answer["question"] for answer in wrong}),
        "answers_of_another_question": sum(answer["text"] in others for answer in wrong),
        "duration_s": found["duration_s"],
        "throughput_tokens_per_s": sum(answer["tokens"] for answer in found["answers"]) / found["duration_s"],
        "ttft_s": {"p50": float(np.median(ttft_s)), "p95": float(np.quantile(ttft_s, 0.95))},
        "latency_s_per_token": {"p50": float(np.median(latency_s)), "p95": float(np.quantile(latency_s, 0.95))},
        "rss_bytes": {
            "settled": int(memory[0, 1]), "max": int(memory[:, 1].max()), "last": int(memory[-1, 1]),
            "half_time": int(late[0, 1]), "slope_bytes_per_s": slopes[0], "slope_bytes_per_s_second_half": slopes[1],
        },
        "rss_samples": [[round(t, 1), int(rss)] for t, rss in samples],
        "server_metrics": [line for line in found["metrics"].splitlines() if line.startswith("medkit_requests_total")],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="tiny", help="a finished run")
    parser.add_argument("--variant", default="edge")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        table = pd.read_parquet(Stage(args.run, "06_evaluation").require("01_data", "open_questions.parquet"))
    except StageError as error:
        sys.exit(f"serve_load: {error}")
    questions = table.question.drop_duplicates().sample(args.questions, random_state=0).tolist()
    server = Server(args.run, args.variant)
    try:
        extra = {"return_token_ids": True}
        common = {"model": server.wait(), "max_tokens": args.max_tokens, "temperature": 0, "extra_body": extra}
        loaded = os.getloadavg()
        found = asyncio.run(load(server, questions, common, args.clients, args.seconds))
        exit_code = server.stop()
    finally:
        server.process.kill()
    raw = summarise(found, server.samples, args.seconds) | {"exit_code": exit_code, "loadavg_before": loaded}
    kept = raw["sent"] - raw["statuses"].get("left", 0)
    rss = raw["rss_bytes"]
    ratios = {
        "answered": Ratio(raw["answered"] / kept, 1.0, "higher", kept),
        "equal_to_asked_alone": Ratio(1 - raw["different"] / raw["answered"], 1.0, "higher", raw["answered"]),
        "memory_last_over_settled": Ratio(rss["last"] / rss["settled"], 1.05, "lower", 1),
        "memory_last_over_half_time": Ratio(rss["last"] / rss["half_time"], None, "lower", 1),
        "memory_max_over_settled": Ratio(rss["max"] / rss["settled"], None, "lower", 1),
    }
    setup = {
        "server": " ".join(SERVER[1:]), "run": args.run, "variant": args.variant, "clients": args.clients,
        "seconds": args.seconds, "questions": f"{len(questions)} open questions of the run", "greedy": True,
        "max_tokens": args.max_tokens, "streamed": "half", "left_after_the_first_token": f"one request in {LEAVE}",
        "memory": f"resident size of the server, every {SAMPLE_S:g} s, judged from {SETTLING_S:g} s on",
        "times": "of streamed answers, at the client; clients and server share the cores",
        "versions": versions("openai", "starlette", "uvicorn", "openvino-genai", "torch", "transformers"),
    }  # fmt: skip
    write("serve_load", setup, ratios, raw, args.output)
    print(result_path("serve_load", args.output).read_text().partition('"rss_samples"')[0])


if __name__ == "__main__":
    main()
