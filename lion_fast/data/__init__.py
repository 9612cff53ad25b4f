"""Training data: the format on disk, converters to it, datasets, sample order and loader."""

from typing import TYPE_CHECKING

from lion_fast import _lazy

if TYPE_CHECKING:
    from lion_fast.data.converters import FORMATS, Conversion
    from lion_fast.data.dataset import EpochDataset, JsonlDataset, SampleDataset
    from lion_fast.data.loader import make_loader
    from lion_fast.data.order import ProcessBatches, TrainingData, TrainingOrder
    from lion_fast.data.records import DataError, Record, parse_record, write_jsonl
    from lion_fast.data.shards import ShardDataset, write_shards
    from lion_fast.data.tagging import PictureTagger, add_tags
    from lion_fast.data.transforms import RandomCrop, RandomHorizontalFlip

__all__ = [
    "FORMATS",
    "Conversion",
    "DataError",
    "EpochDataset",
    "JsonlDataset",
    "PictureTagger",
    "ProcessBatches",
    "RandomCrop",
    "RandomHorizontalFlip",
    "Record",
    "SampleDataset",
    "ShardDataset",
    "TrainingData",
    "TrainingOrder",
    "add_tags",
    "make_loader",
    "parse_record",
    "write_jsonl",
    "write_shards",
]

__getattr__, __dir__ = _lazy.exports(
    __name__,
    {
        "converters": (
            "FORMATS",
            "Conversion",
        ),
        "dataset": (
            "EpochDataset",
            "JsonlDataset",
            "SampleDataset",
        ),
        "loader": ("make_loader",),
        "order": (
            "ProcessBatches",
            "TrainingData",
            "TrainingOrder",
        ),
        "records": (
            "DataError",
            "Record",
            "parse_record",
            "write_jsonl",
        ),
        "shards": (
            "ShardDataset",
            "write_shards",
        ),
        "tagging": (
            "PictureTagger",
            "add_tags",
        ),
        "transforms": (
            "RandomCrop",
            "RandomHorizontalFlip",
        ),
    },
)
