"""timm's models by name in torchdistill's YAML."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn
from torchdistill.models.registry import register_model

from ..errors import UserError
from ..suggest import nearest
from .renormalization import Statistics, renormalize_inputs
from .weights import first_line, fit_weights, load_weights

_OTHER_SOURCES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


@register_model
def timm_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | None = None,
    new_classifier: bool = False,
    renormalize: str | Mapping[str, Sequence[float]] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A model of timm by name.

    In YAML::

        teacher_model:
          key: 'timm_model'
          kwargs: {name: 'regnety_160.deit_in1k', pretrained: True}

    Args:
        name: with the tag of its weights where there are several: the untagged ``regnety_160`` is not the
            teacher of DeiT, which is ``regnety_160.deit_in1k``.
        pretrained: download timm's weights, or take them from its cache.
        checkpoint: a local file instead, see :func:`vkd_plugin.models.weights.load_weights`; all its names and
            shapes must fit. Nothing is downloaded.
        new_classifier: leave the classifier of the weights out, and begin with a new one: for a student on other
            classes. A teacher's would be random for good, so another ``num_classes`` alone is an error.
        renormalize: what the images are normalised with, if not with what this model was trained with:
            ``{mean: [...], std: [...]}``, or the name of the model of timm (the student's) that they are normalised
            for. See :func:`vkd_plugin.models.renormalization.renormalize_inputs`.
        kwargs: for the model (``num_classes``, ``img_size``, ``drop_path_rate``, ...).

    Raises:
        UserError: an unknown model or tag; weights that cannot be had, or that do not fit; ``renormalize`` is neither,
            or for another number of channels.
    """
    for key in _OTHER_SOURCES:
        if kwargs.get(key) is not None:
            raise UserError(f"timm_model {name}: {key} is not taken: name a file of weights as checkpoint")
    if pretrained and checkpoint is not None:
        raise UserError(f"timm_model {name}: give either pretrained or checkpoint")
    if new_classifier and not pretrained and checkpoint is None:
        raise UserError(f"timm_model {name}: new_classifier goes with pretrained or checkpoint")
    if ":" not in name:  # with a colon timm finds the model elsewhere: hf-hub:..., local-dir:...
        _check_name(name)
        if pretrained and (cfg := timm.get_pretrained_cfg(name)) is not None and not cfg.has_weights:
            raise UserError(f"timm has no weights for {name}: name a file as checkpoint")

    model = _create(name, pretrained, kwargs)
    if checkpoint is not None:
        weights = load_weights(checkpoint)
        if new_classifier:
            weights |= _classifier_state(model)
        fit_weights(model, weights, checkpoint)
    elif new_classifier:
        model.reset_classifier(model.num_classes)
    elif pretrained:
        _check_classifier(name, model)
    if renormalize is not None:
        _renormalize(model, renormalize)
    return model


def _create(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (OSError, RuntimeError) as error:
        if not pretrained and ":" not in name:
            raise
        raise UserError(
            f"timm_model {name}: no pretrained weights: {first_line(error)} (without a network, "
            f"{_where(name)}name a downloaded file as checkpoint)"
        ) from error


def _where(name: str) -> str:
    """Where a model's weights are to be downloaded."""
    cfg = None if ":" in name else timm.get_pretrained_cfg(name)
    if cfg is None:
        return ""
    return f"see {f'https://huggingface.co/{cfg.hf_hub_id}' if cfg.hf_hub_id else cfg.url} and "


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
    architecture, _, tag = name.partition(".")
    tags = {known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")}
    if tag and tag not in tags:
        raise UserError(f"timm has no weights '{tag}' for {architecture}{nearest(tag, tags)}")


def _classifier_state(model: Any) -> dict[str, Any]:
    """Weights of the last layers, by their names in ``model``."""
    classifier = model.pretrained_cfg.get("classifier") or ()
    layers = (classifier,) if isinstance(classifier, str) else classifier
    return {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] in layers}


def _check_classifier(name: str, model: Any) -> None:
    """timm leaves a classifier for other classes as it was initialised, and says nothing."""
    trained, wanted = model.pretrained_cfg.get("num_classes"), getattr(model, "num_classes", 0)
    if trained is not None and wanted not in (0, trained):
        raise UserError(
            f"timm_model {name}: its weights are for {trained} classes, and num_classes is {wanted} "
            "(new_classifier: True begins with a new one, which has to train)"
        )


def _renormalize(model: Any, given: str | Mapping[str, Sequence[float]]) -> None:
    try:
        data = _statistics_for(given) if isinstance(given, str) else Statistics.from_config(given)
        renormalize_inputs(model, data, Statistics(*(tuple(model.pretrained_cfg[key]) for key in ("mean", "std"))))
    except ValueError as error:
        raise UserError(f"renormalize: {error}") from error


def _statistics_for(name: str) -> Statistics:
    """What images for timm's model ``name`` are normalised with."""
    _check_name(name)
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        raise ValueError(f"timm does not say what images for '{name}' are normalised with")
    return Statistics(tuple(cfg.mean), tuple(cfg.std))
