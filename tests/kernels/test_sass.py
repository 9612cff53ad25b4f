"""Parsing of loops, instruction classes and waits in machine code, and the number of programs per multiprocessor."""

import pytest

from lion_kernels.aot.occupancy import programs_per_multiprocessor
from lion_kernels.aot.sass import class_of, inner_loops, main_loop, parse

# Main loops. `sass` formats them like cuobjdump, with addresses, and encodings that continue on a line of their own.
PIPELINED = [
    "WARPGROUP.ARRIVE",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0",
    "LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64]",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
]
SERIALISED = [
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "HGMMA.64x64x16.F32.BF16 R56, gdesc[UR12], R56, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
]


def sass(*instructions: str) -> str:
    lines = ["\tcode for sm_90a", "\t\tFunction : kernel"]
    for number, instruction in enumerate(instructions):
        lines.append(f"        /*{16 * number:04x}*/                   {instruction} ;      /* 0x00000a00ff017b82 */")
        lines.append(f"{'':102}/* 0x000e620000000800 */")
    return "\n".join(lines)


def looping(body: list[str], before: int) -> list[str]:
    """Return `body` as a loop that follows `before` instructions."""
    return [*body, f"@P0 BRA {16 * before:#x}"]


def test_an_instruction_has_an_address_and_no_predicate() -> None:
    text = sass("LDC R1, c[0x0][0x28]", "@!P1 EXIT", "@P4 BRA 0x0")
    assert parse(text) == [(0, "LDC R1, c[0x0][0x28]"), (16, "EXIT"), (32, "BRA 0x0")]


@pytest.mark.parametrize(
    ("instruction", "name"),
    [
        ("HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR8].tnspB, R56, gsb0", "wgmma"),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "mma"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "wait"),
        ("WARPGROUP.ARRIVE", "arrive"),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64]", "copy ahead"),
        ("LDG.E.128 R4, [R2]", "load"),
        ("LDGDEPBAR", "barrier"),
        ("LDS.128 R4, [R2]", "shared"),
        ("LDL R4, [R1]", "spill"),
        ("STG.E.128 [R2], R4", "store"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "barrier"),
        ("MUFU.EX2 R4, R5", "special"),
        ("FFMA.FTZ R4, R5, R6, R7", "float"),
        ("F2FP.BF16.F32.PACK_AB R4, R5, R6", "convert"),
        ("IMAD.MOV.U32 R4, RZ, RZ, R5", "integer"),
        ("ULDC.64 UR4, c[0x0][0x208]", "move"),
        ("VIADDMNMX R4, R5, R6, R7", "other"),
    ],
)
def test_instructions_have_a_class(instruction: str, name: str) -> None:
    assert class_of(instruction) == name


def test_only_innermost_loops_count_and_a_trap_is_none() -> None:
    inner = looping(["FADD R1, R2, R3"], 1)
    text = sass("MOV R1, R2", *inner, "@P1 BRA 0x0", "EXIT", "BRA 0x50")
    (loop,) = inner_loops(text)
    assert loop.start == 16
    assert loop.instructions == ("FADD R1, R2, R3", "BRA 0x10")
    assert loop.classes == {"float": 1, "branch": 1}


def test_the_main_loop_multiplies_most() -> None:
    long = looping(["FADD R1, R2, R3"] * 30, 0)
    text = sass(*long, *looping(PIPELINED, len(long)))
    found = main_loop(text)
    assert found is not None
    assert (found.wgmma, found.waits, found.copies_ahead) == (2, 1, 1)
    without = main_loop(sass(*long, *looping(["FMUL R1, R2, R3"], len(long))))
    assert without is not None
    assert len(without.instructions) == 31
    assert main_loop(sass("EXIT")) is None


@pytest.mark.parametrize(("body", "chained"), [(PIPELINED, (1, 0)), (SERIALISED, (1, 1))])
def test_waits_within_a_chain_are_told_from_those_after_it(body: list[str], chained: tuple[int, int]) -> None:
    loop = main_loop(sass(*looping(body, 0)))
    assert loop is not None
    assert loop.chained == chained


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [
        # 168 registers are 5376 per warp, which allows three warps per scheduler, 12 in total.
        (168, 4, 39168, (3, "registers")),
        (169, 4, 39168, (2, "registers")),
        (124, 8, 49152, (2, "registers")),
        (162, 8, 77824, (1, "registers")),
        (96, 4, 73728, (3, "shared memory")),
        (64, 8, 227 * 1024, (1, "shared memory")),
        (16, 1, 0, (32, "programs")),
        (24, 16, 0, (4, "warps")),
        (255, 16, 0, (0, "registers")),
    ],
)
def test_programs_on_a_multiprocessor(registers: int, warps: int, shared: int, expected: tuple[int, str]) -> None:
    assert programs_per_multiprocessor(registers, warps, shared) == expected
