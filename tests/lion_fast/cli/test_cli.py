"""The command line: output, errors and exit status."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from lion_fast import LionForCausalLM, LionProcessor
from lion_fast.cli import main
from lion_fast.model.prompts import CAPTION_INSTRUCTION


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.new("RGB", (97, 61), "red").save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_convert_prints_its_report(golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = golden.directory
    arguments = ["--vit", sources / "eva_vit_tiny.pth", "--llm", sources / "flan-t5-tiny"]
    arguments += ["--bert", sources / "bert-tiny", "--lion", sources / "LION-tiny.pth", "--out", tmp_path / "out"]
    status, out, _ = run(capsys, "convert", *arguments)
    assert status == 0
    assert "LION-tiny.pth: 224 tensors read, 0 ignored" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "lion"
    status, _, err = run(capsys, "convert", *arguments)
    assert status == 2
    assert "out: expected a directory that is empty" in err


def test_convert_names_an_unreadable_file(golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = golden.directory
    (tmp_path / "cut.pth").write_bytes((sources / "LION-tiny.pth").read_bytes()[:1000])
    arguments = ["--vit", sources / "eva_vit_tiny.pth", "--llm", sources / "flan-t5-tiny"]
    arguments += ["--bert", sources / "bert-tiny", "--lion", tmp_path / "cut.pth", "--out", tmp_path / "out"]
    status, out, err = run(capsys, "convert", *arguments)
    assert (status, out) == (2, "")
    assert "cut.pth: not a readable PyTorch checkpoint" in err
    assert not (tmp_path / "out").exists()


def test_caption_and_ask_print_the_answer(converted: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = LionForCausalLM.from_pretrained(converted).eval(), LionProcessor.from_pretrained(converted)
    for question, command in ((CAPTION_INSTRUCTION, ["caption", image]), ("What?", ["ask", image, "What?"])):
        batch = processor(images=image, text=question, tags="red, wall", task="image_level")
        ids = model.generate(**batch, num_beams=2, max_new_tokens=7)
        expected = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        options = ["--model", converted, "--tags", "red, wall", "--num-beams", 2, "--max-new-tokens", 7]
        status, out, _ = run(capsys, *command, *options)
        assert (status, out.rstrip("\n")) == (0, expected)


def test_locate_draws_the_box(
    converted: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model answers every question with a box."""
    processor = LionProcessor.from_pretrained(converted)
    answer = processor.tokenizer(["[0.440,0.060,0.650,0.367]"], return_tensors="pt").input_ids
    monkeypatch.setattr(LionForCausalLM, "generate", lambda self, **inputs: answer)
    output = tmp_path / "box.png"
    status, out, _ = run(capsys, "locate", image, "the plant", "--model", converted, "--output", output)
    assert status == 0
    assert "box in pixels: [43, 4, 63, 22]" in out
    assert Image.open(output).size == (97, 61)
    assert Image.open(output).convert("RGB").getcolors() != [(97 * 61, (255, 0, 0))]


def test_locate_reports_an_answer_without_a_box(
    converted: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "box.png"
    options = ["--model", converted, "--output", output, "--num-beams", 1, "--max-new-tokens", 5]
    status, _, err = run(capsys, "locate", image, "the plant", *options)
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
    ],
)
def test_bad_input_is_reported_in_one_line(
    converted: Path, image: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    arguments = [argument.format(image=image) for argument in argv]
    if "--model" not in arguments:
        arguments += ["--model", str(converted)]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "foo", "no device 'foo' here"),
        ("--num-beams", "0", "expected a whole number of 1 or more, got '0'"),
        ("--max-new-tokens", "-1", "expected a whole number of 1 or more, got '-1'"),
    ],
)
def test_options_are_checked_before_loading(
    capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "caption", "absent.png", f"{option}={value}")
    assert f"argument {option}: {message}" in capsys.readouterr().err


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
        ("model-00001*", cut, "not a checkpoint of LION that can be loaded"),
        ("model-00001*", drop_a_tensor, "1 tensors are missing or of another shape, such as"),
        ("model-00001*", reshape_a_tensor, "1 tensors are missing or of another shape, such as"),
        ("config.json", cut, "not a directory with LION's processor"),
        ("tokenizer.json", cut, "not a directory with LION's processor"),
    ],
)
def test_a_damaged_checkpoint_is_reported_in_one_line(
    converted: Path,
    image: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    pattern: str,
    change: Callable[[Path], None],
    message: str,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(converted, model)
    (file,) = model.glob(pattern)
    change(file)
    status, out, err = run(capfd, "caption", image, "--model", model)
    assert (status, out) == (2, "")
    assert f"{model}: " in err
    assert message in err.splitlines()[-1]


def test_a_bug_is_not_reported_as_bad_input(
    converted: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(self, **inputs):
        raise TypeError("a bug")

    monkeypatch.setattr(LionForCausalLM, "generate", generate)
    with pytest.raises(TypeError, match="a bug"):
        run(capsys, "caption", image, "--model", converted)
