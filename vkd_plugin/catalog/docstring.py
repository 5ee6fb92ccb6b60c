"""What a docstring says of a class or function: its first words, its arguments, and a YAML example.

Read are the styles of what experiments name: Google's (this package, torch, torchvision) and Sphinx's fields
(torchdistill).
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

_ARGUMENTS = re.compile(r"(Args|Arguments|Parameters|Keyword Args|Keyword Arguments):$")
_ENTRY = re.compile(r"(?P<names>\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?:\((?P<type>.*?)\))?\s*:(?:\s+(?P<text>.*))?$")
_FIELD = re.compile(r":(?P<what>param|type) \*{0,2}(?P<name>\w+):\s*(?P<text>.*)$")
_EXAMPLE = re.compile(r"(\.\. code-block:: yaml|.*\byaml::)$", re.IGNORECASE)
# A sentence ends where the next begins with a capital, or with the text; "e.g." and "i.e." end none.
_SENTENCE = re.compile(r".+?(?<!e\.g)(?<!i\.e)\.(?=\s+[A-Z(]|$)")


@dataclass(frozen=True)
class Described:
    """What is said of one argument: its type in words, and the first paragraph about it; both may be empty."""

    type: str = ""
    text: str = ""


@dataclass(frozen=True)
class Docstring:
    """A docstring, read.

    Args:
        paragraph: the first one, in one line and without markup.
        arguments: by name.
        example: YAML, as written; None without one.
    """

    paragraph: str = ""
    arguments: dict[str, Described] = field(default_factory=dict)
    example: str | None = None

    @property
    def summary(self) -> str:
        """The first sentence."""
        match = _SENTENCE.match(self.paragraph)
        return match[0] if match else self.paragraph


def read_docstring(target: object) -> Docstring:
    """The docstring of a class or function; a class that has none of its own is described by its ``__init__``."""
    text = vars(target).get("__doc__") if isinstance(target, type) else getattr(target, "__doc__", None)
    if not text and isinstance(target, type):
        text = vars(target).get("__init__", None).__doc__ if "__init__" in vars(target) else None
    return parse(text) if isinstance(text, str) else Docstring()


def parse(text: str) -> Docstring:
    """A docstring's text, read."""
    lines = inspect.cleandoc(text).splitlines()
    return Docstring(_first_paragraph(lines), {**_fields(lines), **_google(lines)}, _example(lines))


def table_row(text: str, name: str) -> str:
    """What the first table in ``text`` that has a row ``name`` (or ````name````) says in its second column."""
    for line in inspect.cleandoc(text).splitlines():
        first, _, rest = line.partition("  ")
        if first.strip("`") == name and rest.strip():
            return plain(re.split(r"\s{3,}", rest.strip())[0])
    return ""


def plain(text: str) -> str:
    """``text`` in one line, without reStructuredText's markup."""
    text = re.sub(r":[\w:]+:`~?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1", text)  # roles
    text = re.sub(r"`+\"?([^`<]+?)\"?\s*<[^`>]*>`+_*", r"\1", text)  # links
    text = " ".join(text.replace("``", "").replace("`", "").replace("**", "").split())
    return re.sub(r"\s*:?\s*::$", ":", text)


def _first_paragraph(lines: list[str]) -> str:
    taken: list[str] = []
    for line in lines:
        ends = not line or line.startswith((".. ", ":param ")) or _ARGUMENTS.match(line) or _EXAMPLE.match(line)
        if ends and taken:
            break
        if not ends:
            taken.append(line)
    return plain(" ".join(taken))


def _google(lines: list[str]) -> dict[str, Described]:
    found: dict[str, Described] = {}
    for block in _entries(lines):
        match = _ENTRY.match(" ".join(block))
        if match:
            kind = re.sub(r",?\s*\boptional\b", "", match["type"] or "")
            for name in re.split(r"\s*,\s*", match["names"]):
                found[name.lstrip("*")] = Described(plain(kind), plain(match["text"] or ""))
    return found


def _entries(lines: list[str]) -> Iterator[list[str]]:
    """The lines of each argument below ``Args:``, up to the first empty one."""
    inside, indent, block, closed = False, None, list[str](), False
    for line in [*lines, "end"]:
        depth = len(line) - len(line.lstrip())
        if line and not depth:
            if block:
                yield block
            inside, indent, block = bool(_ARGUMENTS.match(line)), None, []
        elif not line:
            closed = True
        elif inside:
            indent = depth if indent is None else indent
            if depth <= indent:
                if block:
                    yield block
                block, closed = [line.strip()], False
            elif not closed:
                block.append(line.strip())


def _fields(lines: list[str]) -> dict[str, Described]:
    """Sphinx's ``:param name:`` and ``:type name:``."""
    found: dict[tuple[str, str], str] = {}
    key = None
    for line in lines:
        if match := _FIELD.match(line):
            key = (match["what"], match["name"])
            found[key] = match["text"]
        elif not line or line.startswith(":"):
            key = None
        elif key:
            found[key] += f" {line.strip()}"
    names = dict.fromkeys(name for _, name in found)
    types = {name: re.sub(r"\s+or None$", "", found.get(("type", name), "")) for name in names}
    return {name: Described(plain(types[name]), plain(found.get(("param", name), ""))) for name in names}


def _example(lines: list[str]) -> str | None:
    start = next((n for n, line in enumerate(lines) if _EXAMPLE.match(line.strip())), None)
    if start is None:
        return None
    outer = len(lines[start]) - len(lines[start].lstrip())
    block: list[str] = []
    for line in lines[start + 1 :]:
        if line and len(line) - len(line.lstrip()) <= outer:
            break
        if block or (line and not line.lstrip().startswith(":")):  # options of the directive, such as :caption:
            block.append(line)
    return textwrap.dedent("\n".join(block)).strip() or None
