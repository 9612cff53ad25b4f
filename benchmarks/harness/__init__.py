"""The harness of the benchmarks (`python -m benchmarks.harness`): runs, comparisons, reports and charts."""
