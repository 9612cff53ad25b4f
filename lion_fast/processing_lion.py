"""Convert images, questions, tags and answers to the inputs of `LionForCausalLM`."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    BatchFeature,
    BlipImageProcessorPil,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from lion_fast.configuration_lion import TASKS
from lion_fast.io.boxes import draw_boxes, parse_boxes
from lion_fast.io.checkpoints import CheckpointError, naming
from lion_fast.io.images import ImageLike, load_images

TAG_SENTENCE = "According to {soft_prompt}, you are allowed to use or partially use the following tags: [{tags}]. "
# Without any of these files, a tokenizer silently gets an empty vocabulary.
_VOCABULARY_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")
IGNORED = -100  # label that the loss ignores

Tags = str | Sequence[str] | None
"""Tags of one image: one string in LION's format (`"dog, cart, man"`), one string per tag, or None."""

Tagger = Callable[[list[Image.Image]], Sequence[Tags]]
"""A function from a list of images to the tags of each: a `RamTagger`, a `ZeroShotTagger` or any other."""


class LionProcessor(ProcessorMixin):
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
        self.soft_prompt_token_id = _token_id(tokenizer, soft_prompt_token)
        self.max_txt_len = max_txt_len
        self.max_target_len = max_target_len

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        text: str | Sequence[str],
        tags: Tags | Sequence[Tags] | Tagger = None,
        task: str | Sequence[str] = "image_level",
        text_target: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool = True,
    ) -> BatchFeature:
        """Prepare the model's inputs for B images with one question each.

        The Q-Former reads the question alone; the language model reads the tag sentence, then the question. With
        `text_target`, the prompt is truncated to `max_txt_len` on the left, which removes hint and tags first; without
        it, the prompt is never truncated.

        Args:
            images: one image or B images, of any type that `io.images.load_image` reads; None for images that the model
                has already encoded (`encode_images`), which leaves out `pixel_values`.
            text: one question (or instruction) or B questions.
            tags: tags of each image: `"dog, cart, man"`, a list of strings, or None or "" for no tag sentence. None for
                no tags at all. A tagger, such as a `RamTagger`, is called with each distinct image once.
            task: `"image_level"` (captions, questions) or `"region_level"` (boxes), by which the adapters' router
                chooses; one for all samples or one per sample.
            text_target: one answer or B answers, for training.
            return_tensors: `"pt"`, `"np"`, or None for lists.
            padding: True, as transformers' pipelines pass it: a batch is always padded to its longest sample.

        Returns:
            `pixel_values` [B, 3, H, W] float32; `input_ids`, `attention_mask` [B, L]; `qformer_input_ids`,
            `qformer_attention_mask` [B, Lq]; `task_ids` [B], 0 region_level, 1 image_level; and with `text_target`
            `labels` [B, Lt], ending with EOS and padded on the right with -100. All but `pixel_values` are int64.

        Raises:
            FileNotFoundError, ValueError, TypeError: an image cannot be read (see `load_image`).
            ValueError: the arguments' lengths differ, a question is blank, a task is unknown, the model has no soft
                prompt for the tags, a question or a tag contains the soft prompt's token, or a tagger gets no images.
            TypeError: text, tags or tasks are not strings.
        """
        if padding is not True:
            raise ValueError(f"padding: expected True, got {padding!r}")
        questions = _strings(text, "text")
        images = None if images is None else load_images(images)
        if images is not None and len(images) != len(questions):
            raise ValueError(
                f"text: expected one question per image, got {len(questions)} for {len(images)} images; "
                "repeat an image for each of its questions"
            )
        if callable(tags):
            tags_by_sample = _run_tagger(tags, images)
        else:
            tags_by_sample = _tags_by_sample(tags, len(questions), single=isinstance(text, str))
        prompts = [
            self._prompt(*sample, index) for index, sample in enumerate(zip(questions, tags_by_sample, strict=True))
        ]
        truncation = {"truncation": True, "max_length": self.max_txt_len}
        prompt = self.tokenizer(prompts, padding=True, **(truncation if text_target is not None else {}))
        question = self.qformer_tokenizer(questions, padding=True, **truncation)
        data = {
            "input_ids": prompt["input_ids"],
            "attention_mask": prompt["attention_mask"],
            "qformer_input_ids": question["input_ids"],
            "qformer_attention_mask": question["attention_mask"],
            "task_ids": _task_ids(task, len(questions)),
        }
        if images is not None:
            data["pixel_values"] = self.image_processor(images, return_tensors=return_tensors)["pixel_values"]
        if text_target is not None:
            data["labels"] = self._labels(_strings(text_target, "text_target", len(questions)))
        return BatchFeature(data, tensor_type=return_tensors)

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

    def _prompt(self, question: str, tags: str, index: int) -> str:
        if not question.strip():
            raise ValueError(f"text[{index}]: expected a question or an instruction, got {question!r}")
        for name, value in (("text", question), ("tags", tags)):
            if self.soft_prompt_token is not None and self.soft_prompt_token in value:
                raise ValueError(
                    f"{name}[{index}]: expected text without {self.soft_prompt_token!r}, the token of the soft prompt, "
                    f"got {value!r}"
                )
        if not tags:
            return question
        if self.soft_prompt_token_id is None:
            raise ValueError(
                f"tags[{index}]: expected none, as the tokenizer has no token for the soft prompt "
                f"(soft_prompt_token={self.soft_prompt_token!r}), got {tags!r}"
            )
        return self.tag_sentence.format(soft_prompt=self.soft_prompt_token, tags=tags) + question

    def _labels(self, answers: list[str]) -> list[list[int]]:
        rows = [
            [*ids[: self.max_target_len - 1], self.tokenizer.eos_token_id]
            for ids in self.tokenizer(answers, add_special_tokens=False).input_ids
        ]
        longest = max(map(len, rows))
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
    tokenizer = _tokenizer(Path(llm_dir))
    if soft_prompt_token is not None and _token_id(tokenizer, soft_prompt_token) is None:
        tokenizer.add_tokens([AddedToken(soft_prompt_token, normalized=False, special=True)], special_tokens=True)
    qformer_tokenizer = _tokenizer(Path(bert_dir))
    qformer_tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    with naming(Path(llm_dir) / "config.json", "a readable configuration"):
        is_encoder_decoder = AutoConfig.from_pretrained(llm_dir).is_encoder_decoder
    return LionProcessor(
        BlipImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer,
        qformer_tokenizer,
        is_encoder_decoder=is_encoder_decoder,
        soft_prompt_token=soft_prompt_token,
    )


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    if not any((directory / name).is_file() for name in _VOCABULARY_FILES):
        raise CheckpointError(f"{directory}: expected a tokenizer's {', '.join(_VOCABULARY_FILES)}, found none of them")
    with naming(directory, "a readable tokenizer"):
        return AutoTokenizer.from_pretrained(directory)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str | None) -> int | None:
    """Return the token's id, or None if the tokenizer does not map it to one token."""
    if token is None:
        return None
    ids = tokenizer(token, add_special_tokens=False).input_ids
    return next((i for i in ids if tokenizer.convert_ids_to_tokens(i) == token), None)


def _strings(value: object, name: str, count: int | None = None) -> list[str]:
    """Return `value` as a list of strings, checking their number if `count` is given."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise TypeError(f"{name}: expected a string or a list of strings, got {type(value).__name__}")
    for i, string in enumerate(value):
        if not isinstance(string, str):
            raise TypeError(f"{name}[{i}]: expected a string, got {type(string).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in string):
            raise ValueError(f"{name}[{i}]: expected text that UTF-8 can hold, got half a surrogate pair in {string!r}")
    if count is not None:
        _check_count(value, name, count)
    return list(value)


def _check_count(values: Sequence, name: str, count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name}: expected one per image ({count}), got {len(values)}")


def _tags_by_sample(tags: Tags | Sequence[Tags], count: int, single: bool) -> list[str]:
    """Return each sample's tags as one string, "" for none. In a `single` call, a flat list belongs to its sample."""
    if tags is None:
        return [""] * count
    if not isinstance(tags, Sequence):
        raise TypeError(
            f"tags: expected None, a string, a list with one entry per image or a tagger, got {type(tags).__name__}"
        )
    of_one_sample = isinstance(tags, str) or (single and all(isinstance(tag, str) for tag in tags))
    entries = [tags] if of_one_sample else tags
    _check_count(entries, "tags", count)
    return ["" if entry is None else _joined_tags(entry, f"tags[{i}]") for i, entry in enumerate(entries)]


def _run_tagger(tagger: Tagger, images: list[Image.Image] | None) -> list[str]:
    """Return a tagger's tags of each image as one string; equal images are tagged once."""
    if images is None:
        raise ValueError("tags: expected no tagger without images, got one")
    contents = [(image.size, image.tobytes()) for image in images]
    distinct = dict(zip(contents, images, strict=True))
    found = tagger(list(distinct.values()))
    if isinstance(found, str) or len(found) != len(distinct):
        raise ValueError(f"tags: expected one entry from the tagger for each of {len(distinct)} images, got {found!r}")
    tags = dict(zip(distinct, _tags_by_sample(found, len(found), single=False), strict=True))
    return [tags[content] for content in contents]


def _joined_tags(tags: object, name: str) -> str:
    joined = ", ".join(_strings(tags, name))
    return joined if joined.strip() else ""


def _task_ids(task: str | Sequence[str], count: int) -> list[int]:
    names = [task] * count if isinstance(task, str) else _strings(task, "task", count)
    for name in names:
        if name not in TASKS:
            raise ValueError(f"task: expected {' or '.join(map(repr, TASKS))}, got {name!r}")
    return [TASKS.index(name) for name in names]
