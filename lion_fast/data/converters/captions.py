"""Captions: COCO, Karpathy's splits of COCO and Flickr30k, TextCaps, and Flickr30k's own list."""

from collections.abc import Iterable, Iterator

from lion_fast.data.converters.entries import Entry, Options, Parts, index_by, look_up
from lion_fast.data.records import Record
from lion_fast.data.templates import instruction


def coco_captions(file: Entry, options: Options) -> Parts:
    images = index_by(file["images"], "id")

    def records(annotation: Entry) -> Iterator[Record]:
        image = look_up(images, annotation["image_id"])["file_name"].text()
        yield _caption(image, annotation["caption"], annotation["id"].key(), options)

    return file["annotations"], records


def karpathy(file: Entry, options: Options) -> Parts:
    def records(image: Entry) -> Iterator[Record]:
        if not options.takes(image["split"].text()):
            return
        folder = image["filepath"].text() + "/" if "filepath" in image else ""
        for sentence in image["sentences"]:
            name = folder + image["filename"].text()
            yield _caption(name, sentence["raw"], sentence["sentid"].key(), options)

    return file["images"], records


def textcaps(file: Entry, options: Options) -> Parts:
    def records(entry: Entry) -> Iterator[Record]:
        if options.takes(entry["set_name"].text()):
            image = options.image_name(image_id=entry["image_id"].key())
            yield _caption(image, entry["caption_str"], entry["caption_id"].key(), options)

    return file["data"], records


def flickr30k(lines: Iterable[Entry], options: Options) -> Parts:
    def records(line: Entry) -> Iterator[Record]:
        key, tab, caption = line.value.partition("\t")
        image, hash_sign, number = key.rpartition("#")
        if not (tab and hash_sign and number.isdecimal()):
            raise line.error("IMAGE#NUMBER, a tab and a caption", repr(line.value[:80]))
        yield _caption(image, Entry(caption, line.file, line.path), key, options)

    return lines, records


def _caption(image: str, caption: Entry, key: str, options: Options) -> Record:
    question = instruction("caption", key, options.seed)
    return Record(image, "image_level", question, caption.text(), id=key, source=options.source)
