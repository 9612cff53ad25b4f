"""Build a Triton cache for a Hopper GPU on a machine without one, to save compiling time on the GPU.

    python benchmarks/triton_cache.py make FILE.tar.xz        # with the GPU machine's Python and Triton
    python benchmarks/triton_cache.py verify FILE.tar.xz      # in a separate folder: is every launch found?
    python benchmarks/triton_cache.py unpack FILE.tar.xz DIR  # on the GPU machine
    TRITON_CACHE_DIR=DIR TRITON_DISABLE_LINE_INFO=1 lion-fast check

`make` runs the cases of `lion-fast check` and the benchmark's training step on the CPU with Triton's own driver and a
stand-in for libcuda.so.1 (libcuda_stand_in.c). The usual code specialises the launches, compiles them for sm_90 and
caches them, and they compute nothing. A launch's key covers Triton's files, ptxas' version, the kernel's source and
line, types, constants, which arguments are multiples of 16, and options, but no path. The C launchers, 0.4 seconds
each, are likewise cached by their source. Line information, part of the key, is disabled on both sides.
"""

import argparse
import ctypes
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DTYPES = ("bfloat16", "float16", "float32")
MANIFEST = "lion_fast.json"
# Both sides set the first, which is part of the key. The second excludes intermediate languages from the cache.
SETTINGS = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_STORE_BINARY_ONLY": "1"}
OTHER_KEYS = ("TRITON_PTXAS_PATH", "TRITON_INTERPRET", "TRITON_DEBUG")  # environment variables that must not be set


def fingerprint() -> str:
    """Return a hash of the parts common to all keys: Triton's own files, and its assembler."""
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    parts = triton_key(), get_ptxas_version(90), ".".join(map(str, sys.version_info[:2]))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class What:
    """The launches to cache: of these operators' cases in these dtypes, of the timed cases, in bfloat16, and of the
    model's benchmarked training step.
    """

    dtypes: Sequence[str]
    operators: Sequence[str]
    timed: bool
    model: bool


def make(out: Path, what: What, processes: int) -> None:
    """Write the cache of every launch of the check.

    Raises:
        RuntimeError: a process has failed.
        OSError: `out` cannot be written.
    """
    from lion_fast.io.atomic import whole_file  # here, because unpacking needs Triton alone

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = record(Path(folder), what, processes)
        seconds = time.perf_counter() - start
        manifest = {"fingerprint": fingerprint(), "what": asdict(what), **counts}
        with whole_file(out) as unfinished:
            files = pack(Path(folder), unfinished, manifest)
    size = out.stat().st_size / 2**20
    print(f"{out}: {size:.1f} MiB, {files} files; {describe(counts)}, in {seconds:.0f} s; fingerprint {fingerprint()}")


def unpack(file: Path, folder: Path) -> None:
    """Extract a cache for the processes of this machine: Triton's lists of files hold absolute paths.

    Raises:
        ValueError: it was made with another Triton, ptxas or Python, so that no launch would be found.
    """
    with tarfile.open(file) as archive:
        manifest = archive.extractfile(MANIFEST)
        made_for = json.load(manifest)["fingerprint"] if manifest else None
        if made_for != fingerprint():
            raise ValueError(f"{file}: made for {made_for}, and here is {fingerprint()}: another Triton")
        folder.mkdir(parents=True, exist_ok=True)
        archive.extractall(folder, filter="data")
    for group in folder.glob("*/__grp__*"):
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        paths = {name: str(group.resolve().parent / name) for name in names}
        group.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")


def verify(file: Path, processes: int) -> bool:
    """Return whether all launches of the cache are found in it, so that nothing is compiled or built."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(file, Path(folder))
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        counts = record(Path(folder), What(**manifest["what"]), processes)
    print(f"{file}: {describe(counts)}")
    return not counts["compiled"] and not counts["built"] and counts["found"] > 0


def describe(counts: dict[str, int]) -> str:
    return (
        f"{counts['found'] + counts['compiled']} kernels loaded, {counts['compiled']} of them compiled, "
        f"{counts['built']} launchers built"
    )


def record(folder: Path, what: What, processes: int) -> dict[str, int]:
    """Fill or use the cache in `folder`, with the cases divided among processes, and return their total counts."""
    with tempfile.TemporaryDirectory() as libraries:
        build_stand_in(Path(libraries))
        environment = {name: value for name, value in os.environ.items() if name not in OTHER_KEYS}
        environment |= SETTINGS | {"TRITON_CACHE_DIR": str(folder), "TRITON_LIBCUDA_PATH": libraries}
        paths = [*(str(ROOT / part) for part in (".", "kernels", "reference")), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, __file__, "record", json.dumps(asdict(what))]
        running = [
            subprocess.Popen([*command, str(n), str(processes)], env=environment, stdout=subprocess.PIPE)
            for n in range(processes)
        ]
        counts: Counter[str] = Counter(found=0, compiled=0, built=0)
        outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, process.args))} ended with {process.returncode}")
        counts.update(json.loads(output.splitlines()[-1]))
    return dict(counts)


def build_stand_in(folder: Path) -> None:
    """Build libcuda.so.1, to link Triton's launchers with and for the processes that run them."""
    from triton.backends.nvidia.driver import include_dirs

    command = [os.environ.get("CC", "cc"), str(HERE / "libcuda_stand_in.c"), "-shared", "-fPIC"]
    command += [f"-I{path}" for path in include_dirs] + ["-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)


def pack(folder: Path, out: Path, manifest: dict[str, Any]) -> int:
    """Pack everything that a launch reads, without locks, and return the number of files."""
    files = [path for path in sorted(folder.glob("*/*")) if path.is_file() and path.name != "lock"]
    with tarfile.open(out, "w:xz", preset=6) as archive:
        content = json.dumps(manifest).encode()
        entry = tarfile.TarInfo(MANIFEST)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
        for path in files:
            archive.add(path, str(path.relative_to(folder)))
    return len(files)


def record_share(what: What, number: int, count: int) -> dict[str, int]:
    """Run one of `count` shares of the cases in its own process; return what was found, compiled and built."""
    ctypes.CDLL(str(Path(os.environ["TRITON_LIBCUDA_PATH"]) / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    import torch
    import triton

    from lion_fast.check.cases import CASES, TIMED
    from lion_fast.check.compare import leaves, make_tensors, results_of
    from lion_fast.check.model_launches import benchmarked_step

    # PyTorch also finds the stand-in, without a GPU.
    warnings.filterwarnings("ignore", message="CUDA initialization")
    counts: Counter[str] = Counter()

    def listen(*, cache_hit: bool, **_: Any) -> None:
        counts["found" if cache_hit else "compiled"] += 1

    real_build = triton.runtime.build._build

    def build(*arguments: Any, **keywords: Any) -> str:
        counts["built"] += 1
        return real_build(*arguments, **keywords)

    runs = [(case, getattr(torch, dtype)) for dtype in what.dtypes for case in CASES]
    runs += [(case, torch.bfloat16) for case in TIMED if what.timed and "bfloat16" in what.dtypes]
    runs = [(case, dtype) for case, dtype in runs if not what.operators or case.operator in what.operators]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.build, "_build", build))
        stack.enter_context(mock.patch.object(triton.knobs.compilation, "listener", listen))
        as_on_a_gpu(stack)
        for case, dtype in itertools.islice(runs, number, None, count):
            with mock.patch.object(torch, "randn", zeros) if case.cost else ExitStack():
                tensors = make_tensors(case, dtype, torch.device("cpu"))
            results_of(case.run, leaves(tensors))
            with torch.no_grad():
                case.run(tensors)
        if what.model and number == count - 1:
            benchmarked_step()
    return dict(counts)


def zeros(*size: int, generator: Any = None, **options: Any) -> Any:
    """Replace `torch.randn` for large inputs, whose values do not matter."""
    import torch

    return torch.zeros(*size, **options)


def as_on_a_gpu(stack: ExitStack) -> None:
    """Make launches on CPU tensors behave as on a Hopper GPU until the stack is closed."""
    import torch
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from lion_kernels.core.backend import launching_on_cpu

    class Hopper(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            answers = {"get_device_capability": (9, 0), "get_current_device": 0, "get_current_stream": 0}
            for name, answer in answers.items():
                setattr(self, name, lambda *_, answer=answer: answer)

    hopper = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 * 1024)
    stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Hopper()))
    stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", return_value=hopper))
    stack.enter_context(launching_on_cpu())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    making, unpacking, verifying, recording = map(actions.add_parser, ("make", "unpack", "verify", "record"))
    for action in (making, unpacking, verifying):
        action.add_argument("file", type=Path)
    unpacking.add_argument("folder", type=Path)
    for action in (making, verifying):
        action.add_argument("--processes", type=int, default=2)
    making.add_argument("--operators", nargs="+", default=[], metavar="NAME", help="default: all")
    making.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    timed = "what the check takes the time of, too, in bfloat16 (default: yes)"
    making.add_argument("--timed", action=argparse.BooleanOptionalAction, default=True, help=timed)
    model = "the benchmark's step of training of LION-FlanT5-XL, too (default: yes)"
    making.add_argument("--model", action=argparse.BooleanOptionalAction, default=True, help=model)
    recording.add_argument("what", type=json.loads)
    for name in ("number", "count"):
        recording.add_argument(name, type=int)
    args = parser.parse_args()
    if args.action == "make":
        make(args.file, What(args.dtypes, args.operators, args.timed, args.model), args.processes)
    elif args.action == "record":
        print(json.dumps(record_share(What(**args.what), args.number, args.count)))
    elif args.action == "unpack":
        try:
            unpack(args.file, args.folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    else:
        return 0 if verify(args.file, args.processes) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
