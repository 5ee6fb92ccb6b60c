"""What differs between one task and another: the batch, the measure, the metric that chooses a checkpoint."""

from .classification import Classification

__all__ = ["Classification"]
