"""Strict headers: every rule has a crafted file that must be refused with its own message."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from elo_engine.checkpoint.header import DTYPE_BITS, parse_header
from elo_engine.errors import EloError, FailedError, RefusedError

GOOD = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def file_bytes(header: Any, data: bytes = b"ab") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def parse(blob: bytes) -> Any:
    return parse_header(blob, shard="model.safetensors", file_size=len(blob))


def one(**fields: Any) -> dict[str, Any]:
    return {"a": {**GOOD, **fields}}


def two(first: list[int], second: list[int]) -> dict[str, Any]:
    def entry(offsets: list[int]) -> dict[str, Any]:
        return {"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets}

    return {"a": entry(first), "b": entry(second)}


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated: 0 bytes"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "truncated: 7 bytes"),
    "length too small": (b"\x01" + bytes(7) + b"{}", "header length 1 is outside"),
    "length too large": ((100_000_001).to_bytes(8, "little") + b"{}", "header length 100000001 is outside"),
    "length above 2**63": (b"\xff" * 8 + b"{}", "is outside 2..100000000"),
    "length behind the end": (b"\x03" + bytes(7) + b"{}", "truncated: header length 3"),
    "starts with a space": (file_bytes(b" " + json.dumps(one()).encode()), "does not start with '{'"),
    "starts with a list": (file_bytes(b"[]", b""), "does not start with '{'"),
    "not UTF-8": (file_bytes(b'{"\xff": 1}'), "not UTF-8 at byte 2"),
    "not JSON": (file_bytes(b"{'a': 1}"), "not valid JSON"),
    "text behind the JSON": (file_bytes(b"{}{}", b""), "not valid JSON"),
    "nested deeply": (file_bytes(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "duplicate tensor": (
        file_bytes(
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
            b'"\\u0061":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}'
        ),
        "duplicate key 'a'",
    ),
    "duplicate field": (
        file_bytes(b'{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}'),
        "duplicate key 'dtype'",
    ),
    "duplicate metadata": (file_bytes(b'{"__metadata__":{"k":"1","k":"2"}}', b""), "duplicate key 'k'"),
    "float in shape": (file_bytes(one(shape=[2.0])), "2.0 where only non-negative integers"),
    "exponent in offsets": (
        file_bytes(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2e0]}}'),
        "2e0 where only non-negative integers",
    ),
    "NaN": (file_bytes(one(shape=[float("nan")])), "NaN where only non-negative integers"),
    "Infinity": (file_bytes(one(shape=[float("inf")])), "Infinity where only non-negative integers"),
    "negative size": (file_bytes(one(shape=[-2])), "-2 where only non-negative integers"),
    "minus zero": (
        file_bytes(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}'),
        "-0 where only non-negative integers",
    ),
    "very long integer": (file_bytes(b'{"a":' + b"9" * 5000 + b"}"), "where only non-negative integers"),
    "metadata is a list": (
        file_bytes({"__metadata__": [], "a": GOOD}),
        "__metadata__ is not an object of strings",
    ),
    "metadata is null": (
        file_bytes({"__metadata__": None, "a": GOOD}),
        "__metadata__ is not an object of strings",
    ),
    "metadata holds a number": (
        file_bytes({"__metadata__": {"k": 1}, "a": GOOD}),
        "not an object of strings",
    ),
    "metadata holds half a character": (
        file_bytes({"__metadata__": {"k": "\ud800"}, "a": GOOD}),
        "unpaired surrogate",
    ),
    "tensor is a list": (file_bytes({"a": []}), "not exactly the keys"),
    "key missing": (file_bytes({"a": {"dtype": "U8", "shape": [2]}}), "not exactly the keys"),
    "key too many": (file_bytes(one(strides=[1])), "not exactly the keys"),
    "unknown dtype": (file_bytes(one(dtype="Q4")), "unknown dtype 'Q4'"),
    "dtype is a number": (file_bytes(one(dtype=3)), "unknown dtype '3'"),
    "shape is a number": (file_bytes(one(shape=2)), "shape is not a list"),
    "bool in shape": (file_bytes(one(shape=[True, 2])), "shape is not a list of non-negative integers"),
    "text in shape": (file_bytes(one(shape=["2"])), "shape is not a list of non-negative integers"),
    "rank 9": (file_bytes(one(shape=[2] + [1] * 8)), "rank 9 is more than 8"),
    "three offsets": (file_bytes(one(data_offsets=[0, 1, 2])), "not a pair of non-negative integers"),
    "bool in offsets": (file_bytes(one(data_offsets=[False, 2])), "not a pair of non-negative integers"),
    "offsets backwards": (file_bytes(one(data_offsets=[2, 0])), "run backwards: 2 to 0"),
    "shape and offsets disagree": (file_bytes(one(shape=[3])), "takes 3 bytes, data_offsets give 2"),
    "product overflows": (file_bytes(one(shape=[2**32, 2**32])), "overflows"),
    "overflow only in bits": (file_bytes(one(shape=[2**60 + 1])), "overflows"),
    "overflow beside a zero": (
        file_bytes(one(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), b""),
        "overflows",
    ),
    "4 bits, not whole bytes": (file_bytes(one(dtype="F4", shape=[3])), "does not end at a byte"),
    "6 bits, not whole bytes": (file_bytes(one(dtype="F6_E3M2", shape=[2])), "does not end at a byte"),
    "6 bits, wrong size": (file_bytes(one(dtype="F6_E2M3", shape=[4])), "takes 3 bytes, data_offsets give 2"),
    "hole at the start": (file_bytes(one(shape=[1], data_offsets=[1, 2])), "a hole before tensor 'a'"),
    "hole inside": (file_bytes(two([0, 1], [2, 3]), b"abc"), "a hole before tensor 'b'"),
    "overlap": (file_bytes(two([0, 2], [1, 3]), b"abc"), "an overlap at tensor 'b'"),
    "same bytes twice": (file_bytes(two([0, 2], [0, 2])), "an overlap at tensor 'b'"),
    "empty tensor inside another": (file_bytes(two([0, 2], [1, 1])), "an overlap at tensor 'b'"),
    "trailing bytes": (file_bytes(one(), b"abc"), "1 trailing bytes"),
    "trailing bytes, no tensor": (file_bytes({}, b"a"), "1 trailing bytes"),
    "truncated": (file_bytes(one(), b"a"), r"truncated: the tensors need \d+ bytes"),
    "empty name": (file_bytes({"": GOOD}), "the name is empty or holds control characters"),
    "newline in a name": (file_bytes({"a\nb": GOOD}), "holds control characters"),
    "NUL in a name": (file_bytes({"a\0": GOOD}), "holds control characters"),
    "C1 control in a name": (file_bytes({"a\x9b": GOOD}), "holds control characters"),
    "half a character in a name": (file_bytes({"a\udc00": GOOD}), "holds control characters"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_header_is_refused(case: str) -> None:
    blob, message = MALFORMED[case]
    with pytest.raises(FailedError, match=message) as caught:
        parse(blob)
    assert "model.safetensors" in str(caught.value)
    assert str(caught.value).isprintable()  # a hostile name must not reach a terminal as it is


def test_well_formed_headers_are_accepted() -> None:
    entries, metadata = parse(file_bytes({"__metadata__": {"format": "pt"}, **two([1, 3], [0, 1])}, b"abc"))
    assert metadata == {"format": "pt"}
    assert list(entries) == ["b", "a"]  # file order
    assert (entries["a"].begin, entries["a"].end, entries["a"].nbytes) == (
        entries["b"].end,
        entries["b"].end + 2,
        2,
    )
    assert parse(file_bytes({}, b"")) == ({}, {})
    assert parse(file_bytes(one(shape=[0, 7], data_offsets=[0, 0]), b""))[0]["a"].nbytes == 0
    assert parse(file_bytes(one(dtype="BF16", shape=[])))[0]["a"].torch_dtype == torch.bfloat16
    packed = parse(file_bytes(one(dtype="F4", shape=[2, 2])))[0]["a"]
    with pytest.raises(RefusedError, match="packed dtype F4"):
        _ = packed.torch_dtype


def test_dtypes_agree_with_safetensors() -> None:
    """Every code we know, safetensors knows with the same size."""
    for dtype, bits in DTYPE_BITS.items():
        blob = file_bytes(one(dtype=dtype, shape=[8], data_offsets=[0, bits]), bytes(bits))
        assert parse(blob)[0]["a"].nbytes == bits
        assert safetensors.deserialize(blob)[0][1]["dtype"] == dtype


# ------------------------------------------------------------ property: a subset of what safetensors accepts

NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=6)


@st.composite
def valid_files(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    header: dict[str, Any] = {}
    offset = 0
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        bits = DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        if bits % 8:
            shape, bits = [*shape, 4], bits * 4
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + bits // 8]}
        offset += bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(NAMES, NAMES, max_size=2))
    return header, draw(st.binary(min_size=offset, max_size=offset))


ODD_VALUES = st.sampled_from(
    [0, 1, -1, 2, 3, 2**32, 2**63, 2**64, 1.0, True, None, "2", [], [1, 1], {}, "U8", "I8", "F4"]
)


@st.composite
def mutated_files(draw: st.DrawFn) -> tuple[bytes, bool]:
    """A file, and whether it was left valid: bytes flipped, put in or taken out, or one header value
    replaced.
    """
    header, data = draw(valid_files())
    how = draw(st.sampled_from(["none", "bytes", "header bytes", "value", "data"]))
    if how == "value" and header:
        target = header[draw(st.sampled_from(sorted(header)))]
        key = draw(st.sampled_from([*sorted(target), "extra"]))
        if isinstance(target.get(key), list) and target[key] and draw(st.booleans()):
            target[key][draw(st.integers(0, len(target[key]) - 1))] = draw(ODD_VALUES)
        else:
            target[key] = draw(ODD_VALUES)
    if how == "data":
        data = data + draw(st.binary(max_size=2)) if draw(st.booleans()) else data[: draw(st.integers(0, 8))]
    raw = bytearray(json.dumps(header, ensure_ascii=draw(st.booleans())).encode())
    if how == "header bytes":
        _scramble(draw, raw)
    blob = bytearray(file_bytes(bytes(raw), data))
    if how == "bytes":
        _scramble(draw, blob)
    return bytes(blob), how == "none"


def _scramble(draw: st.DrawFn, raw: bytearray) -> None:
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        piece = draw(
            st.sampled_from([b"", b"0", b"1", b"-", b".", b"e", b" ", b",", b'"', b"\\u0041", b"\xff", b"\0"])
        )
        raw[at : at + draw(st.integers(0, 2))] = piece


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated_files())
def test_what_we_accept_safetensors_accepts(case: tuple[bytes, bool]) -> None:
    blob, untouched = case
    try:
        entries, _ = parse(blob)
    except EloError as error:
        event("refused")
        assert not untouched, error
        return
    event("accepted")
    theirs = dict(safetensors.deserialize(blob))
    assert theirs.keys() == entries.keys()
    for name, entry in entries.items():
        assert (theirs[name]["dtype"], tuple(theirs[name]["shape"])) == (entry.dtype, entry.shape)
        assert bytes(theirs[name]["data"]) == blob[entry.begin : entry.end]
