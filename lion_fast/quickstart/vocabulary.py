"""Small tokenizers like those of T5 and BERT, built from the words of the scenes' descriptions."""

import itertools
import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION
from lion_fast.processing_lion import TAG_SENTENCE
from lion_fast.scenes import REGION_INSTRUCTION, TAGS, SceneGenerator

_SOFT_PROMPT = "<extra_id_0>"
_PRINTABLE = [chr(code) for code in range(33, 127)]
_COORDINATE = r"(?:▁?\[|,)[01]\.[0-9][0-9]0"
PHRASES = (
    *LOCATE_INSTRUCTION.split(" {expression} "),
    CAPTION_INSTRUCTION,
    REGION_INSTRUCTION.split(" {box}")[0],
)
_WORD_SCORE, _CHARACTER_SCORE = -1.0, -10.0  # scores for which a known word is never split into characters


def scene_texts(num_scenes: int = 200) -> list[str]:
    """Return instructions, answers and tags of enough scenes to contain every word."""
    scenes = itertools.islice(SceneGenerator(seed=0, image_size=32), num_scenes)
    texts = [text for scene in scenes for sample in scene.samples() for text in (sample.text, sample.answer)]
    tag_lists = [TAG_SENTENCE.format(soft_prompt="", tags=f"{tag}, {tag}") for tag in TAGS]
    return [*texts, *tag_lists]


def build_text_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a T5-like tokenizer: pad 0, EOS 1, words, and tokens for whole instruction phrases and coordinates.

    A coordinate with two significant decimals is one token together with the bracket or comma before it (`[0.440`,
    `,0.060`), so a box has five tokens. Unknown words are split into characters; decoding restores any printable ASCII
    text exactly.
    """
    phrases = [re.escape("▁" + phrase.replace(" ", "▁")) for phrase in PHRASES]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            pre_tokenizers.Split(Regex("|".join([*phrases, _COORDINATE, "▁?[A-Za-z]+", "."])), "isolated"),
        ]
    )
    words = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    words = sorted(words.union(coordinate_tokens("▁["), coordinate_tokens(",")))
    special = ["<pad>", "</s>", "<unk>", _SOFT_PROMPT]
    characters = ["▁", *_PRINTABLE]
    scored = [(token, 0.0) for token in special] + [(character, _CHARACTER_SCORE) for character in characters]
    scored += [(word, _WORD_SCORE) for word in words if word not in characters]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=2))
    tokenizer.pre_tokenizer = split
    strip = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def coordinate_tokens(before: str) -> list[str]:
    """Return the tokens of 0.00, 0.01, ..., 1.00 after a bracket or a comma."""
    return [f"{before}{number / 100:.3f}" for number in range(101)]


def build_qformer_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a BERT-like tokenizer: lower case, WordPiece, `[DEC]` as BOS."""
    normalizer, split = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = sorted({piece for text in texts for piece, _ in split.pre_tokenize_str(normalizer.normalize_str(text))})
    characters = [c for c in _PRINTABLE if not c.isupper()]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", *characters, *(f"##{c}" for c in characters)]
    tokens += [word for word in words if word not in characters]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[DEC]",
    )
