"""Attention shared by both attention operators: kernels, launches, sizes and the formula in PyTorch."""
