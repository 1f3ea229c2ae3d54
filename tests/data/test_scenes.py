"""The embedded scenes: checked against a ray caster that shares no code with them, and by properties."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mtl.data import scenes
from mtl.data.rooms import (
    BALLS,
    CORRIDOR,
    FIRST_BALL,
    FIRST_BOX,
    FIRST_CYLINDER,
    FIRST_PART,
    PARTS,
    ROOM,
    SOLIDS,
    Rooms,
    build,
)
from mtl.data.sample import Batch
from mtl.data.scenes import CLASSES, DOMAINS, Domain, Scenes, render
from mtl.errors import UserError

SIZE = (24, 32)


def rays(batch: Batch) -> torch.Tensor:
    """Return K^-1 (u, v, 1) of every pixel (B, 3, H, W), in float64."""
    height, width = batch["depth"].shape[-2:]
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)]).double().flatten(1)
    directions: torch.Tensor = torch.linalg.inv(batch["intrinsics"].double()) @ pixels
    return directions.reshape(-1, 3, height, width)


def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the angle between vectors along axis 1, in degrees, accurate for small angles too."""
    degrees: torch.Tensor = torch.rad2deg(2 * torch.asin(((a - b).norm(dim=1) / 2).clamp(max=1)))
    return degrees


# --- An independent ray caster: one ray, float64, one plane or quadratic at a time ---


def solid_hits(shape: str, half: np.ndarray, o: np.ndarray, d: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Return every (t, outward normal) at which a ray crosses a solid centred at the origin."""
    hits: list[tuple[float, np.ndarray]] = []
    if shape in ("ball", "cylinder"):
        keep = np.array([1.0, 1.0, shape == "ball"])
        a, b, c = (d * d * keep).sum(), 2 * (o * d * keep).sum(), (o * o * keep).sum() - half[0] ** 2
        for t in np.roots([a, b, c]):
            point = o + t.real * d
            if abs(t.imag) == 0 and (shape == "ball" or abs(point[2]) <= half[2]):
                hits.append((t.real, keep * point / half[0]))
    faces = {"cuboid": (0, 1, 2), "cylinder": (2,), "ball": ()}[shape]
    for axis in faces:
        for sign in (-1.0, 1.0):
            t = (sign * half[axis] - o[axis]) / d[axis]
            point = o + t * d
            others = [k for k in range(3) if k != axis]
            on_disc = shape == "cylinder" and np.hypot(*point[:2]) <= half[0]
            if on_disc or (shape == "cuboid" and all(abs(point[k]) <= half[k] for k in others)):
                hits.append((t, sign * np.eye(3)[axis]))
    return hits


NAMES = ["room", "corridor", *["box"] * (FIRST_PART - FIRST_BOX), *["table"] * (FIRST_BALL - FIRST_PART)]
NAMES += ["ball"] * BALLS + ["cylinder"] * (SOLIDS - FIRST_CYLINDER)


def trace(rooms: Rooms, scene: int, ray: np.ndarray) -> tuple[float, str, np.ndarray]:
    """Return depth, class name and camera-frame normal of what is seen along a ray in the camera's frame."""
    eye, axes = rooms.position[scene].astype(float), rooms.rotation[scene].astype(float)
    direction = ray @ axes

    def hits(solid: int) -> list[tuple[float, np.ndarray]]:
        if rooms.half[scene, solid].max() == 0:
            return []
        c, s = rooms.turn[scene, solid].astype(float)
        local = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        shape = NAMES[solid] if NAMES[solid] in ("ball", "cylinder") else "cuboid"
        origin = (eye - rooms.centre[scene, solid]) @ local
        half = rooms.half[scene, solid].astype(float)
        return [(t, local @ n) for t, n in solid_hits(shape, half, origin, direction @ local)]

    depth, outward = max(hits(ROOM), key=lambda hit: hit[0])
    name = "wall" if outward[2] == 0 else "floor" if outward[2] < 0 else "ceiling"
    point, (low, high) = eye + depth * direction, rooms.opening[scene]
    if (low <= point).all() and (point <= high).all():
        (depth, outward), name = max(hits(CORRIDOR), key=lambda hit: hit[0]), "doorway"
    normal = -outward
    for solid in range(FIRST_BOX, SOLIDS):
        for t, outward in hits(solid):
            if 0 < t < depth:
                depth, name, normal = t, NAMES[solid], outward
    return depth, name, axes @ normal


@pytest.mark.parametrize("domain", DOMAINS)
def test_agrees_with_an_independent_ray_caster(domain: Domain) -> None:
    indices, size = range(40), (45, 60)
    batch, rooms = render(indices, domain=domain, seed=5, size=size), build(indices, domain, 5)
    directions, random = rays(batch), np.random.default_rng(0)
    wrong, seen = 0, set()
    for scene in range(len(indices)):
        for _ in range(12):
            row, column = random.integers(size[0]), random.integers(size[1])
            depth, name, normal = trace(rooms, scene, directions[scene, :, row, column].numpy())
            same = CLASSES[batch["segmentation"][scene, row, column]] == name
            same &= abs(batch["depth"][scene, 0, row, column].item() - depth) < 1e-4 * depth
            same &= np.abs(batch["normals"][scene, :, row, column].numpy() - normal).max() < 1e-3
            wrong += not same
            seen.add(name)
    assert wrong <= 1, "a ray within a rounding error of an edge may see the other side, hardly two"
    assert seen == set(CLASSES)


# --- Properties of the labels ---


@given(
    height=st.integers(16, 70),
    width=st.integers(16, 70),
    index=st.integers(0, 2**40),
    seed=st.integers(0, 2**64 - 1),
    domain=st.sampled_from(DOMAINS),
)
@settings(max_examples=40, deadline=None)
def test_contract_at_any_size(height: int, width: int, index: int, seed: int, domain: Domain) -> None:
    batch = render([index], domain=domain, seed=seed, size=(height, width))
    expected = {
        "image": ((1, 3, height, width), torch.uint8),
        "segmentation": ((1, height, width), torch.uint8),
        "depth": ((1, 1, height, width), torch.float32),
        "normals": ((1, 3, height, width), torch.float32),
        "intrinsics": ((1, 3, 3), torch.float32),
    }
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == expected
    assert batch["segmentation"].max() < len(CLASSES)
    assert (batch["depth"] > 0.2).all() and (batch["depth"] < 12).all()
    normals, directions = batch["normals"].double(), rays(batch)
    assert (normals.norm(dim=1) - 1).abs().max() < 1e-5
    assert ((normals * directions).sum(1) < 1e-6).all(), "every visible surface faces the camera"
    focal = batch["intrinsics"][0, 0, 0].item() / max(height, width)
    assert 0.5 < focal < 1.0
    assert batch["intrinsics"][0, :, 2].tolist() == [(width - 1) / 2, (height - 1) / 2, 1]


@pytest.mark.parametrize("domain", DOMAINS)
def test_normals_are_those_of_the_backprojected_depth(domain: Domain) -> None:
    batch = render(range(12), domain=domain, seed=1, size=(120, 160))
    points, normals, classes = rays(batch) * batch["depth"], batch["normals"].double(), batch["segmentation"]
    right = points[..., 1:-1, 2:] - points[..., 1:-1, :-2]
    down = points[..., 2:, 1:-1] - points[..., :-2, 1:-1]
    measured = torch.nn.functional.normalize(torch.linalg.cross(down, right, dim=1), dim=1)
    inner = normals[..., 1:-1, 1:-1]

    neighbours = [(slice(a, a - 2 or None), slice(b, b - 2 or None)) for a, b in ((1, 0), (1, 2), (0, 1), (2, 1))]
    same = torch.ones_like(classes[:, 1:-1, 1:-1], dtype=torch.bool)
    turns = torch.zeros(same.shape, dtype=torch.float64)
    for window in neighbours:
        same &= classes[(..., *window)] == classes[:, 1:-1, 1:-1]
        turns = torch.maximum(turns, angle(normals[(..., *window)], inner))
    error = angle(measured, inner)
    flat = same & (turns < 1e-3)
    assert flat.double().mean() > 0.75
    # Two parallel faces of one class may meet in the picture, such as the tops of two boxes.
    assert (error[flat] < 0.5).double().mean() > 0.997
    ball = same & (classes[:, 1:-1, 1:-1] == CLASSES.index("ball")) & (turns < 10)
    assert ball.sum() > 500
    assert error[ball].quantile(0.95) < 2.0


def test_size_changes_how_finely_a_scene_is_seen_not_what_is_in_it() -> None:
    coarse = render(range(8), domain="loft", seed=0, size=(41, 57))
    fine = render(range(8), domain="loft", seed=0, size=(123, 171))
    # Pixel i of the coarse image and 3 i + 1 of the fine one look along the same ray.
    again = {key: value[..., 1::3, 1::3] for key, value in fine.items() if key != "intrinsics"}
    same = coarse["segmentation"] == again["segmentation"]
    assert same.double().mean() > 0.999
    depth_error = (coarse["depth"] - again["depth"]).abs()[:, 0]
    assert (depth_error[same] < 1e-4).double().mean() > 0.999
    assert (angle(coarse["normals"], again["normals"])[same] < 0.01).double().mean() > 0.999
    assert (coarse["image"].double() - again["image"].double()).abs().mean() < 8.0


# --- The scenes themselves ---


def inside(rooms: Rooms, solid: int, points: np.ndarray) -> np.ndarray:
    """Return which points (B, N, 3) lie in a solid (B, N)."""
    offset = points - rooms.centre[:, None, solid]
    c, s = rooms.turn[:, solid, 0, None], rooms.turn[:, solid, 1, None]
    x, y, z = c * offset[..., 0] + s * offset[..., 1], c * offset[..., 1] - s * offset[..., 0], offset[..., 2]
    hx, hy, hz = (rooms.half[:, solid, k, None] for k in range(3))
    within: np.ndarray = (abs(x) < hx) & (abs(y) < hy) & (abs(z) < hz)
    if solid >= FIRST_BALL:
        within &= x * x + y * y + (z * z if solid < FIRST_CYLINDER else 0) < hx * hx
    return within


def filled(rooms: Rooms, solid: int) -> np.ndarray:
    """Return points (B, N, 3) spread through a solid, up to nearly its surface."""
    steps = np.linspace(-0.97, 0.97, 7)
    unit = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    if solid >= FIRST_BALL:
        unit = unit[np.linalg.norm(unit[:, : 3 if solid < FIRST_CYLINDER else 2], axis=1) < 0.98]
    x, y, z = np.moveaxis(unit[None] * rooms.half[:, None, solid], -1, 0)
    c, s = rooms.turn[:, solid, 0, None], rooms.turn[:, solid, 1, None]
    points: np.ndarray = np.stack([c * x - s * y, s * x + c * y, z], -1) + rooms.centre[:, None, solid]
    return points


@pytest.mark.parametrize("domain", DOMAINS)
def test_rooms_are_plausible(domain: Domain) -> None:
    rooms = build(range(300), domain, 9)
    things = range(FIRST_BOX, SOLIDS)
    present = rooms.half[:, :, 2] > 0
    bottom, top = rooms.centre[..., 2] - rooms.half[..., 2], rooms.centre[..., 2] + rooms.half[..., 2]
    viewpoints = np.stack([rooms.position, rooms.lamp[:, 0]], 1)
    assert inside(rooms, ROOM, viewpoints).all()
    for solid in things:
        assert not inside(rooms, solid, viewpoints).any(), "camera and lamp are in the open"
        gap = np.linalg.norm(rooms.centre[:, solid] - rooms.position, axis=1) - np.linalg.norm(
            rooms.half[:, solid], axis=1
        )
        assert (gap > 0.2).all()
        points = filled(rooms, solid)
        assert inside(rooms, ROOM, points)[present[:, solid]].all()
        for other in things:
            one_table = solid < FIRST_BALL and other < FIRST_BALL and min(solid, other) >= FIRST_PART
            one_table &= (solid - FIRST_PART) // PARTS == (other - FIRST_PART) // PARTS
            if other != solid and not one_table:
                assert not inside(rooms, other, points)[present[:, solid]].any(), (solid, other)
        # It stands on the floor, or on the top of something that is under its middle.
        foot = np.stack([rooms.centre[:, solid, 0], rooms.centre[:, solid, 1], bottom[:, solid] - 1e-3], -1)[:, None]
        stands = np.abs(bottom[:, solid]) < 1e-5
        for other in things:
            stands |= inside(rooms, other, foot)[:, 0] & (np.abs(top[:, other] - bottom[:, solid]) < 1e-5)
        if not FIRST_PART <= solid < FIRST_BALL:
            assert stands[present[:, solid]].all()
    assert 0.3 < present[:, CORRIDOR].mean() < 0.95
    assert present[:, FIRST_BOX:].sum(1).mean() > 5


HISTOGRAM: dict[Domain, list[float]] = {
    "studio": [0.2578, 0.4753, 0.1184, 0.0242, 0.0296, 0.0405, 0.0262, 0.0279],
    "loft": [0.2653, 0.4304, 0.1485, 0.0350, 0.0350, 0.0394, 0.0217, 0.0246],
}
MEAN_COLOUR: dict[Domain, list[float]] = {"studio": [163.1, 166.0, 165.4], "loft": [149.6, 132.5, 108.1]}
"""Shares of the classes and mean colour of scenes 0 to 15. A change here is a change of the data set: raise
`RENDERER_VERSION` with it."""


@pytest.mark.parametrize("domain", DOMAINS)
def test_distribution_is_the_published_one(domain: Domain) -> None:
    batch = render(range(16), domain=domain, seed=0, size=(64, 64))
    histogram = torch.bincount(batch["segmentation"].flatten().long(), minlength=len(CLASSES)) / (16 * 64 * 64)
    assert histogram.tolist() == pytest.approx(HISTOGRAM[domain], abs=1e-3)
    assert batch["image"].double().mean((0, 2, 3)).tolist() == pytest.approx(MEAN_COLOUR[domain], abs=0.5)


def test_domains_differ_in_look_but_not_in_geometry() -> None:
    studio, loft = (render(range(150), domain=domain, seed=3, size=(24, 32)) for domain in DOMAINS)
    shares = [
        torch.bincount(b["segmentation"].flatten().long(), minlength=8) / b["depth"].numel() for b in (studio, loft)
    ]
    assert (shares[0] - shares[1]).abs().max() < 0.03
    assert min(share.min() for share in shares) > 0.01, "every class occurs"
    assert abs(studio["depth"].mean() - loft["depth"].mean()) < 0.25
    warmth = [(b["image"][:, 0].double() - b["image"][:, 2].double()).mean((1, 2)) for b in (studio, loft)]
    assert warmth[1].mean() - warmth[0].mean() > 25
    for batch in (studio, loft):
        brightness = batch["image"].double().mean((1, 2, 3))
        assert brightness.min() > 50 and brightness.max() < 225, "no scene is under- or overexposed"
        assert (batch["image"] == 255).double().mean() < 0.05
    assert not torch.equal(studio["segmentation"], loft["segmentation"])


# --- Determinism ---


def test_a_scene_depends_on_nothing_but_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (33, 47)
    alone = render([3], domain="studio", seed=2, size=size)
    together = render([1, 3, 5], domain="studio", seed=2, size=size)
    monkeypatch.setattr(scenes, "_CPU_TILE", 500)
    one_by_one = render([5, 3], domain="studio", seed=2, size=size)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        monkeypatch.setattr(scenes, "_CPU_TILE", 1 << 30)
        many = render(list(range(30)), domain="studio", seed=2, size=size)
    finally:
        torch.set_num_threads(threads)
    for key in alone:
        assert torch.equal(alone[key][0], together[key][1])
        assert torch.equal(alone[key][0], one_by_one[key][1])
        assert torch.equal(alone[key][0], many[key][3])
    for other in (
        render([3], domain="studio", seed=1, size=size),
        render([4], domain="studio", seed=2, size=size),
    ):
        assert not torch.equal(alone["depth"], other["depth"])


# --- The data set ---


def source(tmp_path: Path | None, **changes: object) -> Scenes:
    arguments = {"count": 5, "domain": "loft", "seed": 4, "size": SIZE, "start": 7, "cache_dir": tmp_path}
    return Scenes(**(arguments | changes))  # type: ignore[arg-type]


def identical(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture
def no_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Batch:
        raise AssertionError("rendered")

    monkeypatch.setattr(scenes, "render", refuse)


@pytest.mark.parametrize("cached", [False, True])
def test_samples_keep_the_contract(tmp_path: Path, cached: bool) -> None:
    data = source(tmp_path if cached else None)
    batch = render([8, 11], domain="loft", seed=4, size=SIZE)
    samples = data.read([1, 4], data.info.targets)
    assert len(data) == 5 and data.name(1) == "loft-4-000008"
    assert data.info.classes == CLASSES
    assert all(data.labelled(target).tolist() == [True] * 5 for target in ("segmentation", "depth", "normals"))
    assert not data.labelled("signal").any()
    for row, sample in enumerate(samples):
        assert np.array_equal(sample["image"], batch["image"][row].permute(1, 2, 0))
        assert np.array_equal(sample["segmentation"], batch["segmentation"][row])
        assert np.array_equal(sample["intrinsics"], batch["intrinsics"][row])
        assert sample["depth"].dtype == sample["normals"].dtype == np.float32
        np.testing.assert_allclose(sample["depth"], batch["depth"][row, 0], rtol=2**-11)
        np.testing.assert_allclose(sample["normals"], batch["normals"][row].permute(1, 2, 0), atol=2**-11)
    (only,) = data.read([2], ["depth"])
    assert set(only) == {"image", "intrinsics", "depth"}
    samples[0]["image"][:] = 0
    assert data.read([1], [])[0]["image"].any(), "a sample is the reader's own"
    assert data.read([], ["depth"]) == []
    for index in (-1, 5):
        with pytest.raises(IndexError):
            data.read([index], [])


def test_cache_is_written_once_and_equals_rendering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    first = source(tmp_path / "new", count=70, progress=lambda *done: calls.append(done))
    assert not (tmp_path / "new").exists(), "nothing happens before the first read"
    samples = first.read(range(70), first.info.targets)
    assert calls == [(64, 70), (70, 70)]
    assert identical(samples[:9], source(None, count=70).read(range(9), first.info.targets))
    assert len(list((tmp_path / "new").iterdir())) == 1

    monkeypatch.setattr(scenes, "render", None)
    second = source(tmp_path / "new", count=70)
    assert identical(samples, second.read(range(70), second.info.targets))


@pytest.mark.parametrize(
    "change",
    [{"count": 4}, {"domain": "studio"}, {"seed": 5}, {"size": (32, 24)}, {"start": 8}],
    ids=lambda change: next(iter(change)),
)
def test_cache_of_another_set_is_not_taken(tmp_path: Path, no_rendering: None, change: dict[str, object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "render", render)
        source(tmp_path).read([0], [])
    source(tmp_path).read([0], [])
    with pytest.raises(AssertionError, match="rendered"):
        source(tmp_path, **change).read([0], [])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="rendered"):
        patch.setattr(scenes, "RENDERER_VERSION", scenes.RENDERER_VERSION + 1)
        source(tmp_path).read([0], [])


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign", "missing array", "text"])
def test_damaged_cache_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    expected = source(tmp_path).read(range(5), ["depth"])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif damage == "foreign":
        save_file({"image": np.zeros((5, *SIZE, 3), np.uint8)}, path)
    elif damage == "missing array":
        arrays = load_file(path)
        del arrays["depth"]
        save_file(arrays, path)
    else:
        path.write_text("not a tensor in sight")
    assert identical(source(tmp_path).read(range(5), ["depth"]), expected)
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(scenes, "render", None)
    assert identical(source(tmp_path).read(range(5), ["depth"]), expected)


def test_writers_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    results: list[list[dict[str, np.ndarray]]] = []
    threads = [
        threading.Thread(target=lambda: results.append(source(tmp_path).read(range(5), ["normals"]))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(identical(results[0], result) for result in results)
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot be kept in .*taken .*choose another folder"):
        source(tmp_path / "taken").read([0], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "lofts"}, r"'lofts' \(did you mean 'loft'\?\); choose one of studio, loft"),
        ({"count": 0}, "number of samples is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"start": -2}, "first scene's number is -2"),
        ({"size": (15, 64)}, "15x64"),
        ({"size": (64, 8)}, "64x8"),
    ],
)
def test_bad_arguments_are_one_sentence(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(None, **change)
