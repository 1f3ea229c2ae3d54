"""A task of one's own: edges, where one class ends and another begins.

python train.py --plugin tests/examples/edges.py --task edges
"""

import torch
from torch.nn import functional as F
from torchmetrics import Metric

import mtl


def edges_of(classes):
    """Return which pixels differ from a neighbour (B, H, W), and which are known: labelled like the neighbours."""
    around = F.pad(classes.float()[:, None], (1, 1, 1, 1), mode="replicate")
    highest, lowest = F.max_pool2d(around, 3, 1), -F.max_pool2d(-around, 3, 1)
    return (highest != lowest)[:, 0], (highest != 255)[:, 0]


class EdgeMetric(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction, target):
        edge, known = edges_of(target)
        found = prediction > 0.5
        self.counts += torch.stack([(a & known).sum() for a in (edge & found, ~edge & found, edge & ~found)])

    def compute(self):
        right, wrong, missed = self.counts.double()
        precision, recall = right / (right + wrong).clamp(min=1), right / (right + missed).clamp(min=1)
        f1 = 2 * right / (2 * right + wrong + missed).clamp(min=1)
        return {"f1": f1, "precision": precision, "recall": recall}


@mtl.register_task
class Edges(mtl.Task):
    name = "edges"
    target = "segmentation"  # the labels to learn from
    likelihood = "categorical"  # of the loss, for --weighting uncertainty
    main_metric = "f1"
    higher_is_better = {"f1": True, "precision": True, "recall": True}
    channels = 1  # of the head's output

    def __init__(self, info: mtl.DataInfo):
        super().__init__()
        self.register_buffer("share", torch.tensor(0.5))  # of edge pixels; travels in checkpoints

    def observe(self, targets):
        counts = sum(torch.stack([(e & k).sum(), k.sum()]) for e, k in map(edges_of, targets))
        self.share.fill_(float(counts[0] / counts[1].clamp(min=1)))

    def initial_bias(self):
        return torch.logit(self.share.clamp(0.01, 0.99)).reshape(1)

    def loss(self, outputs, batch):
        edge, known = edges_of(batch["segmentation"])
        loss = F.binary_cross_entropy_with_logits(outputs[:, 0].float(), edge.float(), reduction="none")
        return mtl.masked_mean(loss, known)

    def predict(self, outputs):
        return outputs[:, 0].float().sigmoid()

    def constant(self, target):
        return torch.ones_like(target, dtype=torch.float32)  # "everything is an edge" has the best F1 of a constant

    def metrics(self):
        return EdgeMetric()

    def remaining_error(self, metrics):
        return 1 - metrics["f1"]

    def pictures(self, prediction, target):
        maps = {} if target is None else {"edges target": edges_of(target)[0].float()}
        maps["edges prediction"] = prediction
        grey = {title: (255 * values).byte().cpu().numpy()[..., None].repeat(3, -1) for title, values in maps.items()}
        return {title: mtl.Panel(images) for title, images in grey.items()}
