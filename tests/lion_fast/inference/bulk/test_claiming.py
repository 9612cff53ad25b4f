"""Whose an output is: nothing of the user's is touched, one run writes it, and ids and order are the input's."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lion_fast.inference.bulk import BulkJob, run, running
from lion_fast.inference.bulk.claiming import _matches
from lion_fast.inference.bulk.preparing import Prepared
from lion_fast.io.owning import OutputInUseError
from tests.extras import needing, needs
from tests.lion_fast.inference.bulk.inputs import rows_in

NEEDS_PYARROW = needing("pyarrow", "parquet")
QUESTIONS = ["What is left of the big red circle?", "Why?", "Is it a dog?", "How many of them are there?", "Who?"]


class Answers:
    """Stands in for a model: answers in its place, which takes no time."""

    def __init__(self, job: BulkJob, device: Any):
        self.field = job.definition.fields[-1]

    @staticmethod
    def reduce(image: Any) -> Any:
        return image

    @staticmethod
    def encode(images: list, items: list) -> dict[str, Any]:
        return {"count": len(images)}

    def __call__(self, prepared: Prepared) -> list[dict[str, Any]]:
        for row in prepared.rows:
            if row["error"] is None:
                row[self.field] = f"answer to {row['id']}"
        return prepared.rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with a model, five images and questions about them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "load_answerer", Answers)
    Path("model").mkdir()
    Path("photos").mkdir()
    for number, color in enumerate(("red", "green", "blue", "white", "black")):
        Image.new("RGB", (8, 8), color).save(f"photos/{number}.png")
    write_table("table.jsonl")
    return tmp_path


def write_table(table: str, /, **extra: Any) -> None:
    """Write a table with the questions; `extra` are further fields, as functions of the row's number."""
    lines = [{"image": f"photos/{n}.png", "question": question} for n, question in enumerate(QUESTIONS)]
    for n, line in enumerate(lines):
        line |= {field: value(n) for field, value in extra.items()}
    Path(table).write_text("".join(json.dumps(line) + "\n" for line in lines))


def caption(out: str = "rows.jsonl", input: str = "photos", **settings: Any) -> BulkJob:
    return BulkJob("caption", input, out, "model", **settings)


def ask(out: str = "rows.jsonl", input: str = "table.jsonl", **settings: Any) -> BulkJob:
    return BulkJob("ask", input, out, "model", **settings)


def start(job: BulkJob, **options: Any) -> Any:
    return run(job, **{"num_workers": 0, "batch_size": 2, **options})


def contents(folder: Path) -> dict[str, bytes | str]:
    """Return every name below a folder with its content, or where it leads."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


def record(out: str, **changes: Any) -> None:
    """Leave the record of a finished job for an output that is not there."""
    start(caption(out, **changes))
    path = Path(out)
    path.unlink() if path.is_file() else [part.unlink() for part in path.iterdir()]


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}',
        b'{"id": "1"}\n{"id": "2"}',
        b'{"id": "0.png"}\n',
        b"image,caption\n0.png,a dog\n",
        b"a dog",
        b'{"id": ["1"]}\n',
        b"[]\n",
        b"\xff\xfe",
        b"\n",
        b"\0" * 9 + b"x",
    ],
)
@pytest.mark.parametrize("recorded", ["nothing", "this job", "another job", "no record"])
def test_a_file_that_is_not_the_jobs_stays_whole(here: Path, content: bytes, recorded: str) -> None:
    if recorded == "this job":
        record("rows.jsonl")
    if recorded == "another job":
        record("rows.jsonl", num_beams=3)
    if recorded == "no record":
        Path("rows.jsonl.job.json").write_text("{}")
    Path("rows.jsonl").write_bytes(content)
    Path("rows.jsonl.rank-list").write_bytes(b"mine")
    before = contents(here)
    with pytest.raises(ValueError, match=r"rows\.jsonl"):
        start(caption())
    assert contents(here) == before
    start(caption(), overwrite=True)
    assert [row["id"] for row in rows_in("rows.jsonl")] == [f"{n}.png" for n in range(5)]
    assert Path("rows.jsonl.rank-list").read_bytes() == b"mine"
    assert start(caption(), overwrite=True).before == 5, "a job's own output is resumed"


@pytest.mark.usefixtures("here")
def test_an_empty_file_holds_nothing_and_a_link_stays_a_link() -> None:
    Path("disk").mkdir()
    Path("disk/real.jsonl").touch()
    Path("rows.jsonl").symlink_to("disk/real.jsonl")
    Path("dangling.jsonl").symlink_to("disk/new.jsonl")
    for name, real in (("rows.jsonl", "disk/real.jsonl"), ("dangling.jsonl", "disk/new.jsonl")):
        start(caption(name))
        start(ask(name), overwrite=True)
        assert Path(name).is_symlink()
        assert len(rows_in(real)) == 5
    assert sorted(os.listdir("disk")) == ["new.jsonl", "real.jsonl"]


@pytest.mark.parametrize("name", ["rows.jsonl.job.json", "rows.jsonl.rank-00001"])
def test_files_beside_the_output_are_not_replaced(here: Path, name: str) -> None:
    Path(name).write_bytes(b"mine")
    before = contents(here)
    with pytest.raises(ValueError, match=r"rows\.jsonl"):
        start(caption())
    assert contents(here) == before


def test_an_output_that_is_no_file_is_refused(here: Path) -> None:
    os.mkfifo("pipe.jsonl")
    Path("folder.jsonl").mkdir()
    Path("file.parquet").write_bytes(b"PAR1")
    Path("loop.jsonl").symlink_to("loop.jsonl")
    before = contents(here)
    for name in ("pipe.jsonl", "folder.jsonl", "file.parquet", "loop.jsonl", "table.jsonl/rows.jsonl"):
        with pytest.raises((ValueError, OSError), match=name.split("/")[0]):
            start(caption(name), overwrite=True)
        assert contents(here) == before


@NEEDS_PYARROW
@pytest.mark.parametrize("name", ["part-00000.parquet", "part-a.parquet", "notes.txt", "_rank-00000.jsonl"])
@pytest.mark.parametrize("recorded", [False, True])
def test_files_in_a_directory_of_parquet_stay_whole(here: Path, name: str, recorded: bool) -> None:
    pa, pq = needs("pyarrow", "parquet"), needs("pyarrow.parquet", "parquet")
    if recorded:
        record("rows.parquet")
    Path("rows.parquet").mkdir(exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"id": ["mine"]}), f"rows.parquet/{name}")
    else:
        Path("rows.parquet", name).write_text("mine")
    mine = Path("rows.parquet", name).read_bytes()
    if recorded and name in ("part-a.parquet", "notes.txt"):
        start(caption("rows.parquet"))  # the job's own directory, with something of the user's
    else:
        before = contents(here)
        with pytest.raises(ValueError, match=r"rows\.parquet"):
            start(caption("rows.parquet"))
        assert contents(here) == before
    assert Path("rows.parquet", name).read_bytes() == mine
    if name == "notes.txt" and not recorded:
        with pytest.raises(ValueError, match=r"expected a directory of a job.s files alone, got rows\.parquet with"):
            start(caption("rows.parquet"), overwrite=True)


@NEEDS_PYARROW
@pytest.mark.usefixtures("here")
def test_a_part_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Answers):
        def __call__(self, prepared: Prepared) -> list[dict[str, Any]]:
            Path("rows.parquet/part-00001.parquet").write_bytes(b"mine")
            return super().__call__(prepared)

    monkeypatch.setattr(running, "load_answerer", Late)
    with pytest.raises(ValueError, match=r"part-00001\.parquet"):
        start(caption("rows.parquet"), rows_per_part=2)
    assert Path("rows.parquet/part-00001.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize("form", ["same", "absolute", "dotted", "soft", "hard", "through a folder", "pattern", "**"])
def test_the_input_is_never_the_output(here: Path, form: str) -> None:
    Path("mine.jsonl").symlink_to("table.jsonl")
    Path("hard.jsonl").hardlink_to("table.jsonl")
    Path("link").symlink_to(".")
    out, input = {
        "same": ("table.jsonl", "table.jsonl"),
        "absolute": (str(here / "table.jsonl"), "table.jsonl"),
        "dotted": ("photos/../table.jsonl", "table.jsonl"),
        "soft": ("mine.jsonl", "table.jsonl"),
        "hard": ("hard.jsonl", "table.jsonl"),
        "through a folder": ("link/table.jsonl", "table.jsonl"),
        "pattern": ("new.jsonl", "t*.jsonl"),
        "**": ("link/photos/more/new.jsonl", str(here / "**" / "*.jsonl")),
    }[form]
    if form == "pattern":
        out = "tables.jsonl"
    before = contents(here)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"input: expected (files|a pattern).* the output"):
            start(ask(out, input), overwrite=overwrite)
        assert contents(here) == before


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.jsonl", "a.jsonl", True),
        ("*.jsonl", ".a.jsonl", False),
        ("*.jsonl", "b/a.jsonl", False),
        ("**/*.jsonl", "a.jsonl", True),
        ("**/*.jsonl", "b/c/a.jsonl", True),
        ("**/*.jsonl", ".b/a.jsonl", False),
        ("b/**", "b/c/a.jsonl", True),
        ("b/[ab]?jsonl", "b/a.jsonl", True),
        ("b/[[]a].jsonl", "b/[a].jsonl", True),
        ("../*/a.jsonl", "a.jsonl", True),
        ("a.jsonl/*", "a.jsonl", False),
    ],
)
@pytest.mark.usefixtures("here")
def test_patterns_match_as_glob_does(pattern: str, path: str, expected: bool) -> None:
    import glob

    assert _matches(pattern, Path(path)) is expected
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()
    found = {os.path.realpath(name) for name in glob.glob(pattern, recursive=True)}
    assert (os.path.realpath(path) in found) is expected


def test_of_two_runs_the_second_stops(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second starts while the first loads its model, and is still loading when the first has ended."""
    loading, ended, errors = threading.Event(), threading.Event(), []

    def load(job: BulkJob, device: Any) -> Answers:
        loading.set()
        ended.wait(60)
        return Answers(job, device)

    def second() -> None:
        loading.wait(60)
        try:
            start(caption())
        except OutputInUseError as error:
            errors.append(str(error))
        ended.set()

    monkeypatch.setattr(running, "load_answerer", load)
    thread = threading.Thread(target=second)
    thread.start()
    start(caption())
    thread.join()
    assert errors == [f"out: expected a file that no other process is writing, got {here / 'rows.jsonl'}"]
    assert [row["id"] for row in rows_in("rows.jsonl")] == [f"{n}.png" for n in range(5)]
    assert start(caption()).rows == 0
    assert not [name for name in os.listdir() if name.startswith(".")]


@pytest.mark.parametrize("out", ["rows.jsonl", pytest.param("rows.parquet", marks=NEEDS_PYARROW)])
@pytest.mark.parametrize("what", ["removed", "replaced", "cut", "removed at the end"])
@pytest.mark.usefixtures("here")
def test_an_output_that_is_changed_during_the_run_is_an_error(
    monkeypatch: pytest.MonkeyPatch, out: str, what: str
) -> None:
    class Changing(Answers):
        calls = 0

        def __call__(self, prepared: Prepared) -> list[dict[str, Any]]:
            self.calls += 1
            journal = Path(out) if out == "rows.jsonl" else Path(out, "_rank-00000.jsonl")
            if self.calls == 2:
                if what == "cut":
                    os.truncate(journal, 3)
                elif what != "removed at the end":
                    content = journal.read_bytes()
                    journal.unlink()
                    if what == "replaced":
                        journal.write_bytes(content)
            return super().__call__(prepared)

    monkeypatch.setattr(running, "load_answerer", Changing)
    if what == "removed at the end":
        write_all = running.write_all

        def write_and_remove(*args: Any, **options: Any) -> Any:
            summary = write_all(*args, **options)
            for path in [Path(out)] if Path(out).is_file() else list(Path(out).iterdir()):
                path.unlink()
            return summary

        monkeypatch.setattr(running, "write_all", write_and_remove)
    with pytest.raises(OSError, match=rf"^{out}.*(another program has|expected 5 rows, got 0)"):
        start(caption(out))


@pytest.mark.usefixtures("here")
def test_a_failed_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise ValueError("no model there")

    monkeypatch.setattr(running, "load_answerer", load)
    before = sorted(os.listdir())
    with pytest.raises(ValueError, match="no model there"):
        start(caption("new/folder/rows.jsonl"))
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    "out",
    ["rows.jsonl", pytest.param("rows.parquet", marks=NEEDS_PYARROW)],
)
@pytest.mark.usefixtures("here")
def test_own_ids_and_the_order_of_a_table_are_handed_through(out: str) -> None:
    write_table("own.jsonl", id=lambda n: f"mine-{n}", question_id=lambda n: 900 + n)
    start(ask(out, "own.jsonl"))
    expected = [(f"mine-{n}", question, f"answer to mine-{n}") for n, question in enumerate(QUESTIONS)]
    found = [(row["id"], row["question"], row["answer"]) for row in rows_in(out)]
    assert (found if out == "rows.jsonl" else sorted(found)) == expected
    assert start(ask(out, "own.jsonl")).before == 5
    numbered = ask("numbers.jsonl", "own.jsonl", columns={"id": "question_id"})
    start(numbered)
    assert [row["id"] for row in rows_in("numbers.jsonl")] == [900, 901, 902, 903, 904]
    assert start(numbered).before == 5
    start(ask("lines.jsonl", "own.jsonl", columns={"id": ""}))
    assert [row["id"] for row in rows_in("lines.jsonl")] == [f"own.jsonl:{n}" for n in range(1, 6)]


@NEEDS_PYARROW
@pytest.mark.usefixtures("here")
def test_own_ids_of_parquet() -> None:
    pa, pq = needs("pyarrow", "parquet"), needs("pyarrow.parquet", "parquet")
    images = [f"photos/{n}.png" for n in range(5)]
    pq.write_table(pa.table({"image": images, "id": [5, 4, None, 2, 1]}), "own.parquet", row_group_size=2)
    start(caption(input="own.parquet"))
    assert [row["id"] for row in rows_in("rows.jsonl")] == [5, 4, "own.parquet:2", 2, 1]
    with pytest.raises(ValueError, match=r"own\.parquet: expected a column 'question_id', got image, id"):
        start(caption("b.jsonl", "own.parquet", columns={"id": "question_id"}))


@pytest.mark.usefixtures("here")
def test_order_holds_after_a_kill_with_many_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written in the order of processing is brought into the table's order when all is there."""

    class Stopping(Answers):
        calls = 0

        def __call__(self, prepared: Prepared) -> list[dict[str, Any]]:
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("killed")
            return super().__call__(prepared)

    monkeypatch.setattr(running, "load_answerer", Stopping)
    with pytest.raises(RuntimeError, match="killed"):
        start(ask())
    assert [row["question"] for row in rows_in("rows.jsonl")] == ["Why?", "Who?"]
    monkeypatch.setattr(running, "load_answerer", Answers)
    start(ask())
    assert [row["question"] for row in rows_in("rows.jsonl")] == QUESTIONS


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a", "c", "d"], r"own.jsonl:1 and own.jsonl:3: expected different ids, got 'a' twice"),
        ([7, "8", "7", 9, 10], r"own.jsonl:1 and own.jsonl:3: expected different ids, got '7' twice"),
        ([None, "own.jsonl:1", 3, 4, 5], r"own.jsonl:1 and own.jsonl:2: expected different ids, got 'own.jsonl:1'"),
    ],
)
@pytest.mark.usefixtures("here")
def test_an_id_that_is_there_twice_is_refused(ids: list, message: str) -> None:
    write_table("own.jsonl", id=ids.__getitem__)
    with pytest.raises(ValueError, match=message):
        start(ask(input="own.jsonl"))


@pytest.mark.usefixtures("here")
def test_invalid_ids_are_errors_of_their_rows() -> None:
    ids = [["a"], True, " ", "\ud800", 1.5]
    write_table("own.jsonl", id=ids.__getitem__, name=lambda n: None if n else "first")
    start(ask(input="own.jsonl"))
    rows = rows_in("rows.jsonl")
    assert [row["id"] for row in rows] == [f"own.jsonl:{n}" for n in range(1, 6)]
    assert [row["error"] for row in rows] == [
        "id: expected text or a whole number, got a list",
        "id: expected text or a whole number, got a truth value",
        "id: expected text or a whole number, got blank text",
        "id: expected text that UTF-8 can hold, got half a surrogate pair",
        "id: expected text or a whole number, got the number 1.5",
    ]
    start(ask("named.jsonl", "own.jsonl", columns={"id": "name"}))
    assert [(row["id"], row["error"]) for row in rows_in("named.jsonl")] == [
        ("first", None),
        *((f"own.jsonl:{n}", "name: missing") for n in range(2, 6)),
    ]
    with pytest.raises(ValueError, match=r"columns: expected lines with .other., got none in own\.jsonl"):
        start(ask("other.jsonl", "own.jsonl", columns={"id": "other"}))


def test_the_command_line_takes_ids_and_overwrites(here: Path, run_cli: Callable) -> None:
    write_table("own.jsonl", question_id=lambda n: n)
    Path("rows.jsonl").write_text("mine")
    arguments = ["ask", "own.jsonl", "--model", "model", "--out", "rows.jsonl", "--workers", "0"]
    status, _, err = run_cli(*arguments, "--column", "id=question_id")
    assert status == 2
    assert "rows.jsonl, which has rows but no rows.jsonl.job.json (see --overwrite)" in err
    assert Path("rows.jsonl").read_text() == "mine"
    status, out, err = run_cli(*arguments, "--column", "id=question_id", "--overwrite")
    assert (status, "5 rows written" in out) == (0, True), err
    assert [row["id"] for row in rows_in(here / "rows.jsonl")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("table.jsonl", "input table.jsonl has changed"),
        ("model/generation_config.json", "model/generation_config.json has changed"),
        ("model/qformer_tokenizer/vocab.txt", "model/qformer_tokenizer/vocab.txt has changed"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_job_resumes_on_the_content_of_its_start(file: str, message: str) -> None:
    """Also if size and time are the same, as after an edit in place and `touch -r`."""
    path = Path(file)
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text('{"num_beams": 1}')
    start(ask())
    rows, times = Path("rows.jsonl").read_bytes(), path.stat()
    before = path.read_text()
    path.write_text(before.replace("Why?", "Who?").replace("1", "3"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match=f"started with other settings; .*: {message}$"):
        start(ask())
    assert Path("rows.jsonl").read_bytes() == rows
    path.write_text(before)
    assert start(ask()).before == 5


def test_the_input_of_another_directory_is_not_taken_for_the_same(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names in two folders are the same, and so would be the ids; a project that moves as a whole resumes."""
    for name in ("other", "moved"):
        shutil.copytree(here / "photos", here / name / "photos")
        (here / name / "model").mkdir()
    job = caption(str(here / "all" / "rows.jsonl"))
    start(job)
    monkeypatch.chdir(here / "other")
    with pytest.raises(ValueError, match=rf"other settings; .*: input was .?{here}/photos.*, is .?{here}/other/photos"):
        start(job)
    monkeypatch.chdir(here)
    assert start(job).before == 5
    start(caption())
    for name in ("rows.jsonl", "rows.jsonl.job.json"):
        shutil.move(name, f"moved/{name}")
    monkeypatch.chdir(here / "moved")
    assert start(caption()).before == 5


@pytest.mark.usefixtures("here")
def test_an_output_may_lie_in_the_model_s_directory() -> None:
    job = caption("model/rows.jsonl")
    start(job)
    Path("model/more").mkdir()
    Path("model/more/notes.json").write_text("{}")
    assert start(job).before == 5


@pytest.mark.usefixtures("here")
def test_a_record_of_an_earlier_version_names_neither_content_nor_place() -> None:
    start(ask())
    record = Path("rows.jsonl.job.json")
    settings = json.loads(record.read_text())
    del settings["digests"], settings["places"]
    record.write_text(json.dumps(settings))
    assert start(ask()).before == 5
