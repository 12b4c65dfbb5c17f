"""Clients that vanish, cancel, dawdle or collide, and ranks that die: nothing leaks, everybody else goes on."""

import contextlib
import random
import threading
import time

import grpc
import pytest
from attention_oracle import Model
from attnd_harness import CODE, TIMEOUT_S, Proxy, RawCall, eventually, pb


def step_request(model, handles, layer, number=0):
    request = pb.DecodeStreamRequest(layer=number, **layer.fields())
    if number == 0:
        request.begin.CopyFrom(model.step_begin(handles))
    return request


def expect_untouched(model, handles):
    """The sequences are soon free again, as long as they were, and can be stepped."""
    eventually(lambda: not any(info.busy for info in model.api.describe(handles)), what="sequences released")
    model.check_lengths(handles)
    model.step(handles)


# A client that goes away in the middle of a step


def leave_by_cancel(stream, api, proxy):
    stream.cancel()


def leave_by_closing_the_channel(stream, api, proxy):
    api.close()
    stream.cancel()


def leave_by_losing_the_connection(stream, api, proxy):
    proxy.cut()
    stream.cancel()


def leave_by_half_closing(stream, api, proxy):
    """An end of the stream in the middle of a step aborts it; whether the call fails is the server's choice."""
    stream.outbox.put(stream._END)
    try:
        list(stream.call)
    except grpc.RpcError as error:
        assert error.code() in (CODE.CANCELLED, CODE.FAILED_PRECONDITION, CODE.INVALID_ARGUMENT, CODE.ABORTED)


@pytest.mark.parametrize(
    "leave", [leave_by_cancel, leave_by_closing_the_channel, leave_by_losing_the_connection, leave_by_half_closing]
)
@pytest.mark.parametrize("waits_for_the_answer", [True, False])
def test_a_client_that_leaves_in_the_middle_of_a_step_changes_nothing(shared_server, leave, waits_for_the_answer):
    server = shared_server(ranks=4)
    model = Model(server.api())
    handles = model.open_filled([16, 15, 700, 1]) + model.open_filled([800], pb.PLACEMENT_SPREAD)
    free = [rank.pages_free for rank in model.api.info().ranks]
    for _ in range(15):
        proxy = Proxy(server.address)
        visitor = server.api(proxy.address)
        stream = visitor.stream()
        stream.send(step_request(model, handles, model.layer(5)))
        if waits_for_the_answer:
            stream.receive()
        leave(stream, visitor, proxy)
        proxy.close()
        eventually(lambda: not any(info.busy for info in model.api.describe(handles)), what="sequences released")
        model.check_lengths()
        assert [rank.pages_free for rank in model.api.info().ranks] == free
    expect_untouched(model, handles)


def first_messages_then_wait(messages, sent, until):
    yield from messages
    sent.set()
    until.wait(TIMEOUT_S)


def test_a_client_that_vanishes_during_an_upload_changes_nothing(server, model):
    (handle,) = model.open_filled([20])
    free = [rank.pages_free for rank in model.api.info().ranks]
    rows = model.rows(100)
    messages = list(model.append_messages(handle, rows, chunk=10))
    for sent in range(0, len(messages), 2):
        for how in ("cancel", "cut"):
            proxy = Proxy(server.address)
            visitor = server.api(proxy.address)
            gone = threading.Event()
            busy = threading.Event()

            call = visitor.future("AppendKv", first_messages_then_wait(messages[:sent], busy, gone))
            assert busy.wait(TIMEOUT_S), f"the call did not begin: {call}"
            if how == "cancel":
                call.cancel()
            else:
                proxy.cut()
            gone.set()
            with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
                call.result()
            proxy.close()
            visitor.close()
            # Until the server has noticed, the sequence is the vanished client's.
            eventually(lambda: not model.api.describe([handle])[0].busy, what="sequence released")
    eventually(lambda: [rank.pages_free for rank in model.api.info().ranks] == free, what="pages back")
    expect_untouched(model, [handle])
    model.append(handle, 30)


def test_random_cancels_of_unary_calls_and_streams_leave_every_sequence_whole(start_server):
    # A unary step whose answer was out, and got lost on the way, is nobody's, and idles out.
    model = Model(start_server(step_idle_ms=300).api())
    chance = random.Random(5)
    handles = model.open_filled([5, 30, 64])
    for _ in range(100):
        if chance.random() < 0.5:
            call = model.api.future("Decode", model.decode_request(handles, None, model.layer(3)))
            time.sleep(chance.random() * 0.003)
            call.cancel()
            with contextlib.suppress(grpc.RpcError, grpc.FutureCancelledError):
                model.api.abort(pb.DecodeResponse.FromString(call.result()).step)
        else:
            with model.api.stream() as stream:
                stream.send(step_request(model, handles, model.layer(3)))
                time.sleep(chance.random() * 0.003)
    expect_untouched(model, handles)


def test_cancels_around_the_commit_leave_the_old_or_the_new_length(server, model):
    chance = random.Random(6)
    (handle,) = model.open_filled([15])
    layers = model.layers(1)
    lengths = set()
    for _ in range(60):
        with model.api.stream() as stream:
            for number, layer in enumerate(layers):
                stream.send(step_request(model, [handle], layer, number))
            if chance.random() < 0.5:
                stream.receive()
            time.sleep(chance.random() * 0.002)
        info = eventually(lambda: next((i for i in model.api.describe([handle]) if not i.busy), None), what="released")
        assert info.length in (15, 16)
        lengths.add(info.length)
        if info.length == 16:
            model.api.truncate(handle, 15)
    expect_untouched(model, [handle])


# A client that does not read


@pytest.mark.parametrize("rounds", [3])
def test_a_client_that_stops_reading_is_held_back_and_holds_nobody_else(shared_server, rounds):
    server = shared_server(ranks=2, layers=1, heads_q=32, heads_kv=2, head_dim=32, head_dim_v=128, pages=2048)
    model = Model(server.api())
    handles = model.open_filled([4] * 16)
    other = Model(server.api(), seed=1)
    others = other.open_filled([10, 20])
    layer = model.layer(16 * 4, read_only=True)  # answers of 1 MiB to questions of 256 KiB
    begin = model.step_begin(handles, [4] * 16, read_only=True)
    for _ in range(rounds):
        before = server.resident_bytes()
        streams = [server.api().stream() for _ in range(4)]
        for stream in streams:
            for i in range(100):
                request = pb.DecodeStreamRequest(layer=0, **layer.fields())
                if i == 0:
                    request.begin.CopyFrom(begin)
                stream.send(request)
        for _ in range(20):
            other.step(others, check=False)
            time.sleep(0.01)
        other.read(others)
        # 400 answers of 1 MiB were asked for: far fewer may be waiting in the server.
        server.check_growth(before, 200 << 20)
        for stream in streams:
            stream.cancel()
    model.step(handles)


def test_a_client_that_reads_late_gets_every_answer(shared_server):
    server = shared_server(ranks=2, layers=1, heads_q=32, heads_kv=2, head_dim=32, head_dim_v=128, pages=2048)
    model = Model(server.api())
    handles = model.open_filled([4] * 16)
    layer = model.layer(64, read_only=True)
    wanted = model.read(handles, [4] * 16, layer=layer).raw_out
    with model.api.stream() as stream:
        for i in range(40):
            request = pb.DecodeStreamRequest(layer=0, **layer.fields())
            if i == 0:
                request.begin.CopyFrom(model.step_begin(handles, [4] * 16, read_only=True))
            stream.send(request)
        time.sleep(0.3)
        for _ in range(40):
            assert stream.receive().out == wanted
        stream.end()


# Answers that do not arrive


class Unread:
    """Calls to a server whose answers stay there, since they have no room, until their client leaves."""

    def __init__(self, server, leave):
        self.server = server
        self.leave = leave
        self.calls = []

    def call(self, method, message):
        self.calls.append(RawCall(self.server, "/attnd.v1.Attention/" + method, window=0))
        self.calls[-1].send_message(message)
        return self.calls[-1]

    def layer(self, model, request):
        """A layer call that is done, on rank 0, but for its answer."""
        before = model.api.info().ranks[0].calls
        call = self.call("Decode", request)
        eventually(lambda: model.api.info().ranks[0].calls > before, what="a layer that is done")
        return call


@pytest.fixture(params=[RawCall.reset, RawCall.close], ids=["reset", "closed"])
def unread(shared_server, request):
    unread = Unread(shared_server(ranks=2, layers=4, step_idle_ms=0), request.param)
    yield unread
    for call in unread.calls:
        call.close()


def test_a_unary_step_whose_first_answer_does_not_arrive_ends(unread):
    model = Model(unread.server.api())
    handles = model.open_filled([16, 3], pb.PLACEMENT_EXPLICIT, 0)
    for _ in range(3):
        call = unread.layer(model, model.decode_request(handles, None, model.layer(2)))
        assert all(info.busy for info in model.api.describe(handles))
        unread.leave(call)
        expect_untouched(model, handles)


def begin_unary(model):
    """Two sequences in a unary step that has had its first layer: handles, step, a request for each layer after it."""
    handles = model.open_filled([16, 3], pb.PLACEMENT_EXPLICIT, 0)
    layers = model.layers(2)
    step = model.api.call("Decode", model.decode_request(handles, None, layers[0])).step
    rest = [pb.DecodeRequest(step=step, layer=i, **layers[i].fields()) for i in range(1, len(layers))]
    return handles, step, rest


def test_a_unary_step_whose_later_answer_does_not_arrive_ends(unread):
    model = Model(unread.server.api())
    handles, step, (second, *_) = begin_unary(model)
    unread.leave(unread.layer(model, second))
    expect_untouched(model, handles)
    error = model.api.error("Decode", pb.DecodeRequest(step=step, abort=True))
    assert error.code() == CODE.NOT_FOUND, error
    model.api.open_steps.clear()


def test_a_step_that_went_on_outlives_an_answer_that_does_not_arrive(unread):
    model = Model(unread.server.api())
    handles, step, (second, third, *_) = begin_unary(model)
    call = unread.layer(model, second)
    model.api.call("Decode", third)
    unread.leave(call)
    time.sleep(0.2)
    assert all(info.busy for info in model.api.describe(handles))
    model.api.abort(step)
    expect_untouched(model, handles)


@pytest.mark.parametrize("method", ["OpenSequences", "ForkSequence"])
def test_sequences_whose_handles_do_not_arrive_are_closed(unread, method):
    model = Model(unread.server.api())
    (parent,) = model.open_filled([40], pb.PLACEMENT_EXPLICIT, 0)
    request, made = {
        "OpenSequences": (pb.OpenSequencesRequest(count=5), 5),
        "ForkSequence": (pb.ForkSequenceRequest(sequence=parent, length=20), 1),
    }[method]

    def held():
        return sum(rank.sequences for rank in model.api.info().ranks)

    call = unread.call(method, request)
    eventually(lambda: held() == 1 + made, what="sequences that are open")
    unread.leave(call)
    eventually(lambda: held() == 1, what="sequences that are closed")
    assert model.api.describe([parent])[0].shared_pages == 0
    model.step([parent])


def test_handles_that_arrived_outlive_the_connection_they_came_by(shared_server):
    server = shared_server(ranks=2)
    handles = []
    for _ in range(50):
        with server.api() as api:
            handles += api.call("OpenSequences", pb.OpenSequencesRequest(count=3)).sequences
            api.open_handles.clear()
    time.sleep(0.2)  # whatever the server makes of the connections' ends
    api = server.api()
    assert [info.length for info in api.describe(handles)] == [0] * len(handles)
    api.call("CloseSequences", pb.CloseSequencesRequest(sequences=handles))


# Idle


def test_an_idle_unary_step_is_aborted(start_server):
    model = Model(start_server(step_idle_ms=300).api())
    assert model.api.info().limits.step_idle_ms == 300
    handles = model.open_filled([16, 3])
    layers = model.layers(2)
    first = model.api.call("Decode", model.decode_request(handles, None, layers[0]))
    assert all(info.busy for info in model.api.describe(handles))
    eventually(lambda: not any(info.busy for info in model.api.describe(handles)), what="idle step aborted")
    error = model.api.error("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields()))
    assert error.code() == CODE.NOT_FOUND and "step" in error.details()
    model.api.open_steps.clear()
    expect_untouched(model, handles)


def test_an_idle_sequence_is_closed(start_server):
    model = Model(start_server(sequence_idle_ms=400, ranks=1).api())
    idle, used = model.open_filled([20, 20])

    def idle_is_gone():
        model.step([used], check=False)
        try:
            model.api.describe([idle])
        except grpc.RpcError as error:
            assert error.code() == CODE.NOT_FOUND
            return True
        # Looking is not using, or this would never end.
        time.sleep(0.05)
        return False

    eventually(idle_is_gone, what="idle sequence closed")
    model.check_lengths([used])
    model.api.open_handles.discard(idle)
    del model.stored[idle]


# Deadlines, cancels and queues, against a rank that is busy for long


SLOW_ROWS = 8  # few, so that sequences are long and no call is small enough to be done at once by who brings it


@pytest.fixture
def slow(start_server):
    """One rank of the float64 backend, one call of which takes a while; three calls may wait."""
    server = start_server(
        backend="reference",
        ranks=1,
        max_queue=3,
        layers=1,
        heads_q=8,
        heads_kv=1,
        head_dim=128,
        head_dim_v=128,
        dtype="bf16",
        pages=1000,
    )
    model = Model(server.api())
    model.server = server
    model.long = model.open_filled([model.length_that_takes(0.4, rows=SLOW_ROWS)])[0]
    return model


def occupy(model, count=1):
    """Starts `count` slow steps; returns their futures when the first is running and the others wait."""
    calls = []
    for number in range(count):
        child = model.api.fork(model.long, model.length(model.long))
        calls.append(model.api.future("Decode", model.decode_request([child], [SLOW_ROWS], model.layer(SLOW_ROWS))))
        eventually(lambda: model.api.info().ranks[0].tokens_in_flight == SLOW_ROWS * len(calls), what="slow step begun")
        if number == 0:
            eventually(lambda: model.api.info().ranks[0].queue_depth == 0, what="slow step running")
    return calls


def test_a_deadline_that_passes_while_waiting_drops_the_work(slow):
    model = slow
    handles = model.open_filled([16])
    before = model.api.info().ranks[0].calls
    blocker = occupy(model)
    started = time.monotonic()
    error = model.api.error("Decode", model.decode_request(handles, None, model.layer(1)), timeout=0.05)
    assert error.code() == CODE.DEADLINE_EXCEEDED
    assert time.monotonic() - started < 5
    for call in blocker:
        call.result()
    expect_untouched(model, handles)
    # The blocker and the one step afterwards ran; what missed its deadline did not.
    assert model.api.info().ranks[0].calls - before == 2


def test_a_call_cancelled_while_waiting_is_dropped(slow):
    model = slow
    handles = model.open_filled([16])
    before = model.api.info().ranks[0].calls
    blocker = occupy(model)
    call = model.api.future("Decode", model.decode_request(handles, None, model.layer(1)))
    eventually(lambda: model.api.describe(handles)[0].busy, what="waiting")
    call.cancel()
    for one in blocker:
        one.result()
    expect_untouched(model, handles)
    assert model.api.info().ranks[0].calls - before == 2


def test_a_stream_cancelled_while_waiting_is_dropped(slow):
    model = slow
    handles = model.open_filled([16])
    blocker = occupy(model)
    with model.api.stream() as stream:
        stream.send(step_request(model, handles, model.layer(1)))
        eventually(lambda: model.api.describe(handles)[0].busy, what="waiting")
    for one in blocker:
        one.result()
    expect_untouched(model, handles)


def test_the_server_itself_ends_a_call_at_its_deadline(slow):
    model = slow
    handles = model.open_filled([16])
    request = model.decode_request(handles, None, model.layer(1))
    blocker = occupy(model)
    for timeout in ("1n", "1m"):
        call = RawCall(model.server, "/attnd.v1.Attention/Decode", [("grpc-timeout", timeout)])
        call.send_message(request)
        status, message = call.status()
        assert status in (CODE.DEADLINE_EXCEEDED.value[0], "reset"), (status, message)
        call.close()
    assert not blocker[0].done()
    blocker[0].result()
    expect_untouched(model, handles)


def test_a_full_queue_refuses_with_a_retry_hint_and_nothing_is_lost(slow):
    model = slow
    handles = model.open_filled([16])
    blockers = occupy(model, count=4)
    error = model.api.error("Decode", model.decode_request(handles, None, model.layer(1)))
    assert error.code() == CODE.RESOURCE_EXHAUSTED and "queue" in error.details(), error
    assert int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    for call in blockers:
        call.result()
    expect_untouched(model, handles)


# Ranks that die


def test_a_lost_rank_takes_its_own_sequences_and_no_others(start_server):
    server = start_server(ranks=3, test_faults="true", rank_restart_backoff_ms=0)
    model = Model(server.api())
    homes = [model.open_filled([40, 7], pb.PLACEMENT_EXPLICIT, rank) for rank in range(3)]
    spread = model.open_filled([1600], pb.PLACEMENT_SPREAD)
    model.step([handle for home in homes for handle in home] + spread)
    stream = server.api().stream()
    stream.ask(step_request(model, homes[1], model.layer(2)))
    half_done = model.api.call("Decode", model.decode_request(homes[2], None, model.layer(2)))

    server.fail_rank(1)
    eventually(lambda: model.api.info().ranks[1].state == pb.RANK_STATE_LOST, what="rank 1 lost")

    assert [rank.state for rank in model.api.info().ranks] == [
        pb.RANK_STATE_SERVING,
        pb.RANK_STATE_LOST,
        pb.RANK_STATE_SERVING,
    ]
    stream.send(step_request(model, homes[1], model.layer(2), number=1))
    assert stream.error().code() == CODE.UNAVAILABLE
    for handles in (homes[1], spread, [homes[0][0], homes[1][0]]):
        error = model.api.error("Decode", model.decode_request(handles, None, model.layer(len(handles))))
        assert error.code() == CODE.UNAVAILABLE, error
    error = model.api.error("AppendKv", list(model.append_messages(homes[1][0], model.rows(5))))
    assert error.code() == CODE.UNAVAILABLE
    for handle in (homes[1][0], *spread):
        assert model.api.error("ExportKv", pb.ExportKvRequest(sequence=handle)).code() == CODE.UNAVAILABLE
    exported = model.api.call("ExportKv", pb.ExportKvRequest(sequence=homes[0][0]))
    assert [one.k for one in exported] == [k.tobytes() for k, _ in model.stored[homes[0][0]]]
    error = model.api.error(
        "OpenSequences", pb.OpenSequencesRequest(count=1, placement=pb.PLACEMENT_EXPLICIT, dp_rank=1)
    )
    assert error.code() == CODE.UNAVAILABLE
    # The others go on, the step that was open there too, and new sequences go to them.
    done = model.api.call("Decode", pb.DecodeRequest(step=half_done.step, layer=1, **model.layer(2).fields()))
    assert done.committed
    model.step(homes[0])
    fresh = model.open_filled([50] * 6)
    assert {info.dp_rank for info in model.api.describe(fresh)} <= {0, 2}
    fresh += model.open_filled([50] * 6, pb.PLACEMENT_ROUND_ROBIN)
    assert {info.dp_rank for info in model.api.describe(fresh)} == {0, 2}
    model.step(fresh)
    model.close(homes[1])
    assert [record["rank"] for record in server.log_records() if record["event"] == "rank_lost"] == [1]


def test_a_rank_that_dies_while_working_ends_its_calls(start_server):
    server = start_server(ranks=2, test_faults="true", rank_restart_backoff_ms=0)
    model = Model(server.api())
    doomed = model.open_filled([100], pb.PLACEMENT_EXPLICIT, 0)
    safe = model.open_filled([100], pb.PLACEMENT_EXPLICIT, 1)
    stop = threading.Event()
    codes = []

    def step_for_ever():
        api = server.api()
        request = model.decode_request(doomed, None, model.layer(1, read_only=True))
        while not stop.is_set():
            try:
                api.call("Decode", request)
            except grpc.RpcError as error:
                codes.append(error.code())
                return

    threads = [threading.Thread(target=step_for_ever) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    server.fail_rank(0)
    for thread in threads:
        thread.join(TIMEOUT_S)
    stop.set()
    assert codes == [CODE.UNAVAILABLE] * 4
    model.step(safe)


# Several clients at once


def test_two_clients_interleave_steps_over_the_same_ranks(shared_server):
    server = shared_server(ranks=4)
    failures = []

    def work(seed):
        try:
            model = Model(server.api(), seed=seed)
            handles = model.open_filled([3, 17, 40, 64, 100]) + model.open_filled([600], pb.PLACEMENT_SPREAD)
            for step in range(15):
                via = ("stream", "unary")[(step + seed) % 2]
                model.step(handles, [1 + (step + i) % 3 for i in range(6)], via=via)
            model.check_lengths()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("cq_threads", [1, 4])
def test_many_clients_open_step_fork_and_close_at_random(shared_server, cq_threads):
    server = shared_server(ranks=4, cq_threads=cq_threads)
    failures = []

    def work(seed):
        try:
            chance = random.Random(seed)
            model = Model(server.api(), seed=seed)
            handles = []
            for _ in range(40):
                what = chance.random()
                if what < 0.3 or not handles:
                    handles += model.open_filled([chance.randrange(0, 90)], chance.choice([0, 1, 3]))
                elif what < 0.4:
                    parent = chance.choice(handles)
                    handles.append(model.fork(parent, chance.randint(0, model.length(parent))))
                elif what < 0.5:
                    victim = handles.pop(chance.randrange(len(handles)))
                    model.close([victim])
                elif what < 0.6:
                    one = chance.choice(handles)
                    model.truncate(one, chance.randint(0, model.length(one)))
                else:
                    some = chance.sample(handles, chance.randint(1, len(handles)))
                    model.step(
                        some, [chance.choice([1, 1, 2, 9]) for _ in some], via=chance.choice(["unary", "stream"])
                    )
            model.check_lengths()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_two_clients_racing_for_one_sequence_never_both_win(server, model):
    (handle,) = model.open_filled([10])
    committed = []
    failures = []

    def race(seed):
        rival = Model(server.api(), seed=seed)
        layers = rival.layers(1)
        for _ in range(30):
            with rival.api.stream() as stream:
                try:
                    for number, layer in enumerate(layers):
                        stream.send(step_request(rival, [handle], layer, number))
                    stream.receive()
                    if stream.receive().committed:
                        committed.append(seed)
                    stream.end()
                except grpc.RpcError as error:
                    if error.code() != CODE.ABORTED:
                        failures.append(error)

    threads = [threading.Thread(target=race, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    info = eventually(lambda: next((i for i in model.api.describe([handle]) if not i.busy), None), what="released")
    assert info.length == 10 + len(committed)
    assert committed
    model.api.truncate(handle, 10)
    model.read([handle])


def test_a_second_process_of_a_client_may_go_on_with_a_unary_step(server, model):
    (handle,) = model.open_filled([4])
    layers = model.layers(1)
    first = model.api.call("Decode", model.decode_request([handle], None, layers[0]))
    second = server.api().call("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields()))
    assert second.committed
    model.api.open_steps.discard(first.step)
    model.grow(handle, [(layer.k, layer.v) for layer in layers])
    model.read([handle])
