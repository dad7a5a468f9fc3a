"""Captioned drawings of two coloured shapes, made on the fly: the data of the demo.

An image is a pure function of (seed, index), so the dataset needs no files and no network.
The caption says which two shapes there are, in which colours, how they lie to each other,
and sometimes the background: 9,216 distinct captions.
"""

import dataclasses
import functools
import itertools
import re

import numpy as np

from slam_jax.data.sample import Sample
from slam_jax.errors import UserError

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (160, 60, 200),
    "orange": (250, 140, 30),
}
BACKGROUNDS = {"black": (15, 15, 15), "white": (245, 245, 245), "gray": (128, 128, 128)}
# Relation of the first-named shape to the second; the first two stack, the others lie side by side.
RELATIONS = ("above", "below", "left of", "right of")
_ANTIALIAS = 3  # samples per pixel edge


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a caption says: two (colour, shape) pairs, their relation, the background or None."""

    first: tuple[str, str]
    relation: str
    second: tuple[str, str]
    background: str | None

    def caption(self) -> str:
        first, second = (
            f"{_article(color)} {color} {shape}" for color, shape in (self.first, self.second)
        )
        text = f"{first} {self.relation} {second}"
        return text if self.background is None else f"{text} on a {self.background} background"

    def labels(self) -> np.ndarray:
        """What the picture shows, whichever shape was named first: int32 [5].

        (0 stacked or 1 side by side, colour and shape of the upper or left one, then of the
        other): "A above B" and "B below A" are the same picture.
        """
        pair = [(list(COLORS).index(c), SHAPES.index(s)) for c, s in (self.first, self.second)]
        if self.relation in ("below", "right of"):
            pair.reverse()
        side_by_side = self.relation in ("left of", "right of")
        return np.array([side_by_side, *pair[0], *pair[1]], np.int32)


LABEL_SIZES = (2, len(COLORS), len(SHAPES), len(COLORS), len(SHAPES))


def all_scenes() -> list[Scene]:
    """Every scene, in a fixed order."""
    objects = list(itertools.product(COLORS, SHAPES))
    return [
        Scene(first, relation, second, background)
        for first, relation, second, background in itertools.product(
            objects, RELATIONS, objects, (None, *BACKGROUNDS)
        )
    ]


_CAPTION = re.compile(
    r"an? (\w+) (\w+) (above|below|left of|right of) an? (\w+) (\w+)(?: on a (\w+) background)?"
)


def parse(caption: str) -> Scene:
    """The scene that a caption describes; UserError if it is none of all_scenes()."""
    match = _CAPTION.fullmatch(caption)
    if match:
        color_1, shape_1, relation, color_2, shape_2, background = match.groups()
        scene = Scene((color_1, shape_1), relation, (color_2, shape_2), background)
        if scene in _scene_set():
            return scene
    raise UserError(
        f"{caption!r} is no caption of shapes2d; they read like "
        "'a red circle above a blue square on a white background'"
    )


@functools.cache
def _scene_set() -> frozenset[Scene]:
    return frozenset(all_scenes())


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points lie in the shape of radius 1 around the origin, y downwards."""
    match shape:
        case "circle":
            return x**2 + y**2 <= 1
        case "square":
            return np.maximum(abs(x), abs(y)) <= 0.88
        case "triangle":
            return (y <= 0.85) & (y >= 2.0 * abs(x) - 1.05)
        case "cross":
            return (np.minimum(abs(x), abs(y)) <= 0.33) & (np.maximum(abs(x), abs(y)) <= 1.0)
    raise AssertionError(shape)


def draw(scene: Scene, rng: np.random.Generator, size: int) -> np.ndarray:
    """A picture of the scene, uint8 [size, size, 3]; places, radii and tints are drawn from rng."""
    background = scene.background or list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    pair = [scene.first, scene.second]
    if scene.relation in ("below", "right of"):
        pair.reverse()
    grid = (np.arange(size * _ANTIALIAS, dtype=np.float32) + 0.5) / (size * _ANTIALIAS)
    image = np.broadcast_to(np.array(BACKGROUNDS[background], float), (size, size, 3))
    for (color, shape), middle in zip(pair, (0.26, 0.74), strict=True):
        radius = rng.uniform(0.16, 0.22)
        along = middle + rng.uniform(-0.04, 0.04)
        across = rng.uniform(0.3, 0.7)
        x, y = (along, across) if scene.relation in ("left of", "right of") else (across, along)
        mask = _inside(shape, (grid[None, :] - x) / radius, (grid[:, None] - y) / radius)
        mask = mask.reshape(size, _ANTIALIAS, size, _ANTIALIAS).mean((1, 3))[..., None]
        tint = np.clip(np.array(COLORS[color]) + rng.uniform(-15, 15, 3), 0, 255)
        image = mask * tint + (1 - mask) * image
    return np.rint(image).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Shapes2D:
    """Random-access source: element i is a pure function of (seed, i).

    size: 32 or 64 pixels. seed: datasets of different seeds share no picture.
    """

    size: int
    num_images: int
    seed: int

    def __post_init__(self):
        if self.size not in (32, 64):
            raise UserError(f"data.size={self.size}: shapes2d draws images of 32 or 64 pixels")

    def __len__(self) -> int:
        return self.num_images

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The scene of element `index`, and the generator that then draws it."""
        rng = np.random.default_rng((self.seed, index))
        objects = [
            (list(COLORS)[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))])
            for _ in range(2)
        ]
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        background = (None, *BACKGROUNDS)[rng.integers(1 + len(BACKGROUNDS))]
        return Scene(objects[0], relation, objects[1], background), rng

    def __getitem__(self, index: int) -> Sample:
        """The drawing, uint8 [size, size, 3], and its caption."""
        scene, rng = self.scene(int(index))
        return Sample(draw(scene, rng, self.size), scene.caption(), "shapes2d", str(index), {})
