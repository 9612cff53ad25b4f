"""Questions with short answers: VQAv2, OK-VQA, A-OKVQA, GQA, OCR-VQA.

For questions with ten answers, the most frequent answer is used; the earliest one wins a tie.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from lion_fast.data.converters.entries import Entry, Options, Parts, Unit, check_same, index_by
from lion_fast.data.records import Record

_OCR_VQA_SPLITS = {1: "train", 2: "val", 3: "test"}


def vqa(questions: Entry, annotations: Entry, options: Options) -> Parts:
    """VQAv2 and OK-VQA: questions in one file, answers in another."""
    by_id = index_by(questions["questions"], "question_id", options.skipping)
    subset = questions["data_subtype"].text()

    def records(unit: Unit) -> Iterator[Record]:
        annotation = unit.entry
        question = by_id.of(annotation["question_id"])
        if "image_id" in annotation:
            check_same(annotation["image_id"], question["image_id"])
        answer = _most_given(annotation["answers"], [answer["answer"] for answer in annotation["answers"]])
        image = options.image_name(image_id=question["image_id"].integer(), subset=subset)
        yield _question(image, question["question"], answer, question["question_id"].key(), options)

    return Parts(annotations["annotations"], records)


def aokvqa(file: Entry, options: Options) -> Parts:
    def records(unit: Unit) -> Iterator[Record]:
        entry = unit.entry
        if not options.takes(entry["split"].text()):
            return
        answer = _most_given(entry["direct_answers"], list(entry["direct_answers"]))
        image = options.image_name(image_id=entry["image_id"].integer())
        yield _question(image, entry["question"], answer, entry["question_id"].key(), options)

    return Parts(file, records)


def gqa(file: Entry, options: Options) -> Parts:
    def records(unit: Unit) -> Iterator[Record]:
        entry = unit.entry
        image = options.image_name(image_id=entry["imageId"].key())
        yield _question(image, entry["question"], entry["answer"], entry.name, options)

    return Parts(file.fields(), records)


def ocr_vqa(file: Entry, options: Options) -> Parts:
    def units(book: Entry) -> Iterator[Unit]:
        split = book["split"].integer()
        if split not in _OCR_VQA_SPLITS:
            raise book["split"].error("1, 2 or 3")
        if not options.takes(_OCR_VQA_SPLITS[split]):
            return
        questions, answers = list(book["questions"]), list(book["answers"])
        if len(questions) != len(answers):
            raise book["answers"].error(f"one per question ({len(questions)})", str(len(answers)))
        suffix = PurePosixPath(urlsplit(book["imageURL"].text()).path).suffix
        image = options.image_name(image_id=book.name, suffix=suffix)
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            yield Unit(question, (image, answer, f"{book.name}-{number}"))

    def records(unit: Unit) -> Iterator[Record]:
        image, answer, key = unit.context
        yield _question(image, unit.entry, answer, key, options)

    return Parts(file.fields(), records, units)


def _question(image: str, question: Entry, answer: Entry, key: str, options: Options) -> Record:
    return Record(image, "image_level", question.text(), answer.text(), id=key, source=options.source)


def _most_given(field: Entry, answers: list[Entry]) -> Entry:
    if not answers:
        raise field.error("at least one answer", "none")
    most, _ = Counter(answer.text() for answer in answers).most_common(1)[0]
    return next(answer for answer in answers if answer.text() == most)
