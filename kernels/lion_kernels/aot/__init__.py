"""Ahead-of-time compilation of the kernels for GPUs that are not present, and checks of the machine code."""
