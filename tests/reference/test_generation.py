"""Greedy and beam search, against enumeration with a tiny language model and against transformers."""

import itertools

import pytest
import torch
from torch import Tensor

from lion_reference.generation import beam_search, greedy_search, penalize_repetition

VOCAB, EOS, MAX_NEW_TOKENS = 4, 1, 3
TABLE = torch.randn(VOCAB, VOCAB, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
START = torch.tensor([[0]])


def next_logits(ids: Tensor) -> Tensor:
    """A language model in which each token depends on the previous two."""
    previous = ids[:, -2] if ids.shape[1] > 1 else ids[:, -1]
    return 2 * TABLE[previous, ids[:, -1]]


def adjuster(penalty: float):
    return lambda scores, ids: penalize_repetition(scores, ids, penalty)


def test_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    scores = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    assert penalize_repetition(scores, torch.tensor([[0, 1, 1]]), 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def all_answers() -> list[list[int]]:
    """Return every sequence that ends at EOS or at the limit."""
    answers = []
    for length in range(1, MAX_NEW_TOKENS + 1):
        for tokens in itertools.product(range(VOCAB), repeat=length):
            ended = tokens[-1] == EOS
            if EOS not in tokens[:-1] and (ended or length == MAX_NEW_TOKENS):
                answers.append([0, *tokens])
    return answers


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_answer(penalty, length_penalty):
    def score(answer: list[int]) -> float:
        total = 0.0
        for n in range(1, len(answer)):
            ids = torch.tensor([answer[:n]])
            total += adjuster(penalty)(next_logits(ids).log_softmax(-1), ids)[0, answer[n]].item()
        return total / (len(answer) - 1) ** length_penalty

    num_beams = VOCAB**MAX_NEW_TOKENS
    found = beam_search(next_logits, adjuster(penalty), START, EOS, MAX_NEW_TOKENS, num_beams, length_penalty)
    assert found.tolist() == max(all_answers(), key=score)


@pytest.mark.parametrize(("penalty", "length_penalty"), [(1.0, 1.0), (1.5, 1.0), (1.2, 2.0), (1.0, 0.0)])
def test_beam_search_matches_transformers(penalty, length_penalty):
    """The vocabulary has 9 tokens, so that answers often end and the rules for finished beams matter."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=1, decoder_start_token_id=0, eos_token_id=EOS
    )
    for seed in range(12):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.8)
        source = torch.randint(2, 9, (1, 3))
        search = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
        with torch.no_grad():
            wanted = model.generate(source, repetition_penalty=penalty, length_penalty=length_penalty, **search)

            def logits(ids: Tensor, model=model, source=source) -> Tensor:
                return model(input_ids=source.expand(len(ids), -1), decoder_input_ids=ids).logits[:, -1]

            found = beam_search(logits, adjuster(penalty), START, EOS, 8, 3, length_penalty)
        # transformers pads after EOS; the reference does not.
        assert found.tolist() == wanted[0, : len(found)].tolist()
        assert len(found) == wanted.shape[1] or found[-1] == EOS


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_search_picks_the_likeliest_token_until_eos(penalty):
    answer = greedy_search(next_logits, adjuster(penalty), START, EOS, 20).tolist()
    for n in range(1, len(answer)):
        ids = torch.tensor([answer[:n]])
        assert answer[n] == adjuster(penalty)(next_logits(ids), ids)[0].argmax().item()
    assert EOS not in answer[:-1]
    assert answer[-1] == EOS or len(answer) == 21
