"""Loading, saving and cutting models, and the reasons for a device and an attention implementation."""

import importlib.util
import logging
import warnings

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from toys import PROMPT, logits
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from medkit.modeling import loading
from medkit.modeling.batches import Example, collect_logits
from medkit.params import Local, ModelParams
from medkit.prompts import templates
from medkit.quantization import gguf_export
from medkit.stage import MedkitError


def source(path):
    return ModelParams(source=Local(kind="local", path=str(path)), keep_layers=[])


def greedy(model, **options):
    ids = torch.tensor([PROMPT])
    options |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    return model.generate(ids, **options)[0].tolist()


# --- cutting -------------------------------------------------------------------------------------------------------


def test_a_cut_model_is_the_model_of_the_layers_kept(make_llama):
    model, expected = make_llama(layers=4), make_llama(layers=2, seed=1)
    kept = {0: 1, 1: 3}
    state = model.state_dict()
    expected.load_state_dict({
        name: state[name.replace(f"layers.{name.split('.')[2]}.", f"layers.{kept[int(name.split('.')[2])]}.")]
        if ".layers." in name else state[name] for name in expected.state_dict()
    })  # fmt: skip
    assert loading.keep_layers(model, [1, 3]) is model
    assert torch.equal(logits(model), logits(expected))
    assert [layer.self_attn.layer_idx for layer in model.get_decoder().layers] == [0, 1]
    assert model.config.num_hidden_layers == 2


def test_cutting_shortens_the_list_of_layer_types(make_llama, tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = make_llama(kind="Qwen2", **window)
    types = list(model.config.layer_types)
    assert len(set(types)) == 2
    model = loading.keep_layers(model, [1, 2])
    assert model.config.layer_types == types[1:]
    assert greedy(model, use_cache=True) == greedy(model, use_cache=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("keep", [[-1], [0, 3], [1, 0], [1, 1]], ids=["negative", "beyond", "out of order", "twice"])
def test_wrong_layers_are_an_error_that_says_the_range(make_llama, keep):
    with pytest.raises(MedkitError, match="0…2"):
        loading.keep_layers(make_llama(), keep)


# --- saving and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_equal(make_llama, tokenizer, models_params, tmp_path, tied):
    model = make_llama(tie_word_embeddings=tied)
    folder = loading.save_model(model, tokenizer, tmp_path / "model")
    again = loading.load_model(folder, models_params)
    assert torch.equal(logits(again), logits(model))
    assert not again.training and again.dtype == torch.float32
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert loading.load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    cut = loading.load_model(folder, models_params, keep=[0, 2])
    assert torch.equal(logits(cut), logits(loading.keep_layers(model, [0, 2])))


def rename(prefix):
    return lambda weights: {f"{prefix}{name}": tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (rename("base_model.model."), r"missing .*unexpected .*strip 'base_model\.model\.'"),
        (rename("model._fsdp_wrapped_module."), r"strip '_fsdp_wrapped_module\.'"),
        (lambda w: {n: t for n, t in w.items() if n != "lm_head.weight"}, r"missing lm_head\.weight; give"),
        (lambda w: {n: t for n, t in w.items() if ".1." not in n}, r"missing model\.layers\.1\..*… \(9\); give"),
        (lambda w: w | {"lm_head.weight": torch.zeros(10, 64)}, r"of another shape lm_head\.weight \(10, 64\)"),
        (lambda w: w | {"model.layers.7.norm": torch.zeros(3)}, r"unexpected model\.layers\.7\.norm"),
        (lambda w: {}, "missing"),
    ],
    ids=["PEFT", "FSDP", "no head", "no layer", "another head", "a layer more", "empty"],
)
def test_a_model_whose_weights_are_not_all_the_files_own_is_never_loaded(
    make_llama, tokenizer, models_params, tmp_path, change, sentence
):
    folder = loading.save_model(make_llama(tie_word_embeddings=False), tokenizer, tmp_path / "model")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MedkitError, match=sentence) as error:
        loading.load_model(folder, models_params)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_head_of_its_own_is_not_tied_over(make_llama, tokenizer, models_params, tmp_path):
    folder = loading.save_model(make_llama(tie_word_embeddings=False), tokenizer, tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(MedkitError, match=r"write false in config\.json"):
        loading.load_model(folder, models_params)


def test_only_safetensors_are_read(make_llama, tokenizer, models_params, tmp_path):
    folder = loading.save_model(make_llama(), tokenizer, tmp_path / "model")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(MedkitError, match="cannot be loaded"):
        loading.load_model(folder, models_params)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MedkitError, match="no weights"):
        loading.load_model(folder, models_params)
    torch.save(make_llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MedkitError, match="only a pickle"):
        loading.load_model(folder, models_params)


@pytest.mark.parametrize("name", ["m-00001-of-00002.gguf", "part.gguf", "cut.gguf"])
def test_a_part_of_a_gguf_file_is_refused_and_not_cached(make_llama, tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.setenv("MEDKIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / name
    if name == "part.gguf":
        writer = GGUFWriter(path, "llama")
        writer.add_uint16("split.count", 2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    else:
        gguf_export.export_gguf(make_llama(), tokenizer, path, "F16")
    if name == "cut.gguf":
        path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(MedkitError, match="not a whole GGUF" if name == "cut.gguf" else "one part of a split file"):
        loading.local_folder(source(path))
    assert not [p for p in (tmp_path / "cache" / "converted").iterdir() if p.suffix != ".lock"]


@pytest.mark.parametrize(
    ("kind", "extra", "said"),
    [
        ("Llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, "rope.scaling.type 'linear'"),
        ("Llama", {"rope.scale_linear": 8.0}, "rope.scale_linear 8.0"),
        ("Gemma3", {"attention.sliding_window_pattern": 2}, "attention.sliding_window_pattern 2"),
        ("Gemma3", {"rope.freq_base_swa": 2e4}, "rope.freq_base_swa 20000.0"),
        ("Llama", {"rope.scaling.type": "none", "rope.scaling.factor": 1.0}, None),
    ],
)
def test_what_transformers_would_drop_from_a_gguf_file_is_refused(
    make_llama, tokenizer, models_params, tmp_path, monkeypatch, kind, extra, said
):
    """Without a word another model would be loaded."""
    add = GGUFWriter.add_block_count

    def add_more(writer, value):
        add(writer, value)
        for name, setting in extra.items():
            kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kinds[type(setting)](f"{writer.arch}.{name}", setting)

    monkeypatch.setattr(GGUFWriter, "add_block_count", add_more)
    model = make_llama(layers=1, kind=kind, head_dim=256 if kind == "Gemma3" else 16)
    path = gguf_export.export_gguf(model, tokenizer, tmp_path / "student.gguf", "F16")
    if said is None:
        assert loading.load_model(path, models_params).num_parameters() == model.num_parameters()
        return
    with pytest.raises(MedkitError, match=f"{said}.* give its folder with safetensors"):
        loading.load_model(path, models_params)


def test_a_gguf_file_is_converted_once(make_llama, tokenizer, models_params, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKIT_CACHE", str(tmp_path / "cache"))
    model = make_llama()
    path = gguf_export.export_gguf(model, tokenizer, tmp_path / "student.gguf", "F16")
    folder = loading.local_folder(source(path))
    torch.testing.assert_close(logits(loading.load_model(folder, models_params)), logits(model), rtol=0, atol=1e-2)
    assert loading.load_tokenizer(folder)("Vitamin C").input_ids == tokenizer("Vitamin C").input_ids
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert loading.local_folder(source(path)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_all_end_tokens_of_a_checkpoint_stay_with_it(make_llama, tokenizer, models_params, tmp_path):
    model = make_llama()
    model.generation_config.update(eos_token_id=[2, 0], do_sample=True)
    folder = loading.save_model(model, tokenizer, tmp_path / "downloaded")
    again = loading.save_model(loading.load_model(folder, models_params), tokenizer, tmp_path / "student")
    assert templates.end_ids(loading.load_tokenizer(again)) == (2, 0)
    assert not loading.load_model(again, models_params).generation_config.do_sample


def test_a_tokenizer_without_padding_pads_with_its_end_and_one_without_an_end_is_an_error(make_tokenizer, tmp_path):
    for name, changes, pad in (("own", {}, 0), ("none", {"pad_token": None}, 2)):
        make_tokenizer(**changes).save_pretrained(tmp_path / name)
        assert loading.load_tokenizer(tmp_path / name).pad_token_id == pad
    make_tokenizer(eos_token=None).save_pretrained(tmp_path / "endless")
    with pytest.raises(MedkitError, match="no end token"):
        loading.load_tokenizer(tmp_path / "endless")


# --- device and attention ------------------------------------------------------------------------------------------


def test_the_device_asked_for_and_the_attention_that_it_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.pick_device("auto") == torch.device("cpu")
    with pytest.raises(MedkitError, match="no CUDA device; use 'auto' or 'cpu'"):
        loading.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.pick_device("auto") == torch.device("cuda")
    for flash, picked in ((True, "flash_attention_2"), (None, "sdpa")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=flash: found)
        assert loading.pick_attention("auto", torch.device("cuda"), "bfloat16")[0] == picked
        assert loading.pick_attention("auto", torch.device("cpu"), "bfloat16")[0] == "sdpa"
    for requested in ("auto", "flash_attention_2"):  # a student that is trained has float32 weights
        assert loading.pick_attention(requested, torch.device("cuda"), "float32")[0] == "sdpa"
    assert loading.pick_attention("eager", torch.device("cuda"), "float32") == ("eager", "asked for in the params")


def test_a_model_that_one_gpu_cannot_hold_is_spread_and_predicts_the_same(
    make_llama, tokenizer, models_params, tmp_path, monkeypatch
):
    """Here over memory and disk, which needs no GPU: the hooks that move what a layer reads are the same."""
    folder = loading.save_model(make_llama(tie_word_embeddings=False), tokenizer, tmp_path / "toy")
    size, cuda = sum(file.stat().st_size for file in folder.glob("*.safetensors")), torch.device("cuda")
    for free, fits in {size: False, size + 1: True}.items():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * size))
        assert loading._fits(folder, cuda) == fits
    whole = loading.load_model(folder, models_params)
    names = [f"model.{part}" for part in ("embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(3)))]
    places = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk", "lm_head": "disk"}
    spread = loading.read_weights(
        AutoModelForCausalLM, folder, device_map=places, offload_folder=tmp_path / "disk", dtype=torch.float32
    )
    assert spread.get_parameter("lm_head.weight").is_meta
    examples = [Example([5, 9, 17, 33], 2), Example([5, 9, 4], 1)]
    assert torch.equal(collect_logits(spread.eval(), examples), collect_logits(whole, examples))


def test_transformers_is_quiet_inside_the_block_only():
    def settings():
        return transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled(), [*warnings.filters]

    before = settings()
    assert before[1], "importing medkit changes nothing for others"
    with loading.quiet_transformers():
        assert settings()[:2] == (logging.ERROR, False)
    assert settings() == before


def test_bfloat16_is_picked_where_the_device_has_instructions_for_it(monkeypatch):
    cpu = torch.device("cpu")
    assert loading.pick_bf16(True, cpu) is True and loading.pick_bf16(False, torch.device("cuda")) is False
    for able, picked in (({"avx2": True}, False), ({"avx512_bf16": False, "amx_bf16": True}, True), ({}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", able.copy)
        assert loading.pick_bf16("auto", cpu) is picked
