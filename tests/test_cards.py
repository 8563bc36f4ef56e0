"""The table of cards against what its figures are made of, and the ways to name a card or an amount of memory."""

from __future__ import annotations

import pytest

from elo_engine.errors import UsageError
from elo_engine.measure.cards import CARDS, card_of_device, find_card, parse_memory

# Multiprocessors and boost clock in GHz, from the makers' specifications.
GEFORCE = {
    "rtx-3060": (28, 1.777), "rtx-3090": (82, 1.695), "rtx-4060-ti-8gb": (34, 2.535), "rtx-4060-ti-16gb": (34, 2.535),
    "rtx-4070-ti-super": (66, 2.610), "rtx-4080": (76, 2.505), "rtx-4090": (128, 2.520), "rtx-5070-ti": (70, 2.452),
    "rtx-5080": (84, 2.617), "rtx-5090": (170, 2.407),
}  # fmt: skip
# The rates with structured sparsity that data sheets print, in TFLOP/s.
SPARSE = {
    "a10": 250, "rtx-a6000": 309.7, "l4": 242, "l40s": 733, "a100-40gb": 624, "a100-80gb": 624, "a100-80gb-pcie": 624,
    "h100-pcie": 1513, "h100-sxm": 1979, "h200": 1979,
}  # fmt: skip


def test_rates_are_dense_with_fp32_sums() -> None:
    found = {card.name: card.flop_per_s / 1e12 for card in CARDS}
    assert found.keys() == GEFORCE.keys() | SPARSE.keys()
    for name, (multiprocessors, clock) in GEFORCE.items():
        assert found[name] == pytest.approx(multiprocessors * 0.512 * clock, rel=0.005), name
    for name, sparse in SPARSE.items():
        assert found[name] == pytest.approx(sparse / 2, rel=0.015), name


@pytest.mark.parametrize("name", ["rtx-4090", "RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "GeForce RTX 4090"])
def test_a_card_has_many_spellings(name: str) -> None:
    assert find_card(name).name == "rtx-4090"


def test_every_name_and_alias_finds_its_card_and_no_other() -> None:
    for card in CARDS:
        for name in (card.name, *card.aliases):
            assert find_card(name) is card, name
    assert find_card("a100").memory_gb == 80 and find_card("h100").name == "h100-sxm"


def test_an_unknown_card_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'rtx-9999'.*rtx-3090.*h200.*24GB"):
        find_card("rtx-9999")


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 7.6, "rtx-4060-ti-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.6, "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 79.1, "a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-sxm"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA A10", 22.1, "a10"),
        ("NVIDIA L40S", 44.4, "l40s"),
    ],
)
def test_what_torch_calls_a_card(device: str, gib: float, name: str) -> None:
    card = card_of_device(device, int(gib * 2**30))
    assert card is not None and card.name == name


def test_a_card_that_is_not_in_the_table_is_no_other_card() -> None:
    for device in ("NVIDIA A10G", "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA L40", "GeForce RTX 3060 Ti", "Tesla T4"):
        assert card_of_device(device) is None, device


def test_amounts_of_memory() -> None:
    assert parse_memory("24GB") == 24 * 10**9 == find_card("rtx-4090").memory_bytes
    assert parse_memory("22.5 GiB") == int(22.5 * 2**30) and parse_memory("512mib") == 512 * 2**20
    for wrong in ("24", "GB", "-1GB", "0GB", "24 Gb/s", "", "1e3GB", "24G", "nan GB"):
        with pytest.raises(UsageError, match="24GB"):
            parse_memory(wrong)
