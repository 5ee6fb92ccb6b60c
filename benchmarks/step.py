"""What a training step of VkD costs, against the least that any distillation costs and against others' steps.

    python -m benchmarks.step [--student deit_tiny] [--batch 8] [--device cuda] [--amp bfloat16] [--compile]

DeiT-Ti (or DeiT-S) with the convolutional stem from RegNetY-160 at 224 x 224, random weights, one batch of random
images that stays the same, no loading. Four steps take turns in one process, all with the same two models and AdamW:

* **bound**: the teacher's forward pass in inference mode, the student's forward and backward pass on labels, AdamW.
* **ours**: the experiment ``configs/ilsvrc2012/vkd`` through torchdistill's box and run.py's engine, guard and all: an
  orthogonal projection of the mean patch token, layer norm and smooth L1; KL to the teacher's logits; cross-entropy.
* **reference**: what the released code does, written anew: torch's Householder parametrisation of the projection, the
  same three losses, a synchronisation and four losses read back at each step.
* **timm**: timm's FeatureDistillationTask: a linear projection with a bias of the mean of the two prefix tokens, its
  mean squared error to the teacher's pooled features, and cross-entropy of the mean of both heads. No loss on the
  teacher's logits, whose head it leaves out.

Printed are medians over the rounds, ratios to the bound within a round, and the most memory that a step held at once
beyond what it found. On a CPU also seconds of the processor, which say more than the clock's where other programs run.
Then, of one step of ours, each part's share of the time (:mod:`benchmarks.parts`): forward and backward pass together,
but for the student; the profiler makes short operators seem longer.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.task.distillation import FeatureDistillationTask
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from benchmarks import measuring
from benchmarks.parts import NEEDED, parts
from benchmarks.projector import peak_mib
from vkd_plugin.config import load_experiment
from vkd_plugin.datasets.tiny_imagenet import write_tree
from vkd_plugin.engine.build import build_model, model_sections
from vkd_plugin.engine.loaders import set_position
from vkd_plugin.engine.processes import Processes
from vkd_plugin.engine.train import Trainer

CONFIG = "configs/ilsvrc2012/vkd/{}_from_regnety_160.yaml"
Step = Callable[[], object]


class Setting:
    """What all steps have in common.

    Attributes:
        images, labels, targets: (B, 3, 224, 224); (B,) int64; (B, 1000), of mixup's kind.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device: torch.device = args.device
        self.amp = getattr(torch, args.amp) if args.amp else None
        self.compile: bool = args.compile
        self.batch: int = args.batch
        self.teacher_name: str = args.teacher
        self.student_size: str = args.student
        self.student_name = f"{args.student}_distilled_conv_patch16_224"
        draw = torch.Generator().manual_seed(0)
        self.images = torch.randn(args.batch, 3, 224, 224, generator=draw).to(self.device)
        self.labels = torch.randint(1000, (args.batch,), generator=draw).to(self.device)
        self.targets = F.one_hot(self.labels, 1000).float()

    def teacher(self, compiled: bool = True) -> nn.Module:
        teacher = timm.create_model(self.teacher_name).eval().requires_grad_(False).to(self.device)
        return self.compiled(teacher) if compiled else teacher

    def student(self) -> nn.Module:
        return timm.create_model(self.student_name).train().to(self.device)

    def compiled(self, model: nn.Module) -> nn.Module:
        if self.compile:
            model.compile()
        return model

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def optimizer(self, *modules: nn.Module) -> Callable[[Tensor], None]:
        """What follows a forward pass: backward, AdamW as in our experiment, and a gradient scaler for float16."""
        kwargs = {**self.trainer.config["optimizer"]["kwargs"]}
        kwargs.pop("weight_decay_of")
        optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], **kwargs)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)

        def update(loss: Tensor) -> None:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return update

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @cached_property
    def trainer(self) -> Trainer:
        """Of our experiment, about to take its first step."""
        amp = f"{{dtype: {str(self.amp).removeprefix('torch.')}}}" if self.amp else "null"
        loader = f"{{batch_size: {self.batch}, num_workers: 0, drop_last: True}}"
        with tempfile.TemporaryDirectory() as folder:  # images are needed to set the experiment up, and no longer
            write_tree(Path(folder), classes=2, train=max(4, -(-self.batch // 2)), val=2)
            changes = [
                f"datasets._root={folder}",
                "datasets.ilsvrc2012/train.init.kwargs.num_classes=2",
                "datasets.ilsvrc2012/val.init.kwargs.num_classes=2",
                f"models.teacher_model={{key: timm_model, kwargs: {{name: {self.teacher_name}, pretrained: False}}}}",
                f"train.amp={amp}",
                f"train.train_data_loader.kwargs={loader}",
                f"train.val_data_loader.kwargs={loader}",
                f"train.compile={{student: {self.compile}, teacher: {self.compile}}}",
            ]
            experiment = load_experiment(CONFIG.format(self.student_size), changes)
            sections = model_sections(experiment)
            teacher, student = (build_model(experiment, key, self.device, False) for key in sections if key)
            trainer = Trainer(experiment, teacher, student, Processes(0, 1, self.device), None, seed=0)
        trainer.box.pre_epoch_process(epoch=0)
        set_position(trainer.box.train_data_loader, 0)
        return trainer


def bound(setting: Setting) -> Step:
    teacher, student = setting.teacher(), setting.compiled(setting.student())
    update = setting.optimizer(student)

    def step() -> None:
        with setting.autocast():
            with torch.inference_mode():
                teacher(setting.images)
            logits, _ = student(setting.images)
            loss = F.cross_entropy(logits.float(), setting.labels)
        update(loss)

    return step


def ours(setting: Setting) -> Step:
    trainer = setting.trainer
    data = trainer.box.train_data_loader

    def step() -> None:
        trainer._step((setting.images, setting.targets, {}), data, False)
        trainer._between_steps(True)

    return step


def reference(setting: Setting) -> Step:
    teacher, student = setting.teacher(), setting.student()
    channels: int = teacher.num_features
    rows: dict[str, Tensor] = {}
    teacher.final_conv.register_forward_hook(lambda module, inputs, output: rows.update(teacher=output.mean((2, 3))))
    student.norm.register_forward_hook(lambda module, inputs, output: rows.update(student=output[:, 2:].mean(1)))
    projector = nn.Linear(student.embed_dim, channels, bias=False).to(setting.device)
    orthogonal(projector, orthogonal_map="householder")
    update = setting.optimizer(student, projector)

    def step() -> float:
        with setting.autocast():
            with torch.no_grad():
                taught = teacher(setting.images)
            logits, distilled = student(setting.images)
            feature = F.smooth_l1_loss(projector(rows["student"]), F.layer_norm(rows["teacher"], (channels,)))
            kl = F.kl_div(distilled.log_softmax(-1), taught.softmax(-1), reduction="batchmean")
            ce = torch.sum(-setting.targets * logits.log_softmax(-1), dim=-1).mean()
            loss = ce + kl + feature
        update(loss)
        setting.synchronize()
        return sum(value.item() for value in (loss, ce, kl, feature))

    return step


def timms(setting: Setting) -> Step:
    student = setting.student()
    student.set_distilled_training(False)  # one tensor of logits, which both heads still make
    criterion = nn.CrossEntropyLoss()
    task = FeatureDistillationTask(
        student, setting.teacher(compiled=False), criterion, device=setting.device, verbose=False
    )
    task.train()
    update = setting.optimizer(task.trainable_module)
    if setting.compile:
        task.compile()

    def step() -> None:
        with setting.autocast():
            loss = task(setting.images, setting.labels)["loss"]
        update(loss)

    return step


STEPS: dict[str, Callable[[Setting], Step]] = {"bound": bound, "ours": ours, "reference": reference, "timm": timms}


@dataclass
class Figures:
    """Of one kind of step.

    Args:
        seconds, processor: of each round, by the clock and of the processor's time.
        mib: the most memory held at once beyond what was there, in MiB.
    """

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    mib: float = 0.0

    def summary(self, base: "Figures") -> dict[str, float]:
        """Medians, and those of the ratios to ``base`` within a round."""
        return {
            "milliseconds": 1e3 * statistics.median(self.seconds),
            "ratio": _ratio(self.seconds, base.seconds),
            "processor_milliseconds": 1e3 * statistics.median(self.processor),
            "processor_ratio": _ratio(self.processor, base.processor),
            "peak_mib": self.mib,
        }


def _ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def measure(steps: dict[str, Step], rounds: int, setting: Setting, memory: bool = True) -> dict[str, Figures]:
    """The steps in turn, each round beginning with another of them; then the memory of one of each."""
    found = {name: Figures() for name in steps}
    for step in steps.values():
        for _ in range(2):  # compile, allocate, and the optimizer's first state
            step()
    gc.collect()
    names = list(steps)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            setting.synchronize()
            clock, processor = time.perf_counter(), time.process_time()
            steps[name]()
            setting.synchronize()
            found[name].seconds.append(time.perf_counter() - clock)
            found[name].processor.append(time.process_time() - processor)
    for name, step in steps.items() if memory else ():
        found[name].mib = peak_mib(step, setting.device.type)
    return found


def added(shares: dict[str, float]) -> float:
    """What a step has besides teacher, student and optimizer, relative to these: another view of ours to the bound.

    Shares are of one step, so that what else the machine does falls on all of them alike. Cross-entropy, which the
    bound has too, counts as added.
    """
    needed = sum(shares[name] for name in NEEDED)
    return (sum(shares.values()) - needed) / needed


def show(summaries: dict[str, dict[str, float]], shares: dict[str, float], base: str) -> None:
    against = f"/ {base}"
    print(f"{'':12}{'ms a step':>12}{against:>12}{'of the processor':>20}{against:>12}{'peak MiB':>12}")
    for name, row in summaries.items():
        clock = f"{row['milliseconds']:12.1f}{row['ratio']:12.3f}"
        processor = f"{row['processor_milliseconds']:20.1f}{row['processor_ratio']:12.3f}"
        print(f"{name:12}{clock}{processor}{row['peak_mib']:12.1f}")
    for name, share in shares.items():
        print(f"{100 * share:8.3f} % of ours: {name}")
    if shares:
        print(f"{100 * added(shares):8.3f} % added to teacher, student and optimizer by all else")


def main(argv: list[str] | None = None) -> None:
    """Print the table, and write it where ``--json`` says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--student", choices=("deit_tiny", "deit_small"), default="deit_tiny", help="default: %(default)s")
    add("--teacher", default="regnety_160", help="another RegNet of timm, for a quick look (default: %(default)s)")
    add("--batch", type=int, default=8, help="images (default: %(default)s)")
    add("--rounds", type=int, default=5, help="of which the medians are taken (default: %(default)s)")
    everything = list(STEPS)
    add("--only", nargs="+", choices=STEPS, default=everything, help="steps; ratios are to the first (default: all)")
    add("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    add("--amp", choices=("bfloat16", "float16"), help="autocast of all steps (default: float32)")
    add("--compile", action="store_true", help="compile teacher and student, but the reference's student")
    add("--json", type=Path, metavar="OUT", help="write the figures and the machine to this file")
    args = parser.parse_args(argv)
    where, setting = measuring.setting("step", args, argv), Setting(args)
    steps = {name: STEPS[name](setting) for name in args.only}
    found = measure(steps, args.rounds, setting)
    base = args.only[0]
    summaries = {name: figures.summary(found[base]) for name, figures in found.items()}
    shares = parts(setting.trainer, steps["ours"], setting.device) if "ours" in steps else {}
    show(summaries, shares, base)
    if args.json:
        about: dict[str, Any] = {
            **where,
            **{name: str(value) for name, value in vars(args).items() if name not in ("json", "only")},
            "timm": timm.__version__,
        }
        rounds = {name: {"seconds": f.seconds, "processor": f.processor} for name, f in found.items()}
        text = json.dumps(
            {
                **about,
                "steps": summaries,
                "shares_of_ours": shares,
                "added": added(shares) if shares else None,
                "rounds_of_each": rounds,
            },
            indent=1,
        )
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
