"""What the model's calls take and refuse: arguments of `forward` and `generate`, other dtypes, padding on any side."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    StaticCache,
)
from transformers.modeling_outputs import BaseModelOutput

from lion_fast import ImageFeatures
from tests.extras import needs
from tests.lion_fast.tiny import Batch, make_batch, make_model, without_labels

FAMILIES = ("t5", "llama")
SHORT = {"num_beams": 2, "max_new_tokens": 5}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def padded(batch: Batch, place: int, count: int = 2) -> dict[str, Tensor]:
    """Insert padding into the text and the question at `place`, and before or behind the answers."""

    def inserted(rows: Tensor, value: int) -> Tensor:
        return torch.cat([rows[:, :place], torch.full((len(rows), count), value), rows[:, place:]], dim=1)

    changed = dict(batch)
    for ids, mask in (("input_ids", "attention_mask"), ("qformer_input_ids", "qformer_attention_mask")):
        changed[ids] = inserted(batch[ids], 7)
        changed[mask] = inserted(torch.ones_like(batch[ids]), 0)
    if "labels" in batch:
        changed["labels"] = pad(batch["labels"], (2, 1) if place == 0 else (0, 3), value=-100)
    return changed


@pytest.mark.parametrize("place", [0, 3, 9])
def test_padding_may_stand_on_any_side(model: Any, place: int) -> None:
    """Left, right and in between give the same bits of loss and the same tokens as no padding."""
    batch = make_batch(labels=True)
    changed = padded(batch, place)
    out = model(**changed)
    torch.testing.assert_close(out.loss, model(**batch).loss)
    targets = changed["labels"] != -100
    torch.testing.assert_close(out.logits[targets], model(**batch).logits.flatten(0, 1))
    expected = model.generate(**without_labels(batch), **SHORT)
    assert torch.equal(model.generate(**without_labels(changed), **SHORT), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint32])
def test_ids_of_any_integer_dtype(model: Any, dtype: torch.dtype) -> None:
    batch = make_batch(labels=True, masks=True)
    narrow = {name: value if value.is_floating_point() else value.to(dtype) for name, value in batch.items()}
    expected = model(**batch)
    assert torch.equal(model(**narrow).loss, expected.loss)
    answers = model.generate(**without_labels(batch), **SHORT)
    assert torch.equal(model.generate(**without_labels(narrow), **SHORT), answers)
    model.fold_adapters()
    assert torch.equal(model.generate(**without_labels(narrow), **SHORT), answers)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.int8])
def test_masks_of_any_dtype(model: Any, dtype: torch.dtype) -> None:
    batch = padded(make_batch(), 0)
    changed = {name: value.to(dtype) if "mask" in name else value for name, value in batch.items()}
    assert torch.equal(model.generate(**changed, **SHORT), model.generate(**batch, **SHORT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention_mask": torch.full((3, 7), 5)},
            r"attention_mask: expected 1 at tokens and 0 at padding, got \[5\]",
        ),
        (
            {"attention_mask": torch.full((3, 7), -1e9)},
            r"attention_mask: expected 1 at tokens .* got \[-1000000000.0\]",
        ),
        ({"attention_mask": torch.full((3, 7), torch.nan)}, "attention_mask: expected 1 at tokens"),
        (
            {"attention_mask": torch.ones(3, 7, dtype=torch.complex64)},
            "attention_mask: expected a mask of zeros and ones",
        ),
        ({"qformer_attention_mask": torch.full((3, 5), 2)}, "qformer_attention_mask: expected 1 at tokens"),
        ({"input_ids": torch.ones(3, 7)}, "input_ids: expected integers, got torch.float32"),
        ({"task_ids": torch.zeros(3, dtype=torch.bool)}, "task_ids: expected integers, got torch.bool"),
        ({"labels": torch.full((3, 4), 200, dtype=torch.uint8)}, r"labels: expected ids in 0..63, got \[200\]"),
        ({"labels": torch.ones(3, 4).to_sparse()}, "labels: expected a plain dense tensor"),
        ({"pixel_values": torch.full((3, 3, 28, 28), torch.nan)}, "pixel_values: expected finite values"),
        ({"pixel_values": torch.zeros(3, 3, 28, 28, dtype=torch.uint8)}, "pixel_values: expected a floating dtype"),
        ({"pixel_values": [1]}, r"pixel_values: expected a tensor \[B, 3, 28, 28\], got list"),
        ({"pixel_values": torch.zeros(0, 3, 28, 28)}, "pixel_values: expected one image or more, got none"),
        ({"input_ids": torch.ones(3, 7, device="meta").long()}, "input_ids: expected a tensor with values"),
        ({"pixel_values": torch.ones(3, 3, 28, 28, device="meta")}, "pixel_values: expected a tensor with values"),
        (
            {"inputs_embeds": torch.ones(3, 7, 32)},
            "inputs_embeds: expected either input_ids or inputs_embeds, got both",
        ),
        ({"decoder_input_ids": torch.ones(3, 5).long()}, r"decoder_input_ids: expected \[3, 4\], got \[3, 5\]"),
        ({"decoder_input_ids": torch.ones(3, 4).long(), "decoder_inputs_embeds": torch.ones(3, 4, 32)}, "got both"),
        ({"encoder_outputs": (torch.ones(3, 5, 32),)}, r"encoder_outputs.last_hidden_state: expected \[3, 16, 32\]"),
        ({"output_attentions": True}, "output_attentions: expected False with attn_implementation='lion_kernels'"),
        ({"logits_to_keep": 1}, "logits_to_keep: expected None for an encoder-decoder, got 1"),
        ({"num_items_in_batch": 10**20}, r"num_items_in_batch: expected less than 2\*\*63, got 1"),
        ({"num_items_in_batch": 0}, "num_items_in_batch: expected 1 or more, got 0"),
    ],
)
def test_an_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(**{**make_batch(labels=True), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": torch.ones(3, 7)}, "position_ids: unexpected argument; expected some of use_cache"),
        ({"use_cache": "yes"}, "use_cache: expected True or False, got 'yes'"),
        ({"past_key_values": 3}, "past_key_values: expected a Cache of transformers, got 3"),
        ({"num_items_in_batch": "3"}, "num_items_in_batch: expected an integer of 1 or more, got '3'"),
    ],
)
def test_an_argument_of_another_type_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_model()(**{**make_batch(labels=True), **change})


def test_a_decoder_only_model_needs_a_token_in_each_row() -> None:
    batch = {**make_batch(), "attention_mask": torch.zeros(3, 7)}
    with pytest.raises(ValueError, match="attention_mask: expected a token in each row"):
        make_model("llama").generate(**batch)
    empty = {**batch, "input_ids": batch["input_ids"][:, :0], "attention_mask": torch.ones(3, 0)}
    t5 = make_model()
    assert torch.equal(t5.generate(**batch, **SHORT), t5.generate(**empty, **SHORT))


def test_embeddings_replace_the_text(model: Any) -> None:
    batch = padded(make_batch(labels=True), 0)
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    embedded = model.embed_text(batch["input_ids"]).detach()
    assert torch.equal(model(**rest, inputs_embeds=embedded).loss, model(**batch).loss)
    expected = model.generate(**without_labels(batch), **SHORT)
    assert torch.equal(model.generate(**without_labels(rest), inputs_embeds=embedded, **SHORT), expected)
    embedded.requires_grad_()
    model(**rest, inputs_embeds=embedded).loss.backward()
    assert embedded.grad is not None
    assert embedded.grad[batch["attention_mask"] == 1].abs().sum() > 0


def test_embeddings_of_the_answer() -> None:
    model, batch = make_model(), make_batch(labels=True)
    ids = model.language_model.prepare_decoder_input_ids_from_labels(batch["labels"])
    out = model(**batch, decoder_inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(out.loss, model(**batch).loss)


def test_encodings_and_a_cache_continue_an_answer() -> None:
    model, batch = make_model(), make_batch()
    begun = torch.tensor([[0, 20, 21]] * 3)
    whole = model(**batch, decoder_input_ids=begun).logits
    first = model(**batch, decoder_input_ids=begun[:, :2], use_cache=True).language_model_outputs
    encoded = BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state)
    rest = {"past_key_values": first.past_key_values, "encoder_outputs": encoded}
    step = model(**batch, decoder_input_ids=begun[:, 2:], **rest).logits
    torch.testing.assert_close(step, whole[:, 2:])


def caches(model: Any, *kinds: Any) -> Any:
    """Make a cache of the kinds of self- and cross-attention, or a single one."""
    made = [kind(config=model.language_model.config, **LONG if kind is StaticCache else {}) for kind in kinds]
    return EncoderDecoderCache(*made) if len(made) == 2 else made[0]


LONG = {"max_cache_len": 32}
APART = [DynamicCache, DynamicCache]


@pytest.mark.parametrize(
    ("family", "kinds", "message"),
    [
        ("t5", [DynamicCache], "expected an EncoderDecoderCache for an encoder-decoder, got DynamicCache"),
        ("t5", [StaticCache], "expected an EncoderDecoderCache for an encoder-decoder, got StaticCache"),
        ("t5", [StaticCache, StaticCache], "expected a cross-attention cache that grows .* got StaticCache"),
        ("llama", APART, "expected a cache of a decoder-only language model, got an EncoderDecoderCache"),
    ],
)
def test_a_cache_of_another_kind_is_named(family: str, kinds: Any, message: str) -> None:
    """transformers takes them, and T5 gives other logits without an error."""
    model, batch = make_model(family), make_batch(labels=True)
    with pytest.raises(ValueError, match=f"past_key_values: {message}"):
        model.generate(**without_labels(batch), past_key_values=caches(model, *kinds), **SHORT)
    if family == "t5":
        with pytest.raises(ValueError, match=f"past_key_values: {message}"):
            model(**batch, past_key_values=caches(model, *kinds))


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("t5", APART), ("t5", [StaticCache, DynamicCache]), ("llama", [DynamicCache]), ("llama", [StaticCache])],
)
def test_a_cache_of_ones_own(family: str, kinds: Any) -> None:
    model, batch = make_model(family), make_batch()
    cache = caches(model, *kinds)
    assert torch.equal(model.generate(**batch, **SHORT, past_key_values=cache), model.generate(**batch, **SHORT))
    with pytest.raises(ValueError, match="past_key_values: expected an empty cache, or one of fewer tokens"):
        model.generate(**batch, **SHORT, past_key_values=cache)


def test_a_returned_cache_continues_the_answer() -> None:
    model, batch = make_model(), make_batch()
    search = {"num_beams": 1, "repetition_penalty": 1.0, "suppress_tokens": [1]}
    begun = model.generate(**batch, **search, max_new_tokens=5, return_dict_in_generate=True)
    rest = {"past_key_values": begun.past_key_values, "decoder_input_ids": begun.sequences}
    whole = model.generate(**batch, **search, max_new_tokens=9)
    assert len(set(whole[0].tolist())) > 3
    assert torch.equal(model.generate(**batch, **search, **rest, max_new_tokens=4), whole)


@pytest.mark.parametrize("returns", [False, None])
def test_a_tuple_instead_of_an_output(model: Any, returns: bool | None) -> None:
    batch = make_batch(labels=True)
    expected = model(**batch)
    model.config.return_dict = returns is not None
    got = model(**batch, return_dict=returns)
    assert isinstance(got, tuple)
    assert torch.equal(got[0], expected.loss)
    assert torch.equal(got[1], expected.logits)
    assert model.generate(**without_labels(batch), **SHORT).shape[0] == 3
    assert type(model(**batch, return_dict=True)) is type(expected)


def test_attention_weights_and_hidden_states(model: Any) -> None:
    model.set_attn_implementation("eager")
    batch = make_batch(labels=True)
    outputs = model(**batch, output_attentions=True, output_hidden_states=True).language_model_outputs
    name = "decoder_" if model.config.is_encoder_decoder else ""
    assert len(outputs[f"{name}attentions"]) == 2
    assert len(outputs[f"{name}hidden_states"]) == 3
    given = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    out = model.generate(**without_labels(batch), **SHORT, **given)
    assert len(out[f"{name}attentions"]) >= 1


@pytest.mark.parametrize("way", ["argument", "configuration"])
def test_a_length_in_the_call_wins(model: Any, way: str) -> None:
    """The checkpoint's `max_new_tokens` is 256."""
    batch = make_batch()
    for lengths, expected in (({"max_length": 4, "min_length": 4}, 4), ({"max_length": 9, "min_length": 9}, 9)):
        given: dict[str, Any] = lengths
        if way == "configuration":
            given = {"generation_config": GenerationConfig(**lengths)}
        assert model.generate(**batch, **given).shape == (3, expected)
    model.generation_config.update(max_new_tokens=None, max_length=6, min_length=None, min_new_tokens=9)
    start = int(model.config.is_encoder_decoder)
    assert model.generate(**batch).shape[1] == 6
    assert model.generate(**batch, max_new_tokens=3).shape[1] == 3 + start
    assert model.generate(**batch, max_new_tokens=12, min_length=12 + start).shape[1] == 12 + start


def test_a_sampling_threshold_of_the_call_or_checkpoint_wins() -> None:
    model, batch = make_model(), make_batch()
    own = GenerationConfig(do_sample=True, num_beams=1, max_new_tokens=6)

    def sampled(**settings: Any) -> Tensor:
        torch.manual_seed(0)
        return model.generate(**batch, **settings)

    little, much = (sampled(do_sample=True, num_beams=1, max_new_tokens=6, top_p=top_p) for top_p in (0.05, 0.9))
    assert not torch.equal(little, much)
    assert torch.equal(sampled(generation_config=own), much)
    assert torch.equal(sampled(generation_config=GenerationConfig(top_p=0.05, **own.to_diff_dict())), little)
    model.generation_config.top_p = 0.05
    assert torch.equal(sampled(do_sample=True, num_beams=1, max_new_tokens=6), little)


def test_trainer_obeys_its_generation_length(tmp_path: Any) -> None:
    needs("accelerate", "train")
    model, batch = make_model(), make_batch(labels=True)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=True,
        generation_max_length=4,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )

    def rows(indices: list[int]) -> dict[str, Tensor]:
        return {name: value[indices] for name, value in batch.items()}

    trainer = Seq2SeqTrainer(model, arguments, data_collator=rows)
    predictions = trainer.predict([0, 1, 2]).predictions  # type: ignore[arg-type]
    assert predictions[:, 1:4].any(1).all()
    assert not predictions[:, 4:].any()  # Trainer pads with 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 0}, r"num_beams: expected an integer in 1..4096, got 0"),
        ({"num_beams": "3"}, "num_beams: expected an integer in 1..4096, got '3'"),
        ({"max_new_tokens": 10**12}, "max_new_tokens: expected an integer in 1..1048576"),
        ({"temperature": float("nan")}, "temperature: expected a number of 0 or more, got nan"),
        ({"pad_token_id": 9999}, "pad_token_id: expected the id of a token, got 9999"),
        ({"guidance_scale": 2.0}, "guidance_scale: not supported"),
        ({"assistant_model": object()}, "assistant_model: not supported"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size: not supported"),
        ({"custom_generate": "someone/something"}, "custom_generate: not supported, because no code is loaded"),
        ({"penalty_alpha": 0.6}, "penalty_alpha: not supported"),
        ({"stop_strings": "a"}, "tokenizer: expected the processor's tokenizer with stop_strings, got None"),
        ({"generation_config": {}}, "generation_config: expected a GenerationConfig, got {}"),
        ({"generation_config": GenerationConfig(num_beams=-1)}, "num_beams: expected an integer"),
        ({"decoder_input_ids": torch.ones(2, 2).long()}, "decoder_input_ids: expected"),
        ({"return_dict": False}, "return_dict: not supported"),
        ({"cache_implementation": "quantized"}, "cache_implementation: expected the name of a cache"),
        ({"use_mtp": np.ones(3)}, "use_mtp: not supported"),
        ({"cache_implementation": np.ones(3)}, "cache_implementation: expected the name of a cache"),
        ({"length_penalty": 10**20}, r"length_penalty: expected a number in -40\.\.40, got 1"),
        ({"prefix_allowed_tokens_fn": lambda sample, ids: None}, "prefix_allowed_tokens_fn: expected a list of ids"),
        ({"prefix_allowed_tokens_fn": lambda sample, ids: [10**6]}, "prefix_allowed_tokens_fn: expected a list of ids"),
        ({"cache_config": {"backend": "quanto"}}, "cache_config: not supported"),
        ({"watermarking_config": 3}, "watermarking_config: expected a WatermarkingConfig"),
        ({"watermarking_config": {"bias": "x"}}, "watermarking_config: expected a WatermarkingConfig"),
        ({"num_assistant_tokens": 5}, "num_assistant_tokens: not supported"),
        ({"generation_config": GenerationConfig(assistant_lookbehind=3)}, "assistant_lookbehind: not supported"),
        ({"encoder_repetition_penalty": 2.0}, "encoder_repetition_penalty: not supported"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size: not supported"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens: expected None with more than one sample"),
        ({"decoder_start_token_id": [3, 4]}, "decoder_start_token_id: expected"),
    ],
)
def test_an_argument_of_generate_is_named(model: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**make_batch(), **given)


def test_an_unknown_argument_of_generate_is_named() -> None:
    with pytest.raises(TypeError, match="num_beam: unexpected argument of generate"):
        make_model().generate(**make_batch(), num_beam=2)


def test_values_that_ask_for_nothing_are_taken(model: Any) -> None:
    batch = make_batch()
    given = {"guidance_scale": 1.0, "num_beam_groups": 1, "assistant_model": None, "top_k": None, "force_words_ids": {}}
    assert model.generate(**batch, **SHORT, repetition_penalty=2, temperature=1).shape[0] == 3  # integers
    numbers = {"min_new_tokens": np.int64(2), "num_beams": np.int32(2), "do_sample": np.bool_(False)}
    assert model.generate(**batch, **{**SHORT, **numbers}).shape[0] == 3
    assert torch.equal(model.generate(**batch, **SHORT, **given), model.generate(**batch, **SHORT))


def test_a_penalty_of_lengths_may_be_an_integer(model: Any) -> None:
    """Lengths to the power of an integer soon exceed int64."""
    expected = model.generate(**make_batch(), **SHORT, length_penalty=40.0)
    settings = GenerationConfig(**SHORT, length_penalty=40)
    assert torch.equal(model.generate(**make_batch(), generation_config=settings), expected)
    for number in (40, np.int64(40), np.float32(40)):
        assert torch.equal(model.generate(**make_batch(), **SHORT, length_penalty=number), expected)


def test_encodings_may_be_passed_again_and_as_a_tuple() -> None:
    """Beam search repeats rows of the object that it is given."""
    model, batch = make_model(), make_batch()
    expected = model.generate(**batch, **SHORT)
    encoded = model(
        **batch, decoder_input_ids=torch.zeros(3, 1).long()
    ).language_model_outputs.encoder_last_hidden_state
    outputs = BaseModelOutput(last_hidden_state=encoded)
    for given in (outputs, outputs, (encoded,)):
        assert torch.equal(model.generate(encoder_outputs=given, task_ids=batch["task_ids"], **SHORT), expected)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[3, 16\], got \[3, 7\]"):
        model.generate(encoder_outputs=outputs, task_ids=batch["task_ids"], attention_mask=torch.ones(3, 7))
    with pytest.raises(ValueError, match="encoder_outputs: expected None for a decoder-only"):
        make_model("llama").generate(encoder_outputs=outputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "search",
    [
        {"num_beams": 1},
        {"num_beams": 5},
        {},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 1, "do_sample": True, "top_k": 1, "num_return_sequences": 2},
    ],
)
def test_an_adapter_per_sample(family: str, search: dict[str, Any]) -> None:
    """Each answer is that of the sample alone with its adapter, with LoRA in every part; beams are 5 by default."""
    peft = needs("peft", "train")
    own = ["q", "v", "shared"] if family == "t5" else ["q_proj", "v_proj", "embed_tokens"]
    lora = peft.LoraConfig(r=4, target_modules=[*own, "query", "qkv", "fc1"])
    model = peft.get_peft_model(make_model(family), lora, adapter_name="one")
    model.add_adapter("two", lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.normal_(std=0.3)
    model.eval()
    batch, names, each = make_batch(), ["one", "__base__", "two"], search.get("num_return_sequences", 1)
    search = {**search, "max_new_tokens": 4}
    together = model.generate(**batch, adapter_names=names, **search)
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    for index, name in enumerate(names):
        sample = {key: value[index : index + 1] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**sample, **search)
        else:
            model.set_adapter(name)
            alone = model.generate(**sample, **search)
        got = together[index * each : (index + 1) * each]
        assert words(got) == words(alone), name


def words(ids: Tensor) -> list[list[int]]:
    return [[token for token in row if token > 1] for row in ids.tolist()]


def test_encoder_and_decoder_of_the_language_model() -> None:
    t5, llama = make_model(), make_model("llama")
    assert t5.get_encoder() is t5.language_model.encoder
    assert t5.get_decoder() is t5.language_model.decoder
    assert llama.get_encoder() is llama
    assert llama.get_decoder() is llama.language_model.model
    assert t5.get_encoder("image") is t5.vision_model


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (99, IndexError, r"index: expected an image in -3..2, got 99"),
        ([0, 5], IndexError, r"index\[1\]: expected an image in -3..2, got 5"),
        (torch.tensor([0, -4]), IndexError, r"index: expected images in -3..2, got \[0, -4\]"),
        (torch.tensor([True]), IndexError, "index: expected a mask of 3 images"),
        (True, TypeError, "index: expected an integer, a slice, a list of integers or a mask, got True"),
        ("a", TypeError, "index: expected an integer"),
        (None, TypeError, "index: expected an integer"),
        (torch.tensor([[0]]), TypeError, "index: expected an integer"),
        ([0.5], TypeError, r"index\[0\]: expected an integer, got 0.5"),
        (slice(None, None, -1), ValueError, "index: expected a slice with a step of 1 or more"),
    ],
)
def test_a_selection_of_images_is_named(index: Any, error: type[Exception], message: str) -> None:
    features = ImageFeatures(torch.zeros(3, 4, 16), torch.zeros(3, 5, 32))
    with pytest.raises(error, match=message):
        features[index]


def test_selections_of_images() -> None:
    features = ImageFeatures(torch.arange(3.0).view(3, 1, 1))
    mask = torch.tensor([True, False, True])
    chosen: list[tuple[Any, list[float]]] = [
        (2, [2]),
        (-1, [2]),
        (slice(1, 9), [1, 2]),
        ((0, 0, 1), [0, 0, 1]),
        ([], []),
        ([True, False, True], [0, 2]),
        (mask, [0, 2]),
        (mask.numpy(), [0, 2]),
        (torch.tensor(1, dtype=torch.uint8), [1]),
        (torch.tensor([1, 0], dtype=torch.uint8), [1, 0]),
    ]
    for index, expected in chosen:
        assert features[index].qformer_context.flatten().tolist() == expected  # type: ignore[union-attr]
    assert len(list(features)) == 3


@pytest.mark.parametrize(
    ("repeats", "message"),
    [
        (-1, "repeats: expected an integer in 0..65536, got -1"),
        (1.5, "repeats: expected an integer"),
        (torch.tensor([1, 2]), r"repeats: expected one number per image \(3\), got \[2\]"),
        (torch.tensor([1, -2, 1]), "repeats: expected numbers of 0 or more"),
    ],
)
def test_repeats_of_images_are_named(repeats: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ImageFeatures(torch.zeros(3, 4, 16)).repeat_interleave(repeats)


def test_features_of_another_model_are_named() -> None:
    batch = make_batch()
    other = make_model(visual_input="QFORMER").encode_images(batch.pop("pixel_values"))
    with pytest.raises(ValueError, match=r"image_features\.aggregated: expected a tensor for visual_input='ALL'"):
        make_model().generate(**batch, image_features=other)
    with pytest.raises(ValueError, match="qformer_context: expected qformer_context, aggregated or both, got neither"):
        ImageFeatures()
    with pytest.raises(ValueError, match="aggregated: expected as many images as qformer_context, got 3 and 2"):
        ImageFeatures(torch.zeros(3, 4, 16), torch.zeros(2, 5, 32))


@pytest.mark.parametrize("size", ["28", 28.0, True])
def test_an_image_size_is_an_integer(size: Any) -> None:
    with pytest.raises(TypeError, match="image_size: expected an integer"):
        make_model().set_image_size(size)
    with pytest.raises(ValueError, match=r"image_size: expected an integer in 1..8192, got 14000000"):
        make_model().set_image_size(14_000_000)
