"""Analysis of an NVIDIA kernel's machine code: its loops, their instructions by class, and waits for wgmma.

The text is the output of `cuobjdump --dump-sass`. A loop is the code between a backward branch and its target; the
innermost ones are the kernel's inner loops. The main loop is the inner loop with the most matrix instructions, or the
longest if there are none.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"^BRA(?:\.\w+)*\s+(?:.*,\s*)?`?\(?0x([0-9a-f]+)")
_WAIT = "WARPGROUP.DEPBAR"
_MATRIX = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA")

# Class -> first parts of its opcodes, tried in this order; all else is "other".
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
    """The instructions of an innermost loop, in order, from address `start` to the backward branch."""

    start: int
    instructions: tuple[str, ...]

    @cached_property
    def classes(self) -> dict[str, int]:
        """The number of instructions per class, without zeros, in the order of `CLASSES`."""
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
        """How many wgmma accumulate into the previous one's result, and before how many of these the loop waits.

        A product over an inner dimension is such a chain, which the matrix units can run without waiting.
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
    """Return an instruction's class in `CLASSES`, or "other"; the instruction has no predicate."""
    opcode = instruction.split(maxsplit=1)[0]
    for name, stems in CLASSES.items():
        if any(opcode == stem or opcode.startswith(stem if stem.endswith(".") else f"{stem}.") for stem in stems):
            return name
    return "other"


def parse(text: str) -> list[tuple[int, str]]:
    """Return (address, instruction without predicate) for every line of code."""
    return [(int(address, 16), instruction) for address, instruction in _INSTRUCTION.findall(text)]


def inner_loops(text: str) -> list[Loop]:
    """Return the innermost loops in code order, without the branch to itself at the end of a kernel."""
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
    """Return the inner loop with the most matrix instructions, wgmma before older ones; the longest if none has any."""

    def weight(loop: Loop) -> tuple[int, int, int]:
        return loop.wgmma, loop.classes.get("mma", 0), len(loop.instructions)

    return max(inner_loops(text), key=weight, default=None)
