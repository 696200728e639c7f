"""A profile is complete and exact: every wrong key, value or file is one sentence that names the key and the file."""

import copy

import pytest
import yaml

from medkit.params import Params, ParamsError, digest, load_params
from medkit.stage import ROOT
from medkit.variants import list_variants

PROFILES = sorted((ROOT / "params").glob("*.yaml"))
SMOKE = ROOT / "params" / "smoke.yaml"
RAW = yaml.safe_load(SMOKE.read_text())


def refusal(path, overrides=None) -> str:
    """The message of the ParamsError; it is one line and names the file."""
    with pytest.raises(ParamsError) as error:
        load_params(path, overrides)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_shipped_profile_loads_unchanged(path):
    params = load_params(path)
    assert isinstance(params, Params)
    assert params.model_dump(mode="json") == yaml.safe_load(path.read_text())  # nothing filled in, converted or lost


def test_every_missing_and_unknown_key_is_named_at_once(tmp_path):
    raw = copy.deepcopy(RAW)
    raw["lora"]["adapter"]["rnak"] = raw["lora"]["adapter"].pop("rank")
    del raw["seed"], raw["distillation"]["top_k"]
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(raw))
    message = refusal(tmp_path / "profile.yaml")
    assert all(f"missing key '{path}'" in message for path in ("seed", "lora.adapter.rank", "distillation.top_k"))
    assert "unknown key 'lora.adapter.rnak'" in message


def test_an_override_changes_no_other_key_that_shares_a_mapping_by_an_alias():
    params = load_params(ROOT / "params" / "tiny.yaml", {"data.datasets.mmlu.origin.version": "9"})
    versions = {name: dataset.origin.version for name, dataset in params.data.datasets.items()}
    assert versions.pop("mmlu") == "9" and "9" not in versions.values() and params.data.dialogues.version != "9"


LAYERS = "distillation.hidden_layers"
HIDDEN = {"distillation.hidden_weight": 0.5, LAYERS: [[2, 3]]}
SERVER = {"base_url": "http://localhost:1/v1", "model": "m", "api_key_env": ""}
ORIGIN = "data.datasets.mmlu.origin"
COLUMNS = {"question": "q", "options": "choices", "answer": "gold", "context": "", "subject": ""}
TABLE = {"kind": "table", "path": "mine.jsonl", "pool": "test", "columns": COLUMNS, "answer_is": "letter"}
CHATS = {"kind": "instructions", "path": "mine.jsonl", "pool": None, "columns": {"messages": "chat"}}
NO_TURNS = "columns: name `messages`, which hold all turns, or `prompt`"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"inference.claims": ["student_kd", "student_ceiling"]}, "'student_kd' must be one, and all"),
        ({"inference.claims": ["student_ce"]}, "inference.claims"),
        ({"quantization.edge": None}, "inference.claims"),
        ({"quantization.edge": None, "inference.claims": ["student_kd"], "inference.server": SERVER}, "null; set it"),
        ({"evaluation.headline_source": "medqaa"}, "headline_source"),
        ({"inference.questions": RAW["inference"]["questions"] | {"letter": {"medqaa": 4}}}, "medqaa"),
        ({"evaluation.headline_source": "medmcqa"}, "'medmcqa' must be in inference.questions.option_text"),
        ({"evaluation.headline_source": "records"}, "'records' must be in inference.questions.option_text"),
        ({"inference.questions.option_text": {"icd_chapter": 0}}, "with a number above 0"),
        ({"inference.questions.option_text": {"icd_chapter": 17}}, "is 17, but data.datasets.icd_chapter.test is 16"),
        ({"inference.shuffle.questions": {}}, "inference.shuffle.questions"),
        ({"inference.shuffle.questions": {"records": 2}}, "a record has no options, leave out ['records']"),
        ({"data.datasets.records_b.valid": 0}, "data.datasets.records_b.valid: the adapter needs rows"),
        ({f"data.datasets.{name}.labelled": 0 for name in ("icd_chapter", "records")}, "no row of 'labelled'"),
        ({"inference.bench.long_new_tokens": 3}, "long_new_tokens is 3, below new_tokens"),
        ({"seed": 2**32}, "less than 4294967296"), ({"lora.adapter.target_modules": []}, "at least 1 item"),
        ({"evaluation.margins": {"edge_smal": 0.05}}, "evaluation.margins.edge_smal"),
        ({"data.datasets": {"a/b": RAW["data"]["datasets"]["icd_chapter"]}}, "data.datasets.a/b"),
        ({"evaluation.confidence": 1.0}, "evaluation.confidence"), ({"inference.safety_probes": 0}, "safety_probes"),
        ({"distillation.hidden_weight": 0.5}, "hidden_layers"), ({**HIDDEN, LAYERS: [[2, 3, 4]]}, "hidden_layers"),
        ({"distillation.alignment": "spans"}, "distillation.alignment: 'spans' is for two tokenizers"),
        # a table, and instruction samples, that could not be read
        ({ORIGIN: TABLE | {"answer_is": "index"}}, "answer_is"), ({ORIGIN: TABLE | {"pool": "valid"}}, "pool"),
        ({ORIGIN: TABLE | {"columns": COLUMNS | {"question": ""}}}, "columns.question"),
        ({ORIGIN: TABLE | {"columns": COLUMNS | {"options": ["opa"]}}}, "columns.options"),
        ({ORIGIN: TABLE | {"columns": COLUMNS | {"answer": ""}}}, "columns.answer: only a table of pool 'transfer'"),
        *(({ORIGIN: CHATS | {"columns": names}}, NO_TURNS) for names in
          ({}, {"messages": "m", "prompt": "q"}, {"messages": "m", "response": "a"})),
        ({ORIGIN: CHATS | {"columns": {"prompt": "q"}}}, "columns.response: only pool 'transfer' may be without"),
        ({ORIGIN: CHATS | {"columns": {"prompt": ["q"], "response": "a"}}}, "columns.prompt"),
    ],
)  # fmt: skip
def test_what_a_notebook_could_not_do_is_refused(overrides, sentence):
    assert sentence in refusal(SMOKE, overrides)


def test_every_optional_part_can_be_left_out():
    datasets = {name: value for name, value in RAW["data"]["datasets"].items() if not name.startswith("records")}
    questions = {"option_text": {"icd_chapter": 16}}
    less = {"data.datasets": datasets, "data.open_questions": None, "data.dialogues": None, "quantization.edge": None}
    less |= {"quantization.edge_small": None, "inference.claims": ["student_kd"], "inference.exams": {}}
    assert load_params(SMOKE, HIDDEN).distillation.hidden_layers == [[2, 3]]
    made = list_variants(load_params(SMOKE, less | {"inference.questions": questions, "distillation.students": []}))
    assert {name for name in made if name.startswith(("student", "edge"))} == {"student_ce", "student_kd"}


TERMS = {"divergence": ("jsd", "'forward_kl'"), "temperature": (2.0, "1.0")}
TERMS |= dict.fromkeys(("hidden_weight", "entity_weight"), (0.5, "0.0"))


@pytest.mark.parametrize("key", TERMS)
def test_two_tokenizers_allow_the_forward_kl_alone(key):
    cross, (value, needed) = ROOT / "params" / "cross.yaml", TERMS[key]
    more = {f"distillation.{key}": value, LAYERS: [[1, 1]]}
    assert f"{key}: with alignment 'spans' it must be {needed}" in refusal(cross, more)
    assert load_params(cross, {**more, "distillation.alignment": "tokens"})


def test_what_has_no_answers_is_for_transfer_and_a_table_is_no_model():
    table = {**TABLE, "columns": {**COLUMNS, "answer": ""}, "pool": "transfer"}
    origin = load_params(SMOKE, {ORIGIN: table}).data.datasets["mmlu"].origin
    assert (origin.pool, origin.path) == ("transfer", str(SMOKE.parent / "mine.jsonl"))
    prompts = {ORIGIN: CHATS | {"columns": {"prompt": "q"}, "pool": "transfer"}, "inference.exams": {}}
    assert load_params(SMOKE, prompts).data.datasets["mmlu"].origin.columns.prompt == "q"
    for key in ("models.teacher.source", "data.open_questions"):
        message = refusal(SMOKE, {key: TABLE})
        assert key in message and "table" in message


def test_instructions_are_scored_by_perplexity_and_by_nothing_else():
    chats, asked = {ORIGIN: CHATS, "inference.exams": {}}, RAW["inference"]["questions"]
    assert load_params(SMOKE, chats | {"inference.questions": asked | {"perplexity": {"mmlu": 4}}})
    alone = "instructions, and only they, belong into questions.perplexity"
    for key in ("inference.exams", "inference.shuffle.questions"):
        assert f"{key}.mmlu: {alone}" in refusal(SMOKE, chats | {key: {"mmlu": 2}})
    for scoring, name in (("option_text", "mmlu"), ("generated", "mmlu"), ("perplexity", "icd_chapter")):
        wrong = asked | {scoring: asked.get(scoring, {}) | {name: 2}}
        assert f"inference.questions.{scoring}.{name}: {alone}" in refusal(
            SMOKE, chats | {"inference.questions": wrong}
        )
    none = {f"data.datasets.{name}.valid": 0 for name in RAW["data"]["datasets"] if name != "records_b"}
    assert "no row of 'valid'" in refusal(SMOKE, chats | none | {"data.datasets.mmlu.valid": 4})


def test_override_changes_that_key_and_no_other():
    raw = copy.deepcopy(RAW)
    raw["lora"]["adapter"]["rank"] = 5
    assert load_params(SMOKE, {"lora.adapter.rank": 5}) == Params.model_validate(raw)


UNKNOWN = {"lora.adapter.rnak": "did you mean 'rank'", "data.datasets.med_mcqa.test": "did you mean 'medmcqa'"}
UNKNOWN |= dict.fromkeys(("zzz", "lora.adapter.rank.zzz", ""), "no such parameter")


@pytest.mark.parametrize(("dotted", "said"), UNKNOWN.items(), ids=list(UNKNOWN))
def test_unknown_override_is_refused_and_a_near_miss_is_told_the_right_key(dotted, said):
    message = refusal(SMOKE, {dotted: 1})
    assert repr(dotted) in message and said in message


def test_missing_file_lists_its_neighbours(tmp_path):
    assert "smoke.yaml" in refusal(ROOT / "params" / "smok.yaml")
    assert "none" in refusal(tmp_path / "there.yaml")
    assert "none" in refusal(tmp_path / "no" / "folder" / "there.yaml")


def test_digest_sees_order_in_lists_and_type_but_not_the_order_of_keys():
    """Caches and manifests hold it: a change of the function reruns every run there is."""
    assert digest({"a": None, "b": [1, "µ"]}) == digest({"b": [1, "µ"], "a": None}) == "10889a9b1056084d"
    assert len({digest([1, 2]), digest([2, 1]), digest(["1", 2])}) == 3


def test_a_key_written_twice_is_named(tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text(SMOKE.read_text().replace("seed: 0", "seed: 0\nseed: 1"))
    with pytest.raises(ParamsError, match="'seed' stands twice"):
        load_params(path)
