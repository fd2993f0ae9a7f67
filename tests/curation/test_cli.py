"""The command line: mistakes are one sentence and exit code 2; the README's test runs the commands themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from curation.cli import main, teacher_settings


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
        (["run", "nowhere.csv", "--out", "x", "--num-tokens", "0"], "num_tokens"),
    ],
)
def test_a_mistake_is_one_sentence(curation, tmp_path: Path, words: list[str], said: str):
    code, printed = curation(*(tmp_path / word if word == "nowhere" else word for word in words))
    assert code == 2
    assert said in printed and "Traceback" not in printed


def test_every_bad_row_is_named(curation, manifest: Path):
    code, printed = curation("check-manifest", manifest)
    assert code == 2
    assert all(said in printed for said in ("row 2", "video_id", "row 3", "end_s"))


def test_help_is_quick():
    """Nothing heavy is imported to say what the commands are."""
    code = "import sys, curation.cli; sys.exit(any(name in sys.modules for name in ('torch', 'ultralytics', 'av')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_word_means_a_teacher(tmp_path: Path):
    assert teacher_settings("none", None, 777, "cpu").kind == "none"
    folder = teacher_settings(str(tmp_path), "megasam", 777, "cpu")
    assert (folder.kind, folder.name) == ("folder", "megasam")
    (tmp_path / "model.pt").touch()
    assert teacher_settings(str(tmp_path), None, 777, "cpu").kind == "moge"
    assert teacher_settings("Ruicheng/moge-2-vitl-normal", None, 777, "cpu").num_tokens == 777
