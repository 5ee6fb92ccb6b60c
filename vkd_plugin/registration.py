"""Makes everything known to torchdistill under its class name; importing :mod:`vkd_plugin` imports this."""

from torchdistill.models.registry import register_adaptation_module, register_auxiliary_model_wrapper

from . import datasets, host, models, schedules  # noqa: F401 - these register themselves
from .losses import registration  # noqa: F401 - so do losses and their wrappers
from .normalization import Normalization
from .projectors import PROJECTORS
from .wrappers import ProjectedStudent

host.install()
register_auxiliary_model_wrapper(ProjectedStudent)
for _module in (*PROJECTORS.values(), Normalization):
    register_adaptation_module(_module)
