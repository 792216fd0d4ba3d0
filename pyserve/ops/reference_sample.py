"""Plain-torch twins of the sampling ops; see reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from pyserve import limits
from pyserve.ops import step_layout as layout
from pyserve.ops.philox import philox4x32

GREEDY_TEMPERATURE = 1e-5  # rows with a lower temperature are greedy


def sample(
    logits: Tensor,
    sample_slots: Tensor,
    slots: Tensor,
    token_counts: Tensor,
    workspace: Tensor | None,
    sampled: Tensor,
) -> None:
    """Sample one token for each row and store it in the row's slot."""
    float_slots = slots.view(torch.float32)
    for row, slot in enumerate(sample_slots.tolist()):
        if slot < 0:
            sampled[row] = 0
            continue
        if slot >= slots.shape[0]:
            raise RuntimeError(f"sample: slot {slot} is outside [-1, {slots.shape[0]})")
        token_id = sample_row(logits[row], slots[slot], float_slots[slot], token_counts[slot])
        sampled[row] = token_id
        # A failed row stores a token in range, because its next step may be queued already.
        slots[slot, layout.SLOT_LAST_TOKEN] = max(token_id, 0)
        if token_id >= 0 and int(slots[slot, layout.SLOT_HAS_PENALTIES]):
            token_counts[slot, token_id] = _counted(int(token_counts[slot, token_id]))


def apply_bitmask(logits: Tensor, bitmask: Tensor, rows: Tensor) -> None:
    """Set the logits of tokens that a mask forbids, or that are beyond its end, to -inf."""
    num_rows, vocab_size = logits.shape
    token_ids = torch.arange(32 * bitmask.shape[1], device=logits.device)[:vocab_size]
    for row, mask in zip(rows.tolist(), bitmask, strict=True):
        if not -1 <= row < num_rows:
            raise RuntimeError(f"apply_bitmask: row {row} of {num_rows}")
        if row < 0:
            continue
        is_allowed = torch.zeros(vocab_size, dtype=torch.bool, device=logits.device)
        is_allowed[: len(token_ids)] = (mask[token_ids // 32] >> token_ids % 32 & 1).bool()
        logits[row].masked_fill_(~is_allowed, -torch.inf)


def logprobs(
    logits: Tensor, rows: Tensor, token_ids: Tensor, is_normalized: bool, token_logprobs: Tensor,
    token_ranks: Tensor, top_ids: Tensor, top_logprobs: Tensor,
) -> None:  # fmt: skip
    """For some rows, the log-softmax and rank of a token, and the most likely tokens."""
    num_rows, vocab_size = logits.shape
    num_top = min(limits.TOP_LOGPROBS, vocab_size)
    for tensor, nothing in ((token_ranks, 0), (top_ids, -1)):
        tensor.fill_(nothing)
    for tensor in (token_logprobs, top_logprobs):
        tensor.fill_(-torch.inf)
    for asked, row in enumerate(rows.tolist()):
        if not -1 <= row < num_rows:
            raise RuntimeError(f"logprobs: row {row} of {num_rows}")
        if row < 0:
            continue
        token_id = int(token_ids[row])
        if not -1 <= token_id < vocab_size:
            raise RuntimeError(f"logprobs: token id {token_id}, the vocabulary {vocab_size}")
        values = logits[row].float()
        values = torch.where(values.isnan(), -torch.inf, values)
        order = torch.sort(values, descending=True, stable=True).indices
        if token_id >= 0:
            token_ranks[asked] = 1 + (values > values[token_id]).sum()
        if is_normalized and bool(values.max().isfinite()):
            values = values.log_softmax(0)
        elif is_normalized:
            values = torch.full_like(values, -torch.inf)
        if token_id >= 0:
            token_logprobs[asked] = values[token_id]
        top_ids[asked, :num_top] = order[:num_top].int()
        top_logprobs[asked, :num_top] = values[order[:num_top]]


def sample_row(logits: Tensor, slot: Tensor, float_slot: Tensor, counts: Tensor) -> int:
    """The token id sampled from logits [vocab_size]; -1 if they have NaN or +inf or all are -inf.

    slot, float_slot  the slot row [SLOT_WORDS] as int32 and, the same words, as float32.
    counts            int16 [vocab_size]: the row of token_counts.
    """
    adjusted = _adjusted_logits(logits, slot, float_slot, counts)
    if bool((~(logits.float() < torch.inf)).any()) or bool((~(adjusted < torch.inf)).any()):
        return -1
    largest = adjusted.max()
    if largest == -torch.inf:
        return -1
    temperature = float_slot[layout.SLOT_TEMPERATURE]
    if temperature < GREEDY_TEMPERATURE:
        return int(torch.nonzero(adjusted == largest)[0])

    survivors, weights = _survivors(adjusted, slot, float_slot)
    cumulative = weights[survivors].cumsum(0)
    low, high, _, _ = philox4x32(
        (int(slot[layout.SLOT_NUM_COMPUTED]), int(slot[layout.SLOT_SAMPLE_INDEX]), 0, 0),
        (int(slot[layout.SLOT_SEED_LOW]), int(slot[layout.SLOT_SEED_HIGH])),
    )
    target = ((high << 32 | low) * int(cumulative[-1])) >> 64
    return int(survivors[torch.searchsorted(cumulative, float(target), right=True)])


def _survivors(adjusted: Tensor, slot: Tensor, float_slot: Tensor) -> tuple[Tensor, Tensor]:
    """The ids, ascending, of the tokens that top-k, min-p and top-p leave, and the weights of all
    tokens."""
    # Sums of weights are exact: at most 2^19 integers of at most 2^34, in float64.
    temperature = float_slot[layout.SLOT_TEMPERATURE]
    weights = quantized_exp((adjusted - adjusted.max()) * (1.0 / temperature)).double()
    survivors = torch.arange(len(adjusted), device=adjusted.device)
    top_k = int(slot[layout.SLOT_TOP_K])
    if top_k > 0:
        by_logit = torch.sort(adjusted, descending=True, stable=True).indices
        survivors = by_logit[:top_k].sort().values
    min_weight = torch.round(float_slot[layout.SLOT_MIN_P] * WEIGHT_SCALE)
    survivors = survivors[weights[survivors] >= min_weight]
    top_p = float_slot[layout.SLOT_TOP_P].double()
    if top_p < 1.0:
        mass, by_mass = torch.sort(weights[survivors], descending=True, stable=True)
        before = mass.cumsum(0) - mass
        survivors = survivors[by_mass[before < top_p * mass.sum()].sort().values]
    return survivors, weights


def processed_logits(
    logits: Tensor, rows: Tensor, sample_slots: Tensor, slots: Tensor, token_counts: Tensor
) -> Tensor:
    """The logits that `sample` draws from: float32 [num_rows, vocab_size]; only `rows` are defined.

    They are the logits after biases, the ban of stop ids, penalties and temperature, with -inf for
    tokens that top-k, min-p and top-p leave out. Temperature and these three are not applied to a
    greedy row.
    """
    processed = torch.empty(logits.shape)
    for row in rows.tolist():
        index = int(sample_slots[row])
        slot, float_slot = slots[index], slots[index].view(torch.float32)
        adjusted = _adjusted_logits(logits[row], slot, float_slot, token_counts[index])
        temperature = float_slot[layout.SLOT_TEMPERATURE]
        if temperature < GREEDY_TEMPERATURE or not bool(adjusted.max().isfinite()):
            processed[row] = adjusted
            continue
        survivors, _ = _survivors(adjusted, slot, float_slot)
        processed[row] = -torch.inf
        processed[row, survivors] = adjusted[survivors] / temperature
    return processed


WEIGHT_SCALE = 2.0**34
_LOG2_E = 1.44269504088896341
_LN2_HIGH = 0.693359375  # few bits: n * _LN2_HIGH is exact
_LN2_LOW = -2.12194440e-4
# exp(r) = 1 + r + r^2 * p(r) on |r| <= ln2/2; p from the Cephes library's expf (Moshier 1989).
_EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def quantized_exp(x: Tensor) -> Tensor:
    """round(exp(x) * 2^34) as float32, for x <= 0; each operation rounds to float32, none is fused.

    Integers sum exactly, so that sampling does not depend on the order of summation or on threads.
    """
    x = x.clamp_min(-30.0)  # exp(-30) * 2^34 rounds to 0
    n = torch.round(x * _LOG2_E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = torch.full_like(r, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        p = p * r + coefficient
    y = (p * (r * r) + r) + 1.0
    scale = ((n.int() + (127 + 34)) << 23).view(torch.float32)  # 2^(n + 34)
    return torch.round(y * scale)


def _adjusted_logits(logits: Tensor, slot: Tensor, float_slot: Tensor, counts: Tensor) -> Tensor:
    """A float32 copy of logits [vocab_size] after biases, the ban of stop ids and penalties, in
    this order."""
    adjusted = logits.float().clone()
    num_bias, num_stop = int(slot[layout.SLOT_NUM_BIAS]), int(slot[layout.SLOT_NUM_STOP])
    bias_ids = slot[layout.SLOT_BIAS_IDS :][:num_bias].long()
    adjusted.index_add_(0, bias_ids, float_slot[layout.SLOT_BIAS_VALUES :][:num_bias])
    if int(slot[layout.SLOT_NUM_COMPUTED]) < int(slot[layout.SLOT_MIN_TOTAL_LEN]):
        adjusted[slot[layout.SLOT_STOP_IDS :][:num_stop].long()] = -torch.inf
    if int(slot[layout.SLOT_HAS_PENALTIES]):
        repetition = float_slot[layout.SLOT_REPETITION_PENALTY]
        repeated = torch.where(adjusted > 0, adjusted / repetition, adjusted * repetition)
        adjusted = torch.where(counts != 0, repeated, adjusted)
        num_output = (counts.int() & layout.MAX_TOKEN_COUNT).float()
        adjusted = adjusted - float_slot[layout.SLOT_FREQUENCY_PENALTY] * num_output
        adjusted = adjusted - float_slot[layout.SLOT_PRESENCE_PENALTY] * (num_output > 0)
    return adjusted


def _counted(count: int) -> int:
    """A token's int16 count after one more output token: saturates, and keeps the prompt's bit."""
    is_full = count & layout.MAX_TOKEN_COUNT == layout.MAX_TOKEN_COUNT
    return count if is_full else count + 1
