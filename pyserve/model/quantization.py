"""Quantization: how a checkpoint's matrices are stored where they are not plain numbers, read from
`quantization_config` of config.json. What is not served is refused by name. Imports no torch.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from pyserve.errors import ConfigError
from pyserve.model.fields import Fields, shown

Method = Literal["awq", "gptq", "compressed-tensors"]
Storage = Literal["awq-gemm", "awq-gemv", "gptq", "gptq_v2", "pack-quantized", "plain"]

KEYS = ("quantization_config", "compression_config")  # the second is an old name of the first
GROUP_SIZES = (128, 64, 32)
BITS = 4
MAX_PATTERN_CHARS = 200
MAX_PATTERN_REPEATS = 4  # so that matching ends soon, whatever the pattern


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """4-bit integers in groups along the columns.

    storage         how the tensors lie: see w4a16_formats.py. "plain": as 16-bit numbers, which
                    are quantised as they are loaded.
    group_size      columns; of "plain" the largest that divides a matrix.
    has_zeros       whether zero points are stored; else they are 8.
    skipped         regular expressions for modules that are stored plainly.
    only            ends of the names of all others; none: no such limit.
    has_head        whether the output head may be quantised.
    """

    method: Method
    storage: Storage
    group_size: int = GROUP_SIZES[0]
    has_zeros: bool = True
    skipped: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    has_head: bool = False

    def covers(self, name: str) -> bool:
        """Whether the matrix of the checkpoint's module `name` is stored so."""
        if name == "lm_head" and not self.has_head:
            return False
        if self.only and not name.endswith(self.only):
            return False
        return not any(re.search(pattern, name) for pattern in self.skipped)

    def words(self) -> str:
        """What a person reads of it."""
        if self.storage == "plain":
            return "rounded to 4 bits as it is loaded"
        return f"4-bit {self.method} in groups of {self.group_size}"

    def group_of(self, num_columns: int) -> int:
        """Of a matrix of so many columns. Raises ConfigError, without the matrix's name."""
        sizes = GROUP_SIZES if self.storage == "plain" else (self.group_size,)
        for size in sizes:
            if num_columns % size == 0:
                return size
        raise ConfigError(
            f"has {num_columns} columns, which are no multiple of the group size, {sizes[-1]}"
        )


AT_LOAD = Quantization(method="awq", storage="plain")


def agreed(stored: Quantization | None, asked: Method | None) -> Quantization | None:
    """What --quantization `asked` makes of a checkpoint. Raises ConfigError naming both."""
    if asked is None or (stored is not None and stored.method == asked):
        return stored
    if stored is not None:
        raise ConfigError(
            f"--quantization {asked}: config.json says that the checkpoint is {stored.method}; "
            "leave the flag out"
        )
    if asked != "awq":
        raise ConfigError(
            f"--quantization {asked}: config.json says nothing of a quantised checkpoint; "
            "--quantization awq quantises a 16-bit one as it is loaded"
        )
    return AT_LOAD


def read_quantization(fields: Fields) -> Quantization | None:
    """What config.json says; None where nothing. Raises ConfigError naming the key and value."""
    for key in KEYS:
        if not fields.has(key):
            continue
        table = fields.table(key)
        method = table.string("quant_method", default="", is_nullable=True)
        reader = _READERS.get(method)
        if reader is None:
            raise table.refuse("quant_method", f"must be one of: {', '.join(_READERS)}")
        return reader(table)
    return None


def _read_awq(table: Fields) -> Quantization:
    # https://github.com/casper-hansen/AutoAWQ: awq/models/_config.py
    version = table.string("version", default="gemm", is_nullable=True).lower()
    if version not in ("gemm", "gemv"):
        raise table.refuse("version", "must be gemm or gemv")
    if table.string("backend", default="autoawq", is_nullable=True) != "autoawq":
        raise table.refuse("backend", "must be autoawq")
    if not table.boolean("zero_point", default=True):
        raise table.refuse("zero_point", "must be true")
    skipped = table.strings("modules_to_not_convert") if table.has("modules_to_not_convert") else []
    return Quantization(
        method="awq",
        storage="awq-gemm" if version == "gemm" else "awq-gemv",
        group_size=_group_size(table),
        skipped=tuple(re.escape(name) for name in skipped),
    )


def _read_gptq(table: Fields) -> Quantization:
    # https://github.com/ModelCloud/GPTQModel: gptqmodel/quantization/config.py
    if table.boolean("desc_act", default=False):
        raise table.refuse("desc_act", "(act-order) is not supported: it must be false")
    key = "checkpoint_format" if table.has("checkpoint_format") else "format"
    storage = table.string(key, default="gptq", is_nullable=True)
    if storage not in ("gptq", "gptq_v2"):
        raise table.refuse(key, "must be gptq or gptq_v2")
    if not table.is_empty("dynamic"):
        raise table.refuse("dynamic", "is not supported: every matrix must be quantised alike")
    if table.string("pack_dtype", default="int32", is_nullable=True) != "int32":
        raise table.refuse("pack_dtype", "must be int32")
    return Quantization(
        method="gptq",
        storage="gptq" if storage == "gptq" else "gptq_v2",
        group_size=_group_size(table),
        only=_modules_in_block(table),
        has_head=table.boolean("lm_head", default=False),
    )


def _modules_in_block(table: Fields) -> tuple[str, ...]:
    key = "modules_in_block_to_quantize"
    if not table.has(key):
        return ()
    lists = table.lists_of_strings(key)
    return tuple(f".{name}" for names in lists for name in names)


def _read_compressed_tensors(table: Fields) -> Quantization:
    # https://github.com/vllm-project/compressed-tensors: src/compressed_tensors/quantization
    if table.string("format", default="pack-quantized", is_nullable=True) != "pack-quantized":
        raise table.refuse("format", "must be pack-quantized")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if not table.is_empty(key) and table.inner_string(key, "format") != "dense":
            raise table.refuse(key, "is not supported")
    groups = table.table("config_groups")
    names = groups.tables()
    if len(names) != 1:
        raise table.refuse("config_groups", "must hold one group: all matrices quantised alike")
    group = groups.table(names[0])
    if group.strings("targets") != ["Linear"]:
        raise group.refuse("targets", 'must be ["Linear"]')
    for key in ("input_activations", "output_activations"):
        if group.has(key):
            raise group.refuse(key, "is not supported: only weights may be quantised")
    weights = group.table("weights")
    if weights.string("type", default="int", is_nullable=True) != "int":
        raise weights.refuse("type", "must be int")
    if weights.string("strategy", default="group", is_nullable=True) != "group":
        raise weights.refuse("strategy", "must be group")
    if weights.string("actorder", default="static", is_nullable=True) not in ("static", "weight"):
        raise weights.refuse("actorder", "(act-order) is not supported: it must be null or static")
    return Quantization(
        method="compressed-tensors",
        storage="pack-quantized",
        group_size=_group_size(weights, bits_key="num_bits"),
        has_zeros=not weights.boolean("symmetric", default=True),
        skipped=tuple(
            _pattern(table, name)
            for name in (table.strings("ignore") if table.has("ignore") else [])
        ),
        has_head=True,
    )


_READERS = {
    "awq": _read_awq,
    "gptq": _read_gptq,
    "compressed-tensors": _read_compressed_tensors,
}


def _group_size(table: Fields, bits_key: str = "bits") -> int:
    bits = table.integer(bits_key, 1, 64)
    if bits != BITS:
        raise table.refuse(bits_key, f"must be {BITS}")
    size = table.integer("group_size", -1, 2**20)
    if size not in GROUP_SIZES:
        raise table.refuse("group_size", f"must be one of {', '.join(map(str, GROUP_SIZES[::-1]))}")
    return size


def _pattern(table: Fields, name: str) -> str:
    """A name of `ignore`, or what follows "re:", as an expression for re.search."""
    if not name.startswith("re:"):
        return f"^{re.escape(name)}$"
    pattern = name.removeprefix("re:")
    repeats = re.findall(r"[*+{?]", pattern)
    is_nested = re.search(r"\)[*+{?]", pattern) is not None
    if len(pattern) > MAX_PATTERN_CHARS or len(repeats) > MAX_PATTERN_REPEATS or is_nested:
        raise table.refuse("ignore", f"holds an expression that is too complicated: {shown(name)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise table.refuse("ignore", f"holds a broken expression, {shown(name)}") from error
    return f"^(?:{pattern})"
