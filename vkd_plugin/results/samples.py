"""The test samples that figures of a run are computed from: few, always the same ones."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..config import Experiment
from ..engine.build import blame
from ..engine.loaders import build_loader
from ..suggest import nearest
from ..tasks.classification import Classification

SAMPLES = 500
"""Most samples."""

CLASSES = 10
"""Most classes among them, where the data set lists its targets: more cannot be told apart by colour."""

BATCH = 100


class ChosenSamples:
    """Samples of the ``test`` section's data set, with its transforms, wrapper and collate function.

    Args:
        experiment: see above.
        seed: of the run; addresses whatever is random in the transforms.
        device: where they are kept.

    Raises:
        UserError: they cannot be loaded, or their targets are not classes.

    Attributes:
        available: size of the data set.
        count: of the samples chosen from it.
        classes: names by label; empty where the data set does not know them.
        batches: images and labels (N,).
    """

    def __init__(self, experiment: Experiment, seed: int, device: torch.device) -> None:
        config: Mapping[str, Any] = experiment.data["test"]["test_data_loader"]
        datasets: Mapping[str, Any] = experiment.data["datasets"]
        name = str(config.get("dataset_id"))
        if name not in datasets:
            raise experiment.error(f"no data set '{name}'{nearest(name, datasets)}", "test", "test_data_loader")
        with blame(experiment, "test", "test_data_loader"):
            dataset = datasets[name]
            self.available = len(dataset)
            chosen = chosen_samples(self.available, getattr(dataset, "targets", None), SAMPLES)
            self.count = len(chosen)
            self.classes = [str(name) for name in getattr(dataset, "classes", ())]
            self.batches = list(_batches(Subset(dataset, chosen), config, seed, device))

    def labels(self) -> Tensor:
        """Of all samples, (N,) on the CPU."""
        return torch.cat([targets for _, targets in self.batches]).cpu()

    def some(self, count: int) -> tuple[Tensor, Tensor]:
        """Images and labels of at most ``count`` samples, from all of them."""
        samples, targets = (torch.cat(side) for side in zip(*self.batches, strict=True))
        rows = torch.linspace(0, len(samples) - 1, min(count, len(samples))).long().to(samples.device)
        return samples[rows], targets[rows]


def _batches(
    dataset: Dataset[Any], config: Mapping[str, Any], seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    # Not the section's sampler, which would be of the whole data set, nor its workers.
    section = {key: config[key] for key in ("dataset_wrapper", "requires_supp", "collate_fn") if key in config}
    for batch in build_loader(dataset, {**section, "kwargs": {"batch_size": BATCH}}, train=False, seed=seed):
        samples, targets, _ = Classification().unpack(batch, device)
        if targets.dim() != 1:
            raise ValueError(f"targets should be classes (N,), got shape {tuple(targets.shape)}")
        yield samples, targets


def chosen_samples(available: int, targets: Any, count: int) -> list[int]:
    """Indices of the samples to look at, always the same, in order.

    Args:
        available: size of the data set.
        targets: class of each sample, if the data set lists them: then samples are of CLASSES classes at most.
        count: how many at most.
    """
    random = np.random.default_rng(0)
    among = np.arange(available)
    labels = np.asarray(targets) if targets is not None and len(targets) == available else None
    if labels is not None and labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        classes = np.unique(labels)
        if len(classes) > CLASSES:
            among = among[np.isin(labels, random.choice(classes, CLASSES, replace=False))]
    chosen = random.choice(among, min(count, len(among)), replace=False)
    return [int(index) for index in sorted(chosen)]
