"""Runs the benchmarks (`python -m benchmarks.harness`), compares two runs, and reports and draws their results."""
