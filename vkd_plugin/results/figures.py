"""The paper's figures for trained runs: features in two dimensions, loss landscape, convergence of projectors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console

from ..config.trust import Trust
from ..engine.processes import process_group
from ..errors import UserError
from ..projectors import LinearProjector, OrthogonalProjector
from . import convergence, embedding
from .curves import curves
from .landscape import DRAWS, SAMPLES, Landscape, landscape, landscape_chart
from .opened import Distilled, opened, projector_name
from .page import card, grid, heading, key, note, paragraph, section
from .runs import Run

T = TypeVar("T")


@dataclass
class Seen:
    """What was computed for one run.

    Attributes:
        index, run: its place among the runs, and the run.
        about: a sentence on its weights and samples.
        classes: names of the classes, by label.
        features: those that it distils.
        fits: projectors fitted to each feature, by its term's name.
        losses: of its loss and terms.
        problems: why something is missing, by figure; ``all`` where nothing could be built.
    """

    index: int
    run: Run
    about: str = ""
    classes: list[str] = field(default_factory=list)
    features: list[Distilled] = field(default_factory=list)
    fits: dict[str, list[convergence.Fit]] = field(default_factory=dict)
    losses: Landscape = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def figures(runs: Sequence[Run], device: str, trusted: list[str]) -> list[str]:
    """Sections of the page; what cannot be computed is a note that says why.

    Args:
        runs: finished or not; each needs a checkpoint, its models and its test data.
        device: where to compute.
        trusted: packages whose code the runs' configurations may run.

    Raises:
        UserError: there is no such device, or a trusted package's name is none.
    """
    Trust(trusted)  # what is wrong with a flag is no matter of one run
    with process_group(device):
        pass
    console = Console(stderr=True, highlight=False)
    found = []
    for index, run in enumerate(runs):
        console.print(f"figures of {run.name}", markup=False)
        found.append(_look(index, run, device, trusted))
    if all(run.is_detection for run in runs):
        return [_models(found)]
    return [
        _models(found),
        _embeddings(found),
        _landscapes(found),
        _convergence(runs, found),
    ]


def _look(index: int, run: Run, device: str, trusted: list[str]) -> Seen:
    seen = Seen(index, run)
    if run.is_detection:
        seen.problems["all"] = _DETECTOR
        return seen
    try:
        with opened(run, device, trusted) as models:
            samples = models.samples
            shown = f"{samples.count} of the " if samples.count < samples.available else "all "
            seen.about = f"weights of {models.checkpoint}, {shown}{samples.available} test samples"
            seen.classes = samples.classes
            seen.features = _tried(seen, "features", models.distilled) or []
            seen.losses = _tried(seen, "landscape", lambda: landscape(models)) or {}
            for feature in seen.features:
                seen.fits[feature.term] = convergence.fit_projectors(feature)
    except UserError as error:
        seen.problems["all"] = str(error).splitlines()[0]
    return seen


_DETECTOR = (
    "a detector: features by class, loss landscape and fitted projectors are those of classifiers. A row of its "
    "features has no class, and it gives losses in training alone."
)


def _tried(seen: Seen, figure: str, compute: Callable[[], T]) -> T | None:
    try:
        return compute()
    except UserError as error:
        seen.problems[figure] = str(error).splitlines()[0]
        return None


def _models(found: Sequence[Seen]) -> str:
    parts = [paragraph(f"{seen.run.name}: {seen.about}.") for seen in found if "all" not in seen.problems]
    parts += _notes(found, "all")
    return section("Figures of the trained models", *parts)


def _notes(found: Sequence[Seen], figure: str) -> list[str]:
    return [note(f"{seen.run.name}: {seen.problems[figure]}") for seen in found if figure in seen.problems]


# Features in two dimensions.


def _embeddings(found: Sequence[Seen]) -> str:
    title = "Features under linear and orthogonal projection"
    parts = _notes(found, "features")
    if not any(seen.features for seen in found):
        return section(title, *parts, note("none of the runs has a projected feature that can be computed"))
    parts.append(
        paragraph(
            "Test samples, coloured by class. An orthogonal projection to at least as many channels keeps all "
            "distances between the student's features, so the second panel of such a run shows what the first does; "
            "a linear one can rearrange them. Where there is no run to compare with, a projector of the other kind is "
            "fitted to the trained student (see below). t-SNE keeps neighbourhoods, not distances between clusters."
        )
    )
    labels = sorted({int(label) for seen in found for f in seen.features for label in f.labels.unique()})
    classes = next(seen.classes for seen in found if seen.features)
    parts.append(key((embedding.class_name(label, classes) for label in labels), embedding.CLASS_COLOURS))
    kinds = {type(f.projector) for seen in found for f in seen.features}
    tsnes = embedding.TSNEs()
    for seen in found:
        for feature in seen.features:
            parts.append(heading(f"{seen.run.name}: {feature.feature}, {projector_name(feature.projector)}"))
            parts += _panels(seen, feature, kinds, tsnes)
    return section(title, *parts)


def _panels(seen: Seen, feature: Distilled, kinds: set[type], tsnes: embedding.TSNEs) -> Iterator[str]:
    sides = [
        (f"student, {feature.source.shape[1]} channels", feature.source),
        ("student, projected", feature.projected),
    ]
    if not {LinearProjector, OrthogonalProjector} <= kinds:  # no run to compare with: a projector fitted afterwards
        linear = isinstance(feature.projector, OrthogonalProjector)
        other = "LinearProjector" if linear else "matrix_exp"
        fit = next(fit for fit in seen.fits[feature.term] if fit.name == other)
        name = "LinearProjector" if linear else "OrthogonalProjector"
        sides.append((f"{name}, fitted afterwards", fit.projected))
    sides.append((f"teacher, {feature.teacher.shape[1]} channels", feature.teacher))
    labels = feature.labels.tolist()
    arrays = [(name, rows.double().cpu().numpy()) for name, rows in sides]
    cards = []
    for name, rows in arrays:
        points, share = embedding.principal_components(rows)
        caption = f"{100 * share[0]:.0f} % and {100 * share[1]:.0f} % of the variance"
        cards.append(card(f"PCA: {name}", embedding.scatter(points, labels, seen.classes), caption))
    yield grid(cards)
    yield grid(card(f"t-SNE: {name}", embedding.scatter(tsnes(rows), labels, seen.classes)) for name, rows in arrays)


# Loss landscape.


def _landscapes(found: Sequence[Seen]) -> str:
    title = "Loss landscape"
    parts = _notes(found, "landscape")
    present = [(seen.index, seen.run.name, seen.losses) for seen in found if seen.losses]
    if not present:
        return section(title, *parts, note("no run's loss can be computed"))
    parts.append(
        paragraph(
            f"Loss and terms (before their weights) when Gaussian noise is added to at most {SAMPLES} test images, "
            f"as their transforms leave them; student and teacher see the same images. Lines are means of "
            f"{DRAWS} draws, each a random direction along which all sizes lie; bands reach from the lowest "
            "to the highest. Dotted: the feature term of the same trained weights with the teacher's features not "
            "normalised."
        )
    )
    names = dict.fromkeys(name for _, _, values in present for name in values if ", normalization none" not in name)
    charts = [card(name, landscape_chart(name, present)) for name in names]
    return section(title, *parts, grid(charts))


# Convergence.


def _convergence(runs: Sequence[Run], found: Sequence[Seen]) -> str:
    parts = [heading("As trained"), *_recorded(runs, found)]
    fitted = [(seen, feature) for seen in found for feature in seen.features]
    if fitted:
        parts.append(heading("Fitted to frozen features"))
        parts.append(
            paragraph(
                f"An experiment of its own, not the training runs: new projectors of each kind, {convergence.STEPS} "
                f"steps of Adam (learning rate {convergence.LEARNING_RATE:g}, the same for all, tuned for none) on the "
                "run's own feature loss, over the test samples' features of the trained student, which stays as it "
                "is. A low curve says that a projector fits quickly, not that the student learns from it."
            )
        )
        if any(convergence.is_large(feature) for _, feature in fitted):
            parts.append(paragraph("Of large projectors the maps that take long are left out."))
    charts = []
    for seen, feature in fitted:
        chart = convergence.convergence_chart(seen.fits[feature.term], convergence.trained_loss(feature))
        charts.append(card(f"{seen.run.name}: {feature.term}, {projector_name(feature.projector)}", chart))
    parts.append(grid(charts, wide=True))
    return section("Convergence of projector variants", *parts)


def _recorded(runs: Sequence[Run], found: Sequence[Seen]) -> Iterator[str]:
    names = [(run, ", ".join(sorted(set(run.projectors.values())))) for run in runs]
    kinds = {name for _, name in names if name}
    if len(kinds) < 2:
        only = f"All have the same one, {kinds.pop()}." if kinds else "None has any."
        yield paragraph(f"The given runs do not differ in their projector. {only}")
        return
    terms = dict.fromkeys(f"loss/{feature.term}" for seen in found for feature in seen.features)
    if not terms:
        yield note("the runs differ in their projector, but none could be built, so the feature terms are not known")
    yield paragraph("The feature terms by epoch. " + " ".join(f"{run.name}: {name or 'none'}." for run, name in names))
    charts = []
    for term in terms:
        chart, caption = curves(runs, term)
        charts.append(card(term, chart, caption))
    yield grid(charts)
