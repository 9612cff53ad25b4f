"""Times, sizes and shares in words; nothing for a missing value."""


def time_in_words(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e9 * seconds:.0f} ns"


def size_in_words(nbytes: int | None) -> str:
    if nbytes is None:
        return ""
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 10e6 else f"{nbytes / 1e6:.2f} MB"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
