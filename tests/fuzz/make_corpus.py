#!/usr/bin/env python3
"""Writes tests/fuzz/corpus/: small valid inputs of every kind for the fuzz targets to start from.

Run it after a change of the proto or of a target's input format, and commit what it writes:
    PYTHONPATH=client .venv/bin/python tests/fuzz/make_corpus.py
"""

import pathlib
import shutil
import struct

from attnd._proto import attnd_pb2 as pb

FOLDER = pathlib.Path(__file__).resolve().parent
CORPUS = FOLDER / "corpus"

# The order of `types` in fuzz_wire.c.
DECODE, STREAM, APPEND, INFO, OPEN, FORK, TRUNCATE, CLOSE, DESCRIBE, HEALTH, REFLECTION = range(11)

HANDLES = [0x1122334455667788, 0x99AABBCCDDEEFF00]
TENSOR = bytes(range(64))


def options(**more):
    return pb.AttentionOptions(softmax_scale=0.125, return_lse=True, **more)


def messages():
    """(name, type, message) of requests as clients send them."""
    yield "decode_first", DECODE, pb.DecodeRequest(sequences=HANDLES, q=TENSOR, k=TENSOR[:32], v=TENSOR[:32])
    yield "decode_next", DECODE, pb.DecodeRequest(step=77, layer=1, q=TENSOR, k=TENSOR[:32], v=TENSOR[:32])
    yield "decode_read", DECODE, pb.DecodeRequest(sequences=HANDLES, q=TENSOR, dtype=pb.DTYPE_BF16)
    yield (
        "decode_options",
        DECODE,
        pb.DecodeRequest(
            sequences=HANDLES,
            query_lengths=[1, 300],
            options=options(softcap=30, sliding_window=9, sinks=[0.5, -1.5], batch_invariant=True, return_timing=True),
            q=TENSOR,
        ),
    )
    yield "decode_abort", DECODE, pb.DecodeRequest(step=77, abort=True)
    yield "decode_empty_tensor", DECODE, pb.DecodeRequest(sequences=HANDLES[:1], q=b"")
    begin = pb.StepBegin(sequences=HANDLES, query_lengths=[2, 1], options=options(), dtype=pb.DTYPE_FP32)
    yield "stream_begin", STREAM, pb.DecodeStreamRequest(begin=begin)
    yield "stream_begin_layer", STREAM, pb.DecodeStreamRequest(begin=begin, q=TENSOR, k=TENSOR, v=TENSOR)
    yield "stream_layer", STREAM, pb.DecodeStreamRequest(layer=3, options=options(), q=TENSOR, k=TENSOR, v=TENSOR)
    reads = pb.StepBegin(sequences=HANDLES, read_only=True)
    yield "stream_read", STREAM, pb.DecodeStreamRequest(begin=reads, layer=1, q=TENSOR)
    yield "stream_abort", STREAM, pb.DecodeStreamRequest(abort=True)
    upload = pb.AppendKvBegin(sequence=HANDLES[0], tokens=4, dtype=pb.DTYPE_FP16)
    yield "append_begin", APPEND, pb.AppendKvRequest(begin=upload)
    yield "append_begin_chunk", APPEND, pb.AppendKvRequest(begin=upload, tokens=2, k=TENSOR, v=TENSOR)
    yield "append_chunk", APPEND, pb.AppendKvRequest(layer=1, token_offset=2, tokens=2, k=TENSOR, v=TENSOR)
    yield "info", INFO, pb.GetServerInfoRequest()
    yield "open", OPEN, pb.OpenSequencesRequest(count=3, placement=pb.PLACEMENT_EXPLICIT, dp_rank=1)
    yield "open_spread", OPEN, pb.OpenSequencesRequest(count=1, placement=pb.PLACEMENT_SPREAD)
    yield "fork", FORK, pb.ForkSequenceRequest(sequence=HANDLES[0], length=17)
    yield "truncate", TRUNCATE, pb.TruncateSequenceRequest(sequence=HANDLES[0], length=3)
    yield "close", CLOSE, pb.CloseSequencesRequest(sequences=HANDLES)
    yield "describe", DESCRIBE, pb.DescribeSequencesRequest(sequences=HANDLES)


def raw_messages():
    """(name, type, bytes) of what no protobuf library writes, or of other services."""
    tensor = b"\x82\x01\x04qqqq"
    yield "tensor_before_fields", DECODE, tensor + b"\x10\x02"
    yield "tensor_twice", DECODE, tensor + tensor
    yield "unpacked_handles", DECODE, (b"\x19" + struct.pack("<Q", 5)) * 2
    yield "unknown_fields", DECODE, b"\xa0\x3f\x01" + b"\xaa\x3f\x03abc" + b"\xa5\x3f1234" + tensor
    yield "length_of_2_gib", DECODE, b"\x82\x01\x80\x80\x80\x80\x08"
    yield "varint_of_11_bytes", OPEN, b"\x08" + b"\xff" * 10 + b"\x01"
    yield "tag_of_6_bytes", DECODE, b"\xa8\x80\x80\x80\x80\x00\x01"
    yield "length_of_8_bytes", DECODE, b"\x1a\x80\x80\x80\x80\x80\x80\x80\x00"
    yield "group", OPEN, b"\x0b\x0c"
    yield "options_twice", DECODE, b"\x2a\x05\x0d\x00\x00\x80\x3f\x2a\x02\x18\x07"
    yield "health", HEALTH, b"\x0a\x12attnd.v1.Attention"
    yield "reflection_list", REFLECTION, b"\x3a\x00"
    yield "reflection_file", REFLECTION, b"\x1a\x0battnd.proto"
    yield "reflection_symbol", REFLECTION, b"\x22\x12attnd.v1.Attention"


def wire_input(kind, message, cuts=()):
    return bytes([kind, len(cuts)]) + b"".join(struct.pack("<H", cut) for cut in cuts) + message


# The methods and flags of fuzz_calls.c, in its order. Small handles stand for sequences that are open.
(M_DECODE, M_STREAM, M_APPEND, M_OPEN, M_FORK, M_TRUNCATE, M_CLOSE, M_DESCRIBE, M_INFO, M_HEALTH, M_MOVE) = range(11)
KNOWN, FIT, NEW_STREAM, CANCEL, SHORT_DEADLINE = 1, 2, 4, 8, 16


def record(method, message, flags=KNOWN | FIT):
    packed = message if isinstance(message, bytes) else message.SerializeToString()
    return struct.pack("<BBH", method, flags, len(packed)) + packed


def calls():
    """(name, records): sessions as clients have them."""
    opened = record(M_OPEN, pb.OpenSequencesRequest(count=3))
    spread = record(M_OPEN, pb.OpenSequencesRequest(count=1, placement=pb.PLACEMENT_SPREAD))

    def layer(number, **more):
        return pb.DecodeRequest(step=number, layer=number, q=b"q", k=b"k", v=b"v", **more)

    first = record(M_DECODE, layer(0, sequences=[0, 1]))
    yield "step", [opened, first, record(M_DECODE, layer(1)), record(M_INFO, b"")]
    yield (
        "step_of_many_rows",
        [opened, record(M_DECODE, layer(0, sequences=[0, 1], query_lengths=[17, 3])), record(M_DECODE, layer(1))],
    )
    yield "step_aborted", [opened, first, record(M_DECODE, pb.DecodeRequest(step=1, abort=True))]
    yield "step_left_open", [opened, first]
    yield (
        "read",
        [opened, first, record(M_DECODE, layer(1)), record(M_DECODE, pb.DecodeRequest(sequences=[0, 1, 2], q=b"q"))],
    )
    yield "same_twice", [opened, record(M_DECODE, layer(0, sequences=[1, 1]))]
    yield "wrong_size", [opened, record(M_DECODE, layer(0, sequences=[0]), KNOWN)]
    yield "foreign_handle", [record(M_DECODE, layer(0, sequences=[5]), FIT)]
    yield (
        "options",
        [
            opened,
            record(M_DECODE, layer(0, sequences=[0], options=options(softcap=3, sliding_window=2, return_timing=True))),
        ],
    )
    begin = pb.StepBegin(sequences=[0, 1, 2], query_lengths=[1, 2, 3])

    def stream(number, **more):
        return record(M_STREAM, pb.DecodeStreamRequest(layer=number, q=b"q", k=b"k", v=b"v", **more))

    yield "stream", [opened, stream(0, begin=begin), stream(1), stream(0, begin=begin), stream(1)]
    yield "stream_cancelled", [opened, stream(0, begin=begin), record(M_INFO, b"", CANCEL)]
    yield "stream_aborted", [opened, stream(0, begin=begin), record(M_STREAM, pb.DecodeStreamRequest(abort=True))]
    yield "stream_wrong_layer", [opened, stream(0, begin=begin), stream(0)]
    yield (
        "stream_out_of_pages",
        [opened, stream(0, begin=pb.StepBegin(sequences=[0, 1, 2], query_lengths=[100, 100, 100]))],
    )
    begun = pb.AppendKvBegin(sequence=0, tokens=20)
    upload = [
        record(M_APPEND, pb.AppendKvRequest(begin=begun, tokens=20, k=b"k", v=b"v")),
        record(M_APPEND, pb.AppendKvRequest(layer=1, tokens=20, k=b"k", v=b"v")),
    ]
    ended = record(M_STREAM, pb.DecodeStreamRequest(abort=True))
    yield "upload", [opened, *upload]
    yield "upload_cut", [opened, upload[0]]
    fork = record(M_FORK, pb.ForkSequenceRequest(sequence=0, length=17))
    truncate = record(M_TRUNCATE, pb.TruncateSequenceRequest(sequence=0, length=5))
    yield (
        "fork",
        [opened, *upload, ended, fork, record(M_DECODE, layer(0, sequences=[0, 3])), record(M_DECODE, layer(1))],
    )
    yield (
        "truncate",
        [opened, *upload, ended, truncate, record(M_DESCRIBE, pb.DescribeSequencesRequest(sequences=[0, 1, 2]))],
    )
    move, widen = (record(M_MOVE, pb.MoveSequenceRequest(sequence=0, dp_rank=1, spread=wide)) for wide in (False, True))
    yield (
        "move",
        [opened, *upload, ended, move, record(M_DECODE, layer(0, sequences=[0])), record(M_DECODE, layer(1)), widen],
    )
    yield "move_in_a_step", [opened, record(M_DECODE, layer(0, sequences=[0])), move, record(M_DECODE, layer(1))]
    yield "spread", [spread, *upload, ended, record(M_DECODE, layer(0, sequences=[0])), record(M_DECODE, layer(1))]
    yield (
        "close",
        [
            opened,
            record(M_CLOSE, pb.CloseSequencesRequest(sequences=[0, 2])),
            record(M_DECODE, layer(0, sequences=[0])),
        ],
    )
    yield (
        "explicit_rank",
        [record(M_OPEN, pb.OpenSequencesRequest(count=2, placement=pb.PLACEMENT_EXPLICIT, dp_rank=1))],
    )
    yield "others", [record(M_INFO, b"", SHORT_DEADLINE), record(M_HEALTH, b"\x0a\x12attnd.v1.Attention")]


CONFIGS = {
    "empty": "",
    "everything": """\
server: {listen: ["0.0.0.0:1", "unix:/s", "[::1]:2"], cq_threads: 3, grace_ms: 4, ready_file: /r}
geometry: {layers: 2, heads_q: 12, heads_kv: 3, head_dim: 40, head_dim_v: 48, dtype: fp32, page_size: 128}
ranks: {count: 5, backend: reference, isa: avx2, threads: 6, pin_cpus: true, pages: 7,
        rebalance_factor: 1.5, spread_above_tokens: 16}
limits: {max_batch: 8, max_sequences: 9, max_sequence_tokens: 10, max_queue: 11, max_message_mb: 12,
         step_idle_ms: 13, sequence_idle_ms: 14}
auth: {tenants: [{name: a, token: 0123456789abcdef, max_pages: 1, max_sequences: 2}]}
metrics: {port: 15, address: "::1"}
log: {level: error}
""",
    "tenants": """\
auth:
  tenants:
    - name: a
      token: 0123456789abcdef
    - {name: b, token: 'fedcba9876543210'}
""",
    "unknown_key": "geometry:\n  hed_dim: 64\n",
    "twice": "ranks: {count: 1, count: 2}\n",
    "alias": "ranks: {count: &a 1, pages: *a}\n",
    "wrong_kind": "server: {listen: {a: [b]}}\n",
    "block_scalar": "log:\n  level: |\n    info\n",
    "tag": "ranks: {count: !!int 2}\n",
    "documents": "ranks: {count: 2}\n---\nranks: {count: 3}\n",
    "broken": "ranks: {count: 'x\n",
}

TEXTS = {
    "bearer_a": b"Bearer 0123456789abcdef",
    "bearer_b": b"bearer   fedcba9876543210",
    "wrong_token": b"Bearer 0123456789abcdeg",
    "basic": b"Basic cmVkOnJlZA==",
    "quotes": b'a"b\\c\n\r\t\x00\x1f\x7f',
    "utf8": "é€😀".encode(),
    "not_utf8": b"\xc3\xed\xa0\x80\xf4\x90\x80\x80\xc0\xaf\xff",
    "long": b"x" * 2100,
}


def write(target, name, content):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def main():
    shutil.rmtree(CORPUS, ignore_errors=True)
    for name, kind, message in messages():
        packed = message.SerializeToString()
        write("wire", name, wire_input(kind, packed))
        if len(packed) > 2:
            write("wire", name + "_cut", wire_input(kind, packed, [1, len(packed) // 2, len(packed) - 1]))
    for name, kind, raw in raw_messages():
        write("wire", name, wire_input(kind, raw, [2]))
    for name, records in calls():
        write("calls", name, b"".join(records))
    for name, text in CONFIGS.items():
        write("config", name, text.encode())
    example = FOLDER.parent.parent / "service" / "config" / "attnd.example.yaml"
    lines = example.read_text().splitlines()
    without_comments = [line.split(" #")[0] for line in lines if not line.lstrip().startswith("#")]
    write("config", "example", "\n".join(without_comments).encode())
    for name, text in TEXTS.items():
        write("text", name, text)


if __name__ == "__main__":
    main()
