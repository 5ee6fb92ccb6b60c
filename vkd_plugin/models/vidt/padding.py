"""Images of different sizes as one batch, and where in it there is no image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError


def pad_images(images: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Zeros at the right and at the bottom, up to the largest height and the largest width.

    Args:
        images: each (3, H_i, W_i), floating point, all of one dtype and on one device; or a batch (B, 3, H, W).

    Returns:
        The batch (B, 3, H, W) in the dtype of the images, and the mask (B, H, W), bool, True on padding.

    Raises:
        UserError: no images, or anything else than images.
    """
    if len(images) == 0:
        raise UserError("ViDT was given a batch without images")
    for number, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0 or not image.is_floating_point():
            raise UserError(
                f"ViDT reads images (3, H, W) as floating-point numbers, and image {number} of the batch is "
                f"{image.dtype} of shape {tuple(image.shape)}"
            )
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=images[0].device)
    for number, (_, h, w) in enumerate(image.shape for image in images):
        mask[number, :h, :w] = False
    if isinstance(images, Tensor):
        return images, mask
    batch = images[0].new_zeros(len(images), 3, height, width)
    for number, image in enumerate(images):
        batch[number, :, : image.shape[1], : image.shape[2]] = image
    return batch, mask


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (B, H, W), bool, at another size, by the nearest pixel."""
    return F.interpolate(mask[None].float(), size=size).to(torch.bool)[0]


def valid_ratio(mask: Tensor) -> Tensor:
    """The part of the width and of the height that is image, (B, 2) in float32, of a mask (B, H, W)."""
    _, height, width = mask.shape
    rows, columns = (~mask[:, :, 0]).sum(1), (~mask[:, 0, :]).sum(1)
    return torch.stack([columns.float() / width, rows.float() / height], dim=-1)
