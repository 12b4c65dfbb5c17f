"""The asyncio client against the fake server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, Callable

import grpc
import numpy as np
import pytest
from fake_server import FakeServer
from oracle import Oracle

import attnd

Status = grpc.StatusCode


def run(test: Callable[..., Awaitable[None]], servers: int = 1, timeout: float = 10, **arguments: Any) -> None:
    """Runs test(client, oracle, servers) on a loop of its own."""

    async def main(fakes: list[FakeServer]) -> None:
        async with attnd.AsyncClient([fake.address for fake in fakes], timeout=timeout) as client:
            await test(client, Oracle(await client.geometry()), fakes)

    fakes = [FakeServer(**arguments).__enter__() for _ in range(servers)]
    try:
        asyncio.run(main(fakes))
    finally:
        for fake in fakes:
            fake.stop()


async def run_step(
    client: attnd.AsyncClient, oracle: Oracle, sequences, lengths=None, options=None, **arguments
) -> None:
    lengths = lengths or [1] * len(sequences)
    layers = []
    async with await client.step(sequences, lengths, options, **arguments) as step:
        for layer in range(oracle.geometry.layers):
            q, k, v = oracle.tensors(sum(lengths))
            out = await step.layer(q, k, v)
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


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("servers", [1, 3])
def test_steps_give_the_attention_of_what_was_appended(servers: int, stream: bool) -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        sequences = [(await client.open(server=fakes[i % servers].address))[0] for i in range(5)]
        for lengths in ([1, 1, 1, 1, 1], [5, 2, 1, 3, 4]):
            await run_step(client, oracle, sequences, lengths, attnd.Options(return_lse=True), stream=stream)
        assert [sequence.length for sequence in sequences] == [6, 3, 2, 4, 5]
        assert all(fake.calls.count("DecodeStream") == int(stream) for fake in fakes)

    run(test, servers)


def test_many_steps_run_at_the_same_time() -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        groups = [await client.open(2) for _ in range(8)]
        await asyncio.gather(*(run_step(client, oracle, group, [2, 1]) for group in groups))

    run(test)


def test_attend_append_fork_truncate_and_close() -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        g = oracle.geometry
        sequences = await client.open(2)
        k, v = (oracle.random.uniform(-1, 1, (g.layers, 400, *row)).astype(g.dtype) for row in (g.k_row, g.v_row))
        assert await sequences[0].append(k, v) == 400
        oracle.append(sequences[0], k, v)
        q, _, _ = oracle.tensors(3)
        result = await client.attend(sequences, 1, q, [1, 2], attnd.Options(return_lse=True))
        oracle.check(result.out, oracle.expect(sequences, [1, 2], 1, q)[0])
        fork = await sequences[0].fork(390)
        await fork.truncate(380)
        assert (await fork.describe()).length == 380 == fork.length
        async with fork:
            pass
        await client.close_sequences(sequences)
        assert not fakes[0].sequences

    run(test, message_bytes=32 * 1024)


def test_a_wrong_upload_is_refused_and_changes_nothing() -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        [sequence] = await client.open()
        g = oracle.geometry
        with pytest.raises(attnd.InvalidArgument, match="1 layers, expected 2"):
            await sequence.append(np.zeros((1, 5, *g.k_row), g.dtype), np.zeros((1, 5, *g.v_row), g.dtype))
        assert sequence.length == 0
        assert (await sequence.describe()).length == 0

    run(test)


def test_move_goes_to_a_rank_or_spreads() -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        fakes[0].ranks = 3
        g = oracle.geometry
        [sequence] = await client.open(placement=attnd.EXPLICIT, dp_rank=0)
        k, v = (oracle.random.uniform(-1, 1, (g.layers, 20, *row)).astype(g.dtype) for row in (g.k_row, g.v_row))
        await sequence.append(k, v)
        fakes[0].fail("MoveSequence", Status.ABORTED, pushback_ms=1)
        assert await sequence.move(2) == 20
        assert sequence.dp_rank == (await sequence.describe()).dp_rank == 2
        assert await client.move_sequence(sequence, 2) == 0
        with pytest.raises(attnd.InvalidArgument, match="a move goes to a rank, or spreads"):
            await sequence.move(1, spread=True)
        assert await sequence.move(spread=True) == 20
        assert (await sequence.describe()).spread
        with pytest.raises(attnd.FailedPrecondition):
            await sequence.move(1)

    run(test)


def test_export_gives_back_what_was_appended() -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        g = oracle.geometry
        sequence, copy = await client.open(2)
        k, v = (oracle.random.uniform(-1, 1, (g.layers, 250, *row)).astype(g.dtype) for row in (g.k_row, g.v_row))
        await sequence.append(k, v)
        fakes[0].fail("ExportKv.end", Status.UNAVAILABLE)
        assert await copy.append(*await client.export_kv(sequence)) == 250
        for exported in (await sequence.export(99, 102), await copy.export(99, 102)):
            for arrays, expected in zip(exported, (k, v)):
                assert [a.tobytes() for a in arrays] == [one[99:201].tobytes() for one in expected]
        assert [len(array) for arrays in await sequence.export(250) for array in arrays] == [0] * 2 * g.layers
        assert fakes[0].calls.count("ExportKv") == 5
        with pytest.raises(attnd.InvalidArgument, match="position: 251"):
            await sequence.export(251)
        for tamper, words in [
            (lambda responses: responses[:1] + responses[2:], "expected 0, 100"),
            (lambda responses: responses[:3], "ended at layer 1"),
        ]:
            fakes[0].tamper = tamper
            with pytest.raises(attnd.AttndError, match=words):
                await sequence.export()

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_a_step_early_or_being_cancelled_aborts_it(stream: bool) -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        sequences = await client.open(2)
        async with await client.step(sequences, stream=stream) as step:
            await step.layer(*oracle.tensors(2))
        assert not any(info.busy for info in await client.describe(sequences))

        async def slow() -> None:
            async with await client.step(sequences, stream=stream) as step:
                await step.layer(*oracle.tensors(2))
                fakes[0].fail("DecodeStream" if stream else "Decode.layer", Status.OK, delay=0.4)
                await step.layer(*oracle.tensors(2))

        task = asyncio.create_task(slow())
        await asyncio.sleep(0.15)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(100):
            infos = await client.describe(sequences)
            if not any(info.busy for info in infos):
                break
            await asyncio.sleep(0.02)
        assert not any(info.busy for info in infos)

    run(test)


@pytest.mark.parametrize("stream", [True, False])
def test_errors_are_told_apart_and_the_next_step_works(stream: bool) -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        sequences = await client.open(2)
        method = "DecodeStream" if stream else "Decode.layer"
        for code, error in [(Status.ABORTED, attnd.Aborted), (Status.UNAVAILABLE, attnd.Unavailable)]:
            fakes[0].fail(method, code, "sequences[1]: no", layer=0)
            with pytest.raises(error, match=r"sequences\[1\]: no"):
                await (await client.step(sequences, stream=stream)).layer(*oracle.tensors(2))
        await run_step(client, oracle, sequences, stream=stream)

    run(test)


def test_deadlines_hold() -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        sequences = await client.open(2)
        for stream in (True, False):
            fakes[0].fail("DecodeStream" if stream else "Decode.layer", Status.OK, delay=1)
            started = time.monotonic()
            with pytest.raises(attnd.DeadlineExceeded):
                await (await client.step(sequences, stream=stream, timeout=0.2)).layer(*oracle.tensors(2))
            assert time.monotonic() - started < 0.8

    run(test)


def test_retries_are_those_of_the_blocking_client() -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        [fake] = fakes
        sequences = await client.open(2)
        fake.fail("DescribeSequences", Status.UNAVAILABLE, times=2)
        await client.describe(sequences)
        fake.fail("OpenSequences", Status.RESOURCE_EXHAUSTED, pushback_ms=20)
        await client.open()
        fake.fail("OpenSequences", Status.UNAVAILABLE)
        with pytest.raises(attnd.Unavailable):
            await client.open()
        fake.fail("DecodeStream", Status.RESOURCE_EXHAUSTED, pushback_ms=20, layer=0)
        await run_step(client, oracle, sequences)
        fake.fail("DecodeStream", Status.RESOURCE_EXHAUSTED, pushback_ms=20, layer=1)
        with pytest.raises(attnd.ResourceExhausted):
            await run_step(client, oracle, sequences)
        assert [sequence.length for sequence in sequences if sequence._length is not None] in ([], [1, 1])
        assert [info.length for info in await client.describe(sequences)] == [1, 1]

    run(test)


def test_a_failure_at_the_last_layer_rolls_back_those_that_committed() -> None:
    async def test(client: attnd.AsyncClient, oracle: Oracle, fakes: list[FakeServer]) -> None:
        sequences = [(await client.open(server=fakes[i % 2].address))[0] for i in range(4)]
        for stream in (True, False):
            fakes[1].fail("DecodeStream" if stream else "Decode.layer", Status.INTERNAL, layer=1)
            with pytest.raises(attnd.Internal):
                await run_step(client, oracle, sequences, [1, 2, 3, 4], stream=stream)
            assert [info.length for info in await client.describe(sequences)] == [0, 0, 0, 0]
        await run_step(client, oracle, sequences, [1, 2, 3, 4])

    run(test, servers=2)
