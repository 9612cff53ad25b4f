"""Which implementation of an operator runs."""

BACKENDS = ("auto", "triton", "torch")


def resolve_backend(backend: str, operator: str) -> str:
    """The implementation that `operator` runs when asked for `backend`.

    Every operator has a PyTorch implementation. None has a Triton one yet, so `"auto"` is `"torch"`.

    Args:
        backend: `"auto"`, `"triton"` or `"torch"`.
        operator: name used in the errors.

    Raises:
        ValueError: `backend` is unknown, or `"triton"` where `operator` has no Triton implementation.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "triton":
        raise ValueError(f"backend: {operator} has no Triton implementation in this version; use 'auto' or 'torch'")
    return "torch"
