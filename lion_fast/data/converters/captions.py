"""Captions: COCO, Karpathy's splits of COCO and Flickr30k, TextCaps, and Flickr30k's own list."""

from collections.abc import Iterable, Iterator

from lion_fast.data.converters.entries import Entry, Options, Parts, Unit, index_by
from lion_fast.data.records import Record
from lion_fast.data.templates import instruction


def coco_captions(file: Entry, options: Options) -> Parts:
    images = index_by(file["images"], "id", options.skipping)

    def records(unit: Unit) -> Iterator[Record]:
        annotation = unit.entry
        image = images.of(annotation["image_id"])["file_name"].name_text()
        yield _caption(image, annotation["caption"], annotation["id"].key(), options)

    return Parts(file["annotations"], records)


def karpathy(file: Entry, options: Options) -> Parts:
    def units(image: Entry) -> Iterator[Unit]:
        if options.takes(image["split"].text()):
            folder = image["filepath"].name_text() + "/" if "filepath" in image else ""
            name = folder + image["filename"].name_text()
            for sentence in image["sentences"]:
                yield Unit(sentence, name)

    def records(unit: Unit) -> Iterator[Record]:
        yield _caption(unit.context, unit.entry["raw"], unit.entry["sentid"].key(), options)

    return Parts(file["images"], records, units)


def textcaps(file: Entry, options: Options) -> Parts:
    def records(unit: Unit) -> Iterator[Record]:
        entry = unit.entry
        if options.takes(entry["set_name"].text()):
            image = options.image_name(image_id=entry["image_id"].key())
            yield _caption(image, entry["caption_str"], entry["caption_id"].key(), options)

    return Parts(file["data"], records)


def flickr30k(lines: Iterable[Entry], options: Options) -> Parts:
    def records(unit: Unit) -> Iterator[Record]:
        line = unit.entry
        text = line.name_text()
        key, tab, caption = text.partition("\t")
        image, hash_sign, number = key.rpartition("#")
        if not (tab and hash_sign and number.isdecimal()):
            raise line.error("IMAGE#NUMBER, a tab and a caption", repr(text[:80]))
        yield _caption(image, Entry(caption, line.file, line.path), key, options)

    return Parts(lines, records)


def _caption(image: str, caption: Entry, key: str, options: Options) -> Record:
    question = instruction("caption", key, options.seed)
    return Record(image, "image_level", question, caption.text(), id=key, source=options.source)
