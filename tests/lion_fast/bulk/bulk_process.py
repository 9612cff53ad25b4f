"""One process of a bulk job, for tests that kill it or run several of them.

Run by `runpy.run_path` in a process that is forked from a server which has imported everything: `ARGUMENTS` are those
of `main`.
"""

import os
from typing import Any


def main(job: dict[str, Any], *, rank: int = 0, world: int = 1, port: int = 0, **options: Any) -> None:
    """Run a job given as plain data, as one of the processes that torchrun would start if there are several."""
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    torch.set_num_threads(1)
    from lion_fast.bulk import BulkJob, run

    run(BulkJob(**job), **options)


if __name__ == "__main__":
    main(**globals()["ARGUMENTS"])
