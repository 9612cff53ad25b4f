"""Every operator of lion_kernels held to lion_reference on the machine at hand: `lion-fast check`."""
