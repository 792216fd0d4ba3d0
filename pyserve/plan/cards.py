"""NVIDIA cards that people rent, as data: the memory that each really shows, the rates it reaches.

Memory is what CUDA shows: the total of cudaMemGetInfo, which torch's out-of-memory messages quote,
under drivers of 2024 to 2026. nvidia-smi shows up to 4 GiB more. Rates are what a card reaches, not
what its datasheet says: measured where `source` says so, otherwise the datasheet's rates times the
factors below.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from pyserve.engine.planner import MIB
from pyserve.errors import ConfigError
from pyserve.ops.cuda_card import MIN_CAPABILITY

# The part of the datasheet's bandwidth that is reached, by kind of memory. Measured: 0.91 (3090)
# and 0.93 (4090) with GDDR; 0.83 (A100), 0.87 (H100) and 0.88 (H200) with HBM.
OF_GDDR, OF_HBM = 0.90, 0.85
# The part of the datasheet's TFLOP/s that cuBLAS reaches: 736 of 989 on an H200. Cards under 200 W
# throttle and reach less.
OF_FLOPS = 0.75
# A CUDA context takes 0.3 to 0.6 GiB, more on cards with more SMs.
CONTEXT_BYTES = 512 * MIB


@dataclass(frozen=True, slots=True)
class Card:
    """One kind of card.

    memory_mib    memory that CUDA shows, in MiB
    bandwidth_tb  bandwidth that a reading kernel reaches, in TB/s (10^12 bytes)
    bf16_tflops   TFLOP/s that dense bf16 matrix products reach, accumulated in float32
    num_sms       number of streaming multiprocessors
    capability    compute capability, (major, minor)
    source        where the two rates come from
    aliases       other names, by which torch or people call the card
    """

    name: str
    memory_mib: int
    bandwidth_tb: float
    bf16_tflops: float
    num_sms: int
    capability: tuple[int, int]
    source: str
    aliases: tuple[str, ...] = ()


def _by_datasheet(
    name: str, gib: float, gb_per_s: float, tflops: float, num_sms: int,
    capability: tuple[int, int], *aliases: str, factor: float = OF_GDDR,
) -> Card:  # fmt: skip
    """A card without measurements: its datasheet's GB/s and dense TFLOP/s times the factors.

    gib  memory that CUDA shows.
    """
    source = f"datasheet x {factor:.2f} (bandwidth) and x {OF_FLOPS} (FLOP)"
    return Card(
        name, round(gib * 1024), gb_per_s * factor / 1000, tflops * OF_FLOPS, num_sms, capability,
        source, aliases,
    )  # fmt: skip


def _measured(
    name: str, gib: float, bandwidth_tb: float, tflops: float, num_sms: int,
    capability: tuple[int, int], *aliases: str, by: str,
) -> Card:  # fmt: skip
    """A card whose bandwidth has been measured; TFLOP/s are the datasheet's times OF_FLOPS.

    by  who measured the bandwidth, or with what.
    """
    source = f"bandwidth measured ({by}); FLOP: datasheet x {OF_FLOPS}"
    return Card(
        name, round(gib * 1024), bandwidth_tb, tflops * OF_FLOPS, num_sms, capability, source,
        aliases,
    )  # fmt: skip


# The TFLOP/s are the datasheet's for dense bf16 accumulated in float32, which GeForce cards do at
# half the rate.
CARDS: tuple[Card, ...] = (
    _by_datasheet("RTX 3060 12GB", 11.76, 360, 25.6, 28, (8, 6), "RTX 3060"),
    _by_datasheet("RTX 3060 Ti", 7.78, 448, 32.4, 38, (8, 6)),
    _by_datasheet("RTX 3070", 7.78, 448, 40.6, 46, (8, 6)),
    _by_datasheet("RTX 3070 Ti", 7.78, 608, 43.5, 48, (8, 6)),
    _by_datasheet("RTX 3080 10GB", 9.77, 760, 59.5, 68, (8, 6), "RTX 3080"),
    _by_datasheet("RTX 3080 12GB", 11.76, 912, 61.3, 70, (8, 6)),
    _by_datasheet("RTX 3080 Ti", 11.76, 912, 68.2, 80, (8, 6)),
    _measured("RTX 3090", 23.57, 0.854, 71, 82, (8, 6), by="a kernel that reads, ninfer-3090 #50"),
    _by_datasheet("RTX 3090 Ti", 23.57, 1008, 80, 84, (8, 6)),
    _by_datasheet("RTX 4060", 7.75, 272, 30.2, 24, (8, 9)),
    _by_datasheet("RTX 4060 Ti 8GB", 7.75, 288, 44.1, 34, (8, 9)),
    _by_datasheet("RTX 4060 Ti 16GB", 15.57, 288, 44.1, 34, (8, 9)),
    _by_datasheet("RTX 4070", 11.72, 504, 58.3, 46, (8, 9)),
    _by_datasheet("RTX 4070 Super", 11.72, 504, 70.9, 56, (8, 9)),
    _by_datasheet("RTX 4070 Ti", 11.72, 504, 80.2, 60, (8, 9)),
    _by_datasheet("RTX 4070 Ti Super", 15.57, 672, 88.2, 66, (8, 9)),
    _by_datasheet("RTX 4080", 15.57, 716.8, 97.5, 76, (8, 9)),
    _by_datasheet("RTX 4080 Super", 15.57, 736, 104.4, 80, (8, 9)),
    _measured("RTX 4090", 23.52, 0.94, 165, 128, (8, 9), by="FlashInfer #551"),
    _by_datasheet("RTX 5060", 7.53, 448, 38.4, 30, (12, 0)),
    _by_datasheet("RTX 5060 Ti 8GB", 7.53, 448, 47.4, 36, (12, 0)),
    _by_datasheet("RTX 5060 Ti 16GB", 15.46, 448, 47.4, 36, (12, 0)),
    _by_datasheet("RTX 5070", 11.50, 672, 61.7, 48, (12, 0)),
    _by_datasheet("RTX 5070 Ti", 15.46, 896, 87.9, 70, (12, 0)),
    _by_datasheet("RTX 5080", 15.46, 960, 112.6, 84, (12, 0)),
    _by_datasheet("RTX 5090", 31.36, 1792, 209.5, 170, (12, 0)),
    _by_datasheet("RTX A4000", 15.60, 448, 76.7, 48, (8, 6), "A4000"),
    _by_datasheet("RTX A5000", 23.57, 768, 111.1, 64, (8, 6), "A5000"),
    _by_datasheet("RTX A6000", 47.40, 768, 154.8, 84, (8, 6), "A6000"),
    _by_datasheet("RTX 6000 Ada", 47.40, 960, 364, 142, (8, 9), "RTX 6000 Ada Generation"),
    _by_datasheet("A10", 22.03, 600, 125, 72, (8, 6)),
    # Amazon's variant: the same memory, but tensor cores with little more than half the rate.
    _by_datasheet("A10G", 22.03, 600, 70, 72, (8, 6)),
    _by_datasheet("A40", 44.39, 696, 149.7, 84, (8, 6)),
    _by_datasheet("L4", 22.03, 300, 121, 58, (8, 9)),
    _by_datasheet("L40S", 44.39, 864, 362, 142, (8, 9)),
    _by_datasheet(
        "A100 40GB", 39.39, 1555, 312, 108, (8, 0), "A100-SXM4-40GB", "A100-PCIE-40GB",
        factor=OF_HBM,
    ),
    _measured(
        "A100 80GB", 79.14, 1.7, 312, 108, (8, 0), "A100-SXM4-80GB", "A100 80GB PCIe",
        by="gpt-fast, SXM at 330 W",
    ),
    _by_datasheet("H100 PCIe", 79.10, 2000, 756, 114, (9, 0), factor=OF_HBM),
    _measured(
        "H100 SXM", 79.10, 2.9, 989, 132, (9, 0), "H100 80GB HBM3",
        by="published kernels, 2.8 to 3.0",
    ),
    Card(
        "H200", 143073, 4.2, 736, 132, (9, 0),
        source="both measured by us: a copy at 4.24 TB/s, cuBLAS at 736 TFLOP/s",
        aliases=("H200 SXM",),
    ),
    _by_datasheet("B200", 178.35, 7700, 2250, 148, (10, 0), factor=OF_HBM),
)  # fmt: skip

# Cards that are often asked for but too old, listed so that the answer is not "not in the table".
TOO_OLD: dict[str, tuple[int, int]] = {
    "Tesla T4": (7, 5), "T4": (7, 5), "RTX 2080 Ti": (7, 5), "V100": (7, 0), "P100": (6, 0),
}  # fmt: skip


def find_card(name: str, flag: str = "--gpu") -> Card:
    """The card with this name, as people or torch write it, with or without maker and spaces.

    Raises ConfigError naming `flag`, and the cards with similar names, if the name fits no card or
    several.
    """
    wanted = _key(name)
    by_key = {_key(alias): card for card in CARDS for alias in (card.name, *card.aliases)}
    by_key |= {key.removeprefix("rtx"): card for key, card in by_key.items()}
    if wanted in by_key:
        return by_key[wanted]
    for old, (major, minor) in TOO_OLD.items():
        if wanted == _key(old):
            raise ConfigError(
                f"{flag} {name}: compute capability {major}.{minor} is too old, the least is "
                f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
            )
    meant = {card.name for key, card in by_key.items() if wanted and wanted in key}
    if len(meant) == 1:
        return next(card for card in CARDS if card.name in meant)
    if meant:
        names = ", ".join(card.name for card in CARDS if card.name in meant)
        raise ConfigError(f"{flag} {name} may be any of: {names}")
    near = difflib.get_close_matches(wanted, by_key, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(dict.fromkeys(by_key[key].name for key in near))}? "
    raise ConfigError(
        f"{flag} {name} is not in the table; {hint if near else ''}There are: "
        f"{', '.join(card.name for card in CARDS)}"
    )


def find_card_that_is_here(name: str, total_bytes: int) -> Card:
    """The card with the name and the memory that CUDA shows. Raises ConfigError.

    CUDA gives some cards with different memory sizes the same name; then the memory decides.
    """
    pattern = re.escape(_key(name)) + r"(\d+gb)?"
    variants = [card for card in CARDS if re.fullmatch(pattern, _key(card.name))]
    if not variants:
        return find_card(name)
    return min(variants, key=lambda card: abs(card.memory_mib * MIB - total_bytes))


def _key(name: str) -> str:
    """A card's name reduced to the letters and digits that tell cards apart."""
    text = re.sub(r"nvidia|geforce|tesla", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", text)
