"""The language model's input, position by position."""

import torch

from lion_reference import assemble_inputs


def test_every_position_and_gradient():
    prefix = torch.randn(2, 3, 4, requires_grad=True)
    embedding = torch.randn(10, 4, requires_grad=True)
    soft_prompt = torch.randn(4, requires_grad=True)
    input_ids = torch.tensor([[5, 7, 5, 0], [1, 2, 3, 7]])
    out = assemble_inputs(prefix, input_ids, embedding, soft_prompt, soft_prompt_id=7)
    assert out.shape == (2, 7, 4)
    assert torch.equal(out[:, :3], prefix)
    for b in range(2):
        for n, token in enumerate(input_ids[b].tolist()):
            assert torch.equal(out[b, 3 + n], soft_prompt if token == 7 else embedding[token])

    out.sum().backward()
    assert soft_prompt.grad is not None
    assert embedding.grad is not None
    assert soft_prompt.grad.tolist() == [2.0] * 4
    assert embedding.grad[:, 0].tolist() == [1, 1, 1, 1, 0, 2, 0, 0, 0, 0]
