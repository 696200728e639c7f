"""A stage is done iff its manifest and every file it lists are whole; a write happens whole or not at all."""

import errno
import os
import re

import pandas as pd
import pytest

from medkit import stage as module
from medkit.stage import FINGERPRINT, MANIFEST, Stage, StageError, atomic_path, run_dir, write_errors

pytestmark = pytest.mark.usefixtures("outputs")
TABLE = pd.DataFrame({"id": ["a", "b"], "options": [["x", "y"], ["z"]], "answer": [1, 0]})


def committed(name: str = "01_data", **files: str) -> Stage:
    stage = Stage("r", name)
    for filename, text in (files or {"a": "one", "b": "two"}).items():
        stage.path(filename).write_text(text)
    stage.commit()
    return stage


@pytest.mark.parametrize("name", ["../evil", "", ".hidden", "a\n"])
def test_run_name_with_a_path_in_it_is_refused(name, outputs):
    for use in (run_dir, lambda n: Stage(n, "01_data")):
        with pytest.raises(StageError, match="run name") as error:
            use(name)
        assert repr(name) in str(error.value)
    assert not outputs.exists()


def test_commit_lists_every_file_with_its_size():
    stage = Stage("r", "01_data")
    stage.write_table("t.parquet", TABLE)
    stage.write_json("card.json", {"α": [1, None]})
    stage.path("figures/deep/a.svg").write_text("<svg/>")
    assert not stage.is_whole()
    manifest = stage.commit(questions=2)
    assert set(manifest["files"]) == {"t.parquet", "card.json", "figures/deep/a.svg"}
    assert all((stage.dir / f).stat().st_size == size for f, size in manifest["files"].items())
    assert manifest == stage.manifest()
    assert manifest["facts"] == {"questions": 2}
    assert stage.is_whole() and stage.changed_files() == []
    assert not list(stage.dir.rglob("*.part"))
    (stage.dir / "figures" / "deep" / "a.svg").write_text("<SVG/>")  # as long as before
    (stage.dir / "card.json").unlink()
    assert stage.changed_files() == ["card.json", "figures/deep/a.svg"]
    del manifest["sha256"]  # as of a run made before digests were written: nothing is known to be as it was
    stage.write_json(MANIFEST, manifest)
    assert set(stage.changed_files()) == set(manifest["files"])


def test_manifest_says_where_and_with_what(monkeypatch):
    monkeypatch.setitem(module.FETCHED, "owner/model@main", "0" * 40)
    manifest = committed().manifest()
    assert set(manifest["versions"]) >= {"torch", "transformers", "numpy"}
    assert manifest["disclaimer"] == module.DISCLAIMER
    assert manifest["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", manifest["git_commit"])
    assert manifest["device"] and manifest["duration_s"] >= 0
    assert manifest["sources"]["owner/model@main"] == "0" * 40
    assert manifest["fingerprint"] is None, "run by hand"
    monkeypatch.setenv(FINGERPRINT, "abc")
    monkeypatch.setenv("PATH", "")  # a machine without git
    again = committed().manifest()
    assert (again["fingerprint"], again["git_commit"]) == ("abc", None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "a").unlink(),
        lambda d: (d / "a").write_text("on"),
        lambda d: ((d / "a").unlink(), (d / "a").mkdir()),
        lambda d: (d / MANIFEST).write_text((d / MANIFEST).read_text()[:40]),
        lambda d: (d / MANIFEST).write_text("null"),
        lambda d: (d / MANIFEST).write_bytes(b"\xff\xfe\xfa"),
    ],
    ids=["deleted", "shorter", "now a folder", "cut manifest", "null manifest", "manifest of other bytes"],
)
def test_damage_is_seen(damage):
    stage = committed()
    damage(stage.dir)
    assert not stage.is_whole()
    assert not Stage("r", "01_data").is_whole()


def test_files_outside_the_folder_count_too():
    stage, results = committed(), run_dir("r") / "results.json"
    results.write_text("{}")
    stage.commit(also=[results])
    assert stage.is_whole()
    for change in (lambda: results.write_text("{} "), results.unlink):
        change()
        assert not stage.is_whole()


def test_a_run_may_end_in_part():
    stage = Stage("exp.part", "01_data")
    stage.write_json("a.json", 1)
    assert list(stage.commit()["files"]) == ["a.json"]


def test_scratch_of_a_killed_write_is_not_listed():
    stage = Stage("r", "02_distillation")
    stage.path("a.json.123.part").write_text("half")
    stage.path("student.123.part/model.safetensors").write_text("half")
    stage.path("student/model.safetensors").write_text("whole")
    assert set(stage.commit()["files"]) == {"student/model.safetensors"}


def test_require_gives_files_and_folders_of_a_complete_stage():
    upstream = committed("02_distillation", **{"student/model": "w", "student/config": "c", "signals": "s"})
    reader = Stage("r", "03_lora")
    for name in ("student/model", "student", "signals"):
        assert reader.require("02_distillation", name) == upstream.dir / name
    for name in ("student/mode", "../r/02_distillation/signals", ""):
        with pytest.raises(StageError, match="run notebook 02_distillation first"):
            reader.require("02_distillation", name)
    (upstream.dir / "student" / "model").unlink()
    for name in ("student/model", "student"):
        with pytest.raises(StageError, match="02_distillation"):
            reader.require("02_distillation", name)


def test_a_missing_stage_names_the_first_notebook_to_run_in_one_sentence():
    reader = Stage("r", "06_evaluation")
    for first in ("01_data", "02_distillation"):
        with pytest.raises(StageError, match=f"run notebook {first} first") as error:
            reader.require("04_quantization", "ledger.parquet")
        assert error.value._render_traceback_() == [f"StageError: {error.value}"]  # all that a notebook shows
        committed(first)


def test_a_block_that_writes_nothing_or_where_it_cannot_is_an_error_and_loses_nothing(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(StageError), atomic_path(tmp_path / "file"):
        pass
    with pytest.raises(StageError, match=r"file/t.*File exists"), atomic_path(tmp_path / "file" / "t") as scratch:
        scratch.write_text("x")
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/weights"), OSError("a library's own words")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_block_is_not_reported_as_a_failed_write(tmp_path, error):
    with pytest.raises(type(error)) as raised, atomic_path(tmp_path / "a"):
        raise error
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


CURES = {errno.ENOSPC: "free space", errno.EACCES: "permissions", errno.EROFS: "MEDKIT_OUTPUTS", errno.EIO: "correct"}


@pytest.mark.parametrize(("number", "cure"), CURES.items())
def test_a_failed_write_has_the_cure_of_its_reason(tmp_path, number, cure):
    with pytest.raises(StageError, match=cure), atomic_path(tmp_path / "a") as scratch:
        raise OSError(number, os.strerror(number), str(scratch / "model.safetensors"))


def test_a_write_that_failed_in_torch_is_one_sentence_though_the_disk_has_space_again(tmp_path):
    """Seen where another program had filled the disk for a moment: torch drops the system's error number."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 7360 vs 7252")
    sentence = r"could not be written.*full for a moment: run the same command"
    with pytest.raises(StageError, match=sentence), write_errors(tmp_path / "checkpoints", tmp_path / "checkpoints"):
        raise error
    with pytest.raises(RuntimeError, match="reading"), write_errors(tmp_path / "a", tmp_path):
        raise RuntimeError("PytorchStreamReader failed reading zip archive")
