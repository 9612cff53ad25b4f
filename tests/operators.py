"""The operators of `lion_kernels`: its public names that are also names of its modules."""

from pkgutil import iter_modules

import lion_kernels

OPERATORS = sorted(set(lion_kernels.__all__) & {module.name for module in iter_modules(lion_kernels.__path__)})
