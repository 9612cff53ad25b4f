"""One process of a bulk job, for tests that kill it or run several processes.

`runpy.run_path` runs this file in a process forked from a server that has imported everything; `ARGUMENTS` are the
arguments of `main`.
"""

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any


def main(
    job: dict[str, Any], *, rank: int = 0, world: int = 1, port: int = 0, hold_at: int | None = None, **options: Any
) -> None:
    """Run a job given as plain data, with the environment of torchrun for several processes.

    Args:
        port: port of the parent's store, for the process group.
        hold_at: number of rows (rounded up to a batch) after which to wait to be killed, so that the job cannot end.
    """
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    import torch

    torch.set_num_threads(1)
    from lion_fast.inference.bulk import BulkJob, run, running

    if hold_at is not None:
        write_all = running.write_all
        running.write_all = lambda answered, *rest, **named: write_all(held(answered, hold_at), *rest, **named)
    run(BulkJob(**job), **options)


def held(answered: Iterable[list], rows: int) -> Iterator[list]:
    given = 0
    for batch in answered:
        while given >= rows:
            signal.pause()
        yield batch
        given += len(batch)


if __name__ == "__main__":
    main(**globals()["ARGUMENTS"])
