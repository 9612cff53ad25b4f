"""Described regions: RefCOCO, RefCOCO+ and RefCOCOg in two formats, and Visual Genome's region descriptions.

A region with an expression gives one sample that asks for the box (`rec`) and one that asks for the words (`reg`).
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from lion_fast.data.converters.entries import Entry, Options, Parts, Unit, check_same, index_by, repeated
from lion_fast.data.records import Box, DataError, Record
from lion_fast.data.templates import instruction
from lion_fast.io.boxes import format_box
from lion_fast.io.reading import shown

_MAX_SIDE = 1 << 31  # pixels


def refcoco(refs: Entry, instances: Entry, options: Options) -> Parts:
    """Read the original release: refs, and COCO's instances with the boxes."""
    images = index_by(instances["images"], "id", options.skipping)
    annotations = index_by(instances["annotations"], "id", options.skipping)
    ref_ids: dict[str, str] = {}

    def units(ref: Entry) -> Iterator[Unit]:
        if not options.takes(ref["split"].text()):
            return
        if "ref_id" in ref and (first := ref_ids.setdefault(ref["ref_id"].key(), ref.path)) != ref.path:
            raise repeated(ref["ref_id"], first)
        image, annotation = images.of(ref["image_id"]), annotations.of(ref["ann_id"])
        if "image_id" in annotation:
            check_same(annotation["image_id"], ref["image_id"])
        context = image["file_name"].name_text(), _coco_box(annotation["bbox"], image)
        for sentence in ref["sentences"]:
            yield Unit(sentence, context)

    def records(unit: Unit) -> Iterator[Record]:
        name, box = unit.context
        return _region(name, box, unit.entry["sent"], unit.entry["sent_id"].key(), options)

    return Parts(refs, records, units)


def mdetr(file: Entry, options: Options) -> Parts:
    """Read MDETR's release (`finetune_refcoco_train.json`): each expression is an "image" with one annotation."""
    boxes: dict[str, list[Entry]] = {}
    known: set[str] = set()
    for image in file["images"]:
        with suppress(DataError):  # an invalid id is an error of its expression
            known.add(image["id"].key())
    for annotation in file["annotations"]:
        with options.skipping.entry(annotation.place):
            key = annotation["image_id"].key()
            if key not in known:
                raise annotation["image_id"].error("the id of an entry of the file", shown(key)[1:-1])
            boxes.setdefault(key, []).append(annotation["bbox"])

    def records(unit: Unit) -> Iterator[Record]:
        image = unit.entry
        key = image["id"].key()
        found = boxes.get(key, [])
        if len(found) != 1:
            places = f", {found[0].path} and {found[1].path}" if found else ""
            raise image["id"].error("one annotation of the expression", f"{len(found)}{places}")
        box = _coco_box(found[0], image)
        yield from _region(image["file_name"].name_text(), box, image["caption"], key, options)

    return Parts(file["images"], records)


def visual_genome(regions: Entry, image_data: Entry, options: Options) -> Parts:
    """Read `region_descriptions.json`, and `image_data.json` with the sizes and directories of the images."""
    images = index_by(image_data, "image_id", options.skipping)

    def units(image: Entry) -> Iterator[Unit]:
        for region in image["regions"]:
            yield Unit(region, image)

    def records(unit: Unit) -> Iterator[Record]:
        region, listed = unit.entry, unit.context
        if "id" in listed:
            check_same(region["image_id"], listed["id"])
        image = images.of(region["image_id"])
        box = _box(region, [region[side].number() for side in ("x", "y", "width", "height")], image)
        # .../VG_100K_2/1.jpg: the directory is that of the image's archive.
        name = PurePosixPath(urlsplit(image["url"].text()).path).parts[-2:]
        if len(name) != 2 or set(name) & {"/", "//", ".."}:
            raise image["url"].error("an address that ends in a directory and a file")
        yield from _region("/".join(name), box, region["phrase"], region["region_id"].key(), options)

    return Parts(regions, records, units)


def _coco_box(bbox: Entry, image: Entry) -> Box:
    numbers = [value.number() for value in bbox]
    if len(numbers) != 4:
        raise bbox.error("four numbers [x, y, width, height]", str(len(numbers)))
    return _box(bbox, numbers, image)


def _box(entry: Entry, corner_and_size: list[float], image: Entry) -> Box:
    """Convert a box from pixels to fractions of the image, clipped to the image."""
    x, y, box_width, box_height = corner_and_size
    width, height = image["width"].integer(), image["height"].integer()
    if not (1 <= width < _MAX_SIDE and 1 <= height < _MAX_SIDE):
        raise image.error("an image with pixels", f"{str(width)[:20]} x {str(height)[:20]}")
    x1, x2 = (min(max(value / width, 0.0), 1.0) for value in (x, x + box_width))
    y1, y2 = (min(max(value / height, 0.0), 1.0) for value in (y, y + box_height))
    if max(map(abs, corner_and_size)) <= 1 < max(width, height):
        raise entry.error("a box in pixels", f"shares of the image, or one pixel, {corner_and_size}")
    if not (x1 < x2 and y1 < y2):
        raise entry.error(f"a box with an area in an image of {width} x {height}", str(corner_and_size))
    return x1, y1, x2, y2


def _region(image: str, box: Box, expression: Entry, key: str, options: Options) -> Iterator[Record]:
    words, box_text = expression.text(), format_box(box)
    for kind in options.kinds:
        fields = {"expression": words} if kind == "rec" else {"box": box_text}
        question = instruction(kind, key, options.seed, **fields)
        answer = box_text if kind == "rec" else words
        yield Record(image, "region_level", question, answer, boxes=(box,), id=f"{key}-{kind}", source=options.source)
