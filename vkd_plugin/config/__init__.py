"""Experiment files: ``load_experiment`` reads one, applies overrides, checks everything and builds it.

text -> source (nodes with lines) -> overrides -> structure (schema) -> references (registries) -> construct
"""

from vkd_plugin.config.experiment import Experiment, load_experiment
from vkd_plugin.config.problems import ConfigErrors

__all__ = ["ConfigErrors", "Experiment", "load_experiment"]
