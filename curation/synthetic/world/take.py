"""A take: dancers and things in a place, filmed without a break; each frame with the truth of what it shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from curation.render.body import Posed
from curation.render.raster import Camera, Mesh, Rendered, merge, render, render_depth
from curation.synthetic.world.motion import Motion
from curation.synthetic.world.paint import Paint, painted
from curation.synthetic.world.scene import Builder, Scene
from curation.synthetic.world.wardrobe import Dressed

Array = NDArray[np.float64]
HELD = 250  # instance id of a thing in a hand


@dataclass(frozen=True, eq=False)
class Dancer:
    """One dancer: looks, and motion over the take's times."""

    dressed: Dressed
    motion: Motion


@dataclass(frozen=True, eq=False)
class Held:
    """A thing in the first dancer's left (0) or right (1) hand; mesh about the origin, radius in metres."""

    mesh: Mesh
    paint: Paint
    name: str
    hand: int
    radius: float


@dataclass(frozen=True, eq=False)
class Seen:
    """One person or thing in one frame.

    box: xyxy of the whole in image coordinates, including hidden parts and parts outside the picture. visible: xyxy of
    its visible pixels, or None. shown: visible pixels as a share of those that it would have if nothing hid it.
    """

    instance: int
    name: str
    box: Array
    visible: Array | None
    shown: float


@dataclass(frozen=True, eq=False)
class Frame:
    """A rendered frame, its camera, what is seen in it (people first), and every dancer's posed body."""

    rendered: Rendered
    camera: Camera
    seen: tuple[Seen, ...]
    bodies: tuple[Posed, ...]


@dataclass(frozen=True, eq=False)
class Take:
    """One unbroken shot: a place, dancers, cameras and times (all of one length N)."""

    scene: Scene
    dancers: tuple[Dancer, ...]
    cameras: tuple[Camera, ...]
    times_s: Array
    held: Held | None = None

    @cached_property
    def textures(self) -> NDArray[np.uint8]:
        """The scene's textures, then two charts per dancer, then the held thing's; stacked."""
        held = [painted(self.held.paint)] if self.held else []
        charts = [chart for dancer in self.dancers for chart in dancer.dressed.charts]
        return np.stack([*(painted(one) for one in self.scene.paints), *charts, *held])

    @cached_property
    def _things(self) -> list[tuple[str, Mesh]]:
        return [(thing.name, _only(self.scene.mesh, thing.instance)) for thing in self.scene.things]

    def posed(self, index: int) -> tuple[Posed, ...]:
        """Every dancer's body in one frame."""
        return tuple(
            dancer.dressed.pose(dancer.motion.betas, dancer.motion.pose[index], dancer.motion.transl[index])
            for dancer in self.dancers
        )

    def frame(self, index: int, *, measure: bool = True) -> Frame:
        """Render one frame and, if asked, measure what is seen in it."""
        bodies, camera = self.posed(index), self.cameras[index]
        parts = self._moving(bodies)
        contacts = [_contacts(body) for body in bodies]
        rendered = render(
            merge([self.scene.mesh, *(mesh for _, mesh in parts)]),
            camera,
            self.textures,
            self.scene.light,
            np.concatenate(contacts) if contacts else None,
        )
        return Frame(rendered, camera, tuple(self._seen(parts, camera, rendered)) if measure else (), bodies)

    def depth(self, index: int) -> NDArray[np.float32]:
        """(H, W) metric depth of one frame, 0 where nothing is hit; as in `frame`, without colour."""
        moving = [mesh for _, mesh in self._moving(self.posed(index))]
        return render_depth(merge([self.scene.mesh, *moving]), self.cameras[index])[0]

    def boxes(self, index: int) -> dict[int, Array]:
        """Instance id to box (xyxy, not clipped at the borders), from geometry alone, without rendering."""
        camera = self.cameras[index]
        return {int(mesh.instance[0]): _box(mesh, camera) for _, mesh in self._moving(self.posed(index)) + self._things}

    def _moving(self, bodies: tuple[Posed, ...]) -> list[tuple[str, Mesh]]:
        first = len(self.scene.paints)
        parts = [
            ("person", dancer.dressed.mesh(body.vertices, first + 2 * i, i + 1))
            for i, (dancer, body) in enumerate(zip(self.dancers, bodies, strict=True))
        ]
        if self.held is not None:
            hand, wrist = bodies[0].joints[22 + self.held.hand], bodies[0].joints[20 + self.held.hand]
            outward = (hand - wrist) / np.linalg.norm(hand - wrist)
            at = hand + outward * (0.05 + 0.9 * self.held.radius)
            number = np.full_like(self.held.mesh.texture, first + 2 * len(self.dancers))
            mesh = replace(self.held.mesh, vertices=self.held.mesh.vertices + at, texture=number)
            parts.append((self.held.name, mesh))
        return parts

    def _seen(self, parts: list[tuple[str, Mesh]], camera: Camera, rendered: Rendered) -> list[Seen]:
        seen = []
        for name, mesh in parts + self._things:
            instance = int(mesh.instance[0])
            rows, columns = np.nonzero(rendered.instances == instance)
            alone = int((render_depth(mesh, camera)[1] >= 0).sum())
            visible = None
            if len(rows):
                visible = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)
            seen.append(Seen(instance, name, _box(mesh, camera), visible, len(rows) / alone if alone else 0.0))
        return seen


def held_ball(seed: int, hand: int) -> Held:
    """A ball in a hand."""
    builder = Builder(np.random.default_rng(seed))
    builder.toy_ball(0, 0, 0, float(builder.rng.uniform(0.11, 0.16)))
    mesh = merge(builder.meshes)
    mesh = replace(mesh, instance=np.full_like(mesh.instance, HELD))
    return Held(mesh, builder.paints[0], "sports ball", hand, builder.things[0].radius)


def _box(mesh: Mesh, camera: Camera) -> Array:
    flat = camera.project(mesh.vertices)
    if np.isnan(flat).any():  # partly behind the camera: its box is the whole picture
        return np.array([0.0, 0.0, *camera.size])
    return np.concatenate([flat.min(0), flat.max(0)])


def _only(mesh: Mesh, instance: int) -> Mesh:
    keep = mesh.instance == instance
    used, faces = np.unique(mesh.faces[keep], return_inverse=True)
    return Mesh(
        mesh.vertices[used],
        mesh.normals[used],
        faces.reshape(-1, 3).astype(np.int32),
        mesh.uv[keep],
        mesh.texture[keep],
        mesh.instance[keep],
        mesh.casts[keep],
    )


def _contacts(body: Posed) -> Array:
    """Where feet and trunk darken the floor."""
    at = body.joints[[10, 11, 7, 8, 0]] * (1, 0, 1)
    lift = np.maximum(body.joints[[10, 11, 7, 8, 0], 1:2] - 0.1, 0)
    return np.column_stack([at, np.array([[0.18], [0.18], [0.16], [0.16], [0.40]]) + 0.3 * lift])
