"""Reads the documents' code blocks, and does what they say, one after another in a folder.

What a block is goes by its language and its first line:

* ``yaml``, first line ``# FILE.yaml``: that file, an experiment or a table that has to be sound;
* ``yaml`` otherwise: a part of an experiment, put into a whole one, which has to be sound then;
* ``python``, first line ``# FILE.py``: that file;
* ``diff``, first line ``+++ FILE``: a change to that file; ``-`` and unmarked lines stand in it once, together;
* ``sh``: commands that succeed;
* ``console``: commands after ``$``, each with what it prints. A line ``...`` stands for lines left out. A command
  that prints ``error:`` ends with exit code 2, all others with 0.

A line ``# not tested: REASON`` in any of them says what it says.
"""

import difflib
import io
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import yaml

from vkd_plugin.check import examine
from vkd_plugin.cli import main
from vkd_plugin.results.table import load_table


@dataclass(frozen=True)
class Block:
    """A fenced block: ``line`` is that of its first line, ``where`` is for messages."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def first(self) -> str:
        return self.text.partition("\n")[0]

    @property
    def reason(self) -> str | None:
        """Why it is not tested, None if it is."""
        marker = re.search(r"^# not tested: (.*)$", self.text, re.MULTILINE)
        return marker[1] if marker else None


def blocks(document: Path) -> list[Block]:
    found = []
    lines = iter(enumerate(document.read_text().splitlines(), 1))
    for number, line in lines:
        if line.startswith("```"):
            inside = []
            for _, text in lines:
                if text == "```":
                    break
                inside.append(text)
            else:
                raise AssertionError(f"{document}:{number}: the block does not end")
            found.append(Block(document, number + 1, line[3:], "\n".join(inside) + "\n"))
    return found


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """Commands of a block, each with what it should print (of ``sh``: nothing is said)."""
    text = block.text.replace("\\\n", "")
    if block.language == "sh":
        yield from ((line, "") for line in text.splitlines() if line.strip() and not line.startswith("#"))
    else:
        assert text.startswith("$ "), f"{block.where}: a console block begins with a command"
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, printed = part.partition("\n")
            yield command, printed


@dataclass
class Session:
    """Does what blocks say.

    Args:
        folder: where; the present working folder.
        base: an experiment into which parts are put.
        instead: by the beginning of a command, what runs it instead of a shell; gives what it printed and its exit
            code, or None if it did not run it. ``python run.py`` is run in this process.
    """

    folder: Path
    base: str
    instead: dict[str, Callable[[str], tuple[str, int] | None]] = field(default_factory=dict)

    def do(self, block: Block) -> None:
        """Raises AssertionError where something is not as the block says."""
        if block.language in ("sh", "console"):
            for command, expected in commands(block):
                self._command(block, command, expected)
        elif block.language == "diff":
            self._change(block)
        elif (name := re.fullmatch(r"# (\S+\.(py|yaml))", block.first)) is not None:
            path = self.folder / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
            if name[2] == "yaml":
                self._sound(block, path)
        elif block.language == "yaml":
            path = self.folder / "part.yaml"
            path.write_text(put_into(block.text, self.base))
            self._sound(block, path)
            path.unlink()
        else:
            raise AssertionError(f"{block.where}: nothing is known of '{block.language}' blocks")

    def _sound(self, block: Block, path: Path) -> None:
        if re.search(r"^rows:", path.read_text(), re.MULTILINE):
            load_table(path)
        else:
            assert examine(path).problems == [], block.where

    def _change(self, block: Block) -> None:
        head, *lines = block.text.splitlines()
        path = self.folder / head.removeprefix("+++ ")
        text = path.read_text()
        for hunk in "\n".join(lines).split("\n@@\n"):
            parts = hunk.strip("\n").splitlines()
            before, after = ("\n".join(part[1:] for part in parts if part[0] in kept) for kept in (" -", " +"))
            assert text.count(before) == 1, f"{block.where}: stands {text.count(before)} times in {path}:\n{before}"
            text = text.replace(before, after)
        path.write_text(text)

    def _command(self, block: Block, command: str, expected: str) -> None:
        done = next((run(command) for start, run in self.instead.items() if command.startswith(start)), ...)
        if done is None:
            return
        printed, code = self._run(command) if done is ... else done
        said = f"{block.where}: $ {command}\n{printed}"
        assert code == (2 if re.search("^error: ", expected, re.MULTILINE) else 0), said
        if expected or block.language == "console":
            measured = not re.match(r"(python run\.py|vkd) (check|list \S)", command)
            wanted, got = (_comparable(text, measured) for text in (expected, printed))
            if "...\n" not in wanted and " check " in command:  # torchdistill's hooks have the order of a set
                wanted, got = sorted(wanted), sorted(got)
            pattern = "".join("(.*\n)*?" if line == "...\n" else re.escape(line) for line in wanted)
            difference = "".join(difflib.unified_diff(wanted, got, "in the document", "printed now"))
            assert re.fullmatch(pattern, "".join(got)), f"{block.where}: $ {command}\n{difference}"

    def _run(self, command: str) -> tuple[str, int]:
        words = shlex.split(command, comments=True)
        variables = {}
        while words and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0])):
            variables[assigned[1]] = assigned[2]
            words.pop(0)
        if words[:2] != ["python", "run.py"]:
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
            return done.stdout + done.stderr, done.returncode
        file = words[-1] if words[-2] == ">" else None
        words = words[:-2] if file else words
        out, both = io.StringIO(), io.StringIO()
        with patch.dict(os.environ, variables), redirect_stdout(out if file else both), redirect_stderr(both):
            code = main(words[2:])
        if file:
            Path(file).write_text(out.getvalue())
        return both.getvalue(), code


def _comparable(text: str, measured: bool) -> list[str]:
    """Lines without what is padding, and without numbers if they are ``measured``."""
    text = re.sub(r"[─━]+", "─", text)
    if measured:
        text = re.sub(r"[-+]?\b\d[\d.,]*(e[-+]\d+)?", "0", text)
    lines = [re.sub(r"\s+", " ", line).strip() + "\n" for line in text.splitlines()]
    while lines and lines[-1] == "\n":
        lines.pop()
    return lines


def put_into(part: str, whole: str) -> str:
    """``whole``, an experiment, with the keys of ``part`` added or replaced; ``{...}`` leaves a key as it is."""
    part = re.sub(r"^.*: \{\.\.\.\}.*\n", "", part, flags=re.MULTILINE)
    root, more = (yaml.compose(text, Loader=yaml.SafeLoader) for text in (whole, part))
    _merge(root, more)
    return str(yaml.serialize(root))


def _merge(whole: yaml.MappingNode, part: yaml.MappingNode) -> None:
    own = {key.value: index for index, (key, _) in enumerate(whole.value)}
    for key, value in part.value:
        index = own.get(key.value)
        if index is None:
            whole.value.append((key, value))
        elif isinstance(value, yaml.MappingNode) and isinstance(old := whole.value[index][1], yaml.MappingNode):
            _merge(old, value)
        else:
            whole.value[index] = (whole.value[index][0], value)
