"""Other sizes for the main kernels, compared with the shipped ones; `CANDIDATES` lists them with reasons.

`pytest benchmarks/bench_candidates.py` prints the table: on a GPU at the headline shapes, as CUDA graphs; on a CPU with
`TRITON_INTERPRET=1` as a dry run at small sizes. A candidate is timed only if its result equals the shipped one's up to
rounding. `lion-fast bench --tune` searches more widely, and takes longer.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from benchmarks.bench_headline import OURS, ROWS, sizes, suite_of
from benchmarks.harness.headline import BACKWARD, FORWARD, Headline
from benchmarks.harness.side_by_side import (
    COMPILE_ONLY,
    DTYPE,
    INTERLEAVED,
    SECONDS,
    Turn,
    interleave,
    report,
    skip_after_deadline,
    turn,
)
from benchmarks.shapes import ON_GPU
from lion_fast.check.compare import relative_error
from lion_fast.check.tuning import Key, Sizes, allowed
from lion_kernels.core.backend import interpreting
from lion_kernels.core.tuned_sizes import overriding

SHIPPED = "lion shipped"
pytestmark = INTERLEAVED


@dataclass(frozen=True)
class Candidate:
    """Sizes for one kernel in one direction of an operator's headline.

    Attributes:
        operator, direction: the operator, whose first headline is used, and the direction to time.
        kernel: a pattern for the key of the kernel's sizes, "TABLE, SHAPE CLASS".
        sizes: those that differ from the shipped ones.
        why: the reason to try them.
    """

    operator: str
    direction: str
    kernel: str
    sizes: Sizes
    why: str

    @property
    def peer(self) -> str:
        changed = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        return f"lion {self.kernel.split(',')[-1].strip()} {changed}"


EVA, T5, ADAPTERS = "multi_scale_attention", "relative_bias_attention", "mixture_of_adapters"


def _queries(operator: str, direction: str, kernel: str) -> tuple[Candidate, ...]:
    """Return candidates for query tiles; shipped are 128 rows and 64 keys in two warp groups, with two stages."""
    return (
        Candidate(operator, direction, kernel, {"BM": 64, "num_warps": 4}, "twice the programs, each one warp group"),
        Candidate(operator, direction, kernel, {"BM": 64, "num_warps": 4, "num_stages": 3}, "and more loads in flight"),
        Candidate(operator, direction, kernel, {"num_stages": 3}, "more loads in flight"),
        Candidate(operator, direction, kernel, {"BN": 32}, "fewer registers, more programs an SM"),
    )


CANDIDATES: tuple[Candidate, ...] = (
    *(one for name in (EVA, T5) for one in _queries(name, FORWARD, "attention, forward")),
    *(one for name in (EVA, T5) for one in _queries(name, BACKWARD, "attention, backward_queries")),
    # Shipped: 64 queries and 128 keys in two warp groups; 32 and 64 in one with T5's bias.
    Candidate(EVA, BACKWARD, "attention, backward_keys", {"BN": 64, "num_warps": 4}, "twice the programs"),
    Candidate(EVA, BACKWARD, "attention, backward_keys", {"BM": 32}, "fewer registers"),
    Candidate(T5, BACKWARD, "attention, backward_keys", {"BM": 64}, "longer products"),
    Candidate(T5, BACKWARD, "attention, backward_keys", {"BM": 64, "BN": 128, "num_warps": 8}, "two warp groups"),
    Candidate(T5, BACKWARD, "attention, backward_keys", {"num_stages": 3}, "more loads in flight"),
    # Shipped: 64 rows in one warp group, because ptxas serialises two; update has 128 rows in two.
    Candidate(ADAPTERS, FORWARD, "low_rank.hidden", {"BM": 128, "num_warps": 8}, "weights read half as often"),
    Candidate(ADAPTERS, FORWARD, "low_rank.hidden", {"num_stages": 4}, "more loads in flight"),
    Candidate(ADAPTERS, FORWARD, "low_rank.update", {"BM": 64, "num_warps": 4}, "whole waves of programs"),
    Candidate(ADAPTERS, FORWARD, "low_rank.update", {"BN": 32}, "fewer registers, more programs an SM"),
    Candidate(
        ADAPTERS, BACKWARD, "low_rank.hidden_gradient", {"BM": 128, "num_warps": 8}, "weights read half as often"
    ),
    Candidate(ADAPTERS, BACKWARD, "low_rank.hidden_gradient", {"num_stages": 3}, "more loads in flight"),
    Candidate(ADAPTERS, BACKWARD, "low_rank.outer", {"BT": 32}, "more programs an SM"),
    Candidate(ADAPTERS, BACKWARD, "low_rank.outer", {"BT": 128}, "longer products"),
)
GROUPS = tuple(dict.fromkeys((candidate.operator, candidate.direction) for candidate in CANDIDATES))


def row_of(operator: str) -> Headline:
    return next(row for row in ROWS if row.operator == operator)


def overridden(given: Turn, entries: dict[Key, Sizes], gathered: dict[Key, Sizes] | None = None) -> Turn:
    """Return a call with other sizes; `gathered` receives the entries that the timed kernels look up."""
    prepare, call = given

    def before() -> Any:
        with overriding(entries):
            return prepare() if prepare else None

    def timed(prepared: Any) -> Any:
        with overriding(entries) as seen:
            out = call(prepared)
        if gathered is not None:
            gathered.update(seen)
        return out

    return (before if prepare else None), timed


def results(given: Turn) -> tuple[Tensor, ...]:
    prepare, call = given
    out = call(prepare() if prepare else None)
    return out if isinstance(out, tuple) else (out,)


@functools.lru_cache(maxsize=1)
def compare(operator: str, direction: str) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the times of one direction of an operator, in turns, and why the other candidates have none."""
    suite, problems = suite_of(row_of(operator)), {}
    call = turn(suite.operators[OURS], suite.make_inputs(), direction)
    looked_up: dict[Key, Sizes] = {}
    shipped = results(overridden(call, {}, looked_up))
    keys = [(key, ", ".join(key)) for key in looked_up]
    turns = {SHIPPED: overridden(call, {})}
    for candidate in CANDIDATES:
        if (candidate.operator, candidate.direction) != (operator, direction):
            continue
        entries = {key: candidate.sizes for key, words in keys if re.match(candidate.kernel, words)}
        if not entries:
            problems[candidate.peer] = f"no kernel looks up {candidate.kernel!r}, but {[words for _, words in keys]}"
            continue
        try:
            worst = max(map(relative_error, results(overridden(call, entries)), (value.double() for value in shipped)))
        except Exception as error:  # too large for the GPU or not compilable
            problems[candidate.peer] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if worst <= allowed(DTYPE):
            turns[candidate.peer] = overridden(call, entries)
        else:
            problems[candidate.peer] = f"another result, relative error {worst:.1e}"
    if COMPILE_ONLY:
        pytest.skip("compiled, and not measured: LION_BENCH_COMPILE_ONLY is set")
    return interleave(turns, graphs=True), problems


@pytest.mark.parametrize(
    ("operator", "direction", "peer"),
    [
        pytest.param(operator, direction, peer, id=f"{operator}-{direction}-{peer}")
        for operator, direction in GROUPS
        for peer in (SHIPPED, *(c.peer for c in CANDIDATES if (c.operator, c.direction) == (operator, direction)))
    ],
)
def bench(benchmark: Any, operator: str, direction: str, peer: str) -> None:
    if not (ON_GPU or interpreting()):
        pytest.skip("kernels run here in Triton's interpreter alone: TRITON_INTERPRET=1")
    if not ON_GPU and SECONDS > 0:
        pytest.skip(
            "sizes are for a GPU; on a CPU `python -m benchmarks.harness run candidates --quick` tries small shapes"
        )
    if COMPILE_ONLY and peer != SHIPPED:
        pytest.skip("compiled with what is shipped")
    skip_after_deadline()
    times, problems = compare(operator, direction)
    if peer in problems:
        pytest.skip(f"{peer} has no time here: {problems[peer]}")
    why = {candidate.peer: candidate.why for candidate in CANDIDATES}
    report(
        benchmark,
        times,
        peer,
        baseline=SHIPPED,
        group=f"candidates, {operator}, {direction}",
        suite="candidates",
        direction=direction,
        shape={"operator": operator, **sizes(row_of(operator))},
        **({"why": why[peer]} if peer in why else {}),
    )
