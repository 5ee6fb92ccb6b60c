"""``config.json`` in the layout of timm and the Hugging Face hub, and the lines of Python that load the folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torchvision
from safetensors.torch import load_file
from torch import nn
from torchdistill.models.registry import MODEL_DICT

from ..engine.build import model_sections
from .preprocessing import Preprocessing
from .trained import Trained, model_config

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"

# What timm's own configuration of an architecture says of its modules; the rest is about other weights.
_STRUCTURE = ("fixed_input_size", "min_input_size", "pool_size", "first_conv", "classifier")
_NO_ARGUMENTS = ("name", "num_classes")  # of a model of timm: they have their own place


@dataclass(frozen=True)
class Layout:
    """How the exported folder says what its weights are of.

    Attributes:
        name: of the architecture.
        is_timm: whether ``timm.create_model`` loads the folder.
        config: the contents of ``config.json``.
        code: Python that, run in the folder, makes ``model``.
    """

    name: str
    is_timm: bool
    config: dict[str, Any]
    code: str


def layout(trained: Trained, seen: Preprocessing, num_classes: int | None) -> Layout:
    """The layout for a trained student.

    Args:
        trained: see above.
        seen: how its images are prepared.
        num_classes: of its output; None where it cannot be told.

    Raises:
        UserError: an argument of the model that JSON cannot hold.
    """
    own = getattr(trained.model, "pretrained_cfg", None)
    own = own if isinstance(own, Mapping) else {}
    architecture = own.get("architecture")
    pretrained = {**seen.told, "num_classes": num_classes}
    arguments = {name: _plain(value, name, trained) for name, value in trained.kwargs.items()}
    if architecture is None or not timm.is_model(architecture):
        return _of_registry(trained, arguments, pretrained)
    pretrained |= {name: own.get(name) for name in _STRUCTURE if name in own}
    config = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": getattr(trained.model, "num_features", None),
        "pretrained_cfg": pretrained,
        "model_args": {k: v for k, v in arguments.items() if k not in _NO_ARGUMENTS and v is not None},
    }
    module = timm.models.model_entrypoint(architecture).__module__
    imports = ["import timm", *([] if module.startswith("timm.") else [_import(module)])]
    code = [*sorted(imports), "", 'model = timm.create_model("local-dir:.", pretrained=True).eval()']
    if not seen.untold and {"mean", "crop_pct"} <= seen.told.keys():
        code.append("transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))")
    return Layout(architecture, True, config, "\n".join(code))


def _of_registry(trained: Trained, arguments: dict[str, Any], pretrained: dict[str, Any]) -> Layout:
    section = model_config(trained.experiment)
    key, where = str(section["key"]), section.get("repo_or_dir")
    # Which run.py, as torchdistill, asks first.
    home = next((m for m in (torchvision.models, torchvision.models.detection) if key in vars(m)), None)
    is_torchvision = home is not None
    config = {
        "library": "torchvision" if is_torchvision else "torchdistill",
        "key": key,
        **({"repo_or_dir": where} if where and not is_torchvision else {}),
        "kwargs": arguments,
        "num_classes": pretrained["num_classes"],
        "pretrained_cfg": pretrained,
    }
    if home is not None:
        imports = ["import torchvision", "from safetensors.torch import load_file"]
        build = f'getattr({home.__name__}, config["key"])(**config["kwargs"])'
    else:
        imports = [] if where else [_import(MODEL_DICT[key].__module__)]
        imports += ["from safetensors.torch import load_file", "from torchdistill.models.registry import get_model"]
        build = 'get_model(config["key"], config.get("repo_or_dir"), **config["kwargs"])'
    code = [
        "import json",
        "",
        *imports,
        "",
        f'config = json.load(open("{CONFIG}"))',
        f"model = {build}",
        f'model.load_state_dict(load_file("{WEIGHTS}"))',
        "model.eval()",
    ]
    return Layout(key, False, config, "\n".join(code))


def loaded(trained: Trained, found: Layout, folder: Path) -> nn.Module:
    """The model that those who have the folder alone get: timm reads it; of others the architecture is built anew."""
    if found.is_timm:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model = trained.rebuilt()
    model.load_state_dict(load_file(folder / WEIGHTS))  # as in the card's lines
    return model


def _import(module: str) -> str:
    """The import that registers what ``module`` defines: of the plugin, importing the package does."""
    own = __name__.partition(".")[0]
    return f"import {own if module.partition('.')[0] == own else module}  # registers the architecture"


def _plain(value: Any, name: str, trained: Trained) -> Any:
    """``value`` as JSON has it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, tuple | list):
        return [_plain(item, name, trained) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, name, trained) for key, item in value.items()}
    _, section = model_sections(trained.experiment)
    raise trained.experiment.error(
        f"{type(value).__name__} is nothing that {CONFIG} can hold, so the model could not be built from it",
        *("models", section, "kwargs", name),
    )
