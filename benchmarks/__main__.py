"""A short round of every benchmark, one after the other: ``python -m benchmarks [FOLDER]``.

Each can be run by itself, for longer and on a GPU: ``python -m benchmarks.step --help``. With a folder, each leaves its
figures there as JSON. ``rows`` is left out, as it measures a table whose data have to be here, and so is
Fashion-MNIST. One that fails does not end the others.
"""

import argparse
import subprocess
import sys
from pathlib import Path

SHORT = {
    "startup": ["--rounds", "3"],
    "projector": ["--quick", "--no-rivals", "--repeats", "5"],
    "normalization": ["--rounds", "5"],
    "checkpoint": ["--rounds", "1", "--epochs", "4"],
    "check": ["--rounds", "1"],
    "step": ["--batch", "2", "--rounds", "2"],
    "levers": ["--batch", "2", "--rounds", "2"],
    "loader": ["--rounds", "2", "--images", "64"],
    "engine": ["--experiments", "quickstart", "--rounds", "4"],
    "teacher_cache": ["--experiments", "quickstart", "--rounds", "4"],
    "scale": ["--quick", "--repeats", "3"],
    "flops": [],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="for the figures")
    folder = parser.parse_args().folder
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, arguments in SHORT.items():
        print(f"\n{name}: python -m benchmarks.{name} {' '.join(arguments)}", flush=True)
        saved = ["--json", str(folder / f"{name}.json")] if folder is not None else []
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments, *saved]).returncode:
            failed.append(name)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
