"""Optional dependencies (`pip install 'lion-fast[EXTRA]'`), which are imported only where they are used."""

import importlib


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message says how to install it."""


def require(extra: str, *packages: str) -> None:
    """Check that the packages of an extra are installed.

    Args:
        extra: name of the extra in pyproject.toml, such as `"train"`.
        packages: import names of the packages.

    Raises:
        MissingExtraError: one of the packages, or one of its dependencies, is not installed.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            missing = error.name or package
            message = f"no package {missing}; install it with: pip install 'lion-fast[{extra}]'"
            raise MissingExtraError(message, name=missing) from error
