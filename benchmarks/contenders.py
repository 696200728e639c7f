"""The model variants that shape7b.py compares, built on the device with random weights."""

import gc
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from weight_formats import FORMATS

DEVICE = "cuda"


@dataclass(frozen=True)
class Contender:
    """One model variant: a weight format per part ("bf16" or a key of FORMATS) and how it decodes.

    decode: "generate" (dynamic cache), "generate_compiled" (static cache, transformers compiles the
    decode step into CUDA graphs) or "graph" (decode_loops.GraphLoop: the same step without the library's loop).
    """

    name: str
    linear: str = "bf16"
    attention_linear: str | None = None  # None: as `linear`
    embedding: str = "bf16"
    head: str = "bf16"
    attention: str = "sdpa"
    decode: str = "generate"
    library: bool = False  # loaded and quantised by transformers itself

    def format_of(self, module_name: str) -> str:
        if module_name.endswith("embed_tokens"):
            return self.embedding
        if module_name == "lm_head":
            return self.head
        return (self.attention_linear or self.linear) if "self_attn" in module_name else self.linear


INT8_ENDS = dict(embedding="int8_embedding", head="int8_head")
BF16 = Contender("bf16_sdpa")
CONTENDERS = [
    Contender("bf16_eager", attention="eager"),
    BF16,
    Contender("bf16_static_compiled", decode="generate_compiled"),
    Contender("bf16_graph", decode="graph"),
    Contender("int4_lean_graph", linear="int4_matvec", embedding="int4_embedding", head="int8_head", decode="graph"),
    Contender("nf4_library", linear="nf4", library=True),
    Contender("paper_mix", linear="nf4", attention_linear="llm_int8", head="nf4"),
    Contender("nf4_int8_ends", linear="nf4", **INT8_ENDS),
    # what `python -m medkit plan` picks for 30 % of bf16's total, in the package's own modules
    Contender("plan", linear="nf4", embedding="nf4_rows_embedding", head="nf4_rows_head"),
    Contender("nf4_lean_graph", linear="nf4", embedding="int4_embedding", head="int8_head", decode="graph"),
    Contender("int4_fast", linear="int4", decode="graph"),
    Contender("int4_fast_int8_ends", linear="int4", decode="graph", **INT8_ENDS),
]


def shape_7b(layers: int = 28) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=3584, num_hidden_layers=layers, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def randomise(part: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in part.named_parameters():
        is_norm = parameter.ndim == 1 and not name.endswith("bias")
        parameter.fill_(1) if is_norm else parameter.normal_(0, 0.02, generator=generator)


def build(config: Qwen2Config, contender: Contender) -> nn.Module:
    """The model on DEVICE, each part quantised as soon as it exists; the same seed for every contender."""
    if contender.library:
        return build_by_library(config)
    with torch.device("meta"):
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=contender.attention)
    model.model.rotary_emb = Qwen2RotaryEmbedding(config).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    blocks = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
    for part_name in ["model.embed_tokens", *blocks, "model.norm", "lm_head"]:
        part = model.get_submodule(part_name).to_empty(device=DEVICE)
        randomise(part, generator)
        leaves = {f"{part_name}.{name}".rstrip("."): leaf for name, leaf in part.named_modules()}
        for name, leaf in leaves.items():
            if isinstance(leaf, nn.Linear | nn.Embedding) and contender.format_of(name) != "bf16":
                model.set_submodule(name, FORMATS[contender.format_of(name)](leaf))
    return model.eval().requires_grad_(False)


def build_by_library(config: Qwen2Config) -> nn.Module:
    """transformers' own NF4 loading path, from a state dict in host memory; its default leaves the head in bf16."""
    state = {name: tensor.cpu() for name, tensor in build(config, BF16).state_dict().items()}
    release()
    torch.cuda.reset_peak_memory_stats()
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return Qwen2ForCausalLM.from_pretrained(
        None, config=config, state_dict=state, quantization_config=quantisation, dtype=torch.bfloat16,
        device_map={"": DEVICE}, attn_implementation="sdpa",
    ).eval()  # fmt: skip


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
