"""Small grey images of few classes, held in memory."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


class GreyImages(Dataset[tuple[Any, Any]]):
    """Items are ``(image, label)``: a PIL image of mode ``L`` and an int; each goes through its transform.

    Args:
        images: (N, H, W), uint8.
        targets: N labels.
        classes: names by label.
        transform, target_transform: see above.
    """

    def __init__(
        self,
        images: np.ndarray,
        targets: list[int],
        classes: Sequence[str],
        transform: Callable[[Image.Image], Any] | None,
        target_transform: Callable[[int], Any] | None,
    ) -> None:
        self._images = images
        self.targets = targets
        self.classes = list(classes)
        self.transform = transform
        self.target_transform = target_transform

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image: Any = Image.fromarray(self._images[index])
        label: Any = self.targets[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label

    def __len__(self) -> int:
        return len(self.targets)
