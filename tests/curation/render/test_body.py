"""The embedded body: SMPL's layout, skinning that agrees with smplx, and a loader that runs no foreign code."""

import pickle
import sys
import types

import numpy as np
import pytest

from curation.failures import UsageError
from curation.render.body import (
    FACE_COUNT,
    JOINTS,
    LANDMARKS,
    PARENTS,
    VERTEX_COUNT,
    load_body,
    pose_body,
    rotation_matrices,
    save_body,
)


def test_layout_is_smpls():
    body = load_body()
    assert body.v_template.shape == (VERTEX_COUNT, 3) and body.f.shape == (FACE_COUNT, 3)
    assert body.shapedirs.shape == (VERTEX_COUNT, 3, 10) and body.posedirs.shape == (VERTEX_COUNT, 3, 207)
    assert (np.count_nonzero(body.weights, axis=1) <= 4).all()
    np.testing.assert_allclose(body.weights.sum(1), 1)
    assert (body.J_regressor >= 0).all()
    np.testing.assert_allclose(body.J_regressor.sum(1), 1)
    assert tuple(body.kintree_table[0]) == PARENTS


def test_skin_is_one_closed_outward_surface():
    body = load_body()
    edges, uses = np.unique(
        np.sort(body.f[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1), axis=0, return_counts=True
    )
    assert (uses == 2).all()
    assert VERTEX_COUNT - len(edges) + FACE_COUNT == 2  # a sphere, topologically
    a, b, c = body.v_template[body.f].transpose(1, 0, 2)
    assert 0.05 < np.sum(a * np.cross(b, c)) / 6 < 0.09  # cubic metres, positive: faces look outward


def test_joints_and_landmarks_are_where_a_human_has_them():
    body = load_body()
    joints = dict(zip(JOINTS, body.rest_joints(np.zeros(10)), strict=True))
    assert joints["left_wrist"][0] > joints["left_elbow"][0] > joints["left_shoulder"][0] > 0 > joints["right_wrist"][0]
    assert joints["head"][1] > joints["pelvis"][1] > joints["left_knee"][1] > joints["left_ankle"][1]
    marks = {name: body.v_template[index] for name, index in LANDMARKS.items()}
    assert marks["nose"][2] == max(point[2] for name, point in marks.items() if "toe" not in name)
    assert marks["left_middle"][0] == pytest.approx(body.v_template[:, 0].max(), abs=0.01)
    assert marks["left_heel"][2] < marks["left_big_toe"][2] - 0.2
    assert marks["right_eye"][0] < 0 < marks["left_eye"][0]


def test_skinning_agrees_with_smplx():
    torch = pytest.importorskip("torch")
    smplx = pytest.importorskip("smplx")
    body = load_body()
    model = smplx.SMPL("", data_struct=smplx.utils.Struct(**body.arrays()), dtype=torch.float64)
    rng = np.random.default_rng(0)
    for _ in range(3):
        betas, pose, transl = rng.normal(0, 1.5, 10), rng.normal(0, 0.5, (24, 3)), rng.normal(0, 1, 3)
        theirs = model(
            betas=torch.tensor(betas)[None],
            global_orient=torch.tensor(pose[:1]),
            body_pose=torch.tensor(pose[1:].reshape(1, -1)),
            transl=torch.tensor(transl)[None],
        )
        ours = pose_body(body, betas, pose, transl)
        assert np.abs(theirs.joints[0, :24].detach().numpy() - ours.joints).max() < 1e-5
        assert np.abs(theirs.vertices[0].detach().numpy() - ours.vertices).max() < 1e-5


def test_pose_directions_keep_a_bent_elbow_thick():
    body = load_body()
    pose = np.zeros((24, 3))
    pose[18, 1] = -np.deg2rad(110)
    near = np.linalg.norm(body.v_template - body.rest_joints(np.zeros(10))[18], axis=1) < 0.06
    thickness = []
    for scale in (1.0, 0.0):
        variant = type(body)(**{**body.arrays(), "posedirs": body.posedirs * scale})
        posed = pose_body(variant, np.zeros(10), pose, np.zeros(3))
        thickness.append(np.linalg.norm(posed.vertices[near] - posed.joints[18], axis=1).mean())
    assert thickness[0] > thickness[1] * 1.01


def test_rotations_are_rotations():
    vectors = np.concatenate([np.zeros((1, 3)), np.random.default_rng(1).normal(0, 2, (50, 3))])
    turns = rotation_matrices(vectors)
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    np.testing.assert_allclose(rotation_matrices(np.array([0, 0, np.pi / 2])) @ [1, 0, 0], [0, 1, 0], atol=1e-12)


def test_a_file_of_the_users_loads_like_the_embedded_body(tmp_path):
    body = load_body()
    save_body(body, tmp_path / "smpl.npz")
    loaded = load_body(tmp_path / "smpl.npz")
    for name, array in body.arrays().items():
        np.testing.assert_array_equal(getattr(loaded, name), array)


@pytest.mark.parametrize("protocol", [1, 2])
def test_an_official_pickle_loads_without_chumpy(tmp_path, monkeypatch, protocol):
    sparse = pytest.importorskip("scipy.sparse")
    body = load_body()
    array = type("Ch", (), {"__module__": "chumpy.ch"})  # pickles as chumpy's arrays do: its data in `x`
    shapes = array()
    shapes.x = np.concatenate([body.shapedirs, body.shapedirs], axis=2)
    module = types.ModuleType("chumpy.ch")
    module.Ch = array
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
        patch.setitem(sys.modules, "chumpy.ch", module)
        arrays = body.arrays() | {
            "shapedirs": shapes,
            "J_regressor": sparse.csc_matrix(body.J_regressor),
            "kintree_table": body.kintree_table.astype(np.uint32),
        }
        (tmp_path / "SMPL_NEUTRAL.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    loaded = load_body(tmp_path / "SMPL_NEUTRAL.pkl")
    np.testing.assert_array_equal(loaded.shapedirs, body.shapedirs)
    np.testing.assert_array_equal(loaded.J_regressor, body.J_regressor)


class _Hostile:
    def __reduce__(self):
        return print, ("a body file ran code",)


def test_a_pickle_cannot_run_code(tmp_path, capsys):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps({"v_template": _Hostile()}))
    with pytest.raises(UsageError, match="not allowed"):
        load_body(path)
    assert "ran code" not in capsys.readouterr().out


def test_a_file_that_is_no_body_is_named(tmp_path):
    np.savez(tmp_path / "other.npz", vertices=np.zeros(3))
    with pytest.raises(UsageError, match=r"other\.npz is not an SMPL body"):
        load_body(tmp_path / "other.npz")
