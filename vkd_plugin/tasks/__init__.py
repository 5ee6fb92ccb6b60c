"""What differs between one task and another: the batch, the measure, the metric that chooses a checkpoint."""

from .choice import METRICS, Task, task_for
from .classification import Classification
from .detection import Detection

__all__ = ["METRICS", "Classification", "Detection", "Task", "task_for"]
