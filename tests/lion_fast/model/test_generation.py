"""The features of transformers' `generate` work with LION, for an encoder-decoder and a decoder-only model."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.modeling_outputs import BaseModelOutput

from lion_fast import LionForCausalLM
from tests.extras import needs
from tests.lion_fast.tiny import Batch, make_batch, make_model
from tests.rounding import TWO_WAYS

FAMILIES = ("t5", "llama")
BATCH = make_batch(batch=2)
GREEDY = {"num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> LionForCausalLM:
    return make_model(request.param)


def answers(model: LionForCausalLM, ids: Tensor) -> list[list[int]]:
    """Return the tokens up to EOS, without an encoder-decoder's start token."""
    rows = ids[:, 1:].tolist() if model.config.is_encoder_decoder else ids.tolist()
    return [row[: row.index(1)] if 1 in row else row for row in rows]


def rows_of(batch: Batch, rows: slice | Tensor) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in batch.items()}


def padded_batch(size: int, family: str) -> dict[str, Tensor]:
    """Make prompts and questions of different lengths, padded on the family's side, with alternating tasks."""
    batch = make_batch(batch=size)
    padding = torch.arange(size) % 5
    positions = torch.arange(batch["input_ids"].shape[1])
    if family != "t5":
        positions = positions.flip(0)
    batch["attention_mask"] = (positions < positions.numel() - padding.unsqueeze(1)).long()
    batch["qformer_attention_mask"] = (torch.arange(5) < 5 - (padding % 4).unsqueeze(1)).long()
    return batch


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_32_equals_32_batches_of_one(family: str, num_beams: int) -> None:
    """Each single sample is cut to its own length, without padding."""
    model, batch = make_model(family), padded_batch(32, family)
    search = {"num_beams": num_beams, "max_new_tokens": 4}
    together = answers(model, model.generate(**batch, **search))
    assert len({tuple(answer) for answer in together}) > 4  # they depend on the input
    for index, answer in enumerate(together):
        one = rows_of(batch, slice(index, index + 1))
        for ids, mask in (("input_ids", "attention_mask"), ("qformer_input_ids", "qformer_attention_mask")):
            one[ids] = one[ids][:, one[mask][0].bool()]
            del one[mask]
        assert answers(model, model.generate(**one, **search)) == [answer], index


def test_a_mixed_batch_equals_the_batches_of_its_tasks(model: LionForCausalLM) -> None:
    batch = make_batch(batch=6)
    search = {"num_beams": 3, "max_new_tokens": 5}
    together = answers(model, model.generate(**batch, **search))
    for task in (0, 1):
        rows = batch["task_ids"] == task
        alone = answers(model, model.generate(**rows_of(batch, rows), **search))
        assert alone == [answer for answer, own in zip(together, rows.tolist(), strict=True) if own]
    other = answers(model, model.generate(**{**batch, "task_ids": 1 - batch["task_ids"]}, **search))
    assert other != together


def test_several_sequences_per_sample(model: LionForCausalLM) -> None:
    best = model.generate(**BATCH, num_beams=3, max_new_tokens=5)
    beams = model.generate(**BATCH, num_beams=3, num_return_sequences=3, max_new_tokens=5)
    assert answers(model, beams[::3]) == answers(model, best)
    assert len({tuple(row) for row in beams[:3].tolist()}) == 3
    torch.manual_seed(0)
    sampled = model.generate(
        **BATCH, do_sample=True, num_beams=1, num_return_sequences=20, temperature=5.0, top_p=1.0, max_new_tokens=3
    )
    assert sampled.shape[0] == 40
    assert len({tuple(row) for row in sampled[:20].tolist()}) > 10


def test_sampling_from_the_likeliest_token_is_greedy(model: LionForCausalLM) -> None:
    sampled = model.generate(**BATCH, **GREEDY, do_sample=True, top_k=1)
    assert torch.equal(sampled, model.generate(**BATCH, **GREEDY))


class Letters:
    """The part of a tokenizer that a streamer needs."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"<{int(token)}>" for token in ids)


def test_answers_are_streamed(model: LionForCausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    batch = make_batch(batch=1)
    ids = model.generate(**batch, **GREEDY)
    whole = Letters().decode(ids[0].tolist())
    tokenizer: Any = Letters()
    model.generate(**batch, **GREEDY, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == whole + "\n"
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    thread = Thread(target=model.generate, kwargs={**batch, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == whole
    with pytest.raises(ValueError, match="streamer"):
        model.generate(**batch, num_beams=2, max_new_tokens=2, streamer=TextStreamer(tokenizer))


class Always(LogitsProcessor):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([self.token]), 0.0)


class Long(StoppingCriteria):
    """Stops after `length` tokens, including the start token."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_constraints(model: LionForCausalLM, num_beams: int) -> None:
    search = {**GREEDY, "num_beams": num_beams}
    free = answers(model, model.generate(**BATCH, **search))
    given: list[tuple[dict[str, Any], Callable[[list[int]], bool]]] = [
        ({"prefix_allowed_tokens_fn": lambda sample, ids: [7, 8]}, lambda row: set(row) <= {7, 8}),
        ({"bad_words_ids": [[token] for token in free[0]]}, lambda row: not set(row) & set(free[0])),
        ({"suppress_tokens": free[1]}, lambda row: not set(row) & set(free[1])),
        ({"begin_suppress_tokens": [free[0][0]]}, lambda row: row[0] != free[0][0]),
        ({"no_repeat_ngram_size": 1}, lambda row: len(set(row)) == len(row)),
        ({"forced_eos_token_id": 9}, lambda row: row[-1] == 9),
        ({"sequence_bias": {(11,): 100.0}}, lambda row: set(row) == {11}),
        ({"logits_processor": LogitsProcessorList([Always(12)])}, lambda row: set(row) == {12}),
    ]
    for settings, holds in given:
        for row in answers(model, model.generate(**BATCH, **search, **settings)):
            assert len(row) == 6, settings
            assert holds(row), (settings, row)


def test_forced_first_tokens() -> None:
    """transformers expects a start token in the prompt's ids; a decoder-only model's prompt has embeddings instead."""
    llama = make_model("llama")
    assert {row[1] for row in answers(llama, llama.generate(**BATCH, **GREEDY, forced_bos_token_id=9))} == {9}
    t5 = make_model("t5")
    assert {row[0] for row in answers(t5, t5.generate(**BATCH, **GREEDY, forced_bos_token_id=9))} == {9}
    begun = torch.tensor([[0, 20, 21]] * 2)
    ids = t5.generate(**BATCH, **GREEDY, decoder_input_ids=begun)
    assert torch.equal(ids[:, :3], begun)
    logits = t5(**BATCH, decoder_input_ids=ids[:, :3]).logits[:, -1]
    logits[:, 1] = -torch.inf
    assert torch.equal(ids[:, 3], logits.argmax(-1))


def test_stopping_criteria(model: LionForCausalLM) -> None:
    ids = model.generate(**BATCH, **GREEDY, stopping_criteria=StoppingCriteriaList([Long(3)]))
    assert torch.equal(ids, model.generate(**BATCH, **GREEDY)[:, :3])


def test_scores_are_returned(model: LionForCausalLM) -> None:
    out = model.generate(**BATCH, **GREEDY, output_scores=True, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(out.sequences, model.generate(**BATCH, **GREEDY))
    assert len(out.scores) == 6
    chosen = torch.stack(out.scores, 1).argmax(-1)
    assert torch.equal(chosen, out.sequences[:, -6:])
    answer = out.sequences[:, -6:]
    torch.testing.assert_close(torch.stack(out.logits, 1), model(**BATCH, labels=answer).logits, **TWO_WAYS)
    beams = model.generate(**BATCH, num_beams=3, max_new_tokens=3, output_scores=True, return_dict_in_generate=True)
    assert beams.sequences_scores.shape == (2,)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_encoder_outputs_are_shared_by_several_calls(num_beams: int) -> None:
    model = make_model("t5")
    settings = {**GREEDY, "num_beams": num_beams}
    expected = model.generate(**BATCH, **settings)
    inputs = model(**BATCH, inputs_only=True)
    encoder = model.language_model.get_encoder()
    encoded = encoder(
        inputs_embeds=inputs.inputs_embeds, attention_mask=inputs.attention_mask, task_ids=BATCH["task_ids"]
    )
    given = {"attention_mask": inputs.attention_mask, "task_ids": BATCH["task_ids"]}
    for _ in range(2):
        outputs = BaseModelOutput(last_hidden_state=encoded.last_hidden_state)
        assert torch.equal(model.generate(encoder_outputs=outputs, **given, **settings), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_static_cache_gives_the_same_tokens(model: LionForCausalLM, num_beams: int) -> None:
    settings = {**GREEDY, "num_beams": num_beams}
    expected = model.generate(**BATCH, **settings)
    assert torch.equal(model.generate(**BATCH, **settings, cache_implementation="static"), expected)
    model.fold_adapters()
    assert torch.equal(model.generate(**BATCH, **settings, cache_implementation="static"), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_compiled_step_gives_the_same_tokens(model: LionForCausalLM, num_beams: int) -> None:
    """With a static cache, a few graphs serve all steps, and another call compiles no more."""
    search = {**GREEDY, "num_beams": num_beams, "cache_implementation": "static"}
    expected = model.generate(**BATCH, **search)
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    model.language_model.compile(fullgraph=True, backend=backend)
    assert torch.equal(model.generate(**BATCH, **search), expected)
    seen = len(graphs)
    assert 0 < seen <= 4
    assert torch.equal(model.generate(**BATCH, **search), expected)
    assert len(graphs) == seen
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_the_whole_model_may_be_offloaded(tmp_path: Path, family: str) -> None:
    """The parameters that belong to no part are loaded by the model's call, which `generate` uses."""
    accelerate = needs("accelerate", "train")
    model, batch = make_model(family), make_batch()
    expected = model.generate(**batch, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    offloaded = accelerate.cpu_offload(LionForCausalLM.from_pretrained(tmp_path).eval(), execution_device="cpu")
    assert (offloaded.query_tokens.is_meta, offloaded.soft_prompt.is_meta) == (True, True)
    assert torch.equal(offloaded.generate(**batch, max_new_tokens=3), expected)
    placed = LionForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path / "parts"
    ).eval()
    assert "disk" in placed.hf_device_map.values()
    assert torch.equal(placed.generate(**batch, max_new_tokens=3), expected)
