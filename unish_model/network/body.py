"""SMPL through smplx: rotations, shape and translation to vertices and joints in metres.

The body model's files are licensed and not part of this project. Reading a file never runs code from it: a pickle is
read with an allow-list, and the array wrappers in old files become plain arrays.
"""

from __future__ import annotations

import io
import pickle
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

FIELDS = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "kintree_table", "f")
ADVICE = "download SMPL_NEUTRAL (version 1.1.0) from smpl.is.tue.mpg.de and give its .pkl or .npz, or its folder"


class BodyModelError(Exception):
    """The SMPL file is missing or invalid; the message says what to do."""


class _Wrapped:
    """Placeholder for an object of a library that is not needed: keeps its state and does nothing."""

    def __init__(self, *_: object) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy and scipy.sparse; everything else becomes an inert `_Wrapped`."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
            ("copy_reg", "_reconstructor"),
            ("copyreg", "_reconstructor"),
            ("__builtin__", "object"),
            ("builtins", "object"),
        }
        | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if module.startswith("scipy.sparse") and name in ("csc_matrix", "csr_matrix", "coo_matrix"):
            import scipy.sparse

            return getattr(scipy.sparse, name)
        return _Wrapped


def _array(value: Any) -> np.ndarray:
    """A numpy array from an array, a sparse matrix, or a wrapped array (chumpy keeps its values in `x`)."""
    if isinstance(value, _Wrapped):
        value = value.state.get("x")
    if hasattr(value, "toarray"):
        value = value.toarray()
    return np.asarray(value)


def read_smpl(path: Path, gender: str = "neutral") -> dict[str, np.ndarray]:
    """The arrays of an SMPL file, or of SMPL_<GENDER>.npz or .pkl in a folder. Raises BodyModelError."""
    if path.is_dir():
        found = [path / f"SMPL_{gender.upper()}{suffix}" for suffix in (".npz", ".pkl")]
        existing = [candidate for candidate in found if candidate.exists()]
        if not existing:
            raise BodyModelError(f"{path} contains neither {found[0].name} nor {found[1].name}: {ADVICE}")
        path = existing[0]
    if not path.exists():
        raise BodyModelError(f"no SMPL model at {path}: {ADVICE}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                raw: dict[str, Any] = {name: archive[name] for name in archive.files}
        else:
            raw = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        arrays = {name: _array(raw[name]) for name in FIELDS}
    except (KeyError, ValueError, TypeError, EOFError, OSError, pickle.UnpicklingError, AttributeError) as error:
        raise BodyModelError(f"{path} is not an SMPL model ({error!r}): {ADVICE}") from error
    if arrays["v_template"].shape != (6890, 3) or arrays["J_regressor"].shape != (24, 6890):
        raise BodyModelError(f"{path} is a body model, but not SMPL with 6890 vertices and 24 joints: {ADVICE}")
    return arrays


class Body(nn.Module):
    """SMPL with 6890 vertices, 24 joints and 10 shape numbers; it rotates about its rest pelvis J0."""

    def __init__(self, arrays: dict[str, np.ndarray], gender: str = "neutral") -> None:
        super().__init__()
        import smplx
        from smplx.utils import Struct

        with redirect_stdout(io.StringIO()):  # smplx warns about ten shape numbers, which is intended here
            self.smpl = smplx.SMPL(
                "",
                data_struct=Struct(**arrays),
                gender=gender,
                num_betas=10,
                create_betas=False,
                create_global_orient=False,
                create_body_pose=False,
                create_transl=False,
            )
        self.requires_grad_(False)

    @classmethod
    def load(cls, path: Path, gender: str = "neutral") -> Body:
        """From an SMPL file or folder. Raises BodyModelError."""
        return cls(read_smpl(path, gender), gender)

    @property
    def faces(self) -> Int[Tensor, "13776 3"]:
        """Vertex indices."""
        return self.smpl.faces_tensor

    def pelvis(self, betas: Float[Tensor, "*batch 10"]) -> Float[Tensor, "*batch 3"]:
        """Rest position J0 of the root joint in m, for given body shapes; a body rotates about it."""
        smpl = self.smpl
        root = smpl.J_regressor[0]
        directions = torch.einsum("v,vck->ck", root, smpl.shapedirs)
        return root @ smpl.v_template + betas.to(root.dtype) @ directions.mT

    def forward(
        self,
        rotations: Float[Tensor, "*batch 24 3 3"],
        betas: Float[Tensor, "*#batch 10"],
        translation: Float[Tensor, "*batch 3"],
    ) -> tuple[Float[Tensor, "*batch 6890 3"], Float[Tensor, "*batch 24 3"]]:
        """Vertices and joints in m. rotations: the root first; betas: body shape; translation: in m."""
        lead = translation.shape[:-1]
        matrices = rotations.reshape(-1, 24, 3, 3)
        out = self.smpl(
            betas=betas.expand(*lead, betas.shape[-1]).reshape(-1, betas.shape[-1]),
            global_orient=matrices[:, :1],
            body_pose=matrices[:, 1:],
            transl=translation.reshape(-1, 3),
            pose2rot=False,
        )
        return out.vertices.reshape(*lead, -1, 3), out.joints[:, :24].reshape(*lead, 24, 3)
