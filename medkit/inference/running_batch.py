"""One running batch that requests join when they arrive and leave when they are done: transformers' paged batching.

transformers' manager does the batching in a thread of its own. What is added here: a request enters only when pages for
all of its tokens are free, so none is ever thrown out and read again; results find the thread that waits for them; and
whoever waits hears of it when the manager dies. Not asynchronous: there, a request that is cancelled while a step is
under way takes the manager down with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from math import ceil
from queue import SimpleQueue

from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from medkit.modeling.engine import EngineError, Generation, Request

PAGE_TOKENS = 64  # a beginning that is shared is shared by whole pages
STEP_TOKENS = 512  # read in one step: a long prompt comes in pieces, so that the others go on writing
KEPT_FREE = 0.15  # share of the pages below which transformers lets no prompt in


@dataclass
class _Reader:
    """Who waits for one request."""

    pages: int
    news: SimpleQueue = field(default_factory=SimpleQueue)
    """What was written since the last news, with its times; None when nothing more can come."""
    taken: int = 0
    finished: bool = False
    error: str | None = None


class RunningBatch:
    """A running batch over `tokens` of cache. Any number of threads may use it; end it with `stop`.

    On a CPU transformers' own default takes most of the memory, so the cache is sized here. Raises EngineError if it
    cannot be had.
    """

    def __init__(self, model: nn.Module, decoding: GenerationConfig, tokens: int, prefix_sharing: bool, graphs: bool):
        self.model, self.attention = model, model.config._attn_implementation
        self.pages = self.free = pages_in(tokens)
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=ceil(self.pages / (1 - KEPT_FREE)) + 1,
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=min(self.pages, STEP_TOKENS),
            allow_block_sharing=prefix_sharing,
            use_cuda_graph=graphs,
            use_async_batching=False,
            auto_switch_to_flash=False,
        )
        try:
            self.manager = model.init_continuous_batching(decoding, config)
            self.manager.warmup()
        except (ValueError, MemoryError) as error:
            raise EngineError(f"continuous batching over {tokens} tokens of cache: {error}") from error
        self.manager.start()
        self.dead = False
        self.readers: dict[str, _Reader] = {}
        self._numbers = count()
        self._first = threading.Lock()  # held by the one that waits for room, so that small requests do not pass it
        self._room = threading.Condition()
        threading.Thread(target=self._deliver, daemon=True).start()

    def join(self, requests: Sequence[Request]) -> list[Generation]:
        """All answers, in order. Requests enter as they arrive; a beginning read by an earlier call is read again."""
        self.forget()
        began = time.perf_counter()
        entered: dict[int, tuple[str, _Reader]] = {}
        found = []
        try:
            for i in sorted(range(len(requests)), key=lambda i: requests[i].arrival_s):
                wait_until(began + requests[i].arrival_s)
                entered[i] = self._enter(requests[i], streaming=False)
            for i in range(len(requests)):
                (said,) = self._read(entered[i][1])
                times_s = [at - began for at in said.token_times_s]
                found.append(Generation(said.token_ids, times_s, said.begun_s - began))
        finally:
            for number, _ in entered.values():
                self._leave(number, cancel=True)
        return found

    def stream(self, request: Request) -> Iterator[int]:
        """Tokens of one answer as they come; closing the iterator cancels the request."""
        number, reader = self._enter(request, streaming=True)
        try:
            for said in self._read(reader):
                yield from said.token_ids
        finally:
            self._leave(number, cancel=True)

    def forget(self) -> None:
        """Drop what is kept of finished requests for others that begin alike, so that equal calls take equal time."""
        if self.manager.is_running():
            with self.manager.pause():
                self.manager.batch_processor.cache.evict_cached_blocks()

    @contextmanager
    def held(self):
        """The batch waits between two of its steps, and the model has the attention it came with.

        transformers runs the batch of an eager model with `paged|eager`, which refuses every other forward pass.
        """
        with self.manager.pause() if self.manager.is_running() else nullcontext():
            running = self.model.config._attn_implementation
            try:
                if running != self.attention:
                    self.model.set_attn_implementation(self.attention)
                yield
            finally:
                if running != self.attention:
                    self.model.set_attn_implementation(running)

    def stop(self) -> None:
        self.manager.stop(hard_stop=True)
        self.manager.destroy()

    def _enter(self, request: Request, streaming: bool) -> tuple[str, _Reader]:
        """Add a request when there is room for it, in the order of asking."""
        number, reader = str(next(self._numbers)), _Reader(pages_of(request))
        with self._first, self._room:
            self._room.wait_for(lambda: self.dead or self.free >= reader.pages)
            if self.dead:
                raise EngineError(f"continuous batching has stopped: {self._reason()}; make a new engine")
            self.free -= reader.pages
            self.readers[number] = reader
        added = self.manager.add_request(
            list(request.prompt_ids),
            request_id=number,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=list(request.end_ids),
            streaming=streaming,
            record_timestamps=not streaming,
        )
        if added is None:
            reader.news.put(None)
        return number, reader

    def _leave(self, number: str, cancel: bool) -> None:
        """Give the room back, once: whoever comes first, the end of the answer or the one who no longer wants it."""
        with self._room:
            reader = self.readers.pop(number, None)
            if reader is not None:
                if cancel:
                    self.manager.cancel_request(number)  # before the room is free: the next step begins with it
                self.free += reader.pages
                self._room.notify_all()

    def _read(self, reader: _Reader) -> Iterator[Generation]:
        while (said := reader.news.get()) is not None:
            yield said
        if not reader.finished:
            raise EngineError(f"continuous batching broke off an answer: {reader.error or self._reason()}")

    def _reason(self) -> str:
        return str(self.manager.background_thread_status.fatal_error or "it was closed")

    def _deliver(self) -> None:
        """Hand results to their readers until the batch ends; it ends with the process, closed or not."""
        try:
            while self.manager.is_running():
                if not threading.main_thread().is_alive():
                    self.manager.stop(hard_stop=True)
                self._hand_on(self.manager.get_result(timeout=1))
            while (result := self.manager.get_result(timeout=0)) is not None:
                self._hand_on(result)
        finally:
            with self._room:
                self.dead = True
                for reader in self.readers.values():
                    reader.news.put(None)
                self._room.notify_all()

    def _hand_on(self, result) -> None:
        reader = None if result is None else self.readers.get(result.request_id)
        if reader is None:  # cancelled meanwhile
            return
        times_s = result.timestamps or []
        if result.is_finished():
            reader.error, reader.finished = result.error, result.error is None
            self._leave(result.request_id, cancel=False)
        if result.error is None:
            news = result.generated_tokens[reader.taken :], times_s[reader.taken :]
            reader.news.put(Generation(*news, begun_s=result.lifespan[0]))
            reader.taken = len(result.generated_tokens)
        if result.is_finished():
            reader.news.put(None)


def pages_in(tokens: int) -> int:
    return max(1, tokens // PAGE_TOKENS)


def pages_of(request: Request) -> int:
    return ceil((len(request.prompt_ids) + request.max_new_tokens) / PAGE_TOKENS)


def wait_until(moment: float) -> None:
    """Sleep until `time.perf_counter` has reached `moment`, never less."""
    while (left_s := moment - time.perf_counter()) > 0:
        time.sleep(left_s)
