"""VkD for torchdistill: orthogonal projections and task-specific normalisation as YAML-ready modules."""

__version__ = "0.1.0"
