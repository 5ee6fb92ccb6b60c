"""Writes a component's arguments as YAML: what is required is to be filled in, the rest stands with its defaults in
comments. Where the component's docstring has a YAML example, its values are taken.
"""

import re
import textwrap

import yaml

from vkd_plugin.config.nodes import Entries, children, entries, is_null, plain_value
from vkd_plugin.config.source import MAP_TAG, STR_TAG

from .component import UNKNOWN, Argument, Component
from .values import literal, public_name, quoted

# Where all arguments have defaults but a mapping has to stand: what one most often sets.
_LIKELY = ("lr", "num_classes", "reduction")
BUNDLED = ("torch", "torchvision", "torchdistill", "timm")


def fill(template: str, component: Component, **blocks: str) -> str:
    """``template``, dedented, with each ``{name}`` replaced; one on a line of its own takes as many lines as it has.

    ``{key}`` is the component's name, quoted.
    """
    values = {"key": quoted(component.name), **blocks}
    lines: list[str] = []
    for line in textwrap.dedent(template).strip().splitlines():
        alone = re.fullmatch(r"( *)\{(\w+)\}", line)
        if alone:
            lines += textwrap.indent(values[alone[2]], alone[1]).splitlines()
        else:
            lines.append(re.sub(r"\{(\w+)\}", lambda match: values[match[1]], line))
    if any(a.required and a.name in example(component)[0] for a in component.arguments):
        lines.insert(0, "# with values of its documentation's example: put in your own")
    if component.package not in BUNDLED:
        lines.insert(0, f"# needs {dependency(component)}")
    return "\n".join(lines) + "\n"


def dependency(component: Component) -> str:
    """The line of the experiment file that registers the component."""
    return f"dependencies: ['{component.package}']"


# --- arguments ------------------------------------------------------------------------------------------------


def kwargs(component: Component, name: str = "kwargs", nullable: bool = False) -> str:
    """``kwargs:`` and what is in it.

    Args:
        component: what takes the arguments.
        name: the key.
        nullable: whether nothing may stand there, or a mapping has to.
    """
    live, comments = argument_lines(component)
    if not live and not nullable:
        likely = _likely(component.arguments)
        if likely is None:
            hint = "  # for an argument, remove {}" if comments else ""
            return "\n".join([f"{name}: {{}}{hint}", *(f"  # {line}" for line in comments)])
        live, comments = argument_lines(component, likely)
    return "\n".join([f"{name}:", *(f"  {line}" for line in live), *(f"  # {line}" for line in comments)])


def call(component: Component) -> str:
    """What follows ``!import_call``: key and arguments."""
    lines = [f"key: {quoted(public_name(component.target) or component.name)}", "init:"]
    live, comments = argument_lines(component)
    if live:
        lines += ["  kwargs:", *(f"    {line}" for line in live), *(f"    # {line}" for line in comments)]
    elif comments:
        lines += ["  # kwargs:", *(f"  #   {line}" for line in comments)]
    return "\n".join(lines)


def argument_lines(component: Component, live_too: str | None = None) -> tuple[list[str], list[str]]:
    """Lines of the arguments to give, and of those that have a default."""
    shown = example(component)[0]
    live = [f"{name}: {value}" for name, value in component.given.items()]
    comments: list[str] = []
    for argument in component.arguments:
        if argument.name in shown:
            live += _dump(argument.name, shown[argument.name][1])
        elif argument.required:
            live.append(f"{argument.name}: {placeholder(argument)}")
        elif argument.name == live_too:
            live.append(f"{argument.name}: {literal(argument.default)}")
        elif argument.name == "transform" and component.kind == "dataset":
            # Without one a batch cannot be made of the images.
            live.append("transform: !import_call {key: 'torchvision.transforms.ToTensor', init: }")
        else:
            default = None if argument.default is UNKNOWN else literal(argument.default)
            comments.append(f"{argument.name}: {default or placeholder(argument)}")
    return live, comments


def _likely(arguments: list[Argument]) -> str | None:
    """An argument whose default may be written out; None where no default can."""
    known = [a.name for a in arguments if a.default is not UNKNOWN and a.default is not None and literal(a.default)]
    return next((name for name in (*_LIKELY, *known) if name in known), None)


def placeholder(argument: Argument) -> str:
    """What to put in, in angle brackets: the type where it is known in a few plain words, else the name again."""
    if argument.name.endswith("_io"):
        return "'output'"  # torchdistill's word for a hook: this or 'input'
    kind = re.sub(r"\b(\w+\.)+", "", argument.described.type)
    return f"<{kind if re.fullmatch(r'[a-zA-Z][a-zA-Z _]{1,24}', kind) else argument.name}>"


# --- examples -------------------------------------------------------------------------------------------------


def example(component: Component) -> tuple[Entries, Entries]:
    """From the YAML in the component's docstring: the arguments that it is given, and what stands beside it."""
    text = component.docstring.example
    try:
        root = yaml.compose(text, Loader=yaml.FullLoader) if text else None
    except yaml.YAMLError:
        return {}, {}
    return _search(root, component.name, {}) or ({}, {})


def _search(node: yaml.Node | None, name: str, beside: Entries) -> tuple[Entries, Entries] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    present = entries(node)
    key = plain_value(present["key"][1]) if "key" in present else None
    if isinstance(key, str) and (key == name or key.endswith(f".{name}")):
        if "kwargs" not in present and "init" not in present:
            return {k: v for k, v in present.items() if k != "key"}, beside
        inner = _entries_of(present, "init") if "init" in present else present
        return _entries_of(inner, "kwargs"), beside
    for own, (_, value) in present.items():
        found = _search(value, name, {k: v for k, v in present.items() if k != own})
        if found is not None:
            return found
    return None


def _entries_of(present: Entries, name: str) -> Entries:
    node = present[name][1] if name in present else None
    return entries(node) if isinstance(node, yaml.MappingNode) else {}


def _dump(name: str, node: yaml.Node) -> list[str]:
    """Lines of ``name: node``; changes nodes where nothing is written, which PyYAML would write as ``!!null ''``."""
    _write_nulls(node)
    key = yaml.ScalarNode(STR_TAG, name)
    pair = yaml.MappingNode(MAP_TAG, [(key, node)], flow_style=False)
    return str(yaml.serialize(pair, Dumper=yaml.Dumper, width=120, allow_unicode=True)).splitlines()


def _write_nulls(node: yaml.Node) -> None:
    if is_null(node):
        node.value = "null"
    for child in children(node):
        _write_nulls(child)


def beside(component: Component, name: str, default: str) -> str:
    """What stands beside the component in its own example under ``name``; else ``default``."""
    beside = example(component)[1]
    return "\n".join(_dump(name, beside[name][1])) if name in beside else textwrap.dedent(default).strip()
