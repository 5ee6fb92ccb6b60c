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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

from vkd_plugin.errors import UserError
from vkd_plugin.suggest import closest, nearest

PACKAGES = ("torch", "torchvision", "timm", "torchdistill", "vkd_plugin")
"""What ``dependencies`` may import, submodules included; single names directly below them may be looked up."""

NAMESPACES = (
    *("torch.distributions", "torch.fft", "torch.functional", "torch.linalg", "torch.nn", "torch.optim"),
    *("torch.special", "torch.utils.data"),
    *("torchvision.datasets", "torchvision.io.image", "torchvision.io.ImageReadMode", "torchvision.io.decode_image"),
    *("torchvision.io.read_image", "torchvision.models"),
    *("torchvision.ops", "torchvision.transforms", "torchvision.tv_tensors"),
    *("timm.data", "timm.layers", "timm.loss", "timm.models", "timm.scheduler"),
    *("torchdistill.datasets", "torchdistill.losses", "torchdistill.models"),
    *("vkd_plugin.datasets", "vkd_plugin.losses", "vkd_plugin.models", "vkd_plugin.normalization"),
    *("vkd_plugin.projectors", "vkd_plugin.readouts", "vkd_plugin.stiefel", "vkd_plugin.wrappers"),
    *("collections.OrderedDict", "functools.partial", "math"),
)
"""Modules whose public names an experiment may use, what is below them included."""

_UNPICKLES = "unpickling runs code"
_NETWORK = "it runs code from the network"
_WRITES = "it writes files"
_READERS = "it reads archives and remote data sets with their code"
_REGISTERS = "it changes what names mean"
_TRACES = "it writes a program with the names of modules in it, and runs that"

EXCEPTIONS = {
    "timm.data.dataset.ImageDataset": _READERS,
    "timm.data.dataset.IterableImageDataset": _READERS,
    "timm.data.dataset_factory": _READERS,
    "timm.data.readers": _READERS,
    "timm.layers._fx": _TRACES,
    "timm.models._builder": "it loads the file that a configuration names",
    "timm.models._features_fx": _TRACES,
    "timm.models._helpers": f"{_UNPICKLES}; timm_model takes a file as 'checkpoint'",
    "timm.models._hub": "it uploads and downloads",
    "timm.models._registry.register_model": _REGISTERS,
    "timm.models._registry.register_model_deprecations": _REGISTERS,
    "timm.models.repghost.repghost_model_convert": _WRITES,
    "torch.from_file": _WRITES,
    "vkd_plugin.datasets.coco_shapes": _WRITES,
    "vkd_plugin.datasets.tiny_imagenet": _WRITES,
    "torch.nn.attention": "it imports modules by name",
    "torch.utils.data.datapipes": "it unpickles, which runs code",
    "torch.utils.data.graph": "it unpickles, which runs code",
    "torchdistill.datasets.registry": _REGISTERS,
    "torchdistill.losses.registry": _REGISTERS,
    "torchdistill.models.registry": "it loads code with torch.hub",
    "torchvision.datasets.lsun": "it unpickles a file beside the images, which runs code",
    "torchvision.datasets.utils": "it downloads and unpacks files",
    "torchvision.io.image.write_file": _WRITES,
    "torchvision.io.image.write_jpeg": _WRITES,
    "torchvision.io.image.write_png": _WRITES,
    "torchvision.models._api.Weights": f"it can name any file as weights, and {_UNPICKLES}",
    "torchvision.models._api.WeightsEnum": f"it can name any file as weights, and {_UNPICKLES}",
    "torchvision.models._api.register_model": _REGISTERS,
    "torchvision.models.feature_extraction": _TRACES,
    "torchvision.ops.roi_align.lazy_compile": "it starts the compiler that its options name",
}
"""What an experiment may not use although it lies in NAMESPACES, and why."""

ATTRIBUTES = {
    "cache": _WRITES,
    "compile": "it starts the compiler that its options name",
    "format": "it leads to whatever Python can reach",
    "format_map": "it leads to whatever Python can reach",
    "get_state_dict": f"{_UNPICKLES}; give the weights to the model",
}
"""Attributes that an experiment may not read of what is otherwise allowed, and why; nor any that begins with
``download``, which writes the files that the object's other attributes name."""

ARGUMENTS: dict[str, tuple[tuple[object, ...], str, str]] = {
    "checkpoint_path": ((None,), "timm may unpickle the file; timm_model takes it as 'checkpoint'", "torch.load"),
    "pretrained_cfg": ((None,), "timm may unpickle the file it names; timm_model has 'checkpoint'", "torch.load"),
    "pretrained_cfg_overlay": (
        (None,),
        "timm may unpickle the file it names; timm_model has 'checkpoint'",
        "torch.load",
    ),
    "repo_or_dir": ((None,), "torch.hub runs code from the network", "torch.hub"),
    "trust_remote_code": ((None, False), _NETWORK, "torch.hub"),
    "trust_repo": ((None, False), _NETWORK, "torch.hub"),
    "weights_only": ((True,), _UNPICKLES, "torch.load"),
}
"""Arguments that open a door in what is otherwise allowed: the values that do not, why the others, and what the user
has to trust for them."""

_REASONS = {
    "torch.hub": _NETWORK,
    "torch.load": f"{_UNPICKLES}; 'src_ckpt' reads weights without",
    "torch.save": _WRITES,
    "torch.serialization": f"{_UNPICKLES}; 'src_ckpt' reads weights without",
}
# Of the classes directly in torch; the others are parts of its compiler, or read and write files.
_OF_TORCH = ("Generator", "Size", "Tensor", "device", "dtype", "finfo", "iinfo", "layout", "memory_format", "qscheme")
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
        if root in PACKAGES and (reason := _attribute_reason(rest.rpartition(".")[2])):
            return f"'{name}' is refused: {reason}; {self._ask(name)}"
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
        if is_plain(value):
            return None
        if isinstance(value, functools.partial):
            return self.of_value(value.func, name)
        home = _home(value)
        reason = _reason(home)
        if _below(home, self.packages) or (_below(home, NAMESPACES) and not reason):
            return None
        if _is_of_torch(value, home):
            return None
        reason = reason or f"it is defined in {home or 'no module'}"
        return f"'{name}' is refused: {reason}; {self._ask(name if '.' in name or not home else home)}"

    def of_attribute(self, name: object) -> str | None:
        """Why a tag may not read, call or set the attribute ``name`` of an object; None if it may."""
        if not isinstance(name, str):
            return "the name of an attribute has to be written out"
        reason = "it leads to whatever Python can reach" if name.startswith("_") else _attribute_reason(name)
        return f"attribute '{name}' is refused: {reason}" if reason else None

    def of_argument(self, name: object, value: object) -> str | None:
        """Why a call may not be given ``name=value``; None if it may."""
        if not isinstance(name, str) or name not in ARGUMENTS:
            return None
        harmless, reason, door = ARGUMENTS[name]
        if any(value is known for known in harmless) or _below(door, self.packages):
            return None
        return f"'{name}' is refused here: {reason}; {self._ask(door)}"

    def of_call(self, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Why ``target`` may not be given these arguments, whether by name or by position; None if it may."""
        while target is functools.partial and args and callable(args[0]):
            target, args = args[0], args[1:]
        given = dict(kwargs)
        with suppress(TypeError, ValueError):  # no signature, or arguments that do not fit: the call says so
            given |= inspect.signature(target).bind_partial(*args, **kwargs).arguments
        return next((why for name, value in given.items() if (why := self.of_argument(name, value))), None)

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


def _attribute_reason(name: str) -> str | None:
    return _WRITES if name.startswith("download") else ATTRIBUTES.get(name)


def is_plain(value: object) -> bool:
    """Whether ``value`` is data, which leads to no code: numbers, text, and lists and mappings of these."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
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
    if not inspect.isroutine(value):
        package, _, name = home.rpartition(".")
        return package in ("torch", "torch._C") and name in _OF_TORCH
    if home.startswith(("torch.Tensor.", "torch._tensor.Tensor.", "torch.Size.")):
        return True
    compiled = not inspect.isfunction(value) and not inspect.ismethod(value)
    return compiled and home.startswith(("torch._C", "torch._VariableFunctionsClass"))
