"""What the surfaces of a room are made of: procedural textures, palettes, and the two domains' styles."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mtl.data.draws import Draws

Domain = Literal["studio", "loft"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)

PLAIN, STRIPES, CHECKER, BRICKS = range(4)
"""Patterns of two colours."""

MATERIAL = 16
"""Numbers of a material: linear colour (3), second colour (3), pattern, its period along u and v (m), whether
u and v are swapped, variation of tone from brick to brick, amplitude of the noise, its period along u and v
(m), gloss, and an offset (m) that makes its pattern and noise its own."""


@dataclass(frozen=True)
class Texture:
    """A family of materials; fields as in `MATERIAL`, lengths before random scaling.

    Attributes:
        contrast: How far the second colour is from the first; 1 is as far as the palette says.
    """

    pattern: int
    period: tuple[float, float] = (1.0, 1.0)
    variation: float = 0.0
    noise: float = 0.06
    grain: tuple[float, float] = (0.7, 0.7)
    contrast: float = 1.0


PAINT = Texture(PLAIN)
STRIPED = Texture(STRIPES, period=(0.36, 1.0))
CHECKED = Texture(CHECKER, period=(0.42, 0.42))
WALLPAPER = Texture(STRIPES, period=(0.3, 1.0), contrast=0.35)
TILED = Texture(CHECKER, period=(0.6, 0.6), contrast=0.4)
BRICK = Texture(BRICKS, period=(0.42, 0.17), variation=0.5, noise=0.25, grain=(0.09, 0.09))
PLANK = Texture(BRICKS, period=(1.5, 0.2), variation=0.55, noise=0.45, grain=(0.5, 0.035), contrast=0.6)
PLASTER = Texture(PLAIN, noise=0.55, grain=(0.4, 0.4))
BEAM = Texture(PLAIN, noise=0.6, grain=(0.6, 0.05))


@dataclass(frozen=True)
class Style:
    """What a domain looks like. Pairs are the ends of a uniform range; of several choices each is as likely.

    Attributes:
        floor: Textures of the floor.
        wall: Textures of the walls.
        ceiling: Textures of the ceiling.
        trim: Textures of skirting, door trim and picture frames.
        things: Textures of everything else.
        hues: Ranges of hue, in turns from red.
        saturation: Range for things; floor, walls and ceiling have half of it.
        value: Range of the first colour's value in HSV.
        light: Colour of the lamp.
        power: Irradiance of the lamp at one metre, times two.
        ambient: Light that comes from everywhere.
        height: Height of the lamp as a fraction of the room's.
        gloss: Strength of the highlight.
    """

    floor: tuple[Texture, ...]
    wall: tuple[Texture, ...]
    ceiling: tuple[Texture, ...]
    trim: tuple[Texture, ...]
    things: tuple[Texture, ...]
    hues: tuple[tuple[float, float], ...]
    saturation: tuple[float, float]
    value: tuple[float, float]
    light: tuple[float, float, float]
    power: tuple[float, float]
    ambient: tuple[float, float]
    height: tuple[float, float]
    gloss: tuple[float, float]


STYLES: dict[Domain, Style] = {
    "studio": Style(
        floor=(CHECKED, TILED, STRIPED, PAINT),
        wall=(PAINT, PAINT, WALLPAPER, TILED),
        ceiling=(PAINT,),
        trim=(PAINT,),
        things=(PAINT, PAINT, STRIPED, CHECKED),
        hues=((0.0, 1.0),),
        saturation=(0.2, 0.8),
        value=(0.72, 1.0),
        light=(0.97, 1.0, 1.04),
        power=(5.0, 7.0),
        ambient=(0.36, 0.5),
        height=(0.82, 0.95),
        gloss=(0.05, 0.5),
    ),
    "loft": Style(
        floor=(PLANK, PLANK, PLASTER),
        wall=(BRICK, BRICK, PLASTER, PLANK),
        ceiling=(PLASTER, PLANK),
        trim=(BEAM, PLASTER),
        things=(BEAM, BEAM, PLASTER, PLANK, PAINT),
        hues=((0.015, 0.13), (0.015, 0.13), (0.015, 0.13), (0.3, 0.64)),
        saturation=(0.25, 0.75),
        value=(0.4, 0.85),
        light=(1.16, 0.95, 0.7),
        power=(8.0, 12.0),
        ambient=(0.2, 0.32),
        height=(0.74, 0.9),
        gloss=(0.0, 0.2),
    ),
}


def material(draws: Draws, style: Style, textures: tuple[Texture, ...], *, shell: bool) -> np.ndarray:
    """Return one random material for each scene (B, MATERIAL).

    Args:
        draws: The scenes' random numbers.
        style: Of the domain.
        textures: To choose from.
        shell: It is for floor, walls or ceiling, which are paler, duller and larger in pattern than things.
    """
    rows = [[t.pattern, *t.period, t.variation, t.noise, *t.grain, t.contrast] for t in textures]
    chosen = np.array(rows)[draws.choice(len(textures))]
    pattern, period, variation, noise, grain, contrast = np.split(chosen, [1, 3, 4, 5, 7], -1)
    scale = draws(0.75, 1.4, (1,)) * (1.0 if shell else 0.7)
    swap = draws.choice(2)[:, None] * (pattern != BRICKS)

    arc = np.array(style.hues)[draws.choice(len(style.hues))]
    hue = arc[:, 0] + (arc[:, 1] - arc[:, 0]) * draws()
    saturation = draws(*style.saturation) * (0.5 if shell else 1.0)
    value = draws(*style.value)
    first = _rgb(hue, saturation, value)
    # The second colour is a darker or a paler tone, of nearly the same hue or of any.
    other = hue + np.where(draws() < 0.3, draws(), draws(-0.06, 0.06))
    darker, pale = draws(0.35, 0.8), draws() < 0.4
    second = _rgb(
        other,
        np.where(pale, 0.3, 1.0) * saturation,
        np.where(pale, value * 0.5 + 0.45, value * darker),
    )
    second = first + (second - first) * contrast
    gloss = draws(*style.gloss, (1,)) * (0.3 if shell else 1.0)
    offset = draws(0.0, 64.0, (1,))
    # Squares undo the display's gamma.
    parts = [first * first, second * second, pattern, period * scale, swap, variation, noise, grain * scale]
    return np.concatenate([*parts, gloss, offset], -1)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Convert HSV, the hue in turns, to RGB (B, 3) in [0, 1]."""
    ramp = np.abs((hue[:, None] + np.array([0.0, 2 / 3, 1 / 3])) % 1.0 * 6.0 - 3.0) - 1.0
    rgb: np.ndarray = value[:, None] * (1.0 - saturation[:, None] * (1.0 - np.clip(ramp, 0.0, 1.0)))
    return rgb
