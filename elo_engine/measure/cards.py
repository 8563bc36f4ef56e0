"""Graphics cards by name: memory, dense bf16 rate, bandwidths, as their makers publish them; and amounts of memory.

The rate is that of dense bf16 matrix products summed in fp32, without structured sparsity: what training uses, and what
MFU is held against. Data sheets often print the sparse rate, twice as high, and GeForce cards sum in fp32 at half the
rate at which they sum in fp16: 512 operations a clock and multiprocessor, so
    rate = multiprocessors x 512 x boost clock,
which gives the figures of NVIDIA's architecture papers where those print one (3090: 71, 4080: 97.5, 4090: 165.2, 5080:
112.6, 5090: 209.5 TFLOP/s) and is used for the cards they leave out (3060, 4060 Ti, 4070 Ti Super, 5070 Ti). No figure
here was measured by this project.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from elo_engine.errors import UsageError

GB = 10**9
CONTEXT_BYTES = 6 * 2**30 // 10  # what CUDA takes on a card before the first tensor; counted, not measured

# One way, by the standard: 16 GT/s (PCIe 4) or 32 GT/s (PCIe 5) a lane, 128 of 130 bits.
_PCIE_LANE = {4: 16e9 * 128 / 130 / 8, 5: 32e9 * 128 / 130 / 8}


@dataclass(frozen=True)
class Card:
    """One card.

    Attributes:
        name: as commands take it. device: what torch calls it, without the maker; a variant of another memory has the
            same.
        memory_gb: the number it is sold with.
        flop_per_s: dense bf16 products with fp32 sums.
        memory_bytes_per_s, link_bytes_per_s: of its own memory, and one way over PCIe.
    """

    name: str
    device: str
    memory_gb: int
    flop_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    aliases: tuple[str, ...] = ()

    @property
    def fp8(self) -> bool:
        """Whether it multiplies 8-bit floats: Ada, Hopper and later do, Ampere does not."""
        return not re.match(r"rtx-30|rtx-a|a10", self.name)

    @property
    def memory_bytes(self) -> int:
        """Bytes to plan with: the number it is sold with times 10^9.

        The memory itself is that number times 2^30, 7 % more. Of it the driver keeps a part, and error correction 6 %
        on cards with GDDR memory, so a plan for 2^30 would promise what no program gets.
        """
        return self.memory_gb * GB


def _card(
    name: str, device: str, memory_gb: int, teraflops: float, gb_per_s: float, pcie: tuple[int, int], *aliases: str
) -> Card:
    generation, lanes = pcie
    return Card(name, device, memory_gb, teraflops * 1e12, gb_per_s * 1e9, lanes * _PCIE_LANE[generation], aliases)


CARDS: tuple[Card, ...] = (
    _card("rtx-3060", "GeForce RTX 3060", 12, 25.5, 360, (4, 16), "rtx-3060-12gb"),
    _card("rtx-3090", "GeForce RTX 3090", 24, 71.2, 936, (4, 16)),
    _card("rtx-4060-ti-8gb", "GeForce RTX 4060 Ti", 8, 44.1, 288, (4, 8), "rtx-4060-ti"),
    _card("rtx-4060-ti-16gb", "GeForce RTX 4060 Ti", 16, 44.1, 288, (4, 8)),
    _card("rtx-4070-ti-super", "GeForce RTX 4070 Ti SUPER", 16, 88.2, 672, (4, 16)),
    _card("rtx-4080", "GeForce RTX 4080", 16, 97.5, 717, (4, 16)),
    _card("rtx-4090", "GeForce RTX 4090", 24, 165.2, 1008, (4, 16)),
    _card("rtx-5070-ti", "GeForce RTX 5070 Ti", 16, 87.9, 896, (5, 16)),
    _card("rtx-5080", "GeForce RTX 5080", 16, 112.6, 960, (5, 16)),
    _card("rtx-5090", "GeForce RTX 5090", 32, 209.5, 1792, (5, 16)),
    _card("a10", "A10", 24, 125.0, 600, (4, 16)),
    _card("rtx-a6000", "RTX A6000", 48, 154.8, 768, (4, 16), "a6000"),
    _card("l4", "L4", 24, 121.0, 300, (4, 16)),
    _card("l40s", "L40S", 48, 362.0, 864, (4, 16)),
    _card("a100-40gb", "A100-SXM4-40GB", 40, 312.0, 1555, (4, 16), "a100-40", "A100-PCIE-40GB"),
    _card("a100-80gb", "A100-SXM4-80GB", 80, 312.0, 2039, (4, 16), "a100-80", "a100"),
    _card("a100-80gb-pcie", "A100 80GB PCIe", 80, 312.0, 1935, (4, 16)),
    _card("h100-pcie", "H100 PCIe", 80, 756.0, 2000, (5, 16)),
    _card("h100-sxm", "H100 80GB HBM3", 80, 989.0, 3350, (5, 16), "h100"),
    _card("h200", "H200", 141, 989.0, 4800, (5, 16)),
)


def _key(name: str) -> str:
    """Letters and digits alone, without the maker: `NVIDIA GeForce RTX 4090` and `rtx-4090` are the same."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce", "", name.lower()))


def find_card(name: str) -> Card:
    """A card by its name, an alias, or what torch calls it; case, spaces and hyphens do not matter.

    Raises:
        UsageError: none of the table; it names those there are.
    """
    key = _key(name)
    for card in CARDS:
        if key in {_key(known) for known in (card.name, *card.aliases)}:
            return card
    for card in CARDS:
        if key == _key(card.device):
            return card
    known = ", ".join(card.name for card in CARDS)
    raise UsageError(f"{name!r} is not one of the cards known by name: {known}; an amount such as 24GB serves any card")


def card_of_device(name: str, memory_bytes: int | None = None) -> Card | None:
    """The card that torch calls `name` (torch.cuda.get_device_name), None where the table has none: then a rate must be
    measured.

    memory_bytes: what torch says it has; tells variants of one name apart.
    """
    known = [card for card in CARDS if _key(name) in {_key(card.device), *(_key(alias) for alias in card.aliases)}]
    if memory_bytes is None or not known:
        return known[0] if known else None
    return min(known, key=lambda card: abs(card.memory_bytes - memory_bytes))


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(text: str) -> int:
    """`24GB`, `22.5 GiB`, `512MiB` -> bytes. GB is 10^9 and GiB is 2^30, as the standard has them.

    A card sold as 24 GB has 24 GiB, of which a program gets some 22 to 23.7: 24 x 10^9 bytes are 22.4 GiB, so a plan
    for `24GB` is on the safe side where one for `24GiB` would not be.

    Raises:
        UsageError: no amount, no unit, or nothing.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    count = int(float(match.group(1)) * _UNITS[match.group(2).upper()]) if match else 0
    if count == 0:
        raise UsageError(f"{text!r} is not an amount of memory; write for example 24GB (10^9 bytes) or 22.5GiB (2^30)")
    return count
