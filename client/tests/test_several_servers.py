"""One client, several servers: placement by load, split steps, and what happens when one of them fails."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from fake_server import FakeServer
from oracle import Oracle
from test_blocking import run_step

import attnd
from attnd import _core

Status = grpc.StatusCode


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    with FakeServer() as first, FakeServer() as second, FakeServer() as third:
        yield [first, second, third]


@pytest.fixture
def client(servers: list[FakeServer]) -> Iterator[attnd.Client]:
    with attnd.Client([server.address for server in servers], timeout=10) as opened:
        yield opened


def interleaved(client: attnd.Client, count: int) -> list[attnd.Sequence]:
    """Sequences on the servers in turn, so that no server's rows are together."""
    addresses = client.addresses
    return [client.open(server=addresses[index % len(addresses)])[0] for index in range(count)]


def test_new_sequences_go_where_the_fewest_tokens_are(servers: list[FakeServer], client: attnd.Client) -> None:
    servers[0].tokens_elsewhere = 1000
    servers[1].tokens_elsewhere = 3
    opened = client.open(12)
    where = Counter(sequence.server for sequence in opened)
    assert where[servers[0].address] == 0
    assert where[servers[1].address] == 5 and where[servers[2].address] == 7  # tokens 3 + 5, and 0 + 7 or 8


def test_idle_servers_share_evenly_between_looks_at_their_load(client: attnd.Client) -> None:
    opened = [client.open()[0] for _ in range(9)]
    assert sorted(Counter(sequence.server for sequence in opened).values()) == [3, 3, 3]


def test_load_is_asked_for_at_most_once_a_second(
    servers: list[FakeServer], client: attnd.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(10):
        client.open()
    assert servers[0].calls.count("GetServerInfo") == 1
    monkeypatch.setattr(_core, "INFO_MAX_AGE", 0.0)
    client.open()
    assert servers[0].calls.count("GetServerInfo") == 2


def test_full_and_draining_and_absent_servers_are_passed_over() -> None:
    with FakeServer() as gone:
        pass
    with FakeServer(max_sequences=2) as full, FakeServer() as draining, FakeServer() as good:
        draining.draining = True
        addresses = [gone.address, full.address, draining.address, good.address]
        with attnd.Client(addresses, timeout=5) as client:
            opened = client.open(10)
            where = Counter(sequence.server for sequence in opened)
            assert where == {good.address: 10} or where == {full.address: 2, good.address: 8}
            client.open(10)
            assert not draining.sequences and len(good.sequences) >= 18


def test_a_server_that_does_not_answer_is_waited_for_once(
    servers: list[FakeServer], client: attnd.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "INFO_TIMEOUT", 0.3)
    monkeypatch.setattr(_core, "INFO_MAX_AGE", 0.0)
    servers[0].fail("GetServerInfo", Status.OK, delay=1.5, times=100)
    started = time.monotonic()
    where = Counter(client.open()[0].server for _ in range(6))
    assert time.monotonic() - started < 1.2
    assert where == {servers[1].address: 3, servers[2].address: 3}
    assert servers[0].calls.count("GetServerInfo") == 1


def test_opening_is_all_or_none_over_the_servers(servers: list[FakeServer], client: attnd.Client) -> None:
    for server in servers:
        server.limits.sequences = 2
    with pytest.raises(attnd.ResourceExhausted):
        client.open(7)
    assert not any(server.sequences for server in servers)
    assert len(client.open(6)) == 6


def test_sequences_that_fit_only_just_are_opened(servers: list[FakeServer]) -> None:
    servers[0].limits.sequences = 3
    servers[1].limits.sequences = 8
    servers[1].tokens_elsewhere = 1000
    with attnd.Client([server.address for server in servers[:2]]) as client:
        where = Counter(sequence.server for sequence in client.open(11))
    assert where == {servers[0].address: 3, servers[1].address: 8}


def test_servers_of_another_geometry_are_refused() -> None:
    with FakeServer() as one, FakeServer(layers=3) as other, pytest.raises(attnd.InvalidArgument, match="geometry"):
        attnd.Client([one.address, other.address]).open()


def test_a_server_named_twice_or_not_at_all_is_refused(client: attnd.Client) -> None:
    with pytest.raises(attnd.InvalidArgument, match="twice"):
        attnd.Client(["a:1", "a:1"])
    with pytest.raises(attnd.InvalidArgument, match="none given"):
        attnd.Client([])
    with pytest.raises(attnd.InvalidArgument, match="a:1 is none of"):
        client.open(server="a:1")


@pytest.mark.parametrize("stream", [True, False])
def test_split_steps_come_back_in_request_order(client: attnd.Client, stream: bool) -> None:
    oracle = Oracle(client.geometry)
    sequences = interleaved(client, 7)
    options = attnd.Options(return_lse=True, return_timing=True)
    for lengths in ([1] * 7, [3, 1, 4, 1, 5, 9, 2]):
        run_step(client, oracle, sequences, lengths, options, stream=stream)
    assert [sequence.length for sequence in sequences] == [4, 2, 5, 2, 6, 10, 3]


def test_split_reads_come_back_in_request_order(client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    sequences = interleaved(client, 5)
    run_step(client, oracle, sequences, [5, 4, 3, 2, 1])
    q, _, _ = oracle.tensors(7)
    result = client.attend(sequences, 1, q, [1, 2, 1, 2, 1], attnd.Options(return_lse=True, return_timing=True))
    out, lse = oracle.expect(sequences, [1, 2, 1, 2, 1], 1, q)
    oracle.check(result.out, out)
    np.testing.assert_allclose(result.lse, lse, atol=1e-4)
    assert {timing.server for timing in result.timing} == set(client.addresses)


def test_describe_and_close_span_servers(servers: list[FakeServer], client: attnd.Client) -> None:
    oracle = Oracle(client.geometry)
    sequences = interleaved(client, 5)
    run_step(client, oracle, sequences, [5, 4, 3, 2, 1])
    assert [info.length for info in client.describe(sequences)] == [5, 4, 3, 2, 1]
    client.close_sequences(sequences)
    assert not any(server.sequences for server in servers)


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_names_the_index_in_the_callers_batch(
    servers: list[FakeServer], client: attnd.Client, stream: bool
) -> None:
    oracle = Oracle(client.geometry)
    sequences = interleaved(client, 6)
    del servers[1].sequences[sequences[4].handle]  # the server has closed it
    with client.step(sequences, stream=stream) as step, pytest.raises(attnd.NotFound) as caught:
        step.layer(*oracle.tensors(6))
    assert "sequences[4]" in str(caught.value) and caught.value.server == servers[1].address
    with pytest.raises(attnd.NotFound, match=r"sequences\[4\]"):
        client.attend(sequences, 0, oracle.tensors(6)[0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_of_one_server_aborts_the_step_on_all(
    servers: list[FakeServer], client: attnd.Client, stream: bool
) -> None:
    oracle = Oracle(client.geometry)
    sequences = interleaved(client, 3)
    run_step(client, oracle, sequences, stream=stream)
    servers[1].fail("DecodeStream" if stream else "Decode.layer", Status.INTERNAL, layer=0)
    with client.step(sequences, stream=stream) as step, pytest.raises(attnd.Internal):
        step.layer(*oracle.tensors(3))
    assert not any(server.steps for server in servers)
    assert not any(info.busy for info in client.describe(sequences))
    run_step(client, oracle, sequences, stream=stream)


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_at_the_last_layer_rolls_back_those_that_committed(
    servers: list[FakeServer], client: attnd.Client, stream: bool
) -> None:
    oracle = Oracle(client.geometry)
    sequences = interleaved(client, 6)
    run_step(client, oracle, sequences, [1, 2, 3, 4, 5, 6], stream=stream)
    servers[2].fail("DecodeStream" if stream else "Decode.layer", Status.INTERNAL, layer=1)
    with client.step(sequences, stream=stream) as step:
        step.layer(*oracle.tensors(6))
        with pytest.raises(attnd.Internal):
            step.layer(*oracle.tensors(6))
    assert [sequence.length for sequence in sequences] == [1, 2, 3, 4, 5, 6]
    assert [info.length for info in client.describe(sequences)] == [1, 2, 3, 4, 5, 6]
    run_step(client, oracle, sequences, stream=stream)


def test_a_refused_first_layer_of_one_server_is_repeated_there_alone(
    servers: list[FakeServer], client: attnd.Client
) -> None:
    oracle = Oracle(client.geometry)
    sequences = interleaved(client, 3)
    servers[1].fail("DecodeStream", Status.RESOURCE_EXHAUSTED, pushback_ms=20, layer=0)
    run_step(client, oracle, sequences)
    assert [server.calls.count("DecodeStream.message") for server in servers] == [2, 3, 2]
