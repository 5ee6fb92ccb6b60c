"""Scripts that measure ratios and write JSON; the last figures stand in RESULTS.md."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler says on the terminal when it starts and stops
