"""Plain-torch twins of the ops: the specification of the ops, the oracle of the tests, and the
implementation that `--allow-reference-ops` serves with. Signatures are those of cuda/ops.cpp.

Written to be read, not to be fast. Floats are computed in float32 and rounded once at the end. The
samplers of all backends equal `sample` bit for bit, so its arithmetic is spelled out.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyserve import limits
from pyserve.ops import step_layout as layout
from pyserve.ops.reference_experts import combine_experts as combine_experts
from pyserve.ops.reference_experts import grouped_linear as grouped_linear
from pyserve.ops.reference_experts import grouped_linear_silu_mul as grouped_linear_silu_mul
from pyserve.ops.reference_experts import route as route
from pyserve.ops.reference_latent import batched_linear as batched_linear
from pyserve.ops.reference_latent import latent_attention as latent_attention
from pyserve.ops.reference_latent import rope_write_latent as rope_write_latent
from pyserve.ops.reference_linear import gelu_tanh_mul as gelu_tanh_mul
from pyserve.ops.reference_linear import linear as linear
from pyserve.ops.reference_linear import linear_add as linear_add
from pyserve.ops.reference_linear import linear_silu_mul as linear_silu_mul
from pyserve.ops.reference_linear import serves_linear as serves_linear
from pyserve.ops.reference_linear import silu_mul as silu_mul
from pyserve.ops.reference_lora import linear_lora as linear_lora
from pyserve.ops.reference_lora import lora_expand as lora_expand
from pyserve.ops.reference_lora import lora_expand_silu_mul as lora_expand_silu_mul
from pyserve.ops.reference_lora import lora_shrink as lora_shrink
from pyserve.ops.reference_lora import serves_linear_lora as serves_linear_lora
from pyserve.ops.reference_quantised import dequantise_fp8 as dequantise_fp8
from pyserve.ops.reference_quantised import dequantise_w4a16 as dequantise_w4a16
from pyserve.ops.reference_quantised import grouped_linear_fp8 as grouped_linear_fp8
from pyserve.ops.reference_quantised import grouped_linear_w4a16 as grouped_linear_w4a16
from pyserve.ops.reference_quantised import linear_fp8 as linear_fp8
from pyserve.ops.reference_quantised import linear_w4a16 as linear_w4a16
from pyserve.ops.reference_quantised import linear_w8a8 as linear_w8a8
from pyserve.ops.reference_quantised import serves_linear_fp8 as serves_linear_fp8
from pyserve.ops.reference_quantised import serves_linear_w4a16 as serves_linear_w4a16
from pyserve.ops.reference_sample import WEIGHT_SCALE as WEIGHT_SCALE
from pyserve.ops.reference_sample import apply_bitmask as apply_bitmask
from pyserve.ops.reference_sample import logprobs as logprobs
from pyserve.ops.reference_sample import quantized_exp as quantized_exp
from pyserve.ops.reference_sample import sample as sample
from pyserve.ops.step_checks import check_sampling, checked_header, require


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, offset: float = 0.0) -> None:
    """out = x / sqrt(mean(x^2) + eps) * (weight + offset) (Zhang and Sennrich 2019)."""
    out.copy_(_rms_norm_float32(x, weight, eps, offset))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, offset: float = 0.0,
    x_weight: Tensor | None = None,
) -> None:  # fmt: skip
    """residual += x, or with x_weight the norm of x, rounded; out = rms_norm(residual)."""
    if x_weight is not None:
        x = _rms_norm_float32(x, x_weight, eps, offset).to(x.dtype)
    residual.copy_(residual.float() + x.float())
    out.copy_(_rms_norm_float32(residual, weight, eps, offset))


def rope_write_kv(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, slot_mapping: Tensor,
    q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, eps: float, num_heads: int,
    num_kv_heads: int, key_cache: Tensor, value_cache: Tensor, norm_offset: float = 0.0,
    q_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Norm, rotate and scale q in place, norm and rotate k, write k and v to their KV slots."""
    block_size, head_dim = key_cache.shape[1], key_cache.shape[3]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    q, k = heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]
    v = heads[:, num_heads + num_kv_heads :]
    if bool(((positions < 0) | (positions >= cos_sin.shape[0])).any()):
        raise RuntimeError(f"rope_write_kv: a position is outside [0, {cos_sin.shape[0]})")
    num_kv_slots = key_cache.shape[0] * block_size
    if bool(((slot_mapping < -1) | (slot_mapping >= num_kv_slots)).any()):
        raise RuntimeError(f"rope_write_kv: a KV slot is outside [-1, {num_kv_slots})")
    rows = cos_sin[positions.long()].unsqueeze(1)
    rotated_q = _rotate(_norm_heads(q, q_norm_weight, eps, norm_offset), rows)
    q.copy_(rotated_q if q_scales is None else rotated_q * q_scales[positions.long(), None, None])
    rotated_k = _rotate(_norm_heads(k, k_norm_weight, eps, norm_offset), rows)
    written = slot_mapping >= 0
    blocks, offsets = slot_mapping[written] // block_size, slot_mapping[written] % block_size
    key_cache[blocks, offsets] = rotated_k[written].to(key_cache.dtype)
    value_cache[blocks, offsets] = v[written].to(value_cache.dtype)


def paged_attention(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, row_slots: Tensor,
    cu_seqlens_q: Tensor, seq_lens: Tensor, softmax_scale: float, window: int, max_query_len: int,
    work: Tensor | None, workspace: Tensor | None, out: Tensor, softcap: float = 0.0,
) -> None:  # fmt: skip
    """Causal attention of each row's queries over the KV of its slot. max_query_len, work and
    workspace only say how a card may divide the work, and are not used here."""
    num_kv_heads, head_dim = key_cache.shape[2:]
    group, block_size = q.shape[1] // num_kv_heads, key_cache.shape[1]
    starts, lens = cu_seqlens_q.tolist(), seq_lens.tolist()
    for row, slot in enumerate(row_slots.tolist()):
        begin, end, seq_len = starts[row], starts[row + 1], lens[row]
        if slot < 0 or begin == end:
            continue
        num_blocks = -(-seq_len // block_size)
        blocks = block_table[slot, :num_blocks].long()
        keys = key_cache[blocks].reshape(-1, num_kv_heads, head_dim)[:seq_len].float()
        values = value_cache[blocks].reshape(-1, num_kv_heads, head_dim)[:seq_len].float()
        queries = q[begin:end].float().view(end - begin, num_kv_heads, group, head_dim)
        scores = torch.einsum("qhgd,khd->hgqk", queries, keys) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        query_positions = torch.arange(seq_len - (end - begin), seq_len, device=q.device)[:, None]
        key_positions = torch.arange(seq_len, device=q.device)[None, :]
        visible = key_positions <= query_positions
        if window > 0:
            visible &= key_positions > query_positions - window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        result = torch.einsum("hgqk,khd->qhgd", weights, values)
        out[begin:end].copy_(result.reshape(end - begin, -1, head_dim))


def rope_attention(
    q: Tensor, qkv: Tensor, cos_sin: Tensor, key_cache: Tensor, value_cache: Tensor,
    block_table: Tensor, row_slots: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor,
    softmax_scale: float, window: int, work: Tensor, workspace: Tensor, out: Tensor,
    softcap: float = 0.0,
) -> None:  # fmt: skip
    """rope_write_kv of all rows' tokens, on a copy of qkv, then paged_attention."""
    starts, lens, table = cu_seqlens_q.tolist(), seq_lens.tolist(), block_table.tolist()
    (num_tokens, num_heads, head_dim), block_size = q.shape, key_cache.shape[1]
    positions = torch.zeros(num_tokens, dtype=torch.int32, device=q.device)
    slots = torch.full((num_tokens,), -1, dtype=torch.int64, device=q.device)
    for row, slot in enumerate(row_slots.tolist()):
        context = lens[row] - (starts[row + 1] - starts[row])
        for i, token in enumerate(range(starts[row], starts[row + 1])):
            positions[token] = context + i
            if slot >= 0:
                block, offset = divmod(context + i, block_size)
                slots[token] = table[slot][block] * block_size + offset
    turned = qkv.clone()
    rope_write_kv(
        turned, positions, cos_sin, slots, None, None, 0.0, num_heads, key_cache.shape[2],
        key_cache, value_cache,
    )  # fmt: skip
    paged_attention(
        turned[:, : num_heads * head_dim].view_as(q), key_cache, value_cache, block_table,
        row_slots, cu_seqlens_q, seq_lens, softmax_scale, window, 0, work, workspace, out, softcap,
    )  # fmt: skip


def plan_attention(
    cu_seqlens_q: Tensor, seq_lens: Tensor, num_heads: int, num_kv_heads: int, window: int,
    work: Tensor,
) -> None:  # fmt: skip
    """Writes the simplest valid plan: one range, no split. The tests check what any plan must
    satisfy."""
    decode_rows, prefill_rows, kv_tile, num_ranges = 16, 128, 64, 1  # attention/attention.h
    group, starts = num_heads // num_kv_heads, cu_seqlens_q.tolist()
    decode: list[list[int]] = []
    prefill: list[list[int]] = []
    for row, seq_len in enumerate(seq_lens.tolist()):
        query_len = starts[row + 1] - starts[row]
        if query_len == 0 or seq_len == 0:
            continue
        num_packed, position = query_len * group, seq_len - query_len
        items, tile_rows = prefill, prefill_rows
        if num_packed <= decode_rows:
            items, tile_rows = decode, decode_rows
        for tile, first in enumerate(range(0, num_packed, tile_rows)):
            last = min(first + tile_rows, num_packed) - 1
            begin = max(0, position + first // group - window + 1) if window else 0
            end = position + last // group + 1
            items.append([row, tile, begin // kv_tile * kv_tile, end, 1, 0, len(items), -1])
    prefill.sort(key=lambda item: item[2] - item[3])  # longest first
    for index, item in enumerate(prefill):
        item[6] = index
    header = [len(decode), len(prefill), 16, 32, 32 + 8 * len(decode), num_ranges] + 10 * [0]
    words = header + [0, len(decode)] + 14 * [0]
    words += [word for item in decode + prefill for word in item]
    if len(words) > len(work):
        raise RuntimeError(f"plan_attention: {len(words)} words in {len(work)}")
    work[: len(words)] = torch.tensor(words, dtype=torch.int32)


def plan_step(
    step_input: Tensor, slots: Tensor, block_table: Tensor, token_counts: Tensor, block_size: int,
    input_ids: Tensor, positions: Tensor, slot_mapping: Tensor, row_slots: Tensor,
    cu_seqlens_q: Tensor, seq_lens: Tensor, sample_rows: Tensor,
) -> None:  # fmt: skip
    """Apply a StepInput's updates to the slots, and derive the tensors of a StepPlan."""
    words = step_input.tolist()
    header = checked_header(words, input_ids.shape[0], row_slots.shape[0])
    at = header[layout.HEADER_SLOT_UPDATES_OFFSET]
    for _ in range(header[layout.HEADER_NUM_SLOT_UPDATES]):
        at = _apply_slot_update(step_input, at, slots, token_counts)
    at = header[layout.HEADER_BLOCK_UPDATES_OFFSET]
    for _ in range(header[layout.HEADER_NUM_BLOCK_UPDATES]):
        slot, index, block_id = words[at : at + layout.BLOCK_UPDATE_WORDS]
        require(0 <= slot < block_table.shape[0], f"block update of slot {slot}")
        require(0 <= index < block_table.shape[1], f"block update of index {index}")
        require(block_id >= 0, f"block update with block id {block_id}")
        block_table[slot, index] = block_id
        at += layout.BLOCK_UPDATE_WORDS

    for tensor in (input_ids, positions, seq_lens, cu_seqlens_q):
        tensor.zero_()
    for tensor in (slot_mapping, row_slots, sample_rows):
        tensor.fill_(-1)
    tokens_at = header[layout.HEADER_TOKENS_OFFSET]
    num_host_tokens = header[layout.HEADER_BLOCK_UPDATES_OFFSET] - tokens_at
    vocab_size, max_len = token_counts.shape[1], block_table.shape[1] * block_size
    begin, num_samples = 0, 0
    seen: set[int] = set()
    for row in range(header[layout.HEADER_NUM_ROWS]):
        at = header[layout.HEADER_ROWS_OFFSET] + row * layout.ROW_WORDS
        slot, query_len, tokens_offset, is_sampled = words[at : at + layout.ROW_WORDS]
        require(0 <= slot < slots.shape[0] and slot not in seen, f"row {row} of slot {slot}")
        seen.add(slot)
        end = begin + query_len
        most = min(header[layout.HEADER_MAX_QUERY_LEN], header[layout.HEADER_NUM_TOKENS] - begin)
        require(0 < query_len <= most, f"row {row}'s length")
        if tokens_offset == -1:
            require(query_len == 1, f"row {row} has no host tokens but {query_len} tokens")
            token_ids = [int(slots[slot, layout.SLOT_LAST_TOKEN])]
        else:
            require(0 <= tokens_offset <= num_host_tokens - query_len, f"row {row}'s tokens")
            first = tokens_at + tokens_offset
            token_ids = words[first : first + query_len]
        require(all(0 <= t < vocab_size for t in token_ids), f"a token id of row {row}")
        start = int(slots[slot, layout.SLOT_NUM_COMPUTED])
        seq_len = start + query_len
        require(start >= 0 and seq_len <= max_len, f"row {row}'s sequence length {seq_len}")
        position = torch.arange(start, seq_len, dtype=torch.int32, device=positions.device)
        blocks = block_table[slot, (position // block_size).long()].long()
        input_ids[begin:end] = torch.tensor(token_ids, dtype=torch.int32)
        positions[begin:end] = position
        slot_mapping[begin:end] = blocks * block_size + position % block_size
        row_slots[row] = slot
        seq_lens[row] = seq_len
        slots[slot, layout.SLOT_NUM_COMPUTED] = seq_len
        cu_seqlens_q[row + 1 :] = end
        if is_sampled:
            sample_rows[num_samples, 0] = end - 1
            sample_rows[num_samples, 1] = slot
            num_samples += 1
        begin = end
    require(begin == header[layout.HEADER_NUM_TOKENS], "num_tokens is not the sum of the rows")
    require(num_samples == header[layout.HEADER_NUM_SAMPLES], "num_samples is not that of rows")


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
    """Numpy twin of `_host.pack_step`; see pyserve.ops.pack_step."""
    starts = adapter_starts or []
    num_rows = len(row_slots)
    if not num_rows == len(query_lens) == len(host_tokens) == len(row_samples):
        raise ValueError("row_slots, query_lens, host_tokens and row_samples differ in length")
    if len(block_updates) % layout.BLOCK_UPDATE_WORDS:
        raise ValueError("block_updates must be flat triples (slot, index, block id)")
    rows: list[int] = []
    tokens: list[int] = []
    for slot, query_len, ids, is_sampled in zip(
        row_slots, query_lens, host_tokens, row_samples, strict=True
    ):
        if query_len != (1 if ids is None else len(ids)):
            raise ValueError(f"query_len {query_len} is not the number of the row's tokens")
        rows += [slot, query_len, -1 if ids is None else len(tokens), int(is_sampled)]
        tokens += ids or []
    for record in slot_updates:
        if len(record) < 4 * layout.SLOT_UPDATE_WORDS or len(record) % 4:
            raise ValueError(f"a slot update of {len(record)} bytes")
    updates = np.frombuffer(b"".join(slot_updates), dtype="<i4")
    header = np.zeros(layout.HEADER_WORDS, dtype=np.int32)
    header[layout.HEADER_MAGIC] = layout.STEP_MAGIC
    header[layout.HEADER_NUM_ROWS] = num_rows
    header[layout.HEADER_NUM_TOKENS] = sum(query_lens)
    header[layout.HEADER_MAX_QUERY_LEN] = max(query_lens, default=0)
    header[layout.HEADER_NUM_SAMPLES] = sum(row_samples)
    header[layout.HEADER_NUM_ADAPTER_SLOTS] = max(len(starts) - 1, 0)
    rows_at = layout.HEADER_WORDS + len(starts)
    header[layout.HEADER_ROWS_OFFSET] = rows_at
    header[layout.HEADER_TOKENS_OFFSET] = rows_at + len(rows)
    header[layout.HEADER_NUM_BLOCK_UPDATES] = len(block_updates) // layout.BLOCK_UPDATE_WORDS
    header[layout.HEADER_BLOCK_UPDATES_OFFSET] = rows_at + len(rows) + len(tokens)
    header[layout.HEADER_NUM_SLOT_UPDATES] = len(slot_updates)
    slot_updates_at = rows_at + len(rows) + len(tokens) + len(block_updates)
    header[layout.HEADER_SLOT_UPDATES_OFFSET] = slot_updates_at
    num_words = slot_updates_at + len(updates)
    header[layout.HEADER_NUM_WORDS] = num_words
    if num_words > len(buffer):
        raise ValueError(f"the step needs {num_words} words, the buffer has {len(buffer)}")
    buffer[: layout.HEADER_WORDS] = header
    words = starts + rows + tokens + block_updates
    buffer[layout.HEADER_WORDS : slot_updates_at] = words
    buffer[slot_updates_at:num_words] = updates
    return num_words


def _rms_norm_float32(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x, scale = x.float(), weight.float() + offset
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * scale


def _norm_heads(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    return x.float() if weight is None else _rms_norm_float32(x, weight, eps, offset)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[..., :half], cos_sin[..., half:]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def _apply_slot_update(step_input: Tensor, at: int, slots: Tensor, token_counts: Tensor) -> int:
    """Apply the slot update at word `at`; returns where the next one starts."""
    record = step_input[at:]
    head = layout.SLOT_UPDATE_WORDS + layout.SLOT_HEADER_WORDS
    require(len(record) >= head, "slot update beyond the buffer")
    num_words, slot, num_prompt, num_output = record[: layout.SLOT_UPDATE_WORDS].tolist()
    row = record[layout.SLOT_UPDATE_WORDS : head]
    num_bias, num_stop = int(row[layout.SLOT_NUM_BIAS]), int(row[layout.SLOT_NUM_STOP])
    vocab_size = token_counts.shape[1]
    require(0 <= slot < slots.shape[0], f"slot update of slot {slot}")
    require(0 <= num_bias <= limits.MAX_LOGIT_BIAS, f"{num_bias} biases")
    require(0 <= num_stop <= limits.MAX_STOP_TOKEN_IDS, f"{num_stop} stop ids")
    require(num_prompt >= 0 and num_output >= 0, "slot update's token counts")
    expected = head + 2 * num_bias + num_stop + num_prompt + num_output
    require(num_words == expected <= len(record), f"slot update of {num_words} words")
    parts: list[Tensor] = []
    for size in (num_bias, num_bias, num_stop, num_prompt, num_output):
        parts.append(record[head : head + size])
        head += size
    bias_ids, bias_values, stop_ids, prompt, output = parts
    for ids in (bias_ids, stop_ids, prompt, output):
        require(bool(((ids >= 0) & (ids < vocab_size)).all()), "a token id of a slot update")
    require(-1 <= int(row[layout.SLOT_LAST_TOKEN]) < vocab_size, "a slot's last token")
    require(int(row[layout.SLOT_NUM_COMPUTED]) >= 0, "a slot's num_computed")
    check_sampling(row, bias_values)
    slots[slot].zero_()
    slots[slot, : layout.SLOT_HEADER_WORDS] = row
    slots[slot, layout.SLOT_BIAS_IDS :][:num_bias] = bias_ids
    slots[slot, layout.SLOT_BIAS_VALUES :][:num_bias] = bias_values
    slots[slot, layout.SLOT_STOP_IDS :][:num_stop] = stop_ids
    if int(row[layout.SLOT_HAS_PENALTIES]):
        counts = torch.bincount(output, minlength=vocab_size).clamp_max(layout.MAX_TOKEN_COUNT)
        counts[prompt.long()] += layout.IN_PROMPT
        token_counts[slot] = counts.to(torch.int16)
    return at + int(num_words)
