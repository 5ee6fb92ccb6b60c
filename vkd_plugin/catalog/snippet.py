"""A component as YAML to paste, in its place of an experiment file: a template for each kind."""

import textwrap

from vkd_plugin.readouts import PREFIX_READOUTS

from .collect import TIMM
from .component import Component
from .values import quoted
from .writing import argument_lines, beside, call, fill, kwargs

# --- losses ---------------------------------------------------------------------------------------------------


_LABELS = """
    criterion_wrapper:
      key: 'SimpleLossWrapper'
      kwargs:
        input: {is_from_teacher: False, module_path: '.', io: 'output'}
        target: {uses_label: True}  # or {is_from_teacher: True, module_path: '.', io: 'output'}
    """


def loss(component: Component) -> str:
    """The criterion, or a term of it."""
    if component.note == "high-level":
        return _criterion(component)
    return _term(component, quoted(component.name), kwargs(component), _wrapper(component))


def _criterion(component: Component) -> str:
    """The criterion itself; with a term, if it takes such."""
    if all(argument.name != "sub_terms" for argument in component.arguments):
        return fill("train:\n  criterion:\n    key: {key}\n    {kwargs}", component, kwargs=kwargs(component))
    template = """
        train:
          criterion:
            key: {key}
            kwargs:
              sub_terms:
                my_term:
                  criterion: {key: 'CrossEntropyLoss', kwargs: {}}
                  {wrapper}
                  weight: 1.0
              {others}
        """
    live, comments = argument_lines(component)
    others = [*live, *(f"# {line}" for line in comments if not line.startswith("sub_terms:"))]
    return fill(template, component, wrapper=textwrap.dedent(_LABELS).strip(), others="\n".join(others))


def _term(component: Component, key: str, arguments: str, wrapper: str) -> str:
    template = """
        train:
          criterion:
            key: 'WeightedSumLoss'
            kwargs:
              sub_terms:
                my_term:
                  criterion:
                    key: {loss}
                    {arguments}
                  {wrapper}
                  weight: 1.0
        """
    return fill(template, component, loss=key, arguments=arguments, wrapper=wrapper)


def _wrapper(component: Component) -> str:
    """What hands a low-level loss its tensors; a mid-level loss finds them itself."""
    if component.note == "mid-level":
        return ""
    return beside(component, "criterion_wrapper", _LABELS)


def loss_wrapper(component: Component) -> str:
    """A term with it."""
    given = beside(component, "criterion", "criterion: {key: 'MSELoss', kwargs: {}}")
    template = """
        train:
          criterion:
            key: 'WeightedSumLoss'
            kwargs:
              sub_terms:
                my_term:
                  {criterion}
                  criterion_wrapper:
                    key: {key}
                    {kwargs}
                  weight: 1.0
        """
    return fill(template, component, criterion=given, kwargs=kwargs(component, nullable=True))


# --- models ---------------------------------------------------------------------------------------------------


def model(component: Component) -> str:
    """A student; a teacher looks the same."""
    template = """
        models:
          student_model:  # or teacher_model
            key: {name}
            {kwargs}
        """
    name = "timm_model" if component.note == TIMM else component.name
    return fill(template, component, name=quoted(name), kwargs=kwargs(component))


def model_wrapper(component: Component) -> str:
    """On the side that it is for."""
    template = """
        train:
          {side}:{hint}
            auxiliary_model_wrapper:
              key: {key}
              {kwargs}
            {hook}
        """
    side = "teacher" if component.note == "of the teacher" else "student"
    hint = "" if component.note else "  # or teacher"
    hook = beside(component, "forward_hook", "")
    return fill(template, component, side=side, hint=hint, kwargs=kwargs(component, nullable=True), hook=hook)


def adaptation(component: Component) -> str:
    """A layer under a name of its own, for ``sequential``."""
    template = """
        train:
          student:  # or teacher
            adaptations:
              my_layer:  # the name by which `sequential` puts it in its place
                key: {key}
                {kwargs}
        """
    return fill(template, component, kwargs=kwargs(component))


# --- the method -----------------------------------------------------------------------------------------------

_FEATURE = """
    train:
      student:
        auxiliary_model_wrapper:
          key: 'ProjectedStudent'
          kwargs:
            features:
              my_feature:
                module: <path of a module>
                {readout}
                {inside}
        forward_hook: {input: [], output: ['features.my_feature']}
    """
_READOUT = "readout: <one of run.py list readouts>"


def projector(component: Component) -> str:
    """A projected feature of the student."""
    arguments = kwargs(component, "projector", nullable=True).splitlines()
    arguments.insert(1, f"  key: {quoted(component.name)}")
    return fill(_FEATURE, component, readout=_READOUT, inside="\n".join(arguments))


def orthogonal_map(component: Component) -> str:
    """An argument of OrthogonalProjector."""
    inside = f"projector: {{key: 'OrthogonalProjector', orthogonal_map: {quoted(component.name)}}}"
    return fill(_FEATURE, component, readout=_READOUT, inside=inside)


def readout(component: Component) -> str:
    """A key of a feature of ProjectedStudent, or of either side of FeaturePair."""
    line = f"readout: {quoted(component.name)}  # also for student and teacher of a FeaturePair"
    prefix = "# num_prefix_tokens: <int>" if component.name in PREFIX_READOUTS else ""
    return fill(_FEATURE, component, readout=line, inside=prefix)


def normalization(component: Component) -> str:
    """An argument of VkDLoss."""
    return _vkd(component, [f"normalization: {quoted(component.name)}", "# eps: null"])


def distance(component: Component) -> str:
    """An argument of VkDLoss, with those that shape it."""
    return _vkd(
        component, [f"distance: {quoted(component.name)}", *(f"# {line}" for line in argument_lines(component)[1])]
    )


def _vkd(component: Component, arguments: list[str]) -> str:
    wrapper = """
        criterion_wrapper:
          key: 'FeaturePair'
          kwargs:
            student: {module: 'features.my_feature'}
            teacher: {module: '<path of a module>', readout: 'spatial_mean'}
        """
    block = "\n".join(["kwargs:", *(f"  {line}" for line in arguments)])
    return _term(component, "'VkDLoss'", block, textwrap.dedent(wrapper).strip())


# --- data -----------------------------------------------------------------------------------------------------


def dataset(component: Component) -> str:
    """A data set under a name of its own, for ``dataset_id``."""
    template = """
        datasets:
          {id}/train: !import_call
            {call}
        """
    return fill(template, component, id=component.name.lower(), call=call(component))


def transform(component: Component) -> str:
    """An item of a list of transforms."""
    template = """
        # in the transforms of a data set's Compose
        - !import_call
          {call}
        """
    return fill(template, component, call=call(component))


def dataset_wrapper(component: Component) -> str:
    """Around a loader's data set."""
    return _loader(component, "dataset_wrapper", f"key: {quoted(component.name)}\n{kwargs(component, nullable=True)}")


def sampler(component: Component) -> str:
    """A loader's sampler."""
    key = f"class_or_func: !import_get\n  key: {quoted(component.path)}"
    return _loader(component, "sampler", f"{key}\n{kwargs(component, nullable=True)}")


def batch_sampler(component: Component) -> str:
    """A loader's batch sampler."""
    text = _loader(component, "batch_sampler", f"key: {quoted(component.name)}\n{kwargs(component)}")
    return text.replace("batch_sampler:", "batch_sampler:  # batch_size and drop_last leave the loader's kwargs", 1)


def collate_function(component: Component) -> str:
    """A loader's collate function: a registered name, or what a tag builds."""
    if component.takes is None:
        return _loader(component, f"collate_fn: {quoted(component.name)}", "")
    return _loader(component, "collate_fn: !import_call", call(component))


def _loader(component: Component, name: str, block: str) -> str:
    template = """
        train:
          train_data_loader:  # or val_data_loader
            {name}
              {block}
        """
    return fill(template, component, name=name if ":" in name else f"{name}:", block=block)


# --- optimization ---------------------------------------------------------------------------------------------


def optimizer(component: Component) -> str:
    """The optimizer."""
    return _section(component, "optimizer")


def scheduler(component: Component) -> str:
    """The scheduler; it steps each epoch, or every ``scheduling_step`` batches."""
    return _section(component, "scheduler", "# scheduling_step: 1  # a step each batch instead of each epoch")


def _section(component: Component, name: str, more: str = "") -> str:
    template = """
        train:
          {section}:
            key: {key}
            {kwargs}
            {more}
        """
    return fill(template, component, section=name, kwargs=kwargs(component), more=more)


# --- functions ------------------------------------------------------------------------------------------------


def named(component: Component) -> str:
    """A function that is named without arguments."""
    if component.kind == "forward process":
        return fill("train:\n  student:  # or teacher\n    forward_proc: {key}", component)
    if component.kind.endswith(" process"):
        return fill("train:\n  {section}: {key}", component, section=component.kind.replace(" ", "_"))
    return fill("train:\n  criterion:\n    func2extract_model_loss: {key}", component)
