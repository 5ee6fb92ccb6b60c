"""What is wrong with an experiment, and what it will be, before it costs anything."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import ConfigErrors, Experiment, load_experiment
from ..config.construct import call
from ..engine.build import check_validation
from ..errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError
from ..teacher_cache import views_of
from . import standin
from .dry import dry_run
from .facts import Facts
from .folders import missing_files
from .page import print_page


def check(paths: Sequence[str], overrides: Sequence[str], trust: Sequence[str], data: bool, as_json: bool) -> int:
    """Checks experiment files; prints a page for each, and on stderr what is wrong.

    Args:
        paths: the files.
        overrides: ``a.b.c=value`` each, for all of them.
        trust: see ``load_experiment``.
        data: whether data sets have to be here.
        as_json: print one JSON object a file instead of the page.

    Returns:
        The exit code: 2 if anything is wrong.
    """
    wrong = False
    for path in paths:
        facts = examine(path, overrides, trust, data)
        if as_json:
            print(json.dumps(_as_json(facts)))
        elif not facts.problems:
            print_page(facts)
        sys.stdout.flush()
        for problem in facts.problems:
            print(f"error: {problem}", file=sys.stderr)
        if not as_json:
            for warning in facts.warnings:
                print(f"warning: {warning}", file=sys.stderr)
        wrong = wrong or bool(facts.problems)
    return EXIT_BAD_INPUT if wrong else EXIT_DONE


def examine(path: str | Path, overrides: Sequence[str] = (), trust: Sequence[str] = (), data: bool = False) -> Facts:
    """All that can be known of an experiment file without training, its problems included."""
    facts = Facts(str(path))
    try:
        experiment = load_experiment(path, overrides, trust, call if data else standin.build)
    except ConfigErrors as error:
        facts.problems += error.problems
        return facts
    facts.warnings += experiment.warnings + ([] if data else missing_files(experiment))
    _step(experiment, facts)
    facts.problems.sort(key=_position)
    return facts


def prove(experiment: Experiment) -> list[str]:
    """Takes a dry step of an experiment whose data are here.

    Returns:
        Warnings.

    Raises:
        ConfigErrors: all that is wrong.
    """
    facts = Facts(experiment.path)
    _step(experiment, facts)
    if facts.problems:
        raise ConfigErrors(facts.problems)
    return facts.warnings


def _step(experiment: Experiment, facts: Facts) -> None:
    """A dry step, and what none can show: whether the teacher's outputs may be kept, and epochs not validated."""
    dry_run(experiment, facts)
    for rule in (views_of, check_validation):
        try:
            rule(experiment)
        except ConfigError as error:
            facts.problems.append(error)


def _as_json(facts: Facts) -> dict[str, Any]:
    return {**asdict(facts), "problems": [_problem(problem) for problem in facts.problems]}


def _position(problem: ConfigError) -> tuple[str, int, int]:
    found = _problem(problem)
    return found["file"], found["line"] or 0, found["column"] or 0


def _problem(problem: ConfigError) -> dict[str, Any]:
    """A problem in its parts; line and column are None where it lies in an override."""
    where = problem.where or ""
    file, *numbers = where.rsplit(":", 2)
    if len(numbers) == 2 and all(number.isdigit() for number in numbers):
        return {"file": file, "line": int(numbers[0]), "column": int(numbers[1]), "message": problem.message}
    return {"file": where, "line": None, "column": None, "message": problem.message}
