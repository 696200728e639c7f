"""The transformers engine: requests one after the other, in padded batches, or joining and leaving a running batch.

The model comes loaded, with its attention implementation, its dtype and its plan; nothing of it is chosen here. Streams
always share one running batch, whatever the scheduler. How long anything takes is for `workloads` to say.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import (
    Cache,
    CompileConfig,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from medkit.inference.running_batch import PAGE_TOKENS, RunningBatch, pages_in, pages_of, wait_until
from medkit.modeling.batches import bucket_by_length
from medkit.modeling.engine import EngineError, Generation, PromptLogprobs, Request
from medkit.modeling.option_scoring import Item, score_options

SCHEDULERS = ("sequential", "static", "continuous")
READING = 512  # tokens of a prompt read at a time when it is told what the model says: bounds the logits
WRITING = 4  # times as many tokens at once as when scoring: a row that writes needs logits at one position only
NO_END = -1  # an end token no model emits; None would be replaced by the checkpoint's own
GRAPH_TOKENS = 64  # length of the shortest static cache
MOST_GRAPHS = 64  # beyond its own limit of 8 torch goes back to eager, silently


class TorchEngine:
    """`engines.Engine` over a loaded transformers model, greedy unless a `temperature` above 0 has it draw its tokens.

    Draws are over the whole vocabulary and from torch's own generator: `torch.manual_seed` repeats them, except in a
    running batch, whose steps fall differently each time.

    `batch_tokens` bounds a forward pass when scoring; what is being written may hold WRITING times as many tokens of
    cache, prompts and answers and padding, whichever the scheduler (a longer request: alone if sequential or static,
    refused if continuous or a stream). `prefix_sharing` lets requests in the running batch share the pages of equal
    beginnings. `graphs` writes with a static cache and compiled steps in few padded shapes (`warm_up` compiles them);
    with `continuous` it means transformers' CUDA graphs. `fp8_cache` keeps keys and values in 8 bits: other answers.

    Engines may share a model, with one exception: while a running batch of an `eager` model lives, only its engine may
    use the model. `warmup_s` is the time spent in `warm_up` and on starting the running batch: it is in no request's
    times. Raises EngineError for a combination that cannot be had.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int,
        *,
        scheduler: str = "continuous",
        batch_tokens: int,
        prefix_sharing: bool = True,
        graphs: bool = False,
        fp8_cache: bool = False,
        temperature: float = 0.0,
    ):
        if scheduler not in SCHEDULERS:
            raise EngineError(f"scheduler {scheduler!r}: give one of {', '.join(SCHEDULERS)}")
        if fp8_cache and (scheduler == "continuous" or graphs):
            raise EngineError("fp8_cache: transformers has it without pages and graphs only; use sequential or static")
        if temperature < 0:
            raise EngineError(f"temperature {temperature:g}: give 0, which is greedy, or more")
        if graphs:
            _require_graphs(model, scheduler)
        self.model, self.pad_token_id = model, pad_token_id
        self.scheduler, self.batch_tokens, self.prefix_sharing = scheduler, batch_tokens, prefix_sharing
        self.graphs, self.fp8_cache, self.temperature = graphs, fp8_cache, temperature
        self.name = " ".join(["transformers", scheduler, *["graphs"] * graphs, *["fp8"] * fp8_cache])
        self.name += f" at temperature {temperature:g}" if temperature else ""
        self.warmup_s = 0.0
        self._lock = threading.Lock()  # one thread at a time scores, writes batches, starts or ends the running batch
        self._running: RunningBatch | None = None
        self._new_cache(GRAPH_TOKENS)  # a model that cannot have this kind of cache says so now

    # --- the protocol ------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Answers in the order of the requests, none begun before it arrives; with no end token, of the exact length.

        Sequential and static hold the streams while they run. A static batch takes in what has arrived when it begins.
        """
        if not requests:
            return []
        self._check(requests)
        if self.scheduler == "continuous":
            return self._run().join(requests)
        with self._alone():
            return self._queue(requests)

    def stream(self, request: Request) -> Iterator[int]:
        """Tokens of one answer as they come; nothing is computed before the first is asked for.

        Raises EngineError: here for a request that does not fit, at a token if the running batch has died.
        """
        self._check([request], streaming=True)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[int]:
        yield from self._run().stream(request)

    def score(self, items: Sequence[Item]) -> list[list[float]]:
        """Summed log-probability of each answer of each item, in nats. Holds the running batch meanwhile."""
        with self._alone():
            return score_options(self.model, items, self.batch_tokens, self.pad_token_id)

    @torch.inference_mode()
    def prompt_logprobs(self, prompt_ids: Sequence[int], k: int) -> PromptLogprobs:
        """See `engines.PromptReader`. Holds the running batch meanwhile."""
        self._check([Request(prompt_ids, 1)])
        said = PromptLogprobs([], [], [])
        with self._alone():
            ids, cache = torch.tensor(list(prompt_ids), device=self.model.device), None
            for start in range(0, len(ids), READING):
                part, follow = ids[start : start + READING], ids[start + 1 : start + READING + 1]
                read = self.model(input_ids=part[None], past_key_values=cache, use_cache=True)
                logprobs, cache = read.logits[0].float().log_softmax(-1), read.past_key_values
                top = logprobs.topk(min(k, logprobs.shape[-1]))
                said.top_ids += top.indices.tolist()
                said.top_logprobs += top.values.tolist()
                said.token_logprobs += logprobs[: len(follow)].gather(1, follow[:, None])[:, 0].tolist()
        return said

    @property
    def max_tokens(self) -> int:
        """The most that a prompt and its answer may have together, as a stream or in a running batch."""
        return PAGE_TOKENS * pages_in(WRITING * self.batch_tokens)

    @property
    def ended(self) -> bool:
        """Whether its streams write no more, closed or failed; a new engine is needed."""
        return self.model is None or (self._running is not None and self._running.dead)

    def close(self) -> None:
        """End all streams and let the model go."""
        with self._lock:
            if self._running is not None:
                self._running.stop()
            self._running = self.model = None

    def warm_up(self, requests: Sequence[Request]) -> None:
        """Write two tokens in each shape that these requests, all there at once, would be written in."""
        began = time.perf_counter()
        self._check(requests)
        if self.scheduler == "continuous":
            self._run(timed=False).join([Request(request.prompt_ids, 1) for request in requests[:1]])
        else:
            shapes = {}
            for batch in self._batches(range(len(requests)), requests):
                rows = [requests[i] for i in batch]
                shapes.setdefault(self._shape(rows) if self.graphs else None, rows)
            with self._alone():
                for rows in shapes.values():
                    self._write(rows, began, most=2)
        self.warmup_s += time.perf_counter() - began

    def _check(self, requests: Sequence[Request], streaming: bool = False) -> None:
        self._require_open()
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        shared = pages_in(WRITING * self.batch_tokens)
        for request in requests:
            prompt, new = len(request.prompt_ids), request.max_new_tokens
            asked = f"a prompt of {prompt} tokens and {new} new ones"
            if prompt < 1 or new < 1:
                raise EngineError(f"{asked}: at least one of each is needed")
            if limit is not None and prompt + new > limit:
                raise EngineError(
                    f"{asked} make {prompt + new}, the model reads at most {limit}; shorten the prompt or ask for fewer"
                )
            if (streaming or self.scheduler == "continuous") and pages_of(request) > shared:
                raise EngineError(
                    f"{asked} take {pages_of(request)} pages of cache, there are {shared}; "
                    f"raise batch_tokens ({self.batch_tokens})"
                )

    def _require_open(self) -> None:
        if self.model is None:
            raise EngineError(f"{self.name} is closed; make a new engine")

    @contextmanager
    def _alone(self):
        """The model for this thread only: the running batch waits between two of its steps."""
        with self._lock:
            self._require_open()
            with self._running.held() if self._running is not None else nullcontext():
                yield

    def _run(self, timed: bool = True) -> RunningBatch:
        with self._lock:
            self._require_open()
            if self._running is None:
                began = time.perf_counter()
                tokens = WRITING * self.batch_tokens
                graphs = self.graphs and self.scheduler == "continuous"
                self._running = RunningBatch(self.model, self._decoding(), tokens, self.prefix_sharing, graphs)
                self.warmup_s += timed * (time.perf_counter() - began)
            return self._running

    # --- sequential and static ---------------------------------------------------------------------------------------

    def _queue(self, requests: Sequence[Request]) -> list[Generation]:
        """Everything that has arrived is written, then everything that has arrived meanwhile."""
        began = time.perf_counter()
        found: dict[int, Generation] = {}
        waiting = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)
        while waiting:
            wait_until(began + requests[waiting[0]].arrival_s)
            now_s = time.perf_counter() - began
            due = [i for i in waiting if requests[i].arrival_s <= now_s]
            waiting = waiting[len(due) :]
            for batch in self._batches(due, requests):
                found |= zip(batch, self._write([requests[i] for i in batch], began), strict=True)
        return [found[i] for i in range(len(requests))]

    def _batches(self, due: Sequence[int], requests: Sequence[Request]) -> list[list[int]]:
        if self.scheduler == "sequential":
            return [[i] for i in due]
        lengths = [len(requests[i].prompt_ids) + requests[i].max_new_tokens for i in due]
        return [[due[k] for k in batch] for batch in bucket_by_length(lengths, WRITING * self.batch_tokens)]

    def _shape(self, batch: Sequence[Request]) -> tuple[int, int]:
        """Rows and cache tokens of the graph that writes this batch: powers of two, so that there are few."""
        tokens = max(len(r.prompt_ids) for r in batch) + max(r.max_new_tokens for r in batch)
        return _power_of_two(len(batch)), _power_of_two(max(tokens, GRAPH_TOKENS))

    def _new_cache(self, tokens: int) -> Cache | None:
        """None is transformers' own, which grows."""
        if self.graphs and self.scheduler != "continuous":
            return StaticCache(config=self.model.config, max_cache_len=tokens)
        try:
            return QuantizedCache("fp8", self.model.config) if self.fp8_cache else None
        except ValueError as error:
            raise EngineError(f"fp8_cache: {error}") from error

    @torch.inference_mode()
    def _write(self, batch: list[Request], began: float, most: int | None = None) -> list[Generation]:
        """One padded batch, until its longest answer is done or has `most` tokens. The prompts are never compiled."""
        rows, cache_tokens = self._shape(batch)
        idle = [Request([self.pad_token_id], 0)] * (rows - len(batch)) if self.graphs else []
        requests = [*batch, *idle]
        length = max(len(request.prompt_ids) for request in requests)
        input_ids = torch.full((len(requests), length), self.pad_token_id)
        attention_mask = torch.zeros(len(requests), length, dtype=torch.long)
        for row, request in enumerate(requests):
            input_ids[row, length - len(request.prompt_ids) :] = torch.tensor(list(request.prompt_ids))
            attention_mask[row, length - len(request.prompt_ids) :] = 1
        notes = _Notes(requests, began)
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
            self.model.generate(
                input_ids=input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                past_key_values=self._new_cache(cache_tokens),
                generation_config=self._decoding(most or max(request.max_new_tokens for request in batch)),
                stopping_criteria=StoppingCriteriaList([notes]),
            )
        return notes.generations[: len(batch)]

    def _decoding(self, steps: int | None = None) -> GenerationConfig:
        """Greedy or drawn at the temperature, whatever the checkpoint recommends."""
        config = GenerationConfig(
            do_sample=False, max_new_tokens=steps, eos_token_id=NO_END, pad_token_id=self.pad_token_id
        )
        if self.temperature:
            config.update(do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0)
        if self.graphs and self.scheduler != "continuous":
            mode = "reduce-overhead" if self.model.device.type == "cuda" else "default"
            config.compile_config = CompileConfig(mode=mode, dynamic=False)
            config.compile_config._compile_all_devices = True  # else on accelerators only
        return config


class _Notes(StoppingCriteria):
    """Writes down every row's tokens and when they came; a row is done as its request says."""

    def __init__(self, requests: Sequence[Request], began: float):
        self.requests, self.began = requests, began
        begun_s = time.perf_counter() - began
        self.generations = [Generation(begun_s=begun_s) for _ in requests]
        self.done = [request.max_new_tokens < 1 for request in requests]

    def __call__(self, input_ids, scores, **kwargs):
        tokens = input_ids[:, -1].tolist()  # waits for the device: the token is known when its time is taken
        now_s = time.perf_counter() - self.began
        for row, (request, generation, token) in enumerate(zip(self.requests, self.generations, tokens, strict=True)):
            if not self.done[row]:
                generation.token_ids.append(token)
                generation.token_times_s.append(now_s)
                self.done[row] = token in request.end_ids or len(generation.token_ids) >= request.max_new_tokens
        return torch.tensor(self.done, device=input_ids.device)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _require_graphs(model: nn.Module, scheduler: str) -> None:
    if scheduler == "continuous":
        if model.device.type != "cuda":
            raise EngineError("graphs: continuous batching records them on CUDA only; use sequential or static")
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        raise EngineError(f"graphs: {type(quantizer).__name__} weights cannot be compiled; use graphs=False")
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise EngineError("graphs: torch.compile needs a C++ compiler and finds none; install g++ or use graphs=False")
