"""Scripts that measure ratios and write JSON; the last figures stand in RESULTS.md."""
