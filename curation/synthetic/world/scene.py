"""Places: rooms, studios, streets, parks and stages with things in them, each from a seed.

A place is built around the origin with its open side toward +z, where cameras stand; walls are seen from inside
only, so a camera may stand behind one. Things of the four classes that the demo detector knows are instances; all
else is backdrop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from curation.render.raster import Light, Mesh, merge, vertex_normals
from curation.synthetic.world import paint
from curation.synthetic.world.paint import Colour, Paint, Painter

Array = NDArray[np.float64]
CLASSES = ("person", "chair", "potted plant", "sports ball")
FIRST_OBJECT = 16  # instance ids: 0 backdrop, 1 to 15 people, from here things


@dataclass(frozen=True)
class Thing:
    """A movable object: its instance id, its class and the circle on the floor that it occupies, metres."""

    instance: int
    name: str
    x: float
    z: float
    radius: float


@dataclass(frozen=True, eq=False)
class Scene:
    """A place: one mesh, the paints of its textures, its light and the things in it."""

    kind: str
    mesh: Mesh
    paints: tuple[Paint, ...]
    light: Light
    things: tuple[Thing, ...]


class Builder:
    """Collects meshes and the paints they use."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.meshes: list[Mesh] = []
        self.paints: list[Paint] = []
        self.things: list[Thing] = []

    def texture(self, painter: Painter, colour: Colour, vary: float = 0.12) -> int:
        """A texture in about this colour; returns its id."""
        tinted = np.clip(np.array(colour) * (1 + self.rng.uniform(-vary, vary, 3)), 5, 250).astype(int)
        chosen = (int(tinted[0]), int(tinted[1]), int(tinted[2]))
        self.paints.append(Paint(painter, chosen, int(self.rng.integers(2**31))))
        return len(self.paints) - 1

    def quad(
        self, corner: Array, right: Array, up: Array, texture: int, repeat: float | None, instance: int = 0
    ) -> None:
        """A flat parallelogram that faces right x up. repeat: metres per texture, or None to show the texture once."""
        corner, right, up = (np.asarray(v, float) for v in (corner, right, up))
        vertices = np.array([corner, corner + right, corner + right + up, corner + up])
        normal = np.cross(right, up)
        wide, high = (np.linalg.norm(v) / repeat if repeat else 1.0 for v in (right, up))
        uv = np.array([[0, high], [wide, high], [wide, 0], [0, 0]], np.float32)
        faces = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
        self._add(
            vertices,
            np.tile(normal / np.linalg.norm(normal), (4, 1)),
            faces,
            uv[faces],
            texture,
            instance,
            instance > 0,
        )

    def box(
        self,
        centre: tuple[float, float, float],
        size: tuple[float, float, float],
        texture: int,
        repeat: float | None = 1.0,
        yaw: float = 0.0,
        instance: int = 0,
        casts: bool = True,
    ) -> None:
        """A box about its centre, turned about y."""
        c, s = np.cos(yaw), np.sin(yaw)
        axes = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]) * np.array(size)[:, None] / 2
        for axis in range(3):
            for sign in (1, -1):
                a, b = axes[(axis + 1) % 3], axes[(axis + 2) % 3]
                right, up = (a, b) if axis == 2 else ((b, a) if axis == 0 else (a, b))
                flip = sign * np.sign(np.dot(np.cross(right, up), axes[axis]))
                right = right * flip
                self.quad(
                    np.array(centre) + sign * axes[axis] - right - up, 2 * right, 2 * up, texture, repeat, instance
                )
                if not casts or instance == 0:
                    self.meshes[-1] = replace(self.meshes[-1], casts=np.full(2, casts))

    def round(
        self,
        base: tuple[float, float, float],
        profile: Array,
        texture: int,
        repeat: tuple[float, float] = (1.0, 1.0),
        instance: int = 0,
        casts: bool = True,
        segments: int = 14,
    ) -> None:
        """A surface of revolution about y; profile (K, 2): radius and height from bottom to top."""
        angle = np.linspace(0, 2 * np.pi, segments + 1)
        radius, height = profile.T
        x, z = radius[:, None] * np.sin(angle), radius[:, None] * np.cos(angle)
        vertices = np.stack([x, np.broadcast_to(height[:, None], x.shape), z], -1).reshape(-1, 3) + base
        u, v = np.meshgrid(angle / (2 * np.pi) * repeat[0], np.linspace(repeat[1], 0, len(profile)))
        uv = np.stack([u, v], -1).reshape(-1, 2).astype(np.float32)
        index = np.arange((len(profile) - 1) * (segments + 1)).reshape(-1, segments + 1)[:, :-1].reshape(-1)
        up = index + segments + 1
        faces = np.concatenate([np.stack([index, index + 1, up + 1], 1), np.stack([index, up + 1, up], 1)]).astype(
            np.int32
        )
        self._add(vertices, vertex_normals(vertices, faces), faces, uv[faces], texture, instance, casts)

    def ball(
        self, centre: tuple[float, float, float], radii: tuple[float, float], texture: int, instance: int = 0
    ) -> None:
        """A spheroid of horizontal and vertical radius."""
        angle = np.linspace(-np.pi / 2, np.pi / 2, 11)
        profile = np.column_stack([np.cos(angle) * radii[0], np.sin(angle) * radii[1]])
        self.round(centre, profile, texture, (2.0, 1.0), instance, segments=18)

    def _add(
        self,
        vertices: Array,
        normals: Array,
        faces: NDArray[np.int32],
        uv: NDArray[np.float32],
        texture: int,
        instance: int,
        casts: bool,
    ) -> None:
        count = len(faces)
        self.meshes.append(
            Mesh(
                vertices,
                normals,
                faces,
                uv,
                np.full(count, texture, np.int16),
                np.full(count, instance, np.uint8),
                np.full(count, casts),
            )
        )

    # things with a class

    def _thing(self, name: str, x: float, z: float, radius: float) -> int:
        instance = FIRST_OBJECT + len(self.things)
        self.things.append(Thing(instance, name, x, z, radius))
        return instance

    def chair(self, x: float, z: float, yaw: float, scale: float = 1.0) -> int:
        """A chair with a back; returns its instance id."""
        instance = self._thing("chair", x, z, 0.35 * scale)
        colour = self.colour(((150, 100, 60), (60, 60, 66), (190, 60, 50), (210, 205, 195), (60, 90, 130)))
        texture = self.texture(paint.plaster, colour)
        c, s = np.cos(yaw), np.sin(yaw)

        def part(dx: float, y: float, dz: float, size: tuple[float, float, float]) -> None:
            at = (x + (dx * c + dz * s) * scale, y * scale, z + (-dx * s + dz * c) * scale)
            self.box(at, (size[0] * scale, size[1] * scale, size[2] * scale), texture, 1.0, yaw, instance)

        part(0, 0.46, 0, (0.46, 0.06, 0.46))
        part(0, 0.76, -0.21, (0.44, 0.36, 0.04))
        for dx in (-0.2, 0.2):
            part(dx, 0.22, 0.2, (0.045, 0.44, 0.045))
            part(dx, 0.38, -0.21, (0.045, 0.76, 0.045))
        return instance

    def plant(self, x: float, z: float, height: float = 1.2) -> int:
        """A pot with long leaves; returns its instance id."""
        instance = self._thing("potted plant", x, z, 0.35)
        pot = self.texture(paint.speckle, self.colour(((178, 92, 60), (220, 216, 208), (60, 64, 70))))
        leaf = self.texture(paint.leaves, self.colour(((52, 110, 48), (80, 130, 60), (40, 90, 64))))
        self.round(
            (x, 0, z),
            np.array([[0.0, 0.0], [0.13, 0.0], [0.19, 0.32], [0.17, 0.33], [0.0, 0.30]]),
            pot,
            (2, 1),
            instance,
        )
        for _ in range(18):
            turn, lean = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(0.15, 0.9)
            length = (height - 0.3) * self.rng.uniform(0.6, 1.0)
            out = np.array([np.sin(turn), 0, np.cos(turn)])
            root = np.array([x, 0.30, z]) + out * 0.04
            mid = root + length * 0.6 * (out * np.sin(lean * 0.5) + np.array([0, np.cos(lean * 0.5), 0]))
            tip = mid + length * 0.5 * (out * np.sin(lean) + np.array([0, np.cos(lean) - 0.25, 0]))
            side = np.cross(out, [0, 1.0, 0]) * 0.055
            for low, high, near, far in ((root, mid, 0.35, 1.0), (mid, tip, 1.0, 0.15)):
                strip = np.array([low - side * near, low + side * near, high + side * far, high - side * far])
                for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
                    vertices = strip[list(order)]
                    faces = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
                    uv = np.array([[0, 0], [0.2, 0], [0.2, 0.5], [0, 0.5]], np.float32)[faces]
                    self._add(vertices, vertex_normals(vertices, faces), faces, uv, leaf, instance, True)
        return instance

    def toy_ball(self, x: float, y: float, z: float, radius: float = 0.13) -> int:
        """A ball of six panels; returns its instance id."""
        instance = self._thing("sports ball", x, z, radius)
        texture = self.texture(
            paint.panels, self.colour(((220, 110, 40), (40, 90, 190), (200, 40, 50), (240, 200, 60)))
        )
        self.ball((x, y, z), (radius, radius), texture, instance)
        return instance

    def colour(self, choices: tuple[Colour, ...]) -> Colour:
        """One of these colours."""
        return choices[int(self.rng.integers(len(choices)))]

    # backdrop

    def floor(self, texture: int, repeat: float, reach: float = 14.0) -> None:
        """A floor about the origin, in pieces so that none is much larger than the picture."""
        cells = np.linspace(-reach, reach, 5)
        step = cells[1] - cells[0]
        for x in cells[:-1]:
            for z in cells[:-1]:
                self.quad(np.array([x, 0, z + step]), np.array([step, 0, 0]), np.array([0, 0, -step]), texture, repeat)

    def room(self, wide: float, deep: float, high: float, wall: int, repeat: float, ceiling: int) -> None:
        """Back and side walls, ceiling and skirting; the front is open."""
        far = -deep
        self.quad(np.array([-wide, 0, far]), np.array([2 * wide, 0, 0]), np.array([0, high, 0]), wall, repeat)
        self.quad(np.array([-wide, 0, 9]), np.array([0, 0, far - 9]), np.array([0, high, 0]), wall, repeat)
        self.quad(np.array([wide, 0, far]), np.array([0, 0, 9 - far]), np.array([0, high, 0]), wall, repeat)
        self.quad(np.array([-wide, high, far]), np.array([2 * wide, 0, 0]), np.array([0, 0, 9 - far]), ceiling, 2.0)
        board = self.texture(paint.plaster, (236, 234, 228))
        self.box((0, 0.05, far + 0.01), (2 * wide, 0.1, 0.03), board, casts=False)
        for side in (-1, 1):
            self.box((side * (wide - 0.01), 0.05, (9 + far) / 2), (0.03, 0.1, 9 - far), board, casts=False)

    def picture(self, x: float, y: float, z: float, wide: float, high: float, texture: int) -> None:
        """A flat picture on a wall that faces +z."""
        self.quad(
            np.array([x - wide / 2, y - high / 2, z]), np.array([wide, 0, 0]), np.array([0, high, 0]), texture, None
        )

    def tree(self, x: float, z: float, height: float) -> None:
        """A trunk and a few spheroids of leaves."""
        bark = self.texture(paint.speckle, (96, 76, 58))
        crown = self.texture(paint.leaves, self.colour(((62, 104, 44), (84, 120, 56), (110, 112, 50))))
        self.round(
            (x, 0, z), np.array([[0.22, 0.0], [0.15, height * 0.3], [0.10, height * 0.65]]), bark, (2, 3), casts=False
        )
        for _ in range(5):
            dx, dy, dz = self.rng.uniform(-0.9, 0.9, 3)
            size = height * self.rng.uniform(0.14, 0.24)
            self.ball((x + dx, height * 0.72 + dy * 0.8, z + dz), (size * 1.2, size), crown)
            self.meshes[-1] = replace(self.meshes[-1], casts=np.zeros(len(self.meshes[-1].faces), np.bool_))

    def build(self, kind: str, light: Light) -> Scene:
        """Everything as one scene."""
        return Scene(kind, merge(self.meshes), tuple(self.paints), light, tuple(self.things))


_WALLS: tuple[Colour, ...] = (
    (226, 220, 208),
    (196, 208, 214),
    (214, 196, 176),
    (176, 196, 180),
    (230, 230, 232),
    (150, 166, 186),
    (206, 178, 168),
)


def _studio(b: Builder) -> Light:
    rng = b.rng
    b.floor(b.texture(paint.planks, (190, 142, 92)), 1.3)
    far = rng.uniform(2.2, 3.4)
    b.room(
        rng.uniform(3.6, 5),
        far,
        3.2,
        b.texture(paint.plaster, b.colour(_WALLS)),
        3.0,
        b.texture(paint.plaster, (238, 238, 236)),
    )
    glass = b.texture(paint.window, (214, 228, 240), 0.03)
    for x in np.arange(-3.2, 3.3, 1.6) + rng.uniform(-0.2, 0.2):
        if rng.random() < 0.75:
            b.picture(float(x), 1.75, -far + 0.01, 1.15, 1.5, glass)
    if rng.random() < 0.7:
        rail = b.texture(paint.plaster, (150, 106, 66))
        b.box((0, 1.02, -far + 0.14), (6.6, 0.05, 0.05), rail, casts=False)
        for x in (-3, -1, 1, 3):
            b.box((x, 0.5, -far + 0.14), (0.04, 1.0, 0.04), rail, casts=False)
    box = b.texture(paint.speckle, (36, 36, 40))
    b.box((-3.1, 0.45, -far + 0.45), (0.42, 0.9, 0.4), box)
    return Light(
        toward=(rng.uniform(-0.5, 0.5), 0.9, rng.uniform(0.2, 0.5)), sun=(0.62, 0.60, 0.56), sky=(0.55, 0.55, 0.55)
    )


def _living(b: Builder) -> Light:
    rng = b.rng
    painter, colour = (paint.planks, (150, 104, 66)) if rng.random() < 0.6 else (paint.speckle, (168, 158, 146))
    b.floor(b.texture(painter, colour), 1.2)
    far = rng.uniform(1.9, 2.9)
    b.room(
        rng.uniform(2.8, 3.8),
        far,
        2.6,
        b.texture(paint.plaster, b.colour(_WALLS)),
        2.5,
        b.texture(paint.plaster, (240, 238, 232)),
    )
    b.quad(
        np.array([-1.3, 0.006, 1.0]),
        np.array([2.6, 0, 0]),
        np.array([0, 0, -1.9]),
        b.texture(paint.speckle, b.colour(((130, 60, 60), (90, 110, 130), (190, 176, 150)))),
        1.0,
    )
    b.picture(rng.uniform(-0.9, 0.9), 1.65, -far + 0.01, 0.9, 0.65, b.texture(paint.poster, b.colour(_WALLS)))
    b.picture(-1.9, 1.5, -far + 0.01, 1.0, 1.3, b.texture(paint.window, (206, 222, 238), 0.03))
    cloth = b.texture(paint.curtain, b.colour(((170, 150, 130), (120, 136, 150), (176, 110, 96))))
    for x in (-2.6, -1.25):
        b.picture(x, 1.2, -far + 0.03, 0.38, 2.3, cloth)
    b.box((2.0, 0.95, -far + 0.2), (1.0, 1.9, 0.36), b.texture(paint.books, (120, 84, 54)), None)
    b.box((-2.2, 0.3, -far + 0.3), (1.2, 0.6, 0.45), b.texture(paint.planks, (120, 84, 54)))
    return Light(
        toward=(rng.uniform(-0.6, 0.6), 0.85, 0.45),
        sun=(0.55, 0.50, 0.42),
        sky=(0.52, 0.50, 0.47),
        ground=(0.3, 0.26, 0.22),
    )


def _street(b: Builder) -> Light:
    rng = b.rng
    b.floor(b.texture(paint.speckle, (104, 104, 106)), 2.0, 30)
    far = rng.uniform(4, 6.5)
    b.box((0, 0.06, -far + 1.2), (60, 0.12, 2.4), b.texture(paint.tiles, (166, 162, 154)), 1.2, casts=False)
    x = -22.0
    while x < 22:
        wide, high = rng.uniform(5, 8), rng.uniform(6, 11)
        painter = paint.facade if rng.random() < 0.75 else paint.bricks
        front = b.texture(
            painter, b.colour(((196, 176, 150), (170, 150, 140), (150, 90, 70), (186, 190, 192), (206, 196, 168)))
        )
        b.box(
            (x + wide / 2, high / 2, -far - 3),
            (wide, high, 6),
            front,
            5.5 if painter is paint.facade else 2.5,
            casts=False,
        )
        door = b.texture(paint.plaster, b.colour(((70, 50, 40), (40, 66, 60), (110, 36, 36))))
        b.box((x + wide * rng.uniform(0.2, 0.8), 1.1, -far + 0.02), (1.0, 2.1, 0.08), door, casts=False)
        x += wide
    post = b.texture(paint.speckle, (60, 62, 64))
    for x in (-6.5, 4.5):
        b.round(
            (x + rng.uniform(-1, 1), 0, -far + 2.2),
            np.array([[0.09, 0.0], [0.06, 0.6], [0.05, 4.5], [0.0, 4.5]]),
            post,
            casts=False,
        )
    if rng.random() < 0.6:
        b.tree(rng.choice([-4.5, 4.8]), -far + 1.6, rng.uniform(4, 5.5))
    return Light(toward=(rng.uniform(-0.7, 0.7), 0.8, rng.uniform(0.1, 0.7)), sun=(0.95, 0.88, 0.75))


def _park(b: Builder) -> Light:
    rng = b.rng
    b.floor(b.texture(paint.grass, b.colour(((92, 128, 58), (110, 132, 66)))), 2.4, 40)
    b.quad(
        np.array([-40, 0.008, 1.4]),
        np.array([80, 0, 0]),
        np.array([0, 0, -2.6]),
        b.texture(paint.speckle, (184, 170, 146)),
        2.0,
    )
    hedge = b.texture(paint.leaves, (58, 92, 44))
    b.box((0, 0.7, -rng.uniform(8, 12)), (60, 1.4, 1.2), hedge, 1.5, casts=False)
    for _ in range(7):
        b.tree(rng.uniform(-12, 12), -rng.uniform(5.5, 14), rng.uniform(4, 7))
    return Light(
        toward=(rng.uniform(-0.7, 0.7), 0.8, rng.uniform(0.1, 0.7)), sun=(1.0, 0.92, 0.78), ground=(0.2, 0.24, 0.15)
    )


def _stage(b: Builder) -> Light:
    rng = b.rng
    b.floor(b.texture(paint.planks, (96, 74, 58)), 1.5)
    far = rng.uniform(2.4, 3.6)
    drape = b.texture(paint.curtain, b.colour(((150, 26, 36), (30, 36, 90), (60, 60, 64), (90, 30, 90))))
    for x in np.arange(-15, 15, 2.5):
        b.quad(np.array([x, 0, -far]), np.array([2.5, 0, 0]), np.array([0, 4.5, 0]), drape, None)
    b.quad(
        np.array([-15, 4.5, -far]),
        np.array([30, 0, 0]),
        np.array([0, 0, 14]),
        b.texture(paint.plaster, (30, 28, 30)),
        2.0,
    )
    box = b.texture(paint.speckle, (28, 28, 30))
    for x in (-3.4, 3.4):
        b.box((x, 0.8, -far + 0.6), (0.6, 1.6, 0.5), box)
    return Light(
        toward=(rng.uniform(-0.3, 0.3), 0.8, 0.6),
        sun=(1.05, 0.98, 0.86),
        sky=(0.26, 0.25, 0.30),
        ground=(0.12, 0.10, 0.10),
    )


def _gym(b: Builder) -> Light:
    rng = b.rng
    b.floor(b.texture(paint.tiles, b.colour(((120, 130, 140), (90, 110, 150), (140, 150, 130)))), 2.4)
    far = rng.uniform(2.6, 4)
    b.room(
        rng.uniform(4, 5.5),
        far,
        3.8,
        b.texture(paint.bricks, b.colour(((168, 110, 88), (210, 206, 196), (150, 130, 120)))),
        2.2,
        b.texture(paint.speckle, (120, 122, 126)),
    )
    bars = b.texture(paint.planks, (176, 130, 84))
    start = rng.choice([-3.3, 1.6])
    for i in range(10):
        b.box((start + 0.9, 0.35 + i * 0.24, -far + 0.12), (1.8, 0.045, 0.05), bars, casts=False)
    for x in (start, start + 1.8):
        b.box((x, 1.35, -far + 0.08), (0.08, 2.7, 0.12), bars, casts=False)
    mat = b.texture(paint.plaster, b.colour(((40, 90, 160), (150, 40, 46), (60, 120, 80))))
    b.quad(np.array([-1.6, 0.012, 1.2]), np.array([3.2, 0, 0]), np.array([0, 0, -2.4]), mat, 2.0)
    b.box((-start, 0.25, -far + 0.5), (1.4, 0.5, 0.5), mat)
    return Light(toward=(rng.uniform(-0.4, 0.4), 0.9, 0.35), sun=(0.58, 0.58, 0.58), sky=(0.55, 0.56, 0.58))


def _backdrop(b: Builder) -> Light:
    rng = b.rng
    paper = b.texture(
        paint.plaster,
        b.colour(((196, 200, 206), (90, 120, 160), (200, 150, 150), (90, 150, 130), (222, 196, 130))),
        0.05,
    )
    far = rng.uniform(1.8, 2.6)
    b.floor(paper, 4.0, 40)
    angle = np.linspace(0, np.pi / 2, 7)
    curve = np.column_stack([1 - np.cos(angle), np.sin(angle)])
    for (y0, z0), (y1, z1) in pairwise(curve):
        b.quad(np.array([-40, y0, -far - z0]), np.array([80, 0, 0]), np.array([0, y1 - y0, z0 - z1]), paper, 4.0)
    b.quad(np.array([-40, 1, -far - 1]), np.array([80, 0, 0]), np.array([0, 7, 0]), paper, 4.0)
    return Light(
        toward=(rng.uniform(-0.5, 0.5), 0.75, 0.6),
        sun=(0.6, 0.6, 0.6),
        sky=(0.55, 0.55, 0.56),
        ground=(0.36, 0.36, 0.36),
    )


KINDS: dict[str, Callable[[Builder], Light]] = {
    "studio": _studio,
    "living": _living,
    "street": _street,
    "park": _park,
    "stage": _stage,
    "gym": _gym,
    "backdrop": _backdrop,
}
Furnish = Callable[[Builder], None]


def build_scene(kind: str, seed: int, furnish: Furnish | None = None) -> Scene:
    """A place of one of KINDS; `furnish` may put chairs, plants and balls into it."""
    empty, light = _empty(kind, seed)
    builder = Builder(np.random.default_rng(seed + 1))
    builder.meshes, builder.paints = list(empty.meshes), list(empty.paints)
    if furnish is not None:
        furnish(builder)
    return builder.build(kind, light)


@lru_cache(maxsize=4)
def _empty(kind: str, seed: int) -> tuple[Builder, Light]:
    """The place without things, shared by many takes."""
    builder = Builder(np.random.default_rng(seed))
    return builder, KINDS[kind](builder)
