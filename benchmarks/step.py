"""What a training step of VkD costs, against the least that any distillation costs and against others' steps.

    python -m benchmarks.step [--student deit_tiny] [--batch 8] [--device cuda] [--amp bfloat16] [--compile]

DeiT-Ti (or DeiT-S) from RegNetY-160 at 224 x 224, random weights, one batch of random images that stays the same, no
loading. Four steps take turns in one process; printed are medians over the rounds, and ratios within a round:

* **bound**: the teacher's forward pass in inference mode, the student's forward and backward pass on labels, AdamW.
* **ours**: the experiment ``configs/ilsvrc2012/vkd`` through torchdistill's box and run.py's engine, guard and all.
* **reference**: what the released code does, written anew: torch's Householder parametrisation of a 192 x 3,024
  weight, layer norm and smooth L1, KL and cross-entropy, a synchronisation and four losses read back at each step.
* **timm**: timm's FeatureDistillationTask (a linear projection, mean squared error), with timm's plain DeiT.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.task.distillation import FeatureDistillationTask
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

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
        self.config = CONFIG.format(args.student)
        self.student_name = f"{args.student}_distilled_conv_patch16_224"
        draw = torch.Generator().manual_seed(0)
        self.images = torch.randn(args.batch, 3, 224, 224, generator=draw).to(self.device)
        self.labels = torch.randint(1000, (args.batch,), generator=draw).to(self.device)
        self.targets = F.one_hot(self.labels, 1000).float()

    def teacher(self) -> nn.Module:
        teacher = timm.create_model("regnety_160").eval().requires_grad_(False).to(self.device)
        return self.compiled(teacher)

    def student(self) -> nn.Module:
        return timm.create_model(self.student_name).train().to(self.device)

    def compiled(self, model: nn.Module) -> nn.Module:
        if self.compile:
            model.compile()
        return model

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def adamw(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=5e-4, weight_decay=0.05)


def bound(setting: Setting) -> Step:
    teacher, student = setting.teacher(), setting.compiled(setting.student())
    optimizer = adamw(student)

    def step() -> None:
        with setting.autocast():
            with torch.inference_mode():
                teacher(setting.images)
            logits, _ = student(setting.images)
            loss = F.cross_entropy(logits.float(), setting.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(setting: Setting) -> Step:
    folder = tempfile.TemporaryDirectory()  # of images whose only use is that the experiment has a data set
    write_tree(Path(folder.name), classes=2, train=max(4, -(-setting.batch // 2)), val=2)
    amp = f"{{dtype: {str(setting.amp).removeprefix('torch.')}}}" if setting.amp else "null"
    loader = f"{{batch_size: {setting.batch}, num_workers: 0, drop_last: True}}"
    changes = [
        f"datasets._root={folder.name}",
        "datasets.ilsvrc2012/train.init.kwargs.num_classes=2",
        "datasets.ilsvrc2012/val.init.kwargs.num_classes=2",
        "models.teacher_model={key: timm_model, kwargs: {name: regnety_160, pretrained: False}}",
        f"train.amp={amp}",
        f"train.train_data_loader.kwargs={loader}",
        f"train.compile={{student: {setting.compile}, teacher: {setting.compile}}}",
    ]
    experiment = load_experiment(setting.config, changes)
    teacher, student = (
        build_model(experiment, key, setting.device, False) for key in model_sections(experiment) if key
    )
    trainer = Trainer(experiment, teacher, student, Processes(0, 1, setting.device), None, seed=0)
    data = trainer.box.train_data_loader
    trainer.box.pre_epoch_process(epoch=0)
    set_position(data, 0)

    def step() -> None:
        trainer._step((setting.images, setting.targets, {}), data, False)
        trainer._between_steps(True)

    step.keep = folder  # type: ignore[attr-defined]
    return step


def reference(setting: Setting) -> Step:
    teacher, student = setting.teacher(), setting.student()
    rows: dict[str, Tensor] = {}
    teacher.final_conv.register_forward_hook(lambda module, inputs, output: rows.update(teacher=output.mean((2, 3))))
    student.norm.register_forward_hook(lambda module, inputs, output: rows.update(student=output[:, 2:].mean(1)))
    projector = nn.Linear(student.embed_dim, 3024, bias=False).to(setting.device)
    orthogonal(projector, orthogonal_map="householder")
    optimizer = adamw(student, projector)

    def step() -> float:
        with setting.autocast():
            with torch.no_grad():
                taught = teacher(setting.images)
            logits, distilled = student(setting.images)
            feature = F.smooth_l1_loss(projector(rows["student"]), F.layer_norm(rows["teacher"], (3024,)))
            kl = F.kl_div(distilled.log_softmax(-1), taught.softmax(-1), reduction="batchmean")
            ce = torch.sum(-setting.targets * logits.log_softmax(-1), dim=-1).mean()
            loss = ce + kl + feature
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        setting.synchronize()
        return sum(value.item() for value in (loss, ce, kl, feature))

    return step


def timms(setting: Setting) -> Step:
    student = timm.create_model("vit_tiny_patch16_224" if "tiny" in setting.student_name else "vit_small_patch16_224")
    task = FeatureDistillationTask(
        student.to(setting.device), setting.teacher(), nn.CrossEntropyLoss(), device=setting.device, verbose=False
    )
    task.train()
    setting.compiled(student)
    optimizer = adamw(task.trainable_module)

    def step() -> None:
        with setting.autocast():
            loss = task(setting.images, setting.labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS: dict[str, Callable[[Setting], Step]] = {"bound": bound, "ours": ours, "reference": reference, "timm": timms}


def seconds(step: Step, setting: Setting) -> float:
    setting.synchronize()
    start = time.perf_counter()
    step()
    setting.synchronize()
    return time.perf_counter() - start


def shares(step: Step, setting: Setting) -> dict[str, float]:
    """Parts of a step of ours by the profiler's time in the forward pass of each module, and in what follows."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        setting.synchronize()
    total = sum(event.self_cpu_time_total + event.self_device_time_total for event in profile.key_averages())
    rows = sorted(profile.key_averages(), key=lambda e: -(e.self_cpu_time_total + e.self_device_time_total))
    return {row.key: (row.self_cpu_time_total + row.self_device_time_total) / total for row in rows[:8]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=("deit_tiny", "deit_small"), default="deit_tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="which steps (default: all)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="default: float32")
    parser.add_argument("--compile", action="store_true", help="compile teacher and student, where the step does so")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    setting = Setting(args)
    if args.amp == "float16":
        print("note: bound, reference and timm take no gradient scaler", file=sys.stderr)

    steps = {name: STEPS[name](setting) for name in args.only}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(2):  # compile, allocate, and the optimizer's first state
            step()
    gc.collect()
    for _ in range(args.rounds):
        for name, step in steps.items():
            taken[name].append(seconds(step, setting))
    peaks = {}
    if setting.device.type == "cuda":
        for name, step in steps.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30

    base = next(iter(steps))
    print(f"{'':12}{'ms a step':>12}{'/ ' + base:>12}" + ("   GiB above what is held" if peaks else ""))
    found: dict[str, dict[str, float]] = {}
    for name, times in taken.items():
        ratio = statistics.median(a / b for a, b in zip(times, taken[base], strict=True))
        found[name] = {"milliseconds": 1e3 * statistics.median(times), "ratio": ratio}
        found[name] |= {"gib": peaks[name]} if peaks else {}
        print(f"{name:12}{found[name]['milliseconds']:12.1f}{ratio:12.3f}" + (f"{peaks[name]:15.2f}" if peaks else ""))
    parts = shares(steps["ours"], setting) if "ours" in steps else {}
    for name, share in parts.items():
        print(f"  {100 * share:5.1f} % of ours: {name}")
    if args.json:
        versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.processor()}
        described = {name: str(value) for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"steps": found, "shares": parts, **described, **versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
