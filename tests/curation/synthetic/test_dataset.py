"""Labelled shards: ordinary shards to every reader, and labels that agree with their own pictures."""

import numpy as np
import pytest

from curation.render.body import load_body, pose_body
from curation.shards.labels import LABELS
from curation.shards.reader import ShardReader
from curation.shards.verify import verify
from curation.synthetic.dataset import labelled_clip, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled")
    write_dataset(path, clips=2, seed=1, frames=4, workers=1)
    return path


def columns(table):
    return {label.name: np.array(table[label.name].to_pylist()) for label in LABELS}


@pytest.mark.slow
def test_shards_are_whole_and_deterministic(folder, tmp_path):
    (shard,) = verify(folder)
    assert [clip.frames for clip in shard.clips] == [4, 4]
    write_dataset(tmp_path, clips=2, seed=1, frames=4, workers=1)
    (again,) = verify(tmp_path)
    assert again.sha256 == shard.sha256


def test_labels_agree_with_the_picture(folder):
    (shard,) = verify(folder, decode=False)
    reader, checked = ShardReader(folder), 0
    for number, clip in enumerate(shard.clips):
        table = reader.table(clip.clip_id)
        made = labelled_clip(1, number, 4)
        truth = columns(table)
        np.testing.assert_array_equal(truth["smpl_pose"], columns(made)["smpl_pose"])
        window = reader.frames(clip.clip_id, 0, 4)
        np.testing.assert_allclose(window.intrinsics[:, 0, 0] / window.intrinsics[:, 1, 1], window.stretch, rtol=1e-4)
        for index in range(4):
            posed = pose_body(
                load_body(),
                truth["smpl_betas"][index],
                truth["smpl_pose"][index].reshape(24, 3),
                truth["smpl_transl"][index],
            )
            np.testing.assert_allclose(posed.joints.reshape(-1), truth["joints_3d"][index], atol=1e-4)
            world_to_camera = truth["extrinsics"][index].reshape(4, 4)
            local = posed.joints @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
            intrinsics = np.array(table["intrinsics"][index].as_py()).reshape(3, 3)
            flat = (local @ intrinsics.T)[:, :2] / local[:, 2:]
            np.testing.assert_allclose(flat.reshape(-1), truth["joints_2d"][index], atol=0.05)
            # the skin lies before the joints inside it: measured depth at a joint on the person is a little nearer
            depth, mask = np.asarray(window.depth_m[index]), np.asarray(window.human_mask[index])
            height, width = depth.shape
            on = [
                (int(y), int(x), z)
                for (x, y), z in zip(flat[[0, 3, 6, 9]], local[[0, 3, 6, 9], 2], strict=True)
                if 0 <= x < width and 0 <= y < height and mask[int(y), int(x)]
            ]
            checked += len(on)
            for y, x, z in on:
                assert -0.05 < z - depth[y, x] < 0.9
    assert checked > 8
