"""Configuration of the RAM tagger: a Swin image encoder and a head in which every tag attends to the image."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig, SwinConfig

from lion_fast.io.settings import CheckedSettings, expect_settings


class RamConfig(CheckedSettings, PreTrainedConfig):
    """Configuration of `RamTagger`. The defaults are the published tagger (Swin-L at 384 pixels, 4585 tags).

    The tags and their thresholds are not part of the configuration: they are stored beside the weights, in
    `tag_list.txt` and `tag_thresholds.txt`.

    Args:
        vision_config: configuration of the Swin encoder, as an object or a dict; its `image_size` is the tagger's.
        num_tags: number of tags.
        label_size: width of the tags' text embeddings.
        projection_size: width of the image tokens that the tag head reads.
        hidden_size: width of the tag head.
        num_hidden_layers: number of blocks of the tag head, at least 1.

    Raises:
        ValueError: `vision_config` has another type, the number of heads does not divide the width, or the last feature
            map is smaller than a window.
    """

    model_type = "lion_ram"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": SwinConfig}

    vision_config: Any = None
    num_tags: int = 4585
    label_size: int = 512
    projection_size: int = 512
    hidden_size: int = 768
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        expect_settings("", {**vars(self), **kwargs}, type(self))
        vision = SWIN_LARGE_384 if self.vision_config is None else self.vision_config
        if not isinstance(vision, dict | SwinConfig):
            raise ValueError(f"vision_config: expected a dict or SwinConfig, got {type(vision).__name__}")
        expect_settings("vision_config.", vision)
        self.vision_config = SwinConfig(**vision) if isinstance(vision, dict) else vision
        self.expect_valid()
        super().__post_init__(**kwargs)

    def expect_valid(self) -> None:
        """Check all settings, also those that were changed after the configuration was made.

        Raises:
            ValueError: a setting is out of its range, or does not fit another.
        """
        super().expect_valid()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        vision = self.vision_config
        smallest = vision.window_size * vision.patch_size * 2 ** (len(vision.depths) - 1)
        if vision.image_size < smallest:
            raise ValueError(
                f"vision_config.image_size: expected at least {smallest}, so that a window of {vision.window_size} "
                f"fits the last feature map, got {vision.image_size}"
            )


SWIN_LARGE_384 = {
    "image_size": 384,
    "patch_size": 4,
    "embed_dim": 192,
    "depths": [2, 2, 18, 2],
    "num_heads": [6, 12, 24, 48],
    "window_size": 12,
}


AutoConfig.register("lion_ram", RamConfig)
