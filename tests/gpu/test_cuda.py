"""Checks of the CUDA path that the rest of the suite, which runs on a CPU, cannot make."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from medkit.inference.torch_engine import SCHEDULERS, TorchEngine
from medkit.modeling.engine import Request
from medkit.params import load_params
from medkit.quantization import memory_ledger, plans, quantize
from medkit.stage import ROOT

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 1024, 2, 8, 2, 32
# The 16 NF4 levels: quantiles of a standard normal, scaled to [-1, 1] (QLoRA, appendix E).
NF4_LEVELS = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
BLOCK = 64  # weights that share one NF4 scale


def small_llama(dtype=torch.float32, attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention).to(DEVICE).eval()


def random_ids(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def relative_error(value, reference):
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes")


def test_nf4_dequantise_equals_the_table_by_hand(bnb):
    weight = torch.randn(48, 256, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    levels = torch.tensor(NF4_LEVELS, device=DEVICE)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1, BLOCK).long()
    blocks = weight.view(-1, BLOCK)
    absmax = blocks.abs().amax(-1, keepdim=True)

    by_hand = (levels[codes] * absmax).view_as(weight)
    torch.testing.assert_close(bnb.functional.dequantize_4bit(packed, state), by_hand, rtol=1e-6, atol=1e-6)

    distance = (blocks / absmax)[..., None].sub(levels).abs()
    chosen = distance.gather(-1, codes[..., None]).squeeze(-1)
    torch.testing.assert_close(chosen, distance.amin(-1), rtol=0, atol=1e-5)


def test_nf4_double_quantisation_keeps_the_scales(bnb):
    weight = torch.randn(512, 1024, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    _, state = bnb.functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    scales = state.state2.code[state.absmax.long()] * outer + state.offset
    assert state.absmax.dtype == torch.uint8
    assert relative_error(scales, weight.view(-1, BLOCK).abs().amax(-1)) < 0.02


@pytest.mark.parametrize("rows", [1, 64])
def test_nf4_linear_equals_its_dequantised_weight(bnb, rows):
    """One row takes the fused kernel of decoding, many rows the path of prefill."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(1024, 768, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4").to(
        DEVICE
    )
    x = torch.randn(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    with torch.no_grad():
        assert relative_error(layer(x), x.float() @ weight.T + layer.bias.float()) < 1e-2


def test_nf4_memory_is_the_analytic_number_of_bytes(bnb):
    rows, columns = 2048, 4096
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    before = torch.cuda.memory_allocated()
    packed = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", blocksize=BLOCK
    ).to(DEVICE)
    bytes_per_weight = 1 / 2 + 1 / BLOCK + 4 / (BLOCK * 256)
    grown = torch.cuda.memory_allocated() - before
    assert packed.quant_state is not None
    assert grown == pytest.approx(rows * columns * bytes_per_weight, rel=0.005)


def test_sdpa_and_eager_attention_agree_in_bf16():
    ids = random_ids(2, 96)
    with torch.no_grad():
        eager = small_llama(torch.bfloat16, "eager")(ids).logits
        sdpa = small_llama(torch.bfloat16, "sdpa")(ids).logits
        exact = small_llama(torch.bfloat16, "eager").float()(ids).logits
    assert relative_error(sdpa, eager) < 2e-2
    assert relative_error(sdpa, exact) < 2e-2


def test_continuous_batching_equals_sequential_greedy():
    model = small_llama()
    prompts = [random_ids(1, length) for length in (5, 17, 32, 9)]
    new = 12
    options = dict(do_sample=False, max_new_tokens=new)
    sequential = [model.generate(p, attention_mask=torch.ones_like(p), **options) for p in prompts]
    config = GenerationConfig(**options, eos_token_id=-1, pad_token_id=0)
    outputs = model.generate_batch([p[0].tolist() for p in prompts], generation_config=config)
    batched = {tuple(out.prompt_ids): list(out.generated_tokens) for out in outputs.values()}
    for prompt, tokens in zip(prompts, sequential, strict=True):
        assert batched[tuple(prompt[0].tolist())] == tokens[0, prompt.shape[1] :].tolist()


def test_static_cache_decodes_as_the_dynamic_cache():
    model, prompt = small_llama(), random_ids(1, 24)
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)
    dynamic = model.generate(prompt, **options)
    static = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(dynamic, static)


def test_merging_lora_keeps_the_logits():
    ids = random_ids(2, 32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(small_llama(), LoraConfig(r=8, target_modules=targets, init_lora_weights=False)).eval()
    with torch.no_grad():
        plain = small_llama()(ids).logits
        unmerged = adapted(ids).logits
        merged = adapted.merge_and_unload()(ids).logits
    assert relative_error(unmerged, plain) > 1e-2
    assert relative_error(merged, unmerged) < 1e-4


def test_allocator_counts_the_weights_and_the_kv_cache():
    """The allocator hands out multiples of 512 bytes; beyond that, bytes are exactly the analytic ones."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = small_llama(torch.bfloat16)
    hidden, mlp = HEADS * HEAD_DIM, 512
    attention = 2 * hidden * hidden + 2 * hidden * KV_HEADS * HEAD_DIM
    weights = 2 * (2 * VOCAB * hidden + LAYERS * (attention + 3 * hidden * mlp + 2 * hidden) + hidden)
    assert sum(p.nbytes for p in model.parameters()) == weights
    grown = torch.cuda.memory_allocated() - before
    assert weights <= grown <= weights + 512 * (len(list(model.parameters())) + len(list(model.buffers())))
    assert torch.cuda.max_memory_allocated() - before >= grown

    tokens, cache = 128, DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(1, tokens), past_key_values=cache, use_cache=True)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert stored == 2 * LAYERS * KV_HEADS * HEAD_DIM * tokens * 2


class NoTokenizer:
    """Stands where a model is saved with its tokenizer, of which these tests have none."""

    def save_pretrained(self, folder):
        pass


@pytest.fixture
def models_params():
    asked = {"device": DEVICE, "dtype": "float32", "attention": "sdpa"}
    return load_params(ROOT / "params" / "tiny.yaml").models.model_copy(update=asked)


@torch.inference_mode()
def test_a_plan_comes_back_from_disk_with_equal_logits(bnb, models_params, tmp_path):
    """Every scheme, on linear layers and on both ends."""
    model, ids = small_llama(), random_ids(2, 32)
    exact = model(ids).logits
    plan = plans.nf4_plan(quantize.weight_shapes(model), "int8")
    plan = plan.model_copy(
        update={"schemes": plan.schemes | {"lm_head": "nf4", "model.layers.0.mlp.up_proj": "unquantized"}}
    )
    assert set(plan.schemes.values()) == {"unquantized", "int8", "nf4"}
    model = quantize.apply_plan(model, plan, double_quant=True)
    quantize.save_quantized(model, NoTokenizer(), plan, tmp_path / "plan")
    logits = model(ids).logits
    loaded = quantize.load_quantized(tmp_path / "plan", models_params)
    assert {parameter.device.type for parameter in loaded.parameters()} == {DEVICE}
    assert torch.equal(loaded(ids).logits, logits)
    assert 1e-3 < relative_error(logits, exact) < 0.5


def test_schedulers_write_the_same_tokens():
    model = small_llama()
    requests = [Request(random_ids(1, n)[0].tolist(), new) for n, new in ((5, 4), (40, 12), (3, 9), (21, 6))]
    written = {}
    for scheduler in SCHEDULERS:
        engine = TorchEngine(model, 0, scheduler=scheduler, batch_tokens=128)
        try:
            written[scheduler] = [generation.token_ids for generation in engine.generate(requests)]
        finally:
            engine.close()
    assert len(written) == 3
    assert [len(tokens) for tokens in written["sequential"]] == [request.max_new_tokens for request in requests]
    assert all(tokens == written["sequential"] for tokens in written.values())


def test_the_measured_peak_is_the_computed_total():
    """Big enough for a library's workspace of 32 MiB not to matter: 1.0 GB of weights, 1.1 GB beside them."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    batch, context = 4, 4096

    def load():
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        return model.to(DEVICE).eval()

    small_llama()(random_ids(1, 8))  # loads the libraries, whose workspace is subtracted
    torch.cuda.reset_peak_memory_stats()
    libraries = torch.cuda.max_memory_allocated()
    model, cache, measured = load(), DynamicCache(config=config), {}
    ids = torch.ones(batch, context, dtype=torch.long, device=DEVICE)
    with torch.inference_mode():
        for step, tokens in (("prefill", ids), ("decode", ids[:, :1])):
            torch.cuda.reset_peak_memory_stats()
            model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            measured[step] = torch.cuda.max_memory_allocated() - libraries
    shapes = memory_ledger.model_shapes(config)
    rest = memory_ledger.plan_bytes(shapes, {}).bytes.sum() + memory_ledger.kv_cache_bytes(config, batch, context, 2)
    for step, activations in memory_ledger.activation_bytes(config, shapes, {}, batch, context).items():
        assert rest + activations == pytest.approx(measured[step], rel=0.05), step
