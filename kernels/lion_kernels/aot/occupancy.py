"""The number of programs per multiprocessor of sm_90 (H100, H200), and the resource that limits it.

The hardware's granularities, from the CUDA C++ Programming Guide's table of compute capabilities and NVIDIA's occupancy
calculator:

    registers      65536 in four equal parts, one per scheduler; a warp gets a multiple of 256 in one part
    shared memory  228 KiB, of which the system reserves 1 KiB per program; allocated in multiples of 128 bytes
    warps          64 of 32 threads
    programs       32
"""

REGISTERS_OF_A_SCHEDULER = 16384
SCHEDULERS = 4
REGISTER_UNIT = 256
SHARED_BYTES = 228 * 1024
SHARED_BYTES_RESERVED = 1024
SHARED_UNIT = 128
WARPS = 64
PROGRAMS = 32


def programs_per_multiprocessor(registers: int, num_warps: int, shared_bytes: int) -> tuple[int, str]:
    """Return the number of concurrent programs on a multiprocessor of sm_90, and what limits it.

    Args:
        registers: per thread.
        num_warps: per program.
        shared_bytes: per program.

    Returns:
        The number, and the first limiting resource of "registers", "shared memory", "warps" and "programs".
    """
    registers_of_a_warp = _up(32 * registers, REGISTER_UNIT)
    warps_in_registers = SCHEDULERS * (REGISTERS_OF_A_SCHEDULER // max(registers_of_a_warp, REGISTER_UNIT))
    limits = {
        "registers": warps_in_registers // num_warps,
        "shared memory": SHARED_BYTES // (_up(shared_bytes, SHARED_UNIT) + SHARED_BYTES_RESERVED),
        "warps": WARPS // num_warps,
        "programs": PROGRAMS,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
