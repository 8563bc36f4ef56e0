"""The header of one safetensors file, read more strictly than the format's own library reads it.

Every reader we tried accepts some file that another reads differently (a duplicate key with equal offsets and
another dtype, for one). What is accepted here has one meaning only: `parse_header` accepts a subset of what
safetensors accepts, with the same dtype, shape and bytes (a property test holds it). Format:
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from elo_engine.errors import FailedError, RefusedError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit; checked before anything is allocated
MAX_RANK = 8
_DEEPEST = 32  # of JSON; a header has 3 levels, the configurations of models at most some 6
_MAX_INT = 2**63 - 1  # sizes in bits have to fit torch's signed 64-bit counts

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}

# In bits, because of the packed dtypes that torch has no element type for.
DTYPE_BITS: dict[str, int] = {code: 8 * dtype.itemsize for code, dtype in TORCH_DTYPES.items()}
DTYPE_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk. `begin` and `end` are absolute byte offsets in the shard file, end exclusive."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        """RefusedError for the packed sub-byte dtypes, of which torch has no element type to compute with."""
        if self.dtype not in TORCH_DTYPES:
            raise RefusedError(
                f"{self.shard}: tensor {self.name!r} has the packed dtype {self.dtype}, which cannot be "
                "loaded as it is. Use the model's unquantised checkpoint."
            )
        return TORCH_DTYPES[self.dtype]


def damaged(where: str, why: str) -> NoReturn:
    raise FailedError(
        f"{where}: {why}. The file is damaged or was not written by a safetensors writer: fetch it again."
    )


def strict_json(raw: bytes, where: str, *, integers_only: bool) -> Any:
    """Parse UTF-8 JSON without duplicate keys; `integers_only`: no floats, NaN or negative numbers either."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            name = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            damaged(where, f"duplicate key {name!r}, of which readers keep either one")
        return found

    def no_number(text: str) -> NoReturn:
        damaged(where, f"{text[:40]} where only non-negative integers are allowed")

    def integer(text: str) -> int:
        # "-0" is an integer to Python and a float to others.
        return no_number(text) if text.startswith("-") or len(text) > 20 else int(text)

    number: dict[str, Callable[[str], Any]] = {}
    if integers_only:
        number = {"parse_int": integer, "parse_float": no_number, "parse_constant": no_number}
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, **number)  # type: ignore[arg-type]
    except UnicodeDecodeError as error:
        damaged(where, f"not UTF-8 at byte {error.start}")
    except RecursionError:
        damaged(where, "JSON is nested too deeply")
    except ValueError as error:  # JSONDecodeError, and Python's limit on the digits of an integer
        damaged(where, f"not valid JSON ({error})")
    # Python parses almost as deeply as it can call; what it could just parse it could no longer show or write.
    level, depth = [found], 0
    while level := [part for parts in level if isinstance(parts, (dict, list)) for part in _members(parts)]:
        depth += 1
        if depth > _DEEPEST:
            damaged(where, f"JSON is nested too deeply (more than {_DEEPEST} levels)")
    return found


def _members(parts: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return parts.values() if isinstance(parts, dict) else parts


def header_length(first: bytes, where: str, file_size: int) -> int:
    """The JSON's length n from the file's first 8 bytes, within the format's limit and inside the file."""
    if file_size < 8 or len(first) < 8:
        damaged(where, f"truncated: {file_size} bytes are too few for the 8-byte header length")
    n = int.from_bytes(first[:8], "little")
    if not 2 <= n <= MAX_HEADER_BYTES:
        damaged(where, f"header length {n} is outside 2..{MAX_HEADER_BYTES}")
    if 8 + n > file_size:
        damaged(where, f"truncated: header length {n} does not fit the file of {file_size} bytes")
    return n


def parse_header(
    blob: bytes, *, shard: str, file_size: int, where: str = ""
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors, in file order, and `__metadata__` of one shard.

    blob: the file's bytes 0 .. 8+n (length and JSON); what follows is ignored. file_size: bytes of the whole
    file. shard: its name for the entries; where: its path for messages. Raises FailedError naming file,
    tensor and rule.
    """
    where = where or shard
    n = header_length(blob, where, file_size)
    if len(blob) < 8 + n:
        damaged(where, f"truncated: {len(blob)} of {8 + n} header bytes")
    if blob[8:9] != b"{":
        damaged(where, "the header does not start with '{'")
    header = strict_json(bytes(blob[8 : 8 + n]), f"{where}: header", integers_only=True)
    metadata = _metadata(header.pop("__metadata__", {}), where)
    entries = [_entry(name, fields, shard, 8 + n, where) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end, entry.name))
    _contiguous(entries, where, 8 + n, file_size)
    return {entry.name: entry for entry in entries}, metadata


def _metadata(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        damaged(where, "__metadata__ is not an object of strings")
    if any(_unpaired(text) for pair in found.items() for text in pair):
        damaged(where, "__metadata__ holds an unpaired surrogate, which is not text")
    return found


def _unpaired(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _entry(name: str, fields: Any, shard: str, data_start: int, where: str) -> TensorEntry:
    where = f"{where}: tensor {name[:200]!r}"
    if not name or any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        damaged(where, "the name is empty or holds control characters")
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        damaged(where, "has not exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        damaged(where, f"unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not all(_plain(size) for size in shape):
        damaged(where, "shape is not a list of non-negative integers")
    if len(shape) > MAX_RANK:
        damaged(where, f"rank {len(shape)} is more than {MAX_RANK}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_plain(offset) for offset in offsets):
        damaged(where, "data_offsets is not a pair of non-negative integers")
    begin, end = offsets
    if begin > end:
        damaged(where, f"data_offsets run backwards: {begin} to {end}")
    bits = _bits(shape, dtype, where)
    if bits % 8:
        damaged(where, f"{dtype} of shape {shape} does not end at a byte")
    if end - begin != bits // 8:
        damaged(where, f"{dtype} of shape {shape} takes {bits // 8} bytes, data_offsets give {end - begin}")
    return TensorEntry(name, dtype, tuple(shape), shard, data_start + begin, data_start + end)


def _plain(value: Any) -> bool:
    return type(value) is int and value >= 0  # bool is a subclass of int


def _bits(shape: list[int], dtype: str, where: str) -> int:
    """Size in bits. A zero does not hide its neighbours' overflow: strides are computed from them too."""
    largest = DTYPE_BITS[dtype]
    for size in shape:
        largest *= max(size, 1)
        if largest > _MAX_INT:
            damaged(where, f"the product of shape {shape} overflows")
    return 0 if 0 in shape else largest


def _contiguous(entries: list[TensorEntry], where: str, data_start: int, file_size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.begin != position:
            what = "a hole before" if entry.begin > position else "an overlap at"
            damaged(where, f"{what} tensor {entry.name!r}: it starts at byte {entry.begin}, not {position}")
        position = entry.end
    if position > file_size:
        damaged(where, f"truncated: the tensors need {position} bytes and the file has {file_size}")
    if position < file_size:
        damaged(where, f"{file_size - position} trailing bytes after the last tensor")
