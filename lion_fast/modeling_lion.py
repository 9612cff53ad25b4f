"""LION: a frozen vision tower, a Q-Former and a vision aggregator before a language model with a mixture of adapters.

image -- vision_model --> last layer ------------- qformer(question) -- qformer_projection ----+
                      --> last, middle, low layer -- aggregator -- aggregator_projection ------+--> [visual | text]
question, tags ------------------------- embedding, soft prompt replacing its token -----------+        |
task_ids ------------------------------------------------------------> adapters' routers --> language_model
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, InstructBlipQFormerModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from lion_fast.configuration_lion import LionConfig
from lion_fast.io.untrusted import MODEL_FILES, local_folder
from lion_fast.model.adapters import MixtureOfAdapters
from lion_fast.model.aggregator import LionAggregator
from lion_fast.model.attention import AttendingModel, prefer_kernel_attention
from lion_fast.model.checkpointing import with_gradient
from lion_fast.model.fitting import lion_sizes
from lion_fast.model.generation import LionGenerationMixin, lion_generation_config
from lion_fast.model.image_features import ImageFeatures
from lion_fast.model.input_assembly import InputAssemblyMixin
from lion_fast.model.inputs import (
    expect_decoder_inputs,
    expect_encoder_outputs,
    expect_images,
    expect_item_count,
    expect_labels,
    expect_passed_on,
    expect_task_ids,
    expect_text,
)
from lion_fast.model.kernel_modules import run_on_kernels
from lion_fast.model.padding import IGNORED
from lion_fast.model.pretrained import load_pretrained
from lion_fast.model.quantization import keep_trained_modules
from lion_fast.model.targets import Targets, TargetsMixin
from lion_fast.model.text import language_model_class
from lion_fast.model.validation import expect_values
from lion_fast.model.vision import LionVisionModel


@dataclass
class LionOutput(ModelOutput):
    """Output of `LionForCausalLM.forward`.

    Args:
        loss: scalar, mean cross-entropy over the target tokens; only with `labels`.
        logits: [B, Lt, vocabulary], at the target positions, with `labels` or `decoder_input_ids`; without them, for a
            decoder-only language model, [B, Lv + L, vocabulary], at every position of the input.
        visual_prefix: [B, Lv, text hidden size], the visual tokens of the language model's input.
        language_model_outputs: full output of the language model.
        inputs_embeds: [B, Lv + L, text hidden size], the language model's input; only with `inputs_only`.
        attention_mask: [B, Lv + L], mask of `inputs_embeds`; only with `inputs_only`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    visual_prefix: Tensor | None = None
    language_model_outputs: ModelOutput | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None


class Float32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in at least float32, whatever the dtypes of input and weights."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class LionForCausalLM(InputAssemblyMixin, TargetsMixin, AttendingModel, LionGenerationMixin):
    """LION (CVPR 2024), around T5 or a decoder-only language model.

    `kernel_backend` (see `LionConfig`) selects lion_kernels or PyTorch for this model alone. Its modules support both
    (`model.kernel_modules`), and its parts use `attn_implementation="lion_kernels"` unless another is requested.
    With PEFT, leave `task_type` unset: the wrappers that it selects do not pass on `task_ids`. Loaded in float16, T5's
    residual stream stays float32, as in transformers' own T5.

    Example:
        >>> model = LionForCausalLM.from_pretrained("lion-flan-t5-xl", dtype=torch.bfloat16)
        >>> processor = LionProcessor.from_pretrained("lion-flan-t5-xl")
        >>> batch = processor(images="dog.jpg", text="What is on the cart?", task="image_level", return_tensors="pt")
        >>> processor.batch_decode(model.generate(**batch), skip_special_tokens=True)
    """

    config: LionConfig
    language_model: Any  # one of lion_fast.model.text.LANGUAGE_MODELS
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities: ClassVar[list[str]] = ["image", "text"]
    _no_split_modules: ClassVar[list[str]] = [
        "LionVisionBlock",
        "LionAggregatorBlock",
        "InstructBlipQFormerLayer",
        "LionT5Block",
        "LionLlamaDecoderLayer",
        "LionQwen2DecoderLayer",
        "LionQwen3DecoderLayer",
    ]

    def __init__(self, config: LionConfig):
        config.expect_valid()  # settings may have been changed since, as by `from_pretrained(kernel_backend=...)`
        config.share_settings()
        if config.kernel_backend != "torch":
            prefer_kernel_attention(config)
        super().__init__(config)
        # transformers infers from the class name that the loss shifts its labels; Trainer would then not count the
        # first token of each answer.
        self.loss_type = None
        text = config.text_config
        self.vision_model = LionVisionModel._from_config(config.vision_config)
        width = config.vision_config.hidden_size
        if config.visual_input != "AGGREGATOR":
            qformer = config.qformer_config
            self.vision_layernorm = Float32LayerNorm(width, eps=1e-5)
            self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, qformer.hidden_size))
            self.qformer = InstructBlipQFormerModel._from_config(qformer)
            self.qformer_projection = nn.Linear(qformer.hidden_size, text.hidden_size)
        if config.visual_input != "QFORMER":
            self.aggregator = LionAggregator._from_config(config.aggregator_config)
            self.aggregator_layernorm = Float32LayerNorm(width, eps=1e-5)
            projection_size = config.aggregator_config.projection_size
            self.aggregator_projection = nn.Sequential(
                nn.Linear(width, projection_size), nn.GELU(), nn.Linear(projection_size, text.hidden_size)
            )
        if config.soft_prompt_token_id is not None:
            self.soft_prompt = nn.Parameter(torch.zeros(text.hidden_size))
        self.language_model = language_model_class(text)._from_config(text)
        if config.kernel_backend != "torch":
            run_on_kernels(self, config.kernel_backend)
        self.post_init()
        self.generation_config = lion_generation_config(config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as `PreTrainedModel` does, but only checkpoints that are complete and hold data alone.

        A `quantization_config` keeps what LION trains in the model's dtype. `trust_remote_code` has no effect: a
        checkpoint that asks for code is refused.

        Args:
            pretrained_model_name_or_path: directory, or name on the Hub.
            kwargs: arguments of `PreTrainedModel.from_pretrained`. With `visual_input`, `num_adapters` or
                `soft_prompt_token_id` other than the checkpoint's, weights that it lacks are new; with
                `ignore_mismatched_sizes=True`, also those of other shapes.

        Raises:
            CheckpointError: the checkpoint asks for code, a file is damaged or missing, `config.json` does not fit the
                weights, or tensors are missing or have other shapes; the message names the file.
            OSError: there is no such directory, nor such a name on the Hub.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = keep_trained_modules(kwargs["quantization_config"])
        load = super().from_pretrained
        if pretrained_model_name_or_path is None:  # a state_dict instead
            return load(None, *args, **kwargs)
        folder = local_folder(pretrained_model_name_or_path, MODEL_FILES, kwargs)
        options = {**kwargs, "name_or_path": pretrained_model_name_or_path}
        return load_pretrained(load, LionConfig, lion_sizes, folder, options, *args)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LionForCausalLM):
            if hasattr(module, "query_tokens"):
                init.normal_(module.query_tokens, std=self.config.initializer_range)
            if hasattr(module, "soft_prompt"):
                init.normal_(module.soft_prompt, std=1.0)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of all parts, in the order of `modules()`: the units of sharding and recomputation."""
        names = LionForCausalLM._no_split_modules  # transformers adds the parts' lists to the instance's list
        return [module for module in self.modules() if type(module).__name__ in names]

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return T5's encoder, or the model itself if the language model has none; the vision tower for "image"."""
        if modality is None and self.config.is_encoder_decoder:
            return self.language_model.get_encoder()
        return super().get_encoder(modality)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def set_image_size(self, image_size: int) -> None:
        """Change the input size to `image_size` x `image_size` pixels by interpolating the position embeddings.

        Set `processor.image_processor.size` to the same size.

        Raises:
            ValueError: `image_size` is not a multiple of the patch size.
        """
        self.vision_model.set_image_size(image_size)

    def fold_adapters(self) -> None:
        """Fold scale and gate into the adapters' up-projections, per task, for inference until `unfold_adapters`.

        Batches may still mix tasks; results differ by rounding. The parameters, and so the output of
        `save_pretrained`, do not change. Fold on the device that runs the model, and again after changing weights.

        Raises:
            RuntimeError: the adapters' parameters are offloaded. While folded, a forward pass that needs the adapters'
                gradients raises it too, and so does loading other weights.
        """
        for module in self.modules():
            if isinstance(module, MixtureOfAdapters):
                module.fold()

    def unfold_adapters(self) -> None:
        """Undo `fold_adapters` exactly."""
        for module in self.modules():
            if isinstance(module, MixtureOfAdapters):
                module.unfold()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        labels: Tensor | None = None,
        vision_features: Tensor | None = None,
        image_features: ImageFeatures | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        inputs_only: bool = False,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> LionOutput | tuple:
        """Compute loss and logits for a batch, which may mix tasks.

        Ids may have any integer dtype, and masks any real dtype with zeros and ones. Padding may stand on any side.

        Args:
            pixel_values: [B, 3, image_size, image_size].
            input_ids: int64 [B, L], the tag sentence and the question.
            attention_mask: [B, L], 0 at padding; all ones if None.
            qformer_input_ids, qformer_attention_mask: [B, Lq], the question in the Q-Former's vocabulary.
            task_ids: int64 [B], 0 region_level or 1 image_level; may be None for a model without a router.
            labels: int64 [B, Lt], the answers; -100 is ignored.
            vision_features: [B, S, N, vision hidden size] from `get_vision_features`, instead of `pixel_values`.
            image_features: features of B images, from `encode_images`, instead of both.
            decoder_input_ids, decoder_attention_mask: [B, Lt], the answers shifted right, as
                `prepare_decoder_input_ids_from_labels` returns them; derived from `labels` if None.
            num_items_in_batch: number of target tokens over all accumulation steps, by which the summed loss is
                divided, so that gradient accumulation is exact.
            inputs_only: return the language model's input without running it, as `generate` needs it.
            inputs_embeds: [B, L, text hidden size], the text as `embed_text` returns it, instead of `input_ids`.
            return_dict: whether to return a `LionOutput` or a tuple of its values; the configuration's if None.
            kwargs: passed to the language model: `use_cache`, `output_hidden_states`, `output_attentions` (with
                attn_implementation="eager"); `encoder_outputs`, `decoder_inputs_embeds` and `past_key_values` for an
                encoder-decoder, and `logits_to_keep` for a decoder-only model without labels.

        Raises:
            ValueError: a shape or an id does not match; the message names the argument. Checking ids and masks on a GPU
                does not synchronise: a device-side assertion prints the same message, and the process must be
                restarted.
            TypeError: an argument is unknown.
        """
        kwargs = expect_passed_on(self.config, kwargs, labels)
        expect_item_count(num_items_in_batch)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        images = {"pixel_values": pixel_values, "vision_features": vision_features, "image_features": image_features}
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **images}
        given |= {"qformer_input_ids": qformer_input_ids, "qformer_attention_mask": qformer_attention_mask}
        given |= {"task_ids": task_ids, "labels": labels, "decoder_input_ids": decoder_input_ids}
        given |= {"decoder_attention_mask": decoder_attention_mask, **kwargs}
        expect_values(given, self.vision_model.cls_token)
        batch = expect_images(self.config, images)
        text, attention_mask = expect_text(self.config, batch, input_ids, inputs_embeds, attention_mask)
        task_ids = expect_task_ids(self.config, task_ids, batch, self._task_hint() if task_ids is None else "")
        if labels is not None:
            labels = expect_labels(self.config, labels, batch)
        decoder_input_ids, decoder_attention_mask = expect_decoder_inputs(
            self.config, batch, labels, decoder_input_ids, kwargs.get("decoder_inputs_embeds"), decoder_attention_mask
        )
        if image_features is None:
            pixels: Any = pixel_values
            features = self.get_vision_features(pixels) if vision_features is None else vision_features
            image_features = self._encode(features)
        prefix = self._visual_prefix(image_features, qformer_input_ids, qformer_attention_mask)
        text, attention_mask = self._pad(text, attention_mask)
        inputs_embeds = self._embed(prefix, text)  # [visual | text]
        attention_mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], dim=1)
        if inputs_only:
            return LionOutput(visual_prefix=prefix, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        if "encoder_outputs" in kwargs:
            encoded = expect_encoder_outputs(self.config, kwargs["encoder_outputs"], inputs_embeds.shape)
            kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
        if labels is not None or self.training:
            kwargs.setdefault("use_cache", False)  # the loss needs no cache, and PyTorch 2.11 cannot trace one
        inputs_embeds = with_gradient(inputs_embeds, self.language_model.blocks())
        targets = Targets(labels, decoder_input_ids, decoder_attention_mask)
        outputs = self._run_language_model(inputs_embeds, attention_mask, targets, task_ids=task_ids, **kwargs)
        loss = None if labels is None else token_cross_entropy(outputs.logits, labels, num_items_in_batch)
        result = LionOutput(loss=loss, logits=outputs.logits, visual_prefix=prefix, language_model_outputs=outputs)
        return result if return_dict else result.to_tuple()

    def _task_hint(self) -> str:
        if not self.config.has_router:
            return ""
        in_peft = any(type(module).__module__.startswith("peft.") for module in self.modules())
        return "; PEFT's models do not pass it on with a task_type, which has to be None" if in_peft else ""


def token_cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return the unshifted cross-entropy of logits [B, Lt, V] and labels [B, Lt], ignoring labels of -100.

    It is the mean over the target tokens, or their sum divided by `num_items_in_batch` if given.
    """
    reduction = "mean" if num_items_in_batch is None else "sum"
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    loss = F.cross_entropy(logits, labels.to(logits.device).flatten(), ignore_index=IGNORED, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


AutoModel.register(LionConfig, LionForCausalLM)
AutoModelForCausalLM.register(LionConfig, LionForCausalLM)
AutoModelForImageTextToText.register(LionConfig, LionForCausalLM)
