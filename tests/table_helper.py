"""Stands in for ``run.py`` in the tests of tables: notes how it was called, and does what the experiment's name says.

``fails.yaml`` ends with exit code 3, ``dies.yaml`` kills itself, ``waits.yaml`` waits for a signal and then ends as
a run does that has saved, ``early.yaml`` ends by the signal itself; all else writes ``summary.json``.
"""

import fcntl
import json
import os
import signal
import sys
import threading
from pathlib import Path

arguments = sys.argv[1:]
config, folder = (arguments[arguments.index(flag) + 1] for flag in ("--config", "--output"))
overrides = [arguments[index + 1] for index, part in enumerate(arguments) if part == "--set"]
with Path("calls.txt").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")
Path(folder).mkdir(parents=True, exist_ok=True)
with (Path(folder) / ".lock").open("w") as lock:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(2) from None
    if config == "fails.yaml":
        raise SystemExit(3)
    if config == "dies.yaml":
        os.kill(os.getpid(), signal.SIGKILL)
    if config in ("waits.yaml", "early.yaml"):
        if config == "waits.yaml":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                signal.signal(number, lambda *_: sys.exit(75))
        Path("waiting").touch()
        threading.Event().wait(60)
    summary = {"config": config, "overrides": overrides, "m": 5, "wall_seconds": 60}
    (Path(folder) / "summary.json").write_text(json.dumps(summary))
