"""What `pip install 'lion-fast[EXTRA]'` adds: imported where it is used, so that the rest works without."""

import importlib


class MissingExtraError(ImportError):
    """A package that an extra brings is not installed; the message says how to install it."""


def require(extra: str, *packages: str) -> None:
    """See that what is about to be imported is there.

    Args:
        extra: of pyproject.toml, such as `"train"`.
        packages: import names of what it brings.

    Raises:
        MissingExtraError: one of them, or something that it needs itself, is not installed.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            missing = error.name or package
            message = f"no package {missing}; install it with: pip install 'lion-fast[{extra}]'"
            raise MissingExtraError(message, name=missing) from error
