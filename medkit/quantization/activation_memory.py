"""Peak memory of a forward pass, beside weights and key-value cache, computed from a config.

The formula covers dense decoders of the Llama kind with gated MLPs and full attention, run without padding.
"""

from collections.abc import Mapping

from transformers import PreTrainedConfig

from medkit.quantization.memory_ledger import DECODED_BYTES, Weight, head_dim


def activation_bytes(
    config: PreTrainedConfig,
    shapes: list[Weight],
    schemes: Mapping[str, str],
    batch: int,
    context: int,
    dtype_bytes: int = 2,
) -> dict[str, int]:
    """Peak bytes beside weights and cache: of the `prefill` of (batch, context), and of the next `decode` step.

    The maximum over the moments of a pass that hold most, with SDPA and `logits_to_keep=1`: no S×S scores, and logits
    of the last position only.
    """
    config = config.get_text_config()
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, kv = config.num_attention_heads * head_dim(config), config.num_key_value_heads * head_dim(config)
    decoded = _decoded_bytes(shapes, schemes, dtype_bytes)
    head = decoded["embeddings" if config.tie_word_embeddings else "head"]
    # a norm of the queries runs in float32: its input and its output
    normed = 8 * query if any(weight.module.endswith("q_norm") for weight in shapes) else 0

    def peak(tokens: int, attention: int) -> int:
        """`attention` are the bytes that the attention kernel itself holds."""
        # alive until the end of the pass: the embedded input, and the input of the layer
        carried = min(2, config.num_hidden_layers) * hidden
        moments = [  # numbers per token, and other bytes
            (carried + hidden + 4 * query + 2 * kv, 0),  # q, k, v; q·cos, the rotated q, its product with sin
            (carried + hidden + 4 * query, attention),  # q, the repeated k and v, the result
            (carried + hidden + query + 2 * kv, max(decoded["attention"], normed * tokens)),
            (carried + 2 * hidden + 3 * mlp, 0),  # residual and normed input; act(gate), up, their product
            (carried + 2 * hidden + 2 * mlp, decoded["mlp"]),
            (hidden, head + dtype_bytes * batch * config.vocab_size),
        ]
        return max(tokens * width * dtype_bytes + extra for width, extra in moments)

    rotary = context * (2 * head_dim(config) * dtype_bytes + 8)  # cosines, sines and positions
    copied = batch * context * kv * dtype_bytes  # in a decode step a layer holds its old keys beside the new ones
    return {"prefill": peak(batch * context, 0) + rotary, "decode": peak(batch, copied)}


def _decoded_bytes(shapes: list[Weight], schemes: Mapping[str, str], dtype_bytes: int) -> dict[str, int]:
    """Component → the most of a quantized matrix that is decoded at once; bitsandbytes' 4-bit layers decode all."""
    most = dict.fromkeys(("embeddings", "attention", "mlp", "head"), 0)
    for weight in shapes:
        scheme = schemes.get(weight.module, "unquantized")
        if weight.component in most and scheme != "unquantized":
            whole = weight.count * dtype_bytes
            by_rows = scheme == "int8" or weight.component in ("embeddings", "head")
            most[weight.component] = max(most[weight.component], min(whole, DECODED_BYTES) if by_rows else whole)
    return most
