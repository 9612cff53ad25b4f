"""The RAM image tagger (Recognize Anything, arXiv 2306.03514): predicts which of a fixed list of tags an image shows.

A Swin encoder computes image tokens. Each tag's text embedding queries them in a head of cross-attention and
feed-forward blocks. The probability of each tag is compared with that tag's own threshold.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, SwinModel
from transformers import initialization as init

from lion_fast.io.arrays import expect_dense
from lion_fast.io.checkpoints import CheckpointError
from lion_fast.io.images import ImageLike, load_batches, load_each
from lion_fast.io.reading import shown
from lion_fast.io.untrusted import TAGGER_FILES, expect_data_only, expect_text_file, local_folder
from lion_fast.model.attention import attend
from lion_fast.model.pretrained import load_pretrained
from lion_fast.model.validation import expect_floats, expect_integer, expect_number, expect_values
from lion_fast.tagging.configuration_ram import RamConfig
from lion_fast.tagging.fitting import ram_sizes

TAG_LIST_FILE = "tag_list.txt"
TAG_THRESHOLDS_FILE = "tag_thresholds.txt"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Chunk size on a CPU without gradients: the activations of this many tags fit in the cache; those of all tags take more
# memory than the rest of the tagger.
_TAGS_AT_A_TIME = 512


class RamTagLayer(nn.Module):
    """Cross-attention to the image and a feed-forward, each followed by a residual and LayerNorm as in BERT."""

    def __init__(self, config: RamConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.projection_size, config.hidden_size)
        self.value = nn.Linear(config.projection_size, config.hidden_size)
        self.attention_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def keys_and_values(self, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Project image_tokens [B, N, projection_size] to the keys and values of all tags, [B, N, H, Dh] each."""
        projected = self.key(image_tokens), self.value(image_tokens)
        key, value = (states.unflatten(-1, (self.num_heads, -1)) for states in projected)
        return key, value

    def forward(self, hidden_states: Tensor, key: Tensor, value: Tensor, query: Tensor | None = None) -> Tensor:
        """Run the block.

        Args:
            hidden_states: [1 or B, T, hidden_size], of all tags or some of them: tags do not attend to each other.
            key, value: [B, N, H, Dh] from `keys_and_values`.
            query: `self.query(hidden_states)` if already computed.

        Returns:
            [B, T, hidden_size].
        """
        projected = self.query(hidden_states) if query is None else query
        queries = projected.expand(len(key), -1, -1).unflatten(-1, (self.num_heads, -1))
        attended = attend(self, queries, key, value, dropout=self.attention_dropout if self.training else 0.0)
        hidden_states = self.attention_norm(hidden_states + self.dropout(self.attention_proj(attended)))
        return self.ffn_norm(hidden_states + self.dropout(self.down_proj(F.gelu(self.up_proj(hidden_states)))))


class RamTagHead(nn.Module):
    """Computes one logit per tag from image tokens.

    The tags' initial hidden states and the first block's queries depend on weights alone. Without gradients they are
    computed once and cached until those weights change. In-place writes through `parameter.data`, which PyTorch does
    not count as a change, are not detected until the next call with gradients.
    """

    def __init__(self, config: RamConfig):
        super().__init__()
        self.label_embed = nn.Parameter(torch.zeros(config.num_tags, config.label_size))
        self.wordvec_proj = nn.Linear(config.label_size, config.hidden_size)
        self.layers = nn.ModuleList([RamTagLayer(config) for _ in range(config.num_hidden_layers)])
        self.fc = nn.Linear(config.hidden_size, 1)
        self._start: tuple[object, tuple[Tensor, Tensor]] | None = None

    def forward(self, image_tokens: Tensor) -> Tensor:
        """Compute logits [B, num_tags] from image_tokens [B, N, projection_size]."""
        hidden_states, query = self._initial_states(image_tokens.device.type)
        layers: list[Any] = list(self.layers)
        keys_and_values = [layer.keys_and_values(image_tokens) for layer in layers]
        in_chunks = image_tokens.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        size = _TAGS_AT_A_TIME if in_chunks else hidden_states.shape[1]
        chunks = zip(hidden_states.split(size, dim=1), query.split(size, dim=1), strict=True)
        return torch.cat([self._logits(*chunk, keys_and_values) for chunk in chunks], dim=1)

    def _logits(
        self, hidden_states: Tensor, query: Tensor | None, keys_and_values: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        for layer, (key, value) in zip(self.layers, keys_and_values, strict=True):
            hidden_states = layer(hidden_states, key, value, query)
            query = None
        return self.fc(hidden_states).squeeze(-1)

    def _initial_states(self, device_type: str) -> tuple[Tensor, Tensor]:
        """Return the initial hidden states and the first block's queries, both [1, num_tags, hidden_size]."""
        first_query = self.get_submodule("layers.0.query")
        sources = [self.label_embed, *self.wordvec_proj.parameters(), *first_query.parameters()]
        constant = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if not constant or any(source.is_inference() for source in sources):
            self._start = None  # the weights may be about to change, or their changes cannot be detected
            return self._project_labels(first_query)
        autocast_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        key = (autocast_dtype, [(source.data_ptr(), source._version) for source in sources])
        start = self._start
        if start is None or start[0] != key:
            start = self._start = (key, self._project_labels(first_query))
        return start[1]

    def _project_labels(self, first_query: nn.Module) -> tuple[Tensor, Tensor]:
        hidden_states = F.relu(self.wordvec_proj(self.label_embed)).unsqueeze(0)
        return hidden_states, first_query(hidden_states)

    def _apply(self, *args, **kwargs):
        # A move to another device or dtype and back can put other values at the old address.
        self._start = None
        return super()._apply(*args, **kwargs)


class RamTagger(PreTrainedModel):
    """Tags images; calling it returns one string per image.

    Example:
        >>> tagger = RamTagger.from_pretrained("lion-flan-t5-xl/ram")
        >>> tagger(["street.jpg"])
        ["dog, cart, man"]

    Args:
        config: configuration of the tagger.
        tags: names, one per row of `label_embed`; `from_pretrained` reads them from `tag_list.txt`.
        tag_thresholds: probability, 0 to 1, above which each tag is returned; `from_pretrained` reads them from
            `tag_thresholds.txt`.

    Raises:
        ValueError: the number of `tags` or `tag_thresholds` differs from `config.num_tags`.
    """

    config: RamConfig
    base_model_prefix = "ram"
    main_input_name = "images"
    input_modalities = "image"
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["SwinStage", "RamTagLayer"]

    def __init__(
        self, config: RamConfig, tags: Sequence[str] | None = None, tag_thresholds: Sequence[float] | None = None
    ):
        super().__init__(config)
        _check_tags(config, tags, tag_thresholds)
        self.tags = tags
        self.tag_thresholds = tag_thresholds
        self.vision_model = SwinModel(config.vision_config)
        self.image_proj = nn.Linear(config.vision_config.hidden_size, config.projection_size)
        self.tag_head = RamTagHead(config)
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would infer it from this file's text, where `attend` hides the attention interface

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RamTagHead):
            init.normal_(module.label_embed, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, download: bool = False, **kwargs: Any
    ) -> Any:
        """Load as `PreTrainedModel` does, with the tags and thresholds from their files beside the weights.

        `trust_remote_code` has no effect: a directory that asks for code is refused.

        Args:
            pretrained_model_name_or_path: directory, or with `download` a name on the Hub.
            download: whether a name that is no directory is downloaded from the Hub.

        Raises:
            CheckpointError: the directory asks for code, a file is damaged or missing, `config.json` does not fit the
                weights, tensors are missing, or the file of tags or thresholds is malformed or of another length; the
                message names the file.
            OSError: there is no such directory, or the download failed.
        """
        folder = local_folder(pretrained_model_name_or_path, TAGGER_FILES, kwargs, download=download)
        expect_data_only(folder, model_type=RamConfig.model_type)
        config = RamConfig.from_pretrained(folder)
        for name in (TAG_LIST_FILE, TAG_THRESHOLDS_FILE):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder / name}: no such file")
        tags, thresholds = read_tags(folder / TAG_LIST_FILE), read_thresholds(folder / TAG_THRESHOLDS_FILE)
        for name, values in ((TAG_LIST_FILE, tags), (TAG_THRESHOLDS_FILE, thresholds)):
            if len(values) != config.num_tags:
                raise CheckpointError(
                    f"{folder / name}: expected {config.num_tags} lines (num_tags in config.json), got {len(values)}"
                )
        load = super().from_pretrained
        options = {**kwargs, "name_or_path": pretrained_model_name_or_path}
        return load_pretrained(load, RamConfig, ram_sizes, folder, options, *args, tags=tags, tag_thresholds=thresholds)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save as `PreTrainedModel` does, with the tags and thresholds as files beside the weights."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.tags is not None and self.tag_thresholds is not None:
            for name, values in ((TAG_LIST_FILE, self.tags), (TAG_THRESHOLDS_FILE, self.tag_thresholds)):
                text = "".join(f"{value}\n" for value in values)
                (Path(save_directory) / name).write_text(text, encoding="utf-8")

    @torch.no_grad()
    def forward(self, images: ImageLike | Sequence[ImageLike], batch_size: int = 8) -> list[str]:
        """Return the tags of each image, in the order of the tag list and joined by ", ". Dropout is always off.

        Args:
            images: one image or a sequence of images, of any type that `load_image` reads. Files are opened batch by
                batch.
            batch_size: number of images in a forward pass.

        Raises:
            FileNotFoundError, TypeError: as for `load_image`; TypeError also if `batch_size` is not an integer.
            ValueError: as for `load_image`; also if the model has no tags and thresholds, or `batch_size` is below 1.
        """
        tags, tag_thresholds = self.tags, self.tag_thresholds
        if tags is None or tag_thresholds is None:
            raise ValueError("tags, tag_thresholds: expected both when the model was made, got none")
        _check_tags(self.config, tags, tag_thresholds)  # again: both may be set later
        expect_integer("batch_size", batch_size, 1)
        thresholds = torch.tensor([float(threshold) for threshold in tag_thresholds])
        strings = []
        with _evaluating(self):
            for batch in load_batches(images, batch_size, self._squash):
                probabilities = self.logits(self._to_pixels(batch)).float().sigmoid().cpu()
                strings += [", ".join(compress(tags, shown)) for shown in (probabilities > thresholds).tolist()]
        return strings

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Convert images to float32 pixels [B, 3, image_size, image_size] on the model's device.

        Each image is squashed to a square (bilinear) and normalised by ImageNet's mean and standard deviation.
        """
        return self._to_pixels([self._squash(image) for image in load_each(images)])

    def _squash(self, image: Image.Image) -> np.ndarray:
        size = self.config.vision_config.image_size
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))

    def _to_pixels(self, squashed: Sequence[np.ndarray]) -> Tensor:
        pixels = torch.from_numpy(np.stack(squashed)).to(self.device).movedim(-1, 1).float() / 255
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (pixels - mean) / std

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Compute one logit per image and tag, differentiably.

        Args:
            pixel_values: [B, 3, image_size, image_size], normalised as by `preprocess`.

        Returns:
            [B, num_tags], in the model's dtype.

        Raises:
            ValueError: the shape of `pixel_values` does not match the configuration, or it is not of floats.
        """
        size = self.config.vision_config.image_size
        expect_floats("pixel_values", pixel_values, ("B", 3, size, size))
        expect_values({"pixel_values": pixel_values}, self.tag_head.label_embed)
        if len(pixel_values) == 0:
            raise ValueError("pixel_values: expected one image or more, got none")
        features = self.vision_model(pixel_values.to(self.dtype), return_dict=True)
        tokens = torch.cat([features.pooler_output.unsqueeze(1), features.last_hidden_state], dim=1)
        return self.tag_head(self.image_proj(tokens))


def _check_tags(config: RamConfig, tags: Any, thresholds: Any) -> None:
    """Raise ValueError or TypeError unless tags and thresholds, where given, are as `RamTagger` describes them."""
    for name, values in (("tags", tags), ("tag_thresholds", thresholds)):
        if values is None:
            continue
        listed = isinstance(values, np.ndarray | Tensor) and values.ndim == 1
        if isinstance(values, Tensor):
            expect_dense(values, name)
        if not listed and not isinstance(values, Sequence):
            raise TypeError(f"{name}: expected a list, one entry per tag, got {shown(values)}")
        if len(values) != config.num_tags:
            raise ValueError(f"{name}: expected {config.num_tags} (config.num_tags), got {len(values)}")
    for index, tag in enumerate([] if tags is None else tags):
        if not isinstance(tag, str):
            raise TypeError(f"tags[{index}]: expected a string, got {shown(tag)}")
    if thresholds is not None:
        listed = thresholds.tolist() if isinstance(thresholds, np.ndarray | Tensor) else thresholds
        for index, threshold in enumerate(listed):
            expect_number(f"tag_thresholds[{index}]", threshold, 0, 1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def read_tags(path: str | os.PathLike) -> list[str]:
    """Read tags from a UTF-8 file with one tag per line.

    Raises:
        CheckpointError: the file is missing, is not UTF-8, or has a blank line before the last tag.
    """
    tags = _read_lines(path)
    for number, tag in enumerate(tags, 1):
        if not tag:
            raise CheckpointError(f"{path}, line {number}: expected a tag, got a blank line")
    return tags


def read_thresholds(path: str | os.PathLike) -> list[float]:
    """Read thresholds from a file with one number in 0..1 per line.

    Raises:
        CheckpointError: the file is missing, is not UTF-8, or has a line that is not a number in 0..1.
    """
    thresholds = []
    for number, line in enumerate(_read_lines(path), 1):
        try:
            threshold = float(line)
        except ValueError:
            threshold = float("nan")
        if not 0 <= threshold <= 1:
            raise CheckpointError(f"{path}, line {number}: expected a number in 0..1, got {shown(line)}")
        thresholds.append(threshold)
    return thresholds


def _read_lines(path: str | os.PathLike) -> list[str]:
    expect_text_file(Path(path))
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable text file ({error})") from error
    return [line.strip() for line in text.rstrip().splitlines()]


AutoModel.register(RamConfig, RamTagger)
