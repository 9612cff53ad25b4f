"""Greedy and beam search with the rules of transformers' `generate`, without a cache, one sample at a time."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .lion import LION

NextLogits = Callable[[Tensor], Tensor]  # ids [K, n] -> scores of the next token [K, vocabulary]
Adjust = Callable[[Tensor, Tensor], Tensor]  # scores [K, vocabulary], previous ids [K, n] -> scores [K, vocabulary]


@torch.no_grad()
def generate(
    model: LION,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    qformer_input_ids: Tensor | None = None,
    qformer_attention_mask: Tensor | None = None,
    task_ids: Tensor | None = None,
    *,
    num_beams: int = 5,
    max_new_tokens: int = 256,
    min_length: int = 1,
    repetition_penalty: float = 1.5,
    length_penalty: float = 1.0,
) -> Tensor:
    """Generate the answers' token ids, [B, 1 + n], n <= max_new_tokens: start token, answer, EOS if reached, padding.

    The first arguments are those of `LION.forward`. `min_length` counts the start token. A beam's log-probability is
    divided by its length to the power of `length_penalty`.
    """
    config = model.config.t5
    encoded = model.encode(pixel_values, input_ids, attention_mask, qformer_input_ids, qformer_attention_mask, task_ids)
    start = input_ids.new_full((1, 1), config.decoder_start_token_id)

    def adjust(scores: Tensor, ids: Tensor) -> Tensor:
        scores = penalize_repetition(scores, ids, repetition_penalty)
        if ids.shape[1] < min_length:
            scores[:, config.eos_token_id] = -torch.inf
        return scores

    def next_logits(sample: slice, ids: Tensor) -> Tensor:
        logits = model.t5_model.decode(
            ids,
            torch.ones_like(ids),
            encoded.encoder_output[sample].expand(len(ids), -1, -1),
            encoded.attention_mask[sample].expand(len(ids), -1),
            None if task_ids is None else task_ids[sample].expand(len(ids)),
        )
        return logits[:, -1]

    def answer(n: int) -> Tensor:
        search = (partial(next_logits, slice(n, n + 1)), adjust, start, config.eos_token_id, max_new_tokens)
        return greedy_search(*search) if num_beams == 1 else beam_search(*search, num_beams, length_penalty)

    return pad_sequence([answer(n) for n in range(len(input_ids))], batch_first=True, padding_value=config.pad_token_id)


def penalize_repetition(scores: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Make every token of ids [K, n] less likely in scores [K, vocabulary] (Keskar et al., arXiv 1909.05858)."""
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def greedy_search(
    next_logits: NextLogits, adjust: Adjust, start: Tensor, eos_token_id: int, max_new_tokens: int
) -> Tensor:
    """start [1, 1] -> ids of the answer, [1 + n]."""
    ids = start
    for _ in range(max_new_tokens):
        token = adjust(next_logits(ids), ids).argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == eos_token_id:
            break
    return ids[0]


def beam_search(
    next_logits: NextLogits,
    adjust: Adjust,
    start: Tensor,
    eos_token_id: int,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float,
) -> Tensor:
    """start [1, 1] -> ids of the best answer, [1 + n].

    The repetition penalty applies to the log-probabilities, not the logits, and remains in a beam's score.
    """
    ids, scores = start, torch.zeros(1)
    answers: list[tuple[float, Tensor]] = []  # the num_beams best finished answers, best first

    def keep(score: float, answer: Tensor) -> None:
        answers.append((score, answer))
        answers.sort(key=lambda scored: -scored[0])
        del answers[num_beams:]

    for length in range(1, max_new_tokens + 1):
        log_probabilities = adjust(next_logits(ids).log_softmax(-1), ids)
        totals = scores.to(log_probabilities)[:, None] + log_probabilities
        best = totals.flatten().topk(min(2 * num_beams, totals.numel()))
        survivors = []
        for rank, (score, index) in enumerate(zip(best.values, best.indices, strict=True)):
            beam, token = index // totals.shape[1], index % totals.shape[1]
            candidate = torch.cat([ids[beam], token[None]])
            if token != eos_token_id:
                survivors.append((score, candidate))
            elif rank < num_beams:
                keep(score.item() / length**length_penalty, candidate)
        scores, ids = (torch.stack(column) for column in zip(*survivors[:num_beams], strict=True))

        # Stop when the list is full and the best running beam, ended here, would not enter it.
        if len(answers) == num_beams and answers[-1][0] >= scores[0].item() / length**length_penalty:
            return answers[0][1]
    for score, answer in zip(scores, ids, strict=True):
        keep(score.item() / max_new_tokens**length_penalty, answer)
    return answers[0][1]
