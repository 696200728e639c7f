"""Two ways to decode greedily, timed from prompt to first token and to the last. Units: seconds."""

import time

import torch
from contenders import DEVICE
from torch import Tensor, nn
from transformers import CompileConfig, StaticCache
from transformers.generation import StoppingCriteria, StoppingCriteriaList


def now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


class FirstTokenClock(StoppingCriteria):
    """Notes when the first token is ready and never stops generation."""

    def __init__(self):
        self.first: float | None = None
        self.never = torch.zeros(1, dtype=torch.bool, device=DEVICE)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self.first = self.first or now()
        return self.never


class GenerateLoop:
    """`model.generate`, greedy. Calling it returns (seconds to the first token, seconds in total)."""

    def __init__(self, model: nn.Module, compiled: bool):
        self.model, self.options = model, {}
        if compiled:
            compile_config = CompileConfig(mode="reduce-overhead", fullgraph=True)
            self.options = dict(cache_implementation="static", compile_config=compile_config)

    def generate(self, prompt: Tensor, new: int, **options):
        mask = torch.ones_like(prompt)
        return self.model.generate(
            prompt, attention_mask=mask, do_sample=False, max_new_tokens=new, **self.options, **options
        )

    def __call__(self, prompt: Tensor, new: int) -> tuple[float, float]:
        clock, start = FirstTokenClock(), now()
        tokens = self.generate(prompt, new, stopping_criteria=StoppingCriteriaList([clock]))
        total = now() - start
        assert tokens.shape[1] == prompt.shape[1] + new
        return clock.first - start, total

    def cache(self, prompt: Tensor, new: int):
        return self.generate(prompt, new, return_dict_in_generate=True).past_key_values


class GraphLoop:
    """Greedy decoding over a static cache, the compiled step captured into one CUDA graph.

    Prefill runs uncompiled. The host looks at no token before the end: stopping is left to the caller.
    """

    def __init__(self, model: nn.Module, length: int):
        self.model, self.static = model, StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
        self.graph, self.logits = torch.cuda.CUDAGraph(), None
        self.compiled_step = torch.compile(self.step, fullgraph=True)

    def step(self, token: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(input_ids=token, past_key_values=self.static, use_cache=True).logits
        return logits, logits[:, -1].argmax(-1, keepdim=True)

    def prefill(self, prompt: Tensor, keep: int = 1) -> Tensor:
        """Logits of the last `keep` positions (0: of all). The first call compiles and captures the step."""
        if self.logits is None:
            self.run_prefill(prompt[:, :1], 1)
            for _ in range(3):
                self.compiled_step(self.token)
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self.logits, token = self.compiled_step(self.token)
                self.token.copy_(token)
        return self.run_prefill(prompt, keep)

    def run_prefill(self, prompt: Tensor, keep: int) -> Tensor:
        self.static.reset()
        return self.model(input_ids=prompt, past_key_values=self.static, use_cache=True, logits_to_keep=keep).logits

    def decode(self, token: Tensor) -> Tensor:
        """One step from `token`: its logits, and the next token in `self.token`, both overwritten by the next step."""
        self.token.copy_(token)
        self.graph.replay()
        return self.logits

    def __call__(self, prompt: Tensor, new: int) -> tuple[float, float]:
        tokens, start = torch.empty(new, dtype=torch.long, device=DEVICE), now()
        tokens[0] = self.token.copy_(self.prefill(prompt)[:, -1].argmax(-1, keepdim=True))
        first = now() - start
        for i in range(1, new):
            self.graph.replay()
            tokens[i] = self.token
        return first, now() - start

    def cache(self, prompt: Tensor, new: int) -> StaticCache:
        return self.static
