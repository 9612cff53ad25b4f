"""The kernels of `assemble_inputs`: a gather of rows from three sources, and a sum of the rows at one token."""

from lion_kernels.core.backend import tl, triton


@triton.jit
def assemble_inputs_forward_kernel(
    p_prefix, p_ids, p_embedding, p_soft_prompt, p_out, prefix_length, length, vocabulary, soft_prompt_id,
    stride_prefix_batch, stride_prefix_row, stride_embedding,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write BD channels of one row of out."""
    i_row = tl.program_id(0)
    i_batch, i_place = i_row // (prefix_length + length), i_row % (prefix_length + length)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    p_to = p_out + i_row.to(tl.int64) * D + o_d
    if i_place < prefix_length:
        p_from = p_prefix + i_batch.to(tl.int64) * stride_prefix_batch + i_place.to(tl.int64) * stride_prefix_row
        tl.store(p_to, tl.load(p_from + o_d, mask=m_d).to(p_out.dtype.element_ty), mask=m_d)
    else:
        i_id = tl.load(p_ids + i_batch.to(tl.int64) * length + i_place - prefix_length).to(tl.int64)
        if i_id == soft_prompt_id:
            tl.store(p_to, tl.load(p_soft_prompt + o_d, mask=m_d).to(p_out.dtype.element_ty), mask=m_d)
        elif (i_id >= 0) & (i_id < vocabulary):
            tl.store(p_to, tl.load(p_embedding + i_id * stride_embedding + o_d, mask=m_d), mask=m_d)
        else:
            # The id is beyond the table. NaN shows it, because an error on the host would need a synchronisation.
            tl.store(p_to, tl.full([BD], float("nan"), tl.float32).to(p_out.dtype.element_ty), mask=m_d)


@triton.jit
def assemble_inputs_backward_kernel(
    p_grad, p_ids, p_partial, rows, prefix_length, length, soft_prompt_id, stride_batch, stride_row,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sum the soft prompt's gradient in partial sums; program i handles the tiles of ids i, i + num_programs, ...

    The gradient is read only where the id is the soft prompt's.
    """
    i_program = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [BD]
    b_sum = tl.zeros([BD], dtype=tl.float32)
    for i_tile in range(i_program, tl.cdiv(rows, BT), tl.num_programs(0)):
        # [BT]
        o_row = i_tile * BT + tl.arange(0, BT)
        m_row = o_row < rows
        b_id = tl.load(p_ids + o_row, mask=m_row, other=0)
        m_row &= b_id.to(tl.int64) == soft_prompt_id
        i_batch, i_place = (o_row // length).to(tl.int64), (prefix_length + o_row % length).to(tl.int64)
        o_from = i_batch * stride_batch + i_place * stride_row
        # [BT, BD]
        mask = m_row[:, None] & m_d[None, :]
        b_grad = tl.load(p_grad + o_from[:, None] + o_d[None, :], mask=mask, other=0.0)
        b_sum += tl.sum(b_grad.to(tl.float32), 0)
    tl.store(p_partial + i_program.to(tl.int64) * D + o_d, b_sum, mask=m_d)
