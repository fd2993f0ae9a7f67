from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from tests.support.tiny_network import gap, random_input
from unish_model.cli import app
from unish_model.network.config import UniSHConfig
from unish_model.network.model import UniSH
from unish_model.network.scene import Scene
from unish_model.selfcheck.compare import relative_error
from unish_model.selfcheck.run import run_selfcheck
from unish_model.selfcheck.weights import fill, weight_array

SMALL_FILES = "^(rope|rotations|svd|transform|focal|depth|preprocess|alignnet|human_head|camera_head)"


@pytest.fixture
def unish_golden(golden: Path) -> Path:
    return golden / "unish"


def test_functions_and_heads_meet_their_golden_numbers(unish_golden: Path) -> None:
    checks = list(run_selfcheck(unish_golden, only=SMALL_FILES))
    assert len(checks) > 50
    assert not [check for check in checks if not check.passed]


def test_another_salt_misses(unish_golden: Path) -> None:
    checks = list(run_selfcheck(unish_golden, salt="other", only="^camera_head"))
    assert checks and not any(check.passed for check in checks)


def test_weights_equal_the_published_scheme(golden: Path) -> None:
    spec = importlib.util.spec_from_file_location("weights_scheme", golden / "weights_scheme.py")
    assert spec is not None and spec.loader is not None
    scheme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scheme)
    for file in ("unish", "moge", "camerahmr"):
        for name, entry in json.loads((golden / "state_dicts" / f"{file}.json").read_text()).items():
            if np.prod(entry["shape"]) < 30_000 or name.endswith("point_head.proj.bias"):
                ours = weight_array("salt", name, entry["shape"])
                assert np.array_equal(ours, scheme.make_array(name, entry["shape"], "salt")), name


def test_released_names_and_shapes_are_ours(golden: Path) -> None:
    with torch.device("meta"):
        networks = {"unish": UniSH(), "pi3": Scene(UniSHConfig.released().scene)}
    for name, network in networks.items():
        listed = json.loads((golden / "state_dicts" / f"{name}.json").read_text())
        ours = network.state_dict()
        assert {key: tuple(entry["shape"]) for key, entry in listed.items()} == {
            key: tuple(value.shape) for key, value in ours.items()
        }


def golden_of(model: UniSH, folder: Path) -> None:
    """A golden folder of our own making, in the form of the large one: thinned images beside their sums."""
    frames, height, width = 2, 42, 70
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (frames, 3, height, width), dtype=np.uint8)
    patches = rng.integers(0, 256, (frames, 3, 256, 256), dtype=np.uint8)
    box = np.asarray([[3, 2, 30], [5, -1, 25]], np.float32)
    inputs = (torch.from_numpy(images)[None] / 255, torch.from_numpy(patches)[None] / 255, torch.from_numpy(box)[None])
    out = model.infer(*inputs, compat="released")
    with torch.no_grad():
        hidden = model.pi3(inputs[0]).hidden.flatten(0, 1)
    depth = out.depth.numpy()
    np.savez(
        folder / "unish_big.npz",
        images_u8=images,
        patches_u8=patches,
        bbox_info=box,
        hidden_sub=hidden[:, ::16, ::16].numpy(),
        out_depth_map=depth[:, :, 3::7, 3::7],
        out_masks=out.mask.numpy()[:, :, 3::7, 3::7],
        sum_depth_map=depth.astype(np.float64).sum((2, 3)),
        out_scale=out.unit[:, :1].numpy(),
    )


def test_other_sizes_and_thinned_files_are_checked(tiny: UniSH, tmp_path: Path) -> None:
    golden_of(tiny, tmp_path)
    checks = {check.output: check for check in run_selfcheck(tmp_path, "tests", UniSHConfig.tiny())}
    assert set(checks) == {"hidden_sub", "out_depth_map", "out_masks", "sum_depth_map", "out_scale"}
    assert all(check.passed for check in checks.values())
    fill(tiny, "changed")
    golden_of(tiny, tmp_path)
    assert not any(
        check.passed for check in run_selfcheck(tmp_path, "tests", UniSHConfig.tiny()) if check.output != "out_masks"
    )


def test_relative_error_sees_shape_and_infinity() -> None:
    golden = np.asarray([1.0, np.inf, -4.0])
    assert relative_error(golden, golden) == 0
    assert relative_error(golden + np.asarray([0.4, 0, 0]), golden) == pytest.approx(0.1)
    assert relative_error(np.asarray([1.0, 2.0, -4.0]), golden) == float("inf")
    assert relative_error(golden[:2], golden) == float("inf")


def test_cli_starts_and_describes_a_checkpoint(tmp_path: Path, unish_golden: Path) -> None:
    from tests.unish_model.network.test_checkpoint import TINY, camerahmr_state, weights

    save_file(weights(Scene(TINY.scene)), tmp_path / "pi3.safetensors")
    torch.save({"state_dict": camerahmr_state()}, tmp_path / "camerahmr.ckpt")
    parts = ["--pi3", str(tmp_path / "pi3.safetensors"), "--camerahmr", str(tmp_path / "camerahmr.ckpt")]
    out = str(tmp_path / "start.safetensors")
    runner = CliRunner()
    made = runner.invoke(app, ["init", *parts, "--out", out, "--config", "tiny"])
    assert made.exit_code == 0, made.output
    told = runner.invoke(app, ["info", out])
    assert told.exit_code == 0 and "UniSH" in told.output and "alignnet" in told.output
    wrong = runner.invoke(app, ["init", *parts, "--out", out])
    assert wrong.exit_code == 2 and "does not fit" in wrong.output
    passed = runner.invoke(app, ["selfcheck", "--golden", str(unish_golden), "--only", "^camera_head"])
    assert passed.exit_code == 0, passed.output


@pytest.fixture
def scene() -> Scene:
    """One block of each kind: exporting costs seconds per block."""
    config = UniSHConfig.tiny().scene
    one = dataclasses.replace(config.encoder, depth=1)
    scene = Scene(dataclasses.replace(config, encoder=one, decoder=dataclasses.replace(one, depth=2))).eval()
    fill(scene, "tests")
    return scene


@pytest.mark.slow
def test_the_scene_branch_exports_at_a_fixed_size(scene: Scene, unchecked: None) -> None:
    from unish_model.network.onnx import OUTPUTS, FixedScene

    images = random_input("export", 1, 2, 3, 28, 42).sigmoid()
    program = torch.export.export(FixedScene(scene, 28, 42).eval(), (torch.rand_like(images),))
    with torch.no_grad():
        expected = scene(images)
        for name, value in zip(OUTPUTS, program.module()(images), strict=True):
            assert gap(value, getattr(expected, name)) < 1e-6, name


@pytest.mark.slow
def test_onnx_runtime_gets_the_same_numbers(scene: Scene, tmp_path: Path, unchecked: None) -> None:
    pytest.importorskip("onnxscript", reason="writing ONNX needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="running ONNX needs onnxruntime")
    from unish_model.network.onnx import OUTPUTS, export_scene

    images = random_input("export", 1, 2, 3, 28, 42).sigmoid()
    export_scene(scene, torch.rand_like(images), tmp_path / "scene.onnx")
    session = runtime.InferenceSession(str(tmp_path / "scene.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = scene(images)
    for name, value in zip(OUTPUTS, session.run(None, {"images": images.numpy()}), strict=True):
        assert gap(torch.from_numpy(value), getattr(expected, name)) < 2e-5, name


@pytest.mark.slow
def test_whole_networks_meet_their_golden_numbers(unish_golden: Path) -> None:
    torch.set_num_threads(2)
    checks = list(run_selfcheck(unish_golden, only="^(unish|forward|run_inference|pi3|moge)"))
    assert len(checks) > 80
    assert not [check for check in checks if not check.passed]


LOAD = """
import resource, sys, torch
from unish_model.network import checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base = peak()
network = getattr(checkpoint, sys.argv[1])(sys.argv[2])
total = sum(value.double().sum() for value in network.state_dict().values())  # touches every page
size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
print(len(network.state_dict()), (peak() - base) / size)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("listed", "load", "names", "kept"),
    [("unish", "load_unish", 1783, 1783), ("pi3", "load_pi3", 1210, 1210), ("camerahmr", "load_camerahmr", 505, 501)],
)
def test_full_size_checkpoints_load_strictly_within_their_own_memory(
    golden: Path, tmp_path: Path, listed: str, load: str, names: int, kept: int
) -> None:
    entries = json.loads((golden / "state_dicts" / f"{listed}.json").read_text())
    assert len(entries) == names
    state = {name: torch.zeros(entry["shape"]) for name, entry in entries.items()}
    if listed == "camerahmr":
        path = tmp_path / "camerahmr.ckpt"
        torch.save({"state_dict": state}, path)
    else:
        path = tmp_path / f"{listed}.safetensors"
        save_file(state, path)
    done = subprocess.run([sys.executable, "-c", LOAD, load, str(path)], capture_output=True, text=True, check=True)
    count, ratio = done.stdout.split()
    assert int(count) == kept
    assert float(ratio) < 1.1
    path.unlink()
