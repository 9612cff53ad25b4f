"""Attention over maps of keys, which both attentions run: kernels, launches, sizes and the formula in PyTorch."""
