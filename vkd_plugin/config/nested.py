"""What stands in the arguments of single components: mappings within ``kwargs``, and names that are looked up there.

Their signatures do not tell. The classes check the same, for those who call them; here a mistake has its line, and is
found before anything is built.
"""

import sys
from dataclasses import dataclass, replace

import yaml

from vkd_plugin.config.nodes import entries, plain_value
from vkd_plugin.config.schema import AMOUNT, COUNT
from vkd_plugin.config.spec import Anything, Flag, Named, Number, Section, Spec, Text
from vkd_plugin.losses.distances import DISTANCES
from vkd_plugin.normalization import DEFAULT_EPS
from vkd_plugin.projectors import PROJECTORS
from vkd_plugin.readouts import READOUTS
from vkd_plugin.stiefel import ORTHOGONAL_MAPS


@dataclass(frozen=True)
class _Positive(Number):
    low: float | None = sys.float_info.min

    @property
    def expected(self) -> str:
        return "a number greater than 0"


_IO = Text(choices=("output", "input"))
_READ: dict[str, Spec] = {
    "module": Text(),
    "io": _IO,
    "index": Anything(),
    "readout": Text(choices=tuple(READOUTS)),
    "num_prefix_tokens": replace(AMOUNT, nullable=True),
}
_PROJECTOR = Section(
    {
        "key": Text(choices=tuple(PROJECTORS)),
        "in_features": COUNT,
        "out_features": COUNT,
        "orthogonal_map": Text(choices=tuple(ORTHOGONAL_MAPS)),
    },
    open=True,
    component="projector",
    nullable=True,
)
_FEATURE = Section({**_READ, "projector": _PROJECTOR}, ("module",))
_SIDE = Section({**_READ}, ("module",))
_MASK = Section({**_READ}, ("module",), nullable=True)
_LOOKUP = {"is_from_teacher": Flag(), "module_path": Text(), "io": _IO}
_SIMPLE: dict[str, Spec] = {
    "input": Section({**_LOOKUP}, tuple(_LOOKUP)),
    "target": Section({"uses_label": Flag(), **_LOOKUP}),
}

_OF_ALL: dict[str, dict[str, Spec]] = {
    "loss": {
        "label_smoothing": Number(low=0, high=1),
        "temperature": _Positive(),
        "student_module_io": _IO,
        "teacher_module_io": _IO,
    },
    "scheduler": dict.fromkeys(
        ("T_max", "T_0", "step_size", "total_steps", "epochs", "steps_per_epoch"), replace(COUNT, nullable=True)
    ),
}
"""Kind of component -> arguments that mean the same wherever they occur."""

_OF_ONE: dict[tuple[str, str], dict[str, Spec]] = {
    ("student wrapper", "ProjectedStudent"): {"features": Named(_FEATURE)},
    ("loss wrapper", "FeaturePair"): {"student": _SIDE, "teacher": _SIDE, "mask": _MASK},
    ("loss wrapper", "SimpleLossWrapper"): _SIMPLE,
    ("loss wrapper", "DictLossWrapper"): _SIMPLE,
    ("loss", "TokenMatchingLoss"): {
        "pairs": Named(Section({"student": _SIDE, "teacher": _SIDE, "weight": Number(low=0)}, ("student", "teacher")))
    },
    ("loss", "VkDLoss"): {
        "normalization": Text(choices=tuple(DEFAULT_EPS)),
        "distance": Text(choices=tuple(DISTANCES)),
        "eps": Number(low=0, nullable=True),
    },
}
"""Kind of component, its key -> its arguments."""


def with_arguments(spec: Section, node: yaml.MappingNode) -> Section:
    """``spec``, which describes the component in ``node``, with what is known of its arguments."""
    present = entries(node)
    key = plain_value(present["key"][1]) if "key" in present else None
    kind = str(spec.component)
    arguments = _OF_ALL.get(kind, {}) | (_OF_ONE.get((kind, key), {}) if isinstance(key, str) else {})
    if not arguments or not isinstance(spec.keys.get("kwargs"), Named):
        return spec
    kwargs = Section(arguments, open=True, nullable=spec.keys["kwargs"].nullable)
    return replace(spec, keys={**spec.keys, "kwargs": kwargs})
