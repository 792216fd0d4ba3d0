"""W4A16: a matrix of 4-bit integers in groups, computed with 16-bit activations. How it lies in
memory, for every kernel on every machine, and the plain torch that packs and unpacks it.

A matrix W [n, k] has an integer q[r, c] in 0..15 for each element, and for each row r and group j
of `group_size` (32, 64 or 128) neighbouring columns a scale s and a zero point z:

    W[r, c] = (q[r, c] - z[r, c / group_size]) * s[r, c / group_size]

It is one int32 tensor, `packed` [num_strips, num_units, unit_words], contiguous:

strip   16 rows, r = 16 * strip + 8 * h + g with h in 0..1 and g in 0..7. Strips follow each other.
unit    max(64, group_size) columns of a strip. A strip's units follow each other, so that a strip
        is one stream of bytes. unit_words tells the group size: 160, 144 or 272 words for 32, 64
        or 128. A unit is its blocks, then its records:
block   16 rows x 64 columns, 128 words, 512 bytes; a unit of 128 columns has two. Within the block
        c = 16 * s + 8 * u + 2 * t + e, with step s in 0..3, u in 0..1, t in 0..3, e in 0..1.
        Word (4 * g + t) * 4 + s holds 8 integers; nibble i, bits [4 i, 4 i + 4), is

            nibble i      0   1   2   3   4   5   6   7         i = h + 2 u + 4 e
            row half h    0   1   0   1   0   1   0   1
            u             0   0   1   1   0   0   1   1
            e             0   0   0   0   1   1   1   1

record  16 words, 64 bytes, one a row of the strip, in order (8 h + g): scale and zero point of one
        group. A unit has unit columns / group_size of them, in the order of the groups: two where
        group_size is 32, else one. A word is the scale as float32 bits, whose low 8 bits are
        replaced by z: s = bits & ~255, which is exact for float16 and bfloat16 scales and rounded
        to 16 bits of mantissa for float32 ones; z = bits & 255 is 0..15.

So on a card lane l = 4 * g + t of a warp finds with one 16-byte load, at word 4 * l of a block, its
registers of the A fragments of four `mma.m16n8k16` (or of a warp of `wgmma.m64nNk16`, A in
registers), step by step: for i in 0..3, nibbles i and i + 4 of word s are the low and the high half
of register a_i of step s. (w >> 4 i) & 0x000f000f is that pair; or-ed with 0x43004300 it is
bfloat16 128 + q, with 0x64006400 float16 1024 + q; w & 0x00f000f0 or-ed with 0x64006400 is float16
1024 + 16 q, for rows 8..15. z as a float32 128 + z is ((bits & 255) << 16) | 0x43000000.
On a CPU 16 words at 64 bytes, those of one g, are rows g (low nibble of each byte) and g + 8 (high
nibble) of all 64 columns.

A part behind row n or column k is padding: q, s and z are 0, so it adds nothing; k is a multiple of
group_size. A fused matrix has the rows of its parts one after the other, whatever their number:
gate, then up, not interleaved. What is stored behind `packed` is the packer's: nothing.

The integers of a block and the scale and zero bits of a record do not overlap, and all of it starts
as 0: the tensors of a checkpoint are or-ed in as they come, in any order.
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
ZERO_MASK = 0xFF  # of a record's word
MAX_CODE = 15
NIBBLES = 8  # of a word


def unit_columns(group_size: int) -> int:
    return max(BLOCK_COLUMNS, group_size)


def unit_words(group_size: int) -> int:
    columns = unit_columns(group_size)
    return columns // BLOCK_COLUMNS * BLOCK_WORDS + columns // group_size * RECORD_WORDS


def packed_shape(n: int, k: int, group_size: int) -> tuple[int, int, int]:
    """Of the `packed` of a matrix [n, k]."""
    units = -(-k // unit_columns(group_size))
    return -(-n // STRIP_ROWS), units, unit_words(group_size)


def group_size_of(packed: Tensor) -> int:
    return {unit_words(size): size for size in GROUP_SIZES}[packed.shape[2]]


def add_words(packed: Tensor, row: int, column: int, words: Tensor) -> None:
    """Put integers in: words int32 [m, w], any strides, are those of rows from `row` and columns
    from `column`, which begins a unit; nibble i of word j is column 8 j + i of these. Where they do
    not end a unit, what follows is padding."""
    strips, (top, bottom) = _strips(row, len(words))
    num_words = unit_columns(group_size_of(packed)) // NIBBLES
    first, rest = divmod(column // NIBBLES, num_words)
    assert not rest, (column, packed.shape)
    right = -words.shape[1] % num_words
    if top or bottom or right:
        words = functional.pad(words, (0, right, top, bottom))
    units = slice(first, first + words.shape[1] // num_words)
    # Here a word is [strip, h, g, block, s, u], and its nibbles are [t, e]: byte by byte.
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
    """Integers [m, w] of 0..15, w a multiple of 8, as the words that add_words takes."""
    nibbles = torch.unflatten(codes.int(), 1, (-1, NIBBLES))
    words = nibbles[..., 0].clone()
    for i in range(1, NIBBLES):
        words |= nibbles[..., i] << 4 * i
    return words


def codes_of(words: Tensor) -> Tensor:
    """int32 [m, w] -> uint8 [m, 8 w]: nibble i of word j in column 8 j + i."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 0xF, pairs >> 4), 2).flatten(1)


def transposed(words: Tensor) -> Tensor:
    """The words [8 w, m / 8] of the transpose of a matrix that lies as words [m, w], m a multiple
    of 8: integers are exchanged by 1, 2 and 4 rows and columns."""
    tiles = torch.unflatten(words, 0, (-1, 2, 2, 2))  # bits 2, 1 and 0 of the row
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
    """Put scales in, floats [m, groups] of rows from `row` and groups from `group`."""
    bits = scales.float().contiguous().view(torch.int32)
    half, odd = ZERO_MASK >> 1, (bits >> 8) & 1  # to nearest, ties to even
    _add_records(packed, row, group, (bits + half + odd) & ~ZERO_MASK)


def add_zeros(packed: Tensor, row: int, group: int, zeros: Tensor) -> None:
    """Put zero points in, integers [m, groups] of rows from `row` and groups from `group`."""
    _add_records(packed, row, group, zeros.int())


def dequantised(packed: Tensor, n: int, k: int) -> Tensor:
    """float32 [n, k]; the arithmetic is exact but for the product with the scale."""
    group_size = group_size_of(packed)
    codes = _codes(packed)
    records = _records(packed).permute(0, 3, 1, 2).reshape(len(codes), -1)
    zeros = (records & ZERO_MASK).float()
    scales = (records & ~ZERO_MASK).view(torch.float32)
    columns = codes.shape[1]
    groups = codes.view(len(codes), columns // group_size, group_size).float()
    return ((groups - zeros[..., None]) * scales[..., None]).view(-1, columns)[:n, :k]


def quantised(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round weight [n, k] to the nearest of 16 steps between the least and the largest element of
    each group, 0 included: codes uint8 [n, k], scales float32 and zero points uint8 [n, groups].
    """
    groups = torch.unflatten(weight.float(), 1, (-1, group_size))
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = (high - low) / MAX_CODE
    # A group of zeros alone has any scale; one that a record rounds is rounded before it divides.
    bits = torch.where(scales > 0, scales, 1.0).view(torch.int32)
    scales = ((bits + (ZERO_MASK >> 1)) & ~ZERO_MASK).view(torch.float32)
    zeros = (-low / scales).round().clamp(0, MAX_CODE)
    codes = (groups / scales[..., None]).round() + zeros[..., None]
    codes = codes.clamp(0, MAX_CODE).to(torch.uint8).flatten(1)
    return codes, scales, zeros.to(torch.uint8)


def fill_with_noise(
    packed: Tensor, n: int, k: int, std: float, generator: torch.Generator | None
) -> None:
    """Random integers and zero points, and scales that make the matrix scatter by about `std`."""
    group_size = group_size_of(packed)
    packed.random_(-(2**31), 2**31, generator=generator)
    records = _records(packed)
    device = packed.device
    # (q - z) of uniform q in 0..15 and z in 5..10 has a standard deviation of 4.9.
    scales = torch.empty(records.shape, device=device).uniform_(0.5, 1.5, generator=generator)
    bits = (scales * (std / 4.9)).view(torch.int32) & ~ZERO_MASK
    records.copy_(bits | torch.empty_like(bits).random_(5, 11, generator=generator))
    _clear_padding(packed, n, k, group_size)


def _clear_padding(packed: Tensor, n: int, k: int, group_size: int) -> None:
    rows, columns = n % STRIP_ROWS, k % unit_columns(group_size)
    if rows:
        _records(packed)[-1, :, :, rows:] = 0
        # By bytes [unit, block, g, .]: row 8 h + g is nibble h of those of g.
        blocks = _blocks(packed)[-1]
        kept = torch.zeros(8, dtype=torch.int32, device=packed.device)
        kept[: min(rows, 8)] |= 0x0F0F0F0F
        kept[: max(rows - 8, 0)] |= -0x0F0F0F10  # 0xF0F0F0F0
        torch.unflatten(blocks, 2, (8, 16)).bitwise_and_(kept[:, None])
    if columns:  # half of a unit of 64: groups of 32
        _records(packed)[:, -1, columns // group_size :] = 0
        steps = torch.unflatten(_blocks(packed)[:, -1], 2, (32, 4))
        steps[..., columns // 16 :] = 0


def _strips(row: int, num_rows: int) -> tuple[slice, tuple[int, int]]:
    """The strips that these rows lie in, and the rows of those above and below."""
    top, bottom = row % STRIP_ROWS, -(row + num_rows) % STRIP_ROWS
    return slice(row // STRIP_ROWS, -(-(row + num_rows) // STRIP_ROWS)), (top, bottom)


def _blocks(packed: Tensor) -> Tensor:
    """The view [num_strips, num_units, blocks of a unit, BLOCK_WORDS]."""
    num_blocks = packed.shape[2] // BLOCK_WORDS
    return torch.unflatten(packed[..., : num_blocks * BLOCK_WORDS], 2, (num_blocks, BLOCK_WORDS))


def _records(packed: Tensor) -> Tensor:
    """The view [num_strips, num_units, records of a unit, RECORD_WORDS]."""
    begin = packed.shape[2] // BLOCK_WORDS * BLOCK_WORDS
    return torch.unflatten(packed[..., begin:], 2, (-1, RECORD_WORDS))


def _add_records(packed: Tensor, row: int, group: int, values: Tensor) -> None:
    """Or int32 [m, groups] into the records of rows from `row` and groups from `group`, which
    begins a unit."""
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
    # [strip, block, g, t, s, e, u], each byte two rows
    pairs = blocks.contiguous().view(torch.uint8).view(num_strips, -1, 8, 4, 4, 2, 2)
    halves = torch.stack((pairs & 0xF, pairs >> 4), 1).permute(0, 1, 3, 2, 5, 7, 4, 6)
    return halves.reshape(num_strips * STRIP_ROWS, num_units * num_blocks * BLOCK_COLUMNS)
