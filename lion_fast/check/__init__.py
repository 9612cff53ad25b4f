"""Comparison of every operator of lion_kernels with lion_reference on the local machine: `lion-fast check`."""
