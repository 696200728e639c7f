"""A random Llama of 10⁵ weights, other models of its size, and a real byte-level tokenizer made in-process.

torch is imported where a toy is asked for: tests of modules without torch do not pay for it.
"""

VOCAB = 300  # a little more than the tokenizer has: the padded rows that real checkpoints also have
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "You answer medical questions. Which vitamin prevents scurvy? Vitamin C.",
    "A. insulin\nB. glucagon\nC. cortisol\nD. aldosterone\nAnswer with the letter of the correct option. A B C D",
    "Does aspirin reduce fever? Answer yes, no or maybe. yes no maybe, the dose is 325 mg.",
    *["Answer: A B C D"] * 5,
]


def make_tokenizer(split=None, texts=SENTENCES, size=VOCAB - 4, **changes):
    """Byte-level BPE of `size` tokens with ChatML; digits one by one as in SmolLM2, or another first split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    split = split or pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts] * 20, trainer)
    named = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "chat_template": CHATML}
    named |= changes
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in named.items() if v is not None})


GEMMA = (  # Gemma 3's chat template without its images: a system turn begins the first user turn
    "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ first if loop.first }}{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def make_gemma_tokenizer(texts=SENTENCES, size=500, chat_template=GEMMA):
    """Pieces of characters with byte fallback, of which line breaks are added tokens, as in Gemma 3."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    lines, bytes_ = ["\n", "\n\n"], [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=control + lines + bytes_, show_progress=False)
    backend.train_from_iterator([*texts] * 20, trainer)
    vocab = backend.get_vocab()
    tokenizer = GemmaTokenizer(vocab, generate_merges(vocab), chat_template=chat_template)
    tokenizer.add_tokens([AddedToken(line, normalized=False) for line in lines])
    tokenizer.add_special_tokens({"additional_special_tokens": control[5:]})
    return tokenizer


def split_by_rule(tokenizer, pattern: str):
    """The tokenizer, its texts now split by a regular expression before the merges."""
    from tokenizers import Regex, pre_tokenizers

    rule = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([rule, bytes_])
    return tokenizer


def read_gguf(path):
    """The model of a GGUF file in torch, as transformers reads it: float32."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    settings = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **settings).eval()


def make_llama(seed=0, layers=3, kind="Llama", **changes):
    """Random float32 weights of a Llama or another `kind`; norms and biases differ, so that none can be mixed up."""
    import torch
    import transformers

    torch.set_num_threads(1)
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")(**{**config, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_()
    return model.eval()
