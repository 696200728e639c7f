"""Requests in line for one engine: who is answered now, who waits, who is sent away, and what was counted.

The engine blocks, so it is read on threads of its own; the event loop only passes tokens on. What a stream can hold is
bounded by the tokens that were asked for. Nothing of a prompt or an answer is logged.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from medkit.engines import Engine, EngineError, PromptLogprobs, PromptReader, Request
from medkit.serving_schema import ApiError

RETRY_AFTER_S = 1  # clients double it themselves when they are sent away again
CLOSE_WITHIN_S = 10.0  # an engine stops after its current token; one that takes longer hangs
TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a server takes on. Requests beyond `max_running` wait, beyond `max_waiting` more they are sent away."""

    context_tokens: int
    """Prompt and answer together: the model's own limit, or the engine's `max_tokens` where that is less."""
    chat_tokens: int = 256
    """Length of a chat's answer that names none."""
    max_running: int = 16
    max_waiting: int = 64
    max_body_bytes: int = 2**20
    body_timeout_s: float = 10.0
    request_timeout_s: float = 300.0
    """From the end of the body to the end of the answer, waiting included."""
    grace_s: float = 30.0
    """How long a shutdown waits for answers that are being written."""


class Metrics:
    """Counts for /metrics, in a registry of their own. Seconds and tokens."""

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        more = {"registry": self.registry}
        self.requests = Counter("medkit_requests", "Requests by route and status", ["route", "status"], **more)
        self.prompt_tokens = Counter("medkit_prompt_tokens", "Tokens read", **more)
        self.answer_tokens = Counter("medkit_answer_tokens", "Tokens written", **more)
        Gauge("medkit_running", "Requests the engine works on", **more).set_function(running)
        Gauge("medkit_waiting", "Requests in line", **more).set_function(waiting)
        self.ttft_s = Histogram("medkit_ttft_seconds", "Request read to first token", buckets=TTFT_BUCKETS_S, **more)
        self.latency_s_per_token = Histogram(
            "medkit_latency_seconds_per_token", "Mean over an answer's tokens after the first",
            buckets=LATENCY_BUCKETS_S, **more,
        )  # fmt: skip


class EngineQueue:
    """One engine and its line. Everything but `_read` runs on the event loop."""

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits = engine, limits
        self.running = self.inside = 0
        self.abandoned = False
        self._slots = asyncio.Semaphore(limits.max_running)
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting_for: set[asyncio.Queue] = set()
        self.metrics = Metrics(lambda: self.running, lambda: max(0, self.inside - self.running))

    def start(self) -> None:
        for number in range(self.limits.max_running):
            threading.Thread(target=self._serve, name=f"engine-{number}", daemon=True).start()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place inside, for the whole of a request. Raises ApiError (429) if all are taken."""
        if self.inside >= self.limits.max_running + self.limits.max_waiting:
            raise ApiError(
                429,
                f"{self.limits.max_running} requests are running and {self.limits.max_waiting} wait; try again later",
                code="overloaded",
                headers={"retry-after": str(RETRY_AFTER_S)},
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def tokens(self, request: Request, deadline_s: float) -> AsyncIterator[int]:
        """Tokens as the engine writes them; closing it (or being cancelled) stops the engine after its current token.

        `deadline_s` is a time of the event loop. Raises ApiError: 504 past the deadline, 503 at shutdown, 500 if the
        engine fails.
        """
        async with aclosing(self._results(request, deadline_s, lambda: self.engine.stream(request))) as results:
            async for token in results:
                yield int(token)

    async def prompt_logprobs(self, request: Request, k: int, deadline_s: float) -> PromptLogprobs:
        """What the engine says about the prompt. Raises ApiError as `tokens` does, 400 if the engine cannot tell."""
        if not isinstance(self.engine, PromptReader):
            message = f"the engine {self.engine.name} tells no log-probabilities; serve a variant by transformers"
            raise ApiError(400, message, param="logprobs")

        def read() -> Iterator[PromptLogprobs]:
            said = self.engine.prompt_logprobs(request.prompt_ids, k)
            return (one for one in [said])

        async with aclosing(self._results(request, deadline_s, read)) as results:
            return await anext(results)

    async def _results(self, request: Request, deadline_s: float, begin: Callable[[], Iterator]) -> AsyncIterator:
        loop, events, stopped = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()
        self._waiting_for.add(events)
        began_s, times_s = loop.time(), []
        try:
            await self._before(deadline_s, self._slots.acquire())
            if self.abandoned:
                raise _shutting_down()
            self.running += 1
            self._work.put(partial(self._read, begin, max(1, request.max_new_tokens), events, stopped, loop))
            while not isinstance(event := await self._before(deadline_s, events.get()), Exception | None):
                times_s.append(loop.time())
                yield event
            if event is not None:
                raise event
        finally:
            stopped.set()
            self._waiting_for.discard(events)
            self._count(request, began_s, times_s)

    async def _before(self, deadline_s: float, awaitable):
        try:
            async with asyncio.timeout_at(deadline_s):
                return await awaitable
        except TimeoutError:
            raise ApiError(504, f"no answer within {self.limits.request_timeout_s:g} s; ask for fewer tokens or try "
                                "again later", code="timeout") from None  # fmt: skip

    def _count(self, request: Request, began_s: float, times_s: list[float]) -> None:
        if times_s:
            self.metrics.prompt_tokens.inc(len(request.prompt_ids))
            self.metrics.answer_tokens.inc(min(len(times_s), request.max_new_tokens))
            self.metrics.ttft_s.observe(times_s[0] - began_s)
        if len(times_s) > 1:
            self.metrics.latency_s_per_token.observe((times_s[-1] - times_s[0]) / (len(times_s) - 1))

    # --- on the threads ---

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _read(self, begin: Callable, most: int, events: asyncio.Queue, stopped: threading.Event, loop) -> None:
        failed: Exception | None = None
        begun = False
        try:
            with closing(begin()) as results:
                begun = True
                for result in islice(results, most):
                    if stopped.is_set():
                        break
                    loop.call_soon_threadsafe(events.put_nowait, result)
        except EngineError as error:  # refused at once: the request does not fit; later: the engine has died
            failed = ApiError(500 if begun else 400, str(error), code="engine_error")
        except Exception as error:
            # Ends one request, not the server. The exception's own words may quote the prompt: they are not logged.
            name = type(error).__name__
            log.error("the engine failed: %s\n%s", name, "".join(traceback.format_tb(error.__traceback__)))
            failed = ApiError(500, f"the engine failed ({name})", code="engine_error")
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._finish, events, failed)

    # --- and back on the loop ---

    def _finish(self, events: asyncio.Queue, failed: Exception | None) -> None:
        self.running -= 1
        self._slots.release()
        events.put_nowait(failed)

    def abandon(self) -> None:
        """End every answer that is not whole with an error (503): the grace time is over."""
        self.abandoned = True
        for events in self._waiting_for:
            events.put_nowait(_shutting_down())
            self._slots.release()  # wakes who still waits in line

    async def close(self) -> None:
        """Wait until no thread is in the engine, then free it."""
        ends_s = asyncio.get_running_loop().time() + CLOSE_WITHIN_S
        while self.running and asyncio.get_running_loop().time() < ends_s:
            await asyncio.sleep(0.01)
        for _ in range(self.limits.max_running):
            self._work.put(None)
        if self.running:
            log.warning("%d answers still hang in the engine; it is left as it is", self.running)
        else:
            await asyncio.to_thread(self.engine.close)


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down; ask another one or try again later", code="shutting_down")
