"""The run for `compute-sanitizer`: each operator's kernels on its two smallest cases, forward and backward, once.

The dtype is half precision on a GPU; fp32 covers other tiles. Without a GPU the kernels are interpreted. The exit
status is 1 if a result is out of bounds.
"""

import sys

import torch

from lion_fast.check.cases import CASES, OPERATORS, Case
from lion_fast.check.compare import compare, make_tensors
from lion_fast.check.report import line

CASES_EACH = 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def values(case: Case) -> int:
    return sum(tensor.numel() for tensor in make_tensors(case, torch.float32, torch.device("cpu")).values())


def main() -> int:
    wrong = 0
    for operator in OPERATORS:
        for case in sorted((case for case in CASES if case.operator == operator), key=values)[:CASES_EACH]:
            for dtype in (torch.float16, torch.float32):
                outcome = compare(case, dtype, DEVICE, repeats=1)
                print(operator, line(outcome), *outcome.problems, flush=True)
                wrong += bool(outcome.problems)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
