"""The README's commands are run: what it tells a newcomer to type works as it is written."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from curation.cli.main import root
from curation.settings import DownloadSettings, ObserveSettings, Settings, TeacherSettings

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split(" #")[0].strip() for line in TEXT.splitlines() if line.startswith("    ")]
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_make_target_exists():
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z][a-z-]*)", TEXT + checks))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"test", "curate", "setup", "help", "demo", "check", "stop"} <= targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_every_linked_page_exists():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_commands_and_snippets_work_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clips: Path, seer: Path, tolerant: Path
):
    """Each `curation` line, with a trained detector's name, the policy's and the manifest's rows replaced by ours."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clips, tmp_path / "examples")
    (tmp_path / "my.csv").write_text("platform,video_id,start_s,end_s\nlocal,examples/bars.mp4,,\n")
    (tmp_path / "CASES.csv").write_text("file,expected,first_reason\nexamples/bars.mp4,accept,\n")
    extra = {
        "run": ["--detector", str(seer), "--policy", str(tolerant), "--local-root", str(tmp_path)],
        "status": ["--policy", str(tolerant)],
        "evaluate": ["--policy", str(tolerant)],
    }
    lines = [line for line in COMMANDS if line.startswith("curation ")]
    assert {line.split()[1] for line in lines} == {
        "check-manifest", "run", "status", "failures", "inspect", "judge", "evaluate",
    }  # fmt: skip
    for line in lines:
        words = shlex.split(line.replace("WEIGHTS", str(seer)))[1:]
        if "CLIP_ID" in words:
            words[words.index("CLIP_ID")] = next((tmp_path / "data" / "observations").rglob("*.parquet")).stem
        result = CliRunner().invoke(root, [*words, *extra.get(words[0], [])], catch_exceptions=False)
        assert result.exit_code == 0, (line, result.output)
    assert (tmp_path / "results.json").is_file()
    (folder,) = (tmp_path / "data" / "shards").iterdir()
    (reading,) = [code for code in PYTHON if "ShardReader" in code]
    values: dict = {}
    exec(re.sub(r"data/shards/[\w.-]+", str(folder), reading), values)
    assert values["window"].rgb.shape[0] == 5
    (running,) = [code for code in PYTHON if "pipeline.run" in code]
    settings = Settings(
        out=tmp_path / "data",
        policy=tolerant,
        download=DownloadSettings(local_root=tmp_path),
        observe=ObserveSettings(detector=str(seer)),
        teacher=TeacherSettings(kind="none"),
    )
    exec(running.replace('Settings(out=Path("data"))', "settings"), {"settings": settings})
    for code in PYTHON:
        compile(code, "README.md", "exec")
