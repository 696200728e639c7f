"""A profile is complete and exact: every wrong key, value or file is one sentence that names the key and the file."""

import copy
import json
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medkit.params import Params, ParamsError, digest, load_params
from medkit.stage import ROOT

PROFILES = sorted((ROOT / "params").glob("*.yaml"))
SMOKE = ROOT / "params" / "smoke.yaml"
RAW = yaml.safe_load(SMOKE.read_text())
# what a profile chooses the form of: which datasets, where from, and a student of its own or cut from the teacher
OPEN = {
    ("models", "teacher", "source"),
    ("models", "student"),
    ("models", "embedder"),
    ("data", "datasets"),
    ("data", "open_questions"),
    ("data", "drug_pairs"),
    ("inference", "questions"),
    ("inference", "studies", "shuffle", "questions"),
    ("inference", "studies", "ablation"),
    ("inference", "studies", "ensemble", "questions"),
    ("inference", "server"),
    ("distillation", "rationales"),
    ("distillation", "on_policy"),
}


def key_paths(node: dict, prefix: tuple = ()) -> set[tuple]:
    """Every nested key, down to the leaves and to the places where profiles may differ."""
    found = set()
    for key, value in node.items():
        path = (*prefix, key)
        found |= {path} if path in OPEN or not isinstance(value, dict) else {path} | key_paths(value, path)
    return found


def write(folder, raw) -> str:
    path = folder / "profile.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
    return path


def changed(path: str, value=None, *, drop: bool = False) -> dict:
    """The smoke profile with one key set, added or dropped."""
    raw = copy.deepcopy(RAW)
    *parents, leaf = path.split(".")
    node = raw
    for key in parents:
        node = node[key]
    if drop:
        del node[leaf]
    else:
        node[leaf] = value
    return raw


def refusal(path, overrides=None) -> str:
    """The message of the ParamsError; it is one line and names the file."""
    with pytest.raises(ParamsError) as error:
        load_params(path, overrides)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_there_are_the_four_profiles():
    assert {path.stem for path in PROFILES} >= {"smoke", "tiny", "gpu", "paper"}


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_shipped_profile_loads_unchanged(path):
    params = load_params(path)
    assert isinstance(params, Params)
    assert params.model_dump(mode="json") == yaml.safe_load(path.read_text())  # nothing filled in, converted or lost


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_profiles_have_the_same_keys(path):
    ours, theirs = key_paths(yaml.safe_load(path.read_text())), key_paths(RAW)
    assert ours == theirs, f"differ in {sorted(ours ^ theirs)}"


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_profile_asks_only_for_what_it_has(path):
    params = load_params(path)
    for scoring, wanted in params.inference.questions.items():
        for source, count in wanted.items():
            there = params.data.datasets[source].test
            assert "all" in (there, count) or count <= there, f"{scoring}.{source}: {count} of {there}"
    assert params.evaluation.headline_source in params.inference.questions["option_text"]


def test_params_are_immutable():
    params = load_params(SMOKE)
    with pytest.raises(ValidationError):
        params.lora.adapter.rank = 8


# --- keys ----------------------------------------------------------------------------------------------------------

LEAVES = sorted(".".join(path) for path in key_paths(RAW) if not any(path[: len(o)] == o for o in OPEN))


@pytest.mark.parametrize(
    "key",
    [
        *LEAVES,
        "data.datasets.mmlu.test",
        "data.open_questions",
        "data.drug_pairs",
        "data.drug_pairs.sha256",
        "models.teacher.source.sha256",
    ],
)
def test_missing_key_is_named(key, tmp_path):
    message = refusal(write(tmp_path, changed(key, drop=True)))
    assert "missing key" in message
    assert key.rsplit(".", 1)[-1] in message
    assert all(part in message for part in key.split("."))


@pytest.mark.parametrize(
    "section",
    [
        "",
        "models.",
        "models.teacher.",
        "models.teacher.source.",
        "data.",
        "data.datasets.mmlu.",
        "distillation.correction.",
        "lora.train.",
        "quantization.",
        "inference.bench.",
        "evaluation.",
    ],
)
def test_unknown_key_is_named(section, tmp_path):
    message = refusal(write(tmp_path, changed(f"{section}rnak", 4)))
    assert "unknown key" in message
    assert "rnak" in message


def test_all_wrong_keys_are_told_at_once(tmp_path):
    raw = changed("lora.adapter.rnak", 4)
    del raw["lora"]["adapter"]["rank"], raw["seed"]
    message = refusal(write(tmp_path, raw))
    assert all(key in message for key in ("lora.adapter.rnak", "lora.adapter.rank", "'seed'"))


MISTYPED = [
    ("seed", "0"),
    ("seed", -1),
    ("seed", 1.5),
    ("seed", True),
    ("seed", None),
    ("models.device", "gpu"),
    ("lora.adapter.variant", "qlora"),
    ("models.dtype", "float16"),
    ("models.attention", "flash"),
    ("models.student", "pruned"),
    ("models.teacher.keep_layers", 4),
    ("models.teacher.keep_layers", [-1]),
    ("models.teacher.source.kind", "ftp"),
    ("models.teacher.source.sha256", "abc"),
    ("models.teacher.source.sha256", RAW["models"]["teacher"]["source"]["sha256"].upper()),
    ("data.max_prompt_tokens", 0),
    ("data.datasets", []),
    ("data.datasets.mmlu.test", "every"),
    ("data.datasets.mmlu.test", -1),
    ("data.datasets.mmlu", None),
    ("distillation.temperature", 0.0),
    ("distillation.top_k", "16"),
    ("distillation.ce_weight", float("nan")),
    ("distillation.kl_weight", float("inf")),
    ("distillation.divergence", "kl"),
    ("distillation.jsd_beta", 1.0),
    ("distillation.hidden_weight", -0.5),
    ("distillation.hidden_layers", [1, 2]),
    ("distillation.order", "easy"),
    ("distillation.alignment", "bytes"),
    ("distillation.alignment", None),
    ("lora", None),
    ("lora.adapter.rank", "16"),
    ("lora.adapter.rank", 0),
    ("lora.adapter.dropout", 1.5),
    ("lora.adapter.target_modules", "q_proj"),
    ("lora.train.learning_rate", "1e-3"),
    ("lora.train.learning_rate", float("inf")),
    ("quantization.double_quant", "yes"),
    ("quantization.gguf_type", "Q3_K"),
    ("inference.questions.option_txt", {"mmlu": 4}),
    ("inference.bench.repeats", 2.5),
    ("evaluation.confidence", 95),
    ("evaluation.headline_scoring", "letter"),
]


@pytest.mark.parametrize(("key", "value"), MISTYPED, ids=[f"{key}={value!r}"[:60] for key, value in MISTYPED])
def test_mistyped_value_is_refused_by_name(key, value, tmp_path):
    message = refusal(write(tmp_path, changed(key, value)))
    assert key.removesuffix(".kind") in message.replace("source.wheel.", "source.")  # pydantic puts the chosen kind in


@pytest.mark.parametrize(("key", "value"), [m for m in MISTYPED if "option_txt" not in m[0]], ids=lambda v: str(v)[:60])
def test_mistyped_override_is_refused_like_a_key(key, value, tmp_path):
    assert refusal(SMOKE, {key: value}).removeprefix(str(SMOKE)) == refusal(
        write(tmp_path, changed(key, value))
    ).removeprefix(str(tmp_path / "profile.yaml"))


# --- values that contradict each other -----------------------------------------------------------------------------


def test_headline_source_must_be_a_tested_dataset():
    assert "headline_source" in refusal(SMOKE, {"evaluation.headline_source": "medqaa"})


def test_hidden_states_are_compared_between_layers_that_are_named():
    assert "hidden_layers" in refusal(SMOKE, {"distillation.hidden_weight": 0.5})
    pairs = {"distillation.hidden_weight": 0.5, "distillation.hidden_layers": [[2, 3]]}
    assert load_params(SMOKE, pairs).distillation.hidden_layers == [[2, 3]]
    assert "hidden_layers" in refusal(SMOKE, {**pairs, "distillation.hidden_layers": [[2, 3, 4]]})


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("divergence", "jsd", "'forward_kl'"),
        ("temperature", 2.0, "1.0"),
        ("hidden_weight", 0.5, "0.0"),
        ("entity_weight", 0.5, "0.0"),
    ],
)
def test_two_tokenizers_allow_the_forward_kl_alone(key, value, needed):
    cross, more = ROOT / "params" / "cross.yaml", {f"distillation.{key}": value, "distillation.hidden_layers": [[1, 1]]}
    for alignment in ("spans", "options"):
        message = refusal(cross, {**more, "distillation.alignment": alignment})
        assert f"{key}: with alignment {alignment!r} it must be {needed}" in message
    assert load_params(cross, {**more, "distillation.alignment": "tokens"})


def test_a_student_cut_from_its_teacher_has_no_second_tokenizer():
    message = refusal(SMOKE, {"distillation.alignment": "spans"})
    assert "distillation.alignment: 'spans' is for two tokenizers" in message and "use 'tokens'" in message
    assert load_params(SMOKE, {"distillation.alignment": "options"}).distillation.alignment == "options"


def test_asked_source_must_be_a_dataset():
    assert "medqaa" in refusal(
        SMOKE, {"inference.questions": {**RAW["inference"]["questions"], "letter": {"medqaa": 4}}}
    )


# --- a table of one's own ------------------------------------------------------------------------------------------

COLUMNS = {"question": "q", "options": "choices", "answer": "gold", "context": "", "subject": ""}
TABLE = {"kind": "table", "path": "mine.jsonl", "pool": "test", "columns": COLUMNS, "answer_is": "letter"}
ORIGIN = "data.datasets.mmlu.origin"


@pytest.mark.parametrize("pool", ["test", "train", "transfer", None])
@pytest.mark.parametrize("answer_is", ["index0", "index1", "letter", "text"])
@pytest.mark.parametrize("options", ["choices", ["opa", "opb"]])
def test_a_table_is_an_origin_of_questions(pool, answer_is, options):
    table = {**TABLE, "pool": pool, "answer_is": answer_is, "columns": {**COLUMNS, "options": options}}
    origin = load_params(SMOKE, {ORIGIN: table}).data.datasets["mmlu"].origin
    assert origin.model_dump() == table


@pytest.mark.parametrize("key", [*TABLE, *(f"columns.{name}" for name in COLUMNS)])
def test_every_key_of_a_table_is_wanted(key, tmp_path):
    raw = changed(ORIGIN, copy.deepcopy(TABLE))
    *parents, leaf = [*ORIGIN.split("."), *key.split(".")]
    node = raw
    for parent in parents:
        node = node[parent]
    del node[leaf]
    message = refusal(write(tmp_path, raw))
    assert leaf in message
    assert ORIGIN in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"answer_is": "index"}, "answer_is"),
        ({"answer_is": None}, "answer_is"),
        ({"pool": "valid"}, "pool"),
        ({"pool": ""}, "pool"),
        ({"columns": {**COLUMNS, "question": ""}}, "columns.question"),
        ({"columns": {**COLUMNS, "options": []}}, "columns.options"),
        ({"columns": {**COLUMNS, "options": ["opa"]}}, "columns.options"),
        ({"columns": {**COLUMNS, "context": None}}, "columns.context"),
        ({"columns": {**COLUMNS, "kind": "k"}}, "columns.kind"),
        ({"columns": {**COLUMNS, "answer": ""}}, "columns.answer"),
        ({"columns": {**COLUMNS, "answer": ""}, "pool": None}, "columns.answer"),
        ({"revision": "main"}, "revision"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_by_name(changes, named):
    assert named in refusal(SMOKE, {ORIGIN: {**TABLE, **changes}})


def test_a_table_without_answers_is_for_transfer():
    table = {**TABLE, "columns": {**COLUMNS, "answer": ""}, "pool": "transfer"}
    assert load_params(SMOKE, {ORIGIN: table}).data.datasets["mmlu"].origin.pool == "transfer"


@pytest.mark.parametrize("key", ["models.teacher.source", "data.open_questions", "data.drug_pairs"])
def test_only_questions_with_options_come_from_a_table(key):
    message = refusal(SMOKE, {key: TABLE})
    assert key in message
    assert "table" in message


@pytest.mark.parametrize("key", ["open_questions", "drug_pairs"])
def test_questions_of_other_forms_may_be_left_out(key):
    assert getattr(load_params(SMOKE, {f"data.{key}": None}).data, key) is None


# --- overrides -----------------------------------------------------------------------------------------------------


def test_override_changes_that_key_and_no_other():
    plain, other = load_params(SMOKE).model_dump(), load_params(SMOKE, {"lora.adapter.rank": 5}).model_dump()
    assert other["lora"]["adapter"].pop("rank") == 5
    plain["lora"]["adapter"].pop("rank")
    assert other == plain


def test_override_may_replace_a_section_but_is_checked_like_one():
    rest = {**RAW["quantization"], "gguf_type": "F16"}
    assert load_params(SMOKE, {"quantization": rest}).quantization.gguf_type == "F16"
    assert "quantization.double_quant" in refusal(SMOKE, {"quantization": {"gguf_type": "F16", "drift_examples": 4}})


@pytest.mark.parametrize(
    ("dotted", "right"),
    [
        ("lora.adapter.rnak", "rank"),
        ("lorra.adapter.rank", "lora"),
        ("lora.adaptor.rank", "adapter"),
        ("sead", "seed"),
        ("data.datasets.med_mcqa.test", "medmcqa"),
        ("inference.bench.repeat", "repeats"),
        ("evaluation.headline_sources", "headline_source"),
    ],
)
def test_near_miss_override_suggests_the_right_key(dotted, right):
    message = refusal(SMOKE, {dotted: 1})
    assert dotted in message
    assert f"did you mean {right!r}" in message


@pytest.mark.parametrize(
    "dotted", ["zzz", "lora.zzz", "lora.adapter.rank.zzz", "", "lora.", ".lora", "lora..adapter", "seed.x"]
)
def test_unknown_override_is_refused(dotted):
    message = refusal(SMOKE, {dotted: 1})
    assert repr(dotted) in message
    assert "no such parameter" in message


def test_far_miss_lists_the_known_keys():
    message = refusal(SMOKE, {"lora.zzzzzz": 1})
    assert all(key in message for key in RAW["lora"])


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- a\n- b\n", "list"),
        ("just words\n", "str"),
        ("42\n", "int"),
        ("", "mapping"),
        ("# only a comment\n", "mapping"),
        ("seed: [1, 2\nmodels: {", "not valid yaml"),
        ("seed: 0\n\tmodels: {}\n", "not valid yaml"),
        ("seed: *nowhere\n", "not valid yaml"),
        ("seed: !!python/object:os.system 1\n", "not valid yaml"),
    ],
)
def test_unusable_yaml_is_refused(content, said, tmp_path):
    assert said in refusal(write(tmp_path, content))


def test_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_bytes(b"seed: \xff\xfe\x00")
    assert "not valid yaml" in refusal(path)


def test_missing_file_lists_its_neighbours(tmp_path):
    assert "smoke.yaml" in refusal(ROOT / "params" / "smok.yaml")
    assert "none" in refusal(tmp_path / "there.yaml")
    assert "none" in refusal(tmp_path / "no" / "folder" / "there.yaml")


def test_a_folder_is_no_params_file(tmp_path):
    assert "no such params file" in refusal(tmp_path)


# --- digest --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def reordered(value, rng: random.Random):
    """The same value with the keys of every mapping in another order."""
    if isinstance(value, dict):
        return {key: reordered(value[key], rng) for key in rng.sample(list(value), len(value))}
    return [reordered(item, rng) for item in value] if isinstance(value, list) else value


@settings(max_examples=30, deadline=None, derandomize=True)
@given(JSON, st.integers(0, 9))
def test_digest_does_not_see_the_order_of_keys(value, seed):
    assert digest(value) == digest(reordered(value, random.Random(seed)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(JSON, JSON)
def test_digest_tells_different_values_apart(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest(one) == digest(other)) == same


def test_digest_sees_order_in_lists_and_type():
    assert digest([1, 2]) != digest([2, 1])
    assert digest(1) != digest("1")


def test_digest_is_stable_over_versions():
    """Caches and manifests hold these: a change of the function reruns every run there is."""
    assert digest({"b": [1, "µ"], "a": None}) == "10889a9b1056084d"


def test_a_key_written_twice_is_named(tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text(SMOKE.read_text().replace("seed: 0", "seed: 0\nseed: 1"))
    with pytest.raises(ParamsError, match="'seed' stands twice"):
        load_params(path)


def test_a_relative_path_starts_at_the_profile(tmp_path, monkeypatch):
    path = tmp_path / "profile.yaml"
    path.write_text(SMOKE.read_text())
    monkeypatch.chdir("/")  # wherever the command is called, or the notebook runs
    for told, meant in (("data/mine", tmp_path / "data" / "mine"), ("/data/mine", Path("/data/mine"))):
        found = load_params(path, {"models.embedder": {"kind": "local", "path": told}})
        assert found.models.embedder.path == str(meant)
