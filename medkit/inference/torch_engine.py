"""The transformers engine, with three ways to schedule requests: sequential, static batches, continuous batching."""

import time
from collections.abc import Sequence
from math import ceil

import torch
from torch import nn
from tqdm import tqdm
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from medkit.modeling.batches import Example, bucket_by_length, collate
from medkit.modeling.engine import EngineError, Generation, Request

SCHEDULERS = ("sequential", "static", "continuous")
CACHE_FACTOR = 4  # the KV cache holds this many times `batch_tokens`: a row that writes needs logits at one position
PAGE_TOKENS = 64  # of the paged KV cache; requests share a common prefix by whole pages
STEP_TOKENS = 512  # tokens per step of continuous batching: a long prompt is read in pieces, the others go on writing
FREE_SHARE = 0.15  # transformers begins no prompt while a smaller share of the pages is free
POLL_S = 0.01


class TorchEngine:
    """An engine (`modeling.engine.Engine`) over a loaded model, with its dtype, attention and quantization.

    `scheduler`: "sequential" answers one request after the other. "static" pads requests to batches; a batch runs until
    its longest answer is done. "continuous" is transformers' own continuous batching: a request leaves when it is done.
    The KV cache holds 4 · `batch_tokens` tokens, prompts, answers and padding together. `prefix_sharing` lets requests
    of a continuous batch share the pages of equal prefixes. Greedy, unless `temperature` is above 0: then tokens are
    drawn from the whole vocabulary by torch's global generator.

    Close a continuous engine before the process ends: transformers runs it in a thread. While it lives, an `eager`
    model may be used by this engine alone. Raises EngineError for settings that do not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int,
        *,
        scheduler: str = "continuous",
        batch_tokens: int,
        prefix_sharing: bool = True,
        temperature: float = 0.0,
    ):
        if scheduler not in SCHEDULERS:
            raise EngineError(f"scheduler {scheduler!r}: give one of {', '.join(SCHEDULERS)}")
        self.model, self.pad_token_id, self.scheduler = model, pad_token_id, scheduler
        self.cache_tokens, self.prefix_sharing = CACHE_FACTOR * batch_tokens, prefix_sharing
        self._num_pages = max(1, self.cache_tokens // PAGE_TOKENS)
        self.temperature = temperature
        self.name = "transformers"
        self._manager = None

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """The answers, in the order of the requests. Raises EngineError for a request that does not fit."""
        self._check(requests)
        with tqdm(total=len(requests), desc="writing", unit="answer", delay=2, mininterval=10) as bar:
            if self.scheduler == "continuous":
                return self._generate_continuous(requests, bar) if requests else []
            began = time.perf_counter()
            generations: dict[int, Generation] = {}
            batches = [[i] for i in range(len(requests))]
            if self.scheduler == "static":
                sizes = [len(request.prompt_ids) + request.max_new_tokens for request in requests]
                batches = bucket_by_length(sizes, self.cache_tokens)
            for batch in batches:
                generations |= zip(batch, self._generate_batch([requests[i] for i in batch], began), strict=True)
                bar.update(len(batch))
        return [generations[i] for i in range(len(requests))]

    def close(self) -> None:
        """Stop continuous batching and free the model."""
        if self._manager is not None:
            self._manager.stop(hard_stop=True)
            self._manager.destroy()
        self._manager = self.model = None

    def _check(self, requests: Sequence[Request]) -> None:
        limit = self.model.config.get_text_config().max_position_embeddings
        for request in requests:
            prompt, new = len(request.prompt_ids), request.max_new_tokens
            size = f"a prompt of {prompt} tokens and {new} new tokens"
            if prompt + new > limit:
                raise EngineError(f"{size} make {prompt + new}, the model reads at most {limit}; shorten the prompt")
            if self.scheduler == "continuous" and _pages(request) > self._num_pages:
                raise EngineError(
                    f"{size} take {_pages(request)} pages of the KV cache, it has {self._num_pages}; raise batch_tokens"
                )

    def _config(self, max_new_tokens: int | None = None) -> GenerationConfig:
        """Greedy, or sampled at the temperature, whatever the checkpoint recommends."""
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=[], pad_token_id=self.pad_token_id
        )  # no end tokens, since each request has its own; None would be replaced by the checkpoint's
        if self.temperature:
            config.update(do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0)
        return config

    @torch.inference_mode()
    def _generate_batch(self, requests: list[Request], began: float) -> list[Generation]:
        """One batch, padded on the left, until its longest answer is done."""
        prompts = [Example(list(request.prompt_ids), len(request.prompt_ids)) for request in requests]
        batch, recorder = collate(prompts, self.pad_token_id), _Recorder(requests, began)
        self.model.generate(
            input_ids=batch["input_ids"].to(self.model.device),
            attention_mask=batch["attention_mask"].to(self.model.device),
            generation_config=self._config(max(request.max_new_tokens for request in requests)),
            stopping_criteria=StoppingCriteriaList([recorder]),
        )
        return recorder.generations

    def _start(self):
        """transformers' manager of continuous batching. Its own default cache takes most of a CPU's memory."""
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=ceil(self._num_pages / (1 - FREE_SHARE)) + 1,
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=min(self._num_pages, STEP_TOKENS),
            allow_block_sharing=self.prefix_sharing,
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=False,
        )
        try:
            manager = self.model.init_continuous_batching(self._config(), config)
            manager.warmup()
        except (ValueError, MemoryError) as error:
            raise EngineError(f"continuous batching over {self.cache_tokens} tokens of cache: {error}") from error
        manager.start()
        return manager

    def _generate_continuous(self, requests: Sequence[Request], bar: tqdm) -> list[Generation]:
        """A request enters when pages for all of its tokens are free, so transformers evicts none and reads it once."""
        self._manager = self._manager or self._start()
        began = time.perf_counter()
        waiting, running, free = list(range(len(requests))), {}, self._num_pages
        generations: dict[int, Generation] = {}
        while len(generations) < len(requests):
            while waiting and _pages(requests[waiting[0]]) <= free:
                number = waiting.pop(0)
                request = requests[number]
                free -= _pages(request)
                request_id = self._manager.add_request(
                    list(request.prompt_ids),
                    max_new_tokens=request.max_new_tokens,
                    eos_token_id=list(request.end_ids),
                    record_timestamps=True,
                )
                running[request_id] = number
            result = self._manager.get_result(timeout=POLL_S)
            if result is None and not self._manager.is_running():
                raise EngineError("continuous batching has stopped; close this engine and make a new one")
            if result is None or not result.is_finished() or result.request_id not in running:
                continue
            if result.error is not None:
                raise EngineError(f"continuous batching failed: {result.error}; close this engine and make a new one")
            number = running.pop(result.request_id)
            free += _pages(requests[number])
            bar.update()
            times_s = [moment - began for moment in result.timestamps]
            generations[number] = Generation(result.generated_tokens, times_s, result.lifespan[0] - began)
        return [generations[i] for i in range(len(requests))]


class _Recorder(StoppingCriteria):
    """Records the tokens of every row and when they came; a row is done as its request says."""

    def __init__(self, requests: Sequence[Request], began: float):
        self.requests, self.began = requests, began
        begun_s = time.perf_counter() - began
        self.generations = [Generation(begun_s=begun_s) for _ in requests]
        self.done = [False] * len(requests)

    def __call__(self, input_ids, scores, **kwargs):
        tokens = input_ids[:, -1].tolist()  # waits for the device: the token is known when its time is taken
        now_s = time.perf_counter() - self.began
        for row, (request, generation, token) in enumerate(zip(self.requests, self.generations, tokens, strict=True)):
            if not self.done[row]:
                generation.token_ids.append(token)
                generation.token_times_s.append(now_s)
                self.done[row] = token in request.end_ids or len(generation.token_ids) >= request.max_new_tokens
        return torch.tensor(self.done, device=input_ids.device)


def _pages(request: Request) -> int:
    return ceil((len(request.prompt_ids) + request.max_new_tokens) / PAGE_TOKENS)
