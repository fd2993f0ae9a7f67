"""Real videos, made by ffmpeg when a test first asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from comparison import versions
from generated import KINDS, by_family, summary
from numbered import Shown, shown_by_ffmpeg
from videos import VIDEOS


@dataclass(frozen=True)
class Video:
    """A file, the numbers of the frames it was made to show, and what ffmpeg shows of it."""

    path: Path
    numbers: list[int]
    shown: Shown


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Video]:
    """A video of VIDEOS by name, made once."""
    folder = tmp_path_factory.mktemp("videos")
    made: dict[str, Video] = {}

    def get(name: str) -> Video:
        if name not in made:
            path = folder / Path(name).stem / name
            path.parent.mkdir(exist_ok=True)
            numbers = VIDEOS[name](path)
            made[name] = Video(path, numbers, shown_by_ffmpeg(path))
        return made[name]

    return get


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What became of the generated files, by kind, where many were made; and with which libraries."""
    reports = [report for state in ("passed", "failed") for report in terminalreporter.getreports(state)]
    results = [value for report in reports for name, value in report.user_properties if name == "generated"]
    if results:
        terminalreporter.section("generated files")
        terminalreporter.line(", ".join(f"{name} {version}" for name, version in versions().items()))
    if len(results) > len(KINDS):
        for name, found in by_family(sorted(results, key=lambda result: result["number"])).items():
            terminalreporter.line(f"{name}: {summary(found)}")
