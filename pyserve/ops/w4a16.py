"""W4A16: a matrix of 4-bit integers in groups, multiplied by 16-bit activations: its layout in
memory, which is the same for all kernels, and plain-torch code that packs and unpacks it.

A matrix W [n, k] has an integer q[r, c] in 0..15 for each element, and for each row r and group j
of `group_size` (32, 64 or 128) neighbouring columns a scale s and a zero point z:

    W[r, c] = (q[r, c] - z[r, c / group_size]) * s[r, c / group_size]

It is one int32 tensor, `packed` [num_strips, num_units, unit_words], contiguous:

strip   16 rows, r = 16 * strip + 8 * h + g with h in 0..1 and g in 0..7. Strips are contiguous.
unit    max(64, group_size) columns of a strip. A strip's units are contiguous, so that a strip is
        one stream of bytes. unit_words tells the group size: 160, 144 or 272 words for 32, 64 or
        128. A unit consists of its blocks, then its records:
block   16 rows x 64 columns, 128 words, 512 bytes; a unit of 128 columns has two. Within the block
        c = 16 * s + 8 * u + 2 * t + e, with step s in 0..3, u in 0..1, t in 0..3, e in 0..1.
        Word (4 * g + t) * 4 + s holds 8 integers; nibble i, bits [4 i, 4 i + 4), is

            nibble i      0   1   2   3   4   5   6   7         i = h + 2 u + 4 e
            row half h    0   1   0   1   0   1   0   1
            u             0   0   1   1   0   0   1   1
            e             0   0   0   0   1   1   1   1

record  16 words, 64 bytes: scale and zero point of one group for each row of the strip, in the
        order 8 h + g. A unit has unit columns / group_size records, in the order of the groups: two
        if group_size is 32, else one. A word is the scale as float32 bits, whose low 8 bits are
        replaced by z: s = bits & ~255, which is exact for float16 and bfloat16 scales and rounded
        to 16 bits of mantissa for float32 ones; z = bits & 255 is 0..15.

On a card, one 16-byte load at word 4 * l of a block gives lane l = 4 * g + t of a warp its
registers of the A fragments of four `mma.m16n8k16` (or of a warp of `wgmma.m64nNk16`, A in
registers), step by step: for i in 0..3, nibbles i and i + 4 of word s are the low and the high half
of register a_i of step s. (w >> 4 i) & 0x000f000f is that pair; or-ed with 0x43004300 it is
bfloat16 128 + q, with 0x64006400 float16 1024 + q; w & 0x00f000f0 or-ed with 0x64006400 is float16
1024 + 16 q, for rows 8..15. z as a float32 128 + z is ((bits & 255) << 16) | 0x43000000. On a CPU,
the 16 words (64 bytes) of one g hold all 64 columns of row g in the low nibble of each byte, and of
row g + 8 in the high nibble.

Rows from n on and columns from k on are padding: q, s and z are 0, so they add nothing; k is a
multiple of group_size. A fused matrix has the rows of its parts one after the other: first all rows
of gate, then those of up, not interleaved.

The integers of a block, and the scale and zero bits of a record, do not overlap, and all bits are 0
at first. So the tensors of a checkpoint can be or-ed in one by one, in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

STRIP_ROWS = 16
BLOCK_COLUMNS = 64
BLOCK_WORDS = 128
RECORD_WORDS = 16
GROUP_SIZES = (32, 64, 128)
ZERO_MASK = 0xFF  # the bits of a record's word that hold the zero point
MAX_CODE = 15
NIBBLES = 8  # 4-bit integers in a word


def unit_columns(group_size: int) -> int:
    """Columns of a unit."""
    return max(BLOCK_COLUMNS, group_size)


def unit_words(group_size: int) -> int:
    """int32 words of a unit."""
    columns = unit_columns(group_size)
    return columns // BLOCK_COLUMNS * BLOCK_WORDS + columns // group_size * RECORD_WORDS


def packed_shape(n: int, k: int, group_size: int) -> tuple[int, int, int]:
    """The shape of `packed`, (num_strips, num_units, unit_words), for a matrix [n, k]."""
    units = -(-k // unit_columns(group_size))
    return -(-n // STRIP_ROWS), units, unit_words(group_size)


def group_size_of(packed: Tensor) -> int:
    """The group size, which the number of words of a unit tells."""
    return {unit_words(size): size for size in GROUP_SIZES}[packed.shape[2]]


def add_words(packed: Tensor, row: int, column: int, words: Tensor) -> None:
    """Or integers into `packed`.

    words   int32 [m, w], any strides: nibble i of word j is the integer of column `column` +
            8 j + i; its rows begin at `row`.
    column  the first column of a unit. If the words end within a unit, its other columns get 0.
    """
    strips, (top, bottom) = _strips(row, len(words))
    num_words = unit_columns(group_size_of(packed)) // NIBBLES
    first, rest = divmod(column // NIBBLES, num_words)
    assert not rest, (column, packed.shape)
    right = -words.shape[1] % num_words
    if top or bottom or right:
        words = functional.pad(words, (0, right, top, bottom))
    units = slice(first, first + words.shape[1] // num_words)
    # The dimensions of the words are [strip, h, g, block, s, u]; t is the byte within a word, and e
    # the nibble within a byte.
    split = words.reshape(len(words) // STRIP_ROWS, 2, 8, -1, 4, 2)
    split = split.permute(1, 5, 0, 3, 2, 4).contiguous()
    made = split.new_empty((*split.shape[2:5], 4, 4))
    for t in range(4):
        pairs = split >> 8 * t
        pairs = pairs & 0xF | (pairs & 0xF0) << 12  # nibbles 0 and 4
        low, high = pairs[0], pairs[1] << 4
        made[..., t, :] = low[0] | high[0] | (low[1] | high[1]) << 8
    blocks = _blocks(packed)[strips, units]
    blocks |= made.view(blocks.shape)


def words_of(codes: Tensor) -> Tensor:
    """Pack integers [m, w] in 0..15, w a multiple of 8, into int32 [m, w / 8] for add_words."""
    nibbles = torch.unflatten(codes.int(), 1, (-1, NIBBLES))
    words = nibbles[..., 0].clone()
    for i in range(1, NIBBLES):
        words |= nibbles[..., i] << 4 * i
    return words


def codes_of(words: Tensor) -> Tensor:
    """Unpack int32 [m, w] -> uint8 [m, 8 w]: nibble i of word j is column 8 j + i."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 0xF, pairs >> 4), 2).flatten(1)


def transposed(words: Tensor) -> Tensor:
    """Transpose a packed matrix: words int32 [m, w], m a multiple of 8 -> int32 [8 w, m / 8].

    Tiles of 8 x 8 integers are transposed by exchanging blocks of 1, 2 and 4 rows and columns.
    """
    tiles = torch.unflatten(words, 0, (-1, 2, 2, 2))  # bits 2, 1 and 0 of the row index
    for bit, mask in enumerate((0x0F0F0F0F, 0x00FF00FF, 0x0000FFFF)):
        upper, lower = tiles.unbind(3 - bit)
        shift = 4 << bit
        tiles = torch.stack(
            (
                upper & mask | (lower & mask) << shift,
                upper >> shift & mask | lower & ~mask,
            ),
            3 - bit,
        )
    return tiles.flatten(1, 3).permute(2, 1, 0).reshape(-1, len(tiles))


def add_scales(packed: Tensor, row: int, group: int, scales: Tensor) -> None:
    """Or scales, float [m, num_groups], into the records of rows from `row` and groups from
    `group`, the first of a unit. They are rounded to 16 bits of mantissa."""
    bits = scales.float().contiguous().view(torch.int32)
    half, odd = ZERO_MASK >> 1, (bits >> 8) & 1  # rounds to nearest, ties to even
    _add_records(packed, row, group, (bits + half + odd) & ~ZERO_MASK)


def add_zeros(packed: Tensor, row: int, group: int, zeros: Tensor) -> None:
    """Or zero points, integers [m, num_groups] in 0..15, into the records of rows from `row` and
    groups from `group`, the first of a unit."""
    _add_records(packed, row, group, zeros.int())


def dequantised(packed: Tensor, n: int, k: int) -> Tensor:
    """The matrix as float32 [n, k]; only the product with the scale is rounded."""
    group_size = group_size_of(packed)
    codes = _codes(packed)
    records = _records(packed).permute(0, 3, 1, 2).reshape(len(codes), -1)
    zeros = (records & ZERO_MASK).float()
    scales = (records & ~ZERO_MASK).view(torch.float32)
    columns = codes.shape[1]
    groups = codes.view(len(codes), columns // group_size, group_size).float()
    return ((groups - zeros[..., None]) * scales[..., None]).view(-1, columns)[:n, :k]


def quantised(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round weight [n, k] to 16 equidistant values for each group, from its smallest to its largest
    element, extended to include 0.

    Returns codes uint8 [n, k], scales float32 [n, num_groups], and zero points uint8
    [n, num_groups].
    """
    groups = torch.unflatten(weight.float(), 1, (-1, group_size))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = (high - low) / MAX_CODE
    # A group of only zeros gets the scale 1. Scales are rounded as in a record before dividing.
    bits = torch.where(scales > 0, scales, 1.0).view(torch.int32)
    scales = ((bits + (ZERO_MASK >> 1)) & ~ZERO_MASK).view(torch.float32)
    zeros = (-low / scales).round().clamp(0, MAX_CODE)
    codes = (groups / scales[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, MAX_CODE).to(torch.uint8).flatten(1)
    return codes, scales, zeros.to(torch.uint8)


def fill_with_noise(
    packed: Tensor, n: int, k: int, std: float, generator: torch.Generator | None
) -> None:
    """Fill `packed` with random integers and zero points, and with scales such that the matrix
    [n, k] has a standard deviation of about `std`."""
    group_size = group_size_of(packed)
    packed.random_(-(2**31), 2**31, generator=generator)
    records = _records(packed)
    device = packed.device
    # q - z, with q uniform in 0..15 and z in 5..10, has a standard deviation of 4.9.
    scales = torch.empty(records.shape, device=device).uniform_(0.5, 1.5, generator=generator)
    bits = (scales * (std / 4.9)).view(torch.int32) & ~ZERO_MASK
    records.copy_(bits | torch.empty_like(bits).random_(5, 11, generator=generator))
    _clear_padding(packed, n, k, group_size)


def _clear_padding(packed: Tensor, n: int, k: int, group_size: int) -> None:
    rows, columns = n % STRIP_ROWS, k % unit_columns(group_size)
    if rows:
        _records(packed)[-1, :, :, rows:] = 0
        # The 16 words of each g hold row g in the low and row 8 + g in the high nibble of a byte.
        blocks = _blocks(packed)[-1]
        kept = torch.zeros(8, dtype=torch.int32, device=packed.device)
        kept[: min(rows, 8)] |= 0x0F0F0F0F
        kept[: max(rows - 8, 0)] |= -0x0F0F0F10  # 0xF0F0F0F0
        torch.unflatten(blocks, 2, (8, 16)).bitwise_and_(kept[:, None])
    if columns:  # only with groups of 32, where k may end after half of a unit of 64 columns
        _records(packed)[:, -1, columns // group_size :] = 0
        steps = torch.unflatten(_blocks(packed)[:, -1], 2, (32, 4))
        steps[..., columns // 16 :] = 0


def _strips(row: int, num_rows: int) -> tuple[slice, tuple[int, int]]:
    """The strips that have rows [row, row + num_rows), and how many other rows these strips have
    above and below."""
    top, bottom = row % STRIP_ROWS, -(row + num_rows) % STRIP_ROWS
    return slice(row // STRIP_ROWS, -(-(row + num_rows) // STRIP_ROWS)), (top, bottom)


def _blocks(packed: Tensor) -> Tensor:
    """The blocks: a view [num_strips, num_units, blocks of a unit, BLOCK_WORDS] of `packed`."""
    num_blocks = packed.shape[2] // BLOCK_WORDS
    return torch.unflatten(packed[..., : num_blocks * BLOCK_WORDS], 2, (num_blocks, BLOCK_WORDS))


def _records(packed: Tensor) -> Tensor:
    """The records: a view [num_strips, num_units, records of a unit, RECORD_WORDS] of `packed`."""
    begin = packed.shape[2] // BLOCK_WORDS * BLOCK_WORDS
    return torch.unflatten(packed[..., begin:], 2, (-1, RECORD_WORDS))


def _add_records(packed: Tensor, row: int, group: int, values: Tensor) -> None:
    """Or values, int32 [m, num_groups], into the records of rows from `row` and groups from
    `group`, the first of a unit."""
    strips, (top, bottom) = _strips(row, len(values))
    records = _records(packed)
    in_unit = records.shape[2]
    assert group % in_unit == 0, (group, in_unit)
    values = functional.pad(values, (0, -values.shape[1] % in_unit, top, bottom))
    units = slice(group // in_unit, (group + values.shape[1]) // in_unit)
    rows = values.view(-1, STRIP_ROWS, values.shape[1] // in_unit, in_unit)
    here = records[strips, units]
    here |= rows.permute(0, 2, 3, 1)


def _codes(packed: Tensor) -> Tensor:
    """All integers, padding included: uint8 [16 * num_strips, columns of all units]."""
    blocks = _blocks(packed)
    num_strips, num_units, num_blocks = blocks.shape[:3]
    # Dimensions [strip, block, g, t, s, e, u]; each byte has the integers of two rows, h = 0 and 1.
    pairs = blocks.contiguous().view(torch.uint8).view(num_strips, -1, 8, 4, 4, 2, 2)
    halves = torch.stack((pairs & 0xF, pairs >> 4), 1).permute(0, 1, 3, 2, 5, 7, 4, 6)
    return halves.reshape(num_strips * STRIP_ROWS, num_units * num_blocks * BLOCK_COLUMNS)
