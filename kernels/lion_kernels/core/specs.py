"""The configuration that a kernel is compiled and launched with."""

from dataclasses import dataclass
from typing import Any

from lion_kernels.core.tuned_sizes import COMPACT_BELOW

# Bytes of shared memory available to a program. Targets with little of it use compact sizes.
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel in one configuration, as it is launched.

    Attributes:
        name: names kernel and configuration in the report.
        kernel: the `@triton.jit` function.
        signature: argument name -> "*bf16", "i32", "i64", "fp32"; "constexpr" may be omitted.
        constexprs: values of the constexpr arguments (and of integers equal to 1, which a launch specialises on).
        num_warps, num_stages: as launched.
        matrix: whether it must use the matrix units.
        wide_access: whether it must have 16-byte loads or stores.
        divisible: names of integer arguments that are multiples of 16.
        compact: whether it is launched only on GPUs that are `is_compact` (True) or only on others (False); on all if
            None.
        unaligned: names of pointers not aligned to 16 bytes; all others are.
        calls: the calls that launched it, if the launch was recorded.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool
    wide_access: bool = True
    divisible: tuple[str, ...] = ()
    compact: bool | None = None
    unaligned: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()

    @property
    def kernel_name(self) -> str:
        return self.kernel.__name__

    @property
    def types(self) -> dict[str, str]:
        """Argument name -> type, in order; "constexpr" for fixed values."""
        return {
            name: "constexpr" if name in self.constexprs else self.signature[name] for name in self.kernel.arg_names
        }

    @property
    def aligned(self) -> tuple[str, ...]:
        """Arguments that the compiler may assume to be multiples of 16, in order."""
        pointers = {name for name, kind in self.types.items() if kind.startswith("*")} - set(self.unaligned)
        numbers = {name for name, kind in self.types.items() if kind.startswith("i")} & set(self.divisible)
        return tuple(name for name in self.types if name in pointers | numbers)

    @property
    def compiles_as(self) -> tuple[Any, ...]:
        """A key that is equal for specs with the same compilation result, whatever their names."""
        fixed = (name in self.constexprs and repr(self.constexprs[name]) for name in self.types)
        return (self.kernel_name, *self.types.values(), *fixed, self.aligned, self.num_warps, self.num_stages)

    @property
    def targets(self) -> list[str]:
        """Targets on which it is launched."""
        limits = SHARED_LIMITS.items()
        return [target for target, limit in limits if self.compact in (None, limit < COMPACT_BELOW)]
