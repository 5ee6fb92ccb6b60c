"""Which of a data set's transforms has failed."""

import yaml

from ..config import Experiment
from ..config.construct import target_name
from ..config.nodes import entries
from .places import Path


def place_of_transform(error: BaseException, experiment: Experiment, name: str) -> Path:
    """The way to the innermost call in the data set ``name`` that made an object which raised ``error``."""
    made: dict[str, Path] = {}

    def visit(node: yaml.Node, path: Path) -> None:
        if isinstance(node, yaml.MappingNode):
            if node.tag == "!import_call" and (target := target_name(node)):
                made.setdefault(target.rpartition(".")[2], path)
            for key, (_, value) in entries(node).items():
                if isinstance(key, str | int):
                    visit(value, (*path, key))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                visit(item, (*path, index))

    place: Path = ("datasets", name)
    datasets = entries(experiment.root)["datasets"][1]
    if isinstance(datasets, yaml.MappingNode) and name in (present := entries(datasets)):
        visit(present[name][1], place)
    trace = error.__traceback__
    while trace is not None:
        own = trace.tb_frame.f_locals.get("self")
        place = made.get(type(own).__name__, place)
        trace = trace.tb_next
    return place
