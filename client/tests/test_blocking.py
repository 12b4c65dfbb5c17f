"""The blocking client against the fake server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import ml_dtypes
import numpy as np
import pytest
from fake_server import FakeServer
from oracle import Oracle

import attnd
from attnd import _core
from attnd._proto import attnd_pb2 as pb

Status = grpc.StatusCode


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[attnd.Client]:
    with attnd.Client(server.address, timeout=10) as opened:
        yield opened


def run_step(client: attnd.Client, oracle: Oracle, sequences, lengths=None, options=None, **arguments) -> None:
    """One whole step with random tensors, every layer checked, and the oracle grown."""
    lengths = lengths or [1] * len(sequences)
    layers = []
    with client.step(sequences, lengths, options, **arguments) as step:
        for layer in range(client.geometry.layers):
            q, k, v = oracle.tensors(sum(lengths))
            out = step.layer(q, k, v)
            expected, lse = oracle.expect(sequences, lengths, layer, q, k, v, options)
            oracle.check(out, expected)
            if options and options.return_lse:
                np.testing.assert_allclose(step.last.lse, lse, atol=1e-4)
            layers.append((k, v))
        assert step.committed
    row = 0
    for sequence, length in zip(sequences, lengths):
        some = slice(row, row + length)
        oracle.append(sequence, [k[some] for k, _ in layers], [v[some] for _, v in layers])
        row += length


# -- Steps and reads


def test_the_geometry_tells_what_keys_and_values_are_stored_as() -> None:
    stored = {
        pb.DTYPE_UNSPECIFIED: ("bf16", ml_dtypes.bfloat16),  # a server that does not tell
        pb.DTYPE_BF16: ("bf16", ml_dtypes.bfloat16),
        pb.DTYPE_FP8_E4M3: ("fp8_e4m3", ml_dtypes.float8_e4m3fn),
    }
    for code, (name, kv_dtype) in stored.items():
        with FakeServer(dtype=pb.DTYPE_BF16) as server:
            server.geometry.kv_dtype = code
            with attnd.Client(server.address) as client:
                g = client.geometry
                assert (g.kv_dtype_name, g.kv_dtype) == (name, kv_dtype)
                assert (g.dtype_name, g.dtype) == ("bf16", ml_dtypes.bfloat16)
                assert g.kv_token_bytes == 2 * (16 + 24) * 2


@pytest.mark.parametrize(("field", "code"), [("dtype", pb.DTYPE_FP8_E4M3), ("dtype", 99), ("kv_dtype", 99)])
def test_a_dtype_that_the_client_does_not_know_is_refused_by_its_field(field: str, code: int) -> None:
    with FakeServer() as server:
        setattr(server.geometry, field, code)
        refused = pytest.raises(attnd.InvalidArgument, match=rf"geometry\.{field}: ")
        with attnd.Client(server.address) as client, refused:
            _ = client.geometry


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dtype", [pb.DTYPE_BF16, pb.DTYPE_FP16, pb.DTYPE_FP32])
def test_steps_give_the_attention_of_what_was_appended(dtype: pb.DType, stream: bool) -> None:
    with FakeServer(dtype=dtype, layers=3) as server, attnd.Client(server.address) as client:
        oracle = Oracle(client.geometry)
        sequences = client.open(3)
        for lengths in ([1, 1, 1], [5, 2, 1], [1, 7, 1]):
            run_step(client, oracle, sequences, lengths, stream=stream)
        assert [sequence.length for sequence in sequences] == [7, 10, 3]


def test_options_reach_the_server(client: attnd.Client) -> None:
    sinks = np.linspace(-1, 1, client.geometry.heads_q)
    options = attnd.Options(softmax_scale=0.3, softcap=5, sliding_window=3, sinks=sinks, return_lse=True)
    oracle = Oracle(client.geometry)
    sequences = client.open(2)
    for _ in range(3):
        run_step(client, oracle, sequences, [2, 3], options)


def test_a_layers_own_options_replace_the_steps(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    [sequence] = client.open()
    for stream in (True, False):
        with client.step([sequence], [4], stream=stream) as step:
            q, k, v = oracle.tensors(4)
            options = attnd.Options(sliding_window=2, return_lse=True)
            out = step.layer(q, k, v, options=options)
            oracle.check(out, oracle.expect([sequence], [4], 0, q, k, v, options)[0])
            assert step.last.lse is not None


def test_timing_is_returned_when_asked_for(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    with client.step(client.open(), options=attnd.Options(return_timing=True)) as step:
        step.layer(*oracle.tensors(1))
        [timing] = step.last.timing
    assert timing.attention_us == 12.5 and timing.server == client.addresses[0]


def test_streams_are_reused_from_step_to_step(server: FakeServer, client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    sequences = client.open(2)
    for _ in range(5):
        run_step(client, oracle, sequences)
    assert server.calls.count("DecodeStream") == 1


def test_attend_reads_all_that_is_there_and_appends_nothing(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    sequences = client.open(2)
    run_step(client, oracle, sequences, [9, 4])
    q, _, _ = oracle.tensors(5)
    options = attnd.Options(return_lse=True)
    for layer in (1, 0):
        result = client.attend(sequences, layer, q, [2, 3], options)
        out, lse = oracle.expect(sequences, [2, 3], layer, q, options=options)
        oracle.check(result.out, out)
        np.testing.assert_allclose(result.lse, lse, atol=1e-4)
        assert not result.committed
    assert [info.length for info in client.describe(sequences)] == [9, 4]


def test_attend_to_an_empty_sequence_is_zero_with_minus_infinite_lse(client: attnd.Client) -> None:
    q, _, _ = Oracle(client.geometry).tensors(1)
    result = client.attend(client.open(), 0, q, options=attnd.Options(return_lse=True))
    assert not result.out.any() and np.isneginf(result.lse).all()


def test_read_only_steps_take_layers_in_any_order(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    sequences = client.open(2)
    run_step(client, oracle, sequences, [3, 4])
    with client.step(sequences, read_only=True) as step:
        for layer in (1, 0, 1):
            q, k, v = oracle.tensors(2)
            oracle.check(step.layer(q, layer=layer), oracle.expect(sequences, [1, 1], layer, q)[0])
        with pytest.raises(attnd.InvalidArgument, match="read-only"):
            step.layer(q, k, v)
    run_step(client, oracle, sequences)  # the stream goes on


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_a_step_early_aborts_it(server: FakeServer, client: attnd.Client, stream: bool) -> None:
    oracle = Oracle(client.geometry)
    sequences = client.open(2)
    run_step(client, oracle, sequences, stream=stream)
    with client.step(sequences, stream=stream) as step:
        step.layer(*oracle.tensors(2))
    with pytest.raises(KeyError), client.step(sequences, stream=stream) as step:
        step.layer(*oracle.tensors(2))
        raise KeyError
    assert [info.busy for info in client.describe(sequences)] == [False, False]
    assert [sequence.length for sequence in sequences] == [1, 1]
    assert not server.steps
    run_step(client, oracle, sequences, stream=stream)
    assert server.calls.count("DecodeStream") == (1 if stream else 0)


def test_a_step_that_is_over_takes_no_layer(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    with client.step(client.open()) as step:
        for _ in range(client.geometry.layers):
            step.layer(*oracle.tensors(1))
        with pytest.raises(attnd.FailedPrecondition, match="over"):
            step.layer(*oracle.tensors(1))


def test_outputs_are_views_without_a_copy(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    with client.step(client.open()) as step:
        out = step.layer(*oracle.tensors(1))
    assert not out.flags.owndata and not out.flags.writeable


def test_tensors_that_are_not_packed_are_packed(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    [sequence] = client.open()
    with client.step([sequence], [4]) as step:
        q, k, v = (np.repeat(x, 2, axis=0)[::2] for x in oracle.tensors(4))
        oracle.check(step.layer(q, k, v), oracle.expect([sequence], [4], 0, q, k, v)[0])


# -- Sequences


def test_forks_share_their_prefix_and_then_differ(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    [parent] = client.open()
    run_step(client, oracle, [parent], [10])
    fork = parent.fork(6)
    assert (fork.length, fork.dp_rank) == (6, parent.dp_rank)
    oracle.k[fork.handle] = [k[:6] for k in oracle.k[parent.handle]]
    oracle.v[fork.handle] = [v[:6] for v in oracle.v[parent.handle]]
    run_step(client, oracle, [fork, parent], [2, 1])
    assert parent.fork().length == 11


def test_truncate_rolls_back(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    [sequence] = client.open()
    run_step(client, oracle, [sequence], [10])
    sequence.truncate(4)
    assert sequence.length == 4 and sequence.describe().length == 4
    oracle.k[sequence.handle] = [k[:4] for k in oracle.k[sequence.handle]]
    oracle.v[sequence.handle] = [v[:4] for v in oracle.v[sequence.handle]]
    run_step(client, oracle, [sequence], [1])


def test_sequences_close_once_and_with_their_block(server: FakeServer, client: attnd.Client) -> None:
    [sequence] = client.open()
    with sequence:
        pass
    sequence.close()
    assert sequence.closed and not server.sequences
    assert server.calls.count("CloseSequences") == 1
    with pytest.raises(attnd.NotFound, match=r"sequences\[0\]: closed"):
        client.step([sequence])


def test_placement_and_rank_are_passed_on(server: FakeServer, client: attnd.Client) -> None:
    assert [s.dp_rank for s in client.open(3, placement=attnd.EXPLICIT, dp_rank=1)] == [1, 1, 1]
    [spread] = client.open(placement=attnd.SPREAD)
    assert spread.describe().spread
    with pytest.raises(attnd.InvalidArgument, match="dp_rank: 9"):
        client.open(placement=attnd.EXPLICIT, dp_rank=9)
    with pytest.raises(attnd.InvalidArgument, match="dp_rank"):
        client.open(dp_rank=1)


# -- AppendKv


@pytest.mark.parametrize("form", ["arrays", "lists", "iterators"])
def test_append_kv_uploads_in_chunks_under_the_message_limit(form: str) -> None:
    with FakeServer(message_bytes=16 * 1024, dtype=pb.DTYPE_BF16) as server, attnd.Client(server.address) as client:
        oracle = Oracle(client.geometry)
        g = client.geometry
        [sequence] = client.open()
        k, v = (oracle.random.uniform(-1, 1, (g.layers, 300, *row)).astype(g.dtype) for row in (g.k_row, g.v_row))
        forms = {"arrays": (k, v), "lists": (list(k), list(v)), "iterators": (iter(k), (x for x in v))}
        assert client.append_kv(sequence, *forms[form]) == 300
        oracle.append(sequence, k, v)
        assert sequence.length == 300
        run_step(client, oracle, [sequence], [3])


def test_a_wrong_upload_is_refused_and_changes_nothing(client: attnd.Client) -> None:
    g = client.geometry
    [sequence] = client.open()
    k, v = np.zeros((g.layers, 5, *g.k_row), g.dtype), np.zeros((g.layers, 5, *g.v_row), g.dtype)
    for wrong, words in [
        ((k[:1], v[:1]), "1 layers, expected 2"),
        ((np.concatenate([k, k]), np.concatenate([v, v])), "more than layers"),
        ((k, v[:1]), "differ in their number of layers"),
        ((k[:, :, :, :-1], v), r"k\[0\]: shape .* expected \(5, 2, 16\)"),
        ((k, v[:, :4]), r"v\[0\]: shape"),
        ((k.astype(np.float64), v), "dtype float64, expected float32"),
        (([k[0], k[1][:3]], v), r"k\[1\]: shape"),
        ((k[:, :0], v[:, :0]), "no tokens"),
    ]:
        with pytest.raises(attnd.InvalidArgument, match=words):
            client.append_kv(sequence, *wrong)
        assert sequence.length == 0
    assert client.append_kv(sequence, k, v) == 5


def test_an_iterators_own_error_comes_through(client: attnd.Client) -> None:
    def layers() -> Iterator[np.ndarray]:
        yield np.zeros((5, *client.geometry.k_row), client.dtype)
        raise KeyError("weights")

    [sequence] = client.open()
    with pytest.raises(KeyError, match="weights"):
        client.append_kv(sequence, layers(), np.zeros((2, 5, *client.geometry.v_row), client.dtype))
    assert sequence.length == 0


# -- MoveSequence


def test_move_goes_to_a_rank_or_spreads() -> None:
    with FakeServer(ranks=3) as server, attnd.Client(server.address) as client:
        g = client.geometry
        [sequence] = client.open(placement=attnd.EXPLICIT, dp_rank=0)
        sequence.append(np.zeros((g.layers, 20, *g.k_row), g.dtype), np.zeros((g.layers, 20, *g.v_row), g.dtype))
        assert sequence.move(2) == 20
        assert sequence.dp_rank == sequence.describe().dp_rank == 2
        assert client.move_sequence(sequence, 2) == 0
        with pytest.raises(attnd.InvalidArgument, match="dp_rank: 3"):
            sequence.move(3)
        assert sequence.dp_rank == 2
        for arguments in ({}, {"dp_rank": 1, "spread": True}):
            with pytest.raises(attnd.InvalidArgument, match="a move goes to a rank, or spreads"):
                sequence.move(**arguments)
        assert sequence.move(spread=True) == 20
        assert sequence.describe().spread
        with pytest.raises(attnd.FailedPrecondition):
            sequence.move(1)


def test_describe_tells_where_a_sequence_has_been_moved_to() -> None:
    with FakeServer(ranks=3) as server, attnd.Client(server.address) as client:
        [sequence] = client.open(placement=attnd.EXPLICIT, dp_rank=0)
        server.sequences[sequence.handle].rank = 2  # the server evens out its load
        assert sequence.describe().dp_rank == sequence.dp_rank == 2


@pytest.mark.parametrize("method", ["MoveSequence", "TruncateSequence", "CloseSequences", "AppendKv"])
def test_calls_that_found_a_sequence_busy_are_retried_when_told_to(
    server: FakeServer, client: attnd.Client, method: str
) -> None:
    [sequence] = client.open()
    g = client.geometry
    calls = {
        "MoveSequence": lambda: sequence.move(0),
        "TruncateSequence": lambda: sequence.truncate(0),
        "CloseSequences": sequence.close,
        "AppendKv": lambda: sequence.append(
            np.zeros((g.layers, 2, *g.k_row), g.dtype), np.zeros((g.layers, 2, *g.v_row), g.dtype)
        ),
    }
    server.fail(method, Status.ABORTED, "sequence: on its way")
    with pytest.raises(attnd.Aborted) as caught:
        calls[method]()
    assert caught.value.retry_after is None
    assert server.calls.count(method) == 1
    server.fail(method, Status.ABORTED, "sequence: on its way", pushback_ms=1, times=2)
    calls[method]()
    assert server.calls.count(method) == 4


# -- ExportKv


def filled(client: attnd.Client, tokens: int) -> tuple[attnd.Sequence, np.ndarray, np.ndarray]:
    """A sequence with random keys and values: (sequence, k, v)."""
    g, random = client.geometry, np.random.default_rng(tokens)
    k, v = (random.uniform(-1, 1, (g.layers, tokens, *row)).astype(g.dtype) for row in (g.k_row, g.v_row))
    [sequence] = client.open()
    client.append_kv(sequence, k, v)
    return sequence, k, v


def check_export(exported, k: np.ndarray, v: np.ndarray) -> None:
    """Bitwise equal to k and v [layers, tokens, ...]."""
    for arrays, expected in zip(exported, (k, v)):
        assert [array.shape for array in arrays] == [one.shape for one in expected]
        assert all(array.dtype == expected.dtype for array in arrays)
        assert [array.tobytes() for array in arrays] == [one.tobytes() for one in expected]


@pytest.mark.parametrize("dtype", [pb.DTYPE_BF16, pb.DTYPE_FP16, pb.DTYPE_FP32])
def test_export_kv_gives_back_what_was_appended_and_copies_it_to_another_server(dtype: pb.DType) -> None:
    fakes = FakeServer(dtype=dtype, layers=3), FakeServer(dtype=dtype, layers=3)
    with fakes[0] as server, fakes[1] as other:
        client, elsewhere = attnd.Client(server.address), attnd.Client(other.address)
        sequence, k, v = filled(client, 250)
        check_export(client.export_kv(sequence), k, v)
        check_export(sequence.export(), k, v)
        check_export(sequence.export(99, 102), k[:, 99:201], v[:, 99:201])
        check_export(sequence.export(249), k[:, 249:], v[:, 249:])
        [copy] = elsewhere.open()
        assert elsewhere.append_kv(copy, *client.export_kv(sequence)) == 250
        check_export(copy.export(), k, v)
        client.close()
        elsewhere.close()


def test_export_kv_of_an_empty_range_gives_no_tokens(client: attnd.Client) -> None:
    g = client.geometry
    empty_k, empty_v = np.zeros((g.layers, 0, *g.k_row), g.dtype), np.zeros((g.layers, 0, *g.v_row), g.dtype)
    check_export(client.open()[0].export(), empty_k, empty_v)
    sequence, _, _ = filled(client, 20)
    check_export(sequence.export(20), empty_k, empty_v)


def test_export_kv_of_a_wrong_range_is_refused(server: FakeServer, client: attnd.Client) -> None:
    sequence, _, _ = filled(client, 20)
    for arguments, words in [((-1,), "position: -1"), ((0, 0), "tokens: 0"), ((0, -3), "tokens: -3")]:
        with pytest.raises(attnd.InvalidArgument, match=words):
            sequence.export(*arguments)
    assert "ExportKv" not in server.calls
    for arguments, words in [((21,), "position: 21"), ((0, 21), "tokens: 21"), ((20, 1), "tokens: 1")]:
        with pytest.raises(attnd.InvalidArgument, match=words):
            sequence.export(*arguments)
    stale = attnd.Sequence(client, sequence.handle ^ 1, 0, sequence.server)
    with pytest.raises(attnd.NotFound, match="sequence: unknown"):
        stale.export()
    sequence.close()
    with pytest.raises(attnd.NotFound, match="closed"):
        sequence.export()


def changed(index: int, **fields):
    """Changes fields of one response."""

    def tamper(responses):
        for name, value in fields.items():
            setattr(responses[index], name, value)
        return responses

    return tamper


# Of two layers of three responses each: 100, 100 and 50 tokens.
BROKEN_EXPORTS = {
    "a gap": (lambda r: r[:1] + r[2:], "layer, token_offset: 0, 200 in the response, expected 0, 100"),
    "a repeated chunk": (lambda r: r[:1] + r, "token_offset: 0, 0 in the response, expected 0, 100"),
    "no first chunk": (lambda r: r[1:], "expected 0, 0"),
    "layers out of order": (lambda r: r[3:] + r[:3], "layer, token_offset: 1, 0 in the response, expected 0, 0"),
    "a missing layer": (lambda r: r[:3], "ended at layer 1, token 0, expected 2 layers of 250 tokens"),
    "a missing end": (lambda r: r[:5], "ended at layer 1, token 200"),
    "no response": (lambda r: [], "ended at layer 0"),
    "one too many": (lambda r: [*r, r[-1]], "after the last"),
    "one too many of another layer": (lambda r: [*r, changed(0, layer=2, token_offset=0)(r[:1])[0]], "expected"),
    "k too short": (changed(1, k=b"x" * 100), "k: 100 bytes in the response, expected 12800"),
    "v too long": (changed(4, v=b"x" * 20000), "v: 20000 bytes in the response, expected 19200"),
    "v missing": (changed(0, v=b""), "v: 0 bytes"),
    "no tokens": (changed(1, tokens=0), "tokens: 0 in the response, expected 1 to 150"),
    "too many tokens": (changed(2, tokens=51), "tokens: 51 in the response, expected 1 to 50"),
    "another total": (changed(3, total=251), "total: 251 in the response, expected 250"),
    "an empty range halfway": (lambda r: [r[0], pb.ExportKvResponse()], "total: 0"),
    "another dtype": (changed(5, dtype=pb.DTYPE_FP16), "dtype: 2 in the response, expected fp32"),
}


@pytest.mark.parametrize("name", BROKEN_EXPORTS)
def test_an_export_that_breaks_the_contract_is_refused(server: FakeServer, client: attnd.Client, name: str) -> None:
    sequence, k, v = filled(client, 250)
    plain, (server.tamper, words) = server.tamper, BROKEN_EXPORTS[name]
    with pytest.raises(attnd.AttndError, match=words) as caught:
        sequence.export()
    assert type(caught.value) is attnd.AttndError and caught.value.server == server.address
    server.tamper = plain
    check_export(sequence.export(), k, v)


def test_an_export_of_another_size_than_asked_for_is_refused(server: FakeServer, client: attnd.Client) -> None:
    sequence, _, _ = filled(client, 250)
    whole = server.ExportKv(pb.ExportKvRequest(sequence=sequence.handle))
    server.tamper = lambda _: whole
    with pytest.raises(attnd.AttndError, match="total: 250 in the response, expected 30"):
        sequence.export(0, 30)


def test_bytes_that_are_no_response_are_refused(client: attnd.Client) -> None:
    for data in (b"\x8a", b"\x0a\x01x\x0f", b"\x08"):
        export = _core.Export(client.geometry, None, "server")
        with pytest.raises(attnd.AttndError, match="export: "):
            export.take(data)


def test_an_export_that_breaks_off_is_begun_again(server: FakeServer, client: attnd.Client) -> None:
    sequence, k, v = filled(client, 250)
    server.fail("ExportKv.end", Status.UNAVAILABLE, times=2)
    check_export(sequence.export(), k, v)
    assert server.calls.count("ExportKv") == 3
    server.fail("ExportKv.end", Status.INTERNAL)
    with pytest.raises(attnd.Internal):
        sequence.export()
    assert server.calls.count("ExportKv") == 4


def test_an_export_that_takes_too_long_ends_at_its_deadline(server: FakeServer, client: attnd.Client) -> None:
    sequence, _, _ = filled(client, 250)
    server.fail("ExportKv.end", Status.OK, delay=1.5)
    started = time.monotonic()
    with pytest.raises(attnd.DeadlineExceeded):
        client.export_kv(sequence, timeout=0.3)
    assert time.monotonic() - started < 1.2


# -- Checks before sending


def test_wrong_tensors_are_refused_before_sending_and_the_step_goes_on(
    server: FakeServer, client: attnd.Client
) -> None:
    oracle = Oracle(client.geometry)
    sequences = client.open(2)
    q, k, v = oracle.tensors(2)
    with client.step(sequences) as step:
        for wrong, words in [
            ((q[:1], k, v), r"q: shape \(1, 4, 16\), expected \(2, 4, 16\) \[tokens, heads_q, head_dim\]"),
            ((q, k[:, :1], v), r"k: shape \(2, 1, 16\), expected \(2, 2, 16\) \[tokens, heads_kv, head_dim\]"),
            ((q, k, k), r"v: shape \(2, 2, 16\), expected \(2, 2, 24\) \[tokens, heads_kv, head_dim_v\]"),
            ((q.astype(np.float16), k, v), r"q: dtype float16, expected float32: .*astype"),
            ((q, k, None), "k, v: give both"),
            ((q, None, None), "k, v: missing"),
        ]:
            with pytest.raises(attnd.InvalidArgument, match=words):
                step.layer(*wrong)
        assert "DecodeStream" not in server.calls
        for _ in range(client.geometry.layers):
            step.layer(q, k, v)
        assert step.committed


def test_wrong_batches_are_refused_before_sending(client: attnd.Client) -> None:
    first, second = client.open(2)
    for sequences, lengths, error, words in [
        ([], None, attnd.InvalidArgument, "none given"),
        (
            [first, second, first],
            None,
            attnd.FailedPrecondition,
            r"sequences\[2\]: the same sequence as sequences\[0\]",
        ),
        ([first], [1, 1], attnd.InvalidArgument, "query_lengths: 2 values"),
        ([first, second], [1, 0], attnd.InvalidArgument, r"query_lengths\[1\]: 0, expected 1 to 128"),
        ([first], [129], attnd.InvalidArgument, r"query_lengths\[0\]: 129"),
    ]:
        with pytest.raises(error, match=words):
            client.step(sequences, lengths)
    with pytest.raises(attnd.InvalidArgument, match="sinks: 3 values, expected heads_q = 4"):
        client.attend([first], 0, np.zeros((1, 4, 16), np.float32), options=attnd.Options(sinks=[0, 0, 0]))
    with pytest.raises(attnd.InvalidArgument, match="layer: 2"):
        client.attend([first], 2, np.zeros((1, 4, 16), np.float32))


def test_a_message_over_the_servers_limit_is_refused_before_sending() -> None:
    with FakeServer(message_bytes=16 * 1024) as server, attnd.Client(server.address) as client:
        oracle = Oracle(client.geometry)
        step = client.step(client.open(), [100])
        with pytest.raises(attnd.ResourceExhausted, match="over the limit of 16384"):
            step.layer(*oracle.tensors(100))
        assert "DecodeStream" not in server.calls


def test_sequences_of_another_client_are_refused(client: attnd.Client) -> None:
    with FakeServer() as other, attnd.Client(other.address) as stranger:
        sequences = stranger.open()
        with pytest.raises(attnd.InvalidArgument, match="no server of this client"):
            client.step(sequences)


# -- Errors and retries


def test_every_status_has_its_exception_with_the_servers_words(server: FakeServer, client: attnd.Client) -> None:
    for code, error in [
        (Status.INVALID_ARGUMENT, attnd.InvalidArgument),
        (Status.NOT_FOUND, attnd.NotFound),
        (Status.FAILED_PRECONDITION, attnd.FailedPrecondition),
        (Status.ABORTED, attnd.Aborted),
        (Status.RESOURCE_EXHAUSTED, attnd.ResourceExhausted),
        (Status.UNAVAILABLE, attnd.Unavailable),
        (Status.DEADLINE_EXCEEDED, attnd.DeadlineExceeded),
        (Status.CANCELLED, attnd.Cancelled),
        (Status.UNAUTHENTICATED, attnd.Unauthenticated),
        (Status.PERMISSION_DENIED, attnd.PermissionDenied),
        (Status.UNIMPLEMENTED, attnd.Unimplemented),
        (Status.INTERNAL, attnd.Internal),
        (Status.DATA_LOSS, attnd.AttndError),
    ]:
        server.fail("OpenSequences", code, "sequences[3]: no")
        with pytest.raises(error, match=r"sequences\[3\]: no") as caught:
            client.open()
        assert type(caught.value) is error
        assert caught.value.server == server.address
        assert not server.sequences


def test_a_token_is_sent_and_its_lack_told_apart_from_a_wrong_one() -> None:
    with FakeServer(token="secret") as server:
        with attnd.Client(server.address, token="secret") as client:
            oracle = Oracle(client.geometry)
            run_step(client, oracle, client.open(2))
        with attnd.Client(server.address) as client, pytest.raises(attnd.Unauthenticated):
            client.info()
        with attnd.Client(server.address, token="guess") as client, pytest.raises(attnd.PermissionDenied):
            client.info()


def test_channel_credentials_are_used() -> None:
    channel_credentials = grpc.local_channel_credentials()
    fake = FakeServer(credentials=grpc.local_server_credentials())
    with fake as server, attnd.Client(server.address, credentials=channel_credentials, token="t") as client:
        run_step(client, Oracle(client.geometry), client.open(2))


@pytest.mark.parametrize("method", ["GetServerInfo", "DescribeSequences", "ExportKv"])
def test_calls_that_only_look_are_retried_when_unavailable(
    server: FakeServer, client: attnd.Client, method: str
) -> None:
    sequences = client.open()
    before = server.calls.count(method)
    server.fail(method, Status.UNAVAILABLE, times=2)
    if method == "GetServerInfo":
        client.info()
    elif method == "DescribeSequences":
        client.describe(sequences)
    else:
        client.export_kv(sequences[0])
    assert server.calls.count(method) == before + 3


def test_retries_end(server: FakeServer, client: attnd.Client) -> None:
    server.fail("GetServerInfo", Status.UNAVAILABLE, times=100)
    with pytest.raises(attnd.Unavailable):
        client.info()
    assert server.calls.count("GetServerInfo") == 5


@pytest.mark.parametrize("method", ["OpenSequences", "ForkSequence", "CloseSequences", "AppendKv", "Decode"])
def test_calls_that_may_have_run_are_not_retried(server: FakeServer, client: attnd.Client, method: str) -> None:
    oracle = Oracle(client.geometry)
    [sequence] = client.open()
    before = server.calls.count(method)
    server.fail(method, Status.UNAVAILABLE, afterwards=True)
    g = client.geometry
    with pytest.raises(attnd.Unavailable):
        {
            "OpenSequences": lambda: client.open(),
            "ForkSequence": lambda: sequence.fork(),
            "CloseSequences": lambda: sequence.close(),
            "AppendKv": lambda: sequence.append(
                np.zeros((2, 3, *g.k_row), g.dtype), np.zeros((2, 3, *g.v_row), g.dtype)
            ),
            "Decode": lambda: client.step([sequence], stream=False).layer(*oracle.tensors(1)),
        }[method]()
    assert server.calls.count(method) == before + 1
    if method == "AppendKv":
        assert sequence.length == 3  # asked for, since the answer was lost


@pytest.mark.parametrize("method", ["OpenSequences", "AppendKv", "ForkSequence"])
def test_pushback_is_honoured(server: FakeServer, client: attnd.Client, method: str) -> None:
    [sequence] = client.open()
    server.fail(method, Status.RESOURCE_EXHAUSTED, "pages: none free", pushback_ms=120, times=2)
    g = client.geometry
    started = time.monotonic()
    if method == "OpenSequences":
        client.open()
    elif method == "ForkSequence":
        sequence.fork()
    else:
        sequence.append(np.zeros((2, 3, *g.k_row), g.dtype), np.zeros((2, 3, *g.v_row), g.dtype))
    assert time.monotonic() - started >= 0.24


def test_exhaustion_without_pushback_is_not_retried(server: FakeServer, client: attnd.Client) -> None:
    server.fail("OpenSequences", Status.RESOURCE_EXHAUSTED, "sequences: quota")
    with pytest.raises(attnd.ResourceExhausted, match="quota") as caught:
        client.open()
    assert caught.value.retry_after is None
    assert server.calls.count("OpenSequences") == 1


def test_pushback_beyond_the_timeout_is_told_to_the_caller(server: FakeServer) -> None:
    with attnd.Client(server.address, timeout=0.5) as client:
        server.fail("OpenSequences", Status.RESOURCE_EXHAUSTED, pushback_ms=5000)
        with pytest.raises(attnd.ResourceExhausted) as caught:
            client.open()
        assert caught.value.retry_after == 5.0


@pytest.mark.parametrize("stream", [True, False])
def test_a_refused_first_layer_is_repeated(server: FakeServer, client: attnd.Client, stream: bool) -> None:
    oracle = Oracle(client.geometry)
    sequences = client.open(2)
    method = "DecodeStream" if stream else "Decode"
    server.fail(method, Status.RESOURCE_EXHAUSTED, "queue: full", pushback_ms=30, times=2)
    run_step(client, oracle, sequences, stream=stream)


@pytest.mark.parametrize("stream", [True, False])
def test_a_later_layer_is_never_repeated(server: FakeServer, client: attnd.Client, stream: bool) -> None:
    oracle = Oracle(client.geometry)
    sequences = client.open(2)
    method = "DecodeStream" if stream else "Decode.layer"
    server.fail(method, Status.RESOURCE_EXHAUSTED, "queue: full", pushback_ms=30, layer=1)
    with client.step(sequences, stream=stream) as step:
        step.layer(*oracle.tensors(2))
        with pytest.raises(attnd.ResourceExhausted) as caught:
            step.layer(*oracle.tensors(2))
        assert caught.value.retry_after == 0.03
    assert [sequence.length for sequence in sequences] == [0, 0]
    run_step(client, oracle, sequences, stream=stream)


@pytest.mark.parametrize("stream", [True, False])
def test_a_commit_whose_answer_was_lost_is_found_out(server: FakeServer, client: attnd.Client, stream: bool) -> None:
    oracle = Oracle(client.geometry)
    [sequence] = client.open()
    method = "DecodeStream" if stream else "Decode.layer"
    server.fail(method, Status.UNAVAILABLE, layer=1, afterwards=True)
    with client.step([sequence], [3], stream=stream) as step:
        step.layer(*oracle.tensors(3))
        with pytest.raises(attnd.Unavailable):
            step.layer(*oracle.tensors(3))
    assert sequence.length == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_layer_that_takes_too_long_ends_at_its_deadline(
    server: FakeServer, client: attnd.Client, stream: bool
) -> None:
    oracle = Oracle(client.geometry)
    [sequence] = client.open()
    method = "DecodeStream" if stream else "Decode.layer"
    server.fail(method, Status.OK, delay=1.5)
    started = time.monotonic()
    with client.step([sequence], stream=stream, timeout=0.3) as step, pytest.raises(attnd.DeadlineExceeded):
        step.layer(*oracle.tensors(1))
    assert 0.25 <= time.monotonic() - started < 1.2


def test_the_watchdog_spares_streams_that_answer(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    sequences = client.open(2)
    with client.step(sequences, timeout=0.25) as step:
        step.layer(*oracle.tensors(2))
        time.sleep(0.6)
        step.layer(*oracle.tensors(2))
    run_step(client, oracle, client.open(1), timeout=0.25)


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with FakeServer() as server:
        address = server.address
    with attnd.Client(address, timeout=1) as client, pytest.raises(attnd.Unavailable):
        client.open()


def test_a_server_that_goes_away_ends_the_step(server: FakeServer, client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    [sequence] = client.open()
    with client.step([sequence]) as step:
        step.layer(*oracle.tensors(1))
        server.stop()
        with pytest.raises((attnd.Unavailable, attnd.Cancelled)):
            step.layer(*oracle.tensors(1))


def test_threads_may_share_a_client(client: attnd.Client) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            oracle = Oracle(client.geometry, seed)
            sequences = client.open(2)
            for _ in range(5):
                run_step(client, oracle, sequences)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_two_steps_on_one_sequence_are_aborted_by_the_server(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    sequences = client.open(2)
    with client.step(sequences) as step:
        step.layer(*oracle.tensors(2))
        with pytest.raises(attnd.Aborted, match=r"sequences\[0\]"):
            client.step(sequences[1:]).layer(*oracle.tensors(1))
