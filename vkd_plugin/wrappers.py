"""The auxiliary model wrapper that gives a student its projected features.

torchdistill hooks modules of the wrapper; the student lives under ``model``, the projected features under
``features``: ``forward_hook: {output: ['model.head', 'features.tokens']}``.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torchdistill.common.file_util import check_if_exists, make_parent_dirs
from torchdistill.common.main_util import is_main_process, save_on_master
from torchdistill.models.util import load_module_ckpt
from torchdistill.models.wrapper import AuxiliaryModelWrapper

from .errors import BadValue
from .host import Setup, current_setup
from .projectors import OrthogonalProjector, build_projector
from .random_state import generators_restored
from .readouts import PREFIX_READOUTS, get_readout, pick
from .suggest import closest, nearest


class ProjectedFeature(nn.Module):
    """One distilled feature: what a module of the student puts out, read out as rows, projected.

    Args:
        module_path: where the feature is taken, a path below the student.
        io: ``'output'`` or ``'input'`` of that module.
        readout: one of :data:`vkd_plugin.readouts.READOUTS`.
        num_prefix_tokens: class and distillation tokens in front of the patch tokens.
        projector: maps the last dimension from student to teacher channels.
        index: which part of a tuple, list or mapping, if the module puts out one.
    """

    def __init__(
        self,
        module_path: str,
        io: str,
        readout: str,
        num_prefix_tokens: int,
        projector: nn.Module,
        index: int | str | None = None,
    ) -> None:
        super().__init__()
        self.module_path = module_path
        self.io = io
        self.readout = readout
        self.num_prefix_tokens = num_prefix_tokens
        self.projector = projector
        self.index = index

    def forward(self, x: Any) -> Tensor:
        """Whatever the module puts out to (N, C_teacher) rows."""
        rows = _rows(x, self.module_path, self.io, self.readout, self.num_prefix_tokens, self.index)
        expected = getattr(self.projector, "in_features", rows.shape[-1])
        if rows.shape[-1] != expected:
            found = f"the feature of module '{self.module_path}' has {rows.shape[-1]} channels"
            raise BadValue(f"{found}, and in_features of its projector is {expected}", expected)
        return self.projector(rows)

    def extra_repr(self) -> str:
        part = "" if self.index is None else f"[{self.index!r}]"
        return f"{self.io}{part} of '{self.module_path}', readout={self.readout}"


def _rows(
    value: Any,
    module: str,
    io: str = "output",
    readout: str = "identity",
    num_prefix_tokens: int | None = 0,
    index: int | str | None = None,
) -> Tensor:
    """What ``readout`` makes of what a module takes or puts out.

    Raises:
        ValueError: it does not fit.
    """
    return get_readout(readout)(pick(value, index, f"{io} of module '{module}'"), num_prefix_tokens or 0)


class _Captured:
    """What the wrapper's taps saw during one of its own forward passes.

    The taps stay on the student for good and are copied with it (EMA), so they must do nothing, and hold no
    memory, when the student runs outside of the wrapper. Kept by thread: DataParallel runs a replica in each.
    """

    def __init__(self) -> None:
        self.by_thread: dict[int, dict[tuple[str, str], Any]] = {}


class _Tap:
    """Forward hook that keeps a module's input or output. An object, not a closure: it is copied with its student."""

    def __init__(self, captured: _Captured, path: str, io: str) -> None:
        self.captured = captured
        self.path = path
        self.io = io

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        values = self.captured.by_thread.get(_thread())
        if values is not None:
            values[self.path, self.io] = output if self.io == "output" else args[0]


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class ProjectedStudent(AuxiliaryModelWrapper):
    """A student with any number of projected features, for torchdistill's ``auxiliary_model_wrapper``.

    Student and projectors run in one ``forward``, so one DistributedDataParallel around the wrapper averages
    all of their gradients. The wrapper's ``state_dict`` is the student's own, under the student's own names
    (what torchdistill saves loads back into the bare student); the projectors have theirs
    (:meth:`projector_state_dict`).

    .. code-block:: YAML

        student:
          auxiliary_model_wrapper:
            key: 'ProjectedStudent'
            kwargs:
              features:
                tokens:
                  module: 'norm'
                  readout: 'mean_patch_tokens'
                  projector: {key: 'OrthogonalProjector', orthogonal_map: 'matrix_exp'}
          forward_hook: {input: [], output: ['features.tokens']}

    Args:
        student_model: the student; torchdistill passes it.
        features: name -> ``{module, io, index, readout, num_prefix_tokens, projector}``. ``module`` is a path below
            the student; ``io`` is ``'output'`` (default) or ``'input'``; ``index`` names one part of a tuple, list or
            mapping; ``readout`` is one of :data:`vkd_plugin.readouts.READOUTS` (default ``'identity'``);
            ``num_prefix_tokens`` defaults to the student's attribute of that name; ``projector`` is
            ``{key, in_features, out_features, ...}`` with a key of :data:`vkd_plugin.projectors.PROJECTORS` (default
            ``OrthogonalProjector``) and its arguments.
            Sizes that are left out are inferred by a dry forward pass: ``in_features`` from the student,
            ``out_features`` from the teacher's side of the ``FeaturePair`` whose student side is this feature.
        input_shape: shape of one input, e.g. ``[3, 224, 224]``, for the dry pass; by default the shape of the
            first training sample.
        projectors_ckpt: a file to which the projectors are saved after each epoch, and from which they are
            loaded if it exists (torchdistill's own scripts save the student alone).
        device, device_ids, distributed: passed by torchdistill; DistributedDataParallel is set by the student's
            ``wrapper`` key (``run.py`` sets it by itself).

    Raises:
        ValueError: a module path, readout, projector or option that does not exist (the message names the
            nearest), or a size that cannot be inferred.
    """

    def __init__(
        self,
        student_model: nn.Module,
        features: Mapping[str, Mapping[str, Any]],
        input_shape: list[int] | None = None,
        projectors_ckpt: str | None = None,
        device: torch.device | None = None,
        device_ids: list[int] | None = None,
        distributed: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(features, Mapping) or not features:
            raise ValueError("ProjectedStudent needs at least one entry in 'features'")
        self.model = student_model
        self.projectors_ckpt = projectors_ckpt
        self._captured = _Captured()
        specs = {name: _feature_spec(name, spec, student_model) for name, spec in features.items()}
        _infer_sizes(student_model, specs, input_shape)
        self.features = nn.ModuleDict()
        for name, spec in specs.items():
            try:
                projector = build_projector(**spec["projector"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"feature '{name}': {error}") from None
            self.features[name] = ProjectedFeature(
                spec["module"], spec["io"], spec["readout"], spec["num_prefix_tokens"], projector, spec["index"]
            )
        self._add_taps()
        self.register_state_dict_post_hook(_to_student_names)
        self.register_load_state_dict_pre_hook(_from_student_names)
        if device is not None:
            self.to(device)
        if projectors_ckpt is not None and check_if_exists(projectors_ckpt):
            load_module_ckpt(self.features, "cpu", projectors_ckpt)

    def _add_taps(self) -> None:
        for path, io in {(f.module_path, f.io) for f in self._projected()}:
            self.model.get_submodule(path).register_forward_hook(_Tap(self._captured, path, io))

    def _projected(self) -> Iterator[ProjectedFeature]:
        for feature in self.features.values():
            assert isinstance(feature, ProjectedFeature)
            yield feature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's own output; each projected feature is the output of ``features.<name>``."""
        by_thread, thread = self._captured.by_thread, _thread()
        values = by_thread[thread] = {}
        try:
            output = self.model(*args, **kwargs)
        finally:
            del by_thread[thread]
        # Evaluation has no use for the projections. The question breaks graphs, so it is not asked in one.
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            for feature in self._projected():
                if (feature.module_path, feature.io) not in values:
                    raise ValueError(f"module '{feature.module_path}' does not run in the student's forward pass")
                feature(values[feature.module_path, feature.io])
        return output

    def post_epoch_process(self, *args: Any, **kwargs: Any) -> None:
        """Saves the projectors to ``projectors_ckpt``; torchdistill calls it after each epoch."""
        if self.projectors_ckpt is not None:
            if is_main_process():
                make_parent_dirs(self.projectors_ckpt)
            # Whole tensors under fully_shard as well, for which all processes have to ask.
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            save_on_master(get_model_state_dict(self.features, options=options), self.projectors_ckpt)

    def projector_state_dict(self) -> dict[str, Tensor]:
        """State of the projectors alone, keys ``<feature>.projector.<name>``."""
        return self.features.state_dict()

    def load_projector_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads what :meth:`projector_state_dict` returned; keys must match."""
        self.features.load_state_dict(state)

    def orthogonality_errors(self) -> dict[str, Tensor]:
        """Feature name -> max |W^T W - I| of its orthogonal projector, as scalars on the projector's device."""
        return {
            name: feature.projector.orthogonality_error()
            for name, feature in self.features.items()
            if isinstance(feature.projector, OrthogonalProjector)
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters to keep out of weight decay (timm's convention), the student's own included."""
        names: set[str] = set()
        for path, module in self.named_modules():
            if module is not self and callable(getattr(module, "no_weight_decay", None)):
                names |= {f"{path}.{name}" for name in module.no_weight_decay()}
        return names


def _to_student_names(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Any) -> None:
    """State dict hook: ``model.X`` becomes ``X``; projectors are left out."""
    for key in [k for k in state if k.startswith(prefix)]:
        value = state.pop(key)
        if key.startswith(f"{prefix}model."):
            state[prefix + key[len(prefix) + len("model.") :]] = value


def _from_student_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Load hook: the student's names go below ``model``; projectors keep the weights that they have."""
    for key in [k for k in state if k.startswith(prefix)]:
        state[f"{prefix}model.{key[len(prefix) :]}"] = state.pop(key)
    features = module.get_submodule("features")
    state.update({f"{prefix}features.{key}": value for key, value in features.state_dict().items()})


_READ = ("module", "io", "index", "readout", "num_prefix_tokens")
"""How a feature is read, keys of either side's."""


def _feature_spec(name: str, spec: Mapping[str, Any], student: nn.Module) -> dict[str, Any]:
    """One entry of ``features`` with its defaults filled in and its names checked."""
    keys = (*_READ, "projector")
    if not isinstance(spec, Mapping):
        raise ValueError(f"feature '{name}' should be a mapping with the keys {', '.join(keys)}")
    if "." in name or name in ("keys", "values", "items", "pop", "update", "clear", "forward"):
        raise ValueError(f"'{name}' cannot name a feature: it is part of the hook path 'features.<name>'")
    for key in spec:
        if key not in keys:
            raise ValueError(f"feature '{name}': unknown key '{key}'{nearest(key, keys)}")
    if "module" not in spec:
        raise ValueError(f"feature '{name}': 'module' is missing, the path of a module of the student")
    path = spec["module"]
    paths = {p for p, _ in student.named_modules()}
    if path not in paths:
        own = str(path).removeprefix("model.")  # as hooks are written
        hint = f" (did you mean '{own}'?)" if own in paths else nearest(path, paths - {""})
        raise BadValue(f"feature '{name}': the student has no module '{path}'{hint}", path)
    io = spec.get("io", "output")
    if io not in ("input", "output"):
        raise BadValue(f"feature '{name}': io should be 'input' or 'output', got {io!r}", io)
    readout = spec.get("readout", "identity")
    try:
        get_readout(readout)
    except ValueError as error:
        raise BadValue(f"feature '{name}': {error}", readout) from None
    prefix = spec.get("num_prefix_tokens", getattr(student, "num_prefix_tokens", None))
    if prefix is None and readout in PREFIX_READOUTS:
        raise ValueError(
            f"feature '{name}': {type(student).__name__} does not say how many class and distillation tokens it "
            f"has; give num_prefix_tokens (0 if none)"
        )
    projector = {"key": "OrthogonalProjector", **(spec.get("projector") or {})}
    return {
        "module": path,
        "io": io,
        "index": spec.get("index"),
        "readout": readout,
        "num_prefix_tokens": prefix or 0,
        "projector": projector,
    }


def _infer_sizes(student: nn.Module, specs: dict[str, dict[str, Any]], input_shape: list[int] | None) -> None:
    """Fills in ``in_features`` and ``out_features`` where a projector leaves them out, by dry forward passes."""
    if all({"in_features", "out_features"} <= spec["projector"].keys() for spec in specs.values()):
        return
    setup = current_setup()
    sample = _sample_input(student, setup, input_shape)
    own = {
        name: {key: spec[key] for key in _READ}
        for name, spec in specs.items()
        if "in_features" not in spec["projector"]
    }
    for name, value in _seen(student, sample, own, "feature '{}'").items():
        try:
            specs[name]["projector"]["in_features"] = _rows(value, **own[name]).shape[-1]
        except ValueError as error:
            raise BadValue(f"feature '{name}': {error}", own[name]["readout"]) from None
    sides = {
        name: _teacher_side(name, specs, setup) for name, s in specs.items() if "out_features" not in s["projector"]
    }
    if not sides:
        return
    assert setup is not None
    for name, value in _seen(setup.box.teacher_model, sample, sides, "feature '{}', teacher's side").items():
        try:
            specs[name]["projector"]["out_features"] = _rows(value, **sides[name]).shape[-1]
        except ValueError as error:
            raise BadValue(f"feature '{name}', teacher's side: {error}", sides[name].get("readout")) from None


def _teacher_side(name: str, features: Iterable[str], setup: Setup | None) -> Mapping[str, Any]:
    """The teacher's half of the ``FeaturePair`` in the criterion whose student's half is ``features.<name>``."""
    ask = f"feature '{name}': give its projector out_features, the number of channels of the teacher's feature"
    if setup is None or getattr(setup.box, "teacher_model", None) is None:
        raise ValueError(ask)
    kwargs = setup.train_config.get("criterion", {}).get("kwargs") or {}
    wanted = f"features.{name}"
    read = []
    for term in (kwargs.get("sub_terms") or {}).values():
        pair = (term.get("criterion_wrapper") or {}).get("kwargs") or {}
        student_side, teacher_side = pair.get("student"), pair.get("teacher")
        if not isinstance(student_side, Mapping) or not isinstance(teacher_side, Mapping):
            continue
        if student_side.get("module") == wanted:
            return teacher_side
        read.append(student_side.get("module"))
        if teacher_side.get("module") == wanted:
            raise BadValue(f"'{wanted}' is the student's, and stands on the teacher's side", wanted)
    near = closest(wanted, [path for path in read if path not in {f"features.{other}" for other in features}])
    if near is not None:
        raise BadValue(f"the student's side '{near}' is no feature (did you mean '{wanted}'?)", near)
    raise ValueError(f"{ask} (no FeaturePair in the criterion has '{wanted}' as its student side)")


def _sample_input(student: nn.Module, setup: Setup | None, input_shape: list[int] | None) -> Tensor:
    """A batch of two to try the models on, on the student's device."""
    if input_shape is not None:
        sample = torch.zeros(*input_shape)
    elif setup is not None and setup.box.train_data_loader is not None:
        with generators_restored():
            sample = setup.box.train_data_loader.dataset[0][0]
        if not isinstance(sample, Tensor):
            raise ValueError(f"training samples are {type(sample).__name__}, not tensors; give the sizes yourself")
    else:
        raise ValueError("sizes that are left out are inferred by a dry forward pass; give input_shape for it")
    parameter = next(student.parameters(), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    return torch.stack([sample, sample]).to(device)


@torch.no_grad()
def _seen(model: nn.Module, sample: Tensor, wanted: Mapping[str, Mapping[str, Any]], whose: str) -> dict[str, Any]:
    """The inputs or outputs of modules of ``model`` for ``sample``, in one forward pass.

    The model is run in evaluation mode, so nothing of it changes, and left in the mode that it was in.

    Args:
        model: which.
        sample: a batch.
        wanted: name -> ``module``, its path, and ``io``.
        whose: a format for what messages begin with, which takes the name.
    """
    modules = dict(model.named_modules())
    seen: dict[str, Any] = {}
    handles = []
    modes = {module: module.training for module in model.modules()}
    try:
        for name, where in wanted.items():
            path = "" if where["module"] == "." else where["module"]
            if path not in modules:
                hint = nearest(path, modules.keys() - {""})
                raise BadValue(f"{whose.format(name)}: there is no module '{path}'{hint}", path)

            def keep(_module: nn.Module, args: Any, output: Any, name: str = name, where: Any = where) -> None:
                seen[name] = args[0] if where.get("io") == "input" else output

            handles.append(modules[path].register_forward_hook(keep))
        if handles:
            model.eval()
            with generators_restored():
                model(sample)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    for name, where in wanted.items():
        if name not in seen:
            raise ValueError(f"{whose.format(name)}: module '{where['module']}' does not run in the forward pass")
    return seen
