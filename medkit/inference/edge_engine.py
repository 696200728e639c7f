"""Engines for the edge file: OpenVINO GenAI, and llama.cpp where its binding `llama_cpp` is installed.

Token ids in and out, on the CPU. The engines' own tokenizers are never used: they split special tokens of a GGUF file
differently. Which engine is the faster one is for the benchmark to say.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import ceil
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from medkit.modeling.engine import EngineError, Generation, Request
from medkit.quantization.gguf_export import check_manifest
from medkit.quantization.gguf_tokenizer import ExportError

if TYPE_CHECKING:
    from medkit.modeling.option_scoring import Item

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
PAGE_TOKENS = 32  # of OpenVINO's paged cache on a CPU
NO_END = 2**31 - 1  # an end token no model emits, so that the file's own is not put in its place


def import_openvino() -> tuple[ModuleType, ModuleType]:
    """The modules `openvino` and `openvino_genai`, imported so that nothing is reported to anyone.

    `import openvino` reports itself to its maker over the network, without asking, if the package `openvino_telemetry`
    can be imported. Here it cannot. Raises EngineError if they are not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # what Python takes for "not installed"
    try:
        import openvino
        import openvino_genai
    except ImportError as error:
        raise EngineError(f"openvino_genai cannot be imported ({error}): pip install -e '.[edge]'") from error
    return openvino, openvino_genai


def _check_file(path: Path) -> dict:
    try:
        return check_manifest(path)
    except ExportError as error:
        raise EngineError(str(error)) from error


def _check_request(request: Request, manifest: dict) -> None:
    """Raises EngineError for a request that would be answered with nonsense, or not at all."""
    size, context = len(request.prompt_ids), manifest.get("context_length")
    if not size or request.max_new_tokens < 1:
        raise EngineError(f"a prompt of {size} tokens, {request.max_new_tokens} to write: both must be at least 1")
    if context and size + request.max_new_tokens > context:
        raise EngineError(
            f"a prompt of {size} tokens and {request.max_new_tokens} to write do not fit a context of {context}: "
            "shorten the prompt or ask for less"
        )
    if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < manifest.get("vocab_size", NO_END):
        raise EngineError(f"the prompt has token ids that are not in 0…{manifest.get('vocab_size', NO_END) - 1}")


# --- OpenVINO GenAI --------------------------------------------------------------------------------------------------


@dataclass
class _Answer:
    """One answer being written: the engine's thread puts tokens in, a caller's thread takes them out."""

    request: Request
    arrived: SimpleQueue = field(default_factory=SimpleQueue)
    """(time, token ids), then None at the end or the EngineError that ended it."""
    handle: Any = None
    cancelled: bool = False

    def take(self) -> Iterator[tuple[float, list[int]]]:
        while (found := self.arrived.get()) is not None:
            if isinstance(found, EngineError):
                raise found
            yield found


class OpenVinoEngine:
    """OpenVINO GenAI with continuous batching: one thread steps the model, requests join and leave between steps.

    `exact` computes in float32 and answers as transformers does from the same file; without it activations and the
    KV cache are rounded as OpenVINO sees fit. `threads` None leaves their number to OpenVINO. `prefix_caching` keeps
    what prompts begin with for later requests. At most `batch_tokens` tokens go into one step, so a long prompt holds
    up running answers for no longer than that. The KV cache grows with use and is not given back before `close`, unless
    `cache_tokens` bounds it: then all of it is taken at once, and what was kept of old prompts gives way.

    Raises EngineError if openvino_genai is not installed, or if the file is not the one that its manifest describes.
    """

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        exact: bool = True,
        prefix_caching: bool = True,
        batch_tokens: int = 256,
        cache_tokens: int | None = None,
    ):
        self.name = "openvino"
        self._manifest = _check_file(path)
        self._openvino, self._genai = import_openvino()
        self._path, self._batch_tokens, self._cache_tokens = path, batch_tokens, cache_tokens
        self._properties = (FLOAT32 if exact else {}) | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
        self._pipeline = self._open(prefix_caching)
        self._wake = threading.Condition()
        self._joining: list[_Answer] = []
        self._ended: EngineError | None = None
        self._thread = threading.Thread(target=self._work, name="openvino", daemon=True)
        self._thread.start()

    def _open(self, prefix_caching: bool):
        scheduling = self._genai.SchedulerConfig()
        scheduling.enable_prefix_caching = prefix_caching
        scheduling.max_num_batched_tokens = self._batch_tokens
        if self._cache_tokens is not None:
            scheduling.num_kv_blocks = ceil(self._cache_tokens / PAGE_TOKENS)
        try:
            return self._genai.ContinuousBatchingPipeline(self._path, scheduling, "CPU", self._properties)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot open {self._path}: {_last_line(error)}") from error

    def _add(self, pipeline, number: int, token_ids: Sequence[int], **settings):
        ids = self._openvino.Tensor(np.array([token_ids], dtype=np.int64))
        return pipeline.add_request(number, ids, self._genai.GenerationConfig(do_sample=False, **settings))

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """See `engines.Engine`; a token's time is when the step that made it was over."""
        for request in requests:
            _check_request(request, self._manifest)
        answers = [_Answer(request) for request in requests]
        try:
            began = time.perf_counter()
            for arrival_s in sorted({request.arrival_s for request in requests}):
                time.sleep(max(0.0, began + arrival_s - time.perf_counter()))
                self._join([answer for answer in answers if answer.request.arrival_s == arrival_s])
            return [_collect(answer, began) for answer in answers]
        finally:
            for answer in answers:
                answer.cancelled = True

    def stream(self, request: Request) -> Iterator[int]:
        """See `engines.Engine`. Work begins when the first token is asked for."""
        _check_request(request, self._manifest)
        return self._stream(_Answer(request))

    def _stream(self, answer: _Answer) -> Iterator[int]:
        self._join([answer])
        try:
            for _, token_ids in answer.take():
                yield from token_ids
        finally:
            answer.cancelled = True

    def score(self, items: Sequence[Item]) -> list[list[float]]:
        """See `engines.Engine`. Each answer is read with its prompt, nothing is shared between them.

        The file is opened a second time meanwhile: a cache of prompts keeps no log-probabilities.
        """
        for item in items:
            for answer_ids in item.answer_ids:
                _check_request(Request([*item.prompt_ids, *answer_ids], 1), self._manifest)
        pipeline, numbers = self._open(prefix_caching=False), count()
        handles = [
            [
                self._add(pipeline, next(numbers), [*item.prompt_ids, *ids], max_new_tokens=0, echo=True, logprobs=1)
                for ids in item.answer_ids
            ]
            for item in items
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return [
            [_score(handle, len(ids)) for handle, ids in zip(found, item.answer_ids, strict=True)]
            for found, item in zip(handles, items, strict=True)
        ]

    @property
    def ended(self) -> bool:
        """Whether it writes no more, closed or failed; a new engine is needed."""
        return self._ended is not None

    def close(self) -> None:
        """End the thread and free the model. Answers still being written end with EngineError."""
        with self._wake:
            self._ended = self._ended or EngineError("the engine was closed")
            self._wake.notify()
        self._thread.join()
        self._pipeline = None

    # --- the thread that steps the model

    def _join(self, answers: list[_Answer]) -> None:
        with self._wake:
            if self._ended:
                raise self._ended
            self._joining += answers
            self._wake.notify()

    def _work(self) -> None:
        running: list[_Answer] = []
        numbers = count()
        try:
            while not self._ended:
                with self._wake:
                    while not (self._joining or running or self._ended):
                        self._wake.wait()
                    joining, self._joining = self._joining, []
                running += [answer for answer in joining if self._begin(answer, next(numbers))]
                for answer in running:
                    if answer.cancelled:
                        answer.handle.cancel()
                if self._pipeline.has_non_finished_requests():
                    self._pipeline.step()
                running = [answer for answer in running if self._deliver(answer, time.perf_counter())]
            for answer in running:
                answer.handle.cancel()
            if running:
                self._pipeline.step()  # gives back what they held, which OpenVINO otherwise complains about
        except Exception as error:
            self._ended = EngineError(f"OpenVINO failed: {_last_line(error)}")
        with self._wake:  # whoever joins from here on is refused
            for answer in running + self._joining:
                answer.arrived.put(self._ended)

    def _begin(self, answer: _Answer, number: int) -> bool:
        """Hand a request to OpenVINO; whether it took it."""
        ends = answer.request.end_ids or (NO_END,)
        settings = {"eos_token_id": ends[0], "stop_token_ids": set(ends), "ignore_eos": not answer.request.end_ids}
        settings["max_new_tokens"] = answer.request.max_new_tokens
        try:
            answer.handle = self._add(self._pipeline, number, answer.request.prompt_ids, **settings)
        except RuntimeError as error:
            answer.arrived.put(EngineError(f"OpenVINO refuses the request: {_last_line(error)}"))
        return answer.handle is not None

    def _deliver(self, answer: _Answer, now: float) -> bool:
        """Hand over what came; whether more will."""
        while answer.handle.can_read():
            answer.arrived.put((now, [i for output in answer.handle.read().values() for i in output.generated_ids]))
        status = answer.handle.get_status().name
        if status != "RUNNING":
            ignored = EngineError(f"no memory for a prompt of {len(answer.request.prompt_ids)} tokens: shorten it")
            answer.arrived.put(ignored if status == "IGNORED" else None)
        return status == "RUNNING"


def _collect(answer: _Answer, began: float) -> Generation:
    found = Generation()
    for now, token_ids in answer.take():
        found.token_ids += token_ids
        found.token_times_s += [now - began] * len(token_ids)
    return found


def _score(handle, length: int) -> float:
    """Summed log-probability (nats) of the last `length` tokens of what was read, in one step or in several."""
    found = []
    while handle.can_read():
        found += [value for output in handle.read().values() for value in output.generated_log_probs]
    if len(found) < length:  # OpenVINO ignores what its cache cannot hold
        raise EngineError(f"no memory to score an answer of {length} tokens with its prompt: shorten the prompt")
    return float(sum(found[len(found) - length :]))


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


# --- llama.cpp -------------------------------------------------------------------------------------------------------


class LlamaCppEngine:
    """llama.cpp through llama-cpp-python, one answer at a time: further streams wait until the one before is closed.

    `context` is the most tokens of prompt and answer together; memory for all of them is taken at once. `threads` None
    takes all processors, where the binding would take half of them. Raises EngineError if the binding is not installed,
    or if the file is not the one that its manifest describes.
    """

    def __init__(self, path: Path, threads: int | None = None, context: int = 4096):
        self.name = "llama.cpp"
        manifest = _check_file(path)
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise EngineError(f"llama_cpp cannot be imported ({error}): pip install -e '.[llama]'") from error
        threads = threads or os.cpu_count()
        settings = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        try:
            self._model = Llama(str(path), **settings)
        except ValueError as error:
            raise EngineError(f"llama.cpp cannot open {path}: {_last_line(error)}") from error
        self._manifest = manifest | {"context_length": self._model.n_ctx(), "vocab_size": self._model.n_vocab()}
        self._one_at_a_time = threading.Lock()

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """See `engines.Engine`."""
        for request in requests:
            _check_request(request, self._manifest)
        found = [Generation() for _ in requests]
        began = time.perf_counter()
        for request, generation in sorted(zip(requests, found, strict=True), key=lambda pair: pair[0].arrival_s):
            time.sleep(max(0.0, began + request.arrival_s - time.perf_counter()))
            for token in self._write(request):
                generation.token_ids.append(token)
                generation.token_times_s.append(time.perf_counter() - began)
        return found

    def stream(self, request: Request) -> Iterator[int]:
        """See `engines.Engine`. The caller's thread does the work."""
        _check_request(request, self._manifest)
        return self._write(request)

    def _write(self, request: Request) -> Iterator[int]:
        with self._one_at_a_time:
            tokens = self._model.generate(list(request.prompt_ids), temp=0.0)  # 0: the likeliest token
            for written, token in enumerate(tokens, 1):
                yield token
                if written == request.max_new_tokens or token in request.end_ids:
                    return

    def score(self, items: Sequence[Item]) -> list[list[float]]:
        raise EngineError("llama.cpp does not score answers here: take the engine openvino or torch")

    def close(self) -> None:
        self._model.close()
