"""Described regions: RefCOCO, RefCOCO+ and RefCOCOg in two formats, and Visual Genome's region descriptions.

A region with an expression gives one sample that asks for the box (`rec`) and one that asks for the words (`reg`).
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from lion_fast.data.converters.entries import Entry, Options, Parts, index_by, look_up
from lion_fast.data.records import Box, Record
from lion_fast.data.templates import instruction
from lion_fast.io.boxes import format_box


def refcoco(refs: Entry, instances: Entry, options: Options) -> Parts:
    """Read the original release: refs, and COCO's instances with the boxes."""
    images, annotations = index_by(instances["images"], "id"), index_by(instances["annotations"], "id")

    def records(ref: Entry) -> Iterator[Record]:
        if not options.takes(ref["split"].text()):
            return
        image = look_up(images, ref["image_id"])
        box = _coco_box(look_up(annotations, ref["ann_id"])["bbox"], image)
        for sentence in ref["sentences"]:
            yield from _region(image["file_name"].text(), box, sentence["sent"], sentence["sent_id"].key(), options)

    return refs, records


def mdetr(file: Entry, options: Options) -> Parts:
    """Read MDETR's release (`finetune_refcoco_train.json`): each expression is an "image" with one annotation."""
    boxes: dict[str, list[Entry]] = {}
    for annotation in file["annotations"]:
        boxes.setdefault(annotation["image_id"].key(), []).append(annotation["bbox"])

    def records(image: Entry) -> Iterator[Record]:
        key = image["id"].key()
        found = boxes.get(key, [])
        if len(found) != 1:
            raise image["id"].error("one annotation of the expression", str(len(found)))
        box = _coco_box(found[0], image)
        yield from _region(image["file_name"].text(), box, image["caption"], key, options)

    return file["images"], records


def visual_genome(regions: Entry, image_data: Entry, options: Options) -> Parts:
    """Read `region_descriptions.json`, and `image_data.json` with the sizes and directories of the images."""
    images = index_by(image_data, "image_id")

    def described() -> Iterator[Entry]:
        for image in regions:
            yield from image["regions"]

    def records(region: Entry) -> Iterator[Record]:
        image = look_up(images, region["image_id"])
        box = _box(region, [region[side].number() for side in ("x", "y", "width", "height")], image)
        # .../VG_100K_2/1.jpg: the directory is that of the image's archive.
        name = "/".join(PurePosixPath(urlsplit(image["url"].text()).path).parts[-2:])
        yield from _region(name, box, region["phrase"], region["region_id"].key(), options)

    return described(), records


def _coco_box(bbox: Entry, image: Entry) -> Box:
    numbers = [value.number() for value in bbox]
    if len(numbers) != 4:
        raise bbox.error("four numbers [x, y, width, height]", str(len(numbers)))
    return _box(bbox, numbers, image)


def _box(entry: Entry, corner_and_size: list[float], image: Entry) -> Box:
    """Convert a box from pixels to fractions of the image, clipped to the image."""
    x, y, box_width, box_height = corner_and_size
    width, height = image["width"].integer(), image["height"].integer()
    if min(width, height) < 1:
        raise image.error("an image with pixels", f"{width} x {height}")
    x1, x2 = (min(max(value / width, 0.0), 1.0) for value in (x, x + box_width))
    y1, y2 = (min(max(value / height, 0.0), 1.0) for value in (y, y + box_height))
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
