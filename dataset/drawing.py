"""The things of the generated data: 20 classes with their own form, colour and texture, over clutter."""

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

_OVERSAMPLING = 2  # pictures are drawn at twice their size and averaged
_RADIUS = (0.19, 0.31)  # of a thing, as a part of the picture's side


def draw_sample(size: int, seed: tuple[int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One picture (size×size×3, RGB) and its mask (size×size, ids 0..20, 255 at borders).

    The last number of the seed is the picture's; consecutive pictures go round the classes.
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
    """1 to 4 distinct classes; the first goes round, so that every class is met equally often."""
    first = number % len(_THINGS) + 1
    others = [c for c in range(1, len(_THINGS) + 1) if c != first]
    classes = [first, *rng.choice(others, size=rng.integers(0, 4), replace=False).tolist()]
    return [classes[i] for i in rng.permutation(len(classes))]


def _free_place(
    rng: np.random.Generator, centres: list[NDArray[np.float64]], side: int
) -> NDArray[np.float64]:
    """Of twelve random places the one that is farthest from the things already there."""
    places = rng.uniform(0.18, 0.82, (12, 2)) * side
    if not centres:
        return places[0]
    gaps = np.linalg.norm(places[:, None] - np.stack(centres), axis=-1).min(axis=1)
    return places[gaps.argmax()]


def _borders(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels with a neighbour of another label, as VOC's outlines."""
    border = np.zeros(mask.shape, bool)
    across, down = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    border[:, 1:] |= across
    border[:, :-1] |= across
    border[1:] |= down
    border[:-1] |= down
    return border


def _draw_clutter(rng: np.random.Generator, side: int) -> Array:
    """Dull colours that fade into each other, with dull patches and strokes: no class's colour."""
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
    """Paint one thing, turned, stretched, tinted and lit at random, into canvas and ids, with its shadow."""
    side = len(ids)
    reach = int(radius * 1.3) + 2
    (x0, y0), (x1, y1) = (centre.astype(int) - reach).clip(0), (centre.astype(int) + reach).clip(max=side)
    y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    x, y = (x - centre[0]) / radius, (y - centre[1]) / radius
    angle, stretch = rng.uniform(-0.45, 0.45), rng.uniform(0.85, 1.15)
    u = ((x * np.cos(angle) + y * np.sin(angle)) * stretch).astype(np.float32)
    v = ((y * np.cos(angle) - x * np.sin(angle)) / stretch).astype(np.float32)

    picture = canvas[y0:y1, x0:x1]
    picture[thing.form(u - 0.1, v - 0.12)] *= 0.72  # shadow
    inside = thing.form(u, v)
    tint, brightness = rng.normal(0, 9, 3), rng.uniform(0.85, 1.12)
    mix = thing.texture(u, v).astype(np.float32)[..., None]
    colour = (1 - mix) * np.array(thing.colour) + mix * np.array(thing.accent)
    light = brightness * (1.02 - 0.16 * (u + v) / 2)
    light *= np.where(thing.form(u * 1.1, v * 1.1), 1, 0.72)  # a darker rim
    picture[inside] = ((colour + tint) * light[..., None])[inside]
    ids[y0:y1, x0:x1][inside] = class_id


# Forms: (u, v) to the right and down, about -1..1 → inside or not.


def _radius_angle(u: Array, v: Array) -> tuple[Array, Array]:
    return np.hypot(u, v), np.arctan2(u, -v)


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


def _disc(u: Array, v: Array) -> NDArray[np.bool_]:
    return np.hypot(u, v) < 0.9


def _square(u: Array, v: Array) -> NDArray[np.bool_]:
    return np.maximum(abs(u), abs(v)) < 0.82


def _ring(u: Array, v: Array) -> NDArray[np.bool_]:
    return abs(np.hypot(u, v) - 0.7) < 0.27


def _heart(u: Array, v: Array) -> NDArray[np.bool_]:
    x, y = 1.2 * u, 0.15 - 1.2 * v
    return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 < 0


def _moon(u: Array, v: Array) -> NDArray[np.bool_]:
    return (np.hypot(u, v) < 0.98) & (np.hypot(u - 0.5, v + 0.1) > 0.68)


def _cross(u: Array, v: Array) -> NDArray[np.bool_]:
    return (np.minimum(abs(u), abs(v)) < 0.4) & (np.maximum(abs(u), abs(v)) < 0.92)


def _hexagon(u: Array, v: Array) -> NDArray[np.bool_]:
    return np.maximum(abs(u) * 0.866 + abs(v) * 0.5, abs(v)) < 0.86


def _flower(u: Array, v: Array) -> NDArray[np.bool_]:
    radius, angle = _radius_angle(u, v)
    return radius < 0.74 + 0.26 * np.cos(5 * angle)


def _gear(u: Array, v: Array) -> NDArray[np.bool_]:
    radius, angle = _radius_angle(u, v)
    return (radius < np.where(np.cos(8 * angle) > 0, 1.0, 0.78)) & (radius > 0.26)


def _drop(u: Array, v: Array) -> NDArray[np.bool_]:
    return (np.hypot(u, v - 0.3) < 0.64) | ((v < 0.1) & (abs(u) < 0.53 * (v + 1.05)))


def _leaf(u: Array, v: Array) -> NDArray[np.bool_]:
    return np.hypot(abs(u) + 0.62, v) < 1.2


def _fish(u: Array, v: Array) -> NDArray[np.bool_]:
    body = (u + 0.2) ** 2 / 0.6 + v**2 / 0.3 < 1
    return body | ((u > 0.4) & (u < 1) & (abs(v) < 0.95 * (u - 0.3)))


def _mushroom(u: Array, v: Array) -> NDArray[np.bool_]:
    cap = (u**2 / 0.95 + (v - 0.1) ** 2 / 0.95 < 1) & (v < 0.12)
    return cap | ((abs(u) < 0.32) & (v > 0) & (v < 0.92))


def _tree(u: Array, v: Array) -> NDArray[np.bool_]:
    crown = np.hypot(u, v + 0.25) < 0.72 + 0.06 * np.cos(7 * np.arctan2(u, v + 0.25))
    return crown | ((abs(u) < 0.2) & (v > 0) & (v < 1))


# Textures: 0 is the thing's colour, 1 its accent.


def _plain(u: Array, v: Array) -> NDArray[Any]:
    return np.clip(0.5 * v, 0, 1)


def _band(u: Array, v: Array) -> NDArray[Any]:
    return abs(v + 0.15 * u) < 0.2


def _planks(u: Array, v: Array) -> NDArray[Any]:
    return (np.maximum(abs(u), abs(v)) > 0.62) | (abs(u - v) < 0.16)


def _bricks(u: Array, v: Array) -> NDArray[Any]:
    row = np.floor(v * 4)
    return ((v * 4) % 1 < 0.25) | ((u * 2.5 + row * 0.5) % 1 < 0.15)


def _dots(u: Array, v: Array) -> NDArray[Any]:
    return np.hypot((u * 2.6) % 1 - 0.5, (v * 2.6) % 1 - 0.5) < 0.25


def _stripes(u: Array, v: Array) -> NDArray[Any]:
    return ((u + v) * 2) % 1 < 0.4


def _cells(u: Array, v: Array) -> NDArray[Any]:
    return abs(np.sin(6 * u) * np.sin(3 * u + 5.2 * v) * np.sin(3 * u - 5.2 * v)) < 0.1


def _centre(u: Array, v: Array) -> NDArray[Any]:
    return np.hypot(u, v) < 0.3


def _facets(u: Array, v: Array) -> NDArray[Any]:
    return 0.5 * (u > 0.28) + 0.5 * (v < -0.3)


def _spokes(u: Array, v: Array) -> NDArray[Any]:
    return np.cos(4 * np.arctan2(u, v)) > 0.6


def _gloss(u: Array, v: Array) -> NDArray[Any]:
    return np.hypot((u + 0.22) * 1.6, v - 0.25) < 0.2


def _veins(u: Array, v: Array) -> NDArray[Any]:
    return (abs(u) < 0.06) | ((abs(u) * 1.5 + v * 3) % 1 < 0.22)


def _chevrons(u: Array, v: Array) -> NDArray[Any]:
    return (abs(u) * 1.6 + v * 2.2) % 1 < 0.35


def _cap(u: Array, v: Array) -> NDArray[Any]:
    return (v > 0.12) | (_dots(u + 0.2, v + 0.1) > 0)


def _fish_bands(u: Array, v: Array) -> NDArray[Any]:
    return (abs(u - 0.05) < 0.12) | (abs(u + 0.48) < 0.1)


def _roof(u: Array, v: Array) -> NDArray[Any]:
    return (v < -0.15) | ((abs(u) < 0.18) & (v > 0.25))


def _trunk(u: Array, v: Array) -> NDArray[Any]:
    return (v > 0.4) & (abs(u) < 0.21)


@dataclass(frozen=True)
class _Thing:
    name: str
    form: Form
    colour: Colour
    texture: Texture
    accent: Colour


_TRIANGLE = _polygon((0, -1), (0.98, 0.75), (-0.98, 0.75))
_STAR = _polygon(*_star_corners(5, 0.45))
_GEM = _polygon((-0.55, -0.75), (0.55, -0.75), (1, -0.25), (0, 1), (-1, -0.25))
_ARROW = _polygon(
    (0, -1), (0.85, -0.05), (0.36, -0.05), (0.36, 0.95), (-0.36, 0.95), (-0.36, -0.05), (-0.85, -0.05)
)
_BOLT = _polygon((-0.25, -1), (0.7, -1), (0.35, -0.3), (0.85, -0.3), (-0.4, 1.05), (-0.1, 0.2), (-0.75, 0.2))
_HOUSE = _polygon(
    (0, -1), (1, -0.15), (0.76, -0.15), (0.76, 0.85), (-0.76, 0.85), (-0.76, -0.15), (-1, -0.15)
)

_THINGS = (
    _Thing("ball", _disc, (222, 38, 38), _band, (250, 245, 240)),
    _Thing("crate", _square, (196, 120, 52), _planks, (126, 68, 22)),
    _Thing("pyramid", _TRIANGLE, (240, 205, 120), _bricks, (190, 140, 60)),
    _Thing("star", _STAR, (255, 226, 20), _plain, (255, 180, 0)),
    _Thing("ring", _ring, (40, 190, 70), _spokes, (180, 240, 120)),
    _Thing("heart", _heart, (250, 90, 150), _dots, (255, 205, 225)),
    _Thing("moon", _moon, (190, 205, 255), _dots, (130, 145, 235)),
    _Thing("cross", _cross, (20, 205, 215), _stripes, (0, 120, 160)),
    _Thing("honeycomb", _hexagon, (250, 150, 10), _cells, (120, 60, 0)),
    _Thing("flower", _flower, (205, 30, 200), _centre, (255, 220, 60)),
    _Thing("gem", _GEM, (0, 140, 130), _facets, (150, 255, 225)),
    _Thing("gear", _gear, (60, 70, 130), _spokes, (105, 120, 185)),
    _Thing("drop", _drop, (25, 95, 245), _gloss, (215, 235, 255)),
    _Thing("leaf", _leaf, (20, 95, 30), _veins, (95, 165, 60)),
    _Thing("arrow", _ARROW, (120, 45, 200), _chevrons, (190, 130, 255)),
    _Thing("bolt", _BOLT, (190, 255, 40), _plain, (120, 220, 20)),
    _Thing("fish", _fish, (255, 100, 50), _fish_bands, (255, 250, 245)),
    _Thing("mushroom", _mushroom, (150, 10, 45), _cap, (250, 232, 205)),
    _Thing("house", _HOUSE, (240, 160, 140), _roof, (95, 35, 60)),
    _Thing("tree", _tree, (0, 165, 110), _trunk, (105, 62, 32)),
)

SHAPE_CLASSES = ("background", *(thing.name for thing in _THINGS))
