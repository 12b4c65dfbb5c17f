"""Tensors on the wire, without the copies that a protobuf object costs.

The messages are ordinary protobuf. But setting a `bytes` field, serialising it and reading it back each copy the
payload, so the tensor fields (numbers 16 to 18 of every request, 16 and 17 of DecodeResponse, 17 and 18 of
ExportKvResponse) are written and read here: a request is joined in one copy from the small fields, as serialised by
protobuf, and the arrays' own memory; a response's tensors are views of the received bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from google.protobuf.message import Message

from attnd._proto import attnd_pb2 as pb

#: Field numbers.
Q, K, V = 16, 17, 18
OUT, LSE = 16, 17

#: Bytes that the small fields and the tensor headers of one request may take, generously, less the handles.
OVERHEAD_BYTES = 1024

#: The memory of a tensor: pieces that follow one another.
Pieces = list[memoryview]

_LENGTH_DELIMITED = 2


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def encode(header: Message, tensors: Iterable[tuple[int, Pieces]]) -> bytes:
    """Serialises `header` followed by its tensor fields (number, memory): one copy of each tensor."""
    parts: list[bytes | memoryview] = [header.SerializeToString()]
    for number, pieces in tensors:
        size = sum(piece.nbytes for piece in pieces)
        parts.append(_varint(number << 3 | _LENGTH_DELIMITED) + _varint(size))
        parts.extend(pieces)
    return b"".join(parts)


class Response(NamedTuple):
    """A DecodeResponse: its small fields, and its tensors as views of the received bytes."""

    header: pb.DecodeResponse
    out: memoryview | None
    lse: memoryview | None


class Chunk(NamedTuple):
    """An ExportKvResponse: its small fields, and its tensors as views of the received bytes."""

    header: pb.ExportKvResponse
    k: memoryview | None
    v: memoryview | None


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _skip(data: bytes, position: int, wire_type: int) -> int:
    """Where a field's value ends that starts at `position`."""
    if wire_type == 0:
        return _read_varint(data, position)[1]
    if wire_type == 1:
        return position + 8
    if wire_type == 5:
        return position + 4
    if wire_type == _LENGTH_DELIMITED:
        size, position = _read_varint(data, position)
        return position + size
    raise ValueError(f"wire type {wire_type} in a response")


def _split(data: bytes, numbers: tuple[int, int]) -> tuple[bytes, memoryview | None, memoryview | None]:
    """The small fields of a message, joined, and its two tensors of these numbers. ValueError if it is truncated."""
    view = memoryview(data)
    small: list[memoryview] = []
    first: memoryview | None = None
    second: memoryview | None = None
    position, end = 0, len(data)
    try:
        while position < end:
            start = position
            tag, position = _read_varint(data, position)
            number, wire_type = tag >> 3, tag & 7
            if number in numbers and wire_type == _LENGTH_DELIMITED:
                size, position = _read_varint(data, position)
                tensor = view[position : position + size]
                if number == numbers[0]:
                    first = tensor
                else:
                    second = tensor
                position += size
            else:
                position = _skip(data, position, wire_type)
                small.append(view[start:position])
    except IndexError:
        position = end + 1
    if position > end:
        raise ValueError("a truncated response")
    return b"".join(small), first, second


def decode(data: bytes) -> Response:
    """Parses a DecodeResponse. ValueError if it is none."""
    small, out, lse = _split(data, (OUT, LSE))
    return Response(pb.DecodeResponse.FromString(small), out, lse)


def decode_chunk(data: bytes) -> Chunk:
    """Parses an ExportKvResponse. ValueError if it is none."""
    small, k, v = _split(data, (K, V))
    return Chunk(pb.ExportKvResponse.FromString(small), k, v)
