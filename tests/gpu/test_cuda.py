"""Checks of the CUDA path that the rest of the suite, which runs on a CPU, cannot make."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from toys import VOCAB, make_llama, make_tokenizer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from medkit.inference.torch_engine import SCHEDULERS, TorchEngine
from medkit.modeling.engine import Request
from medkit.params import load_params
from medkit.quantization import memory_ledger, plans, quantize
from medkit.stage import ROOT

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


def small_llama():
    return make_llama(layers=2, hidden_size=256, intermediate_size=512, tie_word_embeddings=False).to(DEVICE)


def random_ids(*shape):
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def relative_error(value, reference):
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()


@pytest.fixture
def models_params():
    asked = {"device": DEVICE, "dtype": "float32", "attention": "sdpa"}
    return load_params(ROOT / "params" / "tiny.yaml").models.model_copy(update=asked)


@torch.inference_mode()
def test_a_plan_comes_back_from_disk_with_equal_logits(models_params, tmp_path):
    """Every scheme, on linear layers and on both ends."""
    model, ids = small_llama(), random_ids(2, 32)
    exact = model(ids).logits
    plan = plans.nf4_plan(quantize.weight_shapes(model), "int8")
    plan = plan.model_copy(
        update={"schemes": plan.schemes | {"lm_head": "nf4", "model.layers.0.mlp.up_proj": "unquantized"}}
    )
    assert set(plan.schemes.values()) == {"unquantized", "int8", "nf4"}
    model = quantize.apply_plan(model, plan, double_quant=True)
    quantize.save_quantized(model, make_tokenizer(), plan, tmp_path / "plan")
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
