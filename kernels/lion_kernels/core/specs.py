"""What a kernel is compiled with: one configuration of it, as it is launched."""

from dataclasses import dataclass
from typing import Any

from lion_kernels.core.tuned_sizes import COMPACT_BELOW

# Bytes of shared memory that a program may have. A target with little of it is launched with compact sizes.
SHARED_LIMITS = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}


@dataclass(frozen=True)
class KernelSpec:
    """One kernel with one configuration, as it is launched.

    Attributes:
        name: names kernel and configuration in the report.
        kernel: the `@triton.jit` function.
        signature: argument name -> "*bf16", "i32", "i64", "fp32"; "constexpr" may be left out.
        constexprs: the values of the constexpr arguments (and of integers that are 1, which a launch specialises on).
        num_warps, num_stages: as launched.
        matrix: whether it has to use the matrix units.
        wide_access: whether it has to read or write 16 bytes at once.
        divisible: names of integer arguments that are multiples of 16.
        compact: whether it is launched where `is_compact`, or elsewhere; on every GPU where None.
        unaligned: names of pointers that are not multiples of 16 bytes, as all others are.
        calls: what launches it, of a launch that was recorded.
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
        """Argument -> its type, in order; "constexpr" where its value is fixed."""
        return {
            name: "constexpr" if name in self.constexprs else self.signature[name] for name in self.kernel.arg_names
        }

    @property
    def aligned(self) -> tuple[str, ...]:
        """The arguments that the compiler may take for multiples of 16, in order."""
        pointers = {name for name, kind in self.types.items() if kind.startswith("*")} - set(self.unaligned)
        numbers = {name for name, kind in self.types.items() if kind.startswith("i")} & set(self.divisible)
        return tuple(name for name in self.types if name in pointers | numbers)

    @property
    def compiles_as(self) -> tuple[Any, ...]:
        """Equal for specs of which the compiler makes the same, whatever they are called."""
        fixed = (name in self.constexprs and repr(self.constexprs[name]) for name in self.types)
        return (self.kernel_name, *self.types.values(), *fixed, self.aligned, self.num_warps, self.num_stages)

    @property
    def targets(self) -> list[str]:
        """Those on which it is launched."""
        limits = SHARED_LIMITS.items()
        return [target for target, limit in limits if self.compact in (None, limit < COMPACT_BELOW)]
