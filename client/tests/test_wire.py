"""The hand-written tensor fields are the very bytes that protobuf writes and reads."""

import numpy as np
import pytest

from attnd import _wire
from attnd._proto import attnd_pb2 as pb


@pytest.mark.parametrize("size", [1, 127, 128, 16383, 16384, 3_000_000])
def test_encoded_request_equals_protobufs_own(size: int) -> None:
    q, k, v = (np.random.default_rng(i).integers(0, 256, size, np.uint8) for i in range(3))
    header = pb.DecodeRequest(step=7, layer=3, sequences=[1, 2**63], query_lengths=[5, 1], dtype=pb.DTYPE_BF16)
    encoded = _wire.encode(header, [(_wire.Q, [q[:1].data, q[1:].data]), (_wire.K, [k.data]), (_wire.V, [v.data])])
    whole = pb.DecodeRequest(q=q.tobytes(), k=k.tobytes(), v=v.tobytes())
    whole.MergeFrom(header)
    assert encoded == whole.SerializeToString(deterministic=True)


def test_append_tensor_fields_are_those_of_the_proto() -> None:
    encoded = _wire.encode(
        pb.AppendKvRequest(layer=1, tokens=2), [(_wire.K, [memoryview(b"kk")]), (_wire.V, [memoryview(b"vvv")])]
    )
    assert pb.AppendKvRequest.FromString(encoded) == pb.AppendKvRequest(layer=1, tokens=2, k=b"kk", v=b"vvv")


@pytest.mark.parametrize("lse", [b"", b"l" * 300])
def test_decoded_response_equals_protobufs_own(lse: bytes) -> None:
    message = pb.DecodeResponse(step=2**63 + 5, layer=300, committed=True, out=b"o" * 70000, lse=lse)
    message.timing.add(rank=3, tokens=2**40, queue_us=1.5)
    response = _wire.decode(message.SerializeToString())
    assert response.out == b"o" * 70000
    assert (response.lse or b"") == lse
    assert (response.header.step, response.header.layer, response.header.committed) == (2**63 + 5, 300, True)
    assert list(response.header.timing) == list(message.timing)


def test_decoded_chunk_equals_protobufs_own() -> None:
    message = pb.ExportKvResponse(total=2**40, dtype=pb.DTYPE_FP16, layer=3, token_offset=2**33, tokens=7)
    message.k, message.v = b"k" * 70000, b"v" * 200
    data = message.SerializeToString()
    chunk = _wire.decode_chunk(data)
    assert (chunk.k, chunk.v) == (message.k, message.v)
    assert chunk.k is not None and chunk.k.obj is data
    message.ClearField("k")
    message.ClearField("v")
    assert chunk.header == message
    assert _wire.decode_chunk(b"") == (pb.ExportKvResponse(), None, None)


def test_fields_of_a_later_version_are_skipped() -> None:
    unknown = bytes([0xA0, 0x06, 0x05]) + bytes([0xAA, 0x06, 0x02]) + b"xy" + bytes([0xAD, 0x06]) + b"1234"
    unknown += bytes([0xA9, 0x06]) + b"12345678"
    response = _wire.decode(unknown + pb.DecodeResponse(layer=2, out=b"abc").SerializeToString() + unknown)
    assert response.out == b"abc" and response.header.layer == 2


def test_a_truncated_response_is_refused() -> None:
    data = pb.DecodeResponse(step=9, out=b"o" * 200).SerializeToString()
    for end in range(1, len(data)):
        if end == 9:  # the whole of the first field: a valid, smaller message
            continue
        with pytest.raises(ValueError):
            _wire.decode(data[:end])


def test_response_tensors_are_views_of_the_received_bytes() -> None:
    data = pb.DecodeResponse(out=b"o" * 64).SerializeToString()
    response = _wire.decode(data)
    assert response.out is not None and response.out.obj is data
