import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lion_fast.conversion.ram import RamConversionReport, convert_ram
from lion_fast.io.checkpoints import CheckpointError
from lion_fast.tagging.configuration_ram import RamConfig
from lion_fast.tagging.modeling_ram import RamTagger, read_tags, read_thresholds
from tests.lion_fast.tiny import make_tagger
from tests.rounding import relative_error

# Some tens of fp32 roundings of 6e-8 each, over a dozen blocks.
TOLERANCE = 1e-5
GRADIENT = Image.linear_gradient("L")
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def weights_of(report: RamConversionReport) -> dict[str, Tensor]:
    (file,) = (file for file in report.files if file.suffix == ".safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def converted(ram_files, tmp_path_factory) -> RamConversionReport:
    return convert_ram(**ram_files, out_dir=tmp_path_factory.mktemp("converted") / "ram")


@pytest.fixture(scope="module")
def tagger(converted) -> RamTagger:
    return RamTagger.from_pretrained(converted.files[0].parent, dtype=torch.float32)


@pytest.fixture(scope="module")
def images(golden_dir) -> list[Path]:
    return [golden_dir / "ram_tiny" / f"image{i}.png" for i in range(3)]


@pytest.fixture
def tiny() -> RamTagger:
    return make_tagger("abcdef", [0.5] * 6)


@pytest.fixture
def edited(ram_files, tmp_path):
    """Return a function that converts the original checkpoint after `edit` has changed its state dict."""

    def convert(edit, **options) -> RamConversionReport:
        state = torch.load(ram_files["ram"], weights_only=True)["model"]
        edit(state)
        torch.save({"model": state}, tmp_path / "edited.pth")
        return convert_ram(**{**ram_files, "ram": tmp_path / "edited.pth"}, out_dir=tmp_path / "ram", **options)

    return convert


def test_every_stage_matches_the_original(tagger, images, golden_dir):
    expected = load_file(golden_dir / "ram_tiny" / "expected.safetensors")
    got = {"pixel_values": tagger.preprocess(images)}
    hooks = [
        tagger.image_proj.register_forward_hook(
            lambda _, inputs, output: got.update({"swin.out": inputs[0], "image_proj": output})
        ),
        tagger.tag_head.fc.register_forward_hook(lambda _, inputs, output: got.update(tagging_head=inputs[0])),
    ]
    with torch.no_grad():
        got["logits"] = tagger.logits(expected["pixel_values"])
    for hook in hooks:
        hook.remove()
    assert got.keys() == expected.keys()
    assert {name: relative_error(got[name], expected[name]) < TOLERANCE for name in got} == dict.fromkeys(got, True)
    assert (got["pixel_values"] - expected["pixel_values"]).abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_tags_equal_the_originals(tagger, images, golden_dir, batch_size):
    expected = json.loads((golden_dir / "ram_tiny" / "meta.json").read_text())["tags"]
    assert tagger(images, batch_size=batch_size) == expected


def test_a_single_image_needs_no_list(tagger, images):
    for form in (str, Image.open, Path.read_bytes):
        assert tagger(form(images[1])) == tagger(images)[1:2]
    assert tagger([]) == []


def test_errors_name_the_index_of_the_image(tagger, images):
    with pytest.raises(FileNotFoundError, match=r"images\[2\]"):
        tagger([images[0], images[1], "nowhere.png"], batch_size=2)


def test_save_and_load_keep_weights_tags_and_thresholds(tagger, images, tmp_path):
    tagger.save_pretrained(tmp_path)
    loaded = RamTagger.from_pretrained(tmp_path)
    assert loaded.tags == tagger.tags
    assert loaded.tag_thresholds == tagger.tag_thresholds
    state = loaded.state_dict()
    assert state.keys() == tagger.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in tagger.state_dict().items())
    assert loaded(images) == tagger(images)


def test_loading_without_the_tag_files_names_them(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "tag_list.txt").unlink()
    with pytest.raises(OSError, match=r"tag_list\.txt"):
        RamTagger.from_pretrained(tmp_path)


@pytest.fixture
def probabilities(tiny) -> Tensor:
    """What `tiny` gives the tags of `GRADIENT`."""
    with torch.no_grad():
        return tiny.logits(tiny.preprocess(GRADIENT)).sigmoid()[0]


def test_a_tag_must_exceed_its_own_threshold(tiny, probabilities):
    below = probabilities - 1e-6
    tiny.tag_thresholds = torch.where(torch.arange(6) % 2 == 0, probabilities, below).tolist()
    assert tiny(GRADIENT) == ["b, d, f"]


@pytest.mark.parametrize("size", [1, 4, 6, 512])
def test_logits_do_not_depend_on_the_chunk_size(tiny, size, monkeypatch):
    expected = tiny.logits(PIXELS).detach()  # with gradients, which compute all tags at once
    monkeypatch.setattr("lion_fast.tagging.modeling_ram._TAGS_AT_A_TIME", size)
    with torch.no_grad():
        # Products of other shapes are summed in another order: 3.5e-7 was seen.
        assert relative_error(tiny.logits(PIXELS), expected) < 3e-6


def test_tagging_has_no_dropout_in_training_mode(tiny, probabilities):
    # With dropout, about half of the probabilities would fall below these thresholds in each of ten calls.
    tiny.tag_thresholds = (probabilities - 1e-5).tolist()
    tiny.train()
    assert not torch.equal(tiny.logits(PIXELS), tiny.logits(PIXELS))
    assert tiny([GRADIENT] * 10, batch_size=1) == ["a, b, c, d, e, f"] * 10


def test_tagging_restores_the_mode_of_every_module(tiny):
    tiny.train()
    tiny.vision_model.eval()
    modes = [module.training for module in tiny.modules()]
    tiny(Image.new("RGB", (8, 8)))
    assert [module.training for module in tiny.modules()] == modes
    with pytest.raises(FileNotFoundError):
        tiny("nowhere.png")
    assert [module.training for module in tiny.modules()] == modes


def test_labels_are_projected_once(tiny):
    calls = []
    tiny.tag_head.layers[0].query.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = tiny.logits(PIXELS)
        second = tiny.logits(PIXELS)
    assert len(calls) == 1
    assert torch.equal(first, second)


def optimizer_step(tagger: RamTagger) -> None:
    for parameter in tagger.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(tagger.parameters(), lr=0.1).step()


def other_weights(tagger: RamTagger) -> dict[str, Tensor]:
    return {name: value + 0.1 for name, value in tagger.state_dict().items()}


def replace_data(tagger: RamTagger) -> None:
    for parameter in tagger.parameters():
        parameter.data = parameter.data + 0.1


def move_to_the_same_address(tagger: RamTagger) -> None:
    # The effect of .to() there and back if memory is reused.
    tagger._apply(lambda tensor: tensor.data.add_(0.1) if tensor.is_floating_point() else tensor)


CHANGES = {
    "optimizer step": optimizer_step,
    "load_state_dict": lambda tagger: tagger.load_state_dict(other_weights(tagger)),
    "load_state_dict by assignment": lambda tagger: tagger.load_state_dict(other_weights(tagger), assign=True),
    "another dtype and back": lambda tagger: tagger.half().float(),
    "another dtype": lambda tagger: tagger.double(),
    "a move to the same address": move_to_the_same_address,
    "other data in the parameters": replace_data,
    "a new query": lambda tagger: tagger.tag_head.layers[0].query.reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cached_projections_follow_the_weights(tiny, change):
    with torch.no_grad():
        before = tiny.logits(PIXELS)
    CHANGES[change](tiny)
    fresh = RamTagger(tiny.config).to(tiny.dtype).eval()
    fresh.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        after, expected = tiny.logits(PIXELS), fresh.logits(PIXELS)
    assert not torch.equal(after, before)
    assert torch.equal(after, expected)


def test_cached_projections_are_not_shared_with_a_copy(tiny):
    with torch.no_grad():
        before = tiny.logits(PIXELS)
        twin = copy.deepcopy(tiny)
        optimizer_step(twin)
        assert not torch.equal(twin.logits(PIXELS), before)
        assert torch.equal(tiny.logits(PIXELS), before)


def test_projections_cached_under_autocast_are_only_used_under_autocast(tiny):
    twin = copy.deepcopy(tiny)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = tiny.logits(PIXELS)
        assert torch.equal(tiny.logits(PIXELS), twin.logits(PIXELS))
        assert not torch.equal(tiny.logits(PIXELS), rough.float())


def test_gradients_reach_the_label_embeddings(tiny):
    with torch.no_grad():
        tiny.logits(PIXELS)
    tiny.logits(PIXELS).sum().backward()
    missing = [name for name, parameter in tiny.named_parameters() if parameter.grad is None]
    assert missing == []
    assert tiny.tag_head.label_embed.grad.abs().sum() > 0


def test_the_default_is_swin_large():
    with torch.device("meta"):
        tagger = RamTagger(RamConfig())
    classifier = 1536 * 1000 + 1000
    parameters = sum(parameter.numel() for parameter in tagger.vision_model.parameters())
    assert round((parameters + classifier) / 1e6) == 197  # Swin paper, table 1
    assert tagger.image_proj.in_features == 1536
    assert tagger.tag_head.label_embed.shape == (4585, 512)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: RamConfig(num_attention_heads=5), "num_attention_heads.*768.*5"),
        (lambda _: RamConfig(vision_config={"image_size": 192, "window_size": 12}), "image_size.*384.*192"),
        (lambda _: RamConfig(vision_config=RamConfig()), "vision_config.*RamConfig"),
        (lambda tiny: RamTagger(tiny.config, ["a", "b"], [0.5] * 6), "tags: expected 6 .*got 2"),
        (lambda tiny: RamTagger(tiny.config, list("abcdef"), [0.5]), "tag_thresholds: expected 6 .*got 1"),
        (lambda tiny: RamTagger(tiny.config, list("abcdef"), torch.ones(6, device="meta")), "tag_thresholds: .*values"),
        (lambda tiny: RamTagger(tiny.config)(GRADIENT), "tags, tag_thresholds"),
        (lambda tiny: tiny(GRADIENT, batch_size=-1), "batch_size: expected 1 or more, got -1"),
        (lambda tiny: tiny.logits(torch.zeros(1, 3, 64, 64)), r"pixel_values.*\[B, 3, 32, 32\].*\[1, 3, 64, 64\]"),
    ],
)
def test_errors_name_the_argument(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)


def test_report_accounts_for_every_tensor(converted, ram_files):
    names = torch.load(ram_files["ram"], weights_only=True)["model"].keys()
    assert set(converted.read) | set(converted.ignored) == set(names)
    assert set(converted.read) & set(converted.ignored) == set()
    unneeded = ("tag_encoder.", "text_decoder.")
    buffers = (".relative_position_index", ".attn_mask")
    assert all(name.startswith(unneeded) or name.endswith(buffers) for name in converted.ignored)
    assert all(file.is_file() for file in converted.files)


def test_dimensions_are_read_from_the_tensors(converted, golden_dir):
    meta = json.loads((golden_dir / "ram_tiny" / "meta.json").read_text())
    vision = converted.config.vision_config
    got = [vision.embed_dim, vision.depths, vision.num_heads, vision.window_size, vision.image_size]
    assert got == [meta["swin"][name] for name in ("embed_dim", "depths", "num_heads", "window_size", "image_res")]
    head = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    assert [getattr(converted.config, name) for name in head] == [meta["q2l"][name] for name in head]


def test_values_keep_their_dtype(converted):
    assert {tensor.dtype for tensor in weights_of(converted).values()} == {torch.float16}


def test_optional_buffers_determine_the_image_size(edited, tmp_path):
    def drop_buffers(state):
        for name in [name for name in state if name.endswith(("attn_mask", "relative_position_index"))]:
            del state[name]

    assert edited(drop_buffers).config.vision_config.image_size == 384
    (tmp_path / "ram").rename(tmp_path / "other")
    mask = {"visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(256, 144, 144, dtype=torch.float16)}
    assert edited(lambda state: state.update(mask)).config.vision_config.image_size == 768


def test_tensors_that_are_not_floating_point_are_named(edited):
    def round_off(state):
        state["wordvec_proj.weight"] = state["wordvec_proj.weight"].long()

    with pytest.raises(CheckpointError, match=r"not floating-point: wordvec_proj\.weight \(got torch\.int64\)"):
        edited(round_off)


def test_missing_and_misshapen_tensors_are_named(edited, tmp_path):
    def damage(state):
        del state["visual_encoder.layers.2.blocks.0.attn.qkv.bias"]
        del state["tagging_head.encoder.layer.1.output.LayerNorm.weight"]
        state["wordvec_proj.weight"] = state["wordvec_proj.weight"][:, 1:]
        table = "visual_encoder.layers.1.blocks.1.attn.relative_position_bias_table"
        state[table] = state[table][:-1]

    with pytest.raises(CheckpointError) as error:
        edited(damage)
    missing, misshapen = str(error.value).split("of another shape")
    assert "visual_encoder.layers.2.blocks.0.attn.qkv.bias" in missing
    assert "tagging_head.encoder.layer.1.output.LayerNorm.weight" in missing
    assert "wordvec_proj.weight (expected [64, 512], got [64, 511])" in misshapen
    assert "visual_encoder.layers.1.blocks.1.attn.relative_position_bias_table" in misshapen
    assert not (tmp_path / "ram").exists()


def test_a_checkpoint_of_another_model_is_refused(edited):
    with pytest.raises(CheckpointError, match=r"^\S+edited\.pth: expected a RAM checkpoint, image_proj.* is missing$"):
        edited(lambda state: state.pop("image_proj.weight"))
    with pytest.raises(CheckpointError, match=r"expected a RAM checkpoint, visual_encoder.* is missing"):
        edited(lambda state: [state.pop(name) for name in list(state) if name.startswith("visual_encoder")])


def test_unknown_tensors_are_ignored_and_listed(edited, converted):
    report = edited(lambda state: state.update({"visual_encoder.layers.0.blocks.0.gamma": torch.ones(1)}))
    assert set(report.ignored) - set(converted.ignored) == {"visual_encoder.layers.0.blocks.0.gamma"}


@pytest.mark.parametrize("which", ["tags", "thresholds"])
def test_numbers_of_tags_and_thresholds_must_match_the_labels(ram_files, tmp_path, which):
    short = tmp_path / "short.txt"
    short.write_text("\n".join(ram_files[which].read_text().splitlines()[:-1]))
    with pytest.raises(CheckpointError, match=r"short\.txt: expected 40 lines.*got 39"):
        convert_ram(**{**ram_files, which: short}, out_dir=tmp_path / "ram")


def test_an_existing_directory_is_refused(ram_files, tmp_path):
    with pytest.raises(FileExistsError):
        convert_ram(**ram_files, out_dir=tmp_path)


def test_tag_files_are_checked_line_by_line(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_bytes("\ufeffcity street\r\ncafé\r\n\r\n".encode())
    assert read_tags(file) == ["city street", "café"]
    for text, reader in (("a\n\nb\n", read_tags), ("0.5\nhigh\n", read_thresholds), ("0.5\n1.5\n", read_thresholds)):
        file.write_text(text)
        with pytest.raises(CheckpointError, match="line 2"):
            reader(file)
    with pytest.raises(CheckpointError, match="absent"):
        read_tags(tmp_path / "absent.txt")


def test_another_image_size_interpolates_relative_positions(ram_files, converted, images, tmp_path):
    small = convert_ram(**ram_files, out_dir=tmp_path / "ram", image_size=192)
    old, new = weights_of(converted), weights_of(small)
    tables = [name for name in old if name.endswith("relative_position_bias_table")]
    assert len(tables) == 8
    for name in tables:
        assert new[name].shape == (11 * 11, old[name].shape[1])
        # The entry of offset 0 is the same in both windows.
        assert torch.equal(new[name][11 * 11 // 2], old[name][23 * 23 // 2])
    assert all(torch.equal(new[name], old[name]) for name in old.keys() - set(tables))
    assert len(RamTagger.from_pretrained(tmp_path / "ram", dtype=torch.float32)(images)) == len(images)


def test_interpolated_positions_keep_their_direction(edited):
    offsets = torch.arange(-11.0, 12.0)
    rows = offsets.view(-1, 1).expand(23, 23).reshape(-1, 1)

    def slope(state):
        for name in [name for name in state if name.endswith("relative_position_bias_table")]:
            state[name] = rows.expand(-1, state[name].shape[1]).contiguous()

    weights = weights_of(edited(slope, image_size=192))
    grid = next(weights[name][:, 0] for name in weights if name.endswith("relative_position_bias_table")).view(11, 11)
    assert torch.allclose(grid, grid[:, :1].expand(11, 11), atol=1e-5)
    assert (grid.diff(dim=0) > 0).all()
    # One step of the small window is 23 / 11 steps of the large one; the border is clamped, and bicubic bends a line.
    inner = torch.arange(-4.0, 5.0) * 23 / 11
    assert torch.allclose(grid[1:-1, 0], inner, atol=0.05)


@pytest.mark.parametrize("image_size", [0, 100, -32])
def test_an_image_size_that_is_not_a_multiple_of_the_stride_is_refused(ram_files, tmp_path, image_size):
    with pytest.raises(ValueError, match="image_size: expected a multiple of 32"):
        convert_ram(**ram_files, out_dir=tmp_path / "ram", image_size=image_size)


def test_commands_tag_in_float32_whatever_the_dtype_of_the_file(tmp_path: Path, run_cli: Callable) -> None:
    GRADIENT.save(tmp_path / "a.png")
    folder, rows, tagged = tmp_path / "ram", tmp_path / "rows.jsonl", tmp_path / "tagged.jsonl"
    small = make_tagger("abcdef", [0.5] * 6).half()
    pixels = small.preprocess(GRADIENT)
    small.save_pretrained(folder)
    with torch.no_grad():
        half = small.logits(pixels)[0].float().sigmoid()
        single = small.float().logits(pixels)[0].sigmoid()
    assert (half != single).sum() > 3
    (folder / "tag_thresholds.txt").write_text("".join(f"{number}\n" for number in ((half + single) / 2).tolist()))
    expected = [tag for tag, in_half, in_single in zip("abcdef", half, single, strict=True) if in_single > in_half]
    record = {"image": "a.png", "task": "image_level", "question": "What is it?", "answer": "a dog"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    assert run_cli("tag", tmp_path / "a.png", ram=folder, device="cpu")[1].strip() == ", ".join(expected)
    run_cli("tag", tmp_path / "a.png", ram=folder, device="cpu", out=rows, workers=0)
    run_cli("data", "tag", tmp_path / "data.jsonl", ram=folder, device="cpu", out=tagged)
    for file in (rows, tagged):
        assert json.loads(file.read_text())["tags"] == expected
