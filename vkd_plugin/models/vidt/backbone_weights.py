"""The body's start: weights of a Swin transformer that was trained to classify, in Microsoft's or timm's layout."""

import re

from ..weights import NotDownloaded, fit_weights, load_weights
from .swin import SwinWithDetTokens

_NOT_A_BODYS = re.compile(r"head\.|norm\.|.*\.attn_mask$|.*\.relative_position_index$")


def start_from(backbone: SwinWithDetTokens, source: str) -> None:
    """Fits the weights of a classifier into the body; what detection adds stays as it is.

    The classifier's head and last norm are left out. Missing are the detection tokens and their positions, what is
    made of these in each block, and the last merging.

    Args:
        backbone: of the same size.
        source: a file, ``FILE#key``, or a URL.

    Raises:
        UserError: see :func:`vkd_plugin.models.weights.load_weights`; or the weights are of another model or size.
    """
    loaded = load_weights(source)
    if isinstance(loaded, NotDownloaded):
        return
    last = len(backbone.layers) - 1
    # timm has a stage's merging in front of the next stage.
    behind = any(name.startswith(f"layers.{last}.downsample.") for name in loaded)
    weights = {
        re.sub(r"^layers\.(\d+)\.downsample\.", _one_stage_earlier, name) if behind else name: tensor
        for name, tensor in loaded.items()
        if not _NOT_A_BODYS.match(name)
    }
    own = {name: tensor for name, tensor in backbone.state_dict().items() if _is_detections(name, last)}
    fit_weights(backbone, {**weights, **own}, source)


def _one_stage_earlier(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) - 1}.downsample."


def _is_detections(name: str, last: int) -> bool:
    """Whether a classifier lacks the body's tensor ``name``."""
    return (
        name.startswith(("det_", "norm1.", "norm2.", "norm3.", f"layers.{last}.downsample."))
        or any(part in name for part in (".det_pos_linear.", ".expansion.", ".downsample.norm2."))
        or name.endswith("relative_position_index")
    )
