"""The model card: what the run recorded, and nothing else."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from ..engine.build import model_sections, stage_sections
from ..engine.checkpoint import BEST
from ..engine.records import versions
from ..models.detector_labels import labels_of
from ..results.runs import as_mapping, is_number
from .kind import DETECTOR, Kind, kind_of
from .layout import CONFIG, WEIGHTS, Layout
from .onnx_file import NAME, OnnxFacts
from .preprocessing import Preprocessing
from .trained import Trained, model_config


def card(trained: Trained, described: Layout, seen: Preprocessing, onnx: OnnxFacts | None) -> str:
    """The text of ``README.md``."""
    parts = [
        _front_matter(trained, described),
        _head(trained, described),
        _loading(trained, described, seen),
        _training(trained),
        _figures(trained),
        *([_onnx(onnx)] if onnx else []),
        _versions(trained),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _front_matter(trained: Trained, described: Layout) -> str:
    teacher, _ = model_sections(trained.experiment)
    does = kind_of(trained.experiment).tag
    tags = [does, *(["knowledge-distillation"] if teacher else [])]
    lines = [*(["library_name: timm"] if described.is_timm else []), f"pipeline_tag: {does}"]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _head(trained: Trained, described: Layout) -> str:
    count = sum(p.numel() for p in trained.model.parameters())
    made = "Distilled" if model_sections(trained.experiment)[0] else "Trained without a teacher"
    weights = f"`{WEIGHTS}` holds the weights of checkpoint `{trained.checkpoint.name}`"
    if trained.is_average:
        weights += ", the exponential moving average of the student"
    noun, classes = kind_of(trained.experiment).noun, _classes(trained, described)
    return f"""# {described.name}

An {noun} of {classes} with {count:,} parameters. {made} with torchdistill and vkd_plugin.
{weights}."""


def _classes(trained: Trained, described: Layout) -> str:
    if kind_of(trained.experiment) is not DETECTOR:
        return f"{described.config['num_classes']} classes"
    known = labels_of(trained.model)
    return f"the labels {known.start} to {known.stop - 1}" if known else "labels that it does not tell"


def _loading(trained: Trained, described: Layout, seen: Preprocessing) -> str:
    about = f"## Load it\n\nIn this folder:\n\n```python\n{described.code}\n```"
    if kind_of(trained.experiment) is DETECTOR:
        about += (
            "\n\n`model(images)`, of a list of tensors (3, height, width), gives for each `boxes` (left, top, right,\n"
            "bottom in its pixels), `labels` and `scores`."
        )
    if seen.written is None:
        return f"{about}\n\nHow images were prepared cannot be told from the run."
    about += f"\n\nImages were prepared for evaluation with\n\n```text\n{seen.written}\n```"
    if seen.untold:
        steps = ", ".join(f"`{' '.join(step.split())}`" for step in seen.untold)
        about += f"\n\nof which `pretrained_cfg` in `{CONFIG}` has no words for {steps}."
    return about


def _training(trained: Trained) -> str:
    return "## How it was trained\n\n" + "\n".join(f"* {line}" for line in _trained_how(trained))


def _trained_how(trained: Trained) -> Iterator[str]:
    run, data = trained.run, trained.experiment.data
    if config := run.summary.get("config"):
        overrides = [word for override in run.summary.get("overrides") or [] for word in ("--set", override)]
        yield f"configuration: `{shlex.join([config, *overrides])}`"
    yield f"student: {_model(model_config(trained.experiment))}"
    teacher, _ = model_sections(trained.experiment)
    if teacher:
        yield f"teacher: {_model(data['models'][teacher])}"
    for key, source in trained.began_with.items():
        yield f"began with: `{key}` `{source}`"
    sections = stage_sections(data["train"])
    for number, section in enumerate(sections, 1):
        terms = as_mapping(as_mapping(section.get("criterion")).get("kwargs")).get("sub_terms")
        if isinstance(terms, Mapping) and terms:
            of = f" of stage {number}" if len(sections) > 1 else ""
            yield f"loss{of}: {', '.join(_term(name, term) for name, term in terms.items())}"
    for feature, projector in run.projectors.items():
        yield f"projector of `{feature}`: {projector}"
    if trained.epoch is not None:
        of = f" of {run.epochs}" if run.epochs is not None else ""
        yield f"weights of epoch {trained.epoch}{of}" + _after(trained)
    else:
        yield f"weights from `{trained.checkpoint}`, which is not a checkpoint of the run"
    if not run.finished:
        yield f"the run is {run.status}"
    for name, key in (("seed", "seed"), ("seconds", "wall_seconds"), ("device", "device"), ("processes", "world_size")):
        if (value := run.summary.get(key)) is not None:
            yield f"{name}: {value}"


def _after(trained: Trained) -> str:
    if trained.record or trained.step is None:
        return ""
    return f", step {trained.step}: within the epoch after it"


def _model(config: Mapping[str, Any]) -> str:
    kwargs = config.get("kwargs") or {}
    return f"`{config['key']}` `{json.dumps(kwargs, default=str)}`"


def _term(name: str, term: Mapping[str, Any]) -> str:
    key = as_mapping(term.get("criterion")).get("key", "?")
    return f"{name} ({key}, weight {term.get('weight', 1.0):g})"


def _figures(trained: Trained) -> str:
    kind = kind_of(trained.experiment)
    rows = list(_rows(trained, kind))
    if not rows:
        return "## How good it is\n\nThe run holds no figures of these weights."
    names = kind.figures
    lines = ["| split | data set | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names)]
    for split, dataset, values in rows:
        cells = [f"{values[name]:.4g}" if is_number(values.get(name)) else "" for name in names]
        lines.append(f"| {split} | `{dataset}` | {' | '.join(cells)} |")
    note = kind.about_figures
    if trained.checkpoint.name == BEST and rows[0][0] == "validation":
        note += f" Of all epochs this one was chosen by {kind.metric} in validation"
        note += ", on the data that it was tested on." if len({dataset for _, dataset, _ in rows}) < len(rows) else "."
    return "## How good it is\n\n" + "\n".join(lines) + f"\n\n{note}"


def _rows(trained: Trained, kind: Kind) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Figures that were measured with exactly these weights."""
    data, record = trained.experiment.data, trained.record
    prefix = "val_ema/" if trained.is_average else "val/"
    validation = {name: record[prefix + name] for name in kind.figures if prefix + name in record}
    if validation:
        loader = as_mapping(stage_sections(data["train"])[-1].get("val_data_loader"))
        yield "validation", str(loader.get("dataset_id", "")), validation
    # run.py tests the weights under "model" of best.pt: where validation chose by the EMA these are the EMA's.
    best = trained.run.summary.get("best")
    by_average = f"val_ema/{kind.metric}" in as_mapping(best)
    tested = as_mapping(as_mapping(trained.run.summary.get("test")).get("student"))
    if tested and trained.checkpoint.name == BEST and record and record == best and by_average == trained.is_average:
        yield "test", str(data["test"]["test_data_loader"]["dataset_id"]), tested


def _onnx(facts: OnnxFacts) -> str:
    return f"""## ONNX

`{NAME}` (opset {facts.opset}): input `images` (batch, channels, height, width), output `logits` (batch, classes).
With onnxruntime {facts.runtime} its logits differ from the weights' by at most {facts.difference:.1e} on random
batches of {" and ".join(map(str, facts.batches))}."""


def _versions(trained: Trained) -> str:
    trained_with = as_mapping(trained.run.summary.get("versions"))
    rows = [f"| {name} | {trained_with.get(name, '')} | {now} |" for name, now in versions().items()]
    commit = trained.run.summary.get("git_commit")
    note = f"\n\nvkd_plugin's commit in training: {commit}" if commit else ""
    return "\n".join(["## Versions", "", "| | trained with | exported with |", "| --- | --- | --- |", *rows]) + note
