"""``run.py export``: the student of a run, for those who have neither the run nor the plugin."""

from .export import export_run

__all__ = ["export_run"]
