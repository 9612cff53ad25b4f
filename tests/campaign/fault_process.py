"""Writers as processes for faults: `fault_process.py WRITER FOLDER`, without a model, which takes no time to load."""

import sys
from pathlib import Path

from tests.campaign.outputs import _Answers


def main(writer: str, folder: Path) -> int:
    from lion_fast.inference.bulk import BulkJob, run, running

    out = folder / "out"
    try:
        if writer == "bulk":
            running.load_answerer = _Answers  # type: ignore[assignment]
            job = BulkJob("ask", str(folder / "table.jsonl"), str(out / "rows.jsonl"), str(folder))
            run(job, num_workers=0, batch_size=2)
        elif writer == "convert":
            from lion_fast.data import Conversion, write_jsonl

            write_jsonl(Conversion("gqa", [folder / "gqa.json"]), out / "train.jsonl", overwrite=False)
        else:
            from lion_fast.data import JsonlDataset, write_shards

            write_shards(JsonlDataset(folder / "train.jsonl"), out / "shards")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0
