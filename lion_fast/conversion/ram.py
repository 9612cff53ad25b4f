"""Convert RAM's original checkpoint, list of tags and thresholds to a directory for `RamTagger.from_pretrained`.

Every dimension except the tag head's number of heads is read from the tensors.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SwinConfig

from lion_fast.io.atomic import whole_directory
from lion_fast.io.checkpoints import CheckpointError, TensorInfo, naming_output, read_tensors, scan
from lion_fast.tagging.configuration_ram import RamConfig
from lion_fast.tagging.modeling_ram import RamTagger, read_tags, read_thresholds

TAG_HEAD_HEADS = 4  # no tensor's shape gives it

# Replacements of our names by the original's, applied in this order.
_RENAMES = (
    ("vision_model.embeddings.patch_embeddings.projection.", "visual_encoder.patch_embed.proj."),
    ("vision_model.embeddings.", "visual_encoder.patch_embed."),
    ("vision_model.encoder.", "visual_encoder."),
    ("vision_model.layernorm.", "visual_encoder.norm."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.relative_position_bias.", ".attn."),
    (".attention.o_proj.", ".attn.proj."),
    (".attention.q_proj.", ".attn.qkv."),
    (".attention.k_proj.", ".attn.qkv."),
    (".attention.v_proj.", ".attn.qkv."),
    ("tag_head.layers.", "tagging_head.encoder.layer."),
    ("tag_head.", ""),
    (".query.", ".crossattention.self.query."),
    (".key.", ".crossattention.self.key."),
    (".value.", ".crossattention.self.value."),
    (".attention_proj.", ".crossattention.output.dense."),
    (".attention_norm.", ".crossattention.output.LayerNorm."),
    (".up_proj.", ".intermediate.dense."),
    (".down_proj.", ".output.dense."),
    (".ffn_norm.", ".output.LayerNorm."),
)
_BLOCK = re.compile(r"visual_encoder\.layers\.(\d+)\.blocks\.(\d+)\.")
_HEAD_LAYER = re.compile(r"tagging_head\.encoder\.layer\.(\d+)\.")
_TABLE = "relative_position_bias_table"
_FUSED = (".attn.qkv.weight", ".attn.qkv.bias")  # query, key and value, stacked


@dataclass(frozen=True)
class RamConversionReport:
    """Result of `convert_ram`.

    Args:
        config: configuration of the tagger.
        read: names, in the original checkpoint, of the tensors used.
        ignored: names of the tensors that the tagger does not use, such as `text_decoder.*`.
        files: the files written.
    """

    config: RamConfig
    read: list[str]
    ignored: list[str]
    files: list[Path]


def convert_ram(
    ram: str | Path, tags: str | Path, thresholds: str | Path, out_dir: str | Path, *, image_size: int | None = None
) -> RamConversionReport:
    """Convert RAM's original files to one directory for `RamTagger`. Tensors keep their dtypes.

    Args:
        ram: e.g. `ram_swin_large_14m.pth`.
        tags: file with one tag per line, e.g. `ram_tag_list.txt`.
        thresholds: file with one number per line, e.g. `ram_tag_list_threshold.txt`.
        out_dir: output directory, which must not exist.
        image_size: side of the tagger's input in pixels; the checkpoint's if None. With another size, the window covers
            the last feature map, as in Swin's own configurations, and relative positions are interpolated.

    Raises:
        CheckpointError: a file is missing or damaged, lacks tensors, has tensors whose shapes contradict the others, or
            does not have one tag and one threshold per row of `label_embed`; the message names them.
        FileExistsError: `out_dir` exists.
        OutputInUseError: another process is converting to `out_dir`.
        OSError: `out_dir` cannot be written.
        ValueError: `image_size` is not a multiple of the last stage's stride.
    """
    infos = scan(ram)
    config = _config(infos, str(ram), image_size)
    tag_list, tag_thresholds = read_tags(tags), read_thresholds(thresholds)
    for path, values in ((tags, tag_list), (thresholds, tag_thresholds)):
        if len(values) != config.num_tags:
            raise CheckpointError(
                f"{path}: expected {config.num_tags} lines, one per row of label_embed in {ram}, got {len(values)}"
            )
    with torch.device("meta"):
        tagger = RamTagger(config, tag_list, tag_thresholds)
    shapes = {name: tuple(tensor.shape) for name, tensor in tagger.state_dict().items()}
    _check(shapes, infos, str(ram))

    if Path(out_dir).exists():
        raise FileExistsError(f"out_dir: expected a directory that does not exist yet, got {out_dir}")
    with whole_directory(Path(out_dir), new=True) as unfinished:
        tagger.load_state_dict(_read(shapes, infos), assign=True)
        with naming_output(Path(out_dir)):
            tagger.save_pretrained(unfinished)
    read = {_source_name(name) for name in shapes}
    return RamConversionReport(
        config=config,
        read=sorted(read),
        ignored=sorted(infos.keys() - read),
        files=sorted(Path(out_dir).iterdir()),
    )


def _config(infos: dict[str, TensorInfo], path: str, image_size: int | None) -> RamConfig:
    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in infos:
            raise CheckpointError(f"{path}: expected a RAM checkpoint, {name} is missing")
        found = infos[name].shape
        if len(found) != dims or 0 in found:
            raise CheckpointError(f"{path}: {name}: expected {dims} dimensions, none of them 0, got {list(found)}")
        return found

    blocks = {tuple(map(int, match.groups())) for match in map(_BLOCK.match, infos) if match}
    stages = range(1 + max((stage for stage, _ in blocks), default=0))
    tables = [shape(f"visual_encoder.layers.{stage}.blocks.0.attn.{_TABLE}", 2) for stage in stages]
    embed_dim, _, patch_size, _ = shape("visual_encoder.patch_embed.proj.weight", 4)
    window_size = _window_size(tables[0])
    if window_size is None:
        raise CheckpointError(
            f"{path}: visual_encoder.layers.0.blocks.0.attn.{_TABLE}: expected (2 * window - 1)^2 rows, "
            f"got {tables[0][0]}"
        )
    stride = patch_size << (len(stages) - 1)  # of the last stage, in pixels
    if image_size is not None:
        if image_size < stride or image_size % stride:
            raise ValueError(f"image_size: expected a multiple of {stride}, got {image_size}")
        window_size = image_size // stride
    elif (mask := "visual_encoder.layers.0.blocks.1.attn_mask") in infos:
        image_size = math.isqrt(shape(mask, 3)[0]) * window_size * patch_size
    else:
        image_size = window_size * stride

    num_tags, label_size = shape("label_embed", 2)
    intermediate_size, hidden_size = shape("tagging_head.encoder.layer.0.intermediate.dense.weight", 2)
    projection_size, _ = shape("image_proj.weight", 2)
    mlp_size, _ = shape("visual_encoder.layers.0.blocks.0.mlp.fc1.weight", 2)
    try:
        return RamConfig(
            vision_config=SwinConfig(
                image_size=image_size,
                patch_size=patch_size,
                embed_dim=embed_dim,
                depths=[1 + max(block for stage, block in blocks if stage == this) for this in stages],
                num_heads=[heads for _, heads in tables],
                window_size=window_size,
                mlp_ratio=mlp_size / embed_dim,
            ),
            num_tags=num_tags,
            label_size=label_size,
            projection_size=projection_size,
            hidden_size=hidden_size,
            num_hidden_layers=1 + max(int(match[1]) for match in map(_HEAD_LAYER.match, infos) if match),
            num_attention_heads=TAG_HEAD_HEADS,
            intermediate_size=intermediate_size,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _window_size(table: tuple[int, ...]) -> int | None:
    """Return a window's side in tokens from the shape [(2 * window - 1)^2, heads] of a relative position table."""
    side = math.isqrt(table[0])
    return (side + 1) // 2 if side * side == table[0] and side % 2 else None


def _source_name(name: str) -> str:
    for ours, theirs in _RENAMES:
        name = name.replace(ours, theirs)
    return name


def _check(shapes: dict[str, tuple[int, ...]], infos: dict[str, TensorInfo], path: str) -> None:
    missing, misshapen, inexact = [], [], []
    for name, shape in shapes.items():
        source = _source_name(name)
        expected = (3 * shape[0], *shape[1:]) if source.endswith(_FUSED) else shape
        if source not in infos:
            missing.append(source)
        elif not infos[source].dtype.is_floating_point:
            inexact.append(f"{source} (got {infos[source].dtype})")
        elif (got := infos[source].shape) != expected and not (
            source.endswith(_TABLE) and len(got) == 2 and got[1] == expected[1] and _window_size(got)
        ):
            misshapen.append(f"{source} (expected {list(expected)}, got {list(got)})")
    problems = {
        "missing": missing,
        "of another shape than the others imply": misshapen,
        "that are not floating-point": inexact,
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {', '.join(dict.fromkeys(names))}" for what, names in problems.items() if names)
        raise CheckpointError(f"{path}: tensors {found}")


def _read(shapes: dict[str, tuple[int, ...]], infos: dict[str, TensorInfo]) -> dict[str, Tensor]:
    values = {}
    for name, value in read_tensors({name: infos[_source_name(name)] for name in shapes}):
        source = _source_name(name)
        if source.endswith(_FUSED):
            value = value.chunk(3)["qkv".index(name.rsplit(".", 2)[1][0])]
        elif source.endswith(_TABLE):
            value = _interpolate_table(value, shapes[name][0])
        values[name] = value.clone(memory_format=torch.contiguous_format)
    return values


def _interpolate_table(table: Tensor, rows: int) -> Tensor:
    """Resize a relative position table [(2 * window - 1)^2, heads] to `rows` rows, bicubic as in Swin's fine-tuning."""
    if table.shape[0] == rows:
        return table
    old, new = math.isqrt(table.shape[0]), math.isqrt(rows)
    grid = table.T.reshape(1, -1, old, old).float()
    grid = F.interpolate(grid, size=(new, new), mode="bicubic")
    return grid.flatten(2)[0].T.to(table.dtype)
