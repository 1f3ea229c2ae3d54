"""What is in a room: its geometry, lamps and camera, drawn from a scene's random numbers.

World frame: x along the wall behind the camera, y away from it, z up. The floor is z = 0 and the room spans
[0, extent]. Lengths are metres. Every array has a leading axis of B scenes.

Only + - * / and square roots happen here, in float64 and element by element: every IEEE 754 machine rounds
these the same way, as it does not sines. Rotations therefore come from the tangents of half angles, and the
camera's axes from a point it looks at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mtl.data.draws import Draws
from mtl.data.materials import DOMAINS, STYLES, Domain, Style, material

CLASSES = ("floor", "wall", "ceiling", "doorway", "table", "box", "ball", "cylinder")

BOXES, TABLES, BALLS, CYLINDERS = 3, 2, 3, 3
"""Slots of each kind. The last box, ball and cylinder are small, and stand on furniture."""
PARTS = 5
"""Cuboids of a table: its top and four legs."""

# Solids by slot. The room and the corridor behind its doorway are cuboids seen from inside.
ROOM, CORRIDOR, FIRST_BOX = 0, 1, 2
FIRST_PART = FIRST_BOX + BOXES
FIRST_BALL = FIRST_PART + TABLES * PARTS
FIRST_CYLINDER = FIRST_BALL + BALLS
SOLIDS = FIRST_CYLINDER + CYLINDERS

# Surfaces have a material and a class. Room and corridor have three each, every other thing has one, and then
# there is paint on floor and wall: it changes the material there and nothing else, later over earlier.
FLOOR, WALL, CEILING = range(3)
DECALS = {"skirting": WALL, "trim": WALL, "frame": WALL, "picture": WALL, "rug": FLOOR}
_SHELL, _THINGS = 6, ("box",) * BOXES + ("table",) * TABLES + ("ball",) * BALLS + ("cylinder",) * CYLINDERS
FIRST_DECAL = _SHELL + len(_THINGS)
SURFACES = FIRST_DECAL + len(DECALS)
SURFACE_OF_SOLID = (
    FLOOR,
    3 + FLOOR,
    *(_SHELL + box for box in range(BOXES)),
    *(_SHELL + BOXES + table for table in range(TABLES) for _ in range(PARTS)),
    *range(_SHELL + BOXES + TABLES, FIRST_DECAL),
)
"""A solid's surface; of room and corridor the floor, with wall and ceiling behind it."""
CLASS_OF_SURFACE = tuple(
    CLASSES.index(name)
    for name in (*CLASSES[:3], *["doorway"] * 3, *_THINGS, *(CLASSES[base] for base in DECALS.values()))
)

_UP = np.array([0.0, 0.0, 1.0])
_OUTWARD = np.array([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
"""Directions out of the room through its left, right and back wall."""
_AWAY = -100.0
"""Where absent things are: as points far below the floor, which no ray reaches."""


@dataclass(frozen=True)
class Rooms:
    """B scenes, float32.

    Attributes:
        position: Camera position (B, 3).
        rotation: Camera axes in the world (B, 3, 3): rows right, down, forward.
        focal: Focal length (B,) as a fraction of the image's longer side.
        centre: Centres of the solids (B, SOLIDS, 3).
        half: Their half sizes (B, SOLIDS, 3): for balls and cylinders radius, radius, half height.
        turn: Cosine and sine of their rotation about the vertical (B, SOLIDS, 2).
        opening: Lower and upper corner of the hole in the wall (B, 2, 3), flat but for a hair.
        decals: The same for what is painted on the room (B, len(DECALS), 2, 3).
        materials: (B, SURFACES, MATERIAL).
        lamp: Positions of the lamps in room and corridor (B, 2, 3).
        light: Colour times power of the lamps (B, 3).
        ambient: Light from everywhere (B, 3).
    """

    position: np.ndarray
    rotation: np.ndarray
    focal: np.ndarray
    centre: np.ndarray
    half: np.ndarray
    turn: np.ndarray
    opening: np.ndarray
    decals: np.ndarray
    materials: np.ndarray
    lamp: np.ndarray
    light: np.ndarray
    ambient: np.ndarray


def build(indices: Sequence[int], domain: Domain, seed: int) -> Rooms:
    """Return scenes as a pure function of (domain, seed, index).

    Both domains draw from one distribution of geometry, but no scene of one is a scene of the other, so that
    labels of one domain give nothing away about the other.

    Args:
        indices: Scene numbers, 0 <= index < 2**60.
        domain: Decides materials and light.
        seed: 0 <= seed < 2**64.
    """
    draws = Draws([(seed, (DOMAINS.index(domain) << 60) + int(index)) for index in indices])
    style = STYLES[domain]
    extent = np.stack([draws(3.2, 5.4), draws(4.0, 6.8), draws(2.35, 3.1)], -1)
    position, rotation, focal = _camera(draws, extent)
    opening, corridor, trim, door_wall, threshold = _doorway(draws, extent)
    frame, picture = _picture(draws, extent, door_wall)
    rug = _rug(draws, extent)
    skirting = np.stack([np.full_like(extent, -1.0), np.full_like(extent, 99.0)], 1)
    skirting[:, 1, 2] = draws(0.07, 0.12)

    furniture = _Furniture(draws, extent, position, threshold)
    furniture.furnish()
    furniture.centre[:, ROOM] = furniture.half[:, ROOM] = extent / 2
    furniture.centre[:, CORRIDOR] = corridor.mean(1)
    furniture.half[:, CORRIDOR] = (corridor[:, 1] - corridor[:, 0]) / 2

    lamp = np.stack([extent, furniture.centre[:, CORRIDOR]], 1)
    lamp[:, 0] *= np.stack([draws(0.25, 0.75), draws(0.25, 0.75), draws(*style.height)], -1)
    lamp[:, 1] += 0.7 * _UP * furniture.half[:, CORRIDOR]
    tint = np.array(style.light) * draws(0.95, 1.05, (3,))
    arrays = {
        "position": position,
        "rotation": rotation,
        "focal": focal,
        "centre": furniture.centre,
        "half": furniture.half,
        "turn": furniture.turn,
        "opening": opening,
        "decals": np.stack([skirting, trim, frame, picture, rug], 1),
        "materials": _materials(draws, style),
        "lamp": lamp,
        "light": tint * draws(*style.power)[:, None],
        "ambient": (0.5 + 0.5 * tint) * draws(*style.ambient)[:, None],
    }
    return Rooms(**{name: array.astype(np.float32) for name, array in arrays.items()})


def _camera(draws: Draws, extent: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stand near the wall y = 0 and look at a point in the far half of the room, the head a little tilted."""
    position = np.stack([draws(0.12, 0.88), draws(0.05, 0.2), draws(0.42, 0.68)], -1) * extent
    target = np.stack([draws(0.2, 0.8), draws(0.65, 1.0), draws(0.12, 0.48)], -1) * extent
    forward = _unit(target - position)
    level = _unit(np.cross(forward, _UP))
    plumb = np.cross(forward, level)
    cosine, sine = (part[:, None] for part in _rotation(draws(-0.035, 0.035)).T)
    right, down = cosine * level + sine * plumb, cosine * plumb - sine * level
    return position, np.stack([right, down, forward], 1), draws(0.58, 0.95)


def _patch(
    wall: np.ndarray,
    where: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    width: np.ndarray,
    extent: np.ndarray,
) -> np.ndarray:
    """Return the corners (B, 2, 3) of a rectangle in a wall, two tenths of a millimetre thick.

    Args:
        wall: Left 0, right 1 or back 2 (B,).
        where: Place of its middle (B,), 0 to 1 over the range where it fits. The near half of the side walls,
            which the camera seldom sees, is left out.
        low: Height of its lower edge (B,).
        high: Height of its upper edge (B,).
        width: Its size along the wall (B,).
        extent: Of the room (B, 3).
    """
    outward, along = _OUTWARD[wall], _along(wall)
    begin = np.where(wall < 2, 0.45 * extent[:, 1], 0.0) + 0.15 + width / 2
    end = np.where(wall < 2, extent[:, 1], extent[:, 0]) - 0.15 - width / 2
    foot = np.maximum(outward, 0.0) * extent + along * (begin + (end - begin) * where)[:, None]
    reach = along * width[:, None] / 2 + np.abs(outward) * 1e-4
    return np.stack([foot - reach + _UP * low[:, None], foot + reach + _UP * high[:, None]], 1)


def _doorway(draws: Draws, extent: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Open a wall to a corridor.

    Returns:
        Opening, corridor and the door's painted trim (each B, 2, 3), the wall (B,) and the middle of the
        threshold (B, 3).
    """
    present, wall = draws() < 0.75, draws.choice(3)
    width, height = draws(0.8, 1.3), np.minimum(draws(1.9, 2.15), extent[:, 2] - 0.2)
    opening = _patch(wall, draws(), np.zeros_like(width), height, width, extent)
    threshold = opening.mean(1) * (1.0 - _UP)
    along = _along(wall)

    left, right, above, deep = draws(0.0, 0.9), draws(0.0, 0.9), draws(0.1, 0.5), draws(1.0, 2.8)
    far = _OUTWARD[wall] * deep[:, None]
    corridor = opening.copy()
    corridor[:, 0] += np.minimum(far, 0.0) - along * left[:, None]
    corridor[:, 1] += np.maximum(far, 0.0) + along * right[:, None] + _UP * above[:, None]
    border = draws(0.06, 0.11, (1,))
    trim = opening + np.stack([-along * border, (along + _UP) * border], 1)
    opening[:, 0, 2] -= 1e-3  # The floor's edge must not be wall for a rounding error.
    return _only(present, opening), _only(present, corridor), _only(present, trim), wall, threshold


def _picture(draws: Draws, extent: np.ndarray, door_wall: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hang a framed picture on a wall without a door; return frame and picture (each B, 2, 3)."""
    present, wall = draws() < 0.75, (door_wall + 1 + draws.choice(2)) % 3
    middle, tall, wide = draws(1.35, 1.65), draws(0.35, 0.8), draws(0.4, 1.2)
    picture = _patch(wall, draws(), middle - tall / 2, middle + tall / 2, wide, extent)
    edge = (_along(wall) + _UP) * draws(0.03, 0.06, (1,))
    return _only(present, picture + np.stack([-edge, edge], 1)), _only(present, picture)


def _rug(draws: Draws, extent: np.ndarray) -> np.ndarray:
    """Lay a rug near the middle of the floor (B, 2, 3)."""
    present, flat = draws() < 0.55, 1.0 - _UP
    middle = extent * draws(0.4, 0.65, (3,)) * flat
    reach = extent * draws(0.15, 0.32, (3,)) * flat + _UP * 1e-4
    return _only(present, np.stack([middle - reach, middle + reach], 1))


class _Thing(NamedTuple):
    """A thing in each scene: point it stands on (B, 3), half sizes (B, 3), rotation (B, 2), presence (B,)."""

    foot: np.ndarray
    half: np.ndarray
    turn: np.ndarray
    present: np.ndarray


class _Furniture:
    """Fills the solids of `Rooms`, each standing on the floor or on another, none inside another.

    On the floor, things keep the distance of their circumscribed circles from each other, from the camera and
    from the threshold.
    """

    TRIES = 12

    def __init__(self, draws: Draws, extent: np.ndarray, camera: np.ndarray, threshold: np.ndarray) -> None:
        batch = len(extent)
        self.centre = np.full((batch, SOLIDS, 3), _AWAY)
        self.half = np.zeros((batch, SOLIDS, 3))
        self.turn = np.tile([1.0, 0.0], (batch, SOLIDS, 1))
        self._draws, self._extent = draws, extent
        self._nearest = camera[:, 1] + 0.7
        self._taken = [(camera, np.full(batch, 0.85)), (threshold, np.full(batch, 0.6))]

    def furnish(self) -> None:
        """Put everything into the room, large things first."""
        draws, height = self._draws, self._extent[:, 2]
        tables = [self._table(FIRST_PART + PARTS * table, chance) for table, chance in enumerate((0.8, 0.4))]

        low = 0.12 + (0.31 * height - 0.12) * draws() * draws()
        cupboard = self._on_floor(np.stack([draws(0.2, 0.5), draws(0.18, 0.4), low], -1), 0.9, to_wall=0.6)
        chest = self._on_floor(draws(0.12, 0.38, (3,)), 0.75, to_wall=0.2)
        self._put(FIRST_BOX, cupboard)
        self._put(FIRST_BOX + 1, chest)
        for slot, chance in enumerate((0.8, 0.5)):
            size = _round(draws(0.12, 0.28), draws(0.15, 0.6))
            self._put(FIRST_CYLINDER + slot, self._on_floor(size, chance, to_wall=0.1))
        for slot, chance in enumerate((0.85, 0.6)):
            radius = draws(0.14, 0.4)
            self._put(FIRST_BALL + slot, self._on_floor(_round(radius, radius), chance, to_wall=0.1))
        self._decorate(tables[0], tables[1], cupboard._replace(present=cupboard.present & (low < 0.5)))

    def _put(self, solid: int, thing: _Thing) -> None:
        rows = thing.present
        self.centre[rows, solid] = (thing.foot + _UP * thing.half)[rows]
        self.half[rows, solid] = thing.half[rows]
        self.turn[rows, solid] = thing.turn[rows]

    def _on_floor(self, half: np.ndarray, chance: float, to_wall: float) -> _Thing:
        """Find a place for something of this size, wanted with one chance, and at a wall with another."""
        draws, width, length = self._draws, self._extent[:, :1], self._extent[:, 1:2]
        radius = np.sqrt(half[:, :1] * half[:, :1] + half[:, 1:2] * half[:, 1:2]) + 0.02
        begin, end = self._nearest[:, None] + radius, length - radius
        x = draws(shape=(self.TRIES,)) * (width - 2 * radius) + radius
        y = draws(shape=(self.TRIES,)) * (end - begin) + begin
        # Which wall, if any; what stands at a wall is not rotated.
        wall = np.floor(draws(0.0, 3.0 / to_wall, (self.TRIES,)))
        x = np.select([wall == 0, wall == 1], [half[:, :1] + 0.01, width - half[:, :1] - 0.01], x)
        y = np.where(wall == 2, length - half[:, 1:2] - 0.01, y)

        free = np.broadcast_to(begin < end, x.shape)
        for middle, reach in self._taken:
            dx, dy, gap = x - middle[:, :1], y - middle[:, 1:2], radius + reach[:, None]
            free = free & (dx * dx + dy * dy > gap * gap)
        chosen = free.argmax(1)[:, None]
        x, y, wall = (np.take_along_axis(tries, chosen, 1)[:, 0] for tries in (x, y, wall))
        turn = np.where((wall < 3)[:, None], [1.0, 0.0], _rotation(draws(-1.0, 1.0)))
        thing = _Thing(np.stack([x, y, np.zeros_like(x)], -1), half, turn, free.any(1) & (draws() < chance))
        self._taken.append((np.where(thing.present[:, None], thing.foot, _AWAY), radius[:, 0]))
        return thing

    def _table(self, solid: int, chance: float) -> _Thing:
        """Put a table whose top is the given solid, its legs the next ones."""
        draws = self._draws
        size = np.stack([draws(0.4, 0.85), draws(0.3, 0.5), draws(0.22, 0.4)], -1)
        thickness, leg = draws(0.02, 0.035), draws(0.025, 0.045)
        table = self._on_floor(size, chance, to_wall=0.35)
        below = 2 * (size[:, 2] - thickness)
        slab = np.stack([size[:, 0], size[:, 1], thickness], -1)
        self._put(solid, table._replace(half=slab, foot=table.foot + _UP * below[:, None]))
        post = np.stack([leg, leg, below / 2], -1)
        x, y = size[:, 0] - leg - 0.03, size[:, 1] - leg - 0.03
        for number, (sx, sy) in enumerate(((-1, -1), (-1, 1), (1, -1), (1, 1)), 1):
            self._put(
                solid + number,
                table._replace(half=post, foot=table.foot + _turned(sx * x, sy * y, table.turn)),
            )
        return table

    def _decorate(self, *furniture: _Thing) -> None:
        """Put a small box, ball and cylinder on the first piece of furniture that is present."""
        draws = self._draws
        present = [thing.present for thing in furniture]
        foot, half, turn = (
            np.select([p[:, None] for p in present], [getattr(thing, name) for thing in furniture])
            for name in ("foot", "half", "turn")
        )
        top = foot + 2 * _UP * half
        places = np.stack([draws(-0.7, -0.6), draws(-0.05, 0.05), draws(0.6, 0.7)], -1)
        last = (FIRST_BOX + BOXES - 1, FIRST_BALL + BALLS - 1, FIRST_CYLINDER + CYLINDERS - 1)
        for place, solid in enumerate(last):
            limit = 0.2 * half[:, 0]
            radius, size = np.minimum(draws(0.06, 0.14), limit), np.minimum(draws(0.05, 0.13), limit)
            height = draws(0.03, 0.18)
            sizes = (np.stack([radius, size, height], -1), _round(radius, radius), _round(radius, height))[place]
            spot = top + _turned(places[:, place] * half[:, 0], draws(-0.35, 0.35) * half[:, 1], turn)
            self._put(solid, _Thing(spot, sizes, _rotation(draws(-1.0, 1.0)), np.any(present, 0) & (draws() < 0.75)))


def _materials(draws: Draws, style: Style) -> np.ndarray:
    """Return the materials (B, SURFACES, MATERIAL) of every surface."""
    shell = (style.floor, style.wall, style.ceiling)
    painted = [style.things if name in ("picture", "rug") else style.trim for name in DECALS]
    textures = (*shell, *shell, *[style.things] * len(_THINGS), *painted)
    return np.stack([material(draws, style, t, shell=i < _SHELL) for i, t in enumerate(textures)], 1)


def _only(present: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Move the boxes (B, 2, 3) that are not present out of the way."""
    return np.where(present[:, None, None], corners, _AWAY)


def _along(wall: np.ndarray) -> np.ndarray:
    """Return the horizontal axis (B, 3) of each wall (B,)."""
    axis: np.ndarray = np.abs(_OUTWARD[wall][:, [1, 0, 2]])
    return axis


def _round(radius: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Return the half sizes (B, 3) of a ball or a cylinder."""
    return np.stack([radius, radius, height], -1)


def _unit(vector: np.ndarray) -> np.ndarray:
    x, y, z = vector.T
    unit: np.ndarray = vector / np.sqrt(x * x + y * y + z * z)[:, None]
    return unit


def _rotation(tangent: np.ndarray) -> np.ndarray:
    """Return cosine and sine (B, 2) of the angle whose half has this tangent (B,)."""
    square = tangent * tangent
    pair: np.ndarray = np.stack([1.0 - square, 2.0 * tangent], -1) / (1.0 + square)[:, None]
    return pair


def _turned(x: np.ndarray, y: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return the horizontal vector (B, 3) of x and y (B,) rotated by cosine and sine (B, 2)."""
    cosine, sine = turn.T
    return np.stack([cosine * x - sine * y, sine * x + cosine * y, np.zeros_like(x)], -1)
