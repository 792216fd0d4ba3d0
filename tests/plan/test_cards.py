"""The table of cards: found by every name people and torch give them, and plausible throughout."""

from __future__ import annotations

import pytest

from pyserve.errors import ConfigError
from pyserve.ops.cuda_card import MIN_CAPABILITY
from pyserve.plan.cards import CARDS, TOO_OLD, find_card, find_card_that_is_here


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("GeForce RTX 3090", "RTX 3090"),
        ("3060", "RTX 3060 12GB"),
        ("3070", "RTX 3070"),
        ("RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 5070 Ti", "RTX 5070 Ti"),
        ("a6000", "RTX A6000"),
        ("L4", "L4"),
        ("A10", "A10"),
        ("a100 80", "A100 80GB"),
        ("H100-SXM", "H100 SXM"),
        # What torch.cuda.get_device_name says:
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_a_card_by_its_names(name: str, found: str) -> None:
    assert find_card(name).name == found


@pytest.mark.parametrize("name", [card.name for card in CARDS])
def test_every_card_by_its_own_name(name: str) -> None:
    assert find_card(name).name == name


def test_a_name_that_several_cards_have() -> None:
    with pytest.raises(ConfigError, match="--gpu A100 may be any of: A100 40GB, A100 80GB"):
        find_card("A100")
    with pytest.raises(ConfigError, match="--gpu H100 may be any of: H100 PCIe, H100 SXM"):
        find_card("H100")


@pytest.mark.parametrize(
    ("name", "shown_gib", "found"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 7.7, "RTX 4060 Ti 8GB"),
        ("NVIDIA GeForce RTX 5060 Ti", 15.5, "RTX 5060 Ti 16GB"),
        ("NVIDIA GeForce RTX 3080", 11.7, "RTX 3080 12GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", 23.5, "RTX 4090"),
    ],
)
def test_memory_tells_apart_what_has_one_name(name: str, shown_gib: float, found: str) -> None:
    assert find_card_that_is_here(name, int(shown_gib * 2**30)).name == found


def test_a_name_without_its_memory_is_asked_for() -> None:
    match = "--gpu 5060 Ti may be any of: RTX 5060 Ti 8GB, RTX 5060 Ti 16GB"
    with pytest.raises(ConfigError, match=match):
        find_card("5060 Ti")


@pytest.mark.parametrize("name", ["RTX 4900", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_an_unknown_card_names_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match=r"not in the table; did you mean .*RTX 4090"):
        find_card(name)


@pytest.mark.parametrize("name", ["", "???", "toaster"])
def test_what_is_no_card_gets_the_list(name: str) -> None:
    with pytest.raises(ConfigError, match="There are: RTX 3060 12GB, .*, H200, B200"):
        find_card(name)


@pytest.mark.parametrize("name", TOO_OLD)
def test_a_card_too_old_is_told_so(name: str) -> None:
    with pytest.raises(ConfigError, match="is too old, the least is 8.0"):
        find_card(name)


def test_rows_are_plausible() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert card.capability >= MIN_CAPABILITY
        assert "measured" in card.source or "datasheet" in card.source
        # In GB of the name on the box: what CUDA shows of 8 to 192 GB.
        assert 7.5 * 1024 < card.memory_mib < 180 * 1024
        # Bytes a second and operations a second of one SM: a slip of a digit falls out.
        assert 4e9 < card.bandwidth_tb * 1e12 / card.num_sms < 60e9
        assert 0.5e12 < card.bf16_tflops * 1e12 / card.num_sms < 12e12
