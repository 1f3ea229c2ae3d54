"""From rooms to pixels: exact ray casting, procedural textures and light, in batched torch.

Every operation is elementwise float32 arithmetic (+ - * / sqrt, comparison, gather), each rounded alone, so
that a pixel depends on nothing but its scene and its place in the image: not on the batch, the number of
threads, or the machine.

A ray is ``origin + t * direction``. A camera ray's direction has 1 along the optical axis, so that t *is* the
depth. Arrays of pixels are (B, P); a vector is a tuple of three of them.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mtl.data.materials import BRICKS, CHECKER, STRIPES
from mtl.data.rooms import (
    BOXES,
    CLASS_OF_SURFACE,
    CORRIDOR,
    DECALS,
    FIRST_BALL,
    FIRST_BOX,
    FIRST_CYLINDER,
    FIRST_DECAL,
    FIRST_PART,
    PARTS,
    ROOM,
    SOLIDS,
    SURFACE_OF_SOLID,
    TABLES,
    Rooms,
)
from mtl.data.sample import Batch

Vector = tuple[Tensor, Tensor, Tensor]
Scene = dict[str, Tensor]
"""The fields of `Rooms`, on the device."""

FRAMES = [(FIRST_BOX + box, 1) for box in range(BOXES)] + [
    (FIRST_PART + PARTS * table, PARTS) for table in range(TABLES)
]
"""Cuboids that share one rotation: the first, and how many."""

LATTICE = 64
"""Period of the noise, in cells."""


def to_tensors(rooms: Rooms, device: torch.device | str) -> Scene:
    """Bring rooms to the device."""
    return {name: torch.from_numpy(array).to(device) for name, array in vars(rooms).items()}


def pinhole(scene: Scene, size: tuple[int, int]) -> Tensor:
    """Return the intrinsics (B, 3, 3), in pixels, of images of this size (H, W)."""
    focal = scene["focal"] * max(size)
    intrinsics = torch.zeros(len(focal), 3, 3, device=focal.device)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal
    intrinsics[:, 0, 2], intrinsics[:, 1, 2], intrinsics[:, 2, 2] = (size[1] - 1) / 2, (size[0] - 1) / 2, 1.0
    return intrinsics


def cast(scene: Scene, intrinsics: Tensor, top: int, out: Batch) -> None:
    """Render a band of rows of each image.

    Args:
        scene: B rooms.
        intrinsics: Of the whole images (B, 3, 3).
        top: The band's first row.
        out: Where to write image, segmentation, depth and normals; their shapes say how high the band is.
    """
    height, width = out["depth"].shape[-2:]
    device, axes = intrinsics.device, scene["rotation"]
    focal = intrinsics[:, 0, 0, None]
    columns = torch.arange(width, device=device) - intrinsics[:, 0, 2, None]
    rows = torch.arange(top, top + height, device=device) - intrinsics[:, 1, 2, None]
    x, y = (columns / focal)[:, None, :], (rows / focal)[:, :, None]

    def toward(axis: int) -> Tensor:
        right, down, forward = (axes[:, k, axis, None, None] for k in range(3))
        return (right * x + (down * y + forward)).flatten(1)

    eye, direction = _vector(scene["position"]), (toward(0), toward(1), toward(2))
    depth, solid = first_hit(scene, eye, direction)
    point = _along(eye, direction, depth)
    normal, surface, u, v = describe(scene, point, direction, solid)
    colours = shade(scene, point, direction, normal, surface, u, v, depth / focal)

    band = (-1, height, width)
    classes = torch.tensor(CLASS_OF_SURFACE, dtype=torch.uint8, device=device)
    out["segmentation"].copy_(classes[surface].view(band))
    out["depth"][:, 0].copy_(depth.view(band))
    for k, colour in enumerate(colours):
        out["image"][:, k].copy_(colour.view(band))
        out["normals"][:, k].copy_(_dot(_vector(axes[:, k]), normal).view(band))


def spans(scene: Scene, origin: Vector, direction: Vector) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield things in the rooms and where rays are inside: from t = enter to leave, if enter < leave."""
    present = (scene["half"][..., 2] > 0).any(0).tolist()
    dx, dy, dz = direction
    ox, oy, oz = origin
    up = _inverse(dz)
    start_z, speed_z = oz * up, up.abs()

    for first, parts in FRAMES:
        if not present[first]:
            continue
        c, s = (scene["turn"][:, first, k, None] for k in range(2))
        across, deep = _inverse(c * dx + s * dy), _inverse(c * dy - s * dx)
        start_x, start_y = (c * ox + s * oy) * across, (c * oy - s * ox) * deep
        speed_x, speed_y = across.abs(), deep.abs()
        for solid in range(first, first + parts):
            cx, cy, cz = _vector(scene["centre"][:, solid])
            hx, hy, hz = _vector(scene["half"][:, solid])
            x, rx = (c * cx + s * cy) * across - start_x, speed_x * hx
            y, ry = (c * cy - s * cx) * deep - start_y, speed_y * hy
            z, rz = cz * up - start_z, speed_z * hz
            enter = torch.maximum(torch.maximum(x - rx, y - ry), z - rz)
            leave = torch.minimum(torch.minimum(x + rx, y + ry), z + rz)
            yield solid, enter, leave

    flat = (dx * dx + dy * dy).clamp(min=1e-9)
    full = flat + dz * dz
    for solid in filter(present.__getitem__, range(FIRST_BALL, SOLIDS)):
        cx, cy, cz = _vector(scene["centre"][:, solid])
        radius, _, hz = _vector(scene["half"][:, solid])
        ball = solid < FIRST_CYLINDER
        px, py, pz = ox - cx, oy - cy, oz - cz
        square, middle, distance = flat, px * dx + py * dy, px * px + py * py
        if ball:
            square, middle, distance = full, middle + pz * dz, distance + pz * pz
        inside = middle * middle - square * (distance - radius * radius)
        # Rays that graze at less than half a degree miss, so that rounding cannot turn a normal away.
        root = torch.where(inside > 1e-4 * square * (radius * radius), inside, 0.0).sqrt()
        enter, leave = (-middle - root) / square, (root - middle) / square
        if not ball:
            z, rz = cz * up - start_z, speed_z * hz
            enter, leave = torch.maximum(enter, z - rz), torch.minimum(leave, z + rz)
        yield solid, enter, leave


def first_hit(scene: Scene, eye: Vector, direction: Vector) -> tuple[Tensor, Tensor]:
    """Return depth (B, P) and solid (B, P) int64 of what camera rays meet first."""
    inverse = (_inverse(direction[0]), _inverse(direction[1]), _inverse(direction[2]))

    def out_of(solid: int) -> Tensor:
        centre, half = _vector(scene["centre"][:, solid]), _vector(scene["half"][:, solid])
        x, y, z = ((c - o) * i + i.abs() * h for c, o, i, h in zip(centre, eye, inverse, half, strict=True))
        return torch.minimum(torch.minimum(x, y), z)

    depth = out_of(ROOM)
    beyond = _within(_along(eye, direction, depth), scene["opening"])
    depth = torch.where(beyond, out_of(CORRIDOR), depth)
    solid = torch.where(beyond, CORRIDOR, ROOM)
    for thing, enter, leave in spans(scene, eye, direction):
        hit = (enter < torch.minimum(leave, depth)) & (enter > 0)
        depth = torch.where(hit, enter, depth)
        solid.masked_fill_(hit, thing)
    return depth, solid


def describe(scene: Scene, point: Vector, direction: Vector, solid: Tensor) -> tuple[Vector, Tensor, Tensor, Tensor]:
    """Return hits' world normals, surface (B, P) int64, and texture coordinates u and v in metres."""
    table = torch.cat([scene["centre"], scene["half"], scene["turn"]], -1)
    cx, cy, cz, hx, hy, hz, c, s = _lookup(table, solid)
    dx, dy, dz = direction
    px, py, z = point[0] - cx, point[1] - cy, point[2] - cz
    x, y = c * px + s * py, c * py - s * px
    # A face that a ray meets, from outside or inside, is one whose normal opposes the ray.
    nx, ny, nz = -(c * dx + s * dy).sign(), -(c * dy - s * dx).sign(), -dz.sign()
    outside = torch.where(solid <= CORRIDOR, -1.0, 1.0)
    score_x, score_y, score_z = outside * nx * x - hx, outside * ny * y - hy, outside * nz * z - hz

    ball = (solid >= FIRST_BALL) & (solid < FIRST_CYLINDER)
    cylinder = solid >= FIRST_CYLINDER
    length = (x * x + y * y + ball * (z * z)).sqrt().clamp(min=1e-6)
    level = torch.where(cylinder, score_z > length - hx, (score_z > score_x) & (score_z > score_y)) & ~ball
    curved = (ball | cylinder) & ~level
    facing_x = ~(level | curved) & (score_x >= score_y)
    facing_y = ~(level | curved) & ~facing_x
    lx = torch.where(curved, x / length, facing_x * nx)
    ly = torch.where(curved, y / length, facing_y * ny)
    lz = torch.where(ball, z / length, level * nz)
    normal = (c * lx - s * ly, s * lx + c * ly, lz)

    # Around a cylinder, the share of |x| + |y| stands in for the angle.
    quarter = y / (x.abs() + y.abs()).clamp(min=1e-6)
    around = torch.where(x < 0, 2.0 - quarter, quarter) * (1.5708 * hx)
    u = torch.where(facing_x, y, torch.where(cylinder & ~level, around, x))
    v = torch.where(level, y, z)

    surface = torch.tensor(SURFACE_OF_SOLID, device=solid.device)[solid]
    surface += (solid <= CORRIDOR) * torch.where(level, 1 - nz.to(torch.int64), 1)
    base = surface.clone()
    for decal, on in enumerate(DECALS.values()):
        surface.masked_fill_((base == on) & _within(point, scene["decals"][:, decal]), FIRST_DECAL + decal)
    return normal, surface, u, v


def shade(
    scene: Scene,
    point: Vector,
    direction: Vector,
    normal: Vector,
    surface: Tensor,
    u: Tensor,
    v: Tensor,
    footprint: Tensor,
) -> list[Tensor]:
    """Return red, green and blue, each (B, P) uint8.

    Lambert and Blinn-Phong under one point light with hard shadows, an ambient term that fades into the
    corners, a filmic curve, and gamma 2.

    Args:
        scene: The rooms.
        point: What is seen.
        direction: Of the rays.
        normal: At the points.
        surface: Which material.
        u: Texture coordinate in metres.
        v: The other.
        footprint: Size of a pixel at the point in metres, were it seen head-on.
    """
    length = _dot(direction, direction).sqrt()
    facing = (-_dot(direction, normal) / length).clamp(min=0.15)
    *colours, gloss = paint(scene, surface, u, v, footprint / facing)

    corridor = (surface >= SURFACE_OF_SOLID[CORRIDOR]) & (surface < SURFACE_OF_SOLID[FIRST_BOX])
    here, there = _vector(scene["lamp"][:, 0]), _vector(scene["lamp"][:, 1])
    lx, ly, lz = (torch.where(corridor, b, a) - p for a, b, p in zip(here, there, point, strict=True))
    square = lx * lx + ly * ly + lz * lz
    distance = square.sqrt()
    lambert = (_dot((lx, ly, lz), normal) / distance).clamp(min=0.0)
    lit = lambert / (square + torch.where(corridor, 3.0, 1.0))
    lit = torch.where(shadow(scene, point, normal, (lx, ly, lz)), 0.0, lit)

    hx, hy, hz = (a / distance - d / length for a, d in zip((lx, ly, lz), direction, strict=True))
    shine = _dot((hx, hy, hz), normal) / (hx * hx + hy * hy + hz * hz).sqrt().clamp(min=1e-3)
    shine = shine.clamp(min=0.0)
    for _ in range(5):
        shine = shine * shine
    highlight = gloss * shine * (lit > 0)

    # Corners see less of the room. Distances to its walls, floor and ceiling; one of them is zero.
    open_sky = 1.0 + 0.25 * normal[2]
    for p, middle, half in zip(point, _vector(scene["centre"][:, ROOM]), _vector(scene["half"][:, ROOM]), strict=True):
        gap = (half - (p - middle).abs()).abs()
        open_sky = open_sky * ((gap + 0.12) / (gap + 0.3))
    channels = []
    for channel, colour in enumerate(colours):
        lamp, ambient = (scene[key][:, channel, None] for key in ("light", "ambient"))
        # Without a wall nearby the product above is about 0.4.
        light = colour * (ambient * 2.2 * open_sky + lamp * lit) + lamp * (highlight * lit)
        light = 1.35 * light * (1.0 + light * 0.12) / (1.0 + light)
        channels.append((light.clamp(0.0, 1.0).sqrt() * 255.0 + 0.5).to(torch.uint8))
    return channels


def shadow(scene: Scene, point: Vector, normal: Vector, to_lamp: Vector) -> Tensor:
    """Return where something stands between point and lamp (B, P)."""
    start = _along(point, normal, torch.full_like(point[0][:, :1], 2e-3))
    blocked = torch.zeros_like(start[0], dtype=torch.bool)
    for _, enter, leave in spans(scene, start, to_lamp):
        blocked |= (enter < leave.clamp(max=0.999)) & (leave > 0)
    return blocked


def paint(scene: Scene, surface: Tensor, u: Tensor, v: Tensor, footprint: Tensor) -> tuple[Tensor, ...]:
    """Return linear red, green and blue and the gloss (each B, P) of materials at their texture coordinates.

    Patterns are averaged over a pixel's footprint (metres, B, P), so that they fade with distance instead of
    turning into noise.
    """
    material = _lookup(scene["materials"], surface)
    pattern, period_u, period_v, swap, variation, noise, grain_u, grain_v, gloss, salt = material[6:]
    swapped = swap > 0
    u, v = torch.where(swapped, v, u) + salt, torch.where(swapped, u, v) + salt
    a, b = u / period_u, v / period_v
    brick = pattern == BRICKS

    row = b.floor()
    a = a + brick * 0.5 * (row - 2.0 * (row * 0.5).floor())
    edge_a, edge_b = _from_edge(a), _from_edge(b)
    blur_a, blur_b = footprint / period_u, footprint / period_v
    # Stripes and checkers change colour half way through a period, bricks end in a seam of mortar.
    half_a, half_b = _ramp(edge_a - 0.25, blur_a), _ramp(edge_b - 0.25, blur_b)
    seam = torch.maximum(_ramp(0.012 / period_u - edge_a, blur_a), _ramp(0.012 / period_v - edge_b, blur_b))
    mix = torch.where(pattern == CHECKER, half_a + half_b - 2.0 * half_a * half_b, half_a * (pattern == STRIPES))
    mix = torch.where(brick, seam, mix)
    tone = 1.0 + variation * (brick * (_random(a.floor(), row) - 0.5))

    x, y = u / grain_u, v / grain_v
    grain = 0.65 * _noise(x, y) + 0.35 * _noise(2.0 * x, 2.0 * y) - 0.5
    fade = (1.5 - footprint / torch.minimum(grain_u, grain_v)).clamp(0.0, 1.0)
    tone = tone * (1.0 + noise * fade * 1.6 * grain)
    red, green, blue = (
        (first + (second - first) * mix) * tone for first, second in zip(material[:3], material[3:6], strict=True)
    )
    return red, green, blue, gloss


def _ramp(distance: Tensor, blur: Tensor) -> Tensor:
    """Return how much of a window of width ``blur`` lies on the positive side of an edge."""
    return (0.5 + distance / blur).clamp(0.0, 1.0)


def _from_edge(cells: Tensor) -> Tensor:
    """Return the distance to the nearest whole number."""
    return (cells - (cells + 0.5).floor()).abs()


@cache
def _lattice(device: torch.device) -> Tensor:
    """Return the noise's values at whole numbers, exact in float32."""
    raw = np.random.Philox(key=0).random_raw(LATTICE * LATTICE) >> np.uint64(40)
    return torch.from_numpy((raw * 2.0**-24).astype(np.float32)).to(device)


def _random(x: Tensor, y: Tensor) -> Tensor:
    """Return a number in [0, 1) for each pair of whole numbers."""
    x, y = (n - LATTICE * (n * (1 / LATTICE)).floor() for n in (x, y))
    return _lattice(x.device)[(y * LATTICE + x).to(torch.int64)]


def _noise(x: Tensor, y: Tensor) -> Tensor:
    """Return value noise in [0, 1): random at whole numbers, smooth between them."""
    x0, y0 = x.floor(), y.floor()
    s, t = x - x0, y - y0
    s, t = s * s * (3.0 - 2.0 * s), t * t * (3.0 - 2.0 * t)
    near, far = (
        left + (right - left) * s
        for left, right in ((_random(x0, row), _random(x0 + 1.0, row)) for row in (y0, y0 + 1.0))
    )
    return near + (far - near) * t


def _vector(columns: Tensor) -> Vector:
    """Split (B, 3) into a vector of (B, 1)."""
    return columns[:, 0:1], columns[:, 1:2], columns[:, 2:3]


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _along(origin: Vector, direction: Vector, t: Tensor) -> Vector:
    return origin[0] + t * direction[0], origin[1] + t * direction[1], origin[2] + t * direction[2]


def _inverse(x: Tensor) -> Tensor:
    """Return 1 / x, finite."""
    return 1.0 / torch.where(x.abs() < 1e-7, 1e-7, x)


def _within(point: Vector, corners: Tensor) -> Tensor:
    """Return which points (B, P) lie in boxes with the given corners (B, 2, 3)."""
    inside = torch.ones_like(point[0], dtype=torch.bool)
    for axis, p in enumerate(point):
        inside &= (p >= corners[:, 0, axis, None]) & (p <= corners[:, 1, axis, None])
    return inside


def _lookup(table: Tensor, row: Tensor) -> list[Tensor]:
    """Return the C columns (B, P) of each scene's table (B, R, C) at rows (B, P)."""
    batch, rows, _ = table.shape
    start = torch.arange(0, batch * rows, rows, device=row.device)[:, None]
    row = start + row
    return [column[row] for column in table.flatten(0, 1).t().contiguous()]
