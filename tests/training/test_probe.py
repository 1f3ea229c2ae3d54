import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional

import mtl.experiment
from mtl.cli import main
from mtl.config import DepthOptions, SegmentationOptions
from mtl.data.loading import Samples
from mtl.data.sample import DataInfo, Sample, as_floats
from mtl.models.backbone import Backbone, Pyramid
from mtl.tasks.base import Task
from mtl.tasks.depth import Depth
from mtl.tasks.normals import Normals
from mtl.tasks.segmentation import Segmentation
from mtl.training import probe
from mtl.training.history import History
from mtl.training.probe import LinearProbe, OnlineProbe
from mtl.transfer.weights import load_checkpoint

INFO = DataInfo("stripes", ("segmentation", "depth"), ("a", "b", "c"))
DEPTHS = 2.0, 9.0


class Stripes:
    """Pictures of vertical stripes, each of which has a class, told by its red, and of slopes, whose depth is green."""

    info = INFO

    def __init__(
        self, count: int, size: tuple[int, int] = (64, 64), having: dict[str, Callable[[int], bool]] | None = None
    ) -> None:
        self.count, self.size, self.having = count, size, having or {}
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return str(index)

    def labelled(self, target: str) -> np.ndarray:
        has = self.having.get(target, lambda index: target in self.info.targets)
        return np.array([has(index) for index in range(self.count)])

    def read(self, indices: Sequence[int], targets: Iterable[str]) -> list[Sample]:
        self.asked += indices
        return [self._sample(index, set(targets)) for index in indices]

    def _sample(self, index: int, targets: set[str]) -> Sample:
        generator = np.random.default_rng(index)
        height, width = self.size
        # More of the first class than of the others, so that a constant has something to say.
        classes = generator.choice(3, p=[0.6, 0.2, 0.2], size=-(-width // 16)).astype(np.uint8).repeat(16)[:width]
        green = np.linspace(*generator.uniform(30, 220, 2), height).astype(np.uint8)
        image = np.zeros((height, width, 3), np.uint8)
        image[..., 0], image[..., 1] = 100 * classes, green[:, None]
        depth = DEPTHS[0] + (DEPTHS[1] - DEPTHS[0]) * image[..., 1].astype(np.float32) / 255
        labels = {"segmentation": np.tile(classes, (height, 1)), "depth": depth}
        return {"image": image} | {t: v for t, v in labels.items() if t in targets and self.labelled(t)[index]}


class Known(Backbone):
    """A backbone whose maps at strides 4 and 8 hold the answer, or nothing."""

    def __init__(self, tells: bool = True) -> None:
        nn.Module.__init__(self)
        self.stride, self.strides, self.tells, self.frozen, self._inert = 32, [1, 2, 4, 8], tells, False, []
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Pyramid:
        red, green = image[:, :1], image[:, 1:2]
        classes = torch.cat([((red * 2.55 - number).abs() < 0.1).to(image.dtype) for number in range(3)], 1)
        metres = DEPTHS[0] + (DEPTHS[1] - DEPTHS[0]) * green
        maps = [functional.avg_pool2d(classes, 4), functional.avg_pool2d(metres.expm1().log(), 8)]
        if not self.tells:
            maps = [torch.full_like(known, 7.0) for known in maps]
        # The image itself, which is no feature, and a stage that there is not.
        return Pyramid([image, image[:, :0, ::2, ::2], *maps], [])


def tasks() -> list[Task]:
    return [Segmentation(SegmentationOptions(), INFO), Depth(DepthOptions(), INFO)]


def samples(source: Stripes, **options: Any) -> Samples:
    return Samples(source, range(len(source)), INFO.targets, **options)


def constants(training: Samples, validation: Samples) -> dict[str, float]:
    """Return the metrics of constant predictions, as `LinearProbe` names them."""
    found = {}
    batch = as_floats(validation.__getitems__([probe.Key(row, 0, row) for row in range(len(validation))]))
    for task in tasks():
        task.observe(training.labels(task.target))
        metric = task.metrics()
        metric.update(task.constant(batch[task.target]), batch[task.target])
        found[f"probe/{task.name}/{task.main_metric}"] = float(metric.compute()[task.main_metric])
    return found


def test_what_the_features_hold_is_read_and_what_they_lack_is_not() -> None:
    size = (50, 70)  # no multiple of the backbone's stride
    training, validation = samples(Stripes(40, size)), samples(Stripes(50, size))
    validation.indices = list(range(40, 50))
    read = LinearProbe(tasks(), training, validation, steps=100)
    told, untold, constant = read(Known()), read(Known(tells=False)), constants(training, validation)
    assert told.keys() == constant.keys() == {"probe/segmentation/miou", "probe/depth/abs_rel"}
    assert told["probe/segmentation/miou"] > 0.99 and told["probe/depth/abs_rel"] < 0.02
    # Of features that never change there remains the bias: the best constant.
    assert untold["probe/segmentation/miou"] == pytest.approx(constant["probe/segmentation/miou"], abs=1e-6)
    assert untold["probe/depth/abs_rel"] == pytest.approx(constant["probe/depth/abs_rel"], rel=0.15)


def test_a_head_is_one_linear_layer_on_all_maps_at_one_size() -> None:
    """Reference: the maps resized and concatenated, then a 1x1 convolution."""
    task = tasks()[0]
    maps = [torch.randn(2, channels, size, size) for channels, size in ((5, 16), (7, 8), (11, 2))]
    head = probe._Head(task, [m.shape[1] for m in maps])
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    together = torch.cat([functional.interpolate(m, (16, 16), mode="bilinear") for m in maps], 1)
    expected = functional.conv2d(together, torch.cat(list(head.weights), 1), head.bias.flatten())
    assert torch.allclose(head(maps, (16, 16)), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "inference"), [("mobilenetv4_conv_small", True), ("vit_tiny_patch16_224", False)])
def test_a_backbone_the_generators_and_the_tasks_stay_bit_for_bit(name: str, inference: bool) -> None:
    backbone = Backbone(name, (64, 64)).train()
    backbone.keep_in_evaluation([next(iter(backbone.encoder.children()))])
    read, learning = LinearProbe(tasks(), samples(Stripes(8)), samples(Stripes(4)), steps=2), tasks()
    read.tasks = learning

    def state() -> tuple[list[Any], ...]:
        generators = [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]
        parameters = [(p.requires_grad, p.grad, p._version) for p in backbone.parameters()]
        observed = [buffer.tolist() for task in learning for buffer in task.buffers()]
        return generators, [m.training for m in backbone.modules()], parameters, observed, [backbone.fingerprint()]

    before = state()
    assert len(set(before[1])) == 2, "some modules train, and some do not"
    with torch.inference_mode(inference):
        first = read(backbone)
    assert state() == before
    torch.manual_seed(5)
    assert read(backbone) == first, "what is random follows from the probe's seed alone"


def test_a_failure_leaves_the_modes_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Known().train()
    monkeypatch.setattr(backbone, "forward", lambda image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LinearProbe(tasks(), samples(Stripes(8)), samples(Stripes(4)))(backbone)
    assert backbone.training


def test_half_precision_features_are_read_in_single_precision() -> None:
    read = LinearProbe(tasks(), samples(Stripes(24)), samples(Stripes(8)), steps=100)
    found = read(Known().bfloat16())
    assert found["probe/segmentation/miou"] > 0.99 and found["probe/depth/abs_rel"] < 0.02


class TestImages:
    def test_a_task_without_labels_in_a_split_is_left_out(self) -> None:
        everything, hidden = samples(Stripes(8)), samples(Stripes(8))
        nowhere = samples(Stripes(8, having={"depth": lambda index: False}))
        hidden.hidden = {"depth": frozenset(range(8))}
        every = [*tasks(), Normals(INFO)]
        for lacking in (nowhere, hidden):
            for splits in ((everything, lacking), (lacking, everything)):
                assert LinearProbe(every, *splits, steps=1)(Known()).keys() == {"probe/segmentation/miou"}
        assert LinearProbe(every[1:], nowhere, everything)(Known()) == {}

    def test_labels_are_read_that_training_does_not_use(self) -> None:
        pictures = samples(Stripes(8))
        pictures.targets = ()
        found = LinearProbe(tasks(), pictures, pictures, steps=1)(Known())
        assert found.keys() == {"probe/segmentation/miou", "probe/depth/abs_rel"}

    def test_labels_without_a_valid_pixel_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = Stripes._sample

        def empty(self: Stripes, index: int, targets: set[str]) -> Sample:
            sample = original(self, index, targets)
            return sample | {"depth": np.zeros_like(sample["depth"])}

        monkeypatch.setattr(Stripes, "_sample", empty)
        found = LinearProbe(tasks(), samples(Stripes(8)), samples(Stripes(8)), steps=1)(Known())
        assert found.keys() == {"probe/segmentation/miou"}

    def test_each_task_has_as_many_of_its_own_spread_evenly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probe, "LEARNT", 5)
        monkeypatch.setattr(probe, "MEASURED", 3)
        few = Stripes(100, having={"depth": lambda index: index in (7, 60)})
        validation = Stripes(9)
        LinearProbe(tasks(), samples(few), samples(validation), steps=1)(Known())
        assert sorted(set(few.asked)) == sorted({0, 25, 50, 74, 99} | {7, 60})
        assert sorted(set(validation.asked)) == [0, 4, 8]

    def test_they_are_as_few_as_memory_holds_features_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # A picture has 3 channels at stride 4 and one at stride 8.
        monkeypatch.setattr(probe, "KEPT", 3 * (3 * 16**2 + 8**2) + 100)
        passed: list[int] = []
        forward = Known.forward
        monkeypatch.setattr(Known, "forward", lambda self, image: passed.append(len(image)) or forward(self, image))
        LinearProbe(tasks(), samples(Stripes(101)), samples(Stripes(4)), steps=1)(Known())
        assert passed == [1, 3, 4], "one to see the sizes, those to learn from, and those to measure"

    def test_they_are_not_augmented(self) -> None:
        training = samples(Stripes(8), augment=lambda sample, generator: pytest.fail("augmented"))
        LinearProbe(tasks(), training, samples(Stripes(4)), steps=1)(Known())
        assert training.augment is not None


FLAGS = ["--task", "depth", "--dropout", "0.2", "--data.workers", "0"]


def train(words: list[str], monkeypatch: pytest.MonkeyPatch, before: Sequence[Any], after: Sequence[Any] = ()) -> int:
    """Train with callbacks before and after the others."""
    original = mtl.experiment._callbacks
    with monkeypatch.context() as patch:
        patch.setattr(mtl.experiment, "_callbacks", lambda *a: [*before, *original(*a), *after])
        return main(["train", *words], program="train.py")


def first_weights(backbone: Backbone) -> float:
    return float(next(backbone.parameters()).double().sum())


def probed(folder: Path, name: str = "probe/depth/abs_rel") -> dict[int, float]:
    return dict(zip(*History(folder / "metrics.csv").column(name), strict=True))


def test_the_averaged_weights_are_probed_at_the_start_every_so_often_and_at_the_end(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Another(OnlineProbe):
        pass

    words = [*tiny, *FLAGS, "--epochs", "3", "--ema", "0.9", "--name", "run"]
    # On either side of the callback that puts the average in the model's place.
    first = OnlineProbe(lambda backbone: {"first": first_weights(backbone)}, 2)
    last = Another(lambda backbone: {"last": first_weights(backbone)}, 2)
    assert train(words, monkeypatch, [first], [last]) == 0
    folder = tmp_path / "runs" / "run"
    found = probed(folder, "first")
    # Six steps an epoch, of which there are three.
    assert list(found) == [0, 12, 18] and probed(folder, "last") == found
    stored = load_checkpoint(folder / "last.ckpt")
    name = next(name for name in stored["average"]["raw"] if name.endswith("conv_stem.weight"))
    averaged, raw = (weights[name].double().sum() for weights in (_without_prefix(stored), stored["average"]["raw"]))
    assert found[18] == pytest.approx(float(averaged), abs=1e-9)
    assert found[18] != pytest.approx(float(raw), abs=1e-6)


def _without_prefix(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}


class _PowerCutError(Exception):
    pass


class _Cut(Callback):
    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step == 17:
            raise _PowerCutError


def test_validations_within_epochs_wait_for_an_end_and_a_resumed_run_probes_nothing_twice(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def counted(backbone: Backbone) -> dict[str, float]:
        calls.append(first_weights(backbone))
        return {"probe/depth/abs_rel": calls[-1]}

    words = [*tiny, *FLAGS, "--max-steps", "24", "--validate-every", "5", "--checkpoint-every", "2", "--name", "run"]
    with pytest.raises(_PowerCutError):
        train(words, monkeypatch, [OnlineProbe(counted, 2), _Cut()])
    assert train([*words, "--resume"], monkeypatch, [OnlineProbe(counted, 2)]) == 0
    # Epochs end after 6, 12, 18 and 24 steps; validations come after 5, 10, 15, 20 and, as training stops, 24.
    found = probed(tmp_path / "runs" / "run")
    assert list(found) == [0, 15, 24] and list(found.values()) == calls


def test_other_validations_are_none_of_its_business() -> None:
    online = OnlineProbe(lambda backbone: pytest.fail("probed"), 1)
    for state in (SimpleNamespace(fn="validate"), SimpleNamespace(fn="fit")):
        online.on_validation_epoch_end(SimpleNamespace(state=state, sanity_checking=True), None)


def test_a_run_is_the_same_with_a_probe_as_without(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny, *FLAGS, "--epochs", "2"]
    size = (32, 32)
    read = LinearProbe(tasks(), samples(Stripes(20, size)), samples(Stripes(5, size)), steps=5)
    assert train([*words, "--name", "with"], monkeypatch, [OnlineProbe(read, 1)]) == 0
    assert train([*words, "--name", "without"], monkeypatch, []) == 0
    one, other = (load_checkpoint(tmp_path / "runs" / name / "last.ckpt") for name in ("with", "without"))
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert torch.equal(one["generators"]["torch"], other["generators"]["torch"])
    found = probed(tmp_path / "runs" / "with")
    assert list(found) == [0, 6, 12] and len(set(found.values())) == 3
