"""Ranks that fail, hang and come back, under load: their own calls end at once, all others go on."""

import os
import signal
import threading
import time

import grpc
import pytest
from attention_oracle import Model
from attnd_harness import CODE, TIMEOUT_S, build_kind, eventually, pb
from grpc_health.v1 import health_pb2, health_pb2_grpc

STALL_S = {"plain": 0.5, "asan": 1.0, "tsan": 2.0}[build_kind()]


def faulty(start_server, **flags):
    return start_server(test_faults="true", **{"rank_stall_ms": int(STALL_S * 1000), **flags})


def wait_for_state(api, rank, state):
    eventually(lambda: api.info().ranks[rank].state == state, what=f"rank {rank} in state {state}")


class Tenant(threading.Thread):
    """Lives on one rank: steps its sequences for ever, checks every answer, and opens new ones when they are lost."""

    def __init__(self, server, rank, seed, words=()):
        """words: one of them may be in an error's details in place of the rank, where the device itself says no."""
        super().__init__(daemon=True)
        self.words = (f"rank {rank}", *words)
        self.model = Model(server.api(), seed=seed)
        self.rank = rank
        self.handles = []
        self.steps = 0  # that succeeded
        self.losses = []  # (begin, end) of calls that ended with UNAVAILABLE
        self.failure = None
        self.leaving = False

    def run(self):
        try:
            while not self.leaving:
                self.use_the_rank()
        except BaseException as failure:
            self.failure = failure

    def use_the_rank(self):
        begin = time.monotonic()
        try:
            if not self.handles:
                self.handles = self.model.open(2, pb.PLACEMENT_EXPLICIT, self.rank)
            elif self.model.length(self.handles[0]) == 0:
                for handle in self.handles:
                    self.model.append(handle, 20)
            else:
                self.model.step(self.handles, via=("stream", "unary")[self.steps % 2])
                self.steps += 1
        except grpc.RpcError as error:
            assert error.code() == CODE.UNAVAILABLE, error
            assert any(word in error.details() for word in self.words), error
            self.losses.append((begin, time.monotonic()))
            if self.handles:
                self.model.api.release_all()
            self.handles = []
            time.sleep(0.01)

    def check(self):
        if self.failure:
            raise self.failure


def wait_for_restart(api, rank, before):
    """Until the rank has been lost and restarted once more than `before` says."""
    eventually(lambda: api.info().ranks[rank].losses > before.losses, TIMEOUT_S, "the loss")
    eventually(lambda: api.info().ranks[rank].restarts > before.restarts, TIMEOUT_S, "the restart")


def fail_or_stall(server, _, rank, hangs):
    (server.stall_rank if hangs else server.fail_rank)(rank)


def kill_or_stop_process(_, api, rank, hangs):
    os.kill(api.info().ranks[rank].process, signal.SIGSTOP if hangs else signal.SIGKILL)


def kill_in_turn(server, rounds, kill=fail_or_stall, words=()):
    ranks = 4
    tenants = [Tenant(server, rank % ranks, seed=rank, words=words) for rank in range(2 * ranks)]
    api = server.api()
    for tenant in tenants:
        tenant.start()
    for number in range(rounds):
        victim, hangs = number % ranks, number // ranks % 2 == 1
        before = [(tenant.steps, len(tenant.losses)) for tenant in tenants]

        def all_have_stepped(since=before):
            assert all(tenant.is_alive() for tenant in tenants), [t.failure for t in tenants]
            return all(tenant.steps > steps + 1 for tenant, (steps, _) in zip(tenants, since, strict=True))

        eventually(all_have_stepped, TIMEOUT_S, "everybody is served")
        losses = [len(tenant.losses) for tenant in tenants]
        rank_before = api.info().ranks[victim]
        killed = time.monotonic()
        kill(server, api, victim, hangs)
        wait_for_restart(api, victim, rank_before)
        for tenant, count in zip(tenants, losses, strict=True):
            if tenant.rank != victim:
                assert len(tenant.losses) == count, "a call on another rank failed"
                continue
            eventually(lambda t=tenant, c=count: len(t.losses) > c, TIMEOUT_S, "the calls of the lost rank")
            begin, end = tenant.losses[count]
            limit = 1.0 + (STALL_S if hangs else 0)
            assert end - max(begin, killed) < limit or build_kind() == "tsan", "its call took too long to end"
        # Served again by the new rank, while what hangs is still there; then that comes back.
        before = [(tenant.steps, len(tenant.losses)) for tenant in tenants]
        eventually(lambda since=before: all_have_stepped(since), TIMEOUT_S, "everybody is served again")
        server.release_rank(victim)
    for tenant in tenants:
        tenant.leaving = True
    for tenant in tenants:
        tenant.join(TIMEOUT_S)
        assert not tenant.is_alive(), "a call has not ended"
        tenant.check()
    ranks_now = api.info().ranks
    assert sum(rank.losses for rank in ranks_now) == rounds
    assert sum(rank.restarts for rank in ranks_now) == rounds
    assert {rank.state for rank in ranks_now} == {pb.RANK_STATE_SERVING}


def test_each_rank_killed_in_turn_takes_its_own_calls_and_no_others(start_server):
    kill_in_turn(faulty(start_server, ranks=4, rank_restart_backoff_ms=10), rounds=20)


def test_each_isolated_rank_s_process_killed_or_stopped_in_turn_takes_its_own_calls_and_no_others(start_server):
    server = faulty(start_server, ranks=4, rank_restart_backoff_ms=10, isolated="true")
    processes = {rank.process for rank in server.api().info().ranks}
    assert len(processes) == 4 and server.pid not in processes and 0 not in processes
    kill_in_turn(server, 20, kill_or_stop_process, words=("of this backend was ended by signal 9",))
    assert not processes & {rank.process for rank in server.api().info().ranks}
    told = [record["error"] for record in server.log_records() if record["event"] == "rank_lost"]
    assert sum("was ended by signal 9 (KILL)" in error for error in told) == 12
    assert sum("stalled" in error for error in told) == 8


def test_the_processes_of_isolated_ranks_end_with_the_server(start_server):
    server = start_server(ranks=3, isolated="true")
    processes = [rank.process for rank in server.api().info().ranks]
    server.stop()
    for process in processes:
        eventually(lambda pid=process: not os.path.exists(f"/proc/{pid}"), what=f"the end of process {process}")


@pytest.mark.slow
def test_ranks_killed_on_many_threads(start_server):
    kill_in_turn(faulty(start_server, ranks=4, rank_restart_backoff_ms=5, cq_threads=4), rounds=28)


# Devices that break


def ranks_lost_with(api, rank):
    """The ranks that are lost if the device of `rank` breaks: all that use CUDA in the same process."""
    info = api.info()
    if info.backend != "cuda":
        return {rank}
    return {one.rank for one in info.ranks if one.process == info.ranks[rank].process}


def comes_back(admin, rank, restarts, by_hand):
    """Whether it serves again, once that is known: some drivers keep a GPU that was reset from the process."""

    def is_known():
        info = admin.info().ranks[rank]
        if by_hand and info.state == pb.RANK_STATE_LOST:
            admin.call("RestartRank", pb.RestartRankRequest(rank=rank))
        return info.restarts == restarts or "a reset did not help" in info.last_error

    eventually(is_known, TIMEOUT_S, f"rank {rank} back")
    return admin.info().ranks[rank].restarts == restarts


@pytest.mark.parametrize(("by_hand", "isolated"), [(True, "false"), (False, "false"), (True, "true"), (False, "true")])
def test_a_device_that_breaks_under_load_takes_its_ranks_and_serves_again(start_server, admin, by_hand, isolated):
    """With ATTND_TEST_BACKEND=cuda a real error; in one process all ranks are lost, on whatever GPU they are."""
    ranks, rounds = 4, 3
    server = faulty(
        start_server,
        ranks=ranks,
        rank_stall_ms=20_000,  # a GPU's first calls after a reset take a while
        rank_restart_backoff_ms=0 if by_hand else 20,
        admin_token_file=admin.path,
        isolated=isolated,
    )
    api = server.api(metadata=admin.metadata)
    words = ("the device is broken", "cuda: ")
    tenants = [Tenant(server, rank, seed=rank, words=words) for rank in range(ranks)]
    for tenant in tenants:
        tenant.start()

    def all_step_on(of):
        before = [tenant.steps for tenant in of]

        def do():
            assert all(tenant.is_alive() for tenant in of), [tenant.failure for tenant in of]
            return all(tenant.steps > steps + 1 for tenant, steps in zip(of, before, strict=True))

        eventually(do, TIMEOUT_S, "everybody is served")

    lost = ranks_lost_with(api, 1)
    others = [tenant for tenant in tenants if tenant.rank not in lost]
    for number in range(1, rounds + 1):
        all_step_on(tenants)
        losses = [len(tenant.losses) for tenant in tenants]
        broken = time.monotonic()
        server.break_rank(1)
        for tenant, count in zip(tenants, losses, strict=True):
            if tenant.rank in lost:
                eventually(lambda t=tenant, c=count: len(t.losses) > c, TIMEOUT_S, "the calls of the lost rank")
                begin, end = tenant.losses[count]
                assert end - max(begin, broken) < 1 or build_kind() == "tsan", "its call took too long to end"
        all_step_on(others)
        if not all([comes_back(api, rank, number, by_hand) for rank in lost]):
            assert api.info().backend == "cuda" and isolated == "false"
            rounds = number
            break
        all_step_on(tenants)  # every answer is checked
        assert [len(tenant.losses) for tenant in others] == [losses[tenant.rank] for tenant in others]
    all_step_on(others)
    for tenant in tenants:
        tenant.leaving = True
    for tenant in tenants:
        tenant.join(TIMEOUT_S)
        assert not tenant.is_alive(), "a call has not ended"
        tenant.check()
    for info in api.info().ranks:
        assert (info.losses, info.stalls) == (rounds if info.rank in lost else 0, 0)
    told = [record for record in server.log_records() if record["event"] == "rank_lost"]
    assert {record["rank"] for record in told} == lost
    if lost == {1}:
        assert [word for word in words if word in told[0]["error"]]


# Every kind of call


def test_every_kind_of_call_ends_on_a_rank_that_hangs(start_server):
    server = faulty(start_server, ranks=2, rank_restart_backoff_ms=20)
    model = Model(server.api())
    calls = {
        "unary": lambda handles: model.step(handles, via="unary"),
        "stream": lambda handles: model.step(handles, via="stream"),
        "read": lambda handles: model.read(handles),
        "upload": lambda handles: model.append(handles[0], 3000),
        "export": lambda handles: model.api.call("ExportKv", pb.ExportKvRequest(sequence=handles[0])),
    }
    other = model.open_filled([40], pb.PLACEMENT_EXPLICIT, 0)
    for losses, (name, call) in enumerate(calls.items(), start=1):
        lost = model.open_filled([100, 33], pb.PLACEMENT_EXPLICIT, 1)
        spread = model.open_filled([1200], pb.PLACEMENT_SPREAD)
        server.stall_rank(1)
        time.sleep(0.05)  # until the signal has come
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as failure:
            call(lost)
        assert failure.value.code() == CODE.UNAVAILABLE, name
        assert "rank 1 is lost" in failure.value.details(), name
        assert time.monotonic() - began < STALL_S + 1 or build_kind() == "tsan", name
        model.step(other)
        eventually(lambda n=losses: model.api.info().ranks[1].restarts == n, what="restarted")
        error = model.api.error("Decode", model.decode_request(spread, None, model.layer(1)))
        assert error.code() == CODE.UNAVAILABLE, error
        assert "rank 1, which held it, was lost" in error.details(), error
        model.close(lost + spread)
        server.release_rank(1)
    rank = model.api.info().ranks[1]
    assert (rank.losses, rank.stalls) == (len(calls), len(calls))
    assert "stalled" in rank.last_error


def test_a_server_stops_while_a_rank_hangs(start_server):
    server = faulty(start_server, ranks=2, rank_restart_backoff_ms=0)
    server.leaks_expected = True
    model = Model(server.api())
    handles = model.open_filled([100], pb.PLACEMENT_EXPLICIT, 1)
    server.stall_rank(1)
    time.sleep(0.05)
    with pytest.raises(grpc.RpcError):
        model.step(handles)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 5


# Restarts by hand


@pytest.fixture
def administered(start_server, admin):
    server = faulty(start_server, ranks=3, rank_restart_backoff_ms=0, admin_token_file=admin.path, min_serving_ranks=2)
    return server, server.api(metadata=admin.metadata)


def test_restart_rank_is_for_the_admin_and_for_lost_ranks(administered):
    server, admin = administered
    request = pb.RestartRankRequest(rank=1)
    assert server.api().error("RestartRank", request).code() == CODE.UNAUTHENTICATED
    wrong = server.api(metadata=(("authorization", "Bearer not-the-admin-token"),))
    assert wrong.error("RestartRank", request).code() == CODE.PERMISSION_DENIED
    error = admin.error("RestartRank", request)
    assert error.code() == CODE.FAILED_PRECONDITION and "rank: 1 serves" in error.details()
    error = admin.error("RestartRank", pb.RestartRankRequest(rank=3))
    assert error.code() == CODE.INVALID_ARGUMENT and "ranks 0 .. 2" in error.details()

    model = Model(admin)
    old = model.open_filled([40], pb.PLACEMENT_EXPLICIT, 1)
    server.fail_rank(1)
    wait_for_state(admin, 1, pb.RANK_STATE_LOST)
    time.sleep(0.3)  # nobody restarts it
    lost = admin.info().ranks[1]
    assert (lost.state, lost.losses, lost.restarts) == (pb.RANK_STATE_LOST, 1, 0)
    assert lost.last_error == "failed for a test"
    assert admin.call("RestartRank", request).rank.rank == 1
    wait_for_state(admin, 1, pb.RANK_STATE_SERVING)
    rank = admin.info().ranks[1]
    assert (rank.restarts, rank.sequences, rank.pages_free) == (1, 0, rank.pages_total)
    error = admin.error("Decode", model.decode_request(old, None, model.layer(1)))
    assert error.code() == CODE.UNAVAILABLE and "close it" in error.details()
    model.close(old)
    model.step(model.open_filled([40], pb.PLACEMENT_EXPLICIT, 1))
    eventually(
        lambda: (
            [record["event"] for record in server.log_records() if record["event"].startswith("rank_")]
            == ["rank_lost", "rank_restarted"]
        ),
        what="both in the log",
    )


def test_without_an_admin_token_nobody_restarts_ranks(server):
    api = server.api(metadata=(("authorization", "Bearer anything-at-all-really"),))
    error = api.error("RestartRank", pb.RestartRankRequest(rank=0))
    assert error.code() == CODE.PERMISSION_DENIED and "admin_token_file" in error.details()


# Health


def test_health_tells_enough_ranks_from_all_of_them(administered):
    server, admin = administered
    health = health_pb2_grpc.HealthStub(admin.channel)
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

    def states():
        names = ("", "attnd.v1.Attention", "attnd.v1.Attention/full")
        return [health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S).status for name in names]

    watch = health.Watch(health_pb2.HealthCheckRequest(service="attnd.v1.Attention/full"), timeout=TIMEOUT_S)
    assert next(watch).status == serving
    assert states() == [serving] * 3
    assert not admin.info().degraded
    server.fail_rank(0)
    assert next(watch).status == not_serving
    assert states() == [serving, serving, not_serving]
    assert admin.info().degraded
    server.fail_rank(2)
    eventually(lambda: states() == [not_serving] * 3, what="too few ranks")
    admin.call("RestartRank", pb.RestartRankRequest(rank=2))
    eventually(lambda: states() == [serving, serving, not_serving], what="enough ranks again")
    admin.call("RestartRank", pb.RestartRankRequest(rank=0))
    assert next(watch).status == serving
    assert states() == [serving] * 3
    assert not admin.info().degraded
    watch.cancel()
