"""A run is begun on one machine and finished on another one: what travels, and what is refused. No kernel starts."""

import json
from collections import Counter
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer
from toys import contents

from medkit import preflight, reporting, runner
from medkit.run_store import StoreError
from medkit.runner import run_all
from medkit.stage import FINGERPRINT, MANIFEST, ROOT, STAGES, Stage, run_dir, write_text

BESIDE = "04_quantization/edge/student.tasks.json"
SMOKE = ROOT / "params" / "smoke.yaml"
OF_RUN = ["params.yaml", *(f"notebooks/{name}.ipynb" for name in STAGES)]


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """A client of a bucket `lab` that counts what is written; the environment has a key for it, as a user's has."""
    names = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1", "ENDPOINT_URL": server}
    for name, value in (names | {"MAX_ATTEMPTS": "1", "EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="lab")
    client.put_bucket_versioning(Bucket="lab", VersioningConfiguration={"Status": "Enabled"})
    yield client
    versions = client.list_object_versions(Bucket="lab")
    for version in [*versions.get("Versions", []), *versions.get("DeleteMarkers", [])]:
        client.delete_object(Bucket="lab", Key=version["Key"], VersionId=version["VersionId"])
    client.delete_bucket(Bucket="lab")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine("a") moves to that machine's outputs; there is one store for all."""
    monkeypatch.setenv("MEDKIT_STORE", "s3://lab/runs")

    def move(name: str) -> None:
        monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path / name))

    move("a")
    return move


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Stages write two files, and the last one results of the run and a file beside another stage's; what was made."""
    names: list[str] = []

    def execute(notebook: Path, executed: Path, stage: Stage, fingerprint: str, parameters: dict) -> None:
        names.append(stage.name)
        if stage.name == "04_quantization":
            (run_dir(stage.run) / BESIDE).unlink(missing_ok=True)  # as `export_gguf` does
        write_text(executed, f"executed {stage.name}")
        write_text(stage.path("a.txt"), f"a of {stage.name}")
        write_text(stage.path("deep/b.txt"), f"b of {fingerprint}")
        monkeypatch.setenv(FINGERPRINT, fingerprint)
        also = ["results.json", BESIDE] if stage.name == STAGES[-1] else []
        stage.commit([write_text(run_dir(stage.run) / name, fingerprint) for name in also])

    monkeypatch.setattr(runner, "_execute", execute)
    monkeypatch.setattr(runner, "fingerprints", lambda params: {name: f"{name} {params.seed}" for name in STAGES})
    return names


def deny(client, action: str, key: str) -> None:
    statement = {"Effect": "Deny", "Principal": "*", "Action": f"s3:{action}", "Resource": f"arn:aws:s3:::lab/{key}"}
    client.put_bucket_policy(Bucket="lab", Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))


def keys(client) -> set[str]:
    """What is in the store, below runs/r/."""
    return {o["Key"].removeprefix("runs/r/") for o in client.list_objects_v2(Bucket="lab").get("Contents", [])}


@pytest.fixture
def start(command, monkeypatch):
    """start(): exit code and errors of `python -m medkit run`."""
    monkeypatch.setattr(preflight, "check_profile", lambda params: [])
    monkeypatch.setattr(reporting, "write_report", lambda folder: write_text(folder / "report.html", "report"))
    return lambda: command("run", "--params", str(SMOKE), "--run", "r")[::2]


@pytest.mark.parametrize("url", ["s3://lab/runs", "memory://runs", "{}/shared", "file://{}/shared/"])
def test_a_run_goes_on_on_another_machine(s3, machine, made, monkeypatch, tmp_path, url):
    fsspec.get_filesystem_class("memory").store.clear()
    monkeypatch.setenv("MEDKIT_STORE", url.format(tmp_path))
    run_all(SMOKE, "r", last="03_lora")
    machine("b")
    assert run_all(SMOKE, "r") == STAGES[3:]
    whole = contents(run_dir("r"))
    assert {f"{name}/{MANIFEST}" for name in STAGES} | {*OF_RUN, "results.json", BESIDE} < set(whole)
    machine("a")
    assert run_all(SMOKE, "r") == [] and contents(run_dir("r")) == whole
    assert made == STAGES
    assert not any(Stage("r", name).changed_files() for name in STAGES)


def test_only_what_differs_travels_and_a_stage_that_does_not_fit_is_not_fetched(s3, machine, made, tmp_path):
    run_all(SMOKE, "r")
    machine("b")
    run_all(SMOKE, "r", last="04_quantization")
    sent = Counter(v["Key"].removeprefix("runs/r/") for v in s3.list_object_versions(Bucket="lab")["Versions"])
    manifests = {f"{name}/{MANIFEST}" for name in STAGES}
    files = {f"{name}/{file}" for name in STAGES for file in ("a.txt", "deep/b.txt")}
    assert set(sent) == keys(s3) == manifests | files | {*OF_RUN, MANIFEST, "results.json", BESIDE}
    assert {name for name, n in sent.items() if n > 1} == {MANIFEST}  # that of the run: a notebook more each time
    assert run_all(SMOKE, "r", {"seed": 5}, last="02_distillation") == STAGES[:2]
    again = Counter(v["Key"].removeprefix("runs/r/") for v in s3.list_object_versions(Bucket="lab")["Versions"])
    of_stages = {f"{name}/{file}" for name in STAGES[:2] for file in ("deep/b.txt", MANIFEST)}
    assert {name for name in again if again[name] > sent[name]} == of_stages | {MANIFEST, "params.yaml"}
    machine("a")
    assert run_all(SMOKE, "r", {"seed": 5}) == STAGES[2:]
    machine("b")  # stages 3 and 4 that lie here have other settings: they are not sent over those that are there
    run_all(SMOKE, "r", {"seed": 5}, last="02_distillation")
    machine("c")
    assert run_all(SMOKE, "r", {"seed": 5}) == []


@pytest.mark.parametrize("damage", ["other bytes", "lost"])
@pytest.mark.parametrize("path", ["02_distillation/deep/b.txt", "notebooks/02_distillation.ipynb"])
def test_a_damaged_file_is_refused_until_it_is_sent_again(s3, machine, made, path, damage):
    run_all(SMOKE, "r", last="02_distillation")
    if damage == "lost":
        s3.delete_object(Bucket="lab", Key=f"runs/r/{path}")
    else:
        s3.put_object(Bucket="lab", Key=f"runs/r/{path}", Body=b"c of 02_distillation 0")
    machine("b")
    listed_in = "02_distillation/manifest.json" if path.startswith("02") else MANIFEST
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"/runs/r/{path}: lost or damaged.* remove s3://lab/runs/r/{listed_in}"):
            run_all(SMOKE, "r")
    states = [*runner.status(runner.load_params(SMOKE), "r").values()]
    assert states[:2] == ["done", "missing"] and not (run_dir("r") / path).exists()
    s3.delete_object(Bucket="lab", Key=f"runs/r/{listed_in}")
    machine("a")
    assert run_all(SMOKE, "r", last="02_distillation") == []
    machine("b")
    assert run_all(SMOKE, "r", last="02_distillation") == [] and made == STAGES[:2]


ESCAPING = ["../../x", "/tmp/x", "../.lock", "../params.yaml", "..", "", "../03_lora", "a/../../../x"]


@pytest.mark.parametrize("name", ESCAPING)
def test_a_name_that_leads_out_of_the_stages_is_refused_and_nothing_is_written(s3, machine, made, tmp_path, name):
    run_all(SMOKE, "r", last="01_data")
    manifest = Stage("r", "01_data").manifest()
    for key in ("files", "sha256"):
        manifest[key] |= {name: manifest[key]["a.txt"]}
    s3.put_object(Bucket="lab", Key=f"runs/r/01_data/{MANIFEST}", Body=json.dumps(manifest))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    machine("b")
    with pytest.raises(StoreError, match=r"s3://lab/runs/r/01_data/manifest.json: .* lies in no stage's folder"):
        run_all(SMOKE, "r")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in set(after) - set(before)} == {".lock", "params.yaml"}
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("text", ["", "[]", '{"fingerprint": "01_data 0"}', '{"files": [], "sha256": 7}'])
def test_a_manifest_that_cannot_be_understood_is_none(s3, machine, made, text):
    run_all(SMOKE, "r", last="01_data")
    s3.put_object(Bucket="lab", Key=f"runs/r/01_data/{MANIFEST}", Body=text.encode())
    machine("b")
    assert run_all(SMOKE, "r", last="01_data") == ["01_data"]
    stored = s3.get_object(Bucket="lab", Key=f"runs/r/01_data/{MANIFEST}")["Body"].read()
    assert json.loads(stored) == Stage("r", "01_data").manifest()


def test_an_upload_that_fails_in_the_middle_leaves_no_manifest_there_and_the_stages_whole_here(
    s3, machine, made, start
):
    run_all(SMOKE, "r", {"seed": 5})
    deny(s3, "PutObject", "runs/r/02_distillation/deep/*")
    code, err = start()
    assert code == 1 and made == [*STAGES, *STAGES]  # the run went on
    assert "you must be allowed to" in err.splitlines()[-1]
    assert f"01_data/{MANIFEST}" in keys(s3) and f"02_distillation/{MANIFEST}" not in keys(s3)
    assert [*runner.status(runner.load_params(SMOKE), "r").values()] == ["done"] * 6
    machine("b")
    assert run_all(SMOKE, "r", last="01_data") == []  # a reader gets what is whole
    s3.delete_bucket_policy(Bucket="lab")
    machine("a")
    assert start()[0] == 0
    machine("b")
    assert run_all(SMOKE, "r") == [] and made == [*STAGES, *STAGES]
    assert "report.html" in keys(s3)


UNUSABLE = [
    ("s3://nobody/runs", {}, "make the bucket"),
    ("s3://lab/runs", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials"),
    ("s3://lab/runs", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "the network"),
    ("gs://lab/runs", {}, "install"),
    ("nothing://me:secret@lab/runs", {}, "check MEDKIT_STORE"),
    ("sftp://me:se@cret@127.0.0.1:9/runs", {}, "MEDKIT_STORE=sftp://***@127.0.0.1:9/runs"),
    ("sftp://me:se/cret@127.0.0.1:9/runs", {}, "MEDKIT_STORE=sftp://***@127.0.0.1:9/runs"),
    ("nothing://lab/runs/?sig=secret", {}, "MEDKIT_STORE=nothing://lab/runs/?***"),
]


@pytest.mark.parametrize(("url", "environment", "cure"), UNUSABLE, ids=[f"{url} {cure}" for url, _, cure in UNUSABLE])
def test_an_unusable_store_is_one_sentence_before_anything_is_made(
    s3, machine, made, start, monkeypatch, url, environment, cure
):
    for name, value in ({"MEDKIT_STORE": url} | environment).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    code, err = start()
    assert code == 1 and err.startswith("medkit: ") and err.count("\n") == 1
    assert cure in err and "cret" not in err.replace("credentials", "") and made == []


def test_one_who_may_not_write_is_told_before_anything_is_made(s3, machine, made, start):
    deny(s3, "PutObject", "*")
    code, err = start()
    assert (code, err.count("\n")) == (1, 1) and "you must be allowed to" in err and made == []


def test_a_run_that_is_killed_before_its_report_has_no_old_one(s3, machine, made, start):
    start()
    assert (run_dir("r") / "report.html").is_file()
    machine("b")
    run_all(SMOKE, "r", {"seed": 5})
    write_text(run_dir("r") / "report.html", "of other settings")
    machine("a")
    run_all(SMOKE, "r", {"seed": 5})  # fetched
    assert not (run_dir("r") / "report.html").exists()
    write_text(run_dir("r") / "report.html", "of other settings")
    run_all(SMOKE, "r")  # made anew
    assert not (run_dir("r") / "report.html").exists()
