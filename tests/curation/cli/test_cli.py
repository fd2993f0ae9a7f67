"""The command line: mistakes are one sentence and exit code 2; the README's test runs the commands themselves."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from curation.catalog import Catalog, Funnel, Output
from curation.cli import main
from curation.cli.curate import teacher_values
from curation.cli.main import COMMANDS, root
from curation.failures import FailureCode, OutageError
from curation.pipeline import postponed
from curation.records import ClipRef


@pytest.fixture
def curation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command in this process; gives its exit code and all it printed."""

    def run(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["curation", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "m.csv"
    path.write_text("platform,video_id,start_s,end_s\nyoutube,--exec=reboot,1,2\nyoutube,aaaaaaaaaaa,5,2\n")
    return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "--out", "nowhere"], "no catalog"),
        (["judge", "--out", "nowhere"], "no catalog"),
        (["failures", "--out", "nowhere", "--code", "bored"], "no failure code"),
        (["check-manifest", "nowhere.csv"], "nowhere.csv"),
        (["evaluate", "--cases", "nowhere.csv", "--policy", "paper"], "nowhere.csv"),
        (["run", "nowhere.csv", "--out", "x", "--retry", "boredom"], "no failure code"),
        (["run", "nowhere.csv", "--out", "x", "--num-tokens", "0"], "--num-tokens: Input"),
        (["status", "--out", "a-folder"], "no catalog"),
        (["check-manifest", "folder.csv"], "folder.csv is a folder"),
        (["check-manifest", "empty.csv"], "empty.csv lists no clips"),
        (["check-manifest", "empty.jsonl"], "empty.jsonl lists no clips"),
        (["check-manifest", "tabs.csv"], "put commas between the fields"),
        (["check-manifest", "tabs.tsv"], "end it in .csv"),
        (["check-manifest", "a" * 300 + ".csv"], "There is no file"),
        (["status", "--out", "a-run", "--policy", "folder.csv"], "it is a folder"),
        (["judge", "--out", "a-run", "--policy", "nobody"], "nobody cannot be read: there is no such file"),
        (["inspect", "--out", "a-run", "../x"], "is not a clip id"),
        (["evaluate", "--cases", "folder.csv"], "folder.csv cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(curation, monkeypatch, tmp_path: Path, words: list[str], said: str):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "a-folder" / "catalog.sqlite").mkdir(parents=True)
    (tmp_path / "a-run").mkdir()
    Catalog(f"sqlite:///{tmp_path}/a-run/catalog.sqlite")
    (tmp_path / "empty.csv").write_text("platform,video_id\n")
    (tmp_path / "empty.jsonl").touch()
    for name in ("tabs.csv", "tabs.tsv"):
        (tmp_path / name).write_text("platform\tvideo_id\nyoutube\tabcdefghijk\n")
    monkeypatch.chdir(tmp_path)
    code, printed = curation(*words)
    assert code == 2
    assert said in printed and "Traceback" not in printed


def test_every_bad_row_is_named(curation, manifest: Path):
    code, printed = curation("check-manifest", manifest)
    assert code == 2
    assert all(said in printed for said in ("row 2", "video_id", "row 3", "end_s"))


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(f"sqlite:///{tmp_path}/catalog.sqlite")


def test_status_tells_data_sets_apart(curation, catalog: Catalog, tmp_path: Path):
    refs = [ClipRef("vimeo", "1"), ClipRef("vimeo", "2")]
    catalog.register(refs)
    hashes = [catalog.put_provenance({"policy": {"name": "mine"}, "teacher": {"name": name}}) for name in ("a", "b")]
    for digest, clips in zip(hashes, (refs, refs[:1]), strict=True):
        catalog.record_outputs(Output(ref.clip_id, digest, 9) for ref in clips)
    _, printed = curation("status", "--out", tmp_path)
    for name, digest, clips in zip("ab", hashes, (2, 1), strict=True):
        assert re.search(rf"in shards of mine-{name}-{digest[:8]} .* {clips} .* {clips / 2:.1%}", printed)


def test_status_counts_work_in_hand(curation, catalog: Catalog, tmp_path: Path):
    assert "in work" not in curation("status", "--out", tmp_path)[1]
    catalog.claim(["b1", "b2"], "first", 60)
    catalog.claim(["b3", "index:0123"], "second", 60)
    catalog.claim(["b4"], "dead", 0)
    assert "3 batches in work by 2 workers" in curation("status", "--out", tmp_path)[1]
    catalog.release("first")
    assert "1 batch in work by 1 worker\n" in curation("status", "--out", tmp_path)[1]


@pytest.mark.parametrize("command", ["status", "failures"])
def test_open_breakers_are_told(curation, catalog: Catalog, tmp_path: Path, command: str):
    assert "limiting requests" not in curation(command, "--out", tmp_path)[1]
    vimeo = catalog.block("vimeo", "default", FailureCode.BOT_CHECK, 3600)
    catalog.block("http-0123456789ab", "default", FailureCode.RATE_LIMITED, 60)
    latest = catalog.block("http-ba9876543210", "default", FailureCode.RATE_LIMITED, 7200)
    code, printed = curation(command, "--out", tmp_path)
    assert code == 0
    assert f"bot_check: {postponed('vimeo', vimeo - time.time())}" in printed
    assert f"rate_limited: {postponed('http', latest - time.time())}" in printed
    assert printed.count("limiting requests") == 2 and "0123456789ab" not in printed


def test_the_list_of_commands_says_what_each_command_says():
    group = typer.main.get_command(root)
    with typer.Context(group) as context:
        told = {name: group.get_command(context, name).get_short_help_str(100) for name in COMMANDS}
    assert {name: said.rstrip(".") for name, said in told.items()} == {k: v.rstrip(".") for k, v in COMMANDS.items()}
    assert set(group.commands) == set(COMMANDS)


@pytest.mark.parametrize("module", ["curation.cli", "curation.pipeline"])
def test_the_start_is_quick(module: str):
    """Nothing heavy is imported to say what the commands are, or before a stage needs it."""
    heavy = ["torch", "torchvision", "ultralytics", "av", "yt_dlp", "scenedetect", "prefect", "decord", "moge"]
    heavy += ["pydantic"] if module == "curation.cli" else []  # the list of commands needs no settings
    code = f"import sys, {module}; sys.exit(', '.join(name for name in {heavy} if name in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_word_means_a_teacher(tmp_path: Path):
    assert teacher_values("none", None) == {"teacher": "none"}
    folder = teacher_values(str(tmp_path), "megasam")
    assert folder == {"teacher": "folder", "teacher_model": str(tmp_path), "teacher_name": "megasam"}
    (tmp_path / "model.pt").touch()
    assert teacher_values(str(tmp_path), None)["teacher"] == "moge"
    assert teacher_values("Ruicheng/moge-2-vitl-normal", None)["teacher"] == "moge"


def test_what_fails_by_no_mistake_of_the_user_ends_with_1(curation, catalog: Catalog, tmp_path: Path, monkeypatch):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "index.parquet").write_bytes(b"cut")
    code, printed = curation("verify", shards)
    assert code == 1 and "index.parquet" in printed and "Traceback" not in printed
    assert curation("verify", tmp_path / "nowhere")[0] == 2

    def away(*_: object) -> None:  # a database that is really away is in test_outages.py; here it would take minutes
        raise OutageError("The catalog's database does not answer.")

    monkeypatch.setattr(Catalog, "funnel", away)
    assert curation("status", "--out", tmp_path) == (1, "error: The catalog's database does not answer.\n")


def test_a_run_that_measures_nothing_fails(curation, tmp_path: Path, monkeypatch):
    (tmp_path / "m.csv").write_text("platform,video_id\nlocal,a.mp4\n")
    funnel = Funnel(1, 0, 0, 0, 0, 0, 0, {("download", "corrupt"): 1}, {}, {}, {})
    monkeypatch.setattr("curation.pipeline.run", lambda *_: funnel)
    code, printed = curation("run", tmp_path / "m.csv", "--out", tmp_path)
    assert code == 1 and "No clip could be measured" in printed


def test_ctrl_c_ends_with_130(tmp_path: Path):
    os.mkfifo(tmp_path / "cases.csv")  # labels that never come
    command = [sys.executable, "-m", "curation.cli", "evaluate", "--cases", str(tmp_path / "cases.csv")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        with (tmp_path / "cases.csv").open("w"):  # returns when the command has opened it
            while process.poll() is None:  # a signal just before it reads would not be noticed
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
        said = process.stderr.read()
    assert process.returncode == 130
    assert "stopped" in said and "Traceback" not in said
