"""What ``run.py list`` prints: pages for people, one JSON document for machines."""

import json
import textwrap
from collections.abc import Sequence
from typing import Any

import timm
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from vkd_plugin.errors import EXIT_DONE

from .component import UNKNOWN, Argument, Component
from .find import components_called, import_packages, kinds_called, unknown, unknown_kind, unknown_word
from .kinds import KINDS, CatalogKind
from .values import literal, short
from .writing import BUNDLED, dependency


def print_catalog(kind: str | None, name: str | None, packages: Sequence[str] = (), as_json: bool = False) -> int:
    """Prints all kinds, the components of one, or one component; ``kind`` may also be a component's name.

    Args:
        kind: singular or plural, or the last word of several (``wrappers``).
        name: a component of that kind.
        packages: imported first.
        as_json: one document instead of pages.

    Returns:
        The exit code.

    Raises:
        UserError: a package that cannot be imported, or an unknown name; the nearest is named.
    """
    import_packages(packages)
    page = _Page(packages)
    if kind is None:
        page.kinds()
    else:
        kinds = kinds_called(kind)
        if name is not None and not kinds:
            raise unknown_kind(kind)
        if name is None and kinds:
            for one in kinds:
                page.components(one)
        else:
            wanted = kind if name is None else name
            found = components_called(wanted, kinds or KINDS, packages)
            if not found:
                raise unknown(wanted, kinds, packages) if kinds else unknown_word(wanted, packages)
            for component in found:
                page.component(component)
    page.end(as_json)
    return EXIT_DONE


class _Page:
    """Collects what is to be said, for people and for machines, and prints one of them.

    Args:
        packages: what the user imports; listed after this package's own components.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages
        self.console = Console(highlight=False)
        # Off a terminal a line stays a line, for grep.
        self.width = self.console.width if self.console.is_terminal else None
        self.text = Text()
        self.data: dict[str, list[dict[str, Any]]] = {}

    def kinds(self) -> None:
        """All kinds with counts."""
        for kind in KINDS:
            count = len(kind.find(self.packages))
            self._add(f"{kind.plural:<37}", "bold")
            self._add(f"{count:>4}  {kind.purpose}\n")
            values = {"kind": kind.plural, "singular": kind.singular, "count": count, "purpose": kind.purpose}
            self.data.setdefault("kinds", []).append(values)
        self._add("\nrun.py list KIND shows the components of one, run.py list NAME one of them as YAML to paste.\n")

    def components(self, kind: CatalogKind) -> None:
        """The components of a kind by package."""
        found = sorted(kind.find(self.packages), key=self._rank)
        self._add(f"{kind.plural}: {kind.purpose}\n", "bold")
        package = None
        for component in found:
            if component.package != package:
                package = component.package
                self._add(f"\n{package}\n", "bold underline")
            self._add_wrapped(component.name + (f" ({component.note})" if component.note else ""), 2, "bold")
            self._add_wrapped(_signature(component), 4)
            self._add_wrapped(component.docstring.summary, 4, "dim")
        if kind.singular == "model":
            count = len(timm.list_models())
            text = f"and timm's {count} architectures through timm_model: run.py list models NAME, such as regnety_160"
            self._add_wrapped(text, 0)
        self._add("\n")
        self.data.setdefault("components", []).extend(_summary(component) for component in found)

    def component(self, component: Component) -> None:
        """One component: what it is, its arguments, its YAML."""
        kind = next(kind for kind in KINDS if kind.singular == component.kind)
        snippet = kind.snippet(component)
        self._add(component.name, "bold")
        self._add_wrapped(f": {kind.singular}{component.note and f' ({component.note})'}, {component.path}", 0)
        if component.package not in BUNDLED and component.package != "vkd_plugin":
            self._add_wrapped(f"needs {dependency(component)} in the file and run.py --trust {component.package}", 0)
        if component.docstring.paragraph:
            self._add("\n")
            self._add_wrapped(component.docstring.paragraph, 2)
        if component.arguments:
            self._add("\narguments\n", "bold underline")
            for argument in component.arguments:
                self._add_wrapped(_argument(argument), 2)
                about = argument.described
                text = f"{about.type}: {about.text}" if about.type and about.text else about.type or about.text
                self._add_wrapped(text, 6, "dim")
        self._add("\nYAML\n", "bold underline")
        # As it is, on a terminal too: to be copied.
        self.text.append_text(Syntax("", "yaml", theme="ansi_dark", background_color="default").highlight(snippet))
        self._add("\n")
        values = {"doc": component.docstring.paragraph, "path": component.path, "yaml": snippet}
        self.data.setdefault("components", []).append(_summary(component) | values)

    def end(self, as_json: bool) -> None:
        """Prints what was collected."""
        if as_json:
            print(json.dumps(self.data, indent=1, ensure_ascii=False))
        else:
            self.text.rstrip()
            self.console.print(self.text, soft_wrap=True)

    def _rank(self, component: Component) -> tuple[int, str]:
        """This package's own components first, then the user's, then torchdistill's, then others."""
        own = ["vkd_plugin", *(package.partition(".")[0] for package in self.packages), "torchdistill"]
        package = component.package
        return (own.index(package), "") if package in own else (len(own), package)

    def _add(self, text: str, style: str = "") -> None:
        self.text.append(text, style)

    def _add_wrapped(self, text: str, indent: int, style: str = "") -> None:
        """A paragraph, on a terminal broken into lines; nothing for no text."""
        if not text:
            return
        lead = " " * indent
        if self.width is not None:
            text = textwrap.fill(
                text,
                max(self.width, 40),
                initial_indent=lead,
                subsequent_indent=lead,
                break_long_words=False,
                break_on_hyphens=False,
            )
            self._add(f"{text}\n", style)
        else:
            self._add(f"{lead}{text}\n", style)


def _signature(component: Component) -> str:
    """Arguments with their defaults; ``...`` where there are others, or where a default cannot be told."""
    parts = [argument.name if argument.required else _argument(argument) for argument in component.arguments]
    return ", ".join([*parts, *(["..."] if component.takes_others else [])])


def _argument(argument: Argument) -> str:
    if argument.required:
        return f"{argument.name} (required)"
    return f"{argument.name}={'...' if argument.default is UNKNOWN else short(argument.default)}"


def _summary(component: Component) -> dict[str, Any]:
    """What ``list KIND`` says of a component. Defaults are text: YAML, but a name for what YAML cannot have."""
    return {
        "name": component.name,
        "kind": component.kind,
        "note": component.note,
        "package": component.package,
        "summary": component.docstring.summary,
        "arguments": [_argument_data(argument) for argument in component.arguments],
        "takes_others": component.takes_others,
    }


def _argument_data(argument: Argument) -> dict[str, Any]:
    values: dict[str, Any] = {"name": argument.name, "required": argument.required}
    if argument.default is not UNKNOWN:
        values["default"] = literal(argument.default) or short(argument.default)
    return values | {"type": argument.described.type, "doc": argument.described.text}
