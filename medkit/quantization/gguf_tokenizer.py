"""The tokenizer inside the GGUF file: byte-pair vocabulary, merges, and the name of the rule that splits text.

GGUF names a splitting rule but does not describe it, so only known rules are written. It has no normalization: text
must be NFC before it reaches a Qwen2 file. Added tokens beyond ASCII (<｜User｜> of R1-Distill) are written as
llama.cpp wants them; transformers 5.23 splits them, so give it token ids. Gemma's pieces of characters have neither
rule nor merges, but scores. llama.cpp takes "</s>" for an end token, also in Gemma's vocabulary, where it is a tag.
"""

import json
import re

import gguf
from transformers.tokenization_utils_base import generate_merges

from medkit.prompts.templates import end_ids, file_template
from medkit.stage import MedkitError

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}  # beside pieces of characters
SPACE = "▁"  # in them
SPLITS = {QWEN2_SPLIT: "qwen2", LLAMA3_SPLIT: "llama-bpe"}  # llama.cpp's names; Qwen3 splits as Qwen2


class ExportError(MedkitError):
    """A model, tokenizer or GGUF file that cannot be exported or is not the exported one."""


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer, vocab_size: int) -> None:
    """Write vocabulary, merges or scores, special tokens and chat template of a fast tokenizer.

    `vocab_size` is the model's; its rows beyond the tokenizer's vocabulary become unused tokens, and added tokens
    without a row (Gemma's image) are left out. Raises ExportError for a tokenizer that GGUF cannot describe.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ExportError(f"tokenizer of type {model['type']!r}: only byte-pair encodings can be exported")
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    if max(names.keys() - added.keys()) >= vocab_size:
        raise ExportError(f"tokenizer of {len(tokenizer)} tokens: the model has rows for {vocab_size} only")
    in_pieces = model["byte_fallback"]
    if in_pieces:
        _check_pieces(backend)
    else:
        for step in _steps(backend["normalizer"], "normalizers"):
            if step["type"] != "NFC":
                raise ExportError(f"normalizer {step['type']!r}: a GGUF file cannot hold it; use one without it")
        writer.add_tokenizer_pre(_pre_tokenizer(backend))
    special = set(tokenizer.all_special_ids)
    types = []
    for number in range(vocab_size):
        if number in special or added.get(number):
            types.append(gguf.TokenType.CONTROL)
        elif number in added:  # one token in the text, and visible in the answer: <think>
            types.append(gguf.TokenType.USER_DEFINED)
            if in_pieces:  # llama.cpp looks for it before it replaces spaces
                names[number] = names[number].replace(SPACE, " ")
        elif in_pieces and names.get(number) in BYTES:
            types.append(gguf.TokenType.BYTE)
        else:
            types.append(gguf.TokenType.NORMAL if number in names else gguf.TokenType.UNUSED)
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(vocab_size)])
    writer.add_token_types(types)
    if in_pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(number) for number in range(vocab_size)])
        writer.add_add_space_prefix(False)
        writer.add_unk_token_id(model["vocab"][model["unk_token"]])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # a chat template that needs a start token writes it itself
    for other in end_ids(tokenizer)[1:2]:
        writer.add_eot_token_id(other)
    writer.add_chat_template(file_template(tokenizer))


def _check_pieces(backend: dict) -> None:
    """Raise ExportError for a tokenizer that splits text in another way than Gemma's.

    llama.cpp joins any two neighbours that make a token, that of the highest score first. So must the merges: all
    pairs that make a token, in the order of its id, which is minus the score. A space is "▁", none is put before the
    text, and what has no piece is written as bytes.
    """
    vocab, merges = backend["model"]["vocab"], [tuple(merge) for merge in backend["model"]["merges"]]
    made = [vocab[left + right] for left, right in merges]
    no_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    no_split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if (
        backend["normalizer"] != no_spaces
        or backend["pre_tokenizer"] not in (None, no_split)
        or not vocab.keys() >= BYTES
        or made != sorted(made)
        or set(merges) != set(generate_merges(vocab))
    ):
        raise ExportError("tokenizer with byte fallback: only one that splits text as Gemma's can be exported")


def _steps(part: dict | None, inside: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer: none, one, or a sequence."""
    return [] if part is None else part.get(inside, [part])


def _pre_tokenizer(backend: dict) -> str:
    """llama.cpp's name for the rule by which this tokenizer splits text. Raises ExportError for an unknown rule.

    smollm is GPT-2's rule after a split into single digits; if the vocabulary has no token of two digits, the digit
    split makes no difference. The others are one regular expression each.
    """
    steps = _steps(backend["pre_tokenizer"], "pretokenizers")
    if steps and steps[-1]["type"] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        *before, last = steps
        digit_split = [{"type": "Digits", "individual_digits": True}]
        two_digits = any(re.search(r"\d\d", token) for token in backend["model"]["vocab"])
        if last["use_regex"] and (before == digit_split or (not before and not two_digits)):
            return "smollm"
        for pattern, name in SPLITS.items():
            rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            if not last["use_regex"] and before == [rule]:
                return name
    raise ExportError(
        f"pre-tokenizer {[step['type'] for step in steps]}: only those of SmolLM2, Qwen2 and 3, Llama 3 can be exported"
    )
