"""`convert_checkpoint`: accepted and refused sources, and no partial output after an error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lion_fast import LionForCausalLM, LionProcessor
from lion_fast.conversion import lion as conversion
from lion_fast.conversion.lion import ConversionReport, convert_checkpoint, original_name
from lion_fast.io.checkpoints import CheckpointError

State = dict[str, Tensor]


@pytest.fixture
def convert(golden_files: dict[str, Path], tmp_path: Path) -> Callable[..., ConversionReport]:
    """Return a function that converts the golden model, or other sources, to `out` in the test's directory."""
    return lambda **given: convert_checkpoint(**{**golden_files, "out": tmp_path / "out", **given})


@pytest.fixture(scope="session")
def states(golden_files: dict[str, Path]) -> dict[str, State]:
    """The tensors of the vision tower's and LION's files."""
    loaded = {source: torch.load(golden_files[source], weights_only=True) for source in ("vit", "lion")}
    return loaded | {"lion": loaded["lion"]["model"]}


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, State], Path]:
    """Return a function that saves other tensors as a new source file."""

    def write(name: str, state: State) -> Path:
        path = tmp_path / name
        torch.save(state, path)
        return path

    return write


def test_tensors_are_bit_equal_to_the_sources(converted: Path, golden, states) -> None:
    index = json.loads((converted / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3
    tensors: State = {}
    for file in set(index.values()):
        tensors |= load_file(converted / file)
    llm = load_file(golden.directory / "flan-t5-tiny" / "model.safetensors")
    originals = {**{f"t5_model.{name}": value.bfloat16() for name, value in llm.items()}, **states["lion"]}
    originals |= {f"visual_encoder.{name}": value for name, value in states["vit"].items()}
    assert len(tensors) == len(originals)
    for name, value in tensors.items():
        original = originals[original_name(name)]
        assert value.dtype == original.dtype
        assert torch.equal(value, original), name


def test_output_has_the_default_permissions(converted: Path) -> None:
    """safetensors makes its files readable to the owner alone, which would prevent sharing a checkpoint."""
    ordinary = converted.parent / "ordinary"
    ordinary.touch()
    assert {file.stat().st_mode for file in converted.iterdir() if file.is_file()} == {ordinary.stat().st_mode}


def test_loading_and_saving_is_bit_identical(converted: Path, tmp_path: Path) -> None:
    model, info = LionForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path)
    LionProcessor.from_pretrained(converted).save_pretrained(tmp_path)
    again = LionForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert LionProcessor.from_pretrained(tmp_path).to_dict() == LionProcessor.from_pretrained(converted).to_dict()


def test_dimensions_are_read_from_the_files(converted: Path) -> None:
    config = LionForCausalLM.from_pretrained(converted).config
    vision, qformer, aggregator = config.vision_config, config.qformer_config, config.aggregator_config
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (176, 2, 39)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size) == (56, 14, 768)
    assert (qformer.hidden_size, qformer.num_hidden_layers, qformer.vocab_size) == (48, 4, 204)
    assert (qformer.cross_attention_frequency, qformer.num_attention_heads, qformer.intermediate_size) == (2, 4, 96)
    assert (aggregator.intermediate_size, aggregator.projection_size) == (3072, 704)
    assert (config.num_query_tokens, config.adapter_rank, config.num_adapters) == (8, 64, 2)
    assert (config.visual_input, config.text_config.dense_act_fn) == ("ALL", "gelu")


def test_the_report_lists_what_was_read_and_ignored(convert: Callable, states, changed: Callable) -> None:
    extra = {name.replace("blocks.38.", "blocks.39."): value for name, value in states["vit"].items()}
    extra |= states["vit"] | {"head.weight": torch.zeros(3)}
    vit = changed("vit.pth", extra)
    report = convert(vit=vit)
    assert report.read[str(vit)] == len(states["vit"])
    ignored = report.ignored[str(vit)]
    assert "head.weight" in ignored
    assert sum(name.startswith("blocks.39.") for name in ignored) == len(ignored) - 1 == 13
    assert "head.weight" in str(report) or "and" in str(report)
    assert "511 tensors read, 14 ignored" in str(report)
    assert all(file.is_file() for file in report.files)


@pytest.mark.parametrize("visual_input", ["QFORMER", "AGGREGATOR"])
def test_a_stage_checkpoint_gives_a_model_with_one_adapter(
    convert: Callable, golden_batch, states, changed: Callable, tmp_path: Path, visual_input: str
) -> None:
    absent = {
        "QFORMER": ("fusion_adapter.", "ln_adapter.", "adapter_proj."),
        "AGGREGATOR": ("Qformer.", "query_tokens", "ln_vision.", "t5_proj."),
    }[visual_input]
    dropped = (".adapters.1.", ".router_ratio")
    state = {k: v for k, v in states["lion"].items() if not k.startswith(absent) and not any(d in k for d in dropped)}
    del state["soft_prompt_hint"]
    convert(lion=changed("stage.pth", state))
    model = LionForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (model.config.visual_input, model.config.num_adapters) == (visual_input, 1)
    assert model.config.soft_prompt_token_id is None
    assert model(**golden_batch("image_level")).loss.isfinite()
    with pytest.raises(ValueError, match=r"tags\[0\]"):
        LionProcessor.from_pretrained(tmp_path / "out")(images=torch.zeros(3, 20, 20), text="What?", tags="dog")


def test_without_an_aggregator_its_heads_need_not_divide_the_width(
    convert: Callable, golden_batch, states, changed: Callable, tmp_path: Path
) -> None:
    """The vision tower is cut to one head, of 88, which the aggregator's 16 heads do not divide."""
    half = {176: 88, 528: 264}

    def cut(state: State) -> State:
        return {k: v[tuple(slice(half.get(n, n)) for n in v.shape)].clone() for k, v in state.items()}

    absent = ("fusion_adapter.", "ln_adapter.", "adapter_proj.")
    lion = {k: v for k, v in states["lion"].items() if not k.startswith(absent)}
    convert(vit=changed("vit.pth", cut(states["vit"])), lion=changed("lion.pth", cut(lion)))
    model = LionForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.vision_config.hidden_size == 88
    assert model.config.visual_input == "QFORMER"
    assert model(**golden_batch("image_level")).loss.isfinite()


@pytest.mark.parametrize("form", ["pytorch_model.bin", "shards"])
def test_other_formats_of_the_language_model(
    golden_files: dict[str, Path], convert: Callable, converted: Path, golden_batch, tmp_path: Path, form: str
) -> None:
    llm = tmp_path / "llm"
    shutil.copytree(golden_files["llm"], llm)
    (llm / "model.safetensors").chmod(0o644)
    llm.chmod(0o755)
    state = load_file(llm / "model.safetensors")
    (llm / "model.safetensors").unlink()
    state |= {f"{stack}.embed_tokens.weight": state["shared.weight"].clone() for stack in ("encoder", "decoder")}
    if form == "shards":
        halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
        for number, half in enumerate(halves):
            save_file(half, llm / f"model-{number}.safetensors")
        weight_map = {name: f"model-{number}.safetensors" for number, half in enumerate(halves) for name in half}
        (llm / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, llm / form)
    report = convert(llm=llm)
    assert report.ignored[str(llm)] == ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight"]
    batch = golden_batch("image_level")
    expected = LionForCausalLM.from_pretrained(converted).eval()(**batch).logits
    assert torch.equal(LionForCausalLM.from_pretrained(tmp_path / "out").eval()(**batch).logits, expected)


def test_a_frozen_tensor_in_the_lion_checkpoint_takes_precedence(
    golden_files: dict[str, Path], convert: Callable, states, changed: Callable, tmp_path: Path
) -> None:
    state = {**states["lion"], "visual_encoder.cls_token": states["vit"]["cls_token"] + 1}
    report = convert(lion=changed("lion.pth", state))
    model = LionForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.vision_model.cls_token, (states["vit"]["cls_token"] + 1).float())
    assert report.ignored[str(golden_files["vit"])] == ["cls_token"]


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def reshaped(name: str, shape: tuple[int, ...]) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.zeros(shape)}


def retyped(name: str, dtype: torch.dtype) -> Callable[[State], State]:
    return lambda state: {**state, name: state[name].to(dtype)}


ADAPTER = "t5_model.decoder.block.1.layer.2.adapter.adapters.1"


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("vit", without("blocks.7.norm1.bias"), r"vit\.pth: missing blocks\.7\.norm1\.bias"),
        ("vit", without("pos_embed"), r"vit\.pth: missing pos_embed"),
        ("vit", reshaped("blocks.3.attn.q_bias", (8,)), r"blocks\.3\.attn\.q_bias: expected \[176\], got \[8\]"),
        ("vit", reshaped("cls_token", ()), "cls_token: expected 3 dimensions, none of them 0"),
        ("vit", reshaped("cls_token", (1, 1, 0)), "cls_token: expected 3 dimensions, none of them 0"),
        ("vit", lambda state: {f"module.{k}": v for k, v in state.items()}, r"missing cls_token; found module\.blocks"),
        (
            "vit",
            retyped("blocks.3.norm1.bias", torch.int64),
            r"norm1\.bias: expected floating-point numbers, got torch\.int",
        ),
        ("lion", reshaped("query_tokens", ()), "query_tokens: expected 3 dimensions"),
        ("lion", retyped("ln_vision.weight", torch.bool), r"ln_vision\.weight: expected floating-point"),
        ("lion", reshaped("Qformer.bert.embeddings.word_embeddings.weight", (9,)), "expected 2 dimensions"),
        (
            "lion",
            lambda state: state | {k.replace("block.1.", "block.2."): v for k, v in state.items() if "block.1." in k},
            r"lion\.pth: t5_model\.decoder\.block\.2\..*: expected no adapter where the language model has no layer",
        ),
        (
            "lion",
            lambda state: state | {k.replace(".adapters.1.", ".adapters.2."): v for k, v in state.items()},
            r"lion\.pth: num_adapters: expected 1 or 2, got 3",
        ),
        ("vit", reshaped("pos_embed", (1, 18, 176)), "expected a width that is a multiple of 88 and a square grid"),
        ("lion", without(f"{ADAPTER}.scale"), r"lion\.pth: missing t5_model\.decoder.*adapters\.1\.scale"),
        ("lion", reshaped(f"{ADAPTER}.up_proj.weight", (3, 3)), r"up_proj\.weight: expected \[64, 64\], got \[3, 3\]"),
        (
            "lion",
            without("Qformer.bert.embeddings.LayerNorm.bias"),
            r"missing Qformer\.bert\.embeddings\.LayerNorm\.bias",
        ),
        ("lion", reshaped("ln_vision.weight", (175,)), r"ln_vision\.weight: expected \[176\], got \[175\]"),
        ("lion", lambda state: {"epoch": torch.zeros(1)}, "expected query_tokens or fusion_adapter"),
        (
            "lion",
            reshaped("Qformer.bert.embeddings.word_embeddings.weight", (205, 48)),
            r"expected a vocabulary of 205 with \[DEC\]",
        ),
    ],
)
def test_missing_and_misshapen_tensors_are_named(
    states, convert: Callable, changed: Callable, tmp_path: Path, source: str, change: Callable, message: str
) -> None:
    path = changed(f"{source}.pth", change(states[source]))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        convert(**{source: path})
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def directory_with(golden_files: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a source directory with other content of a file, or without the files if None.

    A dict replaces settings of a JSON file.
    """

    def make(source: str, files: str, content: str | dict | None) -> Path:
        copy = tmp_path / source
        shutil.copytree(golden_files[source], copy, copy_function=shutil.copyfile)
        copy.chmod(0o755)
        for file in (copy / name for name in files.split()):
            if content is None:
                file.unlink()
            elif isinstance(content, dict):
                file.write_text(json.dumps(json.loads(file.read_text()) | content))
            else:
                file.write_text(content)
        return copy

    return make


@pytest.mark.parametrize(
    ("source", "files", "content", "message"),
    [
        ("llm", "config.json", '{"model_type": "llama"}', "expected a model of type 't5', got 'llama'"),
        ("llm", "config.json", "{", "not a readable JSON file"),
        ("llm", "config.json", "[]", "expected a JSON object"),
        (
            "llm",
            "config.json",
            '{"model_type": "t5", "d_model": "x"}',
            r"llm/config\.json: d_model: expected a whole number, got 'x'",
        ),
        ("llm", "model.safetensors", "garbage", "not a readable safetensors file"),
        ("llm", "tokenizer.json", "{", "llm: not a readable tokenizer"),
        ("llm", "tokenizer.json spiece.model", None, "llm: expected a tokenizer's .*, found none of them"),
        ("bert", "vocab.txt", None, "bert: expected a tokenizer's .*, found none of them"),
        ("bert", "config.json", "{", r"bert/config\.json: not a readable JSON file"),
        ("bert", "config.json", {"hidden_act": "foo"}, r"config\.json: unknown hidden_act 'foo'"),
        ("bert", "config.json", {"hidden_act": {"a": 1}}, r"config\.json: unknown hidden_act \{'a': 1\}"),
        (
            "llm",
            "config.json",
            '{"model_type": "t5", "attribute_map": "x"}',
            r"config\.json: attribute_map: expected no",
        ),
        (
            "bert",
            "config.json",
            {"num_attention_heads": "two"},
            r"config\.json: num_attention_heads: expected a whole number, got 'two'",
        ),
    ],
)
def test_a_broken_directory_is_named(
    convert: Callable, directory_with: Callable, tmp_path: Path, source: str, files: str, content: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(**{source: directory_with(source, files, content)})
    assert not (tmp_path / "out").exists()


def test_layers_and_start_token_come_from_the_files(
    golden_files: dict[str, Path], convert: Callable, directory_with: Callable
) -> None:
    """Wrong values in config.json are ignored."""
    settings = json.loads((golden_files["llm"] / "config.json").read_text())
    settings |= {"num_layers": -1, "num_decoder_layers": 1}
    del settings["decoder_start_token_id"]
    text = convert(llm=directory_with("llm", "config.json", json.dumps(settings))).config.text_config
    assert (text.num_layers, text.num_decoder_layers, text.decoder_start_token_id) == (2, 2, 0)


@pytest.mark.parametrize("form", ["here", "link", "dangling link"])
def test_the_output_may_be_the_working_directory_or_a_link(
    convert: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    target = tmp_path / "target"
    if form != "dangling link":
        target.mkdir()
    if form == "here":
        monkeypatch.chdir(target)
    else:
        (tmp_path / "link").symlink_to(target)
    report = convert(out="." if form == "here" else tmp_path / "link")
    assert {"config.json", "tokenizer.json"} <= {file.name for file in target.iterdir()}
    assert all(file.is_file() and file.parent == target for file in report.files)
    assert not [file for file in target.iterdir() if file.name.startswith(".")]


def test_a_nonempty_output_is_refused_and_unchanged(convert: Callable, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out: expected a directory that is empty"):
        convert(out=tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_ram_needs_its_three_files(convert: Callable, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ram_tags, ram_thresholds: expected"):
        convert(ram=tmp_path / "ram.pth")


def test_a_failure_while_writing_leaves_nothing(
    convert: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(*args: Any) -> None:
        (args[1] / "model-00001-of-00009.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_sharded", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        convert(out=tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []
