"""Fixtures for all tests: real media and weights where they are, and small real parts for whole runs.

A test that needs media, golden numbers or weights skips with a reason where they are absent. The detector made here is
a real ultralytics network whose last layer was set by hand, since no trained one may be shipped: it goes through
export, decoding, suppression and tracking like any other.
"""

from __future__ import annotations

import gc
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a process: they share the cores, and spinning threads cost much
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported

import hypothesis
import pytest
import yaml

from curation.judge.policy import find_policy
from curation.video.ffmpeg import ffmpeg_exe
from tests.support.examples import examples

ROOT = Path(__file__).parent.parent

# No test may fail because the machine is busy; and in CI a change decides, not chance, which draws other examples.
hypothesis.settings.register_profile("local", deadline=None, max_examples=examples(100))
hypothesis.settings.register_profile("ci", deadline=None, max_examples=examples(100), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


LONGEST = ("flows/", "curation/test_pipeline.py", "curation/test_last_resort.py", "curation/catalog/test_catalog.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process of pytest-xdist is left with one while the others have ended."""
    order = {f"tests/{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: next((order[name] for name in order if item.nodeid.startswith(name)), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files go to processes as a whole; the files that use the one Prefect service go together."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/flows" if nodeid.startswith("tests/flows/") else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """The million objects that imports made stay: looking through them at each collection would cost a second."""
    gc.collect()
    gc.freeze()


_slow: Counter[str] = Counter()  # file -> tests left out because they are slow


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Note which slow tests are left out."""
    _slow.update(item.nodeid.partition("::")[0] for item in items if item.get_closest_marker("slow"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the note of a worker of pytest-xdist to the process that reports; it chooses no tests itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow"] = dict(_slow)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker leaves the same tests out."""
    _slow.update(
        {file: count - _slow[file] for file, count in getattr(node, "workeroutput", {}).get("slow", {}).items()}
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out, and how it is run."""
    if _slow:
        terminalreporter.section("left out")
        files = ", ".join(f"{file} {count}" for file, count in sorted(_slow.items()))
        terminalreporter.line(f"{_slow.total()} slow tests, which take minutes (make test-slow runs them): {files}")


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of this session, for what is slow to make."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(common: Path) -> Iterator[None]:
    """Exported detectors go to a place of this session, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNISH_CACHE", str(common / "cache"))
        yield


def _shared_part(name: str, variable: str) -> Path:
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not path.exists():
        pytest.skip(f"no {name} folder: set {variable}, or put it in ../shared/{name}")
    return path


@pytest.fixture(scope="session")
def media() -> Path:
    """Folder of real clips with cases.csv."""
    return _shared_part("media", "UNISH_TEST_MEDIA")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden numbers and the deterministic weight scheme."""
    return _shared_part("golden", "UNISH_TEST_GOLDEN")


@pytest.fixture(scope="session")
def yolo11n() -> Path:
    """A real detector's weights."""
    path = _shared_part("weights", "UNISH_TEST_WEIGHTS") / "yolo11n-int8dq.pt"
    if not path.exists():
        pytest.skip("no yolo11n-int8dq.pt in the weights folder")
    return path


@pytest.fixture(scope="session")
def clips(small_clips: Path) -> Path:
    """Short clips; some folders of tests have others of their own."""
    return small_clips


@pytest.fixture(scope="session")
def small_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short clips (2 s, 12 frames a second), one cut in the middle, one broken."""
    folder = tmp_path_factory.mktemp("clips")
    sources = {"bars": "testsrc2=s=320x180", "set": "testsrc2=s=180x320", "count": "testsrc=s=256x256"}
    for name, source in sources.items():
        _ffmpeg("-f", "lavfi", "-i", f"{source}:r=12", "-t", "2", folder / f"{name}.mp4")
    _ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=s=320x180:r=12:d=1", "-f", "lavfi", "-i", "smptebars=s=320x180:r=12:d=1",
        "-filter_complex", "concat=n=2", folder / "cut.mp4",
    )  # fmt: skip
    (folder / "broken.mp4").write_bytes(b"no video at all " * 64)
    return folder


def _ffmpeg(*arguments: str | Path) -> None:
    *most, target = arguments
    encode = ["-c:v", "libx264", "-preset", "ultrafast", "-pix_fmt", "yuv420p", target]
    subprocess.run([ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error", *most, *encode], check=True)


@pytest.fixture(scope="session")
def seer(common: Path, own_cache: None) -> Path:
    """Weights of a detector that is half sure of a person at every coarse grid point; exported already."""
    from filelock import FileLock

    from curation.files import sha256_file
    from curation.people.detector import _exported
    from curation.people.weights import keep_quiet

    keep_quiet()  # before anything imports what would report home
    path = common / "seer.pt"
    with FileLock(common / "seer.lock"):
        if not path.exists():
            _make_seer(path)
        _exported(path, sha256_file(path))
    return path


def _make_seer(path: Path) -> None:
    import torch
    from ultralytics import YOLO

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = YOLO("yolo11n.yaml", task="detect")
        model.model.names = {n: "person" if n == 0 else f"thing {n}" for n in range(80)}
        for level, head in enumerate(model.model.model[-1].cv3):
            torch.nn.init.zeros_(head[-1].weight)
            torch.nn.init.constant_(head[-1].bias, -20.0)
            if level == 2:
                head[-1].bias.data[0] = 0.0
        model.save(path)


@pytest.fixture(scope="session")
def tolerant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that forgives everything but an edit."""
    values = yaml.safe_load(find_policy(Path("default")).read_text(encoding="utf-8"))
    values["name"] = "tolerant"
    values["shot"]["max_heights_per_s"] = None
    values["shot"]["person_edits"] = []
    values["single"] |= {"person_confidence": 0.3, "other_confidence": 1.0, "faint_confidence": 1.0}
    values["height"]["min_mean"] = 0.0
    values["border"]["tolerance"] = 1.0
    values["overlap"]["confidence"] = 1.0
    path = tmp_path_factory.mktemp("policy") / "tolerant.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
