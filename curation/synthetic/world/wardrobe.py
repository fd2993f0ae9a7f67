"""What the body wears: two painted charts (front and back of the rest pose) and a few millimetres of cloth and hair.

Clothes change what a camera sees, never the body's labels: pose, shape and joints stay those of the naked body.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from curation.render.body import Body, Posed, load_body, pose_body
from curation.render.raster import TEXTURE_SIZE, Mesh, Texture, texture, vertex_normals
from curation.synthetic.world.paint import blur_noise, clip_rgb, smoothstep

Array = NDArray[np.float64]
_SPAN, _LEFT, _TOP = 1.86, -0.93, 0.60  # metres covered by a chart, and its left and upper edge in the rest pose
_SKIN = ((241, 208, 184), (224, 172, 140), (198, 140, 104), (160, 104, 72), (116, 74, 50), (84, 54, 40))
_HAIR = ((28, 22, 20), (60, 38, 24), (104, 68, 36), (168, 124, 66), (196, 168, 120), (120, 46, 28), (150, 150, 150))
_CLOTH = (
    (24, 26, 32),
    (46, 50, 60),
    (235, 235, 232),
    (188, 30, 40),
    (30, 62, 140),
    (20, 110, 96),
    (232, 178, 40),
    (226, 96, 40),
    (120, 40, 120),
    (90, 140, 200),
    (214, 130, 160),
    (88, 96, 60),
    (150, 150, 156),
    (70, 44, 34),
)


@dataclass(frozen=True)
class Outfit:
    """One look. Lengths are rest-pose coordinates in metres: sleeves along x, hems along y."""

    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    top: tuple[int, int, int]
    bottom: tuple[int, int, int]
    shoes: tuple[int, int, int]
    accent: tuple[int, int, int]
    sleeve: float
    hem: float
    waist: float
    neckline: float
    pattern: str
    long_hair: bool
    loose: float
    seed: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Outfit:
        """A random look."""

        def pick(colours: tuple[tuple[int, int, int], ...]) -> tuple[int, int, int]:
            return colours[int(rng.integers(len(colours)))]

        return cls(
            skin=pick(_SKIN),
            hair=pick(_HAIR),
            top=pick(_CLOTH),
            bottom=pick(_CLOTH),
            shoes=pick(_CLOTH),
            accent=pick(_CLOTH),
            sleeve=float(rng.choice([0.16, 0.32, 0.34, 0.44, 0.67])),
            hem=float(rng.choice([-0.50, -0.66, -1.06, -1.09, -1.09, -1.09])),
            waist=float(rng.uniform(-0.20, -0.08)),
            neckline=float(rng.uniform(0.03, 0.10)),
            pattern=str(rng.choice(["plain", "plain", "stripes", "bars", "print", "block", "flank"])),
            long_hair=bool(rng.random() < 0.5),
            loose=float(rng.uniform(0.004, 0.018)),
            seed=int(rng.integers(2**31)),
        )


@dataclass(frozen=True, eq=False)
class Dressed:
    """A body in an outfit; padding (V, 3) is the thickness of cloth and hair in metres."""

    body: Body
    outfit: Outfit
    padding: Array = field(repr=False)

    @property
    def charts(self) -> tuple[Texture, Texture]:
        """The two textures, front and back of the rest pose."""
        return _charts(self.outfit)

    def pose(self, betas: Array, pose: Array, transl: Array) -> Posed:
        """The clothed skin and the naked body's joints."""
        return pose_body(self.body, betas, pose, transl, self.padding)

    def mesh(self, vertices: Array, first_texture: int, instance: int) -> Mesh:
        """A mesh of posed vertices; its two charts are the textures `first_texture` and the next one."""
        faces, uv, behind = _layout()
        return Mesh(
            vertices,
            vertex_normals(vertices, faces),
            faces,
            uv,
            (first_texture + behind).astype(np.int16),
            np.full(len(faces), instance, np.uint8),
            np.ones(len(faces), np.bool_),
        )


def dress(outfit: Outfit, body: Body | None = None) -> Dressed:
    """Dress the embedded body (or another one in the same layout) in an outfit."""
    body = body or load_body()
    normals = vertex_normals(body.v_template, body.f.astype(np.int32))
    x, y = np.abs(body.v_template[:, 0]), body.v_template[:, 1]
    hair = _hair(body.v_template[:, 0], y, normals[:, 2] < 0.15, outfit, soft=0.02)
    shoe = smoothstep(-1.10, -1.13, y)
    cloth = np.maximum(_top(x, y, outfit), _bottom(x, y, outfit)) * (1 - shoe)
    thickness = 0.022 * hair + (0.004 + outfit.loose * _slack(y)) * cloth + 0.008 * shoe
    padding = normals * thickness[:, None]
    padding[:, 1] *= 1 - shoe  # soles stay on the floor
    return Dressed(body, outfit, padding)


@lru_cache(maxsize=16)
def _charts(outfit: Outfit) -> tuple[Texture, Texture]:
    return texture(_chart(outfit, front=True)), texture(_chart(outfit, front=False))


@lru_cache(maxsize=1)
def _layout() -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int64]]:
    """Faces, their uv (F, 3, 2) in the charts, and which chart (0 front, 1 back)."""
    body = load_body()
    faces = body.f.astype(np.int32)
    corners = body.v_template[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    uv = np.stack([(corners[..., 0] - _LEFT) / _SPAN, (_TOP - corners[..., 1]) / _SPAN], -1).astype(np.float32)
    return faces, uv, (normal[:, 2] < 0).astype(np.int64)


def _slack(y: Array) -> Array:
    return 0.6 + 0.8 * np.abs(np.sin(y * 5.0))


def _top(x: Array, y: Array, outfit: Outfit) -> Array:
    body = (y > outfit.waist) & (y < 0.285)
    return np.where(x > 0.165, (x < outfit.sleeve) & (y > 0.0), body).astype(np.float64)


def _bottom(x: Array, y: Array, outfit: Outfit) -> Array:
    return ((y <= outfit.waist) & (y > outfit.hem) & (x < 0.3)).astype(np.float64)


def _hair(x: Array, y: Array, behind: NDArray[np.bool_] | bool, outfit: Outfit, soft: float = 0.004) -> Array:
    """Share of hair: a cap above the hairline, the back of the head, long hair down to the shoulders."""
    head = (np.abs(x) < 0.105) & (y > 0.22)
    hairline = 0.480 - 0.5 * np.maximum(np.abs(x) - 0.035, 0) ** 1.0 - 2.0 * np.maximum(np.abs(x) - 0.058, 0)
    nape = (0.24 if outfit.long_hair else 0.385) + 0 * x
    edge = np.where(behind, nape, hairline)
    return head * smoothstep(edge, edge + soft, y)


def _chart(outfit: Outfit, *, front: bool) -> NDArray[np.uint8]:
    """Paint one side of the rest pose."""
    rng = np.random.default_rng(outfit.seed + front)
    axis = (np.arange(TEXTURE_SIZE) + 0.5) / TEXTURE_SIZE * _SPAN
    x, y = np.meshgrid(_LEFT + axis, _TOP - axis)
    ax = np.abs(x)
    image = np.empty((TEXTURE_SIZE, TEXTURE_SIZE, 3))
    image[:] = outfit.skin
    image *= (1 + 0.05 * blur_noise(rng, 6))[..., None]
    folds = 1 + 0.13 * blur_noise(rng, 24) + 0.10 * blur_noise(rng, 60)
    neck = front and (outfit.neckline > 0)
    top = _top(ax, y, outfit) > 0
    if neck:
        top &= np.hypot(x, (y - 0.285) * 0.9) > outfit.neckline
    image[top] = (_print(outfit, x, y, front) * folds[..., None])[top]
    bottom = _bottom(ax, y, outfit) > 0
    cloth = np.broadcast_to(np.array(outfit.bottom, float), image.shape) * folds[..., None]
    if outfit.pattern == "flank":
        cloth = np.where((np.abs(ax - 0.165) < 0.02)[..., None], outfit.accent, cloth)
    image[bottom] = cloth[bottom]
    image[bottom & (y > outfit.waist - 0.025)] *= 0.6
    shoes = y < -1.115
    image[shoes] = outfit.shoes
    image[shoes & (y < -1.178)] = (228, 228, 224)
    hands = (ax > 0.72) & (y > 0)
    image[hands] *= 0.97
    if front:
        _face(image, x, y, outfit)
    hair = _hair(x, y, not front, outfit)[..., None]
    strands = 1 + 0.25 * blur_noise(rng, 90)[:1] + 0.1 * blur_noise(rng, 30)
    image = image * (1 - hair) + hair * np.array(outfit.hair) * strands[..., None]
    return clip_rgb(image)


def _print(outfit: Outfit, x: Array, y: Array, front: bool) -> Array:
    image = np.empty((*x.shape, 3))
    image[:] = outfit.top
    accent = np.array(outfit.accent, float)
    if outfit.pattern == "stripes":
        image[np.sin(y * 2 * np.pi / 0.055) > 0.25] = accent
    elif outfit.pattern == "bars":
        image[(y > 0.06) & (y < 0.15)] = accent
    elif outfit.pattern == "block":
        image[y < 0.03] = accent
    elif outfit.pattern == "print" and front:
        image[((np.abs(x) < 0.075) & (np.abs(y - 0.07) < 0.06)) | (np.hypot(x, y - 0.12) < 0.05)] = accent
    elif outfit.pattern == "flank":
        image[(np.abs(x) > 0.12) & (np.abs(x) < 0.16)] = accent
    return image


def _face(image: Array, x: Array, y: Array, outfit: Outfit) -> None:
    side = np.abs(x) - 0.032
    brow = (np.abs(side) < 0.017) & (np.abs(y - 0.450 + 4 * side**2) < 0.0045)
    image[brow] = np.array(outfit.hair) * 0.8
    image[(side / 0.0145) ** 2 + ((y - 0.430) / 0.0075) ** 2 < 1] = (232, 230, 226)
    image[side**2 + (y - 0.430) ** 2 < 0.0068**2] = (40, 30, 26)
    lips = (x / 0.025) ** 2 + ((y - 0.357) / 0.0085) ** 2 < 1
    image[lips] = np.array(outfit.skin) * (0.80, 0.52, 0.52)
    image[(np.hypot(np.abs(x) - 0.009, y - 0.384) < 0.004)] *= 0.6
