"""What a check finds out about an experiment; ``dataclasses.asdict`` of it is the JSON."""

from dataclasses import dataclass, field

from ..errors import ConfigError


@dataclass
class ModelFacts:
    """One model: ``role`` is its key under ``models``; FLOPs (two for a multiplication with addition) per sample."""

    role: str
    name: str
    parameters: int
    trainable: int
    flops: int | None = None


@dataclass
class DataFacts:
    """One data set: ``length`` is None where it is not here; ``sample`` is the shape of one."""

    name: str
    kind: str
    length: int | None
    is_here: bool
    sample: list[int] | None = None


@dataclass
class FeatureFacts:
    """What is hooked: ``side`` is ``teacher`` or ``student``, ``shape`` that of a batch."""

    side: str
    path: str
    io: str
    shape: list[int] | str
    projector: str | None = None


@dataclass
class TermFacts:
    """A term of the loss: ``criterion`` is its key, ``has_gradient`` whether it trains anything."""

    name: str
    criterion: str
    weight: float
    has_gradient: bool


@dataclass
class GroupFacts:
    """A parameter group of the optimizer; ``parameters`` counts numbers, ``tensors`` tensors."""

    lr: float
    weight_decay: float | None
    tensors: int
    parameters: int


@dataclass
class MemoryFacts:
    """Estimated bytes in one process: what is allocated at the end of a forward pass, and gradients."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass
class StageFacts:
    """One stage of training (the only one has no name)."""

    name: str | None
    epochs: int
    batch_size: int | None = None
    batch_is_global: bool = False
    """Whether all processes share it."""
    steps_per_epoch: int | None = None
    features: list[FeatureFacts] = field(default_factory=list)
    terms: list[TermFacts] = field(default_factory=list)
    optimizer: str = ""
    groups: list[GroupFacts] = field(default_factory=list)
    scheduler: str | None = None
    schedule: list[float] | None = None
    """Learning rate of the first group at equal distances from the beginning of the stage to its end."""
    memory: MemoryFacts | None = None


@dataclass
class Facts:
    """All that is known of one experiment file."""

    path: str
    problems: list[ConfigError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    models: list[ModelFacts] = field(default_factory=list)
    datasets: list[DataFacts] = field(default_factory=list)
    stages: list[StageFacts] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    """What the engine's own keys ask for."""
