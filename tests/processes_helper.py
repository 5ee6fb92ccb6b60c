"""Processes that a test starts, alone or several that find one another, without importing torch in each of them.

They are forked from one server, which each process of pytest starts when it first needs it, and which has imported
what most of them need.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]
_IMPORTED_ONCE = [
    "vkd_plugin.engine.run",
    "vkd_plugin.check",
    "sklearn.datasets",
    "torch.utils.tensorboard",
    "frozen_helper",
]


def work_together(function: Callable[..., None], arguments: tuple[Any, ...], number: int, seconds: float = 180) -> None:
    """Calls ``function(rank, *arguments)`` in ``number`` processes, and waits until all have ended; none is left.

    Args:
        function: found by its name in a module that can be imported.
        arguments: are pickled.
        number: of processes.
        seconds: that they may take.

    Raises:
        AssertionError: they take longer.
        Exception: what one of them has raised.
    """
    _set_up_server()
    context: Any = mp.start_processes(
        _with_one_thread, (function, arguments), nprocs=number, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Args:
        code: its exit code, negative where a signal has ended it.
        out: what it has written to stdout.
        err: what it has written to stderr.
    """

    code: int
    out: str
    err: str


def run_py(
    *arguments: str,
    number: int = 1,
    before: str = "",
    environment: Mapping[str, str] | None = None,
    seconds: float = 180,
) -> list[Ended]:
    """``python run.py ARGUMENTS`` in the repository's folder.

    It is one process, or several with the variables that a launcher gives them.

    Args:
        arguments: of each process.
        number: of processes; if it is not 1, they meet at a file (``--dist_url``).
        before: Python code that each executes before.
        environment: further variables.
        seconds: that they may take.

    Raises:
        AssertionError: they take longer.
    """
    _set_up_server()
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, **(environment or {})}
        processes: list[Any] = []
        for rank in range(number):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)} if number > 1 else {}
            meet = ("--dist_url", f"file://{folder}/meet") if number > 1 else ()
            argv = ["run.py", *arguments, *meet]
            work = argv, before, {**variables, **place}, f"{folder}/{rank}"
            processes.append(context.Process(target=_run_py, args=work))
        deadline = time.monotonic() + seconds
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
            said = [[Path(f"{folder}/{rank}.{name}") for name in ("out", "err")] for rank in range(number)]
            texts = [[file.read_text() if file.exists() else "" for file in files] for files in said]
            assert not hanging, f"the processes hang: {hanging}\n{texts}"
            return [Ended(process.exitcode, *text) for process, text in zip(processes, texts, strict=True)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()


def _set_up_server() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED_ONCE)
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(folders)}):  # it does not know of ours
        forkserver.ensure_running()


def _with_one_thread(rank: int, function: Callable[..., None], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    function(rank, *arguments)


def _run_py(argv: list[str], before: str, variables: Mapping[str, str], said: str) -> None:
    for file, number in ((f"{said}.out", 1), (f"{said}.err", 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o644), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.argv = argv
    sys.path.insert(0, str(ROOT))
    exec(before, {"__name__": "before"})
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
