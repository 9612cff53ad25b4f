"""The kernels compiled ahead of time for GPUs that are not here, and what is wrong with the machine code."""
