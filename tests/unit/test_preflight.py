"""What cannot work is refused before anything runs, in one sentence; what is not here yet is named."""

import json

import pandas as pd
import pytest
import yaml
from toys import save_encoder

from medkit import preflight
from medkit.modeling import loading
from medkit.params import load_params
from medkit.stage import ROOT, MedkitError

SMOKE = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())


@pytest.fixture(scope="module")
def toys(make_llama, make_tokenizer, tokenizer, tmp_path_factory):
    """Folders of toy models by name, an encoder, and a table."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("toys")
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    models = {"plain": {}, "narrow": {"intermediate_size": 96}, "rope": {"rope_parameters": rope}}
    models["windows"] = {"kind": "Gemma3", "layers": 8, "head_dim": 256, "sliding_window": 32}
    for name, changes in models.items():
        loading.save_model(make_llama(**{"intermediate_size": 128, **changes}), tokenizer, folder / name)
    few = {"vocab_size": 300, "n_embd": 64, "n_layer": 1, "n_head": 2}
    loading.save_model(GPT2LMHeadModel(GPT2Config(**few)), tokenizer, folder / "gpt2")
    refusing = make_tokenizer(chat_template="{{ raise_exception('no turns') }}")
    loading.save_model(make_llama(intermediate_size=128), refusing, folder / "refusing")
    save_encoder(folder / "encoder")
    own = pd.DataFrame({"split": ["train", "valid", "test"] * 8, "answer": [0, 1] * 12})
    own = own.assign(question=own.split + own.index.map(" {}?".format), options=[[f"a{n}", f"b{n}"] for n in own.index])
    own.to_json(folder / "own.jsonl", orient="records", lines=True)
    return folder


@pytest.fixture
def check(toys):
    """check(changes): `check_profile` of a profile of the toys in which dotted keys have other values."""
    columns = {"question": "question", "options": "options", "answer": "answer", "context": "", "subject": ""}
    origin = {"kind": "table", "path": str(toys / "own.jsonl"), "pool": None, "answer_is": "index0"}
    own = {"origin": origin | {"columns": columns | {"split": "split"}}}
    own |= {"private": 2, "labelled": 2, "transfer": 2, "valid": 8, "test": 8}
    profile = {
        "models.teacher": {"source": {"kind": "local", "path": str(toys / "plain")}, "keep_layers": []},
        "models.embedder": {"kind": "local", "path": str(toys / "encoder")},
        "data": {"max_prompt_tokens": 640, "open_questions": None, "dialogues": None, "datasets": {"own": own}},
        "quantization.plan.share": 0.6,
        "inference.questions": {"option_text": {"own": 8}},
        "inference.exams": {},
        "inference.shuffle.questions": {"own": 2},
        "evaluation.headline_source": "own",
    }
    smoke = ROOT / "params" / "smoke.yaml"
    return lambda changes=None: preflight.check_profile(load_params(smoke, profile | (changes or {})))


def test_a_profile_that_can_run_is_accepted(check):
    assert check() == []


def test_refused_rows_of_ones_own_are_counted(check, toys, tmp_path):
    rows = (toys / "own.jsonl").read_text() + '{"split": "test", "question": "", "options": ["a", "b"], "answer": 0}\n'
    (tmp_path / "own.jsonl").write_text(rows)
    notes = check({"data.datasets.own.origin.path": str(tmp_path / "own.jsonl")})
    assert notes == ["data.datasets.own: 1 rows are refused: empty question (the first: 25)"]


def of_model(name: str) -> dict:
    return {"models.teacher.source": {"kind": "local", "path": name}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.datasets.own.origin.path": "none.jsonl"}, r"none\.jsonl: no such file"),
        ({"data.datasets.own.origin.columns.answer": "gold"}, r"no column \['gold'\]"),
        ({"data.datasets.own.private": 7}, "own: 7 questions asked for private"),
        (of_model("none"), "none: no such file or folder"),
        (of_model("{toys}"), r"no config\.json"),
        (of_model("{toys}/rope"), r"quantization\.edge_small: rope_type 'linear'.*set them to null"),
        (of_model("{toys}/windows") | {"distillation.num_layers": 7}, r"edge_small: layer_types .*set them to null"),
        (of_model("{toys}/narrow"), "cannot be nf4: its rows of 96 weights"),
        (of_model("{toys}/gpt2"), "'gpt2' is no dense decoder"),
        (of_model("{toys}/encoder"), "the weights are not those of its config|cannot be loaded"),
        (of_model("{toys}/refusing"), r"the chat template refuses these turns \(no turns\)"),
        ({"models.teacher.keep_layers": [0, 3]}, r"within 0…2"),
        ({"distillation.num_layers": 4}, r"num_layers is 4, the teacher has 3 layers"),
        ({"distillation.hidden_weight": 1.0, "distillation.hidden_layers": [[3, 3]], "distillation.num_layers": 2},
         r"hidden_layers \[3, 3\]: the student has 2 layers"),
        ({"distillation.correction.target_modules": ["qkv_proj"]}, r"target_modules \['qkv_proj'\]"),
        ({"lora.adapter.target_modules": ["lm_head"]}, "tied to the embeddings"),
        ({"distillation.top_k": 400}, "top_k is 400, the student has 300"),
        ({"quantization.plan.share": 0.1}, r"plan\.share is 0\.1: a budget of"),
        ({"data.max_prompt_tokens": 1020}, "the positions of the student allow 1024"),
        ({"distillation.rationales": {"questions": 2, "samples": 1, "max_new_tokens": 1000, "temperature": 0.6,
                                      "too_easy": 1.0, "server": None}}, "the positions of the student allow 1024"),
        ({"inference.server": {"base_url": "http://x/v1", "model": "m", "api_key_env": "MEDKIT_NO_KEY"}},
         r"inference\.server: the API key is read from MEDKIT_NO_KEY"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(check, toys, changes, sentence):
    filled = json.loads(json.dumps(changes).replace("{toys}", str(toys)))
    with pytest.raises(MedkitError, match=sentence):
        check(filled)


def test_an_architecture_that_no_file_can_hold_runs_without_one(check, toys):
    changes = json.loads(json.dumps(of_model("{toys}/rope")).replace("{toys}", str(toys)))
    without = {"quantization.edge": None, "quantization.edge_small": None, "inference.claims": ["student_kd"]}
    assert check(changes | without) == []


def test_what_is_not_downloaded_is_named_and_not_fetched(check, no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKIT_CACHE", str(tmp_path / "empty"))
    teacher = {"models.teacher.source": SMOKE["models"]["teacher"]["source"]}
    hub = {"kind": "hub", "repo": "owner/set", "revision": "main", "type": "dataset", "subset": ""}
    notes = check(teacher | {"data.open_questions": hub, "data.datasets.own.origin.path": hub})
    away = ("models.teacher", "data.datasets.own", "data.open_questions")
    assert notes == [f"{name} is not downloaded yet, and not checked" for name in away]
    assert no_network == [] and not (tmp_path / "empty").exists()


def test_the_documented_example_is_accepted(check, tmp_path):
    text = (ROOT / "docs" / "own_data.md").read_text()
    changes, more = (yaml.safe_load(block.split("```")[0]) for block in text.split("```yaml\n")[1:3])
    header, example = text.split("```csv\n")[1].split("```")[0].strip().splitlines()
    rows = [example.replace("metformin", f"drug{n}").replace("organ", f"organ of the {n}th kind") for n in range(200)]
    changes["data"]["datasets"]["mine"]["origin"]["path"] = str(tmp_path / "mine.csv")
    (tmp_path / "mine.csv").write_text("\n".join([header, *rows]))
    chat = text.split("```json\n")[1].split("```")[0]
    chats = [
        chat.replace("toe", f"toe {n} of the {n}th foot in the {n}th week").replace("p1", f"p{n}") for n in range(120)
    ]
    more["data"]["datasets"]["notes"]["origin"]["path"] = str(tmp_path / "notes.jsonl")
    (tmp_path / "notes.jsonl").write_text("".join(chats))
    changes["data"]["datasets"] |= more["data"]["datasets"]
    changes["inference"] |= more["inference"]
    flat = {"data": changes["data"], "evaluation.headline_source": changes["evaluation"]["headline_source"]}
    for section in ("quantization", "inference"):
        flat |= {f"{section}.{key}": value for key, value in changes[section].items()}
    assert check(flat) == []
