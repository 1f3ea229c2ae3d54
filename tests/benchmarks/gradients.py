"""How the gradients of tasks meet on the shared features, and on the backbone's parameters, along one training.

python tests/benchmarks/gradients.py --config configs/nyuv2.yaml [--data.root DIR] [flags of a training]

The features' matrix costs nothing and is what rules see; the parameters' is what the papers define. Both are taken of
the same batches, every tenth step of one training with equal weights. Prints a table, and writes a picture beside it.
"""

import dataclasses
import sys
from pathlib import Path

import lightning
import numpy as np
import torch
from matplotlib.figure import Figure

from mtl.build import Surroundings, build_module, keep_samples, load_samples, make_loader, make_trainer
from mtl.cli.words import base_of
from mtl.config import validate
from mtl.experiment import _prepare
from mtl.flags import Configured, parse, train_flags, values_of, with_values
from mtl.training.balancing import LossBalancer
from mtl.training.module import LOG_EVERY, MultiTaskModule
from mtl.weighting.rules import make_rule


@dataclasses.dataclass
class _Flags(Configured):
    picture: Path = Path("gradients.png")


def main(words: list[str]) -> None:
    flags = train_flags(_Flags)
    given = values_of(parse(flags, with_values(flags, base_of(words).model_dump()), words, "gradients.py", __doc__))
    picture = given.pop("picture")
    experiment = validate({name: v for name, v in given.items() if name not in ("plugin", "config")})
    lightning.seed_everything(experiment.seed, verbose=False)
    samples = load_samples(experiment, "train", Surroundings())
    keep_samples(experiment, [samples], Surroundings())
    steps = experiment.max_steps or 100
    module = build_module(experiment, samples.source.info, steps)
    _prepare(module, experiment, samples, Surroundings())
    likelihoods = {task.name: task.likelihood for task in module.each_task()}
    seen = {on: LossBalancer(make_rule("equal", likelihoods, {}), on=on) for on in ("features", "parameters")}
    loader = make_loader(samples, experiment, make_trainer(experiment, logger=False), training=True)
    optimizer = module.configure_optimizers()["optimizer"]
    found: dict[str, dict[int, dict[str, float]]] = {on: {} for on in seen}
    step = epoch = 0
    module.train()
    while step < steps:
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            batch = module.on_after_batch_transfer(batch, 0)
            MultiTaskModule.global_step = property(lambda self, step=step: step)
            for on, balancer in seen.items():
                module.balancer = balancer
                if on == "features" or (step + 1) % LOG_EVERY == 0:
                    total = module.training_step(batch, 0)
                    if (step + 1) % LOG_EVERY == 0:
                        found[on][step + 1] = dict(module.terms)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            step += 1
            if step == steps:
                break
        epoch += 1
    report(found, list(likelihoods), picture)


def report(found: dict[str, dict[int, dict[str, float]]], tasks: list[str], path: Path) -> None:
    pairs = [f"{a}-{b}" for i, a in enumerate(tasks) for b in tasks[i + 1 :]]
    steps = list(found["features"])
    figure = Figure(figsize=(5 * len(pairs), 3.4), layout="constrained")
    print(f"torch {torch.__version__}, {len(steps)} steps compared\n")
    print("| pair | cosine, features | cosine, parameters | correlation | same sign |\n|---|---:|---:|---:|---:|")
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        values = {on: np.array([found[on][step][f"train/cosine/{pair}"] for step in steps]) for on in found}
        one, other = values.values()
        means = " | ".join(f"{v.mean():+.3f} ± {v.std(ddof=1):.3f}" for v in (one, other))
        same = (np.sign(one) == np.sign(other)).mean()
        print(f"| {pair} | {means} | {np.corrcoef(one, other)[0, 1]:.2f} | {same:.0%} |")
        for on, cosines in values.items():
            axes.plot(steps, cosines, label=f"on the {on}", marker=".", linewidth=1)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=f"cosine of the gradients of {pair.replace('-', ' and ')}", xlabel="step")
        axes.legend()
    figure.savefig(path, dpi=110)
    shares = {on: [found[on][s][f"train/gradient_share/{tasks[0]}"] for s in steps] for on in found}
    print(
        f"\nshare of {tasks[0]} in the gradients' norm: "
        + ", ".join(f"{on} {np.mean(v):.2f}" for on, v in shares.items())
    )


if __name__ == "__main__":
    main(sys.argv[1:])
