"""What the arguments of `generate` may be, besides the model's inputs, and which of them wins over the checkpoint's."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerBase,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from lion_fast.configuration_lion import LionConfig
from lion_fast.io.reading import shown
from lion_fast.model.inputs import expect_attention_weights, expect_cache
from lion_fast.model.validation import is_integer, is_number

MAX_NEW_TOKENS = 1 << 20
"""Largest length: beam search allocates memory for all tokens that it may generate."""
MAX_SEQUENCES = 1 << 12
"""Largest number of beams or sequences per sample."""


class Rule(NamedTuple):
    """What an argument may be.

    Args:
        expected: the same in words.
        fits: whether a value may be given, for a language model of so many tokens.
    """

    expected: str
    fits: Callable[[Any, int], bool]


def _integers(low: int, high: int | None = None) -> Rule:
    expected = f"an integer of {low} or more" if high is None else f"an integer in {low}..{high}"
    return Rule(expected, lambda value, _: is_integer(value, low, float("inf") if high is None else high))


def _numbers(low: float, high: float | None = None) -> Rule:
    expected = f"a number of {low:g} or more" if high is None else f"a number in {low:g}..{high:g}"
    return Rule(expected, lambda value, _: is_number(value, low, float("inf") if high is None else high))


def _is_token(value: Any, vocabulary: int) -> bool:
    return is_integer(value, 0, vocabulary - 1)


def _are_tokens(value: Any, vocabulary: int) -> bool:
    return isinstance(value, list | tuple) and all(_is_token(token, vocabulary) for token in value)


def _are_words(value: Any, vocabulary: int) -> bool:
    words = isinstance(value, list | tuple) and all(isinstance(word, list | tuple) and word for word in value)
    return words and len(value) > 0 and all(_are_tokens(word, vocabulary) for word in value)


def _are_ends(value: Any, vocabulary: int) -> bool:
    """Return whether values are ids of EOS: -1 is none, and a list or a tensor holds several."""
    if isinstance(value, Tensor):
        value = value.tolist() if value.numel() < vocabulary and not value.is_meta else None
    ends = value if isinstance(value, list | tuple) and value else [value]
    return all(is_integer(end, -1, vocabulary - 1) for end in ends)


def _are_starts(value: Any, vocabulary: int) -> bool:
    return _is_token(value, vocabulary) or (_are_tokens(value, vocabulary) and len(value) > 0)


def _are_biases(value: Any, vocabulary: int) -> bool:
    if isinstance(value, dict):
        value = [[key, bias] for key, bias in value.items()]
    pairs = isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
    return pairs and len(value) > 0 and all(_are_words([key], vocabulary) and is_number(bias) for key, bias in value)


def _decays(value: Any, _: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and is_integer(value[0], 0) and is_number(value[1], 1e-9)


def _are_callable(value: Any, _: int) -> bool:
    return isinstance(value, list) and all(callable(entry) for entry in value)


def _may_be_cache(value: Any, _: int) -> bool:
    if not isinstance(value, str) or value in ("paged", "quantized"):
        return False
    return torch.cuda.is_available() or value not in ("offloaded", "offloaded_static", "offloaded_hybrid")


def _are_strings(value: Any, _: int) -> bool:
    strings = value if isinstance(value, list | tuple) else [value]
    return len(strings) > 0 and all(isinstance(string, str) and string for string in strings)


def _watermarks(value: Any, _: int) -> bool:
    """Return whether transformers can make a watermark of a value; its own errors name no argument."""
    try:
        config = WatermarkingConfig.from_dict(value) if isinstance(value, dict) else value
        if not isinstance(config, WatermarkingConfig | SynthIDTextWatermarkingConfig):
            return False
        config.validate()
    except (TypeError, ValueError):
        return False
    return isinstance(config, SynthIDTextWatermarkingConfig) or is_number(config.bias)


def _may_synchronise(value: Any, _: int) -> bool:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return isinstance(value, bool) and (ready or not value)


_FLAG = Rule("True or False", lambda value, _: isinstance(value, bool))
_TOKEN = Rule("the id of a token", _is_token)
_TOKENS = Rule("a list of ids of tokens", _are_tokens)
_STARTS = Rule("the id of a token, or a list of them", _are_starts)
_LENGTH = _integers(1, MAX_NEW_TOKENS)
_LOWER_LENGTH = _integers(0, MAX_NEW_TOKENS)
_COUNT = _integers(1, MAX_SEQUENCES)
_PROBABILITY = _numbers(0, 1)
_PENALTY = _numbers(1e-9)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("max_length", "max_new_tokens"), _LENGTH),
    **dict.fromkeys(("min_length", "min_new_tokens"), _LOWER_LENGTH),
    **dict.fromkeys(("num_beams", "num_return_sequences"), _COUNT),
    **dict.fromkeys(("top_p", "min_p", "epsilon_cutoff", "eta_cutoff", "top_h"), _PROBABILITY),
    "typical_p": _numbers(1e-9, 1),
    "max_cache_len": _integers(1, MAX_NEW_TOKENS),
    "repetition_penalty": _PENALTY,
    **dict.fromkeys(("no_repeat_ngram_size", "top_k"), _integers(0)),
    **dict.fromkeys(("temperature", "max_time"), _numbers(0)),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), _TOKEN),
    **dict.fromkeys(("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"), _STARTS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _TOKENS),
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size"), _integers(1, MAX_SEQUENCES)),
    **dict.fromkeys(
        (
            "do_sample",
            "use_cache",
            "renormalize_logits",
            "remove_invalid_values",
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "output_logits",
            "return_dict_in_generate",
            "disable_compile",
        ),
        _FLAG,
    ),
    # transformers divides by length ** length_penalty, which a float has to hold: (2 ** 20) ** 40 is 2 ** 800.
    "length_penalty": _numbers(-40, 40),
    "early_stopping": Rule(
        "True, False or 'never'",
        lambda value, _: isinstance(value, bool) or (isinstance(value, str) and value == "never"),
    ),
    "eos_token_id": Rule("the id of a token, or a list of them", _are_ends),
    "bad_words_ids": Rule("a list of lists of ids of tokens", _are_words),
    "sequence_bias": Rule("a dict from tuples of ids of tokens to numbers", _are_biases),
    "exponential_decay_length_penalty": Rule("a start and a factor above 0", _decays),
    "generation_config": Rule("a GenerationConfig", lambda value, _: isinstance(value, GenerationConfig)),
    "streamer": Rule("an object with put and end", lambda value, _: hasattr(value, "put") and hasattr(value, "end")),
    "prefix_allowed_tokens_fn": Rule("a function", lambda value, _: callable(value)),
    **dict.fromkeys(("logits_processor", "stopping_criteria"), Rule("a list of functions", _are_callable)),
    "tokenizer": Rule("a tokenizer of transformers", lambda value, _: isinstance(value, PreTrainedTokenizerBase)),
    "stop_strings": Rule("a string or a list of strings", _are_strings),
    "compile_config": Rule("a CompileConfig", lambda value, _: isinstance(value, CompileConfig)),
    "cache_implementation": Rule(
        "the name of a cache that fits embeddings ('static', 'dynamic'; 'offloaded' with a GPU)", _may_be_cache
    ),
    "synced_gpus": Rule("a flag, True only within torch.distributed", _may_synchronise),
    "watermarking_config": Rule("a WatermarkingConfig, a SynthIDTextWatermarkingConfig or a dict of one", _watermarks),
}

_OF_TEXT = "LION's prompt has embeddings in place of ids"
_FROM_HUB = "its code is not part of transformers"
_OF_ASSISTANT = "it is a setting of assisted generation, which would need the image"
# Arguments of transformers' `generate` that have no effect or a wrong one here, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "inputs": ((), "the inputs are pixel_values, input_ids and so on"),
    "assistant_model": ((), "an assistant would need the image; prompt_lookup_num_tokens needs none"),
    "assistant_tokenizer": ((), "an assistant would need the image; prompt_lookup_num_tokens needs none"),
    "assistant_early_exit": ((), "an assistant would need the image; prompt_lookup_num_tokens needs none"),
    "is_assistant": ((False,), _OF_ASSISTANT),
    # Some versions of transformers write these values of theirs to each checkpoint.
    "num_assistant_tokens": ((20,), _OF_ASSISTANT),
    "num_assistant_tokens_schedule": (("constant",), _OF_ASSISTANT),
    "assistant_confidence_threshold": ((0.4,), _OF_ASSISTANT),
    "assistant_ensemble_weight": ((), _OF_ASSISTANT),
    "assistant_lookbehind": ((10,), _OF_ASSISTANT),
    "target_lookbehind": ((10,), _OF_ASSISTANT),
    "encoder_repetition_penalty": ((1, 1.0), _OF_TEXT),
    "encoder_no_repeat_ngram_size": ((0,), _OF_TEXT),
    "cache_config": ((), "it configures quantized caches, which do not fit embeddings"),
    "speculation_type": ((), "the language models have no heads for it"),
    "continuous_batching_config": ((), _OF_TEXT),
    "low_memory": ((False,), _FROM_HUB),
    "use_mtp": ((False,), "the language models have no heads for it"),
    "guidance_scale": ((1, 1.0), _OF_TEXT),
    "negative_prompt_ids": ((), _OF_TEXT),
    "negative_prompt_attention_mask": ((), _OF_TEXT),
    "prefill_chunk_size": ((), _OF_TEXT),
    "token_healing": ((False,), _OF_TEXT),
    "custom_generate": ((), "no code is loaded"),
    "trust_remote_code": ((False,), "no code is loaded"),
    "penalty_alpha": ((0, 0.0), _FROM_HUB),
    "dola_layers": ((), _FROM_HUB),
    "num_beam_groups": ((1,), _FROM_HUB),
    "diversity_penalty": ((0, 0.0), _FROM_HUB),
    "constraints": ((), _FROM_HUB),
    "force_words_ids": ((), _FROM_HUB),
    "return_dict": ((), "return_dict_in_generate selects the output"),
    "inputs_only": ((), "it is an argument of forward"),
    "logits_to_keep": ((), "generate sets it"),
    "position_ids": ((), "they follow from attention_mask"),
    "cache_position": ((), "it follows from attention_mask"),
    "decoder_inputs_embeds": ((), "generate continues decoder_input_ids"),
}


@cache
def _known() -> frozenset[str]:
    """Return the names of all arguments that `LionForCausalLM.generate` takes in its keyword arguments."""
    settings = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    signature = inspect.signature(GenerationMixin.generate)  # type: ignore[misc]
    own = {name for name in signature.parameters if name not in ("self", "kwargs")}
    inputs = {"encoder_outputs", "decoder_input_ids", "decoder_attention_mask", "past_key_values", "tokenizer"}
    return frozenset({*settings, *own, *inputs, *RULES, *UNSUPPORTED} - {"transformers_version"})


_FLOATS = (
    "repetition_penalty",
    "temperature",
    "typical_p",
    "min_p",
    "top_p",
    "length_penalty",
)


def expect_generation_arguments(
    config: LionConfig, defaults: GenerationConfig, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Check the arguments of a call, a `generation_config` among them, and the checkpoint's defaults.

    Returns:
        The call's arguments, with Python's numbers for NumPy's, and floats where transformers does not take integers.

    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument has a value that it does not take, or is not supported.
    """
    for name in given:
        if name not in _known():
            raise TypeError(f"{name}: unexpected argument of generate")
    given = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    given = {name: value for name, value in given.items() if name not in UNSUPPORTED or not _is_empty(value)}
    vocabulary = config.text_config.vocab_size
    own = given.get("generation_config")
    for name, (neutral, reason) in UNSUPPORTED.items():
        value = _first(name, given, own, defaults)
        if value is None or _is_empty(value):
            continue
        if not (isinstance(value, bool | int | float | str) and value in neutral):
            raise ValueError(f"{name}: not supported, because {reason}; got {shown(value)}")
    for name, rule in RULES.items():
        value = _first(name, given, own, defaults)
        if value is not None and not rule.fits(value, vocabulary):
            raise ValueError(f"{name}: expected {rule.expected}, got {shown(value)}")
    if "past_key_values" in given:
        expect_cache(config, given["past_key_values"])
    start = given.get("decoder_start_token_id", getattr(own, "decoder_start_token_id", None))
    if start is not None and not config.is_encoder_decoder:
        raise ValueError(f"decoder_start_token_id: expected None for a decoder-only language model, got {shown(start)}")
    if _first("stop_strings", given, own, defaults) is not None and "tokenizer" not in given:
        raise ValueError("tokenizer: expected the processor's tokenizer with stop_strings, got None")
    if _first("output_attentions", given, own, defaults):
        expect_attention_weights(config)
    numbers = {name: _first(name, given, own, defaults) for name in _FLOATS}
    checked = {**given, **{name: float(n) for name, n in numbers.items() if n is not None and type(n) is not float}}
    if "prefix_allowed_tokens_fn" in given:
        checked["prefix_allowed_tokens_fn"] = _checked_prefixes(given["prefix_allowed_tokens_fn"], vocabulary)
    return checked


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value


def _checked_prefixes(allowed: Callable[[int, Tensor], Any], vocabulary: int) -> Callable[[int, Tensor], Any]:
    """Return `prefix_allowed_tokens_fn` with a check of what it returns, in which transformers only looks up."""

    def checked(sample: int, ids: Tensor) -> Any:
        tokens = allowed(sample, ids)
        if not isinstance(tokens, Tensor) and not _are_tokens(tokens, vocabulary):
            raise ValueError(
                f"prefix_allowed_tokens_fn: expected a list of ids from 0 to {vocabulary - 1}, got {shown(tokens)}"
            )
        return tokens

    return checked


def expect_fitting_rows(given: Mapping[str, Any], defaults: GenerationConfig, rows: int, begun: int) -> None:
    """Check the arguments of `generate` that have to fit its input.

    Args:
        given: the call's arguments.
        defaults: the checkpoint's settings.
        rows: number of samples.
        begun: number of tokens that the language model reads before its first answer: those of [visual | text] for a
            decoder-only model, those of `decoder_input_ids` for an encoder-decoder.

    Raises:
        ValueError: an argument does not fit.
    """
    own = given.get("generation_config")
    if rows > 1 and _first("prompt_lookup_num_tokens", given, own, defaults) is not None:
        raise ValueError(f"prompt_lookup_num_tokens: expected None with more than one sample, got {rows} samples")
    starts = _first("decoder_start_token_id", given, own, defaults)
    if isinstance(starts, list | tuple) and len(starts) != rows:
        raise ValueError(
            f"decoder_start_token_id: expected an id or a list of {rows}, one per sample, got {len(starts)}"
        )
    cached = given["past_key_values"].get_seq_length() if "past_key_values" in given else 0
    if cached >= begun:
        raise ValueError(
            f"past_key_values: expected an empty cache, or one of fewer tokens than the {begun} before the answer, "
            f"got one of {int(cached)}"
        )


def _first(name: str, given: Mapping[str, Any], own: Any, defaults: GenerationConfig) -> Any:
    """Return the value that holds: that of the call, of its `generation_config`, or of the checkpoint."""
    value = given.get(name)
    if value is None and own is not None:
        value = getattr(own, name, None)
    return getattr(defaults, name, None) if value is None else value


# Two settings of one bound, of which transformers takes the first, also where it is the checkpoint's.
_RIVALS = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))
TOP_P = 0.9
"""LION's own for sampling; beam search would warn of it in the checkpoint's defaults."""


def let_the_call_win(
    settings: GenerationConfig, own: GenerationConfig | None, given: Mapping[str, Any], defaults: GenerationConfig
) -> None:
    """Drop the checkpoint's value of a bound from the settings of a call that asks for the bound's other form.

    Args:
        settings: merged settings of the call, which are changed.
        own: the call's `generation_config`.
        given: the call's further arguments.
        defaults: the checkpoint's settings.
    """
    for first, second in _RIVALS:
        if _asked(second, given, own) and not _asked(first, given, own):
            setattr(settings, first, None)
        elif _asked(first, given, own) and not _asked(second, given, own):
            setattr(settings, second, None)
    if settings.do_sample and not _asked("top_p", given, own) and defaults.top_p is None:
        settings.top_p = TOP_P


def count_the_answer_alone(
    settings: GenerationConfig,
    own: GenerationConfig | None,
    given: Mapping[str, Any],
    defaults: GenerationConfig,
    prompt: int,
) -> None:
    """Add the prompt's length to the bounds that are asked for, because transformers' bounds include the prompt."""
    if settings.max_length is not None and (_asked("max_length", given, own) or defaults.max_length is not None):
        settings.max_length += prompt
    if _asked("min_length", given, own):
        settings.min_length += prompt


def _asked(name: str, given: Mapping[str, Any], own: GenerationConfig | None) -> bool:
    return given.get(name) is not None or getattr(own, name, None) is not None
