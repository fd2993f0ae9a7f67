"""A z-buffer renderer in numba: colour, exact metric depth and instance ids, with no GL and no system library.

Triangles are rasterised in homogeneous form (edge functions of the camera-space corners), so nothing is ever clipped
and depth is exact: each pixel's ray, through its centre, meets the triangle's plane. Same input, same pixels. It
never moves anything and knows nothing about people. Frames: world y up; camera x right, y down, z forward (OpenCV);
pixel (row i, column j) has its centre at image coordinates (j + 0.5, i + 0.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.float64]
NEAR_M = 0.05
TEXTURE_SIZE = 512
_LEVELS = 8
_SHADOW_SIZE = 640
# gamma 2 instead of sRGB's curve: the square root at the end is cheap and close enough
_LINEAR = ((np.arange(256) / 255) ** 2).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles in the world, counter-clockwise seen from outside; their backs are not drawn.

    vertices (V, 3) m; normals (V, 3); faces (F, 3) int32; uv (F, 3, 2) in texture repeats; texture (F,) int16;
    instance (F,) uint8, 0 for faces of no object; casts (F,) bool, whether the face casts a shadow.
    """

    vertices: Array
    normals: Array
    faces: NDArray[np.int32]
    uv: NDArray[np.float32]
    texture: NDArray[np.int16]
    instance: NDArray[np.uint8]
    casts: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Camera:
    """intrinsics (3, 3) pixels; extrinsics (4, 4) world to camera, metres; size (width, height)."""

    intrinsics: Array
    extrinsics: Array
    size: tuple[int, int]

    def to_camera(self, points: Array) -> Array:
        """(..., 3) world to camera."""
        return points @ self.extrinsics[:3, :3].T + self.extrinsics[:3, 3]

    def project(self, points: Array) -> Array:
        """(..., 3) world to (..., 2) image coordinates; points behind the camera give NaN."""
        local = self.to_camera(points)
        depth = np.where(local[..., 2:] > NEAR_M, local[..., 2:], np.nan)
        scale = np.array([self.intrinsics[0, 0], self.intrinsics[1, 1]])
        return local[..., :2] / depth * scale + self.intrinsics[:2, 2]


@dataclass(frozen=True)
class Light:
    """A hemisphere light and one directional light; colours are linear RGB."""

    toward: tuple[float, float, float] = (0.4, 0.8, 0.45)
    sun: tuple[float, float, float] = (0.9, 0.85, 0.75)
    sky: tuple[float, float, float] = (0.45, 0.5, 0.58)
    ground: tuple[float, float, float] = (0.22, 0.2, 0.18)
    horizon: tuple[int, int, int] = (215, 222, 230)
    zenith: tuple[int, int, int] = (120, 160, 215)


@dataclass(frozen=True, eq=False)
class Rendered:
    """rgb (H, W, 3) uint8; depth_m (H, W) float32, 0 where nothing is hit; instances (H, W) uint8."""

    rgb: NDArray[np.uint8]
    depth_m: NDArray[np.float32]
    instances: NDArray[np.uint8]


Texture = NDArray[np.uint8]


def texture(image: NDArray[np.uint8]) -> Texture:
    """A (512, 512, 3) uint8 sRGB image and its smaller levels, as one flat list of texels (N, 3)."""
    levels = [image.reshape(-1, 3)]
    level = _LINEAR[image]
    for _ in range(_LEVELS - 1):
        level = 0.25 * (level[::2, ::2] + level[1::2, ::2] + level[::2, 1::2] + level[1::2, 1::2])
        levels.append((255 * np.sqrt(level) + 0.5).astype(np.uint8).reshape(-1, 3))
    return np.concatenate(levels)


def merge(meshes: Sequence[Mesh]) -> Mesh:
    """One mesh of several."""
    offsets = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])
    return Mesh(
        vertices=np.concatenate([mesh.vertices for mesh in meshes]),
        normals=np.concatenate([mesh.normals for mesh in meshes]),
        faces=np.concatenate([m.faces + np.int32(o) for m, o in zip(meshes, offsets, strict=True)]).astype(np.int32),
        uv=np.concatenate([mesh.uv for mesh in meshes]),
        texture=np.concatenate([mesh.texture for mesh in meshes]),
        instance=np.concatenate([mesh.instance for mesh in meshes]),
        casts=np.concatenate([mesh.casts for mesh in meshes]),
    )


def render(
    mesh: Mesh, camera: Camera, textures: NDArray[np.uint8], light: Light, contacts: Array | None = None
) -> Rendered:
    """Render a mesh. textures (T, N, 3) are stacked; each face has the index of its texture. contacts (N, 4): points on
    the floor and radii, in metres, to darken a little, as feet do.
    """
    width, height = camera.size
    corners = np.ascontiguousarray(camera.to_camera(mesh.vertices))
    inverse, hit, triangle, planes = _rasterise(mesh, camera, corners)
    rotation = camera.extrinsics[:3, :3]
    toward = np.array(light.toward) / np.linalg.norm(light.toward)
    shadow, to_shadow = _shadow_map(mesh, toward)
    # camera -> world -> shadow map, so that a pixel needs one product
    back = np.linalg.inv(camera.extrinsics)
    to_shadow = to_shadow @ back
    spots = (
        np.zeros((0, 4)) if contacts is None else np.column_stack([camera.to_camera(contacts[:, :3]), contacts[:, 3]])
    )
    rgb = np.empty((height, width, 3), np.float32)
    _sky(
        rgb, camera.intrinsics, rotation, (np.array(light.horizon) / 255.0) ** 2, (np.array(light.zenith) / 255.0) ** 2
    )
    _shade(
        rgb,
        inverse,
        triangle,
        planes,
        mesh.faces,
        np.ascontiguousarray(mesh.normals),
        mesh.uv,
        mesh.texture,
        textures,
        _LINEAR,
        _densities(mesh),
        camera.intrinsics,
        rotation,
        toward,
        np.array(light.sun),
        np.array(light.sky),
        np.array(light.ground),
        shadow,
        to_shadow,
        spots,
    )
    instances = np.where(hit, mesh.instance[np.maximum(triangle, 0)], 0).astype(np.uint8)
    image = _finish(rgb, inverse, instances)
    return Rendered(image, _depth(inverse, hit), instances)


def render_depth(mesh: Mesh, camera: Camera) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """(H, W) metric depth, 0 where nothing is hit, and (H, W) face index, -1 there; no shading, many times faster."""
    inverse, hit, triangle, _ = _rasterise(mesh, camera, np.ascontiguousarray(camera.to_camera(mesh.vertices)))
    return _depth(inverse, hit), triangle


def vertex_normals(vertices: Array, faces: NDArray[np.int32]) -> Array:
    """(V, 3) unit normals, each the area-weighted mean of the normals of its faces."""
    normals = np.zeros_like(vertices)
    _accumulate_normals(np.ascontiguousarray(vertices), faces, normals)
    return normals


def _rasterise(mesh: Mesh, camera: Camera, corners: Array) -> tuple[Array, NDArray[np.bool_], NDArray[np.int32], Array]:
    width, height = camera.size
    inverse = np.zeros((height, width))
    triangle = np.full((height, width), -1, np.int32)
    planes = np.empty((len(mesh.faces), 3, 3))
    _fill(corners, mesh.faces, camera.intrinsics, inverse, triangle, planes)
    return inverse, triangle >= 0, triangle, planes


def _depth(inverse: Array, hit: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.divide(1.0, inverse, out=np.zeros_like(inverse), where=hit).astype(np.float32)


def _densities(mesh: Mesh) -> NDArray[np.float32]:
    """(F,) texels per metre, for the choice of texture level."""
    densities = np.empty(len(mesh.faces), np.float32)
    _fill_densities(np.ascontiguousarray(mesh.vertices), mesh.faces, mesh.uv, densities)
    return densities


def _shadow_map(mesh: Mesh, toward: Array) -> tuple[NDArray[np.float32], Array]:
    """Distances from the light to everything that casts a shadow, and the (3, 4) map from world to shadow pixels."""
    side = np.cross(toward, [0.0, 0.0, 1.0] if abs(toward[2]) < 0.9 else [1.0, 0.0, 0.0])
    side /= np.linalg.norm(side)
    axes = np.stack([side, np.cross(toward, side), -toward])
    faces = mesh.faces[mesh.casts]
    if not len(faces):
        return np.full((1, 1), np.inf, np.float32), np.zeros((3, 4))
    depth = np.full((_SHADOW_SIZE, _SHADOW_SIZE), np.inf, np.float32)
    seen = mesh.vertices @ axes.T
    casting = np.zeros(len(seen), np.bool_)
    casting[faces] = True
    used = seen[casting]
    low, high = used.min(0), used.max(0)
    scale = (_SHADOW_SIZE - 8) / max(high[0] - low[0], high[1] - low[1], 1e-3)
    matrix = np.zeros((3, 4))
    matrix[:2, :3], matrix[:2, 3] = axes[:2] * scale, 4 - low[:2] * scale
    matrix[2, :3] = axes[2]
    _fill_shadow(np.ascontiguousarray(mesh.vertices @ matrix[:, :3].T + matrix[:, 3]), faces, depth)
    return depth, matrix


@njit(cache=True, nogil=True, error_model="numpy")
def _accumulate_normals(vertices: Array, faces: NDArray[np.int32], normals: Array) -> None:
    for f in range(faces.shape[0]):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
        vx, vy, vz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for k in range(3):
            v = faces[f, k]
            normals[v, 0] += nx
            normals[v, 1] += ny
            normals[v, 2] += nz
    for v in range(normals.shape[0]):
        length = np.sqrt(normals[v, 0] ** 2 + normals[v, 1] ** 2 + normals[v, 2] ** 2) + 1e-12
        normals[v] /= length


@njit(cache=True, nogil=True, error_model="numpy")
def _fill_densities(
    vertices: Array, faces: NDArray[np.int32], uv: NDArray[np.float32], densities: NDArray[np.float32]
) -> None:
    for f in range(faces.shape[0]):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
        vx, vy, vz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        world = np.sqrt(nx * nx + ny * ny + nz * nz)
        su, sv = uv[f, 1, 0] - uv[f, 0, 0], uv[f, 1, 1] - uv[f, 0, 1]
        tu, tv = uv[f, 2, 0] - uv[f, 0, 0], uv[f, 2, 1] - uv[f, 0, 1]
        image = abs(su * tv - sv * tu) * TEXTURE_SIZE**2
        densities[f] = np.sqrt(image / max(world, 1e-12))


@njit(cache=True, nogil=True, error_model="numpy")
def _span(slope: float, offset: float, start: int, stop: int) -> tuple[int, int]:
    """Narrow [start, stop) to where slope * x + offset <= 0, to within a pixel."""
    if slope == 0.0:
        return (start, stop) if offset <= 0 else (start, start)
    root = -offset / slope
    if slope > 0:
        return start, int(min(float(stop), max(float(start), root + 2)))
    return int(max(float(start), min(float(stop), root - 1))), stop


@njit(cache=True, nogil=True, error_model="numpy")
def _fill(
    corners: Array,
    faces: NDArray[np.int32],
    intrinsics: Array,
    inverse: Array,
    triangle: NDArray[np.int32],
    planes: Array,
) -> None:
    height, width = inverse.shape
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    for f in range(faces.shape[0]):
        a, b, c = corners[faces[f, 0]], corners[faces[f, 1]], corners[faces[f, 2]]
        if a[2] < NEAR_M and b[2] < NEAR_M and c[2] < NEAR_M:
            continue
        # rows of the adjugate: edge functions of the pixel's ray
        e0x, e0y, e0z = b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]
        det = a[0] * e0x + a[1] * e0y + a[2] * e0z
        if det > -1e-14:  # seen from behind, or edge on
            continue
        e1x, e1y, e1z = c[1] * a[2] - c[2] * a[1], c[2] * a[0] - c[0] * a[2], c[0] * a[1] - c[1] * a[0]
        e2x, e2y, e2z = a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]
        x0, x1, y0, y1 = 0, width, 0, height
        if a[2] > NEAR_M and b[2] > NEAR_M and c[2] > NEAR_M:
            ax, ay = a[0] / a[2] * fx + cx, a[1] / a[2] * fy + cy
            bx, by = b[0] / b[2] * fx + cx, b[1] / b[2] * fy + cy
            px, py = c[0] / c[2] * fx + cx, c[1] / c[2] * fy + cy
            left, right = min(ax, bx, px), max(ax, bx, px)
            top, bottom = min(ay, by, py), max(ay, by, py)
            if right < 0 or bottom < 0 or left > width or top > height:
                continue
            x0, x1 = max(0, int(left)), min(width, int(right) + 1)
            y0, y1 = max(0, int(top)), min(height, int(bottom) + 1)
        planes[f, 0, 0], planes[f, 0, 1], planes[f, 0, 2] = e0x / det, e0y / det, e0z / det
        planes[f, 1, 0], planes[f, 1, 1], planes[f, 1, 2] = e1x / det, e1y / det, e1z / det
        planes[f, 2, 0], planes[f, 2, 1], planes[f, 2, 2] = e2x / det, e2y / det, e2z / det
        for y in range(y0, y1):
            ry = (y + 0.5 - cy) / fy
            start, stop = x0, x1
            if x1 - x0 > 12:  # a wide triangle: skip to where the row meets it, starting one pixel early
                start, stop = _span(e0x / fx, e0y * ry + e0z + e0x * (0.5 - cx) / fx, start, stop)
                start, stop = _span(e1x / fx, e1y * ry + e1z + e1x * (0.5 - cx) / fx, start, stop)
                start, stop = _span(e2x / fx, e2y * ry + e2z + e2x * (0.5 - cx) / fx, start, stop)
            for x in range(start, stop):
                rx = (x + 0.5 - cx) / fx
                w0 = e0x * rx + e0y * ry + e0z
                if w0 > 0:
                    continue
                w1 = e1x * rx + e1y * ry + e1z
                if w1 > 0:
                    continue
                w2 = e2x * rx + e2y * ry + e2z
                if w2 > 0:
                    continue
                near = (w0 + w1 + w2) / det
                if near > inverse[y, x] and near < 1 / NEAR_M:
                    inverse[y, x] = near
                    triangle[y, x] = f


@njit(cache=True, nogil=True, error_model="numpy")
def _fill_shadow(corners: Array, faces: NDArray[np.int32], depth: NDArray[np.float32]) -> None:
    size = depth.shape[0]
    for f in range(faces.shape[0]):
        a, b, c = corners[faces[f, 0]], corners[faces[f, 1]], corners[faces[f, 2]]
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if abs(area) < 1e-9:
            continue
        x0, x1 = max(0, int(min(a[0], b[0], c[0]))), min(size, int(max(a[0], b[0], c[0])) + 2)
        y0, y1 = max(0, int(min(a[1], b[1], c[1]))), min(size, int(max(a[1], b[1], c[1])) + 2)
        for y in range(y0, y1):
            for x in range(x0, x1):
                w0 = ((b[0] - x) * (c[1] - y) - (b[1] - y) * (c[0] - x)) / area
                w1 = ((c[0] - x) * (a[1] - y) - (c[1] - y) * (a[0] - x)) / area
                w2 = 1 - w0 - w1
                if w0 >= 0 and w1 >= 0 and w2 >= 0:
                    z = w0 * a[2] + w1 * b[2] + w2 * c[2]
                    depth[y, x] = min(depth[y, x], z)


@njit(cache=True, nogil=True, error_model="numpy")
def _sky(rgb: NDArray[np.float32], intrinsics: Array, rotation: Array, horizon: Array, zenith: Array) -> None:
    height, width = rgb.shape[:2]
    for y in range(height):
        ry = (y + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
        up = rotation[1, 1] * ry + rotation[2, 1]  # the ray's height in the world, at the image's middle column
        mix = min(1.0, max(0.0, up / np.sqrt(1 + ry * ry) * 1.6))
        for k in range(3):
            value = horizon[k] + (zenith[k] - horizon[k]) * mix
            for x in range(width):
                rgb[y, x, k] = value


@njit(cache=True, nogil=True, error_model="numpy", fastmath=True)  # colour, unlike depth, need not be exact
def _shade(
    rgb: NDArray[np.float32],
    inverse: Array,
    triangle: NDArray[np.int32],
    planes: Array,
    faces: NDArray[np.int32],
    normals: Array,
    uv: NDArray[np.float32],
    texture: NDArray[np.int16],
    texels: NDArray[np.uint8],
    linear: NDArray[np.float32],
    densities: NDArray[np.float32],
    intrinsics: Array,
    rotation: Array,
    toward: Array,
    sun: Array,
    sky: Array,
    ground: Array,
    shadow: NDArray[np.float32],
    to_shadow: Array,
    spots: Array,
) -> None:
    height, width = triangle.shape
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    size = shadow.shape[0]
    for y in range(height):
        ry = (y + 0.5 - cy) / fy
        for x in range(width):
            f = triangle[y, x]
            if f < 0:
                continue
            rx = (x + 0.5 - cx) / fx
            z = 1 / inverse[y, x]
            w0 = (planes[f, 0, 0] * rx + planes[f, 0, 1] * ry + planes[f, 0, 2]) * z
            w1 = (planes[f, 1, 0] * rx + planes[f, 1, 1] * ry + planes[f, 1, 2]) * z
            w2 = 1 - w0 - w1
            a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
            nx = w0 * normals[a, 0] + w1 * normals[b, 0] + w2 * normals[c, 0]
            ny = w0 * normals[a, 1] + w1 * normals[b, 1] + w2 * normals[c, 1]
            nz = w0 * normals[a, 2] + w1 * normals[b, 2] + w2 * normals[c, 2]
            scale = 1 / np.sqrt(nx * nx + ny * ny + nz * nz + 1e-12)
            nx, ny, nz = nx * scale, ny * scale, nz * scale
            # bilinear texture, at the level whose texel is about a pixel
            u = w0 * uv[f, 0, 0] + w1 * uv[f, 1, 0] + w2 * uv[f, 2, 0]
            v = w0 * uv[f, 0, 1] + w1 * uv[f, 1, 1] + w2 * uv[f, 2, 1]
            ray = np.sqrt(rx * rx + ry * ry + 1)
            dx = (rotation[0, 0] * rx + rotation[1, 0] * ry + rotation[2, 0]) / ray
            dy = (rotation[0, 1] * rx + rotation[1, 1] * ry + rotation[2, 1]) / ray
            dz = (rotation[0, 2] * rx + rotation[1, 2] * ry + rotation[2, 2]) / ray
            facing = max(0.08, abs(nx * dx + ny * dy + nz * dz))
            footprint = densities[f] * z / fx / np.sqrt(facing)
            level, side, start = 0, TEXTURE_SIZE, 0
            while footprint > 1.5 and level < _LEVELS - 1:
                start += side * side
                side //= 2
                level += 1
                footprint *= 0.5
            px, py = u * side - 0.5, v * side - 0.5
            ix, iy = int(np.floor(px)), int(np.floor(py))
            gx, gy = px - ix, py - iy
            x0, x1 = ix & (side - 1), (ix + 1) & (side - 1)  # sides are powers of two
            y0, y1 = iy & (side - 1), (iy + 1) & (side - 1)
            t = texture[f]
            t00, t01 = start + y0 * side + x0, start + y0 * side + x1
            t10, t11 = start + y1 * side + x0, start + y1 * side + x1
            # light
            lit = nx * toward[0] + ny * toward[1] + nz * toward[2]
            if lit > 0:
                qx, qy = rx * z, ry * z
                sx = to_shadow[0, 0] * qx + to_shadow[0, 1] * qy + to_shadow[0, 2] * z + to_shadow[0, 3]
                sy = to_shadow[1, 0] * qx + to_shadow[1, 1] * qy + to_shadow[1, 2] * z + to_shadow[1, 3]
                if sx > 1 and sy > 1 and sx < size - 2 and sy < size - 2:
                    sz = to_shadow[2, 0] * qx + to_shadow[2, 1] * qy + to_shadow[2, 2] * z + to_shadow[2, 3] - 0.025
                    jx, jy = int(sx), int(sy)
                    hx, hy = sx - jx, sy - jy
                    open0 = (1 - hx) * (shadow[jy, jx] > sz) + hx * (shadow[jy, jx + 1] > sz)
                    open1 = (1 - hx) * (shadow[jy + 1, jx] > sz) + hx * (shadow[jy + 1, jx + 1] > sz)
                    lit *= (1 - hy) * open0 + hy * open1
            lit = max(0.0, lit)
            dome = 0.5 + 0.5 * ny
            if ny > 0.95:
                for s in range(spots.shape[0]):
                    ox, oy, oz = rx * z - spots[s, 0], ry * z - spots[s, 1], z - spots[s, 2]
                    distance = (ox * ox + oy * oy + oz * oz) / (spots[s, 3] * spots[s, 3])
                    if distance < 6:
                        dome *= 1 - 0.45 * np.exp(-distance)
            for k in range(3):
                above = linear[texels[t, t00, k]] * (1 - gx) + linear[texels[t, t01, k]] * gx
                below = linear[texels[t, t10, k]] * (1 - gx) + linear[texels[t, t11, k]] * gx
                colour = above * (1 - gy) + below * gy
                rgb[y, x, k] = colour * (ground[k] + (sky[k] - ground[k]) * dome + sun[k] * lit)


@njit(cache=True, nogil=True, error_model="numpy")
def _finish(rgb: NDArray[np.float32], inverse: Array, instances: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Soften object edges, and convert linear light to sRGB."""
    height, width = inverse.shape
    image = np.empty((height, width, 3), np.uint8)
    for y in range(height):
        for x in range(width):
            edge = False
            if 0 < y < height - 1 and 0 < x < width - 1:
                here, thing = inverse[y, x], instances[y, x]
                tolerance = 0.03 * here
                edge = (
                    instances[y, x + 1] != thing
                    or instances[y + 1, x] != thing
                    or instances[y, x - 1] != thing
                    or instances[y - 1, x] != thing
                    or abs(inverse[y, x + 1] + inverse[y, x - 1] - 2 * here) > tolerance
                    or abs(inverse[y + 1, x] + inverse[y - 1, x] - 2 * here) > tolerance
                )
            for k in range(3):
                value = rgb[y, x, k]
                if edge:
                    around = rgb[y, x + 1, k] + rgb[y, x - 1, k] + rgb[y + 1, x, k] + rgb[y - 1, x, k]
                    value = 0.5 * value + 0.125 * around
                image[y, x, k] = np.uint8(min(255.0, 255 * np.sqrt(max(value, np.float32(0.0))) + 0.5))
    return image
