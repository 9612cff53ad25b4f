"""Converters from the formats of public datasets to records."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lion_fast.data.converters.captions import coco_captions, flickr30k, karpathy, textcaps
from lion_fast.data.converters.entries import Entry, Format, Options, load_json, load_lines
from lion_fast.data.converters.questions import aokvqa, gqa, ocr_vqa, vqa
from lion_fast.data.converters.regions import mdetr, refcoco, visual_genome
from lion_fast.data.converters.skipping import Skipping
from lion_fast.data.records import DataError, Record
from lion_fast.io.reading import shown

__all__ = ["FORMATS", "Conversion", "Format"]

_COCO = "COCO_{subset}_{image_id:012d}.jpg"

FORMATS = {
    "coco-captions": Format("COCO's captions", ("captions_train2017.json",), coco_captions),
    "karpathy": Format("Karpathy's splits of COCO or Flickr30k", ("dataset_coco.json",), karpathy, has_splits=True),
    "textcaps": Format("TextCaps", ("TextCaps_0.1_train.json",), textcaps, "{image_id}.jpg", has_splits=True),
    "flickr30k": Format("Flickr30k's own list of captions", ("results_20130124.token",), flickr30k, is_text=True),
    "vqav2": Format("VQAv2", ("questions.json", "annotations.json"), vqa, _COCO),
    "okvqa": Format("OK-VQA", ("questions.json", "annotations.json"), vqa, _COCO),
    "aokvqa": Format("A-OKVQA", ("aokvqa_v1p0_train.json",), aokvqa, "{image_id:012d}.jpg", has_splits=True),
    "gqa": Format("GQA", ("train_balanced_questions.json",), gqa, "{image_id}.jpg"),
    "ocr-vqa": Format("OCR-VQA", ("dataset.json",), ocr_vqa, "{image_id}{suffix}", has_splits=True),
    "refcoco": Format(
        "RefCOCO, RefCOCO+ or RefCOCOg, refs as JSON",
        ("refs.json", "instances.json"),
        refcoco,
        has_splits=True,
        has_regions=True,
    ),
    "mdetr": Format(
        "RefCOCO, RefCOCO+ or RefCOCOg by MDETR", ("finetune_refcoco_train.json",), mdetr, has_regions=True
    ),
    "visual-genome": Format(
        "Visual Genome's regions", ("region_descriptions.json", "image_data.json"), visual_genome, has_regions=True
    ),
}


class Conversion:
    """Iterable over the records of a dataset in one of `FORMATS`.

    Args:
        format: name of the format in `FORMATS`.
        files: files of the format, in the format's order.
        images: prefix of each image's name, such as the directory of the images.
        image_name: template of the image's file name, such as `{image_id:012d}.jpg`, for formats that give only the
            number of an image. Each such format has a default.
        splits: splits to use, for formats with several splits in a file; all if empty.
        kinds: `rec`, `reg` or both, for formats with regions; both if empty.
        strict: whether an invalid entry raises an error. Otherwise invalid entries are skipped; the first ten are
            logged, all are counted in `num_bad`.
        seed: seed of the choice of instructions (`lion_fast.data.templates`).

    Attributes:
        num_bad: number of entries skipped so far. Of an entry with several sentences, each counts by itself.

    Raises:
        ValueError: unknown format, wrong number of files, or an option that the format does not support.
        DataError: while iterating, an entry is invalid (the message names file, entry and field) or there is no record.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        format: str,
        files: Sequence[str | os.PathLike],
        *,
        images: str = "",
        image_name: str | None = None,
        splits: Sequence[str] = (),
        kinds: Sequence[str] = (),
        strict: bool = True,
        seed: int = 0,
    ):
        if format not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
        self.format = FORMATS[format]
        self.files = [Path(file) for file in files]
        if len(self.files) != len(self.format.files):
            raise ValueError(f"files: expected {' and '.join(self.format.files)} for {format}, got {len(files)} files")
        if image_name is not None and not self.format.image_template:
            raise ValueError(
                f"image_name: expected none, because {format} contains the names of its images, got {image_name!r}"
            )
        if splits and not self.format.has_splits:
            raise ValueError(f"splits: expected none, because {format} has a file for each, got {', '.join(splits)}")
        if (kinds and not self.format.has_regions) or set(kinds) - {"rec", "reg"}:
            expected = "rec, reg or both" if self.format.has_regions else f"none, because {format} has no regions"
            raise ValueError(f"kinds: expected {expected}, got {', '.join(kinds)}")
        self.images = images
        self.strict = strict
        self._skipping = Skipping(strict)
        self.options = Options(
            source=format,
            image_template=image_name or self.format.image_template,
            splits=frozenset(splits),
            kinds=tuple(dict.fromkeys(kinds)) or ("rec", "reg"),
            seed=seed,
        )

    @property
    def num_bad(self) -> int:
        """Number of entries skipped so far."""
        return self._skipping.count

    def __iter__(self) -> Iterator[Record]:
        self._skipping = Skipping(self.strict)
        options = replace(self.options, skipping=self._skipping, found_splits=set())
        load = load_lines if self.format.is_text else load_json
        parts = self.format.parts(*map(load, self.files), options)
        any_record = False
        ids: dict[str, str] = {}
        for entry in parts.entries:
            with self._skipping.entry(entry.place):
                for unit in parts.units(entry):
                    made: list[Record] = []
                    with self._skipping.entry(unit.entry.place):
                        records = [self._placed(record) for record in parts.records(unit)]
                        _claim(records, unit.entry, ids)
                        made = records
                    any_record = any_record or bool(made)
                    yield from made
        missing = sorted(options.splits - options.found_splits) if any_record else sorted(options.splits)
        if missing or not any_record:
            chosen = f" in {', '.join(missing)}" if missing else ""
            skipped = f"; the first error: {self._skipping.first}" if self._skipping.first else ""
            raise DataError(f"{self.files[0]}: contains no record{chosen}{skipped}")

    def _placed(self, record: Record) -> Record:
        if not self.images:
            return record
        if os.path.isabs(record.image):  # which would replace the prefix
            raise ValueError(f"images: expected names of images within {self.images}, got {shown(record.image)}")
        return replace(record, image=os.path.join(self.images, record.image))


def _claim(records: Sequence[Record], entry: Entry, ids: dict[str, str]) -> None:
    """Note the id of a unit's records with its path.

    Raises:
        DataError: another unit has it.
    """
    for record in records[:1]:  # the ids of the others differ only in the kind
        key = record.id or ""
        if key in ids:
            raise entry.error("an id of its own", f"{shown(record.id)}, the id of {ids[key]}")
        ids[key] = entry.path
