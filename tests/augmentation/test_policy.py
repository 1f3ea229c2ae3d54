"""The policy: what is drawn for whom, what each flag does, and what files may say."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from mtl.augmentation.policy import Augmentation
from mtl.cli import main
from mtl.config import (
    POLICIES,
    PROBABILITIES,
    STRENGTHS,
    AugmentationOptions,
    Experiment,
    dump,
    load,
    resolve_augmentation,
    validate,
)
from mtl.data.sample import Batch, as_floats
from mtl.data.scenes import render
from mtl.errors import UserError

MIXING = ("cutmix", "mixup", "mosaic")
FULL = {name: 1.0 if name in PROBABILITIES else 0.3 for name in STRENGTHS} | {
    "rotate": 20.0, "shear": 10.0, "blur": 2.0, "motion_blur": 7.0, "hue": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def batch() -> Batch:
    scenes = as_floats(render(range(6), domain="loft", seed=0, size=(40, 56)))
    return {**scenes, "draw": torch.tensor([[2, position] for position in range(6)])}


def augmented(batch: Batch, seed: int = 0, **strengths: float) -> Batch:
    return Augmentation(AugmentationOptions(**strengths), seed)(batch)


def rows(batch: Batch, chosen: list[int]) -> Batch:
    return {name: value[chosen] for name, value in batch.items()}


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestDraws:
    def test_a_sample_s_changes_are_its_own_whoever_shares_the_batch(self, batch: Batch) -> None:
        """So neither workers nor ranks nor the size of the batch make a difference."""
        alone = {name: value for name, value in FULL.items() if name not in MIXING}
        whole = augmented(batch, **alone)
        part = augmented(rows(batch, [4, 1]), **alone)
        for name in whole:
            assert torch.allclose(part[name].double(), whole[name][[4, 1]].double(), atol=1e-5), name

    def test_mixing_depends_on_who_is_in_the_batch_and_not_on_their_order(self, batch: Batch) -> None:
        order = [3, 0, 5, 1, 2, 4]
        for name in MIXING:
            assert same(rows(augmented(batch, **{name: 1.0}), order), augmented(rows(batch, order), **{name: 1.0}))

    def test_seed_epoch_and_position_decide(self, batch: Batch) -> None:
        assert same(augmented(batch, **FULL), augmented(batch, **FULL))
        for other in (augmented(batch, seed=1, **FULL), augmented({**batch, "draw": batch["draw"] + 1}, **FULL)):
            assert not torch.equal(other["image"], augmented(batch, **FULL)["image"])

    def test_samples_of_one_batch_differ(self, batch: Batch) -> None:
        copies = rows(batch, [0] * 6) | {"draw": batch["draw"]}
        turned = augmented(copies, rotate=30.0)["image"]
        assert len({image.numpy().tobytes() for image in turned}) == 6


class TestEachChange:
    @pytest.mark.parametrize("name", STRENGTHS)
    def test_acts_alone_and_leaves_a_good_batch(self, name: str, batch: Batch) -> None:
        # Some act on a share of the samples only, which may be none of six.
        tries = (augmented(batch, seed, **{name: FULL[name]}) for seed in range(20))
        seen = next(tried for tried in tries if not torch.equal(tried["image"], batch["image"]))
        image = seen["image"]
        assert image.shape == batch["image"].shape and image.isfinite().all() and 0 <= image.min() <= image.max() <= 1
        assert set(seen["segmentation"].unique().tolist()) <= {*batch["segmentation"].unique().tolist(), 255}
        length = seen["normals"].norm(dim=1)
        assert (((length - 1).abs() < 1e-3) | (length == 0)).all() and (seen["depth"] >= 0).all()
        if name in ("brightness", "hue", "blur", "noise", "gamma", "jpeg", "vignette", "erase", "grayscale"):
            assert all(torch.equal(seen[key], batch[key]) for key in batch if key != "image"), "light moves no label"

    @pytest.mark.parametrize("name", STRENGTHS)
    def test_is_off_at_zero(self, name: str, batch: Batch) -> None:
        assert augmented(batch, **{name: 0.0}) is batch
        assert augmented(batch, **{name: FULL[name], "magnitude": 0.0}) is batch

    def test_a_probability_is_a_share_of_the_samples(self) -> None:
        copies = {"image": torch.rand(1, 3, 2, 8).expand(2000, -1, -1, -1), "draw": torch.zeros(2000, 2).long()}
        copies["draw"][:, 1] = torch.arange(2000)
        flipped = (augmented(copies, hflip=0.3)["image"] != copies["image"]).flatten(1).any(1)
        assert abs(flipped.float().mean() - 0.3) < 4 * (0.3 * 0.7 / 2000) ** 0.5

    def test_magnitude_is_a_factor_on_strengths(self, batch: Batch) -> None:
        assert same(augmented(batch, rotate=10.0, magnitude=1.5), augmented(batch, rotate=15.0))

    def test_a_crop_shows_nothing_from_outside_and_a_shrunk_picture_all_of_itself(self, batch: Batch) -> None:
        assert (augmented(batch, crop=1.0)["segmentation"] != 255).all()
        small = augmented(batch, scale=0.5)
        for before, after in zip(batch["segmentation"], small["segmentation"], strict=True):
            if (after == 255).any():
                assert count(after) >= 0.9 * (after != 255).sum()
                assert after.unique().numel() - 1 >= before.unique().numel() - 2, "only the thinnest class may vanish"


def count(classes: Tensor) -> int:
    """Return the pixels of the smallest rectangle around what is labelled."""
    labelled = (classes != 255).nonzero()
    height, width = (labelled.max(0).values - labelled.min(0).values + 1).tolist()
    return int(height * width)


class TestConfiguration:
    def test_every_strength_has_a_flag_a_document_and_takes_part_in_some_policy_or_says_why_not(self) -> None:
        assert {"hflip", "vflip", "rotate", "crop", "stretch", "balance", "blur", "vignette", "pincushion"} <= set(
            POLICIES["heavy"]
        ), "the lecture's list is in heavy"
        assert all(set(policy) <= set(STRENGTHS) for policy in POLICIES.values())
        assert all(AugmentationOptions.model_fields[name].description for name in STRENGTHS)

    def test_a_flag_is_stronger_than_the_policy(self) -> None:
        given = validate({"augment": "heavy", "augmentation": {"rotate": 3, "blur": 0}})
        options = resolve_augmentation(given)
        assert (options.rotate, options.blur, options.hflip) == (3, 0, POLICIES["heavy"]["hflip"])

    def test_a_file_becomes_part_of_the_experiment(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("augment: light\nrotate: 7\nloader: [HorizontalFlip]\n")
        experiment = validate({"augment": str(file), "augmentation": {"blur": 1}})
        file.unlink()
        (tmp_path / "config.yaml").write_text(dump(experiment))
        options = resolve_augmentation(load(tmp_path / "config.yaml"))
        assert (options.rotate, options.blur, options.loader) == (7, 1, ["HorizontalFlip"])
        assert options.crop == POLICIES["light"]["crop"]

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"augment": "hevy"}, ["'hevy'", "'heavy'"]),
            ({"augment": "nowhere.yaml"}, ["nowhere.yaml"]),
            ({"augmentation": {"rotate": -1}}, ["rotate", "-1"]),
            ({"augmentation": {"hflip": 1.5}}, ["hflip", "1.5"]),
            ({"augmentation": {"rotat": 1}}, ["'augmentation.rotat'", "'rotate'"]),
            ({"augmentation": {"fill": "wrap"}}, ["fill", "'wrap'", "reflection"]),
        ],
    )
    def test_what_is_refused_is_named(self, values: dict, said: list[str]) -> None:
        with pytest.raises(UserError) as error:
            validate(values)
        assert all(part in str(error.value) for part in said), str(error.value)

    @pytest.mark.parametrize("content", ["rotat: 3", "rotate: fast", "augment: hevy", "- rotate", "loader: 3"])
    def test_a_wrong_file_is_refused(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(content)
        with pytest.raises(UserError, match=r"mine\.yaml"):
            validate({"augment": str(tmp_path / "mine.yaml")})

    def test_nothing_in_the_draws_reads_a_global_generator(self, batch: Batch) -> None:
        torch.manual_seed(1)
        first = augmented(batch, **FULL)
        torch.manual_seed(2)
        assert same(first, augmented(batch, **FULL))
        assert "torch.rand" not in inspect.getsource(Augmentation)


def test_heavy_and_a_loader_pipeline_train(tiny: list[str], tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text(yaml.safe_dump({"augment": "heavy", "loader": ["HorizontalFlip", {"GaussNoise": {"p": 1.0}}]}))
    words = ["--task", "segmentation", "depth", "normals", "--augment", str(file), "--max-steps", "3", "--name", "run"]
    words += ["--data.workers", "0"]
    assert main(["train", *words, *tiny]) == 0
    assert load(tmp_path / "runs" / "run" / "config.yaml").augmentation.loader
    assert Experiment().augment == "none"
