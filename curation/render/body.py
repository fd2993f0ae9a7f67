"""A body in the SMPL format, embedded or from a user's licensed SMPL file, and its skinning.

The embedded body has SMPL's layout (6890 vertices, 13776 faces, 24 joints, 10 shapes, 207 pose directions) and none
of its data. Frame: metres, y up, facing +z at rest, the body's left is +x. This module never unpickles arbitrary
objects.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.failures import UsageError
from curation.files import atomic_path

Array = NDArray[np.float64]
VERTEX_COUNT, FACE_COUNT, JOINT_COUNT, SHAPE_COUNT, POSE_COUNT = 6890, 13776, 24, 10, 207
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21)
JOINTS = [
    "pelvis",
    "left_hip",
    "right_hip",
    "spine1",
    "left_knee",
    "right_knee",
    "spine2",
    "left_ankle",
    "right_ankle",
    "spine3",
    "left_foot",
    "right_foot",
    "neck",
    "left_collar",
    "right_collar",
    "head",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hand",
    "right_hand",
]
# vertex ids that smplx reads as extra joints; our vertices are permuted to have each landmark at its id
LANDMARKS = {
    "nose": 332, "right_eye": 6260, "left_eye": 2800, "right_ear": 4071, "left_ear": 583,
    "right_thumb": 6191, "right_index": 5782, "right_middle": 5905, "right_ring": 6016, "right_pinky": 6133,
    "left_thumb": 2746, "left_index": 2319, "left_middle": 2445, "left_ring": 2556, "left_pinky": 2673,
    "left_big_toe": 3216, "left_small_toe": 3226, "left_heel": 3387,
    "right_big_toe": 6617, "right_small_toe": 6624, "right_heel": 6787,
}  # fmt: skip
EMBEDDED = Path(__file__).parent / "body.npz"


@dataclass(frozen=True, eq=False)
class Body:
    """The arrays of one body, named as SMPL names them.

    v_template (6890, 3) m; f (13776, 3) int64; shapedirs (6890, 3, 10) m per unit; posedirs (6890, 3, 207) m;
    J_regressor (24, 6890), rows of sum one; weights (6890, 24), rows of sum one; kintree_table (2, 24).
    """

    v_template: Array
    f: NDArray[np.int64]
    shapedirs: Array
    posedirs: Array
    J_regressor: Array
    weights: Array
    kintree_table: NDArray[np.int64]

    def arrays(self) -> dict[str, NDArray]:
        """Every array by name: `smplx.SMPL("", data_struct=Struct(**body.arrays()))` works without any pickle."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @cached_property
    def pose_matrix(self) -> Any:
        """posedirs as a (20670, 207) matrix; sparse where that is faster, as for a body whose joints act locally."""
        from scipy.sparse import csr_matrix

        dense = self.posedirs.reshape(-1, POSE_COUNT)
        return csr_matrix(dense) if np.count_nonzero(dense) < 0.3 * dense.size else dense

    def rest_joints(self, betas: Array) -> Array:
        """(24, 3) joints of the shaped body before posing, metres."""
        return self.J_regressor @ (self.v_template + self.shapedirs @ betas)


@dataclass(frozen=True, eq=False)
class Posed:
    """A posed body: vertices (6890, 3) and joints (24, 3) in the world, metres."""

    vertices: Array
    joints: Array


def load_body(path: Path | None = None) -> Body:
    """The embedded body, or the one in an SMPL .npz or .pkl file. Raises UsageError if the file is not an SMPL body."""
    if path is None:
        return _embedded()
    try:
        raw = dict(np.load(path)) if path.suffix == ".npz" else _RestrictedUnpickler.read(path)
        return Body(
            v_template=_dense(raw["v_template"]),
            f=_dense(raw["f"]).astype(np.int64),
            shapedirs=_dense(raw["shapedirs"])[:, :, :SHAPE_COUNT],
            posedirs=_dense(raw["posedirs"]).reshape(VERTEX_COUNT, 3, POSE_COUNT),
            J_regressor=_dense(raw["J_regressor"]),
            weights=_dense(raw["weights"]),
            kintree_table=_kintree(_dense(raw["kintree_table"])),
        )
    except (KeyError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{path.name} is not an SMPL body ({error}); give the .npz or .pkl file of the neutral SMPL model."
        ) from error


def save_body(body: Body, path: Path) -> None:
    """Write a body as .npz with SMPL's array names, for any tool that reads that format."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **body.arrays())  # type: ignore[arg-type]


def pose_body(body: Body, betas: Array, pose: Array, transl: Array, padding: Array | None = None) -> Posed:
    """Linear blend skinning as SMPL defines it.

    betas (10,); pose (24, 3) axis-angle, the first is the root's orientation in the world; transl (3,) m. padding
    (6890, 3) m is added to the rest vertices, for clothes, and moves no joint.
    """
    shaped = body.v_template + body.shapedirs @ betas
    joints = body.J_regressor @ shaped
    rotations = rotation_matrices(pose)
    feature = (rotations[1:] - np.eye(3)).reshape(-1)
    shaped = shaped + (body.pose_matrix @ feature).reshape(-1, 3)
    if padding is not None:
        shaped = shaped + padding
    world = global_rotations(rotations)
    placed = np.empty_like(joints)
    placed[0] = joints[0]
    for joint in range(1, JOINT_COUNT):
        parent = PARENTS[joint]
        placed[joint] = placed[parent] + world[parent] @ (joints[joint] - joints[parent])
    offset = placed - np.einsum("jab,jb->ja", world, joints)
    blended = body.weights @ np.concatenate([world.reshape(JOINT_COUNT, 9), offset], axis=1)
    vertices = np.einsum("vab,vb->va", blended[:, :9].reshape(-1, 3, 3), shaped) + blended[:, 9:]
    return Posed(vertices + transl, placed + transl)


def rotation_matrices(vectors: Array) -> Array:
    """(..., 3) axis-angle to (..., 3, 3)."""
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vectors / np.maximum(angle[..., 0], 1e-12), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)


def global_rotations(local: Array) -> Array:
    """(24, 3, 3) joint rotations relative to the parent -> rotations in the world."""
    world = np.empty_like(local)
    world[0] = local[0]
    for joint in range(1, JOINT_COUNT):
        world[joint] = world[PARENTS[joint]] @ local[joint]
    return world


@lru_cache(maxsize=1)
def _embedded() -> Body:
    with np.load(EMBEDDED) as stored:
        template = stored["v_template"].astype(np.float64)
        weights = np.zeros((VERTEX_COUNT, JOINT_COUNT))
        np.put_along_axis(
            weights, stored["weight_joint"].astype(np.int64), stored["weight_value"].astype(np.float64), 1
        )
        weights /= weights.sum(1, keepdims=True)
        regressor = np.zeros((JOINT_COUNT, VERTEX_COUNT))
        regressor[stored["regressor_joint"], stored["regressor_vertex"]] = stored["regressor_value"]
        shapedirs = stored["shapedirs"].astype(np.float64)
        faces = stored["faces"].astype(np.int64)
    kintree = np.array([PARENTS, range(JOINT_COUNT)], np.int64)
    posedirs = _pose_directions(template, weights, regressor @ template)
    return Body(template, faces, shapedirs, posedirs, regressor, weights, kintree)


def _pose_directions(template: Array, weights: Array, joints: Array) -> Array:
    """Pose directions that restore most of the volume that linear blending loses at a bent joint.

    Each vertex should turn about the joint by its share w of the rotation (R^w) instead of being averaged. The
    difference, before skinning, is fitted linearly to R - 1 over rotations of up to 100 degrees.
    """
    directions = np.zeros((VERTEX_COUNT, 3, POSE_COUNT))
    axes = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, -1, 0], [0, 1, -1]], float)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    vectors = np.concatenate([axes * np.deg2rad(angle) for angle in (-100, -60, -30, 30, 60, 100)])
    turns = rotation_matrices(vectors)
    features = np.linalg.pinv((turns - np.eye(3)).reshape(len(turns), 9), rcond=1e-6)
    for joint in range(1, JOINT_COUNT):
        below = [j for j in range(JOINT_COUNT) if j == joint or _descends(j, joint)]
        share = weights[:, below].sum(1)
        moved = np.flatnonzero((share > 0.02) & (share < 0.98))
        w, x = share[moved], template[moved] - joints[joint]
        wanted = np.einsum("nvab,vb->nva", rotation_matrices(vectors[:, None] * w[:, None]), x)
        blend = w[:, None, None] * turns[:, None] + (1 - w)[:, None, None] * np.eye(3)
        offset = np.linalg.solve(blend, wanted[..., None])[..., 0] - x
        directions[moved, :, 9 * joint - 9 : 9 * joint] = 0.7 * np.einsum("fn,nva->vaf", features, offset)
    return directions


def _descends(joint: int, ancestor: int) -> bool:
    while joint > 0:
        joint = PARENTS[joint]
        if joint == ancestor:
            return True
    return False


def _kintree(table: Array) -> NDArray[np.int64]:
    kintree = table.astype(np.int64)
    kintree[0, 0] = -1  # stored as the largest unsigned integer in the official files
    if tuple(kintree[0]) != PARENTS:
        raise ValueError("its joints are not SMPL's 24")
    return kintree


def _dense(value: Any) -> Array:
    if hasattr(value, "toarray"):
        value = value.toarray()
    return np.array(getattr(value, "x", value), dtype=np.float64)


class _Chumpy:
    """Replaces chumpy's array: keeps the pickled state, runs none of chumpy's code."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.x = state["x"]


class _RestrictedUnpickler(pickle.Unpickler):
    """Reads arrays, sparse matrices and chumpy arrays; refuses any other global, so no file can run code."""

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        loaded = cls(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        if not isinstance(loaded, dict):
            raise pickle.UnpicklingError("not a dictionary of arrays")
        return loaded

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("chumpy") and name in ("Ch", "MatVecMult", "Select"):
            return _Chumpy
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return super().find_class("numpy._core.multiarray", name)
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module.startswith("scipy.sparse") and name in ("csc_matrix", "csr_matrix", "coo_matrix"):
            import scipy.sparse

            return getattr(scipy.sparse, name)
        if module in ("copyreg", "copy_reg") and name == "_reconstructor":
            return super().find_class("copyreg", name)  # old protocols; it can only make the classes allowed here
        if module in ("builtins", "__builtin__") and name == "object":
            return object
        if module == "_codecs" and name == "encode":
            import _codecs

            return _codecs.encode
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a body file")
