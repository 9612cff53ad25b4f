"""Convert images, questions, tags and answers to the inputs of `LionForCausalLM`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image
from transformers import (
    AddedToken,
    AutoConfig,
    AutoProcessor,
    BatchFeature,
    BlipImageProcessorPil,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.processing_utils import ProcessingKwargs

from lion_fast.configuration_lion import LionConfig
from lion_fast.io.boxes import draw_boxes, parse_boxes
from lion_fast.io.checkpoints import CheckpointError, naming
from lion_fast.io.image_sources import flattened
from lion_fast.io.images import ImageLike, load_each
from lion_fast.io.processor_files import QFORMER_TOKENIZER, expect_processor_files, expect_replacements, load_tokenizer
from lion_fast.io.reading import brief, shown
from lion_fast.io.untrusted import PROCESSOR_FILES, local_folder
from lion_fast.model.chat import ChatMixin
from lion_fast.model.padding import IGNORED
from lion_fast.model.processor_arguments import (
    Settings,
    Tags,
    expect_equal_lengths,
    sorted_settings,
    strings,
    tags_by_sample,
    task_ids,
)
from lion_fast.model.prompts import TAG_SENTENCE
from lion_fast.model.tokenizing import TokenizingMixin, token_id
from lion_fast.tagging.distinct import DistinctTags

Tagger = Callable[[list[Image.Image]], Sequence[Tags]]
"""A function from a list of images to the tags of each: a `RamTagger`, a `ZeroShotTagger` or any other."""


class LionProcessor(TokenizingMixin, ChatMixin, ProcessorMixin):
    """Combines an image processor, the language model's tokenizer and the Q-Former's tokenizer.

    The tokenizers are configured in place. Both truncate on the left. The language model's tokenizer pads on the right
    for an encoder-decoder, and on the left for a decoder-only model, whose answer must follow the prompt's last token.
    It pads with EOS if it has no padding token.

    Args:
        image_processor: squashes, rescales and normalises; `BlipImageProcessorPil` gives exactly the original's pixels.
        tokenizer: tokenizer of the language model.
        qformer_tokenizer: tokenizer of BERT with `[DEC]`, the last token of the Q-Former's vocabulary.
        is_encoder_decoder: whether the language model is an encoder-decoder (T5) or decoder-only (Llama, Qwen).
        soft_prompt_token: token of the tag sentence that the model replaces with its learned vector; None for a model
            without tags.
        max_txt_len: maximum number of tokens of the prompt in training, and of the Q-Former's question always; longer
            texts are truncated on the left.
        max_target_len: maximum number of tokens of the answer, including EOS; longer answers are truncated on the
            right.

    Attributes:
        soft_prompt_token_id: id of `soft_prompt_token`, or None if the tokenizer has no such token.

    Raises:
        ValueError: the tokenizer has no EOS, the tokenizer of a decoder-only model ends every prompt with EOS, or a
            length is below 1.
    """

    qformer_tokenizer: PreTrainedTokenizerBase
    tag_sentence = TAG_SENTENCE  # benchmarks/claims compares others
    parse_boxes = staticmethod(parse_boxes)
    draw_boxes = staticmethod(draw_boxes)

    def __init__(
        self,
        image_processor: BlipImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        qformer_tokenizer: PreTrainedTokenizerBase,
        is_encoder_decoder: bool = True,
        soft_prompt_token: str | None = "<extra_id_0>",
        max_txt_len: int = 128,
        max_target_len: int = 128,
    ):
        # With torchvision installed, from_pretrained loads a processor that resizes with it and gives other pixels.
        pil = image_processor.backend == "pil"
        super().__init__(
            image_processor if pil else BlipImageProcessorPil.from_dict(image_processor.to_dict()),
            tokenizer,
            qformer_tokenizer,
        )
        for name, length in (("max_txt_len", max_txt_len), ("max_target_len", max_target_len)):
            if length < 1:
                raise ValueError(f"{name}: expected 1 or more, got {length}")
        if tokenizer.eos_token is None:
            raise ValueError("tokenizer: expected one with an EOS token to end the answers, got none")
        if not is_encoder_decoder and len(ids := tokenizer("a").input_ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            raise ValueError(
                f"tokenizer: expected prompts of a decoder-only model without EOS, got {tokenizer.eos_token!r} "
                "at their end; load it with add_eos_token=False"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right" if is_encoder_decoder else "left"
        tokenizer.truncation_side = qformer_tokenizer.truncation_side = "left"
        qformer_tokenizer.padding_side = "right"
        self.is_encoder_decoder = is_encoder_decoder
        self.soft_prompt_token = soft_prompt_token
        self.soft_prompt_token_id = token_id(tokenizer, soft_prompt_token)
        self.max_txt_len = max_txt_len
        self.max_target_len = max_target_len

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        text: str | Sequence[str] | None = None,
        tags: Tags | Sequence[Tags] | Tagger = None,
        task: str | Sequence[str] = "image_level",
        text_target: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        allow_urls: bool = False,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """Prepare the model's inputs for B images with one question each.

        The Q-Former reads the question alone; the language model reads the tag sentence, then the question. With
        `text_target`, the prompt is truncated to `max_txt_len` on the left, which removes hint and tags first; without
        it, the prompt is not truncated by default.

        Args:
            images: one image or B images, of any type that `io.images.load_image` reads; each may be in a list of its
                own. None for images that the model has already encoded (`encode_images`), which leaves out
                `pixel_values`.
            text: one question (or instruction) or B questions. None for the images alone, which leaves out all but
                `pixel_values`.
            tags: tags of each image: `"dog, cart, man"`, a list of strings, or None or "" for no tag sentence. None for
                no tags at all. A tagger, such as a `RamTagger`, is called with each distinct image once: with all of a
                batch, or with as many at a time as hold `io.images.MAX_PIXELS` together.
            task: `"image_level"` (captions, questions) or `"region_level"` (boxes), by which the adapters' router
                chooses; one for all samples or one per sample.
            text_target: one answer or B answers, for training.
            return_tensors: `"pt"`, `"np"`, or None for lists.
            allow_urls: whether a string that is an http or https URL is downloaded, as far as the machine's network
                allows. Leave it off for URLs of people you do not trust.
            kwargs: settings as for transformers' processors, also in `text_kwargs`, `images_kwargs` and
                `common_kwargs`. `padding`: True (default, to the longest row), "max_length" or False. `max_length`:
                tokens that prompts are truncated and padded to, `max_txt_len` by default; the Q-Former's question
                never has more than `max_txt_len`. `truncation`: whether prompts are truncated. `pad_to_multiple_of`,
                `padding_side` (of the prompt), `add_special_tokens` (to the prompt). The image processor's settings,
                such as `size` and `do_rescale`.

        Returns:
            `pixel_values` [B, 3, H, W] float32; `input_ids`, `attention_mask` [B, L]; `qformer_input_ids`,
            `qformer_attention_mask` [B, Lq]; `task_ids` [B], 0 region_level, 1 image_level; and with `text_target`
            `labels` [B, Lt], ending with EOS and padded on the right with -100. All but `pixel_values` are int64.

        Raises:
            FileNotFoundError, ValueError, TypeError: an image cannot be read (see `load_image`).
            ValueError: neither images nor text are given, the arguments' lengths differ, a question is blank, a task is
                unknown, the model has no soft prompt for the tags, a question or a tag contains the soft prompt's
                token, a tagger gets no images, or a setting has a value that it does not take.
            TypeError: text, tags or tasks are not strings, or a setting is unknown.
        """
        if not isinstance(allow_urls, bool):
            raise TypeError(f"allow_urls: expected True or False, got {shown(allow_urls)}")
        settings = sorted_settings(kwargs, sorted(self.image_processor.valid_kwargs.__annotations__), return_tensors)
        questions = None if text is None else strings(text, "text")
        tagging = DistinctTags(tags) if callable(tags) else None
        loaded: list[Image.Image] | None = None
        if images is not None:
            loaded = []
            every = flattened(images, 1 if questions is None else len(questions))
            for image in load_each(every, allow_urls=allow_urls):  # one at a time is held at its full size
                if tagging is not None:
                    tagging.add(image)
                loaded.append(image if settings.images else self.resize(image))
        if questions is None:
            return self._images_alone(loaded, settings, {"tags": tags, "text_target": text_target})
        if loaded is not None and len(loaded) != len(questions):
            raise ValueError(
                f"text: expected one question per image, got {len(questions)} for {len(loaded)} images; "
                "repeat an image for each of its questions"
            )
        if not questions:
            raise ValueError("text: expected at least one question, got none")
        if tagging is not None:
            if loaded is None:
                raise ValueError("tags: expected no tagger without images, got one")
            own_tags = tags_by_sample(tagging.of_each(), len(questions), single=False)
        else:
            given: Any = tags
            own_tags = tags_by_sample(given, len(questions), single=isinstance(text, str))
        prompts = [self._prompt(*sample, index) for index, sample in enumerate(zip(questions, own_tags, strict=True))]
        data = self._tokens(prompts, questions, settings, truncation=text_target is not None)
        data["task_ids"] = task_ids(task, len(questions))
        if loaded is not None:
            data["pixel_values"] = self._pixels(loaded, settings)
        if text_target is not None:
            data["labels"] = self._labels(
                strings(text_target, "text_target", len(questions)), padded=settings.padding is not False
            )
        if settings.return_tensors is not None and settings.padding is not True:
            expect_equal_lengths(data, settings)
        return BatchFeature(data, tensor_type=settings.return_tensors)

    def resize(self, image: Image.Image) -> Image.Image:
        """Resize an RGB image to the size of the model's images, which the processor's call then leaves as it is.

        Images can so be reduced one at a time, before they are collected in a batch: the batch has the same pixels as
        that of the full images. An image processor that does not resize to a fixed size gets the image itself.
        """
        process = self.image_processor
        height, width = process.size.height, process.size.width
        if not (process.do_resize and height and width and isinstance(process.resample, int)):
            return image
        return image.resize((width, height), Image.Resampling(process.resample))

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Save as `ProcessorMixin` does; the files do not depend on earlier calls.

        Tokenizers keep the padding and truncation of their last call, and would save them.
        """
        for tokenizer in (self.tokenizer, self.qformer_tokenizer):
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is not None:
                backend.no_padding()
                backend.no_truncation()
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load as `ProcessorMixin` does, but only files that hold data alone.

        `trust_remote_code` has no effect: a directory that asks for code is refused.

        Args:
            pretrained_model_name_or_path: directory, or name on the Hub.
            kwargs: arguments of `ProcessorMixin.from_pretrained`; `max_txt_len`, `size` and other settings replace the
                saved ones.

        Raises:
            ValueError: a setting among the arguments has the wrong type or range.
            CheckpointError: a file asks for code, is damaged or missing, or has a setting of the wrong type or range;
                the message names the file or directory.
            OSError: there is no such directory, nor such a name on the Hub.
        """
        folder = local_folder(pretrained_model_name_or_path, PROCESSOR_FILES, kwargs)
        expect_replacements(kwargs)
        expect_processor_files(folder)
        load_tokenizer(folder)
        load_tokenizer(folder / QFORMER_TOKENIZER)  # transformers would replace it by the other if it cannot be loaded
        with naming(folder, "a directory with LION's processor"):
            return super().from_pretrained(folder, local_files_only=True, trust_remote_code=False, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [
            "pixel_values",
            "input_ids",
            "attention_mask",
            "qformer_input_ids",
            "qformer_attention_mask",
            "task_ids",
        ]

    def _images_alone(
        self, images: list[Image.Image] | None, settings: Settings, others: Mapping[str, Any]
    ) -> BatchFeature:
        if images is None:
            raise ValueError("images: expected images, text or both, got neither")
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name}: expected None without text, got {type(value).__name__}")
        return BatchFeature({"pixel_values": self._pixels(images, settings)}, tensor_type=settings.return_tensors)

    def _pixels(self, images: list[Image.Image], settings: Settings) -> Any:
        process = self.image_processor
        if not settings.images:
            return process(images, return_tensors=settings.return_tensors)["pixel_values"]
        try:
            pixels = process(images, return_tensors=settings.return_tensors, **settings.images)["pixel_values"]
            if not all(np.isfinite(np.asarray(image)).all() for image in pixels):
                raise ValueError("the pixels are not finite")
            return pixels
        except Exception as error:  # it raises anything, such as its own validation's exceptions
            raise ValueError(
                f"images_kwargs: expected settings that {type(process).__name__} takes for these images, got "
                f"{shown(settings.images)} ({brief(error)})"
            ) from error

    def _labels(self, answers: list[str], padded: bool) -> list[list[int]]:
        rows = [
            [*ids[: self.max_target_len - 1], self.tokenizer.eos_token_id]
            for ids in self.tokenizer(answers, add_special_tokens=False).input_ids
        ]
        longest = max(map(len, rows)) if padded else 0
        return [ids + [IGNORED] * (longest - len(ids)) for ids in rows]


def build_processor(
    llm_dir: str | os.PathLike,
    bert_dir: str | os.PathLike,
    image_size: int = 224,
    soft_prompt_token: str | None = "<extra_id_0>",
) -> LionProcessor:
    """Build the processor of a model that is assembled from its parts.

    `[DEC]` is appended to BERT's vocabulary, as in the published Q-Formers. `soft_prompt_token` is added to the
    language model's vocabulary if missing; its id may then lie beyond the model's embedding table.

    Args:
        llm_dir: directory with the language model's `config.json` and tokenizer.
        bert_dir: directory with the tokenizer of the Q-Former's BERT (`bert-base-uncased`).
        image_size: side of the square images in pixels.
        soft_prompt_token: see `LionProcessor`.

    Raises:
        NotADirectoryError: a path is not a directory.
        CheckpointError: a directory has no tokenizer vocabulary, or its files cannot be read.
    """
    for name, path in (("llm_dir", llm_dir), ("bert_dir", bert_dir)):
        if not Path(path).is_dir():
            raise NotADirectoryError(f"{name}: expected a directory with a tokenizer, got {path}")
    tokenizer = load_tokenizer(Path(llm_dir))
    if tokenizer.eos_token is None:
        raise CheckpointError(f"{llm_dir}: expected a tokenizer with an EOS token to end the answers, got one without")
    if soft_prompt_token is not None and token_id(tokenizer, soft_prompt_token) is None:
        tokenizer.add_tokens([AddedToken(soft_prompt_token, normalized=False, special=True)], special_tokens=True)
    qformer_tokenizer = load_tokenizer(Path(bert_dir))
    qformer_tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    with naming(Path(llm_dir) / "config.json", "a readable configuration"):
        config = AutoConfig.from_pretrained(llm_dir, trust_remote_code=False)
    return LionProcessor(
        BlipImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer,
        qformer_tokenizer,
        is_encoder_decoder=config.is_encoder_decoder,
        soft_prompt_token=soft_prompt_token,
    )


AutoProcessor.register(LionConfig, LionProcessor)
