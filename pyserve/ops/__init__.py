"""Typed wrappers of the native ops: the only way the rest of pyserve calls them.

`build.load_native` must have run. Shapes below: num_tokens is the tokens of a step, num_rows its
rows (one per running sequence), padded ones included; a cache is
[num_blocks, block_size, num_kv_heads, head_dim]. Float tensors of one call share one dtype, float32
or bfloat16; sums are float32. The plain-torch meaning of each op is in reference.py. A result is
written to `out` where that is given: a tensor of its shape that none of the inputs overlaps.
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
_served: dict[tuple[object, ...], bool] = {}  # what serves_linear said, by shapes and epilogue


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

    x, residual [..., hidden]; weight [hidden], offset as in rms_norm -> [..., hidden].
    x_weight [hidden]: rms_norm(x) by it, with the same eps and offset, is added in place of x.
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
    sines, rotary_dim <= head_dim. q_scales float32 [max_position]: what all of a rotated q is
    multiplied by. norm_offset as offset in rms_norm. Raises RuntimeError where a position or a slot
    is out of range.
    """
    _ops.rope_write_kv(
        qkv, positions, cos_sin, slot_mapping, q_norm_weight, k_norm_weight, eps, num_heads,
        num_kv_heads, key_cache, value_cache, norm_offset, q_scales,
    )  # fmt: skip


def _is_own(x: Tensor, weight: Tensor, epilogue: int) -> bool:
    """Whether our own op is the fastest for these rows.

    On a card cuda/gpu/linear/dispatch.cu says it; on a CPU cuda/cpu/linear.cpp, for all shapes.
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

    Of few rows (64, in float32 16) none depends on the others, nor on how many there are. Beyond,
    torch may round otherwise (oneDNN, which compiles and keeps code for every m it meets), or where
    the CPU has no bfloat16 products of its own, our op with sums in another order.
    """
    if not _is_own(x, weight, STORE):
        return functional.linear(x, weight, bias, out=out)  # type: ignore[call-arg]
    if out is None:
        out = x.new_empty((x.shape[0], weight.shape[0]))
    _ops.linear(x, weight, bias, out)
    return out


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    """residual += x weight^T + bias in place, rounded once; shapes as in `linear`.

    Where torch takes it, a bias is rounded into the residual before, and cuBLAS may round the
    product before it adds it: as a linear and an add would.
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

    x [m, k], weight [2 n, k], bias [2 n], out [m, n]; gate_up [m, 2 n] is room for where it takes
    two calls, and a rounding between them.
    """
    if _is_own(x, weight, SILU_MUL):
        _ops.linear_silu_mul(x, weight, bias, out)
    else:
        silu_mul(linear(x, weight, bias, gate_up), out)


# Rows up to which a norm may be a factor between the three linears below, on any card. It pays
# there, where a norm is 2.3 us of a chain. On a CPU the demo model's step gains 15 % by it at 1 row
# and loses 13 % at 16.
MAX_NORM_ROWS = 32


def max_norm_rows(device: torch.device, dtype: torch.dtype) -> int:
    """Rows up to which norms are factors: as many as one pass over a weight serves, which is 32 on
    Hopper (cuda/gpu/linear/few_rows_sm90a.cu), else 8. 0 for never: float16 might not hold what is
    not divided by its root mean square yet."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return 0
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return MAX_NORM_ROWS if is_hopper else 8


def num_squares(columns: int) -> int:
    """Sums of squares of a row: one for each 16 columns, cuda/common/epilogue.h."""
    return -(-columns // 16)


def linear_add_for_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor,
    scaled: Tensor, squares: Tensor,
) -> None:  # fmt: skip
    """linear_add, and what a norm of the residual needs so that it can be a factor.

    norm_weight [n]; scaled [m, n] = residual * norm_weight; squares float32 [m, num_squares(n)].
    """
    _ops.linear_add(x, weight, bias, residual, norm_weight, scaled, squares)


def linear_of_scaled(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, x_squares: Tensor, eps: float
) -> None:
    """linear of rms_norm of the residual, given what linear_add_for_norm made of it.

    x [m, k] = residual * the norm's weight, x_squares [m, num_squares(k)]. The sums are multiplied
    by 1 / sqrt(mean(residual^2) + eps), then come the bias and one rounding.
    """
    _ops.linear(x, weight, bias, out, x_squares, eps)


def linear_silu_mul_of_scaled(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, x_squares: Tensor, eps: float
) -> None:
    """linear_silu_mul of rms_norm of the residual, as linear_of_scaled."""
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
    row; cu_seqlens_q int32 [num_rows + 1]; seq_lens int32 [num_rows], KV tokens of the row with
    this step's. Query i of a row sits at position seq_len - query_len + i and sees the keys up to
    its position, with window > 0 only the last `window` of them. Tokens of no row (padding) leave
    their output undefined. head_dim: a multiple of 8, at most 256; on CUDA 64, 96, 128 or 256. With
    softcap > 0, on CUDA not at head_dim 64, scaled scores become softcap * tanh(score / softcap).
    On CUDA `plan` is what plan_attention made of these rows with this window, and max_query_len
    bounds their query lengths (None: num_tokens does); a CPU needs neither.
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
    """rope_write_kv, then paged_attention, in one kernel: for steps that are all decode, CUDA only.

    qkv, cos_sin [max_position, head_dim] (all of a head is turned) and what goes to the caches are
    those of rope_write_kv, all others those of paged_attention. q is the view of qkv; it stays as
    it is. No row has more queries than attention_plan.decode_query_len. What the kernels in front
    of the last one wrote is read while that one still runs: q, k and v are the last one's work,
    the plan, the block table and the keys of earlier steps are not.
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
    """How paged_attention of a step divides its work over a CUDA device, and room for its parts.

    Layout: cuda/gpu/attention/attention.h; sizes: attention_plan.py.
    """

    work: Tensor  # int32 [words]
    workspace: Tensor  # float32 [words], zero at first; paged_attention keeps it usable


def plan_attention(
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    plan: AttentionPlan,
    *,
    num_heads: int,
    num_kv_heads: int,
    window: int = 0,
) -> None:
    """Fill plan.work for the rows of a step; CUDA only, once a step for all layers of `window`."""
    _ops.plan_attention(cu_seqlens_q, seq_lens, num_heads, num_kv_heads, window, plan.work)


class StepPlan(NamedTuple):
    """What plan_step derives for one step, in the order in which it takes them.

    Padding: ids and positions 0, lengths 0, slots -1. cu_seqlens_q of padded rows is num_tokens.
    sample_rows holds, for each sampled row in row order, (index of the row's last token, slot).
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
    """Apply a packed StepInput to the slots and derive `plan` from it, all of it written.

    step_input int32 [num_words] (cuda/common/step.h); slots int32 [num_slots, SLOT_WORDS];
    block_table int32 [num_slots, max_blocks_per_seq]; token_counts int16 [num_slots, vocab_size].
    A row's positions start at its slot's num_computed, which advances by the row's query length.
    Raises RuntimeError where the buffer is inconsistent or out of range; slots and block_table may
    then hold part of its updates.
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
    """Draw one token per row by its slot's parameters -> int32 [num_samples], `out` if given.

    logits [num_samples, vocab_size] stay as they are; sample_slots int32 [num_samples], any stride,
    -1 for a padded row (gives 0). A row with NaN or +inf, or with nothing left, gives -1. The token
    is noted in its slot and, where that has penalties, counted. The draw depends on the row's
    logits and parameters, its seed, sample index and position, and on nothing else.
    """
    sampled = sample_slots.new_empty(len(sample_slots)) if out is None else out
    _ops.sample(logits, sample_slots, slots, token_counts, workspace, sampled)
    return sampled


def apply_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    """Set the logits of tokens that a row's mask forbids to -inf, in place; others keep their bits.

    logits [num_rows, vocab_size]; bitmask int32 [num_masked, num_words], num_words at most
    ceil(vocab_size / 32): bit t % 32 of word t // 32 is set where token t is allowed, a token
    behind the last word is not. rows int32 [num_masked], any stride: the row of logits that each
    mask is for, all different; -1 masks none. Raises RuntimeError where a row is out of range.
    """
    _ops.apply_bitmask(logits, bitmask, rows)


class LogprobRows(NamedTuple):
    """What `logprobs` tells of rows; all of it lies in one tensor, for one copy."""

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
    """Tell of some rows how likely a token is, and the TOP_LOGPROBS most likely ones.

    logits [num_rows, vocab_size]; rows int32 [num_asked]: the row of logits that each row of `out`
    is about, -1 for none; token_ids int32 [num_rows]: the token of each row of logits, -1 for none;
    both with any stride. To `out` go the token's log-softmax, its rank (1 + the number of tokens
    with a larger logit; 0 and -inf without a token), and the largest, in descending order, of equal
    ones the lower id first; -1 and -inf where the vocabulary has no more. Without is_normalized
    they are the logits themselves. A NaN counts as -inf; where no logit is finite, or one is inf,
    all logarithms are -inf. Raises RuntimeError where a row or a token id is out of range.
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

    host_tokens[r] None: the row's one token is the one its slot sampled last. block_updates are
    flat triples (slot, index, block id); each of slot_updates is one complete record;
    adapter_starts are as lora.py has them, None where no row uses an adapter. Raises ValueError
    where the buffer is too small or the lists do not fit each other.
    """
    num_words: int = build.host().pack_step(
        buffer, row_slots, query_lens, host_tokens, row_samples, block_updates, slot_updates,
        adapter_starts or [],
    )  # fmt: skip
    return num_words
