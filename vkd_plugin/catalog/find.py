"""From what the user types to kinds and components."""

from collections.abc import Sequence
from importlib import import_module

import timm

from vkd_plugin.config.construct import one_line
from vkd_plugin.errors import UserError
from vkd_plugin.suggest import closest, nearest

from .collect import timm_architecture
from .component import Component
from .kinds import KINDS, CatalogKind


def import_packages(packages: Sequence[str]) -> None:
    """Imports what the user names, which registers its components.

    Raises:
        UserError: a package cannot be imported.
    """
    for package in packages:
        try:
            import_module(package)
        except Exception as error:  # a package may raise anything while it is imported
            raise UserError(f"--import {package}: {one_line(error)}") from error


def kinds_called(text: str) -> list[CatalogKind]:
    """The kind of that name, singular or plural, or all whose names have these words (``wrappers``); [] if none."""
    wanted = _words(text)
    named = [(kind, (_words(kind.plural), _words(kind.singular))) for kind in KINDS]
    exact = [kind for kind, names in named if wanted in names]
    return exact or [kind for kind, names in named if any(f" {wanted} " in f" {name} " for name in names)]


def components_called(name: str, kinds: Sequence[CatalogKind], packages: Sequence[str]) -> list[Component]:
    """The components of that name, upper and lower case alike unless they tell two apart, of whatever kind; timm's
    models too, among models.
    """
    found = []
    for kind in kinds:
        components = kind.find(packages)
        exact = [component for component in components if component.name == name]
        found += exact or [component for component in components if component.name.lower() == name.lower()]
        if kind.singular == "model" and (model := timm_architecture(name)) is not None:
            found.append(model)
    return found


def unknown(name: str, kinds: Sequence[CatalogKind], packages: Sequence[str]) -> UserError:
    """Why there is no component ``name`` of ``kinds``, and the nearest right thing."""
    elsewhere = components_called(name, [kind for kind in KINDS if kind not in kinds], packages)
    what = " or ".join(kind.singular for kind in kinds)
    if elsewhere:
        return UserError(f"no {what} '{name}': it is a {elsewhere[0].kind}")
    names = [component.name for kind in kinds for component in kind.find(packages)]
    if any(kind.singular == "model" for kind in kinds):
        names += _timm_names()
    return UserError(f"no {what} '{name}'{nearest(name, names)}")


def unknown_word(word: str, packages: Sequence[str]) -> UserError:
    """Why ``word`` is neither a kind nor a component, and the nearest right thing."""
    plurals = [kind.plural for kind in KINDS]
    names = [component.name for kind in KINDS for component in kind.find(packages)]
    near = closest(word, [*plurals, *names, *_timm_names()])
    hint = f" (did you mean '{near}'?)" if near else "; run.py list shows the kinds"
    return UserError(f"no kind or component '{word}'{hint}")


def unknown_kind(word: str) -> UserError:
    """Why ``word`` is no kind."""
    return UserError(f"no kind of component '{word}'{nearest(word, [kind.plural for kind in KINDS])}")


def _timm_names() -> list[str]:
    return list(timm.list_models())


def _words(text: str) -> str:
    return " ".join(text.lower().replace("-", " ").replace("_", " ").split())
