"""Low-rank updates weighed by a gate, which both mixtures run: kernels, launches, sizes and the formula in PyTorch."""
