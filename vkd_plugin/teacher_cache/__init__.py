"""A cache of the teacher's outputs that is exact under augmentation.

.. code-block:: yaml

    train:
      teacher_cache:
        folder: 'runs/teacher_cache'     # one for each teacher, data set and transform
        views: 30                        # augmentations of each sample, one after the other from epoch to epoch
        seed: 0                          # of the views, whatever the run's seed
        dtype: 'bfloat16'                # of what is kept: bfloat16, float16 or float32

A sample's augmentation depends on the views' seed, the sample and the number of the view, and on nothing else, so a
view comes again to the last bit, in this run and in others. The first run to come by computes; all others read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import Experiment
from ..engine.build import blame, is_staged
from ..engine.layout import channels_last
from ..engine.processes import Processes
from ..engine.randomness import Views
from .cache import DTYPES, TeacherCache
from .identity import identity, sign

if TYPE_CHECKING:
    from ..engine.box import EngineBox

__all__ = ["DTYPES", "TeacherCache", "open_cache", "views_of"]


def views_of(experiment: Experiment) -> Views | None:
    """The views that ``train.teacher_cache`` asks for; None without it.

    Raises:
        ConfigError: a cache cannot be right for this experiment, at the line that is why.
    """
    config = _section(experiment)
    if not config:
        return None
    why, *path = _objection(experiment.data)
    if why:
        raise experiment.error(f"{why}, so teacher_cache cannot keep its outputs", *path)
    return Views(config["views"], config.get("seed", 0))


def open_cache(experiment: Experiment, box: "EngineBox", teacher: nn.Module, processes: Processes) -> TeacherCache:
    """The cache in its folder, signed for this teacher and data set.

    Args:
        experiment: with ``train.teacher_cache``.
        box: set up, for its training loader and criterion.
        teacher: bare.
        processes: all of them have to call it, and to see the folder.

    Raises:
        ConfigError: the folder is another's; the message says what differs.
    """
    config = _section(experiment)
    train, section = experiment.data["train"], experiment.data["models"]["teacher_model"]
    with blame(experiment, "train", "teacher_cache", "folder"):
        folder, dtype = Path(config["folder"]), config.get("dtype", "bfloat16")
        dataset: Any = box.train_data_loader.dataset
        described = {name: section.get(name) for name in ("key", "repo_or_dir", "args", "kwargs")}
        computing = {key: train.get(key) for key in ("amp", "teacher_amp")}
        computing["channels_last"] = channels_last(train)["teacher"]
        precision = ", ".join(f"{key} {value or None}" for key, value in computing.items())
        if getattr(dataset, "on_error", None) == "skip":
            raise ValueError(
                "with on_error: 'skip' another image may stand in a sample's place, whose outputs it is not"
            )
        views = dataset.views
        own = identity(teacher, described, precision, dataset, views.count, views.seed, dtype)
        processes.share_result(lambda: sign(folder, own))
        return TeacherCache(folder, len(dataset), dtype, box.criterion)


def _section(experiment: Experiment) -> Mapping[str, Any]:
    return experiment.data["train"].get("teacher_cache") or {}


def _objection(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Why a teacher's outputs are not a function of sample and view, and where that stands; ("",) if they are."""
    train = data["train"]
    if not data["models"].get("teacher_model"):
        return "there is no models.teacher_model", "train", "teacher_cache"
    if train.get("task", "classification") != "classification":
        return "a detector's images are padded to their batch", "train", "task"
    if is_staged(train):
        return "stages may differ in teacher and data", "train", "teacher_cache"
    teacher, loader = train["teacher"], train["train_data_loader"]
    if teacher.get("requires_grad", True):
        return "the teacher trains (requires_grad)", "train", "teacher", "requires_grad"
    if teacher.get("forward_proc", "forward_batch_only") != "forward_batch_only":
        return "the teacher is given more than images", "train", "teacher", "forward_proc"
    for key in ("auxiliary_model_wrapper", "sequential"):
        if teacher.get(key):
            return f"the teacher is changed by {key}", "train", "teacher", key
    if loader.get("collate_fn"):
        return "collate_fn may mix a batch's images", "train", "train_data_loader", "collate_fn"
    return ("",)
