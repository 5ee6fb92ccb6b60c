"""Watches over a run's numbers: reads each step's figures, keeps their means, and ends the run on bad ones."""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NotFiniteError, UserError
from ..wrappers import ProjectedStudent
from .board import Board
from .box import EngineBox
from .guard import NumberGuard, Verdict, diagnosis, explain, file_name, sample_paths, weights_are_finite
from .loaders import samples_of
from .meter import Means, Readback, StepFigures, total
from .processes import Processes
from .records import write_atomically
from .sharding import gathered

logger = logging.getLogger("vkd_plugin")

ORTHOGONALITY_LIMIT = 1e-3
_ORTHOGONALITY = "orthogonality_error/"
_UNREADABLE = "unreadable_images"


class Watch:
    """What :class:`~vkd_plugin.engine.train.Trainer` knows of the numbers.

    Args:
        box: trains.
        processes: this process among its peers.
        path: the run's folder, for diagnoses; of all processes.
        skips_allowed: ``skip_nonfinite``.

    Attributes:
        guard: counts what was left out.
        means: of the epoch, in this process.
        newest: figures of the last step that has come back from the device.
        board: where figures of steps are drawn, if anywhere.
    """

    def __init__(self, box: EngineBox, processes: Processes, path: Path, skips_allowed: int) -> None:
        self.guard = NumberGuard(box.precision.scaler.is_enabled(), skips_allowed)
        self.means = Means()
        self.newest: dict[str, float] = {}
        self.board: Board | None = None
        self._box = box
        self._processes = processes
        self._path = path
        self._readback = Readback()
        self._failure: str | None = None
        self._failed_here = False
        self._beyond_repair = ""

    @property
    def failed(self) -> bool:
        """Whether this process knows of something that has to end the run."""
        return self._failure is not None

    def see(self, figures: StepFigures, terms: Mapping[str, Tensor]) -> None:
        """Takes in a step, and looks at those that have come back from the device by now.

        Args:
            figures: the step.
            terms: loss and loss terms, on the device.
        """
        values = dict(terms)
        if self._box.gradient_norm is not None:
            values["gradient_norm"] = self._box.gradient_norm
        if figures.logged:  # the projectors are not measured at each step
            values |= self.orthogonality()
        figures.gradients = self._box.gradient_norms
        self._readback.send(figures, values)
        self._judge(self._readback.arrived())

    def count_unreadable(self, images: int | None) -> None:
        """Counts images of a batch in the place of which others came; None where the data set replaces none."""
        if images is not None:
            self.means.add({_UNREADABLE: images})  # whose sum it is that counts

    def prove(self) -> dict[str, float]:
        """Waits for all figures, and looks at all weights and projectors: what is saved next is sound.

        Returns:
            ``orthogonality_error/<feature>`` of each projector.

        Raises:
            NotFiniteError: it is not, in any of the processes.
        """
        self._judge(self._readback.arrived(wait=True))
        newest = self.guard.recent[-1] if self.guard.recent else StepFigures(0, 0, 0)
        if not self.failed and not weights_are_finite(self._box.student.parameters()):
            self._failure = self.stopped("a weight of the student is not finite", newest.epoch, newest.step)
        if self._processes.any(self.failed):  # before the projectors, which may be in shards: all look at them or none
            self.fail()
        errors = {name: error.item() for name, error in self.orthogonality().items()}
        self._judge_projectors(newest, errors)
        if self._processes.any(self.failed):
            self.fail()
        return errors

    def fail(self) -> None:
        """Ends all processes with the account of the one whose own batch was bad, if there is one.

        Raises:
            NotFiniteError: always.
        """
        accounts = self._processes.gather((self._failure, self._failed_here))
        told = sorted((not here, rank, text) for rank, (text, here) in enumerate(accounts) if text)
        raise NotFiniteError(told[0][2])

    def means_of_all(self) -> dict[str, float]:
        """The epoch's means over steps and processes: the loss, its terms by name, the gradient's norm.

        Also ``unreadable_images``, their number, where the data set replaces such.
        """
        sums = total(self._processes.gather(self.means.state()))
        unreadable = {_UNREADABLE: int(sums.pop(_UNREADABLE)[0])} if _UNREADABLE in sums else {}
        means = {name: value / number for name, (value, number) in sums.items()}
        order = ["loss", *sorted(name for name in means if name.startswith("loss/")), "gradient_norm"]
        return {"loss": math.nan} | {name: means[name] for name in order if name in means} | unreadable

    def orthogonality(self) -> dict[str, Tensor]:
        """max |W^T W - I| of each projector, on the device; nan for all where a raw weight is beyond repair."""
        wrapper = self._box.wrapper
        if not isinstance(wrapper, ProjectedStudent):
            return {}
        with gathered(self._box.student):
            try:
                errors = wrapper.orthogonality_errors()
            except ValueError as error:
                self._beyond_repair = f" ({error})"
                errors = dict.fromkeys(wrapper.features, torch.tensor(math.nan))
        return {_ORTHOGONALITY + name: error for name, error in errors.items()}

    def stopped(self, why: str, epoch: int, step: int) -> str:
        """The line that ends the run. ``epoch`` counts from 0."""
        text = f"training stopped: {why} in epoch {epoch + 1} at step {step}"
        last = self._path / "checkpoints" / "last.pt"
        return f"{text}; {last} is from before" if last.exists() else text

    def _judge(self, arrived: Iterable[StepFigures]) -> None:
        """Takes figures into the epoch's means, if there is nothing to object."""
        for figures in arrived:
            projectors = {name: v for name, v in figures.values.items() if name.startswith(_ORTHOGONALITY)}
            for name in projectors:
                del figures.values[name]
            verdict = self.guard.judge(figures)
            measured = dict(figures.values)
            if verdict is Verdict.SCALER:
                del measured["gradient_norm"]
            if verdict in (Verdict.FINE, Verdict.SCALER):
                self.means.add(measured)
                self._judge_projectors(figures, projectors)
            elif verdict is not Verdict.SKIPPED_TOO:
                self._explain(figures, verdict)
            if self.board and figures.logged:
                self.board.add(measured, figures.step, prefix="step/")
            self.newest = figures.values

    def _judge_projectors(self, figures: StepFigures, errors: Mapping[str, float]) -> None:
        for name, error in errors.items():
            if not error <= ORTHOGONALITY_LIMIT and not self.failed:
                why = (
                    f"the projector of feature '{name.removeprefix(_ORTHOGONALITY)}' is not orthonormal, "
                    f"max |W^T W - I| is {error:.1e} (limit {ORTHOGONALITY_LIMIT:.0e}){self._beyond_repair}"
                )
                self._failure = self.stopped(why, figures.epoch, figures.step)

    def _explain(self, figures: StepFigures, verdict: Verdict) -> None:
        """Writes the diagnosis of a bad step; notes that the run has to stop, or says that it goes on."""
        if self.failed:  # what comes after is what that step has done
            return
        file = self._path / file_name(figures.step, self._processes.rank, self._processes.world_size)
        try:
            write_atomically(file, json.dumps(self._diagnosis(figures), indent=1) + "\n")
        except UserError as error:
            logger.error("%s", error)
        what = explain(figures)
        if verdict is Verdict.SKIPPED:
            left = self.guard.skips_allowed - self.guard.skipped
            logger.warning("step %d left out: %s (%d more allowed); see %s", figures.step, what, left, file)
        else:
            self._failure = f"{self.stopped(what, figures.epoch, figures.step)}; see {file}"
            self._failed_here = not math.isfinite(figures.values["loss"])

    def _diagnosis(self, figures: StepFigures) -> dict[str, Any]:
        loader = self._box.train_data_loader
        samples = samples_of(loader, figures.batch)
        paths = sample_paths(loader.dataset, samples) if samples else None
        trained = dict(self._box.student.named_parameters())
        return diagnosis(figures, self.guard.recent, samples, paths, trained, self._processes.rank)
