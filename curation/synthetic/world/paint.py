"""Procedural textures: floors, walls, leaves and cloth, each from a random generator alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from curation.render.raster import TEXTURE_SIZE as SIZE
from curation.render.raster import Texture, texture

Array = NDArray[np.float64]
Image = NDArray[np.uint8]
Colour = tuple[int, int, int]


def smoothstep(low: Array | float, high: Array | float, value: Array) -> Array:
    """0 at low, 1 at high, smooth between; low may exceed high."""
    t = np.clip((value - low) / (np.asarray(high) - low), 0, 1)
    return t * t * (3 - 2 * t)


def blur_noise(rng: np.random.Generator, cells: int) -> Array:
    """(S, S) smooth noise of about unit range that repeats at the texture's edges."""
    coarse = rng.normal(0, 0.5, (cells, cells)).astype(np.float32)
    coarse = np.pad(coarse, 2, mode="wrap")
    step = SIZE / cells
    scaled = cv2.resize(coarse, (round(step * (cells + 4)), round(step * (cells + 4))), interpolation=cv2.INTER_CUBIC)
    start = round(2 * step)
    return scaled[start : start + SIZE, start : start + SIZE].astype(np.float64)


def clip_rgb(image: Array) -> Image:
    """Round to uint8."""
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def _flat(colour: Colour) -> Array:
    return np.broadcast_to(np.array(colour, float), (SIZE, SIZE, 3)).copy()


def _grid() -> tuple[Array, Array]:
    axis = (np.arange(SIZE) + 0.5) / SIZE
    u, v = np.meshgrid(axis, axis)
    return u, v


def plaster(rng: np.random.Generator, colour: Colour) -> Image:
    """A painted wall."""
    noise = 0.04 * blur_noise(rng, 5) + 0.03 * blur_noise(rng, 40) + 0.02 * blur_noise(rng, 200)
    return clip_rgb(_flat(colour) * (1 + noise)[..., None])


def speckle(rng: np.random.Generator, colour: Colour) -> Image:
    """Asphalt, concrete, carpet: fine grain over broad stains."""
    noise = 0.10 * blur_noise(rng, 6) + 0.08 * blur_noise(rng, 60) + 0.22 * blur_noise(rng, 256)
    return clip_rgb(_flat(colour) * (1 + noise)[..., None])


def planks(rng: np.random.Generator, colour: Colour) -> Image:
    """A wooden floor of eight boards, with offset ends."""
    u, v = _grid()
    board = (v * 8).astype(int)
    tone = rng.uniform(0.82, 1.14, 8 * 3).reshape(8, 3)
    along = (u + (board * 0.37) % 1) % 1
    piece = (along * 2).astype(int)
    grain = 0.08 * np.repeat(blur_noise(rng, 4)[:, :1], SIZE, 1) + 0.06 * blur_noise(rng, 12)
    streak = cv2.resize(rng.normal(0, 0.06, (SIZE, 12)).astype(np.float32), (SIZE, SIZE))
    image = _flat(colour) * (tone[board, piece] + grain + streak)[..., None]
    seam = ((v * 8) % 1 < 0.035) | ((along * 2) % 1 < 0.008)
    image[seam] *= 0.55
    return clip_rgb(image)


def tiles(rng: np.random.Generator, colour: Colour) -> Image:
    """Four by four tiles with joints, two tones."""
    u, v = _grid()
    i, j = (u * 4).astype(int), (v * 4).astype(int)
    tone = rng.uniform(0.92, 1.06, (4, 4)) * np.where((np.indices((4, 4)).sum(0) % 2) == 0, 1.0, rng.uniform(0.6, 1.0))
    image = _flat(colour) * (tone[j, i] + 0.04 * blur_noise(rng, 30))[..., None]
    image[((u * 4) % 1 < 0.03) | ((v * 4) % 1 < 0.03)] *= 0.7
    return clip_rgb(image)


def bricks(rng: np.random.Generator, colour: Colour) -> Image:
    """Sixteen courses of brick in a running bond."""
    u, v = _grid()
    row = (v * 16).astype(int)
    along = u * 6 + 0.5 * (row % 2)
    tone = rng.uniform(0.75, 1.15, (16, 7))
    image = _flat(colour) * (tone[row, along.astype(int)] + 0.08 * blur_noise(rng, 120))[..., None]
    image[((v * 16) % 1 < 0.14) | (along % 1 < 0.05)] = (176, 170, 160)
    return clip_rgb(image)


def grass(rng: np.random.Generator, colour: Colour) -> Image:
    """A lawn."""
    noise = 0.12 * blur_noise(rng, 8) + 0.2 * blur_noise(rng, 90) + 0.3 * blur_noise(rng, 256)
    image = _flat(colour) * (1 + noise)[..., None]
    image[..., 0] += 25 * blur_noise(rng, 20)
    return clip_rgb(image)


def leaves(rng: np.random.Generator, colour: Colour) -> Image:
    """Foliage: blotches of light and shade."""
    noise = 0.35 * blur_noise(rng, 24) + 0.45 * blur_noise(rng, 70)
    return clip_rgb(_flat(colour) * np.clip(1 + noise, 0.25, 2)[..., None])


def facade(rng: np.random.Generator, colour: Colour) -> Image:
    """A house front: three by three windows, some lit, some with a blind."""
    image = plaster(rng, colour).astype(float)
    u, v = _grid()
    i, j = (u * 3).astype(int), (v * 3).astype(int)
    x, y = (u * 3) % 1, (v * 3) % 1
    frame = (x > 0.26) & (x < 0.74) & (y > 0.18) & (y < 0.80)
    glass = (x > 0.30) & (x < 0.70) & (y > 0.22) & (y < 0.76) & (np.abs(x - 0.5) > 0.015)
    image[frame] = (225, 222, 214)
    pane = rng.uniform(0.5, 1.2, (3, 3))[j, i][..., None] * np.array((70, 86, 104)) * (1.2 - 0.5 * y[..., None])
    image[glass] = pane[glass]
    image[(v * 3) % 1 > 0.96] *= 0.8
    return clip_rgb(image)


def curtain(rng: np.random.Generator, colour: Colour) -> Image:
    """Hanging cloth in folds."""
    u, _ = _grid()
    folds = 0.75 + 0.28 * np.sin(u * 2 * np.pi * 9 + 1.5 * np.sin(u * 2 * np.pi * 2 + rng.uniform(0, 6)))
    return clip_rgb(_flat(colour) * (folds + 0.05 * blur_noise(rng, 50))[..., None])


def poster(rng: np.random.Generator, colour: Colour) -> Image:
    """A picture in a frame: an invented landscape of bands and a disc, so that no picture is anybody's work."""
    u, v = _grid()
    image = _flat(colour)
    image *= (0.8 + 0.5 * v)[..., None]
    ridge = 0.5 + 0.12 * np.interp(np.arange(SIZE), np.linspace(0, SIZE, 9), rng.normal(0, 1, 9))
    image[v > ridge[None, :]] = rng.integers(30, 200, 3)
    image[v > ridge[None, :] + 0.22] = rng.integers(30, 220, 3)
    image[np.hypot(u - rng.uniform(0.25, 0.75), v - 0.28) < 0.11] = rng.integers(150, 255, 3)
    image[(np.minimum(u, 1 - u) < 0.05) | (np.minimum(v, 1 - v) < 0.05)] = (48, 40, 34)
    return clip_rgb(image)


def window(rng: np.random.Generator, colour: Colour) -> Image:
    """A bright window with bars, a hint of trees behind."""
    u, v = _grid()
    image = _flat(colour) * (1.1 - 0.25 * v)[..., None]
    crown = v > 0.62 + 0.1 * blur_noise(rng, 7)
    image[crown] = image[crown] * (0.62, 0.78, 0.55)
    bars = (np.minimum(u, 1 - u) < 0.03) | (np.minimum(v, 1 - v) < 0.03) | (np.abs(u - 0.5) < 0.012)
    image[bars | (np.abs(v - 0.45) < 0.012)] = (238, 238, 236)
    return clip_rgb(image)


def books(rng: np.random.Generator, colour: Colour) -> Image:
    """A shelf full of spines."""
    image = _flat(colour) * 0.5
    for shelf in range(4):
        x = 6
        top, bottom = shelf * SIZE // 4 + 10, (shelf + 1) * SIZE // 4
        while x < SIZE - 14:
            wide, low = int(rng.integers(8, 22)), int(rng.integers(0, 34))
            image[top + low : bottom - 8, x : x + wide] = rng.integers(40, 225, 3)
            x += wide + int(rng.integers(0, 3)) + (40 if rng.random() < 0.05 else 0)
        image[bottom - 8 : bottom] = colour
    return clip_rgb(image)


def panels(rng: np.random.Generator, colour: Colour) -> Image:
    """Six segments around, as on a ball."""
    u, v = _grid()
    dark = ((u * 6).astype(int) + (v > 0.5)) % 2 == 0
    image = _flat(colour)
    image[dark] = 245 - 0.3 * np.array(colour)
    image[(np.abs(v - 0.5) < 0.02) | ((u * 6) % 1 < 0.06)] = 30
    return clip_rgb(image)


Painter = Callable[[np.random.Generator, Colour], Image]


@dataclass(frozen=True)
class Paint:
    """A texture not yet painted: painting is most of the work of building a place, and drafts are never rendered."""

    painter: Painter
    colour: Colour
    seed: int


@lru_cache(maxsize=96)
def painted(paint: Paint) -> Texture:
    """The texture, painted once."""
    return texture(paint.painter(np.random.default_rng(paint.seed), paint.colour))
