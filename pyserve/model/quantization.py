"""Quantization: how the matrices of a quantised checkpoint are stored, read from
`quantization_config` of config.json. What is not supported is refused by name. Imports no torch.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from pyserve.errors import ConfigError
from pyserve.limits import FP8_EXPERTS_STEP
from pyserve.model.fields import Fields, shown
from pyserve.model.registry import SchemeName

Method = Literal["awq", "gptq", "compressed-tensors", "fp8"]
Integers = Literal["awq-gemm", "awq-gemv", "gptq", "gptq_v2", "pack-quantized", "plain"]
Fp8 = Literal["fp8", "fp8-plain"]
Storage = Integers | Fp8

KEYS = ("quantization_config", "compression_config")  # the second is an old name of the first
GROUP_SIZES = (128, 64, 32)
BITS = 4
UNIT_COLUMNS = 64  # 4-bit matrices can be divided at multiples of at least so many columns
FP8_BITS = 8
BLOCK = (128, 128)  # rows and columns that share a scale in block-wise FP8
# transformers' names of the scales of method "fp8" without blocks -> the names that AutoFP8 uses.
NAMES_OF_A_MATRIX = {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"}
MAX_PATTERN_CHARS = 200
MAX_PATTERN_REPEATS = 4  # bounds the time of matching an untrusted pattern

# Which FP8 weights share a scale: a BLOCK, a row, or the whole matrix.
Granularity = Literal["block", "channel", "tensor"]


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """How matrices are quantised: 4-bit integers in groups of columns, or 8-bit floats (e4m3).

    storage         the format of the tensors; see w4a16_formats.py and fp8.py. With "plain" and
                    "fp8-plain" the checkpoint is not quantised: it is rounded while loading.
    group_size      4-bit: columns that share a scale. With "plain" each matrix instead has the
                    largest of GROUP_SIZES that divides its columns.
    has_zeros       4-bit: zero points are stored; otherwise they are 8.
    granularity     FP8: which weights share a scale: a block of 128 by 128, a row, or the matrix.
    scale_name      FP8: name of the tensors with scales, behind the module's name.
    has_input_scales
                    FP8: scales for activations may be stored; they are not used.
    is_weight_only  FP8: the checkpoint is meant for 16-bit activations, so they are never rounded.
    skipped         regular expressions, for re.search, of modules that are not quantised.
    only            if not empty: only modules whose names end so are quantised.
    has_head        the output head may be quantised.
    """

    method: Method
    storage: Storage
    group_size: int = GROUP_SIZES[0]
    has_zeros: bool = True
    granularity: Granularity = "channel"
    scale_name: str = "weight_scale"
    has_input_scales: bool = False
    is_weight_only: bool = False
    skipped: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    has_head: bool = False

    @property
    def scheme(self) -> SchemeName:
        """The Scheme of the matrices that are quantised."""
        return "fp8" if self.storage in ("fp8", "fp8-plain") else "w4a16"

    def covers(self, name: str) -> bool:
        """Whether the matrix of the checkpoint's module `name` is quantised."""
        if name == "lm_head" and not self.has_head:
            return False
        if self.only and not name.endswith(self.only):
            return False
        return not any(re.search(pattern, name) for pattern in self.skipped)

    def plain_name(self, name: str) -> str:
        """The tensor `name` of the checkpoint as the scheme calls it."""
        module, _, end = name.rpartition(".")
        if self.method != "fp8" or self.granularity == "block" or end not in NAMES_OF_A_MATRIX:
            return name
        return f"{module}.{NAMES_OF_A_MATRIX[end]}"

    def words(self) -> str:
        """A short description for messages."""
        if self.storage == "plain":
            return "rounded to 4 bits as it is loaded"
        if self.storage == "fp8-plain":
            return "rounded to 8-bit floats as it is loaded"
        if self.storage == "fp8":
            return f"8-bit floats ({self.method}) with a scale {SCALED[self.granularity]}"
        return f"4-bit {self.method} in groups of {self.group_size}"

    def remarks(self, first_rounded_row: int | None = None) -> list[str]:
        """Warnings that the server logs once.

        first_rounded_row  with FP8: the number of rows of a step from which activations are rounded
                           to 8 bits too; None: they never are.
        """
        said = []
        if self.storage == "plain":
            said.append(
                "rounding the weights to 4 bits as they are loaded: a calibrated AWQ checkpoint of "
                "the model answers better"
            )
        if self.storage == "fp8-plain":
            said.append(
                "rounding the weights to 8-bit floats as they are loaded, with a scale a row"
            )
        if self.scheme == "fp8":
            unused = ": the checkpoint's input_scale is not used" if self.has_input_scales else ""
            said.append(
                f"8-bit float weights are multiplied by 16-bit activations, which are not rounded "
                f"to 8 bits{unused}"
                if first_rounded_row is None or self.is_weight_only
                else f"8-bit float weights are multiplied by FP8 matrix units in steps of "
                f"{first_rounded_row} rows and more, where activations are rounded to 8 bits with "
                f"a scale for each token and 128 columns; in shorter ones, and by experts, they "
                f"are not{unused}"
            )
        return said

    def lacking_on_cuda(self, experts_widths: frozenset[int]) -> list[str]:
        """Descriptions of what our CUDA kernels do not support; [] if none.

        experts_widths  the numbers of columns of the experts' matrices; empty without experts.
        """
        if self.scheme == "w4a16":
            return []
        return [
            f"experts of 8-bit floats of {width} columns, no multiple of {FP8_EXPERTS_STEP}"
            for width in sorted(experts_widths)
            if width % FP8_EXPERTS_STEP
        ]

    def unit_columns(self, num_columns: int) -> int:
        """Ranks may divide a matrix of num_columns columns only at multiples of this many.

        Raises ConfigError as group_of.
        """
        if self.scheme == "fp8":
            return BLOCK[1] if self.granularity == "block" else 1
        return max(UNIT_COLUMNS, self.group_of(num_columns))

    def group_of(self, num_columns: int) -> int:
        """The group size of a 4-bit matrix of num_columns columns.

        Raises ConfigError, without the matrix's name, if no group size divides them.
        """
        sizes = GROUP_SIZES if self.storage == "plain" else (self.group_size,)
        for size in sizes:
            if num_columns % size == 0:
                return size
        raise ConfigError(
            f"has {num_columns} columns, which are no multiple of the group size, {sizes[-1]}"
        )


SCALED: dict[Granularity, str] = {
    "block": f"for {BLOCK[0]} by {BLOCK[1]}",
    "channel": "a row",
    "tensor": "a matrix",
}
AT_LOAD: dict[Method, Quantization] = {
    "awq": Quantization(method="awq", storage="plain"),
    "fp8": Quantization(method="fp8", storage="fp8-plain"),
}


def agreed(stored: Quantization | None, asked: Method | None) -> Quantization | None:
    """Combine the checkpoint's quantisation with --quantization.

    stored  what config.json says; None: nothing.
    asked   the flag; None: not given.

    Raises ConfigError if they contradict each other.
    """
    if asked is None or (stored is not None and stored.method == asked):
        return stored
    if stored is not None:
        raise ConfigError(
            f"--quantization {asked}: config.json says that the checkpoint is {stored.method}; "
            "leave the flag out"
        )
    if asked not in AT_LOAD:
        raise ConfigError(
            f"--quantization {asked}: config.json says nothing of a quantised checkpoint; "
            "--quantization awq or fp8 quantises a 16-bit one as it is loaded"
        )
    return AT_LOAD[asked]


def read_quantization(fields: Fields) -> Quantization | None:
    """Read config.json's quantization_config; None if it has none.

    Raises ConfigError naming the key and the value.
    """
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


def _read_fp8(table: Fields) -> Quantization:
    # https://github.com/deepseek-ai/DeepSeek-V3: README_WEIGHTS.md; https://github.com/neuralmagic/AutoFP8
    if table.string("fmt", default="e4m3", is_nullable=True) != "e4m3":
        raise table.refuse("fmt", "must be e4m3")
    if table.string("scale_fmt", default="ue8m0", is_nullable=True) not in ("ue8m0", "float"):
        raise table.refuse("scale_fmt", "must be ue8m0 or float")
    if not table.is_empty("kv_cache_scheme"):
        raise table.refuse("kv_cache_scheme", "is not supported")
    activations = table.string("activation_scheme", default="dynamic", is_nullable=True)
    if activations not in ("dynamic", "static"):
        raise table.refuse("activation_scheme", "must be dynamic or static")
    has_blocks = table.has("weight_block_size")
    if has_blocks and table.integers("weight_block_size", 1, 2**20) != BLOCK:
        raise table.refuse("weight_block_size", f"must be {list(BLOCK)}")
    skipped = []
    for key in ("modules_to_not_convert", "ignored_layers"):
        for name in table.strings(key) if table.has(key) else []:
            is_pattern = name.startswith("re:")
            skipped.append(_pattern(table, name, key) if is_pattern else _of_module(name))
    return Quantization(
        method="fp8",
        storage="fp8",
        granularity="block" if has_blocks else "tensor",
        scale_name="weight_scale_inv" if has_blocks else "weight_scale",
        has_input_scales=activations == "static",
        skipped=tuple(skipped),
    )


def _of_module(name: str) -> str:
    """A regular expression, for re.search, that matches a module and everything within it."""
    return rf"(^|\.){re.escape(name)}($|\.)"


def _read_compressed_tensors(table: Fields) -> Quantization:
    # https://github.com/vllm-project/compressed-tensors: src/compressed_tensors/quantization
    formats = ("pack-quantized", "float-quantized")
    kind = table.string("format", default=formats[0], is_nullable=True)
    if kind not in formats:
        raise table.refuse("format", f"must be {' or '.join(formats)}")
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
    if group.has("output_activations"):
        raise group.refuse("output_activations", "is not supported")
    read = _packed_group if kind == "pack-quantized" else _float_group
    return msgspec.structs.replace(
        read(group),
        skipped=tuple(
            _pattern(table, name)
            for name in (table.strings("ignore") if table.has("ignore") else [])
        ),
        has_head=True,
    )


def _packed_group(group: Fields) -> Quantization:
    if group.has("input_activations"):
        raise group.refuse(
            "input_activations", "is not supported: only weights may be quantised to integers"
        )
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
    )


def _float_group(group: Fields) -> Quantization:
    weights = group.table("weights")
    granularity = weights.string("strategy", default="tensor", is_nullable=True)
    if granularity not in SCALED:
        raise weights.refuse("strategy", f"must be one of: {', '.join(SCALED)}")
    if granularity == "block" and weights.integers("block_structure", 1, 2**20) != BLOCK:
        raise weights.refuse("block_structure", f"must be {list(BLOCK)}")
    if not weights.boolean("symmetric", default=True):
        raise weights.refuse("symmetric", "must be true")
    has_input_scales = False
    tables = [weights]
    if group.has("input_activations"):
        tables.append(group.table("input_activations"))
        has_input_scales = not tables[1].boolean("dynamic", default=False)
    for numbers in tables:
        if numbers.string("type", default="int", is_nullable=True) != "float":
            raise numbers.refuse("type", "must be float")
        if numbers.integer("num_bits", 1, 64) != FP8_BITS:
            raise numbers.refuse("num_bits", f"must be {FP8_BITS}")
    return Quantization(
        method="compressed-tensors",
        storage="fp8",
        granularity=granularity,
        has_input_scales=has_input_scales,
        is_weight_only=not group.has("input_activations"),
    )


_READERS = {
    "awq": _read_awq,
    "gptq": _read_gptq,
    "compressed-tensors": _read_compressed_tensors,
    "fp8": _read_fp8,
}


def _group_size(table: Fields, bits_key: str = "bits") -> int:
    bits = table.integer(bits_key, 1, 64)
    if bits != BITS:
        raise table.refuse(bits_key, f"must be {BITS}")
    size = table.integer("group_size", -1, 2**20)
    if size not in GROUP_SIZES:
        raise table.refuse("group_size", f"must be one of {', '.join(map(str, GROUP_SIZES[::-1]))}")
    return size


def _pattern(table: Fields, name: str, key: str = "ignore") -> str:
    """An entry of the list `key` as an expression for re.search: a name, or a pattern after "re:".

    Raises ConfigError for a pattern that is invalid or might take long to match.
    """
    if not name.startswith("re:"):
        return f"^{re.escape(name)}$"
    pattern = name.removeprefix("re:")
    repeats = re.findall(r"[*+{?]", pattern)
    is_nested = re.search(r"\)[*+{?]", pattern) is not None
    if len(pattern) > MAX_PATTERN_CHARS or len(repeats) > MAX_PATTERN_REPEATS or is_nested:
        raise table.refuse(key, f"holds an expression that is too complicated: {shown(name)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise table.refuse(key, f"holds a broken expression, {shown(name)}") from error
    return f"^(?:{pattern})"
