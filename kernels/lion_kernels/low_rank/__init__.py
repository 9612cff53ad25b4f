"""Gated low-rank updates, shared by both mixtures: kernels, launches, sizes and the formula in PyTorch."""
