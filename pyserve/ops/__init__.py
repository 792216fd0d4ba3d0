"""Typed wrappers of the native ops: the only way in which the rest of pyserve calls them.

`build.load_native` must have run. In the shapes below, num_tokens is the number of tokens of a step
and num_rows the number of its rows (one for each running sequence), both including padding; a cache
is [num_blocks, block_size, num_kv_heads, head_dim]. All float tensors of a call have one dtype:
float32 or bfloat16 on a CPU, bfloat16 or float16 on a card; sums are float32. The plain-torch
specification of each op is in reference.py. If `out` is given, the result is written to it: it has
the result's shape and overlaps no input unless the docstring allows that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pyserve.limits import TOP_LOGPROBS
from pyserve.ops import build
from pyserve.ops.native import native as _ops

STORE, ADD, SILU_MUL = range(3)  # Epilogue in cuda/common/epilogue.h
_served: dict[tuple[object, ...], bool] = {}  # cached answers of serves_linear, see _is_own


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, offset: float = 0.0
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dim (Zhang and Sennrich 2019).

    x [..., hidden], rows may be strided; weight [hidden] -> [..., hidden]; out may be x itself.
    """
    if out is None:
        out = torch.empty_like(x)
    _ops.rms_norm(x, weight, eps, out, offset)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None,
    offset: float = 0.0, x_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual += x in place, rounded to its dtype; returns rms_norm(residual).

    x, residual [..., hidden]; weight [hidden], offset as in rms_norm -> [..., hidden]. With
    x_weight [hidden], rms_norm(x) with that weight and the same eps and offset is added to the
    residual instead of x.
    """
    if out is None:
        out = torch.empty_like(x)
    _ops.add_rms_norm(x, residual, weight, eps, out, offset, x_weight)
    return out


def rope_write_kv(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, slot_mapping: Tensor, key_cache: Tensor,
    value_cache: Tensor, *, num_heads: int, num_kv_heads: int, q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None, eps: float = 0.0, norm_offset: float = 0.0,
    q_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Rotary embedding (Su et al. 2021, NeoX halves) fused with the KV write.

    qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] = q | k | v. q is rotated in place;
    rotated k, and v, go to the caches at slot_mapping (int64 [num_tokens], -1 writes nothing); k
    and v in qkv stay as they are. With a norm weight [head_dim], q or k is RMS-normed per head
    first. positions int32 [num_tokens]; cos_sin float32 [max_position, rotary_dim], cosines then
    sines, rotary_dim <= head_dim. q_scales float32 [max_position]: the factor of all of a rotated q
    at each position. norm_offset as offset in rms_norm. Raises RuntimeError if a position or a slot
    is out of range.
    """
    _ops.rope_write_kv(
        qkv, positions, cos_sin, slot_mapping, q_norm_weight, k_norm_weight, eps, num_heads,
        num_kv_heads, key_cache, value_cache, norm_offset, q_scales,
    )  # fmt: skip


def _is_own(x: Tensor, weight: Tensor, epilogue: int) -> bool:
    """Whether our own op is faster than torch's for this number of rows.

    cuda/gpu/linear/dispatch.cu decides on a card, by shape; cuda/cpu/linear.cpp on a CPU, by the
    number of rows and the dtype alone.
    """
    key: tuple[object, ...] = x.shape[0], x.dtype
    if x.is_cuda:
        key = *key, weight.shape, epilogue
    is_served = _served.get(key)
    if is_served is None:
        is_served = _served[key] = _ops.serves_linear(weight, x.shape[0], epilogue)
    return is_served


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x weight^T + bias: x [m, k], rows may be strided, weight [n, k], bias [n] -> [m, n].

    With few rows (up to 64, in float32 up to 16) the result for a row does not depend on the other
    rows or their number. With more rows rounding may differ, because torch computes the product
    (by oneDNN, which compiles and keeps code for every m that it meets), or, on a CPU without
    bfloat16 instructions, our op with another order of summation.
    """
    if not _is_own(x, weight, STORE):
        return functional.linear(x, weight, bias, out=out)  # type: ignore[call-arg]
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    _ops.linear(x, weight, bias, out)
    return out


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    """residual += x weight^T + bias in place, rounded once; shapes as in `linear`.

    If torch computes it, there are more roundings: the bias is added to the residual first, and
    cuBLAS may round the product before adding it.
    """
    if _is_own(x, weight, ADD):
        _ops.linear_add(x, weight, bias, residual)
        return
    if bias is not None:
        residual += bias
    residual.addmm_(x, weight.t())


def linear_silu_mul(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gate_up: Tensor
) -> None:
    """silu(gate) * up of gate | up = x weight^T + bias, rounded once.

    x [m, k], weight [2 n, k], bias [2 n], out [m, n]. gate_up [m, 2 n] is scratch memory, used if
    torch computes the product, which is then rounded before the activation.
    """
    if _is_own(x, weight, SILU_MUL):
        _ops.linear_silu_mul(x, weight, bias, out)
    else:
        silu_mul(linear(x, weight, bias, gate_up), out)


# The most rows on any card for which a norm may be fused into the three linears below. On a card
# this saves 2.3 us for each norm. It is not used on a CPU, where the demo model's step became 15 %
# faster with 1 row and 13 % slower with 16.
MAX_NORM_ROWS = 32


def max_norm_rows(device: torch.device, dtype: torch.dtype) -> int:
    """The most rows for which norms are fused into linears; 0: never.

    It is the number of rows that one pass over a weight serves: 32 on Hopper
    (cuda/gpu/linear/few_rows_sm90a.cu), else 8. Only in bfloat16, because float16 might overflow
    before the division by the root mean square.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return 0
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return MAX_NORM_ROWS if is_hopper else 8


def num_squares(columns: int) -> int:
    """Number of sums of squares for a row: one for each 16 columns (cuda/common/epilogue.h)."""
    return -(-columns // 16)


def linear_add_for_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor,
    scaled: Tensor, squares: Tensor,
) -> None:  # fmt: skip
    """linear_add; also writes what the linear after a norm of the residual needs.

    Arguments as in linear_add; norm_weight [n] is the norm's weight. Written are scaled [m, n] =
    residual * norm_weight and squares float32 [m, num_squares(n)], sums of squares of the residual.
    For at most MAX_NORM_ROWS rows.
    """
    _ops.linear_add(x, weight, bias, residual, norm_weight, scaled, squares)


def linear_of_scaled(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, x_squares: Tensor, eps: float
) -> None:
    """linear of rms_norm(residual), given `scaled` and `squares` of linear_add_for_norm.

    x [m, k] is `scaled`, x_squares float32 [m, num_squares(k)] is `squares`. The product is
    multiplied by 1 / sqrt(mean(residual^2) + eps); then the bias is added and the sum rounded once.
    """
    _ops.linear(x, weight, bias, out, x_squares, eps)


def linear_silu_mul_of_scaled(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, x_squares: Tensor, eps: float
) -> None:
    """linear_silu_mul of rms_norm(residual), with arguments as in linear_of_scaled."""
    _ops.linear_silu_mul(x, weight, bias, out, x_squares, eps)


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up (Shazeer 2020): gate_up [num_tokens, 2 n] = gate | up -> [num_tokens, n]."""
    if out is None:
        num_tokens, width = gate_up.shape
        out = gate_up.new_empty(num_tokens, width // 2)
    _ops.silu_mul(gate_up, out)
    return out


def gelu_tanh_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """gelu(gate) * up by the tanh approximation (Hendrycks and Gimpel 2016); shapes as silu_mul."""
    if out is None:
        num_tokens, width = gate_up.shape
        out = gate_up.new_empty(num_tokens, width // 2)
    _ops.gelu_tanh_mul(gate_up, out)
    return out


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, row_slots: Tensor,
    cu_seqlens_q: Tensor, seq_lens: Tensor, *, softmax_scale: float, window: int = 0,
    max_query_len: int | None = None, plan: AttentionPlan | None = None, out: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Causal attention over a paged KV cache, any mix of query lengths.

    q [num_tokens, num_heads, head_dim], strided views allowed -> the same shape.
    block_table int32 [num_slots, max_blocks_per_seq]; row_slots int32 [num_rows], -1 for a padded
    row; cu_seqlens_q int32 [num_rows + 1]; seq_lens int32 [num_rows], KV tokens of each row
    including this step's. Query i of a row is at position seq_len - query_len + i and attends to
    the keys up to its position; with window > 0 only to the last `window` of them. The output of
    padding tokens is undefined. head_dim: a multiple of 8, at most 256; on CUDA 64, 96, 128 or 256.
    With softcap > 0, which CUDA does not support for head_dim 64, scaled scores become
    softcap * tanh(score / softcap). On CUDA, `plan` is that of plan_attention for these rows and
    this window, and max_query_len is an upper bound of their query lengths (None: num_tokens); a
    CPU needs neither.
    """
    if out is None:
        out = torch.empty_like(q)
    _ops.paged_attention(
        q, key_cache, value_cache, block_table, row_slots, cu_seqlens_q, seq_lens,
        softmax_scale, window, q.shape[0] if max_query_len is None else max_query_len,
        None if plan is None else plan.work, None if plan is None else plan.workspace, out,
        softcap,
    )  # fmt: skip
    return out


def rope_attention(
    q: Tensor, qkv: Tensor, cos_sin: Tensor, key_cache: Tensor, value_cache: Tensor,
    block_table: Tensor, row_slots: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, *,
    softmax_scale: float, plan: AttentionPlan, window: int = 0, out: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """rope_write_kv and paged_attention in one kernel: for steps that only decode; CUDA only.

    qkv, cos_sin and what is written to the caches are as in rope_write_kv, but cos_sin is
    [max_position, head_dim]: the whole head is rotated. All other arguments are as in
    paged_attention. q is a view of qkv, which is not modified. No row has more queries than
    attention_plan.decode_query_len.

    The kernel starts before the one launched just before it on the stream has ended, and waits for
    it only to read qkv. So that one may write qkv, but the plan, the block table and the keys of
    earlier steps must come from kernels before it.
    """
    if out is None:
        out = torch.empty_like(q)
    _ops.rope_attention(
        q, qkv, cos_sin, key_cache, value_cache, block_table, row_slots, cu_seqlens_q, seq_lens,
        softmax_scale, window, plan.work, plan.workspace, out, softcap,
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How paged_attention divides a step's work over a CUDA device, and memory for partial results.

    The layout is in cuda/gpu/attention/attention.h, the sizes in attention_plan.py.
    """

    work: Tensor  # int32 [words]
    workspace: Tensor  # float32 [words], zero before the first use; reusable after each call


def plan_attention(
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    plan: AttentionPlan,
    *,
    num_heads: int,
    num_kv_heads: int,
    window: int = 0,
) -> None:
    """Fill plan.work for the rows of a step. CUDA only; called once a step for each window.

    cu_seqlens_q int32 [num_rows + 1], seq_lens int32 [num_rows], as in paged_attention.
    """
    _ops.plan_attention(cu_seqlens_q, seq_lens, num_heads, num_kv_heads, window, plan.work)


class StepPlan(NamedTuple):
    """The tensors that plan_step derives for one step, in the order of its arguments.

    In padding, ids, positions and lengths are 0 and slots are -1; cu_seqlens_q of padded rows is
    the number of tokens without padding. sample_rows holds (index of the row's last token, slot)
    for each sampled row, in row order.
    """

    input_ids: Tensor  # int32 [num_tokens]
    positions: Tensor  # int32 [num_tokens]
    slot_mapping: Tensor  # int64 [num_tokens]
    row_slots: Tensor  # int32 [num_rows]
    cu_seqlens_q: Tensor  # int32 [num_rows + 1]
    seq_lens: Tensor  # int32 [num_rows]
    sample_rows: Tensor  # int32 [num_rows, 2]

    @classmethod
    def allocate(cls, max_num_tokens: int, max_num_rows: int, device: torch.device) -> StepPlan:
        """Tensors for the largest step; `narrow` gives those of one step."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            input_ids=zeros(max_num_tokens),
            positions=zeros(max_num_tokens),
            slot_mapping=zeros(max_num_tokens, dtype=torch.int64),
            row_slots=zeros(max_num_rows),
            cu_seqlens_q=zeros(max_num_rows + 1),
            seq_lens=zeros(max_num_rows),
            sample_rows=zeros(max_num_rows, 2),
        )

    def narrow(self, num_tokens: int, num_rows: int) -> StepPlan:
        """Views of the first num_tokens tokens and num_rows rows."""
        return StepPlan(
            input_ids=self.input_ids[:num_tokens],
            positions=self.positions[:num_tokens],
            slot_mapping=self.slot_mapping[:num_tokens],
            row_slots=self.row_slots[:num_rows],
            cu_seqlens_q=self.cu_seqlens_q[: num_rows + 1],
            seq_lens=self.seq_lens[:num_rows],
            sample_rows=self.sample_rows[:num_rows],
        )


def plan_step(
    step_input: Tensor,
    slots: Tensor,
    block_table: Tensor,
    token_counts: Tensor,
    block_size: int,
    plan: StepPlan,
) -> None:
    """Apply a packed StepInput to the slots, and write all of `plan`.

    step_input int32 [num_words] (cuda/common/step.h); slots int32 [num_slots, SLOT_WORDS];
    block_table int32 [num_slots, max_blocks_per_seq]; token_counts int16 [num_slots, vocab_size].
    A row's positions start at its slot's num_computed, which advances by the row's query length.
    Raises RuntimeError if the buffer is inconsistent or out of range; slots and block_table may
    then hold some of its updates.
    """
    _ops.plan_step(step_input, slots, block_table, token_counts, block_size, *plan)


def sample(
    logits: Tensor,
    sample_slots: Tensor,
    slots: Tensor,
    token_counts: Tensor,
    *,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sample one token for each row by its slot's parameters -> int32 [num_samples], or `out`.

    logits [num_samples, vocab_size] are not modified; sample_slots int32 [num_samples], any stride,
    -1 for a padded row, whose token is 0. A row with NaN or +inf, or with no token left, gives -1.
    The token becomes the slot's last token and, if the slot has penalties, is counted. The result
    depends only on the row's logits, its slot's parameters, seed and sample index, and its
    position. workspace: of sample_workspace.allocate on CUDA, None on a CPU.
    """
    sampled = sample_slots.new_empty(len(sample_slots)) if out is None else out
    _ops.sample(logits, sample_slots, slots, token_counts, workspace, sampled)
    return sampled


def apply_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    """Set the logits of tokens that a row's mask forbids to -inf, in place; others keep their bits.

    logits [num_rows, vocab_size]; bitmask int32 [num_masked, num_words], num_words at most
    ceil(vocab_size / 32): bit t % 32 of word t // 32 is set if token t is allowed; tokens beyond
    the last word are not allowed. rows int32 [num_masked], any stride: the row of logits that each
    mask is for, all different; -1 for none. Raises RuntimeError if a row is out of range.
    """
    _ops.apply_bitmask(logits, bitmask, rows)


class LogprobRows(NamedTuple):
    """The results of `logprobs`: views of one tensor, so that one copy fetches all."""

    words: Tensor  # int32 [num_asked, LOGPROB_WORDS]: the four below, side by side
    token_logprobs: Tensor  # float32 [num_asked]
    token_ranks: Tensor  # int32 [num_asked]
    top_ids: Tensor  # int32 [num_asked, TOP_LOGPROBS]
    top_logprobs: Tensor  # float32 [num_asked, TOP_LOGPROBS]

    @classmethod
    def of(cls, words: Tensor) -> LogprobRows:
        """Views of `words`."""
        reals, end = words.view(torch.float32), 2 + TOP_LOGPROBS
        return cls(words, reals[:, 0], words[:, 1], words[:, 2:end], reals[:, end:])


LOGPROB_WORDS = 2 + 2 * TOP_LOGPROBS


def logprobs(
    logits: Tensor, rows: Tensor, token_ids: Tensor, out: LogprobRows, *, is_normalized: bool = True
) -> None:
    """For some rows of logits, compute the logprob of a token and the TOP_LOGPROBS largest ones.

    logits [num_rows, vocab_size]; rows int32 [num_asked]: the row of logits that each row of `out`
    is for, -1 for none; token_ids int32 [num_rows]: the token of each row of logits, -1 for none;
    both with any stride. `out` gets the token's log-softmax and rank (1 + the number of tokens with
    a larger logit; -inf and 0 without a token), and the largest logprobs in descending order, of
    equal ones the lower id first, filled up with id -1 and -inf if the vocabulary is smaller.
    Without is_normalized, logits take the place of logprobs. A NaN counts as -inf; if no logit is
    finite, or one is +inf, all logprobs are -inf. Raises RuntimeError if a row or a token id is out
    of range.
    """
    _ops.logprobs(logits, rows, token_ids, is_normalized, *out[1:])


def pack_step(
    buffer: NDArray[np.int32],
    row_slots: list[int],
    query_lens: list[int],
    host_tokens: list[list[int] | None],
    row_samples: list[bool],
    block_updates: list[int],
    slot_updates: list[bytes],
    adapter_starts: list[int] | None = None,
) -> int:
    """Write a StepInput (cuda/common/step.h) into `buffer`; returns its number of words.

    row_slots, query_lens, host_tokens and row_samples have one entry for each row: its slot, its
    number of tokens, their ids, and whether it is sampled. If host_tokens[r] is None, the row has
    one token, the one that its slot sampled last. block_updates are flat triples (slot, index,
    block id); each item of slot_updates is one complete record; adapter_starts is `starts` of
    lora.py, None or empty if no row uses an adapter. Raises ValueError if the buffer is too small
    or the lists do not fit each other.
    """
    num_words: int = build.host().pack_step(
        buffer, row_slots, query_lens, host_tokens, row_samples, block_updates, slot_updates,
        adapter_starts or [],
    )  # fmt: skip
    return num_words
