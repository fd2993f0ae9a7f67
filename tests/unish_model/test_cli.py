from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from unish_model import cli


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders and files a user may name: empty, unknown, broken."""
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "unknown", "broken", "lacking"):
        Path(folder).mkdir()
    np.savez("unknown/mystery.npz", x=np.zeros(3))
    np.savez("lacking/svd_orthogonalize.npz", R=np.zeros((1, 3, 3)))
    Path("broken/rope.npz").write_bytes(b"PK\x03\x04 cut short")
    Path("junk.safetensors").write_bytes(b"<html>not weights</html>")
    return tmp_path


def ended(monkeypatch: pytest.MonkeyPatch, line: str) -> int | str | None:
    """The exit code of `unish` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["unish", *line.split()])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("--help", 0, "selfcheck"),
        ("selfcheck --golden unknown", 1, "unknown file"),
        ("selfcheck --golden lacking", 1, "m9"),
        ("selfcheck --golden unknown --only [", 2, "regular expression"),
        ("selfcheck --golden unknown --only rope", 2, "rope"),
        ("selfcheck --golden empty", 2, "no golden .npz"),
        ("selfcheck --golden absent", 2, "absent"),
        ("selfcheck --golden broken", 2, "rope.npz"),
        ("selfcheck --gold unknown", 2, "option"),
        ("info absent.safetensors", 2, "no checkpoint"),
        ("info junk.safetensors", 2, "download it again"),
        ("info someone/something", 2, "no file of"),
        ("init --pi3 junk.safetensors --camerahmr junk.ckpt --out start.safetensors", 2, "download it again"),
        ("init --pi3 absent.safetensors --camerahmr absent.ckpt --out start.pt", 2, "must end in .safetensors"),
        ("init --pi3 a.safetensors --camerahmr b.ckpt --out c.safetensors --config huge", 2, "huge"),
    ],
)
def test_the_exit_code_tells_a_failure_from_a_mistake(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    code: int,
    says: str,
) -> None:
    assert ended(monkeypatch, line) == code
    told = "".join(capsys.readouterr())
    assert says in told and "Traceback" not in told


def test_a_download_that_fails_is_no_mistake(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert ended(monkeypatch, "info Murphyyyy/UniSH") == 1


def opened(pipe: Path, reader: subprocess.Popen[bytes]) -> int:
    """The writing end of a named pipe, once the other process has opened it to read."""
    while reader.poll() is None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # it does not read yet
            time.sleep(0.05)
    raise AssertionError(f"the process ended with {reader.returncode} and read nothing")


def test_ctrl_c_is_one_line_and_130(files: Path) -> None:
    pipe = files / "empty" / "rope.npz"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "unish_model.cli", "selfcheck", "--golden", "empty"]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            writer = opened(pipe, process)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
            os.close(writer)  # a signal just before the command reads is seen only when the reading ends
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert output.decode() == "interrupted\n"
