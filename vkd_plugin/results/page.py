"""An HTML page in one file: tables and charts, plotly.js included, nothing from anywhere else.

Whatever comes from a run (names, values of its configuration) is escaped. Should something slip through, the page's
content security policy keeps it from running and from loading anything: only two scripts, by their digests, may.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..errors import UserError
from .assets import SCRIPT, STYLE

MARK = '<meta name="generator" content="vkd_plugin report">'
"""By which a page that may be written over is known, among its first characters."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#6b7280")
"""Of runs, told apart by colour-blind eyes too (Okabe and Ito's, yellow and black replaced)."""

DASHES = ("solid", "dash", "dot", "dashdot")

Chart = Mapping[str, Any]
"""``{data, layout}`` as plotly.js takes them."""


def colour(index: int) -> str:
    """The colour of run ``index`` in all charts."""
    return COLOURS[index % len(COLOURS)]


def line(index: int) -> dict[str, Any]:
    """The line of run ``index``; runs that share a colour differ in their dashes."""
    return {"color": colour(index), "dash": DASHES[index // len(COLOURS) % len(DASHES)], "width": 2}


def plotly_script() -> str:
    """plotly.js.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("the report needs plotly: pip install 'vkd-plugin[report]'") from None
    return str(get_plotlyjs())


def log_axis(*values: float) -> dict[str, Any]:
    """An axis that is logarithmic, with plain numbers on it, if all values are positive and far enough apart."""
    if not values or min(values) <= 0 or max(values) < 8 * min(values):  # less would leave a single number on it
        return {}
    return {"type": "log", "dtick": "D2", "tickformat": "~g"}


def layout(x: str, y: str = "", height: int = 250, **more: Any) -> dict[str, Any]:
    """A chart's layout; ``xaxis`` and ``yaxis`` in ``more`` are merged into the usual ones."""
    axis = {"gridcolor": "#e9ecf0", "zeroline": False, "automargin": True, "linecolor": "#c4cad2"}
    return {
        "height": height,
        "margin": {"l": 46, "r": 10, "t": 20, "b": 36},  # above, there is room for the buttons
        "font": {"family": "system-ui, sans-serif", "size": 11, "color": "#1c2430"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "showlegend": False,
        "hovermode": "x unified",
        **more,
        "xaxis": {**axis, "title": {"text": escape(x), "standoff": 6}, **more.get("xaxis", {})},
        "yaxis": {**axis, "title": {"text": escape(y), "standoff": 6}, **more.get("yaxis", {})},
    }


def card(title: str, chart: Chart, caption: str = "") -> str:
    """A chart with its title and a line below it; texts inside of ``chart`` have to be escaped already."""
    # In a script element only '<' can do anything; plotly.js is told what to draw, never what to run.
    spec = json.dumps(chart, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    height = int(chart["layout"]["height"])
    below = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return (
        f'<div class="card"><h4>{escape(title)}</h4><div class="chart" style="height: {height}px"></div>'
        f'<script type="application/json">{spec}</script>{below}</div>'
    )


def grid(cards: Iterable[str], wide: bool = False) -> str:
    """Cards beside each other, as many as the window has room for; ``wide`` ones have more of it each."""
    return f'<div class="grid{" wide" if wide else ""}">{"".join(cards)}</div>'


def table(head: Sequence[str], rows: Iterable[tuple[Sequence[str | None], bool]]) -> str:
    """A table whose first column names the rows.

    Args:
        head: of the columns.
        rows: cells, the first the row's name; None is a dash. True makes the row stand out.
    """
    body = "".join(
        f'<tr{" class=differs" if differs else ""}><th scope="row"><code>{escape(str(name))}</code></th>'
        + "".join(f"<td>{'–' if cell is None else escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for (name, *cells), differs in rows
    )
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'


def paragraph(text: str) -> str:
    """Plain text."""
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    """Something that is not there, and why."""
    return f'<p class="note">{escape(text)}</p>'


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def picture(png: bytes, about: str) -> str:
    """A picture, as wide as the page has room for; ``about`` is for those who cannot see it."""
    data = base64.b64encode(png).decode()
    return f'<img class="picture" src="data:image/png;base64,{data}" alt="{escape(about)}">'


def key(names: Iterable[str], colours: Sequence[str]) -> str:
    """What the colours of a chart mean, where they are not the runs'."""
    items = (f"<span>{_dot(colours[i % len(colours)])}{escape(name)}</span>" for i, name in enumerate(names))
    return f'<div class="classes">{"".join(items)}</div>'


def section(title: str, *parts: str) -> str:
    """A section of the page."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def page(title: str, runs: Sequence[tuple[str, str]], sections: Iterable[str]) -> str:
    """The whole file.

    Args:
        title: of the page.
        runs: name and status of each; they can be hidden one by one.
        sections: see :func:`section`.

    Raises:
        UserError: plotly is not installed.
    """
    scripts = (plotly_script(), SCRIPT)
    digests = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; img-src data: blob:"
    chosen = "".join(
        f'<li><label><input type="checkbox" checked autocomplete="off" data-run="{index}">{_dot(colour(index))}'
        f'{escape(name)} <span class="soft">{escape(status)}</span></label></li>'
        for index, (name, status) in enumerate(runs)
    )
    html = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{MARK}\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<header><h1>{escape(title)}</h1><noscript>{note('The charts need JavaScript.')}</noscript></header>\n"
        f'<nav class="runs"><ul>{chosen}</ul></nav>\n<main>\n{"".join(sections)}\n</main>\n'
        "<footer>Written by <code>run.py report</code>. Charts: plotly.js (MIT licence), included in this file."
        "</footer>\n" + "".join(f"<script>{script}</script>\n" for script in scripts) + "</body>\n</html>\n"
    )
    return html.encode("utf-8", "replace").decode("utf-8")  # names of folders need not be text


def _dot(fill: str) -> str:
    return f'<span class="dot" style="background: {fill}"></span>'


def _digest(script: str) -> str:
    # A browser reads '\r\n' as '\n' before it takes the digest.
    content = script.replace("\r\n", "\n").encode()
    return base64.b64encode(hashlib.sha256(content).digest()).decode()
