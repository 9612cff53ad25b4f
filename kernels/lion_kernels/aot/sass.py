"""What the machine code of an NVIDIA kernel says: its loops, their instructions by class, and how it waits for wgmma.

The text is that of `cuobjdump --dump-sass`. A loop is a branch backwards and what lies between; the innermost ones are
the kernel's inner loops, and the main one is that which multiplies most, or where nothing does, the longest.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"^BRA(?:\.\w+)*\s+(?:.*,\s*)?`?\(?0x([0-9a-f]+)")
_WAIT = "WARPGROUP.DEPBAR"
_MATRIX = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA")

# Class -> the first parts of the opcodes in it, tried in this order; the rest is "other".
CLASSES: dict[str, tuple[str, ...]] = {
    "wgmma": ("HGMMA", "IGMMA", "QGMMA"),
    "mma": ("HMMA", "IMMA"),
    "wait": (_WAIT,),
    "arrive": ("WARPGROUP.ARRIVE",),
    "copy ahead": ("LDGSTS", "UTMALDG", "UBLKCP"),
    "load": ("LDG", "LD."),
    "store": ("STG", "ST."),
    "shared": ("LDS", "STS", "LDSM", "STSM", "MOVM"),
    "spill": ("LDL", "STL"),
    "barrier": ("BAR", "SYNCS", "LDGDEPBAR", "DEPBAR", "ARRIVES", "FENCE", "MEMBAR", "ERRBAR", "WARPSYNC"),
    "shuffle": ("SHFL", "REDUX", "VOTE"),
    "special": ("MUFU",),
    "float": ("FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "FSET", "FSETP", "FCHK", "FRND", "HADD2", "HMUL2", "HFMA2",
              "HMNMX2", "HSETP2", "HSET2"),
    "convert": ("F2F", "F2FP", "F2I", "I2F", "I2FP", "PRMT"),
    "integer": ("IMAD", "IADD", "IADD3", "VIADD", "VIMNMX", "LEA", "LOP3", "PLOP3", "SHF", "ISETP", "SEL", "IABS",
                "IMNMX", "I2I", "SGXT", "BMSK", "POPC", "FLO", "BREV", "UIMAD", "UIADD3", "ULEA", "ULOP3", "USHF",
                "UISETP", "USEL", "UPLOP3", "USGXT", "UBMSK", "UFLO", "UPOPC"),
    "move": ("MOV", "UMOV", "R2UR", "S2R", "S2UR", "CS2R", "R2P", "P2R", "LDC", "ULDC"),
    "branch": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "BREAK", "NOP", "JMP", "BRX"),
}  # fmt: skip


@dataclass(frozen=True)
class Loop:
    """Instructions of one loop that has none within, in order, from address `start` to the branch back."""

    start: int
    instructions: tuple[str, ...]

    @cached_property
    def classes(self) -> dict[str, int]:
        """Instructions by class, those that occur, in the order of `CLASSES`."""
        counts = Counter(class_of(instruction) for instruction in self.instructions)
        return {name: counts[name] for name in (*CLASSES, "other") if counts[name]}

    @property
    def wgmma(self) -> int:
        return self.classes.get("wgmma", 0)

    @property
    def waits(self) -> int:
        return self.classes.get("wait", 0)

    @property
    def copies_ahead(self) -> int:
        return self.classes.get("copy ahead", 0)

    @cached_property
    def chained(self) -> tuple[int, int]:
        """How many wgmma instructions add to what the one before them wrote, and before how many of these it waits.

        A product over an inner dimension is such a chain, which the matrix units run through without a wait.
        """
        pairs = waited = 0
        previous, wait_between = None, False
        for instruction in self.instructions:
            if instruction.startswith(_WAIT):
                wait_between = True
            elif class_of(instruction) == "wgmma":
                target = instruction.split()[1].rstrip(",")
                pairs += target == previous
                waited += target == previous and wait_between
                previous, wait_between = target, False
        return pairs, waited


def class_of(instruction: str) -> str:
    """The name in `CLASSES` of an instruction without its predicate, "other" where it is in none."""
    opcode = instruction.split(maxsplit=1)[0]
    for name, stems in CLASSES.items():
        if any(opcode == stem or opcode.startswith(stem if stem.endswith(".") else f"{stem}.") for stem in stems):
            return name
    return "other"


def parse(text: str) -> list[tuple[int, str]]:
    """(address, instruction less its predicate) of every line of code."""
    return [(int(address, 16), instruction) for address, instruction in _INSTRUCTION.findall(text)]


def inner_loops(text: str) -> list[Loop]:
    """The loops that have no loop within, in the order of the code. The branch to itself after a kernel is none."""
    code = parse(text)
    spans = []
    for address, instruction in code:
        branch = _BRANCH.match(instruction)
        if branch and int(branch.group(1), 16) < address:
            spans.append((int(branch.group(1), 16), address))
    innermost = [
        span for span in set(spans) if not any(other != span and span[0] <= other[0] and other[1] <= span[1]
                                               for other in spans)
    ]  # fmt: skip
    return [
        Loop(start, tuple(instruction for address, instruction in code if start <= address <= end))
        for start, end in sorted(innermost)
    ]


def main_loop(text: str) -> Loop | None:
    """The inner loop with the most matrix instructions, wgmma before the older ones; the longest if none has any."""

    def weight(loop: Loop) -> tuple[int, int, int]:
        return loop.wgmma, loop.classes.get("mma", 0), len(loop.instructions)

    return max(inner_loops(text), key=weight, default=None)
