"""What transformers' own suites check of a model and a processor, as far as it applies.

Those suites (`ModelTesterMixin`, `GenerationTesterMixin`, `ProcessorTesterMixin`) are not part of transformers'
package. What they check, and where it is checked here; a name is that of a test without `test_`, or of a file:

- saving and loading (`save_load`, `can_use_safetensors`, `load_save_without_tied_weights`, `torch_save_load`,
  `from_pretrained_no_checkpoint`, `load_contiguous_weights`, `model_weights_reload_no_missing_tied_weights`,
  `correct_missing_keys`, `bc_torch_dtype`, `can_load_with_device_context_manager`): `test_modeling`
  (`save_and_load`, `missing_parameters`, `head_is_never_tied`, `dtypes`, `auto_classes`), `test_fitting`, this file
- weights of other shapes (`load_with_mismatched_shapes`, `mismatched_shapes_have_properly_initialized_weights`,
  `can_load_ignoring_mismatched_shapes`): this file, `test_fitting`
- initialisation (`can_init_all_missing_weights`, `init_weights_can_init_buffers`,
  `all_tensors_are_parameter_or_buffer`): `test_modeling` (`missing_parameters`), this file
- modules in float32 beside float16 (`keep_in_fp32_modules`): `test_half_precision`
- determinism and batches (`determinism`, `batching_equivalence`): this file, `test_modeling` (`batch_equals`)
- embeddings (`resize_tokens_embeddings`, `resize_embeddings_untied`, `model_get_set_embeddings`, `tied_weights_keys`,
  `tie_model_weights`): this file; of positions (`resize_position_vector_embeddings`): `test_modeling`
  (`set_image_size`)
- gradients and their checkpointing (`training`, `training_gradient_checkpointing` with and without reentry,
  `gradient_checkpointing_enable_disable`, `peft_gradient_checkpointing_enable_disable`, `enable_input_require_grads`):
  `test_modeling` (`every_variant_learns`, `checkpointing_keeps_the_gradients`), `test_checkpointing`
- outputs (`attention_outputs`, `hidden_states_output`, `retain_grad_hidden_states_attentions`,
  `model_outputs_equivalence`, `forward_signature`, `forward_with_logits_to_keep`, `model_main_input_name`):
  `test_calls`, this file
- `inputs_embeds`, `inputs_embeds_matches_input_ids`: `test_calls` (`embeddings_replace_the_text`)
- attention (`eager_matches_sdpa_inference`, `can_set_attention_dynamically`, `config_attn_implementation_setter`,
  `sdpa_can_dispatch_composite_models`, `internal_model_config_and_subconfig_are_same`): `test_modeling`
  (`attention_implementation`), this file
- compilation (`torch_compile_for_training`, `generate_compile_model_forward_fullgraph`,
  `generate_compilation_all_outputs`): `test_generation` (`compiled_step`), `test_operators`
- offloading (`cpu_offload`, `disk_offload_bin`, `disk_offload_safetensors`): `test_modeling`
  (`parts_are_loaded_when_used`), `test_generation` (`may_be_offloaded`)
- chunked feed-forward (`feed_forward_chunking`), which the Q-Former alone has: this file
- greedy, sampling and beams, also with `return_dict_in_generate` (`greedy_generate`, `sample_generate`,
  `beam_search_generate`, `beam_sample_generate` and their `dict_output`s), `left_padding_compatibility`,
  `generate_with_static_cache`, `eager_matches_sdpa_generate`, streaming, scores, constraints: `test_generation`,
  `test_calls`
- caches (`generate_continue_from_past_key_values`, `past_key_values_format`, `generate_continue_from_inputs_embeds`):
  `test_calls` (`a_returned_cache_continues`, `a_cache_of_ones_own`, `a_cache_of_another_kind`)
- `generate_from_inputs_embeds`, also with a static cache: each call of `generate`; `generate_without_input_ids`:
  refused by name
- `prompt_lookup_decoding_matches_greedy_search`, `prompt_lookup_decoding_stops_at_eos`: this file
- `inherits_generation_mixin`, `generation_tester_mixin_inheritance`: this file
- processors: JSON, saving, defaults and arguments that replace them, flat, in groups and twice, padding and truncation,
  chats of one and several conversations, text or images alone, `model_input_names`,
  `post_process_image_text_to_text`: `test_processing`, `test_pipeline`, this file
- Trainer: `tests/lion_fast/training`, `test_calls` (`trainer_obeys_its_generation_length`)

Not applicable, and why:

- attentions and hidden states at the top level of the output: they are in `language_model_outputs`, as in InstructBLIP
- `output_attentions` with sdpa or the kernels: refused, because there are no weights to return
- `model_base_model_prefix` and base models: LION has no body without a head; a checkpoint is always the whole model
- `get_image_features`: what an image gives the language model depends on the question; `encode_images` is the part that
  does not, in `test_image_features`
- "sdpa" as the default implementation: it is "lion_kernels", which runs sdpa where no kernel runs
- contrastive search, DoLa, group and constrained beams: their code is no longer part of transformers; refused by name
- assisted generation with another model (`assisted_decoding_*`), classifier-free guidance, chunked prefill, token
  healing, continuous batching: they run the language model on ids without the image; refused by name
- `generate_with_quant_cache`, `cache_config`: need ids; refused by name. `offloaded_cache_implementation`: needs a GPU
- 4-D masks, position ids of one's own (`generate_with_and_without_position_ids`), packed sequences
  (`eager_padding_matches_padding_free_with_position_ids`): positions follow from the mask of [visual | text]; refused
- `generate_methods_with_logits_to_keep`: `generate` sets it; refused by name
- `save_load_keys_to_ignore_on_save`, `reverse_loading_mapping`, `tp_plan_matches_params`: LION has no such keys, no
  conversion of names while loading and no plan for tensor parallelism
- `load_with_mismatched_shapes` for classification heads, `problem_types`, pruned heads, router logits, rotary scaling,
  sliding windows, TorchScript, torch.fx: T5 and LION's parts have none of them, or transformers has removed them
- `multi_gpu_data_parallel_forward`, `model_parallelism`: `DataParallel` and naive placement need GPUs; a `device_map`
  on one device is in `test_generation`
- `flash_attn_*`, `flex_attention_with_grads`: need a GPU, and flash attention does not support T5's biases
- masks of the assistant's tokens, videos, sounds, numbers of image tokens (`get_num_vision_tokens`): the answer is no
  part of LION's prompt, nor are the visual tokens; refused by name
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, GenerationMixin, TensorType

from lion_fast import LionForCausalLM
from tests.lion_fast.tiny import make_batch, make_config, make_model, scene_processor, without_labels

FAMILIES = ("t5", "llama")
GREEDY = {"num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def test_two_passes_are_equal(model: Any) -> None:
    batch = make_batch(labels=True)
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_the_main_input_is_the_image(model: Any) -> None:
    assert model.main_input_name == "pixel_values"
    assert model.can_generate()


def test_embeddings_can_be_resized(model: Any, tmp_path: Path) -> None:
    batch = make_batch(labels=True)
    expected = model(**batch).logits
    model.resize_token_embeddings(70)
    assert model.config.text_config.vocab_size == 70
    assert model.get_input_embeddings().weight.shape[0] == 70
    assert model.get_output_embeddings().weight.shape[0] == 70
    torch.testing.assert_close(model(**batch).logits[..., :64], expected)
    batch["input_ids"][0, 3] = batch["labels"][0, 1] = 69
    logits = model(**batch).logits
    assert model.generate(**without_labels(batch), max_new_tokens=3).shape[0] == 3
    model.save_pretrained(tmp_path)
    assert torch.equal(LionForCausalLM.from_pretrained(tmp_path).eval()(**batch).logits, logits)
    model.resize_token_embeddings(60)
    with pytest.raises(ValueError, match=r"input_ids: expected ids in 0\.\.59, got"):
        model(**batch)


def test_embeddings_can_be_replaced(model: Any) -> None:
    batch = make_batch(labels=True)
    expected = model(**batch).logits
    table = torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.detach().clone())
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    torch.testing.assert_close(model(**batch).logits, expected)
    head = torch.nn.Linear(32, 64, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_can_be_made_without_memory(family: str) -> None:
    with torch.device("meta"):
        model = LionForCausalLM(make_config(family))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_weights_of_another_shape_are_refused_or_made_new(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: num_query_tokens: expected 4, as in the weights, got 6"):
        LionForCausalLM.from_pretrained(tmp_path, num_query_tokens=6)
    made = LionForCausalLM.from_pretrained(tmp_path, num_query_tokens=6, ignore_mismatched_sizes=True)
    assert made.query_tokens.shape[1] == 6
    assert made.query_tokens.isfinite().all()


def test_torch_save_keeps_the_bits(model: Any, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = make_model(model.config.text_config.model_type, seed=1)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    batch = make_batch(labels=True)
    assert torch.equal(other(**batch).logits, model(**batch).logits)


def test_prompt_lookup_gives_the_greedy_answer(model: Any) -> None:
    batch = make_batch(batch=1)
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2), expected)


def test_prompt_lookup_stops_at_the_end(model: Any) -> None:
    batch = make_batch(batch=1)
    answer = model.generate(**batch, **GREEDY)[0].tolist()
    settings = {**GREEDY, "min_new_tokens": 1, "eos_token_id": answer[3]}
    expected = model.generate(**batch, **settings)
    assert expected.shape[1] < len(answer)
    assert torch.equal(model.generate(**batch, **settings, prompt_lookup_num_tokens=2), expected)


def test_generation_without_a_cache() -> None:
    """A decoder-only model's prompt has embeddings, for which transformers always uses a cache."""
    model, batch = make_model(), make_batch()
    assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False), model.generate(**batch, **GREEDY))


def test_inputs_are_left_as_they_are(model: Any) -> None:
    batch = make_batch(labels=True, masks=True)
    before = {name: value.clone() for name, value in batch.items()}
    model(**batch)
    model.generate(**without_labels(batch), max_new_tokens=2)
    assert all(torch.equal(batch[name], before[name]) for name in before)


def test_every_tensor_is_a_parameter_or_buffer(model: Any) -> None:
    """Otherwise it would stay behind when the model moves."""
    model.fold_adapters()
    assert not [
        name for name, module in model.named_modules() for value in vars(module).values() if torch.is_tensor(value)
    ]


def test_parts_have_the_configurations_of_the_whole(model: Any) -> None:
    for part, name in (("vision_model", "vision"), ("language_model", "text"), ("aggregator", "aggregator")):
        assert getattr(model, part).config is getattr(model.config, f"{name}_config")
    assert isinstance(model, GenerationMixin)


def test_hidden_states_keep_gradients(model: Any) -> None:
    outputs = model(**make_batch(labels=True), output_hidden_states=True)
    name = "encoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
    first = outputs.language_model_outputs[name][0]
    first.retain_grad()
    outputs.logits[0, 0, 0].backward()
    assert first.grad.abs().sum() > 0


def test_weights_are_loaded_from_memory(model: Any, tmp_path: Path) -> None:
    batch = make_batch(labels=True)
    given = {"config": model.config, "state_dict": model.state_dict()}
    assert torch.equal(LionForCausalLM.from_pretrained(None, **given).eval()(**batch).logits, model(**batch).logits)
    weight = model.vision_model.blocks[0].mlp.fc1.weight
    weight.data = weight.data.T.contiguous().T
    model.save_pretrained(tmp_path)
    assert torch.equal(LionForCausalLM.from_pretrained(tmp_path).eval()(**batch).logits, model(**batch).logits)


def test_a_chunked_feed_forward_computes_the_same() -> None:
    model, batch = make_model(), make_batch(labels=True)
    chunked = LionForCausalLM(make_config(qformer_config={"chunk_size_feed_forward": 1})).eval()
    chunked.load_state_dict(model.state_dict())
    torch.testing.assert_close(chunked(**batch).logits, model(**batch).logits)


def test_configuration_of_generation_without_a_start_token() -> None:
    """Trainer replaces the model's by that of its arguments."""
    model, batch = make_model(), make_batch()
    expected = model.generate(**batch, **GREEDY)
    model.generation_config = GenerationConfig(**GREEDY, eos_token_id=1, pad_token_id=0)
    assert torch.equal(model.generate(**batch), expected)


def test_names_of_the_processors_outputs() -> None:
    processor = scene_processor(8)
    made = processor(Image.new("RGB", (40, 30)), "what is this")
    assert set(made) == set(processor.model_input_names)
    assert processor.post_process_image_text_to_text(made.input_ids, skip_special_tokens=True) == ["what is this"]
    assert processor(Image.new("RGB", (40, 30)), "a", return_tensors=TensorType.NUMPY).input_ids.shape[0] == 1
