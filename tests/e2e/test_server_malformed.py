"""Bytes that are no message, or a wrong one: a status comes back, the server lives, nothing leaks.

Each request message is cut off at every byte and has every bit of its fields flipped. Where even
protobuf's own parser refuses the bytes the server must say INVALID_ARGUMENT; where they parse, the
server may accept them or refuse them, but only with a status that blames the request.
"""

import socket

import grpc
import pytest
from attention_oracle import Model, options
from attnd_harness import CODE, REQUESTS, TIMEOUT_S, RawCall, eventually, pb
from google.protobuf.message import DecodeError

# What bytes from a hostile client may be answered with.
BLAMES_THE_REQUEST = {
    CODE.OK,
    CODE.INVALID_ARGUMENT,
    CODE.NOT_FOUND,
    CODE.RESOURCE_EXHAUSTED,
    CODE.FAILED_PRECONDITION,
    CODE.ABORTED,
}


@pytest.fixture
def small(shared_server, admin):
    """Tensors of 64 bytes a row, so that every byte of a message can be spoilt in turn. For an administrator."""
    shape = {"layers": 2, "heads_q": 1, "heads_kv": 1, "head_dim": 32, "head_dim_v": 32, "dtype": "fp16"}
    server = shared_server(ranks=2, max_sequences=64, admin_token_file=admin.path, **shape)
    return Model(server.api(metadata=admin.metadata))


def samples(model, name):
    """Good requests: lists of messages, for each RPC. A unary call has one message."""
    one, other = model.open_filled([20, 3])
    layer = model.layer(3)
    tensors = layer.fields()
    fp16 = pb.DTYPE_FP16
    everything = options(
        softmax_scale=0.5,
        softcap=2.0,
        sliding_window=9,
        sinks=[1.0],
        return_lse=True,
        batch_invariant=True,
        return_timing=True,
    )
    rows = [(model.keys(2), model.values(2)) for _ in range(2)]
    return {
        "GetServerInfo": [[pb.GetServerInfoRequest()]],
        "OpenSequences": [[pb.OpenSequencesRequest(count=2, placement=pb.PLACEMENT_EXPLICIT, dp_rank=1)]],
        "ForkSequence": [[pb.ForkSequenceRequest(sequence=one, length=17)]],
        "TruncateSequence": [[pb.TruncateSequenceRequest(sequence=one, length=19)]],
        "CloseSequences": [[pb.CloseSequencesRequest(sequences=[2**64 - 1, 1])]],
        "DescribeSequences": [[pb.DescribeSequencesRequest(sequences=[one, other])]],
        "MoveSequence": [[pb.MoveSequenceRequest(sequence=one, dp_rank=1)]],
        "AppendKv": [list(model.append_messages(other, rows))],
        "ExportKv": [[pb.ExportKvRequest(sequence=one, position=2, tokens=15)]],
        "Decode": [
            [pb.DecodeRequest(sequences=[one, other], query_lengths=[1, 2], options=everything, dtype=fp16, **tensors)],
            [pb.DecodeRequest(layer=1, sequences=[one, other], query_lengths=[1, 2], dtype=fp16, q=tensors["q"])],
        ],
        "DecodeStream": [
            [
                pb.DecodeStreamRequest(
                    begin=pb.StepBegin(sequences=[one, other], query_lengths=[1, 2], options=everything, dtype=fp16),
                    options=options(softcap=1.0),
                    **tensors,
                ),
                pb.DecodeStreamRequest(layer=1, **tensors),
            ]
        ],
        "RestartRank": [[pb.RestartRankRequest(rank=1)]],
    }[name]


def outcome(model, name, messages):
    """Sends messages, of which any may be garbage; undoes what they did; returns the status code."""
    api = model.api
    try:
        if name == "DecodeStream":
            list(api.method(name)(iter(messages), timeout=TIMEOUT_S))
        else:
            response = api.call(name, messages if name == "AppendKv" else messages[0])
            if name == "Decode" and response.step and not response.committed:
                api.abort(response.step)
            if name in ("OpenSequences", "ForkSequence"):
                api.close_sequences(list(getattr(response, "sequences", None) or [response.sequence]))
    except grpc.RpcError as error:
        return error.code()
    return CODE.OK


def parses(name, message):
    try:
        REQUESTS[name].FromString(message)
        return True
    except DecodeError:
        return False


def check_every(model, name, spoil):
    for sample in samples(model, name):
        good = [message.SerializeToString() for message in sample]
        for place, message in enumerate(good):
            for bad in spoil(message):
                sent = [*good[:place], bad, *good[place + 1 :]]
                code = outcome(model, name, sent)
                assert code in BLAMES_THE_REQUEST, f"{code} for message {place}: {bad.hex()}"
                if not parses(name, bad):
                    assert code == CODE.INVALID_ARGUMENT, f"{code} for message {place}: {bad.hex()}"


def truncations(message):
    return (message[:size] for size in range(len(message)))


def bit_flips(message):
    """Every bit of tags, lengths and small fields; of tensor bytes a few, which change nothing."""
    for i in range(len(message)):
        payload = len(message) > 150 and i > 100 and i % 29
        for bit in range(8):
            if payload and bit:
                continue
            if payload and i % 7:
                continue
            yield message[:i] + bytes([message[i] ^ 1 << bit]) + message[i + 1 :]


@pytest.mark.parametrize("name", REQUESTS)
def test_every_truncation_of_every_message_gets_a_status(small, name):
    check_every(small, name, truncations)


@pytest.mark.slow
@pytest.mark.parametrize("name", REQUESTS)
def test_every_bit_flip_of_every_message_gets_a_status(small, name):
    check_every(small, name, bit_flips)


@pytest.mark.parametrize("name", REQUESTS)
def test_random_bytes_get_a_status(small, name):
    for size in (1, 2, 3, 10, 100, 1000):
        for _ in range(10):
            garbage = small.random.bytes(size)
            code = outcome(small, name, [garbage])
            assert code in BLAMES_THE_REQUEST, f"{code}: {garbage.hex()}"


@pytest.mark.parametrize("name", REQUESTS)
def test_unknown_fields_are_skipped(small, name):
    # Field 1,000 with each wire type.
    unknown = b"\xc0\x3e\x05" + b"\xc2\x3e\x03abc" + b"\xc5\x3e\x01\x02\x03\x04" + b"\xc1\x3e" + bytes(8)
    for sample in samples(small, name):
        good = [message.SerializeToString() for message in sample]
        wanted = outcome(small, name, good)
        assert outcome(small, name, [unknown + message + unknown for message in good]) == wanted


# Fields whose declared length is beyond anything that is there.
HUGE = {
    "2 GiB - 1": b"\xff\xff\xff\xff\x07",
    "2 GiB": b"\x80\x80\x80\x80\x08",
    "4 GiB - 1": b"\xff\xff\xff\xff\x0f",
    "2^63 - 1": b"\xff" * 8 + b"\x7f",
    "2^64 - 1": b"\xff" * 9 + b"\x01",
    "more than 64 bits": b"\xff" * 10 + b"\x01",
}


@pytest.mark.parametrize("length", HUGE)
@pytest.mark.parametrize("tag", [b"\x82\x01", b"\x8a\x01", b"\x92\x01", b"\x1a", b"\x22", b"\x2a", b"\xc2\x3e"])
def test_a_field_that_declares_a_huge_length_is_refused(small, tag, length):
    for name in ("Decode", "DecodeStream", "AppendKv"):
        for rest in (b"", b"x" * 50):
            assert outcome(small, name, [tag + HUGE[length] + rest]) == CODE.INVALID_ARGUMENT


STRANGE = {
    "field number 0": b"\x00\x01",
    "wire type 6": b"\x0e\x01",
    "wire type 7": b"\x0f\x01",
    "a group": b"\x0b\x0c",
    "a group without an end": b"\x0b",
    "an end without a group": b"\x0c",
    "a tag of six bytes": b"\xa8" + b"\x80" * 4 + b"\x00\x01",
    "a tag of six bytes in options": b"\x2a\x07\xa8" + b"\x80" * 4 + b"\x00\x01",
    "a length of six bytes": b"\x82\x01\x81" + b"\x80" * 4 + b"\x00x",
    "a tag of eleven bytes": b"\xff" * 10 + b"\x01\x00",
    "a varint of eleven bytes": b"\x10" + b"\x80" * 10 + b"\x01",
    "a varint without an end": b"\x10\x80",
    "q as a varint": b"\x80\x01\x05",
    "q twice": b"\x82\x01\x01a\x82\x01\x01a",
    "sequences as a string of 7 bytes": b"\x1a\x07abcdefg",
}


@pytest.mark.parametrize("what", STRANGE)
def test_strange_encodings_are_refused(small, what):
    assert outcome(small, "Decode", [STRANGE[what]]) == CODE.INVALID_ARGUMENT


def test_fields_may_come_in_any_order_and_unpacked(small):
    (one, other) = small.open_filled([5, 6])
    tensors = small.layer(2, read_only=True).fields()
    body = b"".join(
        [
            pb.DecodeRequest(q=tensors["q"]).SerializeToString(),
            b"\x19" + one.to_bytes(8, "little"),
            pb.DecodeRequest(dtype=pb.DTYPE_FP16).SerializeToString(),
            b"\x20\x01",
            b"\x19" + other.to_bytes(8, "little"),
            b"\x20\x01",
        ]
    )
    plain = small.api.call("Decode", pb.DecodeRequest(sequences=[one, other], dtype=pb.DTYPE_FP16, **tensors))
    assert small.api.call("Decode", body).out == plain.out


# Below gRPC: what is on the wire


RESOURCE_EXHAUSTED = 8


@pytest.mark.parametrize("length", [2**31, 2**32 - 1, 2**31 - 1, 2**30])
@pytest.mark.parametrize("method", ["Decode", "DecodeStream", "AppendKv", "OpenSequences"])
def test_a_2_gib_length_prefix_alone_takes_no_memory(server, method, length):
    before = server.resident_bytes()
    calls = [RawCall(server, "/attnd.v1.Attention/" + method) for _ in range(10)]
    for call in calls:
        call.send(b"\0" + length.to_bytes(4, "big") + b"x" * 1000)
    server.api().info()
    server.check_growth(before, 64 << 20)
    for call in calls:
        call.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Decode", "DecodeStream"])
def test_2_gib_are_refused_before_they_are_buffered(start_server, method):
    server = start_server(max_message_mb=1)
    before = server.resident_bytes()
    call = RawCall(server, "/attnd.v1.Attention/" + method)
    call.send(b"\0" + (2**31).to_bytes(4, "big"))
    sent = 0
    while call.ended is None and sent < 2**31:
        piece = call.send(bytes(1 << 20))
        call.receive(wait=piece < 1 << 20)
        sent += piece
    assert sent < 512 << 20
    assert call.status()[0] in (RESOURCE_EXHAUSTED, "reset", "closed")
    server.check_growth(before, 512 << 20)
    call.close()
    server.api().info()


@pytest.mark.parametrize("method", ["Decode", "AppendKv", "OpenSequences"])
def test_a_message_cut_off_by_the_end_of_the_call_is_an_error(server, method):
    call = RawCall(server, "/attnd.v1.Attention/" + method)
    call.send(b"\0\0\0\0\x10" + b"x" * 5, end=True)
    status, _ = call.status()
    assert status != 0
    call.close()


def test_a_unary_call_without_a_message_is_an_error(server):
    for method in ("Decode", "OpenSequences", "GetServerInfo"):
        call = RawCall(server, "/attnd.v1.Attention/" + method)
        call.send(b"", end=True)
        status, _ = call.status()
        assert status != 0, method
        call.close()


def test_a_compressed_message_is_refused_or_unpacked(server):
    call = RawCall(server, "/attnd.v1.Attention/GetServerInfo", [("grpc-encoding", "gzip")])
    call.send(b"\x01\0\0\0\x04junk", end=True)
    status, _ = call.status()
    assert status != 0
    call.close()


def test_what_is_not_http_2_is_hung_up_on(server, api):
    host, port = server.address.rsplit(":", 1)
    for garbage in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(range(256)) * 10,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    ):
        connection = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        connection.sendall(garbage)
        try:
            while connection.recv(4096):
                pass
        except ConnectionResetError:
            pass
        connection.close()
    api.info()


def test_half_a_connection_costs_nothing(server, api):
    host, port = server.address.rsplit(":", 1)
    idle = [socket.create_connection((host, int(port)), timeout=TIMEOUT_S) for _ in range(50)]
    for connection in idle[::2]:
        connection.sendall(b"PRI * HTT")
    assert api.info().ranks
    for connection in idle:
        connection.close()
    eventually(lambda: api.info().ranks, what="server answers")
