"""The command line: output, errors and exit status."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lion_fast import LionForCausalLM, LionProcessor, RamTagger
from lion_fast.cli import main
from lion_fast.model.prompts import CAPTION_INSTRUCTION
from tests.lion_fast.processes import import_path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.new("RGB", (97, 61), "red").save(path)
    return path


def test_convert_prints_its_report_and_writes_the_tagger_beside_the_model(
    golden_files, ram_files, tmp_path: Path, run_cli
) -> None:
    """The tagger gives the golden tags; `test_ram.py` tests every stage of `convert_ram`'s."""
    arguments = golden_files | {"out": tmp_path / "out", "ram": ram_files["ram"]}
    arguments |= {f"ram_{name}": ram_files[name] for name in ("tags", "thresholds")}
    status, out, _ = run_cli("convert", **arguments)
    assert status == 0
    assert "LION-tiny.pth: 224 tensors read, 0 ignored" in out
    assert "ram_tiny.pth: " in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "lion"
    tagger = RamTagger.from_pretrained(tmp_path / "out" / "ram", dtype=torch.float32)
    ram = ram_files["ram"].parent
    assert tagger([ram / f"image{i}.png" for i in range(3)]) == json.loads((ram / "meta.json").read_text())["tags"]
    status, _, err = run_cli("convert", **arguments)
    assert status == 2
    assert "out: expected a directory that is empty" in err


def test_convert_names_an_unreadable_file(golden_files, tmp_path: Path, run_cli) -> None:
    (tmp_path / "cut.pth").write_bytes(golden_files["lion"].read_bytes()[:1000])
    status, out, err = run_cli("convert", **golden_files | {"lion": tmp_path / "cut.pth", "out": tmp_path / "out"})
    assert (status, out) == (2, "")
    assert "cut.pth: not a readable PyTorch checkpoint" in err
    assert not (tmp_path / "out").exists()


def test_caption_and_ask_print_the_answer(converted: Path, image: Path, run_cli) -> None:
    model, processor = LionForCausalLM.from_pretrained(converted).eval(), LionProcessor.from_pretrained(converted)
    for question, command in ((CAPTION_INSTRUCTION, ["caption", image]), ("What?", ["ask", image, "What?"])):
        batch = processor(images=image, text=question, tags="red, wall", task="image_level")
        ids = model.generate(**batch, num_beams=2, max_new_tokens=7)
        expected = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        status, out, _ = run_cli(*command, model=converted, tags="red, wall", num_beams=2, max_new_tokens=7)
        assert (status, out.rstrip("\n")) == (0, expected)


def test_locate_draws_the_box(
    converted: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli
) -> None:
    """The model answers every question with a box."""
    processor = LionProcessor.from_pretrained(converted)
    answer = processor.tokenizer(["[0.440,0.060,0.650,0.367]"], return_tensors="pt").input_ids
    monkeypatch.setattr(LionForCausalLM, "generate", lambda self, **inputs: answer)
    output = tmp_path / "box.png"
    status, out, _ = run_cli("locate", image, "the plant", model=converted, output=output)
    assert status == 0
    assert "box in pixels: [43, 4, 63, 22]" in out
    assert Image.open(output).size == (97, 61)
    assert Image.open(output).convert("RGB").getcolors() != [(97 * 61, (255, 0, 0))]


def test_locate_reports_an_answer_without_a_box(converted: Path, image: Path, tmp_path: Path, run_cli) -> None:
    output = tmp_path / "box.png"
    options = {"model": converted, "output": output, "num_beams": 1, "max_new_tokens": 5}
    status, _, err = run_cli("locate", image, "the plant", **options)
    assert status == 2
    assert "the model's answer holds no box" in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["caption", "absent.png"], "absent.png"),
        (["caption", ""], "images (an empty path): expected an image file"),
        (["caption", "{image}", "--model", "absent"], "--model: no directory absent"),
        (["ask", "{image}", " "], "QUESTION: expected text, got ' '"),
        (["locate", "", "the dog"], "images (an empty path): expected an image file"),
        (["caption", "a\nb.png"], "IMAGE: expected a file, got a directory or nothing at a\\nb.png"),
        (["caption", "~nobody-here/a.png"], "argument IMAGE: expected the name of a user after ~, got '~nobody-here"),
        (["caption", "{image}", "--out=~nobody-here/a.jsonl"], "argument --out: expected the name of a user after ~"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    converted: Path, image: Path, run_cli, argv: list[str], message: str
) -> None:
    options = {} if "--model" in argv else {"model": converted}
    status, out, err = run_cli(*(argument.format(image=image) for argument in argv), **options)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["~/image.png", "~/im*.png"])
def test_the_home_directory_is_found_in_quotes(
    converted: Path, image: Path, run_cli, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HOME", str(image.parent))
    out = image.parent / "rows.jsonl"
    status, _, err = run_cli("caption", name, "--workers", 0, model=converted, out=out, max_new_tokens=2)
    assert status == 0, err
    assert json.loads(out.read_text())["id"] == str(image)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "foo", "no device 'foo' here"),
        ("--num-beams", "0", "expected a whole number of 1 or more, got '0'"),
        ("--max-new-tokens", "-1", "expected a whole number of 1 or more, got '-1'"),
    ],
)
def test_options_are_checked_before_loading(run_cli, option: str, value: str, message: str) -> None:
    status, _, err = run_cli("caption", "absent.png", f"{option}={value}")
    assert status == 2
    assert f"argument {option}: {message}" in err


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def drop_a_tensor(file: Path) -> None:
    save_file(dict(list(load_file(file).items())[1:]), file, metadata={"format": "pt"})


def reshape_a_tensor(file: Path) -> None:
    state = load_file(file)
    name = next(iter(state))
    save_file({**state, name: state[name].new_zeros(7)}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("pattern", "change", "message"),
    [
        ("model-00001*", cut, "/model-00001-of-00004.safetensors: not a readable safetensors file"),
        ("model-00001*", drop_a_tensor, ": 1 tensors are missing or of another shape, such as"),
        ("model-00001*", reshape_a_tensor, ": 1 tensors are missing or of another shape, such as"),
        ("config.json", cut, "/config.json: not a readable JSON file"),
        ("tokenizer.json", cut, ": not a readable tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_reported_in_one_line(
    converted: Path, image: Path, tmp_path: Path, run_cli, pattern: str, change: Callable[[Path], None], message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(converted, model)
    (file,) = model.glob(pattern)
    change(file)
    status, out, err = run_cli("caption", image, model=model)
    assert (status, out) == (2, "")
    assert f"{model}{message}" in err.splitlines()[-1]


def test_a_bug_is_not_reported_as_bad_input(
    converted: Path, image: Path, monkeypatch: pytest.MonkeyPatch, run_cli
) -> None:
    def generate(self, **inputs):
        raise TypeError("a bug")

    monkeypatch.setattr(LionForCausalLM, "generate", generate)
    with pytest.raises(TypeError, match="a bug"):
        run_cli("caption", image, model=converted)


@pytest.mark.slow
def test_kernels_are_compiled_and_the_page_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", import_path())
    found, page = tmp_path / "kernels.json", tmp_path / "kernels.md"
    options = ["--modules", "gated_gelu", "--targets", "sm_90", "gfx942", "--one-each", "--jobs", "2"]
    assert main(["kernels", *options, "--json", str(found), "--page", str(page)]) == 0
    kernels = json.loads(found.read_text(encoding="utf-8"))["kernels"]
    assert {kernel["module"] for kernel in kernels} == {"gated_gelu"}
    assert all(list(kernel["targets"]) == ["sm_90", "gfx942"] for kernel in kernels)
    assert "| kernel | warps, stages | sm_90 | gfx942 |" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (["check", "--json"], "lion_fast.check.report.run_check"),
        (["bench", "--tune", "--table"], "lion_fast.check.tuning.run"),
        (["kernels", "--without-launches", "--json"], "lion_kernels.aot.report.print_report"),
        (["kernels", "--without-launches", "--page"], "lion_kernels.aot.report.print_report"),
    ],
)
def test_a_file_is_replaced_only_with_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli, command: list[str], work: str
) -> None:
    file, began = tmp_path / "mine", []
    file.write_text("mine")
    monkeypatch.setattr("lion_fast.cli.processes.kernels_can_be", lambda interpreted: True)
    if command[0] == "kernels":  # the check is the report's own
        monkeypatch.setattr("lion_kernels.aot.report.interpreting", lambda: False)
        monkeypatch.setattr("lion_kernels.aot.report._tasks", lambda *_: began.append("began") or [])
    else:
        monkeypatch.setattr(work, lambda *_, **__: began.append("began") or SimpleNamespace(problems=[]))
    status, _, err = run_cli(*command, file)
    assert status == 2
    assert f"{command[-1]}: expected the name of a new file, got {file}, which exists (see --overwrite)" in err
    assert file.read_text() == "mine"
    assert not began
    status, _, err = run_cli(*command, file, "--overwrite")
    assert status in (0, 1), err
    assert began == ["began"]
    if command[0] == "kernels":
        assert file.read_text() != "mine"
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_module_without_kernels_is_named(run_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)  # the error comes before another process starts
    status, _, err = run_cli("kernels", "--modules", "gates")
    assert status == 2
    assert "modules: expected some with kernels, got gates" in err


def test_an_unknown_target_is_named(run_cli) -> None:
    status, _, err = run_cli("kernels", "--targets", "sm_70")
    assert status == 2
    assert "invalid choice: 'sm_70'" in err
