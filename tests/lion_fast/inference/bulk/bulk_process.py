"""One process of a bulk job, for tests that kill it or run several of them.

Run by `runpy.run_path` in a process that is forked from a server which has imported everything: `ARGUMENTS` are those
of `main`.
"""

import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any


def main(
    job: dict[str, Any], *, rank: int = 0, world: int = 1, port: int = 0, hold_at: int | None = None, **options: Any
) -> None:
    """Run a job given as plain data, as one of the processes that torchrun would start if there are several.

    Args:
        port: of the store where they meet, which their parent has.
        hold_at: write so many rows, or a batch more, and then wait to be killed, so that it cannot end before.
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
