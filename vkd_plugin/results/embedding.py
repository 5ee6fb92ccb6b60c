"""Features in two dimensions, by their principal components and by t-SNE, coloured by class."""

import hashlib
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from .page import Chart, layout

Points = NDArray[np.float64]

CLASS_COLOURS = (
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#79706e",
)  # fmt: skip


def principal_components(features: Points) -> tuple[Points, Points]:
    """The first two coordinates (N, 2), and the share of the variance that each has (2,).

    Signs are set by the samples, not by the channels as elsewhere: an orthonormal projection changes nothing.
    """
    u, s, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    points = np.zeros((len(features), 2))
    share = np.zeros(2)
    found = min(2, len(s))
    points[:, :found] = u[:, :found] * s[:found]
    share[:found] = s[:found] ** 2 / max(float((s**2).sum()), 1e-30)
    furthest = np.abs(points).argmax(axis=0)
    return points * np.where(points[furthest, [0, 1]] < 0, -1, 1), share


class TSNEs:
    """t-SNE from the principal components, computed once for equal features (runs with one teacher)."""

    def __init__(self) -> None:
        self._known: dict[str, Points] = {}

    def __call__(self, features: Points) -> Points:
        """(N, C) to (N, 2)."""
        name = hashlib.sha256(np.ascontiguousarray(features).tobytes()).hexdigest()
        if name not in self._known:
            start = principal_components(features)[0]
            start *= 1e-4 / max(float(start[:, 0].std()), 1e-30)
            perplexity = min(30.0, (len(features) - 1) / 3)
            tsne = TSNE(n_components=2, perplexity=perplexity, init=start.astype(np.float32), random_state=0)
            self._known[name] = tsne.fit_transform(features.astype(np.float32)).astype(np.float64)
        return self._known[name]


def scatter(points: Points, labels: Sequence[int], classes: Sequence[str]) -> Chart:
    """A chart of points (N, 2), a trace for each class.

    Args:
        points: see above.
        labels: class of each.
        classes: names by label; a label beyond them is its own name.
    """
    present = sorted(set(labels))
    traces: list[dict[str, Any]] = []
    for place, label in enumerate(present):
        own = points[np.asarray(labels) == label]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [_short(x) for x in own[:, 0]],
                "y": [_short(y) for y in own[:, 1]],
                "marker": {"size": 5, "opacity": 0.8, "color": CLASS_COLOURS[place % len(CLASS_COLOURS)]},
                "name": escape(class_name(label, classes)),
                "hoverinfo": "name",
            }
        )
    bare = {"showticklabels": False, "showgrid": False, "showline": False}
    frame: dict[str, Any] = {"margin": {"l": 6, "r": 6, "t": 20, "b": 6}, "height": 290, "hovermode": "closest"}
    return {"data": traces, "layout": layout("", xaxis=bare, yaxis={**bare, "scaleanchor": "x"}, **frame)}


def class_name(label: int, classes: Sequence[str]) -> str:
    """Of a label."""
    return classes[label] if 0 <= label < len(classes) else str(label)


def _short(value: float) -> float:
    """To four digits: those that cannot be seen would be most of the page."""
    return float(f"{value:.4g}")
