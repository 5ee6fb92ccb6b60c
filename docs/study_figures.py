"""Draws the figures of docs/study.md.

    pip install -e '.[figures]'
    python docs/study_figures.py results
    python run.py table configs/tables/fashion_mnist_methods.yaml --run
    python docs/study_figures.py

``results`` are drawn from the runs' summary.json in docs/study. The others need the runs' whole folders, and are
computed as for ``run.py report``, which shows the same of any run.
"""

import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from vkd_plugin.results.embedding import CLASS_COLOURS, TSNEs
from vkd_plugin.results.landscape import SIZES, landscape
from vkd_plugin.results.opened import opened
from vkd_plugin.results.runs import Run, read_runs
from vkd_plugin.results.table import load_table
from vkd_plugin.results.table.measured import measure

TABLE = "configs/tables/fashion_mnist_methods.yaml"
DATA = "configs/tables/fashion_mnist_data.yaml"
FOLDER = Path("docs/figures")
SUMMARIES = Path("docs/study")
ORTHOGONAL = "logits + orthogonal projector (VkD)"
PROJECTORS = {
    ORTHOGONAL: ("orthogonal", "#0072b2"),
    "logits + linear projector": ("linear", "#d55e00"),
    "logits + MLP projector": ("MLP", "#e69f00"),
    "logits + released projector": ("released", "#6b7280"),
}


def main() -> None:
    """Writes all of them, or those that need the results alone."""
    FOLDER.mkdir(exist_ok=True)
    accuracies()
    train_set_sizes()
    if sys.argv[1:] == ["results"]:
        return
    table = load_table(TABLE)
    folders = {row.name: [str(run.folder) for run in table.runs(row)] for row in table.rows}
    runs = {name: read_runs(folders[name]) for name in PROJECTORS}
    convergence(runs)
    orthogonality(runs[ORTHOGONAL])
    embeddings({name: runs[name][0] for name in list(PROJECTORS)[:2]})
    sensitivity({name: runs[name][0] for name in list(PROJECTORS)[:2]})


def accuracies() -> None:
    """Test accuracy of each method: every seed, and the mean."""
    lines = measure(load_table(TABLE, SUMMARIES))
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for height, line in enumerate(reversed(lines)):
        colour = "#0072b2" if line.row.name == ORTHOGONAL else "#6b7280"
        values = line.cells[0].values
        axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.5, markersize=5, markeredgewidth=0)
        axes.plot(line.cells[0].mean, height, "|", color=colour, markersize=14, markeredgewidth=2.5)
    axes.set(xlabel="test top-1 (%)", yticks=range(len(lines)))
    axes.set_yticklabels([line.row.name for line in reversed(lines)])
    axes.grid(axis="x", alpha=0.3)
    save(figure, "study_methods.svg")


def train_set_sizes() -> None:
    """Test accuracy by the number of training images, means and standard deviations over seeds."""
    by_method: dict[str, list[tuple[float, float, float]]] = {}
    for line in measure(load_table(DATA, SUMMARIES)):
        (cell,) = line.cells
        size, _, method = line.row.name.partition(" %: ")
        if cell.mean is not None:
            by_method.setdefault(method, []).append((float(size), cell.mean, cell.deviation or 0.0))
    figure, axes = plt.subplots(figsize=(4.8, 3.4))
    colours = ("#6b7280", "#009e73", "#d55e00", "#0072b2")
    for shift, (colour, (method, points)) in enumerate(zip(colours, by_method.items(), strict=True)):
        sizes, means, deviations = np.array(points).T
        apart = sizes * 1.03 ** (shift - 1.5)  # bars beside each other
        axes.errorbar(apart, means, deviations, color=colour, label=method, marker="o", markersize=4, capsize=2)
    axes.set(xscale="log", xlabel="training images (%)", ylabel="test top-1 (%)", xticks=[5, 10, 20, 100])
    axes.set_xticklabels(["5", "10", "20", "100"])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    save(figure, "study_data.svg")


def convergence(runs: dict[str, list[Run]]) -> None:
    """The feature term and the validation accuracy by epoch, means over seeds."""
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9, 3.2))
    for name, (label, colour) in PROJECTORS.items():
        by_epoch(loss, runs[name], "loss/vkd", label, colour)
        by_epoch(accuracy, runs[name], "val/top1", label, colour)
    loss.set(xlabel="epoch", ylabel="feature term", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="validation top-1 (%)")
    accuracy.legend(frameon=False)
    save(figure, "study_convergence.svg")


def by_epoch(axes: Axes, runs: list[Run], key: str, label: str, colour: str) -> None:
    """The mean of runs, and a band of their standard deviation."""
    values = np.array([[record[key] for record in run.records if key in record] for run in runs])
    epochs = [record["epoch"] for record in runs[0].records if key in record]
    mean, deviation = values.mean(0), values.std(0, ddof=1)
    axes.plot(epochs, mean, color=colour, label=label)
    axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)


def orthogonality(runs: list[Run]) -> None:
    """max |W^T W - I| at each epoch's end, of every seed."""
    figure, axes = plt.subplots(figsize=(4.5, 3.2))
    for run in runs:
        errors = [record["orthogonality_error/tokens"] for record in run.records]
        axes.plot(range(1, len(errors) + 1), errors, color="#0072b2", alpha=0.6)
    axes.set(xlabel="epoch", ylabel=r"max $|W^\top W - I|$", yscale="log", ylim=(1e-8, 1e-2))
    save(figure, "study_orthogonality.svg")


def embeddings(runs: dict[str, Run]) -> None:
    """t-SNE of test images: the student's feature, the same through its projector, the teacher's."""
    figure, grid = plt.subplots(len(runs), 3, figsize=(9, 3.1 * len(runs)), squeeze=False)
    tsne = TSNEs()
    for row, (name, run) in zip(grid, runs.items(), strict=True):
        with opened(run, "cpu", []) as models:
            (feature,) = models.distilled()
        colours = [CLASS_COLOURS[label] for label in feature.labels.tolist()]
        sides = {"student": feature.source, "projected": feature.projected, "teacher": feature.teacher}
        for axes, (side, rows) in zip(row, sides.items(), strict=True):
            points = tsne(rows.double().numpy())
            axes.scatter(*points.T, c=colours, s=6, linewidths=0)
            axes.set(xticks=[], yticks=[], title=f"{PROJECTORS[name][0]}: {side}")
    save(figure, "study_tsne.png")


def sensitivity(runs: dict[str, Run]) -> None:
    """The feature term when noise is added to the images, with the teacher normalised and not, relative to none."""
    figure, axes = plt.subplots(figsize=(4.5, 3.2))
    for name, run in runs.items():
        label, colour = PROJECTORS[name]
        with opened(run, "cpu", []) as models:
            found = landscape(models)
        for key, style, what in (
            ("loss/vkd", "-", "layer norm"), ("loss/vkd, normalization none", ":", "not normalised"),
        ):  # fmt: skip
            means = [statistics.mean(draws) for draws in found[key]]
            axes.plot(SIZES, [mean / means[0] for mean in means], style, color=colour, label=f"{label}, {what}")
    axes.set(xlabel="standard deviation of the noise", ylabel="feature term / without noise")
    axes.legend(frameon=False, fontsize=8)
    save(figure, "study_sensitivity.svg")


def save(figure: plt.Figure, name: str) -> None:
    """The same figure gives the same file."""
    figure.tight_layout()
    figure.savefig(FOLDER / name, dpi=130, metadata={"Date": None} if name.endswith(".svg") else {"Software": None})
    plt.close(figure)
    print(FOLDER / name)


if __name__ == "__main__":
    plt.rcParams.update({"svg.hashsalt": "study", "axes.spines.top": False, "axes.spines.right": False})
    main()
