"""Convert the original checkpoints (EVA ViT, Flan-T5, BERT, LION, RAM) to a directory that `from_pretrained` loads.

Every dimension is read from the files, so a tiny model is converted by the same code as the published models.
"""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import InstructBlipQFormerConfig, T5Config
from transformers.activations import ACT2FN

from lion_fast.configuration_lion import LionAggregatorConfig, LionConfig, LionVisionConfig
from lion_fast.conversion.ram import convert_ram
from lion_fast.io.atomic import whole_directory
from lion_fast.io.checkpoints import CheckpointError, TensorInfo, naming_output, scan, write_sharded
from lion_fast.io.settings import expect_settings, naming_settings
from lion_fast.io.untrusted import expect_data_only, read_json
from lion_fast.model.generation import lion_generation_config
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor, build_processor

# No tensor's shape gives these: EVA-g's head width, and the constants of LION's aggregator.
VISION_HEAD_DIM = 88
AGGREGATOR_HEADS = 16
FEATURE_LAYERS = (38, 28, 18)
SOFT_PROMPT_TOKEN = "<extra_id_0>"


@dataclass
class ConversionReport:
    """Result of `convert_checkpoint`.

    Args:
        config: configuration of the model.
        read: number of tensors used, by source file or directory.
        ignored: names of the tensors that LION does not use, by source.
        files: the safetensors files written.
    """

    config: LionConfig
    read: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for source, count in self.read.items():
            ignored = self.ignored[source]
            names = f": {', '.join(_shorten(ignored))}" if ignored else ""
            lines.append(f"{source}: {count} tensors read, {len(ignored)} ignored{names}")
        lines.append(f"written: {', '.join(str(file) for file in self.files)}")
        return "\n".join(lines)


def convert_checkpoint(
    vit: str | Path,
    llm: str | Path,
    bert: str | Path,
    lion: str | Path,
    out: str | Path,
    *,
    ram: str | Path | None = None,
    ram_tags: str | Path | None = None,
    ram_thresholds: str | Path | None = None,
    max_shard_bytes: int = 4 * 1024**3,
) -> ConversionReport:
    """Convert original checkpoints to one directory for `LionForCausalLM` and `LionProcessor`.

    Tensors keep their values and dtypes, except the language model's, which are rounded to bfloat16 as in the original,
    whatever dtype the model is later loaded in. Files are read with `weights_only=True`; memory stays below the largest
    file plus one shard. `out` appears only when everything has been written.

    Args:
        vit: EVA's `eva_vit_g.pth`.
        llm: directory of Flan-T5 (config, weights, tokenizer).
        bert: directory of bert-base-uncased (config and vocabulary are used).
        lion: LION's checkpoint of trained parameters, e.g. `LION-FlanT5-XL.pth`.
        out: output directory, which must be empty or not exist.
        ram, ram_tags, ram_thresholds: RAM's checkpoint, list of tags and threshold per tag; all three or none.
            The tagger is written to `out/ram`.
        max_shard_bytes: maximum size of a shard of the output.

    Raises:
        CheckpointError: a file is missing or truncated, holds more than tensors, lacks tensors, or has tensors whose
            shapes contradict the others; the message names them.
        OutputExistsError: `out` exists and is not empty.
        OutputInUseError: another process is converting to `out`; raised before anything is read.
        OSError: `out` cannot be written.
    """
    out = Path(os.path.realpath(out))
    ram_sources = {"ram": ram, "ram_tags": ram_tags, "ram_thresholds": ram_thresholds}
    given = {name: Path(source) for name, source in ram_sources.items() if source is not None}
    if given and len(given) < len(ram_sources):
        absent = ", ".join(sorted(set(ram_sources) - set(given)))
        raise CheckpointError(f"{absent}: expected ram, ram_tags and ram_thresholds together, got {', '.join(given)}")

    for folder in (Path(llm), Path(bert)):
        if folder.is_dir():
            expect_data_only(folder)
    with whole_directory(out, new=True) as staging:
        report = _convert(vit, llm, bert, lion, staging, given, max_shard_bytes)
    report.files = sorted(out.rglob("*.safetensors"))
    return report


def _convert(
    vit: str | Path,
    llm: str | Path,
    bert: str | Path,
    lion: str | Path,
    staging: Path,
    given: dict[str, Path],
    max_shard_bytes: int,
) -> ConversionReport:
    """Write the model, its processor and RAM's `given` files to a directory."""
    sources = {"vit": _Source(vit, scan(vit)), "llm": _Source(llm, scan(llm)), "lion": _Source(lion, scan(lion))}
    vision_config, text_config = _vision_config(sources["vit"]), _text_config(sources["llm"])
    bert_settings = _bert_settings(Path(bert))
    soft_prompt_token = SOFT_PROMPT_TOKEN if "soft_prompt_hint" in sources["lion"].tensors else None
    processor = build_processor(llm, bert, vision_config.image_size, soft_prompt_token)
    config = _lion_config(vision_config, text_config, sources["lion"], bert_settings, processor)
    _expect_vocabularies(llm, bert, processor, config)
    tensors = _find_tensors(sources, config)

    report = ConversionReport(config)
    if given:
        ram_report = convert_ram(given["ram"], given["ram_tags"], given["ram_thresholds"], staging / "ram")
        ram = str(given["ram"])
        report.read[ram], report.ignored[ram] = len(ram_report.read), ram_report.ignored
    write_sharded(tensors, staging, max_shard_bytes)
    with naming_output(staging):
        config.save_pretrained(staging)
        lion_generation_config(config).save_pretrained(staging)
        processor.save_pretrained(staging)
    used = {(info.file, info.name) for info in tensors.values()}
    for source in sources.values():
        ignored = sorted(name for name, info in source.tensors.items() if (info.file, name) not in used)
        report.ignored[str(source.path)] = ignored
        report.read[str(source.path)] = len(source.tensors) - len(ignored)
    return report


@dataclass(frozen=True)
class _Source:
    """The tensors of one file or directory, and the dimensions that follow from them."""

    path: str | Path
    tensors: dict[str, TensorInfo]

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: missing {name}; found {', '.join(_shorten(sorted(self.tensors), 4))}")
        shape = self.tensors[name].shape
        if len(shape) != dims or 0 in shape:
            raise CheckpointError(f"{self.path}: {name}: expected {dims} dimensions, none of them 0, got {list(shape)}")
        return shape

    def count(self, pattern: str) -> int:
        """Return how many different numbers the group of `pattern` matches in the tensors' names."""
        return len(self.indices(pattern))

    def indices(self, pattern: str) -> list[int]:
        matches = (re.match(pattern, name) for name in self.tensors)
        return sorted({int(match.group(1)) for match in matches if match})


def _vision_config(vit: _Source) -> LionVisionConfig:
    width = vit.shape("cls_token", 3)[-1]
    patch_size = vit.shape("patch_embed.proj.weight", 4)[-1]
    patches = vit.shape("pos_embed", 3)[1] - 1
    grid = round(patches**0.5)
    if width % VISION_HEAD_DIM or grid * grid != patches:
        raise CheckpointError(
            f"{vit.path}: expected a width that is a multiple of {VISION_HEAD_DIM} and a square grid of patches, "
            f"got cls_token {list(vit.shape('cls_token', 3))} and pos_embed {list(vit.shape('pos_embed', 3))}"
        )
    return LionVisionConfig(
        hidden_size=width,
        num_hidden_layers=1 + max(FEATURE_LAYERS),
        num_attention_heads=width // VISION_HEAD_DIM,
        intermediate_size=vit.shape("blocks.0.mlp.fc1.weight", 2)[0],
        image_size=grid * patch_size,
        patch_size=patch_size,
    )


# Settings of the language model that come from its tensors, whatever its file says.
_COUNTED = ("vocab_size", "num_layers", "num_decoder_layers")


def _text_config(llm: _Source) -> T5Config:
    directory = Path(llm.path)
    settings = read_json(directory / "config.json")
    if settings.get("model_type") != "t5":
        raise CheckpointError(f"{directory}: expected a model of type 't5', got {settings.get('model_type')!r}")
    with naming_settings(directory / "config.json"):
        expect_settings("", {name: value for name, value in settings.items() if name not in _COUNTED})
        config = T5Config(**settings)
    config.dense_act_fn = "gelu"  # LION runs Flan-T5 with the exact GELU
    config.vocab_size, _ = llm.shape("shared.weight", 2)
    config.num_layers = llm.count(r"encoder\.block\.(\d+)\.")
    config.num_decoder_layers = llm.count(r"decoder\.block\.(\d+)\.")
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id  # T5's convention
    config.architectures = None
    return config


def _bert_settings(directory: Path) -> dict:
    wanted = ("num_attention_heads", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob")
    settings = read_json(directory / "config.json")
    if absent := [name for name in wanted if name not in settings]:
        raise CheckpointError(f"{directory / 'config.json'}: missing {', '.join(absent)}")
    if not isinstance(settings["hidden_act"], str) or settings["hidden_act"] not in ACT2FN:
        raise CheckpointError(f"{directory / 'config.json'}: unknown hidden_act {settings['hidden_act']!r}")
    used = {name: settings[name] for name in wanted} | {"layer_norm_eps": settings.get("layer_norm_eps", 1e-12)}
    with naming_settings(directory / "config.json"):
        expect_settings("", used)
        InstructBlipQFormerConfig(**used)
    return used


def _lion_config(
    vision_config: LionVisionConfig,
    text_config: T5Config,
    lion: _Source,
    bert_settings: dict,
    processor: LionProcessor,
) -> LionConfig:
    has_qformer = "query_tokens" in lion.tensors
    has_aggregator = any(name.startswith("fusion_adapter.") for name in lion.tensors)
    if not has_qformer and not has_aggregator:
        found = ", ".join(_shorten(sorted(lion.tensors), 4))
        raise CheckpointError(f"{lion.path}: expected query_tokens or fusion_adapter.*, found {found}")
    visual_input = "ALL" if has_qformer and has_aggregator else "QFORMER" if has_qformer else "AGGREGATOR"
    adapter = "t5_model.encoder.block.0.layer.1.adapter.adapters."
    try:
        config = LionConfig(
            vision_config=vision_config,
            qformer_config=_qformer_config(lion, bert_settings) if has_qformer else None,
            aggregator_config=_aggregator_config(lion, vision_config.hidden_size, has_aggregator),
            text_config=text_config,
            visual_input=visual_input,
            num_query_tokens=lion.shape("query_tokens", 3)[1] if has_qformer else 0,
            num_adapters=lion.count(re.escape(adapter) + r"(\d+)\."),
            adapter_rank=lion.shape(adapter + "0.down_proj.weight", 2)[0],
            soft_prompt_token=processor.soft_prompt_token,
            soft_prompt_token_id=processor.soft_prompt_token_id,
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{lion.path}: {error}") from error
    config.dtype = torch.float32
    config.architectures = [LionForCausalLM.__name__]
    return config


def _qformer_config(lion: _Source, bert_settings: dict) -> InstructBlipQFormerConfig:
    layers = lion.count(r"Qformer\.bert\.encoder\.layer\.(\d+)\.")
    crossed = lion.indices(r"Qformer\.bert\.encoder\.layer\.(\d+)\.crossattention\.")
    vocabulary, width = lion.shape("Qformer.bert.embeddings.word_embeddings.weight", 2)
    return InstructBlipQFormerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=lion.shape("Qformer.bert.encoder.layer.0.intermediate_query.dense.weight", 2)[0],
        max_position_embeddings=lion.shape("Qformer.bert.embeddings.position_embeddings.weight", 2)[0],
        cross_attention_frequency=crossed[1] - crossed[0] if len(crossed) > 1 else layers,
        **bert_settings,
    )


def _aggregator_config(lion: _Source, width: int, has_aggregator: bool) -> LionAggregatorConfig:
    if not has_aggregator:
        return LionAggregatorConfig(hidden_size=width, feature_layers=list(FEATURE_LAYERS))
    return LionAggregatorConfig(
        hidden_size=width,
        num_attention_heads=AGGREGATOR_HEADS,
        intermediate_size=lion.shape("fusion_adapter.blocks.0.intermediate.dense.weight", 2)[0],
        feature_layers=list(FEATURE_LAYERS),
        projection_size=lion.shape("adapter_proj.0.weight", 2)[0],
    )


def _expect_vocabularies(llm: str | Path, bert: str | Path, processor: LionProcessor, config: LionConfig) -> None:
    rows, words = config.qformer_config.vocab_size, len(processor.qformer_tokenizer)
    if config.visual_input != "AGGREGATOR" and words != rows:
        raise CheckpointError(f"{bert}: expected a vocabulary of {rows} with [DEC] (the Q-Former's rows), got {words}")
    # The soft prompt's token may have been added without a row.
    rows, words = config.text_config.vocab_size, len(processor.tokenizer) - (config.soft_prompt_token_id is not None)
    if words > rows:
        raise CheckpointError(f"{llm}: expected a vocabulary of at most {rows} (rows of shared.weight), got {words}")


_LION_NAMES = {
    "query_tokens": "query_tokens",
    "vision_layernorm": "ln_vision",
    "qformer": "Qformer.bert",
    "qformer_projection": "t5_proj",
    "aggregator": "fusion_adapter",
    "aggregator_layernorm": "ln_adapter",
    "aggregator_projection": "adapter_proj",
    "soft_prompt": "soft_prompt_hint",
}


def _origins(name: str) -> list[tuple[str, str]]:
    """Return the origins of one of our parameters as (source, name in the source), the preferred origin first.

    A LION checkpoint holds the trained parameters; frozen parameters that it also holds take precedence, as in the
    original.
    """
    part, _, rest = name.partition(".")
    if part == "vision_model":
        return [("lion", f"visual_encoder.{rest}"), ("vit", rest)]
    if part == "language_model":
        origins = [("lion", f"t5_model.{rest}"), ("llm", rest)]
        return origins[:1] if ".adapter." in rest else origins
    if part == "qformer":
        rest = rest.replace("attention.attention.", "attention.self.")
        rest = rest.replace("embeddings.layernorm", "embeddings.LayerNorm")
    return [("lion", f"{_LION_NAMES[part]}.{rest}" if rest else _LION_NAMES[part])]


def original_name(name: str) -> str:
    """Return the name of a parameter of `LionForCausalLM` in the original model's state dict."""
    return _origins(name)[0][1]


def _find_tensors(sources: dict[str, _Source], config: LionConfig) -> dict[str, TensorInfo]:
    """Locate each of the model's parameters.

    Raises:
        CheckpointError: parameters are missing, or have another shape.
    """
    with torch.device("meta"):
        parameters = dict(LionForCausalLM(config).named_parameters())
    tensors, problems = {}, []
    for name, parameter in parameters.items():
        found = [(key, source_name) for key, source_name in _origins(name) if source_name in sources[key].tensors]
        key, source_name = found[0] if found else _origins(name)[-1]
        if not found:
            problems.append(f"{sources[key].path}: missing {source_name}")
            continue
        info = sources[key].tensors[source_name]
        if info.shape != tuple(parameter.shape):
            problems.append(f"{info.file}: {info.name}: expected {list(parameter.shape)}, got {list(info.shape)}")
        if not info.dtype.is_floating_point:
            problems.append(f"{info.file}: {info.name}: expected floating-point numbers, got {info.dtype}")
        tensors[name] = replace(info, dtype=torch.bfloat16) if key == "llm" else info
    used = {info.name for info in tensors.values()}
    for name in sorted(sources["lion"].tensors.keys() - used):
        if ".adapter." in name:
            problems.append(
                f"{sources['lion'].path}: {name}: expected no adapter where the language model has no layer"
            )
    if problems:
        raise CheckpointError("; ".join(_shorten(problems, 4)))
    return tensors


def _shorten(names: list[str], limit: int = 12) -> list[str]:
    return names if len(names) <= limit else [*names[:limit], f"and {len(names) - limit} more"]
