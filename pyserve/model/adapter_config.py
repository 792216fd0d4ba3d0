"""adapter_config.json: the settings that PEFT saves beside an adapter's tensors.

A field that changes the computation is either honoured or refused by name. The adapter's tensors
tell which modules it has, so target_modules and layers_to_transform are ignored.
Format: LoraConfig of https://github.com/huggingface/peft
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from pyserve.errors import CheckpointError
from pyserve.model_files import read_object

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 4 * 2**20
MAX_RANK = 2**31 - 1
MAX_ALPHA = 3.4e38  # the largest float32: the scale that follows from it is a float32
MAX_PATTERN_CHARS = 500

# Initialisations that leave the base model's weights unchanged.
PLAIN_INITS = (True, False, "true", "gaussian", "eva", "orthogonal", "mica")

# field -> why an adapter with it is refused, unless it is null, false or empty
REFUSED = {
    "use_dora": "DoRA scales the columns of the merged matrix",
    "modules_to_save": "modules that are replaced as a whole are not supported",
    "lora_bias": "a bias of its own is not supported",
    "fan_in_fan_out": "transposed matrices are GPT-2's, which is not served",
    "layer_replication": "layers that are repeated are not supported",
    "trainable_token_indices": "embeddings of its own are not supported",
    "target_parameters": "adapters of experts are not supported",
    "alora_invocation_tokens": "an adapter that begins at a token is not supported",
    "use_qalora": "QA-LoRA pools the inputs",
    "use_bdlora": "block-diagonal adapters are not supported",
    "arrow_config": "routing among adapters is not supported",
    "monteclora_config": "MonteCLoRA is another computation",
    "kasa_config": "KaSA is another computation",
    "velora_config": "VeLoRA is another computation",
}
# Fields that do not affect how a finished adapter is applied.
HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "parent_library",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "task_type",
})  # fmt: skip
_READ = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights",
})  # fmt: skip

# Regular expressions from an untrusted file are matched with every module's name, and hold the
# interpreter's lock meanwhile. To bound that time, * and + may follow only a single character or
# class, at most twice, and the alternatives of a key may not multiply.
_PLAIN_KEY = re.compile(r"[\w.-]+")
_PATTERN_KEY = re.compile(r"(?:[\w.|()$^-]|\\[.dw]|(?:\.|\\[dw]|\[[\w-]+\])[*+]|\[[\w-]+\])+")
_REPEATED = re.compile(r"[*+]")
_GROUP_ENDS = re.compile(r"[()]")
MAX_REPEATED = 2
REPEATED_STEPS = 30  # how many characters of a name a repetition takes, one after another
MAX_PATTERN_STEPS = 40_000  # of all keys of a pattern together on one name, by _num_steps

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The settings of one adapter.

    max_rank       `r`: the rank of modules that no key of rank_pattern matches.
    alpha          `lora_alpha`: of modules that no key of alpha_pattern matches.
    is_rslora      the scale is alpha / sqrt(rank), not alpha / rank (rsLoRA).
    base_model     the model that it says it was trained on; "" where it does not say.
    unknown        names of fields that are set and that pyserve does not know.
    """

    max_rank: int
    alpha: float
    is_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model: str = ""
    unknown: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> AdapterConfig:
        """Read the file in `folder`. Raises CheckpointError naming the file, field and value."""
        path = folder / CONFIG_FILE
        raw = read_object(path, MAX_CONFIG_BYTES)
        if raw is None:
            raise CheckpointError(f"{path}: No such file: {folder} is no adapter of PEFT's")
        _refuse(raw, path)
        base_model = raw.get("base_model_name_or_path")
        known = HARMLESS | _READ | REFUSED.keys()
        return cls(
            max_rank=_rank(raw.get("r"), f"{path}: r"),
            alpha=_alpha(raw.get("lora_alpha"), f"{path}: lora_alpha"),
            is_rslora=_flag(raw, "use_rslora", path),
            rank_pattern=_pattern(raw, "rank_pattern", _rank, path),
            alpha_pattern=_pattern(raw, "alpha_pattern", _alpha, path),
            base_model=base_model if isinstance(base_model, str) else "",
            unknown=tuple(name for name, value in raw.items() if value and name not in known),
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in the base model."""
        return _first_match(self.rank_pattern, module, self.max_rank)

    def scale_of(self, module: str) -> float:
        """The factor of B A for a module, by its name in the base model."""
        rank = self.rank_of(module)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rslora else rank)


def _refuse(raw: Mapping[str, Any], path: Path) -> None:
    peft_type = raw.get("peft_type", "LORA")
    if peft_type != "LORA":
        raise CheckpointError(f"{path}: peft_type {_shown(peft_type)} is not supported, only LORA")
    for name, why in REFUSED.items():
        if raw.get(name):
            raise CheckpointError(f"{path}: {name} is not supported: {why}")
    if raw.get("bias") not in (None, "none"):
        bias = _shown(raw["bias"])
        raise CheckpointError(f"{path}: bias {bias} is not supported, only none")
    init = raw.get("init_lora_weights", True)
    if init is not None and not any(init is plain or init == plain for plain in PLAIN_INITS):
        raise CheckpointError(
            f"{path}: init_lora_weights {_shown(init)} is not supported: it changes the weights "
            "of the base model (as PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ do), or is not known; "
            "PEFT's path_initial_model_for_weight_conversion saves a plain adapter"
        )


def _rank(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise CheckpointError(f"{where} must be an integer in [1, {MAX_RANK}], got {_shown(value)}")
    return value


def _alpha(value: Any, where: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -MAX_ALPHA <= value <= MAX_ALPHA:  # which NaN is not
        raise CheckpointError(
            f"{where} must be a number in [-{MAX_ALPHA:g}, {MAX_ALPHA:g}], got {_shown(value)}"
        )
    return float(value)


def _flag(raw: Mapping[str, Any], name: str, path: Path) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: {name} must be true or false, got {_shown(value)}")
    return bool(value)


def _pattern(raw: Mapping[str, Any], name: str, read: Any, path: Path) -> dict[str, Any]:
    """A dict field whose keys are regular expressions for module names; `read` checks a value."""
    value = raw.get(name)
    if not value:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} must be an object, got {_shown(value)}")
    for key in value:
        _check_key(key, f"{path}: {name}")
    num_steps = sum(map(_num_steps, value))
    if num_steps > MAX_PATTERN_STEPS:
        raise CheckpointError(
            f"{path}: {name} has too many keys with *, + or |, or too many of these in one: one "
            f"name may take {num_steps} steps, the limit is {MAX_PATTERN_STEPS}"
        )
    return {key: read(item, f"{path}: {name}[{key}]") for key, item in value.items()}


def _check_key(key: str, where: str) -> None:
    is_known = (
        len(key) <= MAX_PATTERN_CHARS
        and _PATTERN_KEY.fullmatch(key) is not None
        and len(_REPEATED.findall(key)) <= MAX_REPEATED
    )
    if is_known:
        try:
            re.compile(key)
        except re.error:
            is_known = False
    if not is_known:
        raise CheckpointError(
            f"{where}: the key {_shown(key)} is not supported: only a module's name, or an "
            f"expression of at most {MAX_PATTERN_CHARS} characters that repeats a character "
            f"{MAX_REPEATED} times at most"
        )


def _num_steps(key: str) -> int:
    """How often a match may begin anew in a key, at most; 0: it is no expression."""
    if _PLAIN_KEY.fullmatch(key):
        return 0
    num_ways: int = prod(1 + part.count("|") for part in _GROUP_ENDS.split(key))
    num_steps: int = num_ways * REPEATED_STEPS ** len(_REPEATED.findall(key))
    return num_steps


def _first_match(pattern: Mapping[str, V], module: str, otherwise: V) -> V:
    """The value of the first key that matches the module's name, or its end behind a dot, as in
    PEFT; `otherwise` if none does."""
    for key, value in pattern.items():
        is_plain = _PLAIN_KEY.fullmatch(key) is not None
        if _is_end(key, module) if is_plain else re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def _is_end(key: str, module: str) -> bool:
    """What the match of a plain key says: thousands of expressions would be compiled anew for each
    module. A dot is any character in it, too."""
    begin = len(module) - len(key)
    is_part = begin == 0 or (begin > 0 and module[begin - 1] == ".")
    return is_part and all(a in (b, ".") for a, b in zip(key, module[begin:], strict=True))


def _shown(value: object) -> str:
    return repr(value)[:100]
