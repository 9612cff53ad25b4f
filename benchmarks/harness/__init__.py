"""Results of the benchmarks: `lion-fast bench` runs them, compares two runs, draws them and tunes the kernels."""
