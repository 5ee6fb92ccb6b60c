"""One HTML page about one or several runs: what they came to, how they went, how they differ."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..engine.records import write_atomically
from ..errors import UserError
from ..tasks import Detection
from .curves import GROUPS, absence, curves, grouped
from .page import MARK, card, grid, heading, note, page, paragraph, picture, plotly_script, section, table
from .runs import Run, as_mapping, differences, is_number, read_runs

REPORT = "report.html"


def write_report(runs: list[str], output: str | None, with_figures: bool, device: str, trust: list[str]) -> Path:
    """Writes the page.

    Args:
        runs: folders.
        output: the page; by default ``report.html``, in the folder of the only run, else in the working folder.
        with_figures: draw the paper's figures too, which needs each run's models and test data.
        device: where these are computed.
        trust: packages whose code the runs' configurations may run.

    Returns:
        The page.

    Raises:
        UserError: a folder without a run, a page that cannot be written or would replace another file, no such
            device, or plotly is missing.
    """
    plotly_script()  # before minutes of figures
    found = read_runs(runs)
    target = _target(found, output)
    sections = [_results(found), *_pictures(found), *_curves(found), _differences(found), _environment(found)]
    if with_figures:
        from .figures import figures  # here: a page without figures needs neither models nor scikit-learn

        sections += figures(found, device, trust)
    title = found[0].name if len(found) == 1 else f"{len(found)} runs"
    html = page(f"Report: {title}", [(run.name, run.status) for run in found], sections)
    write_atomically(target, html)
    return target


def _target(runs: Sequence[Run], output: str | None) -> Path:
    """Where the page goes.

    Raises:
        UserError: what is there is no page of ours, or it cannot be looked at.
    """
    if output is None:
        target = (runs[0].path if len(runs) == 1 else Path()) / REPORT
    else:
        target = Path(os.path.expanduser(output))
    try:
        if not target.parent.is_dir():
            raise UserError(f"--output {target}: there is no folder {target.parent}")
        if target.is_dir():
            raise UserError(f"--output {target}: is a folder; name the file, e.g. {target / REPORT}")
        if target.exists():
            with target.open("rb") as file:
                if MARK.encode() not in file.read(1000):
                    raise UserError(f"{target}: is there already and no report; choose another file with --output")
    except OSError as error:
        raise UserError(f"{target}: {error.strerror or error}") from error
    return target


# What the runs came to.


def _results(runs: Sequence[Run]) -> str:
    parts = []
    tests = [as_mapping(run.summary.get("test")) for run in runs]
    figures = dict.fromkeys((model, key) for of in tests for model in of for key in as_mapping(of[model]))
    if figures:
        rows = [
            ([f"{model} {key}", *(_number(as_mapping(of.get(model)), key) for of in tests)], False)
            for model, key in figures
        ]
        parts += [paragraph("Test of the best epoch's student:"), table(["test", *_names(runs)], rows)]
    keys = dict.fromkeys(key for run in runs for record in (run.best, run.last) for key in record)
    if keys:
        head = ["epoch's figures", *(f"{run.name}, {which}" for run in runs for which in ("best", "last"))]
        rows = [
            ([key, *(_number(record, key) for run in runs for record in (run.best, run.last))], False) for key in keys
        ]
        parts += [paragraph("Records of the best epoch, by validation, and of the last:"), table(head, rows)]
    else:
        parts.append(note("no epoch is done yet"))
    return section("Results", *parts)


def _number(record: dict[str, Any], key: str) -> str | None:
    if key not in record:
        return None
    value = record[key]
    if value is None:
        return absence(key)
    if isinstance(value, float) and is_number(value):
        return f"{value:.5g}"
    return str(value)


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _pictures(runs: Sequence[Run]) -> Iterator[str]:
    """What the tests of detectors have left, if pictures were asked for."""
    files = {run.name: run.path / Detection.PICTURES for run in runs if run.is_detection}
    files = {name: file for name, file in files.items() if file.is_file()}
    if not files:
        return
    about = (
        "Each image twice: with its annotated objects (green, crowds blue), and with the detections of the best "
        "epoch's student (orange, with their scores) over them."
    )
    parts = [paragraph(about)]
    for name, file in files.items():
        parts += [heading(name), _picture(name, file)]
    yield section("Detections", *parts)


_LARGEST_PICTURE = 20 * 2**20


def _picture(name: str, file: Path) -> str:
    try:
        if file.stat().st_size > _LARGEST_PICTURE:
            return note(f"{file} is too large for this page")
        return picture(file.read_bytes(), f"detections of {name}")
    except OSError as error:
        return note(f"{file}: {error.strerror or error}")


# How they went.


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    for group, keys in grouped(runs).items():
        if keys:
            charts = ((key, *curves(runs, key)) for key in keys)
            yield section(group, grid(card(key, chart, caption) for key, chart, caption in charts))
        elif group == GROUPS[2][0] and any(run.records for run in runs):
            yield section(group, paragraph("None of the runs has recorded one: they have no orthogonal projector."))


# How they differ.


def _differences(runs: Sequence[Run]) -> str:
    parts = [note(f"{run.name}: the configuration cannot be compared: {run.problem}") for run in runs if run.problem]
    if len(runs) > 1:
        rows = [([key, *values], False) for key, values in differences(runs)]
        parts.append(table(["key", *_names(runs)], rows) if rows else paragraph("The configurations are the same."))
    else:
        parts.append(paragraph("There is one run; name several to see what their configurations say differently."))
    return section("Differences between the configurations", *parts)


def _environment(runs: Sequence[Run]) -> str:
    told = [dict(_told(run)) for run in runs]
    rows = []
    for key in dict.fromkeys(key for of in told for key in of):
        values = [of.get(key) for of in told]
        # What took how long and when is never the same; what is not known of an unfinished run makes no difference.
        differs = key not in _NEVER_SAME and len({value for value in values if value is not None}) > 1
        rows.append(([key, *values], differs))
    return section(
        "Environment",
        *([paragraph("What differs between the runs is marked.")] if len(runs) > 1 else []),
        table(["", *_names(runs)], rows),
    )


_NEVER_SAME = ("folder", "wall time", "finished")


def _told(run: Run) -> Iterator[tuple[str, str]]:
    yield "folder", str(run.path)
    yield "status", run.status
    yield from ((f"projector of {feature}", name) for feature, name in run.projectors.items())
    for key, value in run.summary.items():
        if key in ("best", "last", "test") or value is None:
            continue
        if key == "wall_seconds":
            yield "wall time", _duration(value) if is_number(value) else str(value)
        elif isinstance(value, dict):
            yield from ((f"{key}: {name}", str(item)) for name, item in value.items())
        elif isinstance(value, list):
            yield key, "  ".join(map(str, value))
        else:
            yield key, str(value)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return (
        f"{hours} h {rest // 60:02} min"
        if hours
        else f"{rest // 60} min {rest % 60:02} s"
        if rest >= 60
        else f"{seconds:.1f} s"
    )
