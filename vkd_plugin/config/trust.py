"""Which code an experiment file may name.

A YAML can import and call: ``!import_call {key: 'os.system', ...}``. So names in tags and under ``dependencies``
must lie in the vocabulary of experiments (data sets, transforms, layers, models, losses of a few packages), or in a
package that the user trusts (``--trust PACKAGE``). docs/trust.md says what this guards against and what not.

Names are judged as text before anything is imported (:meth:`Trust.of_name`), and what they mean by where it is
defined (:meth:`Trust.of_value`): ``torch.load`` is one level below torch, as ``torch.float32`` is, but it is
defined in ``torch.serialization``.
"""

import functools
import inspect
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from vkd_plugin.errors import UserError
from vkd_plugin.suggest import closest, nearest

PACKAGES = ("torch", "torchvision", "timm", "torchdistill", "vkd_plugin")
"""What ``dependencies`` may import, submodules included; single names directly below them may be looked up."""

NAMESPACES = (
    *("torch.distributions", "torch.fft", "torch.functional", "torch.linalg", "torch.nn", "torch.optim"),
    *("torch.special", "torch.utils.data"),
    *("torchvision.datasets", "torchvision.io.read_image", "torchvision.io.image", "torchvision.models"),
    *("torchvision.ops", "torchvision.transforms", "torchvision.tv_tensors"),
    *("timm.data", "timm.layers", "timm.loss", "timm.models", "timm.scheduler"),
    *("torchdistill.datasets", "torchdistill.losses", "torchdistill.models"),
    *("vkd_plugin.datasets", "vkd_plugin.losses", "vkd_plugin.models", "vkd_plugin.normalization"),
    *("vkd_plugin.projectors", "vkd_plugin.readouts", "vkd_plugin.stiefel", "vkd_plugin.wrappers"),
    *("collections.OrderedDict", "functools.partial", "math"),
)
"""Modules whose public names an experiment may use, what is below them included."""

EXCEPTIONS = {
    "timm.data.readers": "it reads archives and remote data sets with their code",
    "timm.models._hub": "it uploads and downloads",
    "torch.from_file": "it writes files",
    "torch.nn.attention": "it imports modules by name",
    "torch.utils.data.datapipes": "it unpickles, which runs code",
    "torch.utils.data.graph": "it unpickles, which runs code",
    "torchdistill.datasets.registry": "it changes what names mean",
    "torchdistill.losses.registry": "it changes what names mean",
    "torchdistill.models.registry": "it loads code with torch.hub",
    "torchvision.datasets.utils": "it downloads and unpacks files",
    "torchvision.io.image.write_file": "it writes files",
    "torchvision.io.image.write_jpeg": "it writes files",
    "torchvision.io.image.write_png": "it writes files",
}
"""What an experiment may not use although it lies in NAMESPACES, and why."""

ARGUMENTS: dict[str, tuple[tuple[object, ...], str]] = {
    "checkpoint_path": ((None,), "timm may unpickle the file; timm_model takes it as 'checkpoint'"),
    "trust_remote_code": ((None, False), "it runs code from the network"),
    "trust_repo": ((None, False), "it runs code from the network"),
    "weights_only": ((True,), "unpickling runs code"),
}
"""Arguments that open a door in what is otherwise allowed: the values that do not, and why the others."""

_REASONS = {
    "torch.hub": "it runs code from the network",
    "torch.load": "unpickling runs code; 'src_ckpt' reads weights without",
    "torch.save": "it writes files",
    "torch.serialization": "unpickling runs code; 'src_ckpt' reads weights without",
}
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class Trust:
    """The vocabulary of an experiment, widened by what the user trusts.

    Args:
        packages: dotted names; each stands for itself and all that is below it.

    Raises:
        UserError: a name that cannot be one.
    """

    def __init__(self, packages: Iterable[str] = ()) -> None:
        self.packages = tuple(packages)
        for package in self.packages:
            if not _NAME.fullmatch(package):
                raise UserError(f"--trust '{package}': expected the name of a package, for example torch.hub")

    def of_dependency(self, name: str) -> str | None:
        """Why the module ``name`` may not be imported; None if it may."""
        if _below(name, self.packages) or (_below(name, PACKAGES) and not _private(name)):
            return None
        root = name.partition(".")[0]
        if root in PACKAGES:
            return f"'{name}' is refused: it is private; {self._ask(name)}"
        return f"'{name}' is refused: importing a package runs its code{_near(root)}; {self._ask(root)}"

    def of_name(self, name: str) -> str | None:
        """Why ``name``, as written, may not be looked up; None if nothing speaks against it yet."""
        if _below(name, self.packages):
            return None
        root, _, rest = name.partition(".")
        if reason := _reason(name):
            return f"'{name}' is refused: {reason}; {self._ask(name)}"
        if _private(name):
            return f"'{name}' is refused: names with a leading underscore are private; {self._ask(name)}"
        if _below(name, NAMESPACES) or (root in PACKAGES and "." not in rest):
            return None
        if root in PACKAGES:
            outside = f"the parts of {root} that an experiment may use"
            return f"'{name}' is refused: it is outside {outside}; {self._ask(_parent(name))}"
        outside = f"the packages that an experiment may use{_near(root)}"
        return f"'{name}' is refused: it is outside {outside}; {self._ask(root)}"

    def of_value(self, value: object, name: str) -> str | None:
        """Why ``value``, which was found as ``name``, may not be used; None if it may."""
        if _below(name, self.packages):
            return None
        if isinstance(value, ModuleType):
            return f"'{name}' is refused: it is a module, a way to whatever that imports; {self._ask(name)}"
        if _is_plain(value):
            return None
        if isinstance(value, functools.partial):
            return self.of_value(value.func, name)
        home = _home(value)
        if _below(home, self.packages) or (_below(home, NAMESPACES) and not _reason(home)):
            return None
        if _is_of_torch(value, home):
            return None
        if home.startswith("torch.") and _reason(home):
            return f"'{name}' is refused: {_reason(home)}; {self._ask(name)}"
        return f"'{name}' is refused: it is defined in {home or 'no module'}; {self._ask(name)}"

    def of_attribute(self, name: object) -> str | None:
        """Why a tag may not read, call or set the attribute ``name`` of an object; None if it may."""
        if not isinstance(name, str):
            return "the name of an attribute has to be written out"
        if name.startswith("_") or name in ("format", "format_map"):
            return f"attribute '{name}' is refused: it leads to whatever Python can reach"
        return None

    def of_argument(self, name: object, value: object) -> str | None:
        """Why a call may not be given ``name=value``; None if it may."""
        if not isinstance(name, str) or name not in ARGUMENTS:
            return None
        harmless, reason = ARGUMENTS[name]
        return None if value in harmless else f"'{name}' is refused here: {reason}"

    def of_hub(self) -> str | None:
        """Why a model may not come from torch.hub; None if it may."""
        if _below("torch.hub", self.packages):
            return None
        return f"torch.hub is refused: {_REASONS['torch.hub']}; {self._ask('torch.hub')}"

    @staticmethod
    def _ask(name: str) -> str:
        return f"if you trust it: --trust {name}"


def _below(name: str, prefixes: Iterable[str]) -> bool:
    """Whether ``name`` is one of ``prefixes`` or below one."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _private(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


def _near(root: str) -> str:
    """The package that ``root`` may be a misspelling of, to append to a message."""
    return nearest(root, PACKAGES) if closest(root, PACKAGES) else ""


def _parent(name: str) -> str:
    return name.rpartition(".")[0] or name


def _reason(name: str) -> str | None:
    return next((why for prefix, why in (EXCEPTIONS | _REASONS).items() if _below(name, (prefix,))), None)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return isinstance(value, _PLAIN)


def _home(value: Any) -> str:
    """The name of where ``value``, or the class of what is no class or function, is defined."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        value = type(value)
    module = getattr(value, "__module__", None)
    if module is None and (owner := getattr(value, "__self__", None)) is not None:  # a method of a built-in class
        module = owner.__name__ if isinstance(owner, ModuleType) else _home(owner)
    name = getattr(value, "__qualname__", None)
    return ".".join(part for part in (module, name) if isinstance(part, str))


def _is_of_torch(value: object, home: str) -> bool:
    """Whether ``value`` is one of torch's own types (``torch.Tensor``), constants (``torch.float32``) or operators.

    The Python functions that stand directly in torch, such as ``torch.compile``, are none of these.
    """
    if inspect.isroutine(value):
        compiled = not inspect.isfunction(value) and not inspect.ismethod(value)
        return compiled and (home.startswith(("torch._C", "torch._VariableFunctionsClass")) or home == "")
    return home.rpartition(".")[0] == "torch" or home == "torch._C.Generator"
