"""The Triton kernels of `lion_kernels.low_rank.launch`, whose docstring has the algebra.

Blocks of several experts are tuples, one block per expert, and the loops over experts are unrolled.
"""

# Kernels differ from the Python that ruff and pyright expect: no tuple unpacking, static ranges, blocks as tensors.
# ruff: noqa: RUF005, SIM108
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

from typing import Any, NamedTuple

from lion_kernels.core.backend import tl, triton


class Mixture(NamedTuple):
    """The operands of all experts' updates; the kernels' arguments have the same names.

    Kernels construct it inside the call that uses it: bound to a variable, it would lose the constness of its
    constants.

    Attributes:
        p_hidden: [T, E*r], or [splits, T, E*r] with SPLIT.
        p_weight, p_bias: of the up-projections.
        K: experts that a row names; KP, EP and RP are K, E and RANK padded.
        CHOOSE: whether to read a channel gate's rows of all TASKS and select from them.
        SKIP: whether a tile skips experts that its rows do not name.
        KEEP: whether to keep the hidden tiles of all experts.
    """

    p_hidden: Any
    p_down_bias: Any
    p_weight: Any
    p_bias: Any
    p_gate: Any
    p_ids: Any
    rows: Any
    channels: Any
    splits: Any
    E: Any
    RANK: Any
    RP: Any
    K: Any
    KP: Any
    EP: Any
    TASKS: Any
    CHANNEL: Any
    CHOOSE: Any
    SKIP: Any
    SPLIT: Any
    KEEP: Any
    HAS_DOWN_BIAS: Any
    HAS_BIAS: Any
    RELU: Any
    PRECISION: Any


@triton.jit
def _any_named(p_ids, o_gate, m_m, first, last, K: tl.constexpr, KP: tl.constexpr):
    """Return whether a row of the tile names an expert in first..last."""
    o_k = tl.arange(0, KP)
    # [BM, KP]
    b_ids = tl.load(
        p_ids + o_gate.to(tl.int64)[:, None] * K + o_k[None, :], m_m[:, None] & (o_k < K)[None, :], other=-1
    )
    return tl.max(tl.max(((b_ids >= first) & (b_ids <= last)).to(tl.int32), 1), 0) > 0


@triton.jit
def _channel_factor(
    p_gate, b_task, i_e, o_n, m_n, channels, E: tl.constexpr, TASKS: tl.constexpr, CHOOSE: tl.constexpr
):
    """Return gate[task of the row, i_e, channel] as [BM, BN]."""
    if CHOOSE:
        b_factor = tl.zeros([b_task.shape[0], o_n.shape[0]], tl.float32)
        for i_t in tl.static_range(TASKS):
            # [BN]
            b_row = tl.load(p_gate + tl.cast(channels, tl.int64) * (i_t * E + i_e) + o_n, m_n, other=0.0).to(tl.float32)
            b_factor = tl.where((b_task == i_t)[:, None], b_row[None, :], b_factor)
    else:
        m_m = (b_task >= 0) & (b_task < TASKS)
        p_rows = p_gate + (b_task * E + i_e).to(tl.int64)[:, None] * channels
        b_factor = tl.load(p_rows + o_n[None, :], m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    return b_factor


@triton.jit
def _load_hidden(o_m, m_m, i_e, mixture):
    """Load hidden_e [BM, RP], zero beyond the rank; a split product is summed and activated here."""
    o_r = tl.arange(0, mixture.RP)
    m_r = o_r < mixture.RANK
    m_mr = m_m[:, None] & m_r[None, :]
    p_row = mixture.p_hidden + o_m.to(tl.int64)[:, None] * (mixture.E * mixture.RANK)
    p_block = p_row + i_e * mixture.RANK + o_r[None, :]
    b_hidden = tl.load(p_block, m_mr, other=0.0)
    if mixture.SPLIT:
        for i_s in range(1, mixture.splits):
            p_part = p_block + tl.cast(mixture.rows, tl.int64) * i_s * (mixture.E * mixture.RANK)
            b_hidden += tl.load(p_part, m_mr, other=0.0)
        if mixture.HAS_DOWN_BIAS:
            b_hidden += tl.load(mixture.p_down_bias + i_e * mixture.RANK + o_r, m_r, other=0.0).to(tl.float32)[None, :]
        if mixture.RELU:
            b_hidden = tl.maximum(b_hidden, 0.0)
    return b_hidden


@triton.jit(do_not_specialize=["rows", "rows_per_gate"])
def hidden_kernel(
    p_x, p_weight, p_bias, p_ids, p_hidden, rows, channels, stride_x, rows_per_gate, channels_per_split,
    E: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, SKIP: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute hidden [T, E*r], experts side by side; with SPLIT, its parts over channels [splits, T, E*r] in fp32."""
    i_m, i_f, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    F: tl.constexpr = E * RANK
    o_m = i_m * BM + tl.arange(0, BM)
    o_f = i_f * BF + tl.arange(0, BF)
    m_m = o_m < rows
    m_f = o_f < F
    start = i_s * channels_per_split
    end = tl.minimum(start + channels_per_split, channels)
    if SKIP:
        named = _any_named(p_ids, o_m // rows_per_gate, m_m, i_f * BF // RANK, (i_f * BF + BF - 1) // RANK, K, KP)
        end = tl.where(named, end, start)
    # [BM, BK], [BF, BK]
    p_rows = p_x + o_m.to(tl.int64)[:, None] * stride_x
    p_experts = p_weight + o_f.to(tl.int64)[:, None] * channels
    # [BM, BF]
    b_hidden = tl.zeros([BM, BF], tl.float32)
    for i_d in range(start, end, BK):
        o_d = i_d + tl.arange(0, BK)
        m_d = o_d < end
        b_x = tl.load(p_rows + o_d[None, :], m_m[:, None] & m_d[None, :], other=0.0)
        b_weight = tl.load(p_experts + o_d[None, :], m_f[:, None] & m_d[None, :], other=0.0)
        b_hidden = tl.dot(b_x, tl.trans(b_weight), b_hidden, input_precision=PRECISION)
    if not SPLIT:
        if HAS_BIAS:
            b_hidden += tl.load(p_bias + o_f, m_f, other=0.0).to(tl.float32)[None, :]
        if RELU:
            b_hidden = tl.maximum(b_hidden, 0.0)
    p_block = p_hidden + (tl.cast(rows, tl.int64) * i_s + o_m)[:, None] * F + o_f[None, :]
    tl.store(p_block, b_hidden.to(p_hidden.dtype.element_ty), m_m[:, None] & m_f[None, :])


@triton.jit
def _gated_hidden(o_m, m_m, o_gate, i_e, mixture):
    """Return hidden_e [BM, RP], times its gate if the gate is a number per row."""
    b_hidden = _load_hidden(o_m, m_m, i_e, mixture)
    if not mixture.CHANNEL:
        # [BM]
        b_weight = tl.load(mixture.p_gate + o_gate.to(tl.int64) * mixture.E + i_e, m_m, other=0.0).to(tl.float32)
        b_hidden = b_hidden.to(tl.float32) * b_weight[:, None]
    return b_hidden.to(mixture.p_weight.dtype.element_ty)


@triton.jit
def _task_update(b_kept, o_m, m_m, o_n, m_n, i_t, mixture):
    """Return the update [BM, BN] of all experts, with the gates of task i_t scaling the rows of the up weights.

    Gating the weights rather than the product keeps a single accumulator for all experts. The bias is an additional
    inner channel, whose activation is one.
    """
    dtype: tl.constexpr = mixture.p_weight.dtype.element_ty
    o_r = tl.arange(0, mixture.RP)
    o_k = tl.arange(0, 16)
    m_nr = m_n[:, None] & (o_r < mixture.RANK)[None, :]
    # [BM, BN], [BN]
    b_update = tl.zeros([o_m.shape[0], o_n.shape[0]], tl.float32)
    b_bias = tl.zeros([16, o_n.shape[0]], tl.float32)
    for i_e in tl.static_range(mixture.E):
        if mixture.KEEP:
            b_hidden = b_kept[i_e]
        else:
            b_hidden = _gated_hidden(o_m, m_m, o_m, i_e, mixture)
        p_row = mixture.p_gate + tl.cast(mixture.channels, tl.int64) * (i_t * mixture.E + i_e)
        b_gate = tl.load(p_row + o_n, m_n, other=0.0).to(tl.float32)
        # [BN, RP]
        p_expert = mixture.p_weight + tl.cast(mixture.channels, tl.int64) * i_e * mixture.RANK
        p_block = p_expert + o_n.to(tl.int64)[:, None] * mixture.RANK + o_r[None, :]
        b_up = tl.load(p_block, m_nr, other=0.0).to(tl.float32) * b_gate[:, None]
        b_update = tl.dot(b_hidden, tl.trans(b_up.to(dtype)), b_update, input_precision=mixture.PRECISION)
        if mixture.HAS_BIAS:
            # [16, BN], zero except for the first row
            m_kn = (o_k == 0)[:, None] & m_n[None, :]
            o_kn = o_k[:, None] * 0 + o_n[None, :]
            b_factor = tl.load(p_row + o_kn, m_kn, other=0.0).to(tl.float32)
            b_bias += b_factor * tl.load(mixture.p_bias + i_e * mixture.channels + o_kn, m_kn, other=0.0).to(tl.float32)
    if mixture.HAS_BIAS:
        b_one = tl.zeros([o_m.shape[0], 16], tl.float32) + tl.where(o_k == 0, 1.0, 0.0)[None, :]
        b_update = tl.dot(b_one.to(dtype), b_bias.to(dtype), b_update, input_precision=mixture.PRECISION)
    return b_update


@triton.jit
def _tasks(p_ids, o_gate, m_m, CHANNEL: tl.constexpr, TASKS: tl.constexpr):
    """Return the rows' tasks [BM], and the smallest and largest of them; undefined without CHANNEL."""
    b_task = o_gate
    low = 0
    high = 0
    if CHANNEL:
        b_task = tl.load(p_ids + o_gate, m_m, other=-1).to(tl.int32)
        low = tl.maximum(tl.min(tl.where(m_m, b_task, TASKS), 0), 0)
        high = tl.minimum(tl.max(b_task, 0), TASKS - 1)
    return b_task, low, high


@triton.jit
def _hidden_of_all(o_m, m_m, o_gate, mixture):
    """Return `_gated_hidden` of every expert, or an empty tuple without KEEP."""
    b_kept = ()
    if mixture.KEEP:
        for i_e in tl.static_range(mixture.E):
            b_kept = b_kept + (_gated_hidden(o_m, m_m, o_gate, i_e, mixture),)
    return b_kept


@triton.jit
def _add_updates(b_out, b_kept, o_m, m_m, o_n, m_n, o_gate, b_task, low, high, mixture):
    """Add the gated updates of all experts to b_out [BM, BN]; a channel gate uses the tasks low..high."""
    dtype: tl.constexpr = mixture.p_weight.dtype.element_ty
    if mixture.CHANNEL:
        if mixture.CHOOSE:
            for i_t in tl.static_range(mixture.TASKS):
                if (low <= i_t) & (i_t <= high):
                    b_update = _task_update(b_kept, o_m, m_m, o_n, m_n, i_t, mixture)
                    b_out += tl.where((b_task == i_t)[:, None], b_update, 0.0)
        else:
            for i_t in range(low, high + 1):
                b_update = _task_update(b_kept, o_m, m_m, o_n, m_n, i_t, mixture)
                b_out += tl.where((b_task == i_t)[:, None], b_update, 0.0)
    else:
        o_r = tl.arange(0, mixture.RP)
        o_e = tl.arange(0, mixture.EP)
        m_nr = m_n[:, None] & (o_r < mixture.RANK)[None, :]
        for i_e in tl.static_range(mixture.E):
            named = True
            if mixture.SKIP:
                named = _any_named(mixture.p_ids, o_gate, m_m, i_e, i_e, mixture.K, mixture.KP)
            if named:
                if mixture.KEEP:
                    b_hidden = b_kept[i_e]
                else:
                    b_hidden = _gated_hidden(o_m, m_m, o_gate, i_e, mixture)
                # [BN, RP]
                p_expert = mixture.p_weight + tl.cast(mixture.channels, tl.int64) * i_e * mixture.RANK
                p_up = p_expert + o_n.to(tl.int64)[:, None] * mixture.RANK + o_r[None, :]
                b_up = tl.load(p_up, m_nr, other=0.0)
                b_out = tl.dot(b_hidden, tl.trans(b_up), b_out, input_precision=mixture.PRECISION)
        if mixture.HAS_BIAS:
            # [BM, EP], [EP, BN]
            p_weights = mixture.p_gate + o_gate.to(tl.int64)[:, None] * mixture.E + o_e[None, :]
            b_weights = tl.load(p_weights, m_m[:, None] & (o_e < mixture.E)[None, :], other=0.0).to(dtype)
            p_biases = mixture.p_bias + o_e[:, None] * mixture.channels + o_n[None, :]
            b_bias = tl.load(p_biases, (o_e < mixture.E)[:, None] & m_n[None, :], other=0.0)
            b_out = tl.dot(b_weights, b_bias, b_out, input_precision=mixture.PRECISION)
    return b_out


@triton.jit(do_not_specialize=["rows", "rows_per_gate", "splits"])
def update_kernel(
    p_hidden, p_down_bias, p_weight, p_bias, p_gate, p_ids, p_residual, p_out,
    rows, channels, stride_residual, rows_per_gate, channels_per_program, splits,
    E: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TASKS: tl.constexpr,
    CHANNEL: tl.constexpr, CHOOSE: tl.constexpr, SKIP: tl.constexpr, SPLIT: tl.constexpr, KEEP: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute out [T, N], channels_per_program at a time; KEEP holds all hidden tiles during the loop."""
    i_m, i_p = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_gate = o_m // rows_per_gate
    b_task, low, high = _tasks(p_ids, o_gate, m_m, CHANNEL, TASKS)
    b_kept = _hidden_of_all(
        o_m, m_m, o_gate,
        Mixture(
            p_hidden, p_down_bias, p_weight, p_bias, p_gate, p_ids, rows, channels, splits, E, RANK, RP, K, KP, EP,
            TASKS, CHANNEL, CHOOSE, SKIP, SPLIT, KEEP, HAS_DOWN_BIAS, HAS_BIAS, RELU, PRECISION,
        ),
    )  # fmt: skip
    end = tl.minimum((i_p + 1) * channels_per_program, channels)
    for i_n in range(i_p * channels_per_program, end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < end
        # [BM, BN]
        b_out = tl.zeros([BM, BN], tl.float32)
        b_out = _add_updates(
            b_out, b_kept, o_m, m_m, o_n, m_n, o_gate, b_task, low, high,
            Mixture(
                p_hidden, p_down_bias, p_weight, p_bias, p_gate, p_ids, rows, channels, splits, E, RANK, RP, K, KP, EP,
                TASKS, CHANNEL, CHOOSE, SKIP, SPLIT, KEEP, HAS_DOWN_BIAS, HAS_BIAS, RELU, PRECISION,
            ),
        )  # fmt: skip
        m_mn = m_m[:, None] & m_n[None, :]
        if HAS_RESIDUAL:
            p_block = p_residual + o_m.to(tl.int64)[:, None] * stride_residual + o_n[None, :]
            b_out += tl.load(p_block, m_mn, other=0.0).to(tl.float32)
        p_block = p_out + o_m.to(tl.int64)[:, None] * channels + o_n[None, :]
        tl.store(p_block, b_out.to(p_out.dtype.element_ty), m_mn)


@triton.jit(do_not_specialize=["rows", "rows_per_gate", "splits"])
def linear_kernel(
    p_x, p_linear, p_linear_bias, p_hidden, p_weight, p_gate, p_ids, p_out,
    rows, channels_in, channels, stride_x, rows_per_gate, splits,
    E: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TASKS: tl.constexpr,
    CHANNEL: tl.constexpr, CHOOSE: tl.constexpr, SKIP: tl.constexpr, SPLIT: tl.constexpr, EP: tl.constexpr,
    HAS_LINEAR_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of out [T, N] = x linear^T + linear_bias + the gated updates."""
    # GROUP tiles of rows process the channels side by side, so that they share weights in the cache.
    row_tiles = tl.cdiv(rows, BM)
    in_group = GROUP * tl.cdiv(channels, BN)
    first = tl.program_id(0) // in_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    i_m = first + tl.program_id(0) % in_group % height
    i_n = tl.program_id(0) % in_group // height
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_m = o_m < rows
    m_n = o_n < channels
    p_rows = p_x + o_m.to(tl.int64)[:, None] * stride_x
    p_channels = p_linear + o_n.to(tl.int64)[:, None] * channels_in
    # [BM, BN]
    b_out = tl.zeros([BM, BN], tl.float32)
    for i_d in range(0, channels_in, BK):
        o_d = i_d + tl.arange(0, BK)
        m_d = o_d < channels_in
        # [BM, BK], [BN, BK]
        b_x = tl.load(p_rows + o_d[None, :], m_m[:, None] & m_d[None, :], other=0.0)
        b_linear = tl.load(p_channels + o_d[None, :], m_n[:, None] & m_d[None, :], other=0.0)
        b_out = tl.dot(b_x, tl.trans(b_linear), b_out, input_precision=PRECISION)
    if HAS_LINEAR_BIAS:
        b_out += tl.load(p_linear_bias + o_n, m_n, other=0.0).to(tl.float32)[None, :]
    o_gate = o_m // rows_per_gate
    b_task, low, high = _tasks(p_ids, o_gate, m_m, CHANNEL, TASKS)
    b_out = _add_updates(
        b_out, (), o_m, m_m, o_n, m_n, o_gate, b_task, low, high,
        Mixture(
            p_hidden, None, p_weight, None, p_gate, p_ids, rows, channels, splits, E, RANK, RP, K, KP, EP,
            TASKS, CHANNEL, CHOOSE, SKIP, SPLIT, False, False, False, False, PRECISION,
        ),
    )  # fmt: skip
    p_block = p_out + o_m.to(tl.int64)[:, None] * channels + o_n[None, :]
    tl.store(p_block, b_out.to(p_out.dtype.element_ty), m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["rows", "rows_per_gate"])
def hidden_gradient_kernel(
    p_grad, p_weight, p_bias, p_gate, p_ids, p_hidden, p_dhidden, p_dgate,
    rows, channels, stride_grad, rows_per_gate,
    E: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TASKS: tl.constexpr,
    CHANNEL: tl.constexpr, CHOOSE: tl.constexpr, SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    GATE_GRADIENT: tl.constexpr, EG: tl.constexpr, GP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute d hidden of EG experts [T, EG, r], and the gradient of their gates if these are numbers per row."""
    i_m, i_g = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_r = tl.arange(0, RP)
    m_r = o_r < RANK
    o_e = tl.arange(0, GP)
    o_gate = o_m // rows_per_gate
    dtype: tl.constexpr = p_weight.dtype.element_ty
    if CHANNEL:
        # [BM]
        b_task = tl.load(p_ids + o_gate, m_m, other=0)
    # The gated gradient is in registers. As the left factor, it makes ptxas wait for every step; as the right factor,
    # it passes through shared memory, but needs 64 ranks, the fewest rows of a wgmma.
    TURNED: tl.constexpr = CHANNEL and RP >= 64 and dtype.primitive_bitwidth == 16
    # [BM, RP] per expert, TURNED [RP, BM]
    b_products = ()
    for _ in tl.static_range(EG):
        b_products = b_products + (tl.zeros([RP, BM] if TURNED else [BM, RP], tl.float32),)
    # [BM, GP]
    b_dgate = tl.zeros([BM, GP], tl.float32)
    end = channels
    if SKIP:
        end = tl.where(_any_named(p_ids, o_gate, m_m, i_g * EG, i_g * EG + EG - 1, K, KP), channels, 0)
    p_rows = p_grad + o_m.to(tl.int64)[:, None] * stride_grad
    for i_n in range(0, end, BK):
        o_n = i_n + tl.arange(0, BK)
        m_n = o_n < channels
        # [BM, BK]
        b_grad = tl.load(p_rows + o_n[None, :], m_m[:, None] & m_n[None, :], other=0.0)
        b_summed = ()
        for i in tl.static_range(EG):
            i_e = i_g * EG + i
            if CHANNEL:
                b_factor = _channel_factor(p_gate, b_task, i_e, o_n, m_n, channels, E, TASKS, CHOOSE)
                b_gated = (b_grad.to(tl.float32) * b_factor).to(dtype)
            else:
                b_gated = b_grad.to(dtype)
            # [BK, RP]
            p_expert = p_weight + tl.cast(channels, tl.int64) * i_e * RANK
            p_block = p_expert + o_n.to(tl.int64)[:, None] * RANK + o_r[None, :]
            b_up = tl.load(p_block, m_n[:, None] & m_r[None, :], other=0.0)
            if TURNED:
                b_product = tl.dot(tl.trans(b_up), tl.trans(b_gated), b_products[i], input_precision=PRECISION)
            else:
                b_product = tl.dot(b_gated, b_up, b_products[i], input_precision=PRECISION)
            b_summed = b_summed + (b_product,)
        b_products = b_summed
        if GATE_GRADIENT and HAS_BIAS:
            # [GP, BK]
            p_block = p_bias + (i_g * EG + o_e).to(tl.int64)[:, None] * channels + o_n[None, :]
            b_bias = tl.load(p_block, (o_e < EG)[:, None] & m_n[None, :], other=0.0)
            b_dgate = tl.dot(b_grad.to(dtype), tl.trans(b_bias), b_dgate, input_precision=PRECISION)
    for i in tl.static_range(EG):
        i_e = i_g * EG + i
        o_block = o_m.to(tl.int64)[:, None] * (E * RANK) + i_e * RANK + o_r[None, :]
        m_mr = m_m[:, None] & m_r[None, :]
        b_dhidden = tl.trans(b_products[i]) if TURNED else b_products[i]
        if RELU or GATE_GRADIENT:
            b_hidden = tl.load(p_hidden + o_block, m_mr, other=0.0).to(tl.float32)
        if GATE_GRADIENT:
            b_dgate += tl.where((o_e == i)[None, :], tl.sum(b_hidden * b_dhidden, 1)[:, None], 0.0)
        if not CHANNEL:
            b_weight = tl.load(p_gate + o_gate.to(tl.int64) * E + i_e, m_m, other=0.0).to(tl.float32)
            b_dhidden *= b_weight[:, None]
        if RELU:
            b_dhidden = tl.where(b_hidden > 0.0, b_dhidden, 0.0)
        tl.store(p_dhidden + o_block, b_dhidden.to(dtype), m_mr)
    if GATE_GRADIENT:
        p_block = p_dgate + o_m.to(tl.int64)[:, None] * E + i_g * EG + o_e[None, :]
        tl.store(p_block, b_dgate, m_m[:, None] & (o_e < EG)[None, :])


@triton.jit(do_not_specialize=["rows", "rows_per_gate", "rows_per_split"])
def outer_kernel(
    p_grad, p_hidden, p_gate, p_ids, p_weights, p_biases,
    rows, channels, stride_grad, rows_per_gate, rows_per_split,
    E: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, TASKS: tl.constexpr, CHANNEL: tl.constexpr,
    EG: tl.constexpr, GP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute g^T hidden_e in parts over chunks of rows [splits, tasks, E, N, r], and the corresponding sums.

    The sums are g^T 1 [splits, tasks, 1, N] for a channel gate, g^T gate [splits, 1, E, N] for one per row (TASKS is
    1).
    """
    i_n, i_g, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < channels
    o_r = tl.arange(0, RP)
    m_r = o_r < RANK
    o_e = tl.arange(0, GP)
    dtype: tl.constexpr = p_hidden.dtype.element_ty
    COLUMNS: tl.constexpr = 1 if CHANNEL else E
    start = i_s * rows_per_split
    end = tl.minimum(start + rows_per_split, rows)
    if CHANNEL:
        # Tasks without a row in the chunk are skipped.
        first = start // rows_per_gate
        last = (end - 1) // rows_per_gate
        low = TASKS
        high = -1
        for i_id in range(first, last + 1, BI):
            o_id = i_id + tl.arange(0, BI)
            b_ids = tl.load(p_ids + o_id, o_id <= last, other=-1).to(tl.int32)
            high = tl.maximum(high, tl.max(b_ids, 0))
            low = tl.minimum(low, tl.min(tl.where(o_id <= last, b_ids, TASKS), 0))
    for i_t in range(TASKS):
        stop = end
        if CHANNEL:
            stop = tl.where((low <= i_t) & (i_t <= high), end, start)
        # [BN, RP] per expert
        b_products = ()
        for _ in tl.static_range(EG):
            b_products = b_products + (tl.zeros([BN, RP], tl.float32),)
        # [BN, GP]
        b_sums = tl.zeros([BN, GP], tl.float32)
        for i_m in range(start, stop, BT):
            o_m = i_m + tl.arange(0, BT)
            m_m = o_m < end
            o_gate = o_m // rows_per_gate
            if CHANNEL:
                m_m = m_m & (tl.load(p_ids + o_gate, m_m, other=-1) == i_t)
            # [BN, BT]
            p_block = p_grad + o_m.to(tl.int64)[:, None] * stride_grad + o_n[None, :]
            b_grad = tl.trans(tl.load(p_block, m_m[:, None] & m_n[None, :], other=0.0).to(dtype))
            # [BT, GP]
            if CHANNEL:
                b_columns = (m_m[:, None] & (o_e == 0)[None, :]).to(dtype)
            else:
                p_block = p_gate + o_gate.to(tl.int64)[:, None] * E + i_g * EG + o_e[None, :]
                b_columns = tl.load(p_block, m_m[:, None] & (o_e < EG)[None, :], other=0.0).to(dtype)
            b_sums = tl.dot(b_grad, b_columns, b_sums, input_precision=PRECISION)
            b_summed = ()
            for i in tl.static_range(EG):
                i_e = i_g * EG + i
                # [BT, RP]
                p_block = p_hidden + o_m.to(tl.int64)[:, None] * (E * RANK) + i_e * RANK + o_r[None, :]
                b_hidden = tl.load(p_block, m_m[:, None] & m_r[None, :], other=0.0)
                if not CHANNEL:
                    b_weight = tl.load(p_gate + o_gate.to(tl.int64) * E + i_e, m_m, other=0.0).to(tl.float32)
                    b_hidden = (b_hidden.to(tl.float32) * b_weight[:, None]).to(dtype)
                b_summed = b_summed + (tl.dot(b_grad, b_hidden, b_products[i], input_precision=PRECISION),)
            b_products = b_summed
        i_part = tl.cast(i_s, tl.int64) * TASKS + i_t
        for i in tl.static_range(EG):
            p_block = p_weights + (i_part * E + i_g * EG + i) * channels * RANK
            p_block += o_n.to(tl.int64)[:, None] * RANK + o_r[None, :]
            tl.store(p_block, b_products[i], m_n[:, None] & m_r[None, :])
        m_e = (i_g * GP + o_e == 0) if CHANNEL else (o_e < EG)
        p_block = p_biases + (i_part * COLUMNS + i_g * EG + o_e)[None, :] * channels + o_n[:, None]
        tl.store(p_block, b_sums, m_n[:, None] & m_e[None, :])


@triton.jit(do_not_specialize=["splits"])
def up_gradient_kernel(
    p_weights, p_biases, p_gate, p_weight, p_bias, p_dweight, p_dbias, p_dgate, channels, splits,
    E: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, TASKS: tl.constexpr, CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add the parts in order, and compute the gradients of one expert's up weight, bias and channel gate.

    Gradients whose pointer is None are not written.
    """
    i_n, i_e = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < channels
    o_r = tl.arange(0, RP)
    m_nr = m_n[:, None] & (o_r < RANK)[None, :]
    COLUMNS: tl.constexpr = 1 if CHANNEL else E
    column = 0 if CHANNEL else i_e
    o_block = tl.cast(channels, tl.int64) * i_e * RANK + o_n.to(tl.int64)[:, None] * RANK + o_r[None, :]
    o_bias = i_e * channels + o_n
    # [BN, RP], [BN]
    b_dweight = tl.zeros([BN, RP], tl.float32)
    b_dbias = tl.zeros([BN], tl.float32)
    if p_dgate is not None:
        b_weight = tl.load(p_weight + o_block, m_nr, other=0.0).to(tl.float32)
        b_bias = tl.zeros([BN], tl.float32)
        if HAS_BIAS:
            b_bias = tl.load(p_bias + o_bias, m_n, other=0.0).to(tl.float32)
    for i_t in range(TASKS):
        b_product = tl.zeros([BN, RP], tl.float32)
        b_sum = tl.zeros([BN], tl.float32)
        for i_s in range(0, splits):
            i_part = tl.cast(i_s, tl.int64) * TASKS + i_t
            b_product += tl.load(p_weights + i_part * E * channels * RANK + o_block, m_nr, other=0.0)
            b_sum += tl.load(p_biases + (i_part * COLUMNS + column) * channels + o_n, m_n, other=0.0)
        if CHANNEL:
            o_gate = tl.cast(channels, tl.int64) * (i_t * E + i_e) + o_n
            b_gate = tl.load(p_gate + o_gate, m_n, other=0.0).to(tl.float32)
            b_dweight += b_gate[:, None] * b_product
            b_dbias += b_gate * b_sum
            if p_dgate is not None:
                b_dgate = tl.sum(b_product * b_weight, 1) + b_bias * b_sum
                tl.store(p_dgate + o_gate, b_dgate.to(p_dgate.dtype.element_ty), m_n)
        else:
            b_dweight += b_product
            b_dbias += b_sum
    if p_dweight is not None:
        tl.store(p_dweight + o_block, b_dweight.to(p_dweight.dtype.element_ty), m_nr)
    if p_dbias is not None:
        tl.store(p_dbias + o_bias, b_dbias.to(p_dbias.dtype.element_ty), m_n)
