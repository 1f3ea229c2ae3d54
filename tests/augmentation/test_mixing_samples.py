"""Hiding parts of pictures, and several pictures in one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from mtl.augmentation.mixing import cutmix, erase, mixup, mosaic, partners, place_boxes
from mtl.data.sample import TARGETS, Batch

sizes = st.tuples(st.integers(1, 5), st.integers(1, 13), st.integers(1, 13))
subsets = st.sets(st.sampled_from([*TARGETS, "intrinsics"]))
seeds = st.integers(0, 1000)


def make(size: tuple[int, int, int], keys: set[str] | None = None, seed: int = 0, invalid: float = 0.3) -> Batch:
    """Return a batch with some labels missing, in which no two numbers are equal but for the classes."""
    g = torch.Generator().manual_seed(seed)
    b, h, w = size
    valid = torch.rand(b, h, w, generator=g) >= invalid
    batch = {
        "image": torch.rand(b, 3, h, w, generator=g),
        "segmentation": torch.randint(0, 13, (b, h, w), generator=g, dtype=torch.uint8).masked_fill(~valid, 255),
        "depth": (torch.rand(b, 1, h, w, generator=g) + 0.5) * valid[:, None],
        "normals": torch.nn.functional.normalize(torch.randn(b, 3, h, w, generator=g), dim=1) * valid[:, None],
        "intrinsics": torch.eye(3).repeat(b, 1, 1) * torch.arange(1, b + 1).view(b, 1, 1),
    }
    return {key: value for key, value in batch.items() if keys is None or key in {"image", *keys}}


def origin(batch: Batch, mixed: Batch) -> Tensor:
    """Return which sample each pixel of the image (B, H, W) is from; its targets must be from there as well."""
    b = len(batch["image"])
    where = (mixed["image"][:, None] == batch["image"]).all(dim=2)
    assert where.any(dim=1).all(), "a pixel is in none of the pictures, or has moved"
    source = where.to(torch.uint8).argmax(dim=1)
    for key in TARGETS:
        if key in batch:
            options, result = batch[key], mixed[key]
            index = source if options.ndim == 3 else source[:, None].expand_as(result)
            assert torch.equal(result, options.gather(0, index)), key
            assert result.dtype == options.dtype
    assert mixed.keys() == batch.keys()
    if "intrinsics" in batch:
        for i in range(b):
            seen = source[i].unique()
            expected = batch["intrinsics"][seen[0]] if len(seen) == 1 else torch.zeros(3, 3)
            assert torch.equal(mixed["intrinsics"][i], expected)
    return source


@given(sizes, subsets, seeds)
def test_cutmix_pastes_image_and_targets_alike(size, keys, seed):
    batch, g = make(size, keys, seed), torch.Generator().manual_seed(seed)
    others = torch.randint(0, size[0], size[:1], generator=g)
    boxes = torch.rand(size[0], 2, 2, generator=g).sort(dim=1).values.flatten(1)
    source = origin(batch, cutmix(batch, others, boxes))
    for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
        for y in range(size[1]):
            for x in range(size[2]):
                inside = left <= (x + 0.5) / size[2] < right and top <= (y + 0.5) / size[1] < bottom
                assert source[i, y, x] == (others[i] if inside else i)


@given(sizes, subsets, seeds)
def test_a_mosaic_is_four_corners_around_its_centre(size, keys, seed):
    batch, g = make(size, keys, seed), torch.Generator().manual_seed(seed)
    others, centre = torch.randint(0, size[0], (size[0], 3), generator=g), torch.rand(size[0], 2, generator=g)
    source = origin(batch, mosaic(batch, others, centre))
    for i in range(size[0]):
        for y in range(size[1]):
            for x in range(size[2]):
                right, below = (x + 0.5) / size[2] >= centre[i, 0], (y + 0.5) / size[1] >= centre[i, 1]
                assert source[i, y, x] == [i, *others[i]][int(right) + 2 * int(below)]


def test_a_common_camera_stays_and_an_unknown_one_spoils_it():
    batch = make((3, 4, 4), {"intrinsics"})
    batch["intrinsics"][1] = batch["intrinsics"][0]
    batch["intrinsics"][2] = 0
    half = torch.tensor([[0.0, 0.0, 0.5, 1.0]]).expand(3, 4)
    cameras = cutmix(batch, torch.tensor([1, 2, 0]), half)["intrinsics"]
    assert torch.equal(cameras[0], batch["intrinsics"][0])
    assert not cameras[1:].any()
    # A box without a pixel's centre shows nothing of the partner; one that covers all shows nothing else.
    sliver = torch.tensor([[0.0, 0.0, 0.1, 1.0]]).expand(3, 4)
    assert torch.equal(cutmix(batch, torch.tensor([2, 2, 0]), sliver)["intrinsics"], batch["intrinsics"])
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4)
    assert torch.equal(cutmix(batch, torch.tensor([2, 2, 0]), whole)["intrinsics"][2], batch["intrinsics"][0])


@given(sizes, subsets, seeds)
def test_strength_zero_is_bit_for_bit_nothing(size, keys, seed):
    batch = make(size, keys, seed)
    other = torch.arange(size[0]).roll(1)
    empty = place_boxes(torch.zeros(size[0]), torch.ones(size[0]), torch.rand(size[0], 2))
    for changed in (
        cutmix(batch, other, empty),
        mosaic(batch, other[:, None].expand(-1, 3), torch.ones(size[0], 2)),
        mixup(batch, other, torch.ones(size[0])),
        erase(batch, empty[:, None], torch.zeros(()), "ignore"),
    ):
        assert changed is not batch and changed.keys() == batch.keys()
        assert all(torch.equal(changed[key], batch[key]) for key in batch)


@given(sizes, subsets, seeds, st.sampled_from(["keep", "ignore"]))
def test_erasing_fills_the_boxes_and_nothing_else(size, keys, seed, targets):
    batch, g = make(size, keys, seed), torch.Generator().manual_seed(seed)
    boxes = torch.rand(size[0], 2, 2, 2, generator=g).sort(dim=2).values.flatten(2)
    fill = batch["image"].mean(dim=(2, 3), keepdim=True)
    before = {key: value.clone() for key, value in batch.items()}
    erased = erase(batch, boxes, fill, targets)
    assert all(torch.equal(batch[key], before[key]) for key in batch), "the batch itself was changed"
    x, y = (torch.arange(size[2]) + 0.5) / size[2], (torch.arange(size[1]) + 0.5) / size[1]
    for i in range(size[0]):
        hidden = torch.zeros(size[1:], dtype=torch.bool)
        for left, top, right, bottom in boxes[i]:
            hidden |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
        assert torch.equal(erased["image"][i], torch.where(hidden, fill[i], batch["image"][i]))
        for key in keys & TARGETS.keys():
            expected = batch[key][i].clone()
            if targets == "ignore":
                expected[..., hidden] = 255 if key == "segmentation" else 0
            assert torch.equal(erased[key][i], expected)


def test_erasing_agrees_with_torchvision():
    batch = make((2, 20, 30))
    box = torch.tensor([6 / 30, 5 / 20, 15 / 30, 12 / 20]).expand(2, 1, 4)
    noise = torch.rand(2, 3, 20, 30)
    theirs = V.erase(batch["image"], 5, 6, 7, 9, noise[..., 5:12, 6:15])
    assert torch.equal(erase(batch, box, noise)["image"], theirs)


@given(sizes, subsets, seeds, st.floats(0, 1, width=32))
def test_mixup_keeps_only_what_is_true_of_the_picture(size, keys, seed, share):
    batch = make(size, keys, seed)
    other = torch.arange(size[0]).roll(1)
    mixed = mixup(batch, other, torch.full(size[:1], share))
    torch.testing.assert_close(mixed["image"], share * batch["image"] + (1 - share) * batch["image"][other])
    assert mixed["image"].min() >= 0 and mixed["image"].max() <= 1
    lead, rest = (batch, {k: v[other] for k, v in batch.items()})[:: 1 if share >= 0.5 else -1]
    for key in keys:
        same = lead[key] == rest[key]
        if key == "intrinsics":
            same = same.all(dim=(1, 2), keepdim=True)
        elif key != "segmentation":
            same = same.all(dim=1, keepdim=True)
        if min(share, 1 - share) <= 0.25:
            same = torch.ones_like(same)
        assert torch.equal(mixed[key], torch.where(same, lead[key], 255 if key == "segmentation" else 0))
        assert mixed[key].dtype == batch[key].dtype


@given(sizes, seeds)
def test_no_class_appears_and_no_label_from_nothing(size, seed):
    batch = make(size, seed=seed)
    empty = make(size, seed=seed, invalid=1.1)
    g = torch.Generator().manual_seed(seed)
    others = torch.randint(0, size[0], (size[0], 3), generator=g)
    boxes = place_boxes(*torch.rand(2, size[0], generator=g), torch.rand(size[0], 2, generator=g))
    share = torch.rand(size[0], generator=g)
    for change in (
        lambda b: cutmix(b, others[:, 0], boxes),
        lambda b: mosaic(b, others, boxes[:, 2:]),
        lambda b: mixup(b, others[:, 0], share),
        lambda b: erase(b, boxes[:, None], torch.rand(size[0], 3, *size[1:]), "ignore"),
    ):
        changed = change(batch)
        assert set(changed["segmentation"].unique().tolist()) <= {255, *batch["segmentation"].unique().tolist()}
        lengths = changed["normals"].norm(dim=1)
        assert ((lengths - 1).abs() < 1e-5)[lengths > 0].all() and changed["image"].isfinite().all()
        changed = change(empty)
        assert (changed["segmentation"] == 255).all() and not changed["depth"].any() and not changed["normals"].any()


@given(st.integers(1, 9), st.integers(1, 5), seeds)
def test_partners_are_the_same_in_any_order_and_serve_equally(count, each, seed):
    g = torch.Generator().manual_seed(seed)
    keys, order = torch.rand(count, generator=g), torch.randperm(count, generator=g)
    found = partners(keys, each)
    assert found.shape == (count, each)
    assert torch.equal(order[partners(keys[order], each)], found[order])
    assert all(sorted(column.tolist()) == list(range(count)) for column in found.T)
    for k in range(min(each, count - 1)):
        assert (found[:, k] != torch.arange(count)).all()
        assert all((found[:, k] != found[:, j]).all() for j in range(k))


@given(st.floats(0, 1), st.floats(0.25, 4), st.floats(0, 1), st.floats(0, 1))
def test_boxes_have_their_share_and_shape_within_the_frame(area, aspect, x, y):
    box = place_boxes(torch.tensor([area]), torch.tensor([aspect]), torch.tensor([[x, y]]))[0]
    left, top, right, bottom = box.tolist()
    assert left >= 0 and top >= 0 and right <= 1 + 1e-6 and bottom <= 1 + 1e-6
    width, height = right - left, bottom - top
    if width < 0.999 and height < 0.999:
        assert width * height == pytest.approx(area, abs=1e-5)
        assert width == pytest.approx(height * aspect, abs=1e-5)
    assert left == pytest.approx(x * (1 - width), abs=1e-5) and top == pytest.approx(y * (1 - height), abs=1e-5)


def test_all_of_it_compiles_as_one_region():
    def mix(batch: Batch, keys: Tensor, boxes: Tensor) -> Batch:
        others = partners(keys, 3)
        batch = mosaic(cutmix(batch, others[:, 0], boxes), others, boxes[:, :2])
        batch = mixup(batch, others[:, 1], keys)
        return erase(batch, boxes[:, None], batch["image"].mean(dim=(2, 3), keepdim=True), "ignore")

    batch, keys, boxes = make((4, 6, 5)), torch.rand(4), torch.tensor([[0.2, 0.3, 0.7, 0.8]]).expand(4, 4)
    compiled, eager = (
        torch.compile(mix, fullgraph=True, backend="aot_eager")(batch, keys, boxes),
        mix(batch, keys, boxes),
    )
    assert all(torch.equal(compiled[key], eager[key]) for key in eager)
