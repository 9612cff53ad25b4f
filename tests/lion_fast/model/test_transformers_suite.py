"""What transformers' own suites check of a model (`ModelTesterMixin`, `GenerationTesterMixin`), as far as it applies.

Those suites are not part of transformers' package. What they check, and where it is checked here:

- saving, loading, initialisation: `test_modeling` (`save_and_load`, `missing_parameters`, `head_is_never_tied`,
  `dtypes`, `auto_classes`, `parts_are_loaded_when_used`); initialised from a meta device, weights of other shapes,
  `torch.save`, determinism: this file
- embeddings: `get_input_embeddings`, `resize_token_embeddings`, `tie_weights`: this file, `head_is_never_tied`
- gradients, gradient checkpointing: `test_modeling` (`every_variant_learns`, `checkpointing_keeps_the_gradients`)
- eager, sdpa and other attention, per part and changed later: `test_modeling` (`attention_implementation`)
- attention weights, hidden states, `return_dict`, `inputs_embeds`, `main_input_name`: `test_calls`, this file
- batches equal to their samples, padding on any side: `test_modeling`, `test_calls` (`padding_may_stand_on_any_side`)
- offloading to CPU and disk: `test_modeling` (`parts_are_loaded_when_used`), `test_generation` (`may_be_offloaded`)
- greedy, sampling, beams, several sequences, constraints, scores, streaming, static cache, compiled steps, given
  encodings: `test_generation`; lengths, arguments, `inputs_embeds`, a given cache: `test_calls`; prompt lookup, no
  cache: this file
- Trainer: `tests/lion_fast/training`, `test_calls` (`trainer_obeys_its_generation_length`)

Not applicable, and why:

- attentions and hidden states at the top level of the output: they are in `language_model_outputs`, as in InstructBLIP
- `output_attentions` with sdpa or the kernels: refused, because there are no weights to return
- `base_model_prefix` and base models: LION has no body without a head; a checkpoint is always the whole model
- "sdpa" as the default implementation: it is "lion_kernels", which runs sdpa where no kernel runs
- contrastive search, DoLa, group and constrained beams: their code is no longer part of transformers; refused by name
- assisted generation with another model, classifier-free guidance, chunked prefill, token healing, continuous
  batching: they run the language model on ids without the image; refused by name
- continuing from a cache without the prompt for a decoder-only model, 4-D masks, position ids of one's own, packed
  sequences: the positions follow from the mask of [visual | text]; refused by name
- chunked feed-forward, TorchScript, torch.fx, pruned heads, problem types, router logits, rotary scaling, tensor
  parallelism: T5 and LION's parts have none of them, or transformers has removed them
- flash attention: needs a GPU, and does not support T5's biases
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from lion_fast import LionForCausalLM
from tests.lion_fast.tiny import make_batch, make_config, make_model, without_labels

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
