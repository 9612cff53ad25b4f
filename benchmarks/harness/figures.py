"""The figures that the README, the changelog and the docs quote, generated from the results.

A block between `<!-- begin: NAME -->` and `<!-- end: NAME -->` (invisible comments) is the output of the function
called NAME below. `python -m benchmarks.harness report` rewrites the blocks.
"""

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.harness import ledger
from benchmarks.harness.headline import HEADLINES
from benchmarks.harness.ledger import Row
from benchmarks.harness.results import Entry, Run
from lion_fast.io.atomic import write_text

Devices = Mapping[str, Sequence[Run]]  # runs by device, newest first
_BLOCK = re.compile(
    r"^<!-- begin: (?P<name>.+) -->\n(?P<content>.*?)^<!-- end: (?P=name) -->$", re.MULTILINE | re.DOTALL
)
_MARKER = re.compile(r"^<!-- (?:begin|end): .*-->$", re.MULTILINE)
ALIKE = 0.05  # smaller relative differences count as equal
NOT_ON_A_GPU = "**GPU**: nothing has been measured yet, so we make no speed claims."
# The rows of a CPU's ledger that are compared with the original, by suite and operator, in words.
_ORIGINAL = {
    ("mixture_of_adapters", "mixture_of_adapters"): "adapters, forward and backward",
    ("original", "training step"): "a small training step with AdamW",
    ("original", "RAM tagging"): "RAM tagging",
    ("original", "aggregator"): "the aggregator",
}


def pages(root: Path) -> list[Path]:
    """Return the files of the clone at `root` that quote figures."""
    candidates = [root / "README.md", root / "CHANGELOG.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in candidates if _MARKER.search(path.read_text(encoding="utf-8"))]


def blocks(text: str) -> list[str]:
    """Return the names of the blocks in a page.

    Raises:
        ValueError: the beginning or end of a block is missing.
    """
    names = [match["name"] for match in _BLOCK.finditer(text)]
    if 2 * len(names) != len(_MARKER.findall(text)):
        raise ValueError(
            "expected an end of the same name after the beginning of each block, one block after the other"
        )
    return names


def quote(text: str, devices: Devices) -> str:
    """Return a page with its blocks generated from `devices`.

    Raises:
        ValueError: a block has no end, or its name has no function here.
    """
    blocks(text)
    return _BLOCK.sub(lambda match: _block(match["name"], devices), text)


def write(root: Path, devices: Devices) -> list[Path]:
    """Rewrite the blocks in the files of the clone at `root`, and return the changed files.

    Raises:
        ValueError: as in `quote`; the message names the file.
    """
    changed = []
    for path in pages(root):
        text = path.read_text(encoding="utf-8")
        try:
            new = quote(text, devices)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if new != text:
            write_text(path, new)
            changed.append(path)
    return changed


def _block(name: str, devices: Devices) -> str:
    kind, _, argument = name.partition(" ")
    if kind not in _BLOCKS:
        raise ValueError(f"expected a block of {', '.join(sorted(_BLOCKS))}, got {name!r}")
    paragraphs = list(_BLOCKS[kind](devices, argument))
    return f"<!-- begin: {name} -->\n\n" + "".join(f"{text}\n\n" for text in paragraphs) + f"<!-- end: {name} -->"


def _cpu(devices: Devices, _: str) -> Iterator[str]:
    """Yield our times relative to the original's eager form on a CPU, and to each row's fastest peer."""
    for device, table in ledger.tables(devices).items():
        held: dict[str, str] = {}
        for row in table:
            words = _ORIGINAL.get((row.headline.suite, row.headline.operator))
            whole = row.direction in ("", "forward+backward")
            if words and whole and row.ours and row.ours.ratio and row.ours.baseline in ("original", "eager"):
                held[words] = f"{words} {row.ours.ratio[0]:.2f}{_products(row.ours, row.ours.ratio[0])}"
        if held:
            shares = ", ".join(held[words] for words in _ORIGINAL.values() if words in held)
            yield _fill(
                f"**CPU** ({device}, fp32), time relative to the original's eager form, lower is better: {shares}. "
                f"Against the fastest peer in each row of the ledger, {_standing(table)}."
            )


def _products(ours: Entry, ratio: float) -> str:
    """Return the share of matrix products, which both forms share, if ours saves almost nothing."""
    products = ours.other.get("spent", {}).get("products")
    return f" ({products:.0%} of it in matrix products that both share)" if products and ratio > 0.9 else ""


def _gpu_tables(devices: Devices) -> dict[str, list[Row]]:
    return {device: table for device, table in ledger.tables(devices).items() if table[0].headline in HEADLINES}


def _gpu(devices: Devices, _: str) -> Iterator[str]:
    """Yield the first headline of each operator and part of the model, for every GPU with results."""
    tables = _gpu_tables(devices)
    if not any(row.run for table in tables.values() for row in table):
        yield NOT_ON_A_GPU
        return
    firsts = {headline.operator: headline for headline in reversed(HEADLINES)}
    for device, table in tables.items():
        if not any(row.run for row in table):
            yield f"**{device}**: {ledger.MISSING}."
            continue
        yield _fill(f"**{device}**, bf16: against the fastest peer in each row, {_standing(table)}. The main rows:")
        rows = [row for row in table if row.run and row.headline == firsts[row.headline.operator]]
        yield "\n".join(ledger.lines(rows)).rstrip()


def _standing(table: Sequence[Row]) -> str:
    """Return in how many rows of the ledger ours is ahead, and in how many it is not."""
    ratios = [row.ratio for row in table if row.ratio is not None]
    faster, slower = sum(ratio < 1 - ALIKE for ratio in ratios), sum(ratio > 1 + ALIKE for ratio in ratios)
    text = (
        f"ours is faster in {faster} of {len(table)} rows, within {ALIKE:.0%} in {len(ratios) - faster - slower} and "
        f"slower in {slower}"
    )
    wrong = sum(row.run is not None and row.ours is None for row in table)
    missing = sum(row.run is None for row in table)
    alone = len(table) - len(ratios) - wrong - missing
    rest = ((wrong, "without a correct result"), (alone, "without a peer"), (missing, ledger.MISSING))
    return text + "".join(f"; {number} {words}" for number, words in rest if number)


def _operator(devices: Devices, operator: str) -> Iterator[str]:
    """Yield an operator's rows of the ledger for every GPU."""
    rows = {
        device: [row for row in table if row.headline.operator == operator]
        for device, table in _gpu_tables(devices).items()
    }
    if not all(rows.values()):
        raise ValueError(f"expected an operator with headlines, got {operator!r}")
    if not any(row.run for table in rows.values() for row in table):
        yield f"On a GPU: {ledger.MISSING}."
        return
    for device, table in rows.items():
        if any(row.run for row in table):
            yield f"On {device}, from the [ledger](../benchmarks.md#ledger):"
            yield "\n".join(ledger.lines(table)).rstrip()
        else:
            yield f"On {device}: {ledger.MISSING}."


def _newest(devices: Devices, suite: str, gpu: bool | None = None) -> Iterator[tuple[Run, dict[str, Entry]]]:
    """Yield each device's newest run of a suite, with its entries by peer."""
    for runs in devices.values():
        for run in runs:
            entries = {entry.peer: entry for entry in run.entries if entry.suite == suite}
            if entries and gpu in (None, bool(run.environment["gpu"])):
                yield run, entries
                break


_LOOP = "bench_loop"


def _bulk(devices: Devices, _: str) -> Iterator[str]:
    for run, entries in _newest(devices, "bulk"):
        rates = {peer: entry.other["images per second"] for peer, entry in entries.items()}
        best = max(rates, key=lambda peer: rates[peer] if peer != _LOOP else 0)
        loop = f", against {rates[_LOOP]:.3g} in a plain loop over `generate`" if _LOOP in rates else ""
        yield _fill(
            f"**Bulk captions** with the quickstart's checkpoint on {run.device}: {rates[best]:.3g} images per second "
            f"in batches of {best.split('-')[0]}{loop}."
        )


def _bulk_table(devices: Devices, _: str) -> Iterator[str]:
    for run, entries in _newest(devices, "bulk"):
        group = next(iter(entries.values())).group
        yield _fill(f"On {run.title}: {group}.")
        yield "\n".join(_bulk_lines(entries))
    if not any(_newest(devices, "bulk", gpu=True)):
        yield f"On a GPU: {ledger.MISSING}."


def _bulk_lines(entries: Mapping[str, Entry]) -> Iterator[str]:
    yield "| | images per second | CPU milliseconds per image |"
    yield "|---|---|---|"
    for peer, entry in entries.items():
        words = "plain loop over `generate`, one image at a time"
        if peer != _LOOP:
            size, workers = peer.split("-")
            words = f"batches of {size}, {workers if workers != '0' else 'no'} {_plural('worker', workers)}"
        yield f"| {words} | {entry.other['images per second']:.3g} | {entry.other['CPU milliseconds per image']:.3g} |"


def _data(devices: Devices, _: str) -> Iterator[str]:
    for run, entries in _newest(devices, "data"):
        index = entries.pop("bench_index", None)
        rates = {peer: f"{entry.other['images per second']:.0f}" for peer, entry in entries.items()}
        first = next(iter(entries.values()))
        size = first.other["bytes of a picture"] / 1e3
        text = f"On {run.title} ({first.group}; {size:.0f} kB each, to 224 x 224 pixels), images per second from "
        kinds = {"files": "separate files", "shards": "shards"}
        text += "; from ".join(f"{words}: {_by_workers(rates, kind)}" for kind, words in kinds.items())
        if index:
            text += f". Checking a file: {index.other['lines per second']:,} lines per second"
        yield _fill(text + ".")


def _by_workers(rates: Mapping[str, str], kind: str) -> str:
    """Format `rates`, which has peers such as "loop-files" and "workers=2-files"."""
    words = []
    for peer, rate in rates.items():
        loader, _, storage = peer.partition("-")
        if storage == kind:
            number = loader.removeprefix("workers=")
            by = "in a plain loop" if loader == "loop" else f"with {number} {_plural('worker', number)}"
            words.append(f"{rate} {by}")
    return ", ".join(words)


def _plural(word: str, number: str) -> str:
    return word if number == "1" else f"{word}s"


def _fill(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


_BLOCKS: dict[str, Callable[[Devices, str], Iterator[str]]] = {
    "cpu": _cpu,
    "gpu": _gpu,
    "operator": _operator,
    "bulk": _bulk,
    "bulk-table": _bulk_table,
    "data": _data,
}
