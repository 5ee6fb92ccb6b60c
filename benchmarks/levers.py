"""What could make a training step of VkD faster or smaller, each lever alone, against leaving it.

    python -m benchmarks.levers [--batch 8] [--rounds 5] [--only teacher ...] [--compile] [--device cuda]

For RegNetY-160 and DeiT-Ti with the convolutional stem at 224 x 224, random weights and images, float32 but where a
lever is another precision:

* **teacher**: its forward pass in inference mode, without its head, with convolutions and their BatchNorm folded into
  one, in channels_last, both, compiled, in a lower precision.
* **student**: its forward and backward pass in channels_last, compiled, in a lower precision.
* **optimizer**: AdamW over the student's and the projector's parameters, one by one as by default on a CPU, in lists,
  fused.
* **memory**: the most that a step of ours holds at once, and the same if the teacher's feature map is averaged as soon
  as it is there, and not when the loss reads it.

The ways of a group take turns; ratios, to the first of the group, are medians over the rounds. ``benchmarks.step`` says
what part of a step each group is.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d, ConvNormAct
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks import measuring
from benchmarks.projector import peak_mib
from benchmarks.step import Setting, measure, ours
from vkd_plugin.losses import FeaturePair
from vkd_plugin.losses.feature_pair import ReadOut
from vkd_plugin.projectors import OrthogonalProjector

Ways = dict[str, Callable[[], object]]


def folded(teacher: nn.Module) -> nn.Module:
    """A copy in which each BatchNorm behind a convolution is part of it."""
    teacher = copy.deepcopy(teacher)
    for module in teacher.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.bn, BatchNormAct2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Sequential(module.bn.drop, module.bn.act)
    return teacher


def channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def compiled(model: nn.Module, mode: str | None = None) -> nn.Module:
    model = copy.deepcopy(model)
    model.compile(mode=mode)
    return model


def ways_of_the_teacher(setting: Setting) -> Ways:
    teacher, images = setting.teacher(compiled=False), setting.images
    rows = images.contiguous(memory_format=torch.channels_last)

    def forward(model: Callable[[Tensor], Any], images: Tensor = images, half: bool = False) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), torch.autocast(setting.device.type, setting.amp, enabled=half):
                model(images)

        return run

    def inference() -> None:
        with torch.inference_mode():
            teacher(images)

    ways = {
        "as it is, no_grad": forward(teacher),
        "inference_mode": inference,
        "without its head": forward(lambda x: teacher.forward_head(teacher.forward_features(x), pre_logits=True)),
        "folded": forward(folded(teacher)),
        "channels_last": forward(channels_last(teacher), rows),
        "folded, channels_last": forward(channels_last(folded(teacher)), rows),
    }
    if setting.amp is not None:
        ways[f"{setting.amp}".removeprefix("torch.")] = forward(teacher, half=True)
    if setting.compile:
        ways |= {"compiled": forward(compiled(teacher)), "folded, compiled": forward(compiled(folded(teacher)))}
        if setting.device.type == "cuda":
            ways["compiled, CUDA graphs"] = forward(compiled(teacher, "reduce-overhead"))
    return ways


def ways_of_the_student(setting: Setting) -> Ways:
    student, images = setting.student(), setting.images
    rows = images.contiguous(memory_format=torch.channels_last)

    def pass_(model: nn.Module, images: Tensor = images, half: bool = False) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            with torch.autocast(setting.device.type, setting.amp, enabled=half):
                head, distilled = model(images)
            (head.float().square().mean() + distilled.float().square().mean()).backward()

        return run

    ways = {
        "as it is": pass_(student),
        "channels_last": pass_(channels_last(student), rows),
    }
    if setting.amp is not None:
        ways[f"{setting.amp}".removeprefix("torch.")] = pass_(student, half=True)
    return ways | ({"compiled": pass_(compiled(student))} if setting.compile else {})


def ways_of_the_optimizer(setting: Setting) -> Ways:
    def step(**kwargs: bool) -> Callable[[], None]:
        student = setting.student()
        projector = OrthogonalProjector(student.embed_dim, 3024, device=setting.device)
        parameters = [*student.parameters(), *projector.parameters()]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        return torch.optim.AdamW(parameters, lr=1e-6, **kwargs).step

    return {"one by one": step(foreach=False), "foreach": step(foreach=True), "fused": step(fused=True)}


GROUPS: dict[str, Callable[[Setting], Ways]] = {
    "teacher": ways_of_the_teacher,
    "student": ways_of_the_student,
    "optimizer": ways_of_the_optimizer,
}


def peaks(setting: Setting) -> dict[str, float]:
    """The most memory that a step of ours held at once, in MiB, with the map kept and not."""
    step, box = ours(setting), setting.trainer.box
    for _ in range(2):
        step()
    found = {"the map until the loss": peak_mib(step, setting.device.type)}
    forward = box.get_teacher_output

    def pooled(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        output, io_dict = forward(*args, **kwargs)
        rows: dict[str, Any] = {".": {}}
        for term, _ in box.criterion.term_dict.values():
            if isinstance(term, FeaturePair):
                place = rows.setdefault(term.teacher.module, {})
                place.setdefault(term.teacher.io, ReadOut())[term.teacher] = term.teacher.read(io_dict)
        return output, rows

    box.get_teacher_output = pooled
    return found | {"its mean at once": peak_mib(step, setting.device.type)}


def main(argv: list[str] | None = None) -> None:
    """Print the tables, and write them where ``--json`` says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.levers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, everything = parser.add_argument, [*GROUPS, "memory"]
    add("--student", choices=("deit_tiny", "deit_small"), default="deit_tiny", help="default: %(default)s")
    add("--teacher", default="regnety_160", help="another RegNetY of timm, for a quick look (default: %(default)s)")
    add("--batch", type=int, default=8, help="images (default: %(default)s)")
    add("--rounds", type=int, default=5, help="of which the medians are taken (default: %(default)s)")
    add("--only", nargs="+", choices=everything, default=everything, help="groups (default: all)")
    add("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    add("--amp", choices=("bfloat16", "float16"), help="also in this precision, which few CPUs have")
    add("--compile", action="store_true", help="also what is compiled")
    add("--json", type=Path, metavar="OUT", help="write the figures and the machine to this file")
    args = parser.parse_args(argv)
    where, setting = measuring.setting("levers", args, argv), Setting(args)
    found: dict[str, Any] = {}
    for group in args.only:
        if group == "memory":
            setting.amp, setting.compile = None, False
            found[group] = peaks(setting)
            print(f"\n{'memory':28}{'peak MiB':>12}")
            for name, peak in found[group].items():
                print(f"  {name:26}{peak:12.1f}")
            continue
        taken = measure(GROUPS[group](setting), args.rounds, setting, memory=False)
        base = next(iter(taken.values()))
        found[group] = {name: figures.summary(base) for name, figures in taken.items()}
        print(f"\n{group:28}{'ms':>12}{'ratio':>9}{'of the processor':>20}{'ratio':>9}")
        for name, row in found[group].items():
            clock = f"{row['milliseconds']:12.1f}{row['ratio']:9.3f}"
            print(f"  {name:26}{clock}{row['processor_milliseconds']:20.1f}{row['processor_ratio']:9.3f}", flush=True)
    if args.json:
        about = {
            **where,
            "timm": timm.__version__,
        }
        args.json.write_text(json.dumps({**about, "groups": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
