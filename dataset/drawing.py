"""Generated images: objects of 20 classes, each with its form, colour and texture, over clutter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from utils.labels import VOID

Array = NDArray[np.float32]
Form = Callable[[Array, Array], NDArray[np.bool_]]
Texture = Callable[[Array, Array], NDArray[Any]]
Colour = tuple[int, int, int]

_OVERSAMPLING = 2  # images are drawn at twice their size and averaged
_RADIUS = (0.19, 0.31)  # of an object, as a fraction of the image's side


def draw_sample(size: int, seed: tuple[int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image (size×size×3, RGB) and its mask (size×size, ids 0..20, 255 at borders), uint8.

    The last number of the seed is the image's; consecutive images cycle through the classes.
    """
    rng = np.random.default_rng(seed)
    side = size * _OVERSAMPLING
    canvas, ids = _draw_clutter(rng, side), np.zeros((side, side), np.uint8)
    centres: list[NDArray[np.float64]] = []
    for class_id in _choose_classes(rng, seed[-1]):
        radius = rng.uniform(*_RADIUS) * side
        centre = _free_place(rng, centres, side)
        centres.append(centre)
        _draw_thing(canvas, ids, _THINGS[class_id - 1], class_id, centre, radius, rng)
    canvas = canvas.reshape(size, _OVERSAMPLING, size, _OVERSAMPLING, 3).mean(axis=(1, 3))
    canvas += rng.normal(0, 4, canvas.shape)
    mask = ids[::_OVERSAMPLING, ::_OVERSAMPLING]
    return canvas.clip(0, 255).astype(np.uint8), np.where(_borders(mask), VOID, mask).astype(np.uint8)


def _choose_classes(rng: np.random.Generator, number: int) -> list[int]:
    """1 to 4 distinct classes; the first cycles, so that all classes are equally frequent."""
    first = number % len(_THINGS) + 1
    others = [c for c in range(1, len(_THINGS) + 1) if c != first]
    classes = [first, *rng.choice(others, size=rng.integers(0, 4), replace=False).tolist()]
    return [classes[i] for i in rng.permutation(len(classes))]


def _free_place(
    rng: np.random.Generator, centres: list[NDArray[np.float64]], side: int
) -> NDArray[np.float64]:
    """The one of twelve random positions that is farthest from the objects already drawn."""
    places = rng.uniform(0.18, 0.82, (12, 2)) * side
    if not centres:
        return places[0]
    gaps = np.linalg.norm(places[:, None] - np.stack(centres), axis=-1).min(axis=1)
    return places[gaps.argmax()]


def _borders(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels with a neighbour of another label, as in VOC's masks."""
    border = np.zeros(mask.shape, bool)
    across, down = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    border[:, 1:] |= across
    border[:, :-1] |= across
    border[1:] |= down
    border[:-1] |= down
    return border


def _draw_clutter(rng: np.random.Generator, side: int) -> Array:
    """Background: a gradient of dull colours with dull patches and strokes, in no class's colour."""
    dull = rng.uniform(70, 200, (4, 1)) + rng.uniform(-22, 22, (4, 3))
    coarse = rng.uniform(-14, 14, (7, 7, 1)) + np.zeros((7, 7, 3))
    coarse += np.linspace(0, 1, 7)[:, None, None] * (dull[1] - dull[0]) + dull[0]
    small = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
    canvas = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.float32).copy()
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    for _ in range(rng.integers(4, 9)):
        colour = dull[rng.integers(2, 4)] + rng.uniform(-25, 25)
        angle, (cx, cy) = rng.uniform(0, np.pi), rng.uniform(0, 1, 2)
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        long, thin = rng.uniform(0.05, 0.35), rng.uniform(0.01, 0.12)
        inside = (
            (u / long) ** 2 + (v / thin) ** 2 < 1 if rng.random() < 0.5 else (abs(u) < long) & (abs(v) < thin)
        )
        canvas[inside] = 0.35 * canvas[inside] + 0.65 * colour
    return canvas


def _draw_thing(
    canvas: Array,
    ids: NDArray[np.uint8],
    thing: _Thing,
    class_id: int,
    centre: NDArray[np.float64],
    radius: float,
    rng: np.random.Generator,
) -> None:
    """Draw an object with random rotation, stretch, tint, light and a shadow into canvas and ids."""
    side, form = len(ids), _FORMS[thing.form]
    reach = int(radius * 1.3) + 2
    (x0, y0), (x1, y1) = (centre.astype(int) - reach).clip(0), (centre.astype(int) + reach).clip(max=side)
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    x, y = (x - centre[0]) / radius, (y - centre[1]) / radius
    angle, stretch = rng.uniform(-0.45, 0.45), rng.uniform(0.85, 1.15)
    u = ((x * np.cos(angle) + y * np.sin(angle)) * stretch).astype(np.float32)
    v = ((y * np.cos(angle) - x * np.sin(angle)) / stretch).astype(np.float32)

    patch = canvas[y0:y1, x0:x1]
    patch[form(u - 0.1, v - 0.12)] *= 0.72  # shadow
    inside = form(u, v)
    tint, brightness = rng.normal(0, 9, 3), rng.uniform(0.85, 1.12)
    mix = _TEXTURES[thing.texture](u, v).astype(np.float32)[..., None]
    colour = (1 - mix) * np.array(thing.colour) + mix * np.array(thing.accent)
    light = brightness * (1.02 - 0.16 * (u + v) / 2)
    light *= np.where(form(u * 1.1, v * 1.1), 1, 0.72)  # a darker rim
    patch[inside] = ((colour + tint) * light[..., None])[inside]
    ids[y0:y1, x0:x1][inside] = class_id


def _polygon(*corners: tuple[float, float]) -> Form:
    """Even-odd rule."""

    def inside(u: Array, v: Array) -> NDArray[np.bool_]:
        result = np.zeros(u.shape, bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y0 != y1:
                result ^= ((y0 > v) != (y1 > v)) & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
        return result

    return inside


def _star_corners(points: int, inner: float) -> list[tuple[float, float]]:
    angles = np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2, inner, 1.05)
    return [(float(r * np.sin(a)), float(-r * np.cos(a))) for r, a in zip(radii, angles, strict=True)]


# Forms: (u, v) to the right and down, about -1..1 → inside or not.
_FORMS: dict[str, Form] = {
    "disc": lambda u, v: np.hypot(u, v) < 0.9,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.82,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.7) < 0.27,
    "moon": lambda u, v: (np.hypot(u, v) < 0.98) & (np.hypot(u - 0.5, v + 0.1) > 0.68),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.4) & (np.maximum(abs(u), abs(v)) < 0.92),
    "hexagon": lambda u, v: np.maximum(abs(u) * 0.866 + abs(v) * 0.5, abs(v)) < 0.86,
    "drop": lambda u, v: (np.hypot(u, v - 0.3) < 0.64) | ((v < 0.1) & (abs(u) < 0.53 * (v + 1.05))),
    "leaf": lambda u, v: np.hypot(abs(u) + 0.62, v) < 1.2,
    "heart": lambda u, v: (
        ((1.2 * u) ** 2 + (0.15 - 1.2 * v) ** 2 - 1) ** 3 - (1.2 * u) ** 2 * (0.15 - 1.2 * v) ** 3 < 0
    ),
    "flower": lambda u, v: np.hypot(u, v) < 0.74 + 0.26 * np.cos(5 * np.arctan2(u, -v)),
    "gear": lambda u, v: (
        (np.hypot(u, v) < np.where(np.cos(8 * np.arctan2(u, -v)) > 0, 1.0, 0.78)) & (np.hypot(u, v) > 0.26)
    ),
    "fish": lambda u, v: (
        ((u + 0.2) ** 2 / 0.6 + v**2 / 0.3 < 1) | ((u > 0.4) & (u < 1) & (abs(v) < 0.95 * (u - 0.3)))
    ),
    "mushroom": lambda u, v: (
        ((u**2 / 0.95 + (v - 0.1) ** 2 / 0.95 < 1) & (v < 0.12)) | ((abs(u) < 0.32) & (v > 0) & (v < 0.92))
    ),
    "tree": lambda u, v: (
        (np.hypot(u, v + 0.25) < 0.72 + 0.06 * np.cos(7 * np.arctan2(u, v + 0.25)))
        | ((abs(u) < 0.2) & (v > 0) & (v < 1))
    ),
    "triangle": _polygon((0, -1), (0.98, 0.75), (-0.98, 0.75)),
    "star": _polygon(*_star_corners(5, 0.45)),
    "gem": _polygon((-0.55, -0.75), (0.55, -0.75), (1, -0.25), (0, 1), (-1, -0.25)),
    "arrow": _polygon(
        (0, -1), (0.85, -0.05), (0.36, -0.05), (0.36, 0.95), (-0.36, 0.95), (-0.36, -0.05), (-0.85, -0.05)
    ),
    "bolt": _polygon(
        (-0.25, -1), (0.7, -1), (0.35, -0.3), (0.85, -0.3), (-0.4, 1.05), (-0.1, 0.2), (-0.75, 0.2)
    ),
    "house": _polygon(
        (0, -1), (1, -0.15), (0.76, -0.15), (0.76, 0.85), (-0.76, 0.85), (-0.76, -0.15), (-1, -0.15)
    ),
}

# Textures: 0 is the class's colour, 1 its accent.
_TEXTURES: dict[str, Texture] = {
    "plain": lambda u, v: np.clip(0.5 * v, 0, 1),
    "band": lambda u, v: abs(v + 0.15 * u) < 0.2,
    "planks": lambda u, v: (np.maximum(abs(u), abs(v)) > 0.62) | (abs(u - v) < 0.16),
    "dots": lambda u, v: np.hypot((u * 2.6) % 1 - 0.5, (v * 2.6) % 1 - 0.5) < 0.25,
    "stripes": lambda u, v: ((u + v) * 2) % 1 < 0.4,
    "cells": lambda u, v: abs(np.sin(6 * u) * np.sin(3 * u + 5.2 * v) * np.sin(3 * u - 5.2 * v)) < 0.1,
    "centre": lambda u, v: np.hypot(u, v) < 0.3,
    "facets": lambda u, v: 0.5 * (u > 0.28) + 0.5 * (v < -0.3),
    "spokes": lambda u, v: np.cos(4 * np.arctan2(u, v)) > 0.6,
    "gloss": lambda u, v: np.hypot((u + 0.22) * 1.6, v - 0.25) < 0.2,
    "veins": lambda u, v: (abs(u) < 0.06) | ((abs(u) * 1.5 + v * 3) % 1 < 0.22),
    "chevrons": lambda u, v: (abs(u) * 1.6 + v * 2.2) % 1 < 0.35,
    "cap": lambda u, v: (v > 0.12) | _TEXTURES["dots"](u + 0.2, v + 0.1),
    "fish_bands": lambda u, v: (abs(u - 0.05) < 0.12) | (abs(u + 0.48) < 0.1),
    "roof": lambda u, v: (v < -0.15) | ((abs(u) < 0.18) & (v > 0.25)),
    "trunk": lambda u, v: (v > 0.4) & (abs(u) < 0.21),
    "bricks": lambda u, v: ((v * 4) % 1 < 0.25) | ((u * 2.5 + np.floor(v * 4) * 0.5) % 1 < 0.15),
}


@dataclass(frozen=True)
class _Thing:
    name: str
    form: str
    colour: Colour
    texture: str
    accent: Colour


_THINGS = (
    _Thing("ball", "disc", (222, 38, 38), "band", (250, 245, 240)),
    _Thing("crate", "square", (196, 120, 52), "planks", (126, 68, 22)),
    _Thing("pyramid", "triangle", (240, 205, 120), "bricks", (190, 140, 60)),
    _Thing("star", "star", (255, 226, 20), "plain", (255, 180, 0)),
    _Thing("ring", "ring", (40, 190, 70), "spokes", (180, 240, 120)),
    _Thing("heart", "heart", (250, 90, 150), "dots", (255, 205, 225)),
    _Thing("moon", "moon", (190, 205, 255), "dots", (130, 145, 235)),
    _Thing("cross", "cross", (20, 205, 215), "stripes", (0, 120, 160)),
    _Thing("honeycomb", "hexagon", (250, 150, 10), "cells", (120, 60, 0)),
    _Thing("flower", "flower", (205, 30, 200), "centre", (255, 220, 60)),
    _Thing("gem", "gem", (0, 140, 130), "facets", (150, 255, 225)),
    _Thing("gear", "gear", (60, 70, 130), "spokes", (105, 120, 185)),
    _Thing("drop", "drop", (25, 95, 245), "gloss", (215, 235, 255)),
    _Thing("leaf", "leaf", (20, 95, 30), "veins", (95, 165, 60)),
    _Thing("arrow", "arrow", (120, 45, 200), "chevrons", (190, 130, 255)),
    _Thing("bolt", "bolt", (190, 255, 40), "plain", (120, 220, 20)),
    _Thing("fish", "fish", (255, 100, 50), "fish_bands", (255, 250, 245)),
    _Thing("mushroom", "mushroom", (150, 10, 45), "cap", (250, 232, 205)),
    _Thing("house", "house", (240, 160, 140), "roof", (95, 35, 60)),
    _Thing("tree", "tree", (0, 165, 110), "trunk", (105, 62, 32)),
)

SHAPE_CLASSES = ("background", *(thing.name for thing in _THINGS))
