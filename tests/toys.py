"""A random Llama of 10⁵ weights, other models of its size, and a real byte-level tokenizer made in-process.

torch is imported where a toy is asked for: tests of modules without torch do not pay for it.
"""

PROMPT = [5, 9, 17, 33, 4, 8, 250, 299]
VOCAB = 300  # a little more than the tokenizer has: the padded rows that real checkpoints also have
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif", "assistant\n{{ '<think>\\n' }}{% endif")  # opens a thought, as R1's
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
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=bytes_, show_progress=False)
    backend.train_from_iterator([*texts] * 20, trainer)
    named = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "chat_template": CHATML}
    named |= changes
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in named.items() if v is not None})


class Scripted:
    """An engine that writes the given texts: a list for each call, and the last list again and again.

    Each text ends at its request's end token or length.
    """

    name = "scripted"

    def __init__(self, tokenizer, *calls):
        self.tokenizer, self.calls, self.asked, self.closed = tokenizer, list(calls), [], 0

    def close(self):
        self.closed += 1

    def generate(self, requests):
        from medkit.modeling.engine import Generation

        self.asked += requests
        texts, generations = self.calls.pop(0) if len(self.calls) > 1 else self.calls[0], []
        for request, text in zip(requests, texts, strict=False):
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            end = next((place + 1 for place, token in enumerate(ids) if token in request.end_ids), len(ids))
            generations.append(Generation(ids[: min(end, request.max_new_tokens)]))
        return generations


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
    config = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    config |= {"tie_word_embeddings": True, "initializer_range": 0.1}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
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


def contents(folder):
    """Path → bytes of every file in a folder but locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def logits(model):
    """(1, T, V) after PROMPT."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits


def assert_same_weights(found, expected):
    """Of two models, or of their weights by name: equal to the bit."""
    found, expected = (one if isinstance(one, dict) else one.state_dict() for one in (found, expected))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not found[name].equal(expected[name])] == []


def plain_score(model, prompt_ids, answer_ids):
    """log p(answer | prompt) in nats from one full sequence, one token after the other."""
    import torch

    with torch.no_grad():
        logprobs = model(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt_ids) - 1 + i, token].item() for i, token in enumerate(answer_ids))


def attach_adapter(model, variant="lora", targets=("q_proj", "k_proj", "v_proj", "o_proj"), strength=0.0):
    """The model with an adapter of rank 4, whose weights are moved at random by `strength`, as if it were trained."""
    import torch

    from medkit.lora import adapters
    from medkit.params import AdapterParams

    section = AdapterParams(variant=variant, rank=4, alpha=8.0, dropout=0.0, target_modules=[*targets])
    model, generator = adapters.attach(model, section, seed=0), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(strength * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_encoder(folder):
    """A folder with a random BERT of one layer, for sentence embeddings, and a tokenizer that marks both ends."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    tokenizer, (_, start, end) = make_tokenizer(), SPECIAL
    ends = TemplateProcessing(single=f"{start} $A {end}", special_tokens=[(start, 1), (end, 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    tokenizer.save_pretrained(folder)
    return folder
