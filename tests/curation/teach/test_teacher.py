"""What can be wrong before a run starts: each fault is one sentence that says what to do."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from curation.failures import UsageError
from curation.settings import TeacherSettings
from curation.teach.teacher import check_teacher, load_teacher
from tests.support.small_moge import small_config

MODEL = TeacherSettings().model
CHECK = """
import sys
from curation.failures import UsageError
from curation.settings import TeacherSettings
from curation.teach.teacher import check_teacher
try:
    print("checked", check_teacher(TeacherSettings(device="cpu")).model)
except UsageError as error:
    print(error)
print("torch" in sys.modules)
"""


def check_in_process(home: Path, **environment: str) -> tuple[list[str], float]:
    """The lines that CHECK prints, with an empty cache at `home`, and the seconds it took.

    A process of its own, for huggingface_hub reads its environment once, when it is imported.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = inherited | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | environment
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), time.monotonic() - start


@contextmanager
def hub(weights: Path | None) -> Iterator[tuple[str, list[str]]]:
    """A Hugging Face Hub on loopback: its address and the requests so far. Without weights it is out of order."""
    requests: list[str] = []
    body = weights.read_bytes() if weights else b""
    etag = hashlib.sha256(body).hexdigest()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(f"{self.command} {self.path}")
            self.send_response(200 if weights else 503)
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_no_weights_and_no_network_names_the_ways_out(tmp_path, environment):
    (sentence, torch_imported), seconds = check_in_process(tmp_path, **environment)
    for part in (MODEL, f"hf download {MODEL} model.pt", "HF_HOME", "--teacher PATH", "--teacher none"):
        assert part in sentence
    assert torch_imported == "False", "nothing heavy is loaded before the answer"
    assert seconds < 20  # one try; huggingface_hub's own repeated tries take longer


def test_a_hub_that_is_out_of_order_is_asked_once(tmp_path):
    with hub(None) as (address, requests):
        (sentence, _), _ = check_in_process(tmp_path, HF_ENDPOINT=address)
    assert "--teacher PATH" in sentence
    assert requests == [f"HEAD /{MODEL}/resolve/main/model.pt"]


@pytest.mark.slow
def test_weights_are_fetched_once_and_then_found_without_network(tmp_path, small_checkpoint):
    with hub(small_checkpoint) as (address, requests):
        (checked, _), _ = check_in_process(tmp_path, HF_ENDPOINT=address)
    assert checked == f"checked {MODEL}", "another machine has another cache, so the settings keep the id"
    assert sum(request.startswith("GET") for request in requests) == 1
    (checked, _), _ = check_in_process(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert checked == f"checked {MODEL}"


@pytest.mark.parametrize(
    "model", ["nowhere/model.pt", "/nowhere/weights", "~nobody/x.pt", "name", "a b/c", "--flag", ""]
)
def test_what_is_neither_a_file_nor_an_id_is_not_asked_of_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="correct the path, or give a Hugging Face id"):
        check_teacher(TeacherSettings(model=model))


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def parts(small_checkpoint):
    """The small checkpoint as read, to be spoilt."""
    import torch

    return torch.load(small_checkpoint, weights_only=True)


def spoilt(parts: dict, fault: str) -> object:
    """The checkpoint with one fault; never changes `parts`."""
    config, state = small_config(), dict(parts["model"])
    first = next(iter(state))
    if fault == "not a dict":
        return [1, 2]
    if fault == "only weights":
        return state
    if fault == "moge-1":
        config = {"encoder": "dinov2_vitl14", "remap_output": "exp"}
    if fault == "no metric scale":
        del config["scale_head"]
    if fault == "other encoder":
        config["encoder"]["backbone"] = "_make_dinov2_model"
    if fault == "unknown part":
        config["neck"]["surprise"] = 1
    if fault == "lacks a weight":
        del state[first]
    if fault == "foreign weight":
        state["surprise"] = state[first]
    if fault == "other shape":
        state[first] = state[first].flatten()
    return {"model_config": config, "model": state}


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("not a dict", "is not a MoGe-2 checkpoint"),
        ("only weights", "is not a MoGe-2 checkpoint"),
        ("moge-1", "is a MoGe-1 checkpoint"),
        ("no metric scale", "has no scale_head"),
        ("other encoder", "not a DINOv2 network"),
        ("unknown part", "does not hold the weights of the MoGe-2 network it describes"),
        ("lacks a weight", "does not hold the weights of the MoGe-2 network it describes"),
        ("foreign weight", "does not hold the weights of the MoGe-2 network it describes"),
        ("other shape", "does not hold the weights of the MoGe-2 network it describes"),
    ],
)
def test_a_wrong_checkpoint_is_named(parts, tmp_path, fault, sentence):
    import torch

    path = tmp_path / "wrong.pt"
    torch.save(spoilt(parts, fault), path)
    for enter in (check_teacher, load_teacher):
        with pytest.raises(UsageError, match=sentence) as error:
            enter(TeacherSettings(model=str(path), device="cpu"))
        assert str(path) in str(error.value)
        assert "--teacher none" in str(error.value)


def test_a_checkpoint_that_is_cut_short_or_no_checkpoint_at_all(small_checkpoint, tmp_path):
    content = small_checkpoint.read_bytes()
    path = tmp_path / "model.pt"
    for wrong in (content[: len(content) // 2], content[:-1000], b"<html>404</html>", b"", pickle.dumps({"model": 1})):
        path.write_bytes(wrong)
        with pytest.raises(UsageError, match="not a PyTorch checkpoint, or is truncated"):
            check_teacher(TeacherSettings(model=str(path)))


def test_no_code_from_a_checkpoint_is_run(tmp_path):
    import torch

    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    torch.save({"model_config": {}, "model": Bomb(trace)}, path)
    with pytest.raises(UsageError, match="more than plain weights"):
        check_teacher(TeacherSettings(model=str(path)))
    assert not trace.exists()


def test_a_downloaded_folder_is_as_good_as_its_file(small_checkpoint, tmp_path):
    (tmp_path / "model.pt").symlink_to(small_checkpoint)
    checked = check_teacher(TeacherSettings(model=str(tmp_path), device="cpu"))
    assert checked.model == str(tmp_path / "model.pt")


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:", "cuda:99", "cuda:-1", ""])
def test_an_absent_device_is_refused(small_checkpoint, device):
    with pytest.raises(UsageError, match=r"choose auto"):
        check_teacher(TeacherSettings(model=str(small_checkpoint), device=device))


def test_no_teacher_says_so(tmp_path):
    settings = TeacherSettings(kind="none")
    assert check_teacher(settings) == settings
    teacher = load_teacher(settings)
    assert teacher.provenance == {"kind": "none", "name": "none"}
    assert teacher(None, "0" * 16) is None


def test_a_depth_folder_is_looked_at_first(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="There is no depth folder"):
        check_teacher(TeacherSettings(kind="folder", model=str(tmp_path / "absent")))
    folder = tmp_path / "megasam"
    folder.mkdir()
    with pytest.raises(UsageError, match=r"has no <clip_id>\.npz"):
        check_teacher(TeacherSettings(kind="folder", model=str(folder)))
    np.savez(folder / "0000000000000000.npz", depth=np.ones((1, 2, 2)), intrinsics=np.eye(3)[None])
    monkeypatch.chdir(tmp_path)
    checked = check_teacher(TeacherSettings(kind="folder", model="megasam"))
    assert (checked.model, checked.name) == (str(folder), "megasam")
