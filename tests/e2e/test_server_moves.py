"""MoveSequence: a sequence that was moved or spread is what it was; steps wait for moves, and moves for steps."""

import threading
import time

import attnd
import grpc
import pytest
from attention_oracle import Model, options
from attnd_harness import CODE, TIMEOUT_S, build_kind, eventually, pb
from test_server_export import check_export

EXPLICIT, SPREAD = pb.PLACEMENT_EXPLICIT, pb.PLACEMENT_SPREAD
HOLD_S = 0.4  # seconds for which a rank is held
STALL_S = {"plain": 0.5, "asan": 1.0, "tsan": 2.0}[build_kind()]


def request(handle, dp_rank=0, spread=False):
    return pb.MoveSequenceRequest(sequence=handle, dp_rank=dp_rank, spread=spread)


def move(model, handle, dp_rank=0, spread=False):
    return model.api.call("MoveSequence", request(handle, dp_rank, spread))


def place(model, handle):
    (info,) = model.api.describe([handle])
    return info.dp_rank, info.spread


def expect(error, code, word):
    assert error.code() == code and word in error.details(), f"{error.code()}: {error.details()}"


def pushback(error):
    return dict(error.trailing_metadata()).get("grpc-retry-pushback-ms")


def moves_told(server):
    """The log's lines of moves, of which there is one each, without what differs from run to run."""
    records = [one for one in server.log_records() if one["event"] in ("sequence_moved", "move_failed")]
    for one in records:
        assert one.pop("ms") >= 0 and one.pop("time") and one.pop("sequence")
    return records


@pytest.fixture
def model(shared_server):
    return Model(shared_server(ranks=3, pages=2048, direct_move_bytes=1).api())


class HeldRank:
    """Rank 1 hangs: a move to it has begun meanwhile, and gets no further until it is released."""

    def __init__(self, server):
        self.server = server
        self.api = server.api()
        server.stall_rank(1)

    def move_there(self, handle):
        """A call that moves `handle` to rank 1 and has begun."""
        call = self.api.future("MoveSequence", request(handle, 1))
        eventually(lambda: call.done() or self.api.describe([handle])[0].busy, what="a move that has begun")
        return call

    def release(self):
        self.server.release_rank(1)

    def release_later(self):
        threading.Timer(HOLD_S, self.release).start()


@pytest.fixture
def held_server(shared_server):
    return shared_server(ranks=3, pages=2048, test_faults="true", rank_stall_ms=0, direct_move_bytes=1)


# What moves


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_moved_sequence_has_the_same_bits_and_outputs(shared_server, dtype):
    server = shared_server(ranks=3, dtype=dtype, direct_move_bytes=1)
    model = Model(server.api())
    moved, twin = model.open_filled([600, 600], EXPLICIT, 0)
    model.api.truncate(twin, 0)
    model.stored[twin] = [(k[:0], v[:0]) for k, v in model.stored[twin]]
    rows = model.stored[moved]
    model.api.call("AppendKv", list(model.append_messages(twin, rows)))
    model.grow(twin, rows)
    opts = options(return_lse=True)
    for rank in (1, 2, 0, 2):
        length = model.length(moved)
        response = move(model, moved, rank)
        assert response.tokens == length
        geometry = model.geometry
        row = geometry.heads_kv * (geometry.head_dim + geometry.head_dim_v) * model.dtype.itemsize
        assert response.bytes == length * geometry.layers * row
        assert place(model, moved) == (rank, False)
        model.check_lengths([moved])
        check_export(model, moved)
        layers = model.layers(3)
        answers = [model.step([one], [3], opts=opts, layers=layers) for one in (moved, twin)]
        for one, other in zip(*answers, strict=True):
            assert (one.raw_out, one.response.lse) == (other.raw_out, other.response.lse)
    assert model.api.info().ranks[1].tokens == 0
    ranks = model.api.info().ranks
    uses_gpus = model.api.info().backend == "cuda" and len({rank.device for rank in ranks}) > 1
    is_isolated = ranks[0].process != 0
    assert (server.metric("attnd_moves_direct_total") > 0) == (uses_gpus and not is_isolated)


def test_a_moved_fp8_sequence_has_the_same_bits(fp8):
    model = fp8(ranks=3)
    (handle,) = model.open_filled([600], EXPLICIT, 0)
    layer, opts = model.layer(1, read_only=True), options(batch_invariant=True)
    outs, exports = set(), set()
    for rank in (1, 2, 0):
        outs.add(model.read([handle], opts=opts, layer=layer).raw_out)
        exports.add(b"".join(one.k + one.v for one in model.api.call("ExportKv", pb.ExportKvRequest(sequence=handle))))
        move(model, handle, rank)
    assert len(outs) == len(exports) == 1
    model.step([handle], [5])


def test_a_sequence_that_is_spread_later_answers_as_before(model):
    (handle,) = model.open_filled([1500], EXPLICIT, 1)
    opts = options(batch_invariant=True)
    layer = model.layer(2, read_only=True)
    before = model.read([handle], [2], opts=opts, layer=layer)
    response = move(model, handle, spread=True)
    assert response.tokens == 1500
    assert place(model, handle) == (1, True)
    assert all(rank.tokens > 0 for rank in model.api.info().ranks)
    assert model.read([handle], [2], opts=opts, layer=layer).raw_out == before.raw_out
    check_export(model, handle)
    model.step([handle], [5])
    model.append(handle, 700)
    check_export(model, handle)
    expect(model.api.error("MoveSequence", request(handle, 0)), CODE.FAILED_PRECONDITION, "sequence: spread")


def test_forks_stay_and_go_on(model):
    (parent,) = model.open_filled([100], EXPLICIT, 0)
    child = model.fork(parent, 90)
    assert move(model, child, 2).tokens == 90
    assert (place(model, parent), place(model, child)) == ((0, False), (2, False))
    assert [info.shared_pages for info in model.api.describe([parent, child])] == [0, 0]
    model.step([parent, child], [2, 5])
    check_export(model, parent)
    check_export(model, child)


def test_a_move_to_where_it_is_does_nothing(model):
    (handle,) = model.open_filled([20], EXPLICIT, 1)
    response = move(model, handle, 1)
    assert (response.tokens, response.bytes) == (0, 0)


# What is refused


def test_moves_that_cannot_be_are_refused_and_change_nothing(model):
    (handle,) = model.open_filled([40], EXPLICIT, 0)
    expect(model.api.error("MoveSequence", request(handle, 3)), CODE.INVALID_ARGUMENT, "dp_rank: 3")
    for wrong in (0, handle ^ 1 << 40, 2**64 - 1):
        expect(model.api.error("MoveSequence", request(wrong, 1)), CODE.NOT_FOUND, "sequence: ")
    (spread,) = model.open_filled([20], SPREAD)
    for what in (request(spread, 1), request(spread, spread=True)):
        expect(model.api.error("MoveSequence", what), CODE.FAILED_PRECONDITION, "sequence: spread")
    assert place(model, handle) == (0, False)
    model.step([handle, spread])


def test_a_rank_without_pages_refuses_with_a_retry_hint(start_server):
    server = start_server(ranks=2, pages=8)
    model = Model(server.api())
    (big,) = model.open_filled([100], EXPLICIT, 0)
    (other,) = model.open_filled([30], EXPLICIT, 1)
    error = model.api.error("MoveSequence", request(big, 1))
    expect(error, CODE.RESOURCE_EXHAUSTED, "pages: 7 needed on rank 1")
    assert int(pushback(error)) > 0
    assert [rank.pages_free for rank in model.api.info().ranks] == [1, 6]
    model.close([other])
    assert move(model, big, 1).tokens == 100
    model.step([big])
    assert server.metric("attnd_moves_total") == 1
    assert server.metric("attnd_moved_tokens_total") == 100
    assert server.metric("attnd_moved_bytes_total") == 100 * 2 * 2 * 96 * 4
    told = {"level": "info", "event": "sequence_moved", "why": "asked", "from": 0, "to": 1, "tokens": 100}
    assert moves_told(server) == [{**told, "bytes": 100 * 2 * 2 * 96 * 4, "path": "host"}]


def test_a_lost_rank_takes_nothing_and_gives_nothing(start_server):
    server = start_server(ranks=2, test_faults="true", rank_restart_backoff_ms=0)
    model = Model(server.api())
    (here,) = model.open_filled([20], EXPLICIT, 0)
    (there,) = model.open_filled([20], EXPLICIT, 1)
    server.fail_rank(1)
    eventually(lambda: model.api.info().ranks[1].state == pb.RANK_STATE_LOST, what="a lost rank")
    expect(model.api.error("MoveSequence", request(here, 1)), CODE.UNAVAILABLE, "rank 1 is lost")
    expect(model.api.error("MoveSequence", request(there, 0)), CODE.UNAVAILABLE, "rank 1, which held it, was lost")
    model.step([here])


def test_a_move_to_a_rank_that_hangs_ends_and_the_sequence_stays(start_server):
    server = start_server(ranks=2, test_faults="true", rank_stall_ms=int(STALL_S * 1000), rank_restart_backoff_ms=50)
    model = Model(server.api())
    (handle,) = model.open_filled([700], EXPLICIT, 0)
    server.stall_rank(1)
    begin = time.monotonic()
    moving = model.api.future("MoveSequence", request(handle, 1))
    time.sleep(STALL_S / 5)  # until it is under way
    model.step([handle])  # waits for it
    expect(moving.exception(), CODE.UNAVAILABLE, "rank 1 was lost on the way; the sequence is where it was")
    assert time.monotonic() - begin < STALL_S + 1 + HOLD_S
    assert place(model, handle) == (0, False)
    (told,) = moves_told(server)
    assert (told["level"], told["event"], told["code"]) == ("warn", "move_failed", "UNAVAILABLE")
    assert (told["from"], told["to"], told["tokens"]) == (0, 1, 700)
    assert "rank 1 was lost on the way" in told["message"]
    eventually(lambda: model.api.info().ranks[1].state == pb.RANK_STATE_SERVING, what="a rank that serves again")
    assert move(model, handle, 1).tokens == 701
    server.release_rank(1)
    model.step([handle])
    assert place(model, handle) == (1, False)


# Meanwhile


@pytest.mark.parametrize("via", ["stream", "unary"])
def test_a_step_waits_for_the_move_and_is_not_lost(held_server, via):
    model = Model(held_server.api())
    other, handle = model.open_filled([10, 300], EXPLICIT, 0)
    held = HeldRank(held_server)
    moving = held.move_there(handle)
    assert not moving.done()
    held.release_later()
    begin = time.monotonic()
    model.step([other, handle], [1, 2], via=via)  # checked against the oracle
    assert time.monotonic() - begin > HOLD_S / 2
    assert moving.result()
    assert place(model, handle) == (1, False)
    model.check_lengths([other, handle])


def test_reads_do_not_wait_and_other_changes_are_refused_with_a_hint(held_server):
    model = Model(held_server.api())
    (handle,) = model.open_filled([300], EXPLICIT, 0)
    held = HeldRank(held_server)
    moving = held.move_there(handle)
    errors = [
        model.api.error(name, message)
        for name, message in (
            ("TruncateSequence", pb.TruncateSequenceRequest(sequence=handle, length=1)),
            ("CloseSequences", pb.CloseSequencesRequest(sequences=[handle])),
            ("AppendKv", list(model.append_messages(handle, model.rows(2)))),
        )
    ]
    child = model.fork(handle, 290)
    model.read([handle, child])
    assert not moving.done()
    held.release()
    for error in errors:
        expect(error, CODE.ABORTED, "on its way to another rank")
        assert int(pushback(error)) > 0
    assert moving.result().__class__ is bytes
    model.read([handle, child])
    assert place(model, child) == (0, False)
    model.truncate(handle, 250)
    model.step([handle, child])


@pytest.mark.parametrize("via", ["stream", "unary"])
def test_a_client_that_goes_while_its_step_waits_leaves_nothing(held_server, via):
    model = Model(held_server.api())
    (handle,) = model.open_filled([300], EXPLICIT, 0)
    held = HeldRank(held_server)
    moving = held.move_there(handle)
    layer = model.layer(1)

    def wait_for_calls(count):
        method = "DecodeStream" if via == "stream" else "Decode"
        eventually(lambda: held_server.metric("attnd_calls_in_flight", method=method) == count, what=f"{count} calls")

    if via == "stream":
        with model.api.stream() as stream:
            stream.send(pb.DecodeStreamRequest(begin=model.step_begin([handle]), **layer.fields()))
            wait_for_calls(1)
            time.sleep(0.02)
            stream.cancel()
    else:
        waiting = model.api.future("Decode", model.decode_request([handle], None, layer))
        wait_for_calls(1)
        time.sleep(0.02)
        waiting.cancel()
    wait_for_calls(0)
    assert not moving.done()
    held.release()
    moving.result()
    eventually(lambda: not model.api.describe([handle])[0].busy, what="a sequence that is free")
    assert place(model, handle) == (1, False)
    model.step([handle])


def test_a_cancelled_move_leaves_the_sequence_where_it_was(held_server):
    model = Model(held_server.api())
    (handle,) = model.open_filled([300], EXPLICIT, 0)
    held = HeldRank(held_server)
    moving = held.move_there(handle)
    assert not moving.done()
    moving.cancel()
    time.sleep(HOLD_S)  # until the server knows
    held.release()
    eventually(lambda: not model.api.describe([handle])[0].busy, what="a sequence that is free")
    assert place(model, handle) == (0, False)
    model.step([handle])


def test_a_move_waits_for_a_step_to_end(model):
    (handle,) = model.open_filled([50], EXPLICIT, 0)
    layers = model.layers(1)
    first = model.api.call("Decode", model.decode_request([handle], None, layers[0]))
    moving = model.api.future("MoveSequence", request(handle, 2))
    time.sleep(0.05)
    assert not moving.done() and place(model, handle) == (0, False)
    second = model.api.call("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields()))
    assert second.committed
    model.grow(handle, [(layer.k, layer.v) for layer in layers])
    assert pb.MoveSequenceResponse.FromString(moving.result()).tokens == 51
    check_export(model, handle)
    model.step([handle])


def test_a_move_waits_for_a_step_no_longer_than_a_few_seconds(model):
    (handle,) = model.open_filled([50], EXPLICIT, 0)
    first = model.api.call("Decode", model.decode_request([handle], None, model.layer(1)))
    error = model.api.error("MoveSequence", request(handle, 2), timeout=30)
    expect(error, CODE.ABORTED, "sequence: in a step or upload")
    assert int(pushback(error)) > 0
    model.api.abort(first.step)
    assert move(model, handle, 2).tokens == 50


def test_steps_and_moves_at_once_lose_nothing(model):
    """Every step is answered right, though its sequences are moved all the time."""
    handles = model.open_filled([200, 300, 400], EXPLICIT, 0)
    stop, moves, failures = threading.Event(), [0], []

    def keep_moving():
        while not stop.is_set():
            for i, handle in enumerate(handles):
                try:
                    moves[0] += move(model, handle, (moves[0] + i) % 3).tokens > 0
                except grpc.RpcError as error:
                    if error.code() != CODE.ABORTED:
                        failures.append(error)

    mover = threading.Thread(target=keep_moving)
    mover.start()
    try:
        until = time.monotonic() + 2
        steps = 0
        while time.monotonic() < until or steps < 20:
            model.step(handles, [1, 2, 1], via="stream" if steps % 2 else "unary")
            steps += 1
    finally:
        stop.set()
        mover.join(TIMEOUT_S)
    assert not failures, failures
    assert moves[0] > 3
    model.check_lengths(handles)
    for handle in handles:
        check_export(model, handle)


# By itself


def test_a_skewed_load_is_evened_out(start_server):
    server = start_server(ranks=3, rebalance_factor=1.5, pages=1024)
    model = Model(server.api())
    handles = model.open_filled([900, 300, 700, 1000, 200, 500, 800, 100], EXPLICIT, 0)

    def is_even():
        loads = [rank.tokens for rank in model.api.info().ranks]
        return min(loads) > 0 and (max(loads) <= 1.5 * min(loads) or max(loads) - min(loads) <= 1024)

    eventually(is_even, timeout_s=20, what="an even load")
    settled = server.metric("attnd_moves_total")
    assert settled >= 2
    time.sleep(2.5)  # two ticks and more
    assert server.metric("attnd_moves_total") == settled
    assert server.metric("attnd_moves_failed_total") == 0
    told = moves_told(server)
    assert len(told) == settled
    assert {(one["event"], one["why"]) for one in told} == {("sequence_moved", "uneven")}
    for handle in handles:
        check_export(model, handle)
    model.step(handles)


def test_a_sequence_that_grows_long_is_spread(start_server):
    server = start_server(ranks=2, spread_above_tokens=1000)
    model = Model(server.api())
    (handle,) = model.open_filled([990], EXPLICIT, 1)
    time.sleep(1.5)
    assert place(model, handle) == (1, False)
    model.step([handle], [20])
    eventually(lambda: place(model, handle) == (1, True), what="a spread sequence")
    (told,) = eventually(lambda: moves_told(server), what="the log's line")
    assert (told["event"], told["why"], told["spread"], told["from"]) == ("sequence_moved", "outgrown", True, 1)
    assert told["tokens"] == 1010 and "to" not in told
    check_export(model, handle)
    model.step([handle], [20])


# The client


def test_the_client_moves_sequences(shared_server):
    server = shared_server(ranks=3, pages=2048)
    with attnd.Client(server.address) as client:
        [sequence] = client.open(placement=attnd.EXPLICIT, dp_rank=0)
        g = client.geometry
        model = Model(server.api())
        k, v = ([array for array in arrays] for arrays in zip(*model.rows(700)))
        sequence.append(k, v)
        assert sequence.move(1) == 700
        assert sequence.describe().dp_rank == sequence.dp_rank == 1
        assert sequence.move(spread=True) == 700
        assert sequence.describe().spread
        for got, wanted in zip(sequence.export(), (k, v)):
            assert [a.tobytes() for a in got] == [a.tobytes() for a in wanted]
        assert len(got) == g.layers
        with pytest.raises(attnd.FailedPrecondition, match="spread"):
            sequence.move(2)
        sequence.close()
