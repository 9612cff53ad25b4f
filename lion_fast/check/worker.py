"""Parallel cases: workers that each compare one case at a time, all on one device.

`python -m lion_fast.check.worker DEVICE` reads one task per line from stdin (case number, dtype name, repeats) and
answers each with a line of JSON.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from lion_fast.check.cases import CASES, TIMED, Case
from lion_fast.check.compare import Outcome, compare, name_of

ALL = (*CASES, *TIMED)
LARGE_AT_ONCE = 2  # cases with the model's own shapes, whose fp64 reference needs much of the device's memory


class Task(NamedTuple):
    """A case in a dtype, and the number of equal calls that must give equal bits."""

    case: Case
    dtype: torch.dtype
    repeats: int


def side_by_side(tasks: Sequence[Task], device: torch.device, processes: int) -> Iterator[Outcome]:
    """Yield the outcome of every task on completion, from `processes` workers; a worker's death is an outcome.

    A GPU fault ends the whole process, so such a worker is replaced. The first workers begin with the model's own
    shapes, which are the most important if time runs out.
    """
    large = deque(task for task in tasks if task.case.cost is not None)
    small = deque(task for task in tasks if task.case.cost is None)
    found: SimpleQueue[Outcome] = SimpleQueue()
    workers: list[_Worker] = []
    stopped = threading.Event()

    def serve(*queues: deque[Task]) -> None:
        worker = None
        for task in itertools.chain.from_iterable(map(_taken_from, queues)):
            if stopped.is_set():
                return
            if worker is None:
                worker = _Worker(device, processes)
                workers.append(worker)
            outcome = worker.run(task)
            if outcome.problems and worker.ended():
                worker = None
            found.put(outcome)

    of_large = min(LARGE_AT_ONCE, len(large))
    threads = [
        threading.Thread(target=serve, args=(large, small) if number < of_large else (small,), daemon=True)
        for number in range(min(processes, of_large + len(small)))
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in tasks:
            yield found.get()
    finally:
        stopped.set()
        for worker in workers:
            worker.process.kill()
        for thread in threads:
            thread.join()


def _taken_from(queue: deque[Task]) -> Iterator[Task]:
    """Yield tasks of the queue, which other threads share."""
    while True:
        try:
            yield queue.popleft()
        except IndexError:
            return


class _Worker:
    """A process that answers tasks."""

    def __init__(self, device: torch.device, processes: int) -> None:
        command = [sys.executable, "-m", "lion_fast.check.worker", str(device)]
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def run(self, task: Task) -> Outcome:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{ALL.index(task.case)} {name_of(task.dtype)} {task.repeats}\n")
            answer = json.loads(self.process.stdout.readline())
        except (OSError, json.JSONDecodeError):  # it has died, and stderr shows why
            self.process.kill()
            outcome = Outcome(task.case.operator, task.case.label, name_of(task.dtype))
            outcome.problems.append(f"its process ended with {self.process.wait()}")
            return outcome
        errors = {name: (error, bound) for name, (error, bound) in answer.pop("errors").items()}
        return Outcome(**answer, errors=errors)

    def ended(self) -> bool:
        """Whether it cannot accept another task."""
        try:
            self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return False
        return True


def main(arguments: list[str]) -> int:
    device = torch.device(arguments[0])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # other output must not mix with the answers
    if device.index is not None:
        torch.cuda.set_device(device)
    for line in sys.stdin:
        number, dtype, repeats = line.split()
        outcome = compare(ALL[int(number)], getattr(torch, dtype), device, repeats=int(repeats))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the other workers need the memory of this one's reference
        answers.write(json.dumps(asdict(outcome)) + "\n")
        if outcome.problems and not _works(device):
            return 1
    return 0


def _works(device: torch.device) -> bool:
    """Return whether the device still accepts work from this process."""
    try:
        value: Any = torch.ones(1, device=device).sum().item()
    except RuntimeError as error:
        print(f"the device takes no more work from this process: {error}", file=sys.stderr)
        return False
    return value == 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
