from __future__ import annotations

import contextlib
import os
import pathlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.support.tiny_network import Clip
from unish_model.network import checkpoint as ck
from unish_model.network.body import Body, BodyModelError, read_smpl
from unish_model.network.config import UniSHConfig
from unish_model.network.human import Human
from unish_model.network.model import UniSH
from unish_model.network.scene import Scene
from unish_model.selfcheck.weights import weight_array

TINY = UniSHConfig.tiny()


class CfgNode(dict):
    """What Lightning files carry besides tensors."""


def weights(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(weight_array("file", prefix + name, value.shape))
        for name, value in module.state_dict().items()
    }


@pytest.fixture
def pi3(tmp_path: Path) -> Path:
    save_file(weights(Scene(TINY.scene)), tmp_path / "pi3.safetensors")
    return tmp_path / "pi3.safetensors"


def camerahmr_state() -> dict[str, torch.Tensor]:
    state = {name.replace("human_head.", "smpl_head."): value for name, value in weights(Human(TINY.human)).items()}
    width = TINY.human.decoder.width
    return state | {"smpl_head.deccam.weight": torch.ones(3, width), "smpl_head.deckp.bias": torch.ones(88)}


@pytest.fixture
def camerahmr(tmp_path: Path) -> Path:
    extra = {"hyper_parameters": CfgNode(MODEL=CfgNode(size=1)), "callbacks": {"dir": pathlib.PurePosixPath("/x")}}
    torch.save({"state_dict": camerahmr_state(), "epoch": 7, **extra}, tmp_path / "camerahmr.ckpt")
    return tmp_path / "camerahmr.ckpt"


def test_a_saved_network_comes_back_with_its_configuration(tiny: UniSH, clip: Clip, tmp_path: Path) -> None:
    ck.save_unish(tiny, tmp_path / "deep" / "net.safetensors")
    again = ck.load_unish(tmp_path / "deep" / "net.safetensors")
    assert again.config == tiny.config and not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        assert torch.equal(again(*clip.inputs).world_translation, tiny(*clip.inputs).world_translation)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["net.safetensors"]


def test_training_a_mapped_network_does_not_write_into_its_file(tiny: UniSH, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    ck.save_unish(tiny, path)
    before = path.read_bytes()
    again = ck.load_unish(path)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    assert path.read_bytes() == before
    assert torch.equal(again.alignnet.scale_token, tiny.alignnet.scale_token + 1)


def test_trunks_can_be_loaded_in_half_precision(tiny: UniSH, tmp_path: Path) -> None:
    ck.save_unish(tiny, tmp_path / "net.safetensors")
    half = ck.load_unish(tmp_path / "net.safetensors", trunk_dtype=torch.bfloat16)
    expected = tiny.cast_trunks(torch.bfloat16).state_dict()
    for name, value in half.state_dict().items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


def test_composition_takes_each_part_from_where_it_belongs(pi3: Path, camerahmr: Path, tmp_path: Path) -> None:
    network = ck.compose(pi3, camerahmr, TINY, seed=3)
    state = network.state_dict()
    assert len(state) == len(UniSH(TINY).state_dict())
    for name, value in weights(Scene(TINY.scene)).items():
        assert torch.equal(state[f"pi3.{name}"], value), name
    for name, value in weights(Human(TINY.human)).items():
        assert torch.equal(state[name], value), name
    assert torch.equal(state["alignnet.init_body_pose"], state["human_head.init_body_pose"])
    torch.manual_seed(99)
    same, other = ck.compose(pi3, camerahmr, TINY, seed=3), ck.compose(pi3, camerahmr, TINY, seed=4)
    assert torch.equal(same.alignnet.scale_head.weight, network.alignnet.scale_head.weight)
    assert not torch.equal(other.alignnet.scale_head.weight, network.alignnet.scale_head.weight)
    ck.save_unish(network, tmp_path / "start.safetensors")
    assert ck.load_unish(tmp_path / "start.safetensors").config == TINY


def test_pi3_and_camerahmr_load_by_themselves(pi3: Path, camerahmr: Path) -> None:
    scene, human = ck.load_pi3(pi3, TINY), ck.load_camerahmr(camerahmr, TINY)
    assert torch.equal(scene.register_token, weights(scene)["register_token"])
    assert torch.equal(human.human_head.decpose.weight, weights(human)["human_head.decpose.weight"])


def test_names_must_fit_exactly(tiny: UniSH, tmp_path: Path) -> None:
    state = dict(tiny.state_dict())
    del state["alignnet.scale_token"]
    state["alignnet.stranger"] = torch.ones(1)
    state["pi3.register_token"] = torch.ones(1, 1, 5, 7)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ck.NamesError) as caught:
        ck.load_unish(tmp_path / "bad.safetensors", TINY)
    error = caught.value
    assert error.missing == ["alignnet.scale_token"] and error.unexpected == ["alignnet.stranger"]
    assert len(error.misshapen) == 1 and "pi3.register_token (1, 1, 5, 7)" in str(error)
    assert all(name in str(error) for name in ("alignnet.scale_token", "alignnet.stranger"))


def test_only_listed_extras_of_camerahmr_are_left_behind(tmp_path: Path) -> None:
    torch.save({"state_dict": camerahmr_state() | {"novel.weight": torch.ones(2)}}, tmp_path / "a.ckpt")
    with pytest.raises(ck.NamesError) as caught:
        ck.load_camerahmr(tmp_path / "a.ckpt", TINY)
    assert caught.value.unexpected == ["novel.weight"]
    ck.load_camerahmr(tmp_path / "a.ckpt", TINY, ignored=(*ck.CAMERAHMR_IGNORED, "novel."))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_ever_run(tmp_path: Path, camerahmr: Path) -> None:
    fuse = tmp_path / "exploded"
    torch.save({"state_dict": camerahmr_state(), "trap": Bomb(fuse)}, tmp_path / "trap.ckpt")
    with contextlib.suppress(ck.CheckpointError):  # refused or left inert: both are safe
        ck.load_camerahmr(tmp_path / "trap.ckpt", TINY)
    (tmp_path / "SMPL_NEUTRAL.pkl").write_bytes(pickle.dumps({"v_template": Bomb(fuse)}, protocol=2))
    with pytest.raises(BodyModelError):
        read_smpl(tmp_path)
    assert not fuse.exists()


def test_unreadable_files_say_what_to_do(tmp_path: Path) -> None:
    for name in ("junk.safetensors", "junk.ckpt"):
        (tmp_path / name).write_bytes(b"<html>not weights</html>")
        with pytest.raises(ck.CheckpointError, match="download it again"):
            ck.open_tensors(tmp_path / name)
    with pytest.raises(ck.CheckpointError, match="Hugging Face id"):
        ck.resolve(tmp_path / "absent.safetensors")
    with pytest.raises(ck.CheckpointError, match="no file of"):
        ck.resolve("someone/something")
    with pytest.raises(ck.CheckpointError, match="safetensors"):
        ck.save_unish(UniSH(TINY), tmp_path / "net.pt")


def test_hub_ids_are_asked_for_the_right_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository == "no/network":
            raise OSError("offline")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    ck.resolve("Murphyyyy/UniSH")
    ck.resolve("a/b:c/d.safetensors")
    assert asked == [("Murphyyyy/UniSH", "checkpoints/unish_release.safetensors"), ("a/b", "c/d.safetensors")]
    with pytest.raises(ck.CheckpointError, match="by hand"):
        ck.resolve("no/network:x.safetensors")


def test_summaries_tell_files_apart(pi3: Path, camerahmr: Path, tiny: UniSH, tmp_path: Path) -> None:
    ck.save_unish(tiny, tmp_path / "net.safetensors")
    kinds = {path: ck.summarise(ck.open_tensors(path)) for path in (pi3, camerahmr, tmp_path / "net.safetensors")}
    assert [summary.kind for summary in kinds.values()] == ["Pi3", "CameraHMR", "UniSH"]
    assert [summary.fits for summary in kinds.values()] == ["tiny", "tiny", "its stored configuration"]
    assert kinds[tmp_path / "net.safetensors"].parts["alignnet"][0] == 72


def smpl_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "v_template": rng.random((6890, 3)),
        "shapedirs": rng.random((6890, 3, 10)),
        "posedirs": np.zeros((6890, 3, 207), np.float32),
        "J_regressor": rng.random((24, 6890)),
        "weights": rng.random((6890, 24)),
        "kintree_table": np.stack([np.arange(-1, 23), np.arange(24)]),
        "f": np.zeros((13776, 3), np.int64),
    }


def test_smpl_is_read_from_either_kind_of_file(tmp_path: Path) -> None:
    arrays = smpl_arrays()
    import scipy.sparse

    sparse = {**arrays, "J_regressor": scipy.sparse.csc_matrix(arrays["J_regressor"])}
    (tmp_path / "SMPL_NEUTRAL.pkl").write_bytes(pickle.dumps(sparse, protocol=2))
    from_pickle = read_smpl(tmp_path)
    np.savez(tmp_path / "SMPL_FEMALE.npz", **arrays)
    from_archive = read_smpl(tmp_path, "female")
    for name, value in arrays.items():
        assert np.array_equal(from_pickle[name], value) and np.array_equal(from_archive[name], value), name
    assert Body.load(tmp_path).faces.shape == (13776, 3)


def test_missing_and_foreign_body_models_are_explained(tmp_path: Path) -> None:
    with pytest.raises(BodyModelError, match="SMPL_NEUTRAL"):
        read_smpl(tmp_path)
    np.savez(tmp_path / "SMPL_NEUTRAL.npz", **{**smpl_arrays(), "v_template": np.zeros((10475, 3))})
    with pytest.raises(BodyModelError, match="6890"):
        read_smpl(tmp_path)
