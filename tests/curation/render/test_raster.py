"""The renderer against geometry that is known exactly."""

import hashlib
import subprocess
import sys
import time

import numpy as np
import pytest

from curation.render.raster import (
    TEXTURE_SIZE,
    Camera,
    Light,
    Mesh,
    merge,
    render,
    render_depth,
    texture,
    vertex_normals,
)

SIZE = (320, 180)
GREY = np.stack([texture(np.full((TEXTURE_SIZE, TEXTURE_SIZE, 3), 180, np.uint8))])


def mesh_of(vertices, faces, instance=1):
    faces = np.asarray(faces, np.int32)
    vertices = np.asarray(vertices, float)
    count = len(faces)
    return Mesh(
        vertices,
        vertex_normals(vertices, faces),
        faces,
        np.zeros((count, 3, 2), np.float32),
        np.zeros(count, np.int16),
        np.full(count, instance, np.uint8),
        np.ones(count, bool),
    )


def looking_along_minus_z(focal=200.0, size=SIZE):
    """A camera at the origin that sees the world's -z; up stays up."""
    intrinsics = np.array([[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1]])
    return Camera(intrinsics, np.diag([1.0, -1.0, -1.0, 1.0]), size)


def sphere(centre, radius, steps=220):
    polar, around = np.linspace(0, np.pi, steps), np.linspace(0, 2 * np.pi, 2 * steps, endpoint=False)
    t, p = np.meshgrid(polar, around, indexing="ij")
    points = np.stack([np.sin(t) * np.sin(p), np.cos(t), np.sin(t) * np.cos(p)], -1).reshape(-1, 3)
    index = np.arange(steps * 2 * steps).reshape(steps, 2 * steps)
    right = np.roll(index, -1, 1)
    faces = [np.stack([index[:-1], index[1:], right[1:]], -1), np.stack([index[:-1], right[1:], right[:-1]], -1)]
    return mesh_of(points * radius + centre, np.concatenate([f.reshape(-1, 3) for f in faces]))


def rays(camera):
    x, y = np.meshgrid(np.arange(camera.size[0]) + 0.5, np.arange(camera.size[1]) + 0.5)
    k = camera.intrinsics
    return np.stack([(x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1], np.ones_like(x)], -1)


def test_depth_of_a_sphere():
    camera = looking_along_minus_z()
    centre, radius = np.array([0.4, 0.2, -4.0]), 1.0
    depth, _ = render_depth(sphere(centre, radius), camera)
    ray, middle = rays(camera), camera.to_camera(centre)
    a, b, c = (ray**2).sum(-1), -2 * ray @ middle, middle @ middle - radius**2
    inside = b**2 - 4 * a * c
    exact = np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / (2 * a), 0)
    core = inside > 0.05 * inside.max()  # at the very rim the polyhedron's outline is not the sphere's
    assert core.sum() > 5000
    assert np.abs(depth - exact)[core].max() < 1e-3
    assert (depth[inside < -0.02 * inside.max()] == 0).all()


def test_depth_of_a_plane_that_passes_beneath_the_camera():
    camera = looking_along_minus_z()
    corners = np.array([[-50, -1.2, 50], [50, -1.2, 50], [50, -1.2, -50], [-50, -1.2, -50]])
    depth, triangle = render_depth(mesh_of(corners, [[0, 1, 2], [0, 2, 3]]), camera)
    down = rays(camera)[..., 1]
    exact = np.where(down > 1.2 / 50, 1.2 / np.maximum(down, 1e-9), 0)
    hit = (exact > 0) & (exact < 49)
    assert np.abs(depth / np.where(hit, exact, 1) - 1)[hit].max() < 1e-6  # corners behind the camera are no trouble
    assert (triangle[down < 0] == -1).all()


def test_shared_edges_leave_no_holes():
    rng = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(np.linspace(-3, 3, 24), np.linspace(-2, 2, 24)), -1).reshape(-1, 2)
    inner = (np.abs(grid[:, 0]) < 2.9) & (np.abs(grid[:, 1]) < 1.9)
    grid[inner] += rng.uniform(-0.05, 0.05, (inner.sum(), 2))
    points = np.column_stack([grid, -3 + 0.2 * np.sin(grid[:, 0] * 3)])
    index = np.arange(24 * 24).reshape(24, 24)
    a, b, c, d = (part.reshape(-1) for part in (index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]))
    mesh = mesh_of(points, np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)]))
    _, triangle = render_depth(mesh, looking_along_minus_z(260.0))
    assert (triangle >= 0).all()


def test_nearer_things_hide_farther_ones_and_backs_are_not_drawn():
    near, far = sphere(np.array([0, 0, -3.0]), 0.5, 40), sphere(np.array([0, 0, -6.0]), 1.5, 40)
    far.instance[:] = 2
    camera = looking_along_minus_z()
    rendered = render(merge([far, near]), camera, GREY, Light())
    assert rendered.instances[90, 160] == 1 and rendered.depth_m[90, 160] == np.float32(rendered.depth_m[90, 160])
    assert abs(rendered.depth_m[90, 160] - 2.5) < 0.01
    assert set(np.unique(rendered.instances)) == {0, 1, 2}
    inverted = mesh_of(near.vertices, near.faces[:, ::-1])
    depth, _ = render_depth(inverted, camera)
    assert depth[90, 160] > 3.4  # seen from behind: only the far side's inner face remains


def test_light_casts_shadow_on_the_floor():
    floor = mesh_of([[-9, -1, 1], [9, -1, 1], [9, -1, -20], [-9, -1, -20]], [[0, 1, 2], [0, 2, 3]], 0)
    floor.casts[:] = False
    ball = sphere(np.array([0, 0.2, -5.0]), 0.5, 40)
    lit = render(merge([floor, ball]), looking_along_minus_z(), GREY, Light(toward=(0, 1, 0)))
    under = looking_along_minus_z().project(np.array([0, -1, -5.0])).astype(int)
    beside = looking_along_minus_z().project(np.array([2, -1, -5.0])).astype(int)
    assert lit.rgb[under[1], under[0]].mean() < 0.75 * lit.rgb[beside[1], beside[0]].mean()


_FRAME = """
import hashlib
from curation.synthetic.clips import ClipPlan, shoot
frame = shoot(ClipPlan("x", "good", 11, (256, 144), 12, 1.0)).frame(5)
print(hashlib.sha256(frame.rendered.depth_m.tobytes() + frame.rendered.instances.tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_same_seed_same_pixels_in_a_fresh_process():
    from curation.synthetic.clips import ClipPlan, shoot

    frame = shoot(ClipPlan("x", "good", 11, (256, 144), 12, 1.0)).frame(5)
    here = hashlib.sha256(frame.rendered.depth_m.tobytes() + frame.rendered.instances.tobytes()).hexdigest()
    there = subprocess.run([sys.executable, "-c", _FRAME], capture_output=True, text=True, check=True).stdout.strip()
    assert there == here


def test_it_is_not_slow():
    from curation.synthetic.clips import ClipPlan, shoot

    footage = shoot(ClipPlan("x", "good", 11, (960, 540), 12, 1.0))
    footage.frame(0)
    start = time.process_time()
    for index in range(1, 7):
        footage.frame(index, measure=False)
    # about 15 on an idle core; far less only on a loaded machine, and never as little as this
    assert 6 / (time.process_time() - start) > 3
