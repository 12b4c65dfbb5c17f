"""The Python client package against real servers."""

import asyncio
import pathlib
import sys
import threading
import time

import numpy as np
import pytest
from attention_oracle import LSE_BOUND, attend
from attnd_harness import eventually

try:
    import attnd
except ImportError:  # not installed: the source tree's, as client/generate.py prepared it
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "client"))
    import attnd

OUT_BOUND = {"bf16": 2.5e-3, "fp16": 5e-4, "fp32": 1e-5}


class Memory:
    """What sequences hold, by the client's account; makes random tensors and checks answers."""

    def __init__(self, geometry, seed=0):
        self.geometry = geometry
        self.random = np.random.default_rng(seed)
        self.held = {}

    def rows(self, *shape):
        return self.random.uniform(-2, 2, shape).astype(self.geometry.dtype)

    def tensors(self, tokens):
        g = self.geometry
        return self.rows(tokens, *g.q_row), self.rows(tokens, *g.k_row), self.rows(tokens, *g.v_row)

    def of(self, sequence):
        g = self.geometry
        return self.held.setdefault(
            sequence, [(self.rows(0, *g.k_row), self.rows(0, *g.v_row)) for _ in range(g.layers)]
        )

    def append(self, sequence, layer, k, v):
        old_k, old_v = self.of(sequence)[layer]
        self.held[sequence][layer] = (np.concatenate([old_k, k]), np.concatenate([old_v, v]))

    def cut(self, sequence, length):
        return [(k[:length], v[:length]) for k, v in self.of(sequence)]

    def check(self, out, lse, sequences, lengths, layer, q, options, read_only=False):
        scale = options.softmax_scale or self.geometry.head_dim**-0.5
        row = 0
        for sequence, length in zip(sequences, lengths):
            k, v = self.of(sequence)[layer]
            some = slice(row, row + length)
            right, right_lse = attend(
                q[some], k, v, scale, options.softcap, options.sliding_window, options.sinks, read_only
            )
            error = np.linalg.norm(np.asarray(out[some], np.float64) - right) / max(np.linalg.norm(right), 1e-30)
            assert error <= OUT_BOUND[self.geometry.dtype_name], (layer, row, error)
            if lse is not None:
                np.testing.assert_allclose(lse[some], right_lse, atol=LSE_BOUND)
            row += length

    def append_rows(self, sequences, lengths, layer, k, v):
        row = 0
        for sequence, length in zip(sequences, lengths):
            self.append(sequence, layer, k[row : row + length], v[row : row + length])
            row += length


PLAIN = attnd.Options()


def run_step(client, memory, sequences, lengths=None, options=PLAIN, stream=True):
    lengths = lengths or [1] * len(sequences)
    with client.step(sequences, lengths, options, stream=stream) as step:
        for layer in range(memory.geometry.layers):
            q, k, v = memory.tensors(sum(lengths))
            out = step.layer(q, k, v)
            memory.append_rows(sequences, lengths, layer, k, v)
            memory.check(out, step.last.lse, sequences, lengths, layer, q, options)
    assert step.committed


@pytest.fixture
def connect():
    """connect(server, ..): a client whose sequences are closed after the test."""
    clients = []

    def make(*servers, **arguments):
        clients.append(attnd.Client([server.address for server in servers], **arguments))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def opened(connect, server):
    """A client of the shared server, its memory, and eight sequences that are closed after the test."""
    client = connect(server)
    sequences = client.open(8)
    yield client, Memory(client.geometry), sequences
    client.close_sequences(sequences)


def test_client_learns_geometry_ranks_and_limits(connect, server):
    info = connect(server).info()
    flags = server.flags
    g = info.geometry
    assert (g.layers, g.heads_q, g.heads_kv) == (flags["layers"], flags["heads_q"], flags["heads_kv"])
    assert (g.head_dim, g.head_dim_v, g.dtype_name) == (flags["head_dim"], flags["head_dim_v"], flags["dtype"])
    assert len(info.ranks) == flags["ranks"] and all(rank.state == "serving" for rank in info.ranks)
    assert info.limits.query_length == 128 and info.limits.message_bytes > 0 and not info.draining


def test_client_restarts_a_lost_rank(start_server, admin):
    server = start_server(ranks=3, test_faults="true", rank_restart_backoff_ms=0, admin_token_file=admin.path)

    async def restart_asynchronously(rank):
        async with attnd.AsyncClient(server.address, token=admin.token) as client:
            return await client.restart_rank(rank)

    with attnd.Client(server.address, token=admin.token) as client:

        def wait_for_state(rank, state):
            eventually(lambda: client.info().ranks[rank].state == state, what=f"rank {rank} {state}")

        with pytest.raises(attnd.FailedPrecondition, match="rank: 2 serves"):
            client.restart_rank(2)
        server.fail_rank(2)
        wait_for_state(2, "lost")
        assert client.info().degraded
        assert client.info().ranks[2].last_error == "failed for a test"
        assert client.restart_rank(2).rank == 2
        wait_for_state(2, "serving")
        assert (client.info().ranks[2].losses, client.info().ranks[2].restarts) == (1, 1)
        server.fail_rank(0)
        wait_for_state(0, "lost")
        assert asyncio.run(restart_asynchronously(0)).losses == 1
        wait_for_state(0, "serving")
        assert not client.info().degraded


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_client_steps_give_the_attention_of_what_was_appended(connect, shared_server, dtype, stream):
    client = connect(shared_server(dtype=dtype, ranks=3))
    memory, sequences = Memory(client.geometry), client.open(7)
    options = attnd.Options(return_lse=True)
    for lengths in (None, [1, 128, 2, 17, 1, 3, 64], None):
        run_step(client, memory, sequences, lengths, options, stream)
    assert [info.length for info in client.describe(sequences)] == [3, 130, 4, 19, 3, 5, 66]
    client.close_sequences(sequences)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_client_copies_a_sequence_to_another_server(connect, shared_server, dtype):
    client, elsewhere = connect(shared_server(dtype=dtype, ranks=3)), connect(shared_server(dtype=dtype, ranks=1))
    memory, options = Memory(client.geometry), attnd.Options(batch_invariant=True)
    sequences = [*client.open(), *client.open(placement=attnd.SPREAD)]
    run_step(client, memory, sequences, [120, 128])
    for sequence in sequences:
        k, v = ([rows[kind] for rows in memory.of(sequence)] for kind in (0, 1))
        client.append_kv(sequence, k, v)
        for layer in range(memory.geometry.layers):
            memory.append(sequence, layer, k[layer], v[layer])
        [copy] = elsewhere.open()
        assert elsewhere.append_kv(copy, *client.export_kv(sequence)) == sequence.length
        for start, stop in ((0, sequence.length), (90, 201)):
            for exported in (sequence.export(start, stop - start), copy.export(start, stop - start)):
                for arrays, kind in zip(exported, (0, 1)):
                    wanted = [rows[kind][start:stop] for rows in memory.of(sequence)]
                    assert [array.dtype for array in arrays] == [client.dtype] * len(wanted)
                    assert [array.tobytes() for array in arrays] == [rows.tobytes() for rows in wanted]
        assert asyncio.run(exported_by_asyncio(client.addresses, sequence)) == [
            k.tobytes() for k in sequence.export()[0]
        ]
        q, _, _ = memory.tensors(1)
        outs = [c.attend([s], 0, q, options=options).out for c, s in ((client, sequence), (elsewhere, copy))]
        assert outs[0].tobytes() == outs[1].tobytes()
        copy.close()
    client.close_sequences(sequences)


async def exported_by_asyncio(addresses, sequence):
    async with attnd.AsyncClient(addresses) as client:
        twin = attnd.AsyncSequence(client, sequence.handle, sequence.dp_rank, sequence.server, sequence.length)
        keys, _ = await twin.export()
        return [k.tobytes() for k in keys]


def test_client_options_reach_the_kernel(opened):
    client, memory, sequences = opened
    sinks = np.linspace(-1, 1, client.geometry.heads_q)
    options = attnd.Options(softmax_scale=0.2, softcap=4.0, sliding_window=9, sinks=sinks, return_lse=True)
    for _ in range(3):
        run_step(client, memory, sequences, [1, 8, 3, 20, 1, 1, 5, 40], options)


def test_client_timing_names_the_ranks_that_had_work(opened):
    client, memory, sequences = opened
    options = attnd.Options(return_timing=True)
    run_step(client, memory, sequences, None, options)
    with client.step(sequences, None, options) as step:
        step.layer(*memory.tensors(8))
        ranks = {sequence.dp_rank for sequence in sequences}
        assert {timing.rank for timing in step.last.timing} == ranks
        assert sum(timing.sequences for timing in step.last.timing) == 8


def test_client_uploads_forks_truncates_and_reads(opened):
    client, memory, sequences = opened
    g, first = client.geometry, sequences[0]
    k, v = memory.rows(g.layers, 3000, *g.k_row), memory.rows(g.layers, 3000, *g.v_row)
    assert first.append(k, iter(v)) == 3000
    for layer in range(g.layers):
        memory.append(first, layer, k[layer], v[layer])
    fork = first.fork(1234)
    memory.held[fork] = memory.cut(first, 1234)
    run_step(client, memory, [fork, first], [2, 1])
    first.truncate(2000)
    memory.held[first] = memory.cut(first, 2000)
    options = attnd.Options(return_lse=True)
    for layer in range(g.layers):
        q, _, _ = memory.tensors(5)
        result = client.attend([first, fork], layer, q, [2, 3], options)
        memory.check(result.out, result.lse, [first, fork], [2, 3], layer, q, options, read_only=True)
    with client.step([fork], read_only=True) as step:
        for layer in reversed(range(g.layers)):
            q, _, _ = memory.tensors(1)
            memory.check(step.layer(q, layer=layer), None, [fork], [1], layer, q, PLAIN, read_only=True)
    fork.close()


@pytest.mark.parametrize("stream", [True, False])
def test_client_leaving_a_step_early_changes_nothing(opened, stream):
    client, memory, sequences = opened
    run_step(client, memory, sequences, stream=stream)
    with client.step(sequences, [5] * 8, stream=stream) as step:
        step.layer(*memory.tensors(40))
    assert [(info.length, info.busy) for info in client.describe(sequences)] == [(1, False)] * 8
    run_step(client, memory, sequences, stream=stream)


def test_client_splits_steps_over_servers_and_joins_in_order(connect, start_server):
    servers = [start_server(), start_server(ranks=1)]
    client = connect(*servers)
    memory = Memory(client.geometry)
    sequences = [client.open(server=client.addresses[index % 2])[0] for index in range(6)]
    options = attnd.Options(return_lse=True)
    for stream in (True, False):
        run_step(client, memory, sequences, [1, 30, 2, 1, 7, 128], options, stream)
    q, _, _ = memory.tensors(6)
    result = client.attend(sequences, 1, q, options=options)
    memory.check(result.out, result.lse, sequences, [1] * 6, 1, q, options, read_only=True)
    client.close_sequences(sequences)


def test_client_new_sequences_go_to_the_emptier_server(connect, start_server):
    servers = [start_server(), start_server()]
    client = connect(*servers)
    [heavy] = client.open(server=servers[0].address)
    g = client.geometry
    heavy.append(np.zeros((g.layers, 500, *g.k_row), g.dtype), np.zeros((g.layers, 500, *g.v_row), g.dtype))
    fresh = connect(*servers)
    opened = fresh.open(1) + fresh.open(1)
    assert opened[0].server == servers[1].address
    fresh.close_sequences(opened)
    heavy.close()


def test_client_session_runs_a_model_with_prompts_longer_than_a_step(connect, shared_server):
    client = connect(shared_server(dtype="fp32", ranks=2))
    g, random = client.geometry, np.random.default_rng(3)
    width = 48
    shapes = [(width, g.heads_q * g.head_dim), (width, g.heads_kv * g.head_dim), (width, g.heads_kv * g.head_dim_v)]
    weights = [
        [random.normal(0, width**-0.5, shape) for shape in [*shapes, (g.heads_q * g.head_dim_v, width)]]
        for _ in range(g.layers)
    ]

    def model(x, positions, attention):
        x = x + np.sin(positions[:, None] / (1 + np.arange(width)))
        for layer, (wq, wk, wv, wo) in enumerate(weights):
            q, k, v = (x @ wq).reshape(-1, *g.q_row), (x @ wk).reshape(-1, *g.k_row), (x @ wv).reshape(-1, *g.v_row)
            x = x + np.asarray(attention(layer, q, k, v), np.float64).reshape(len(x), -1) @ wo
        return x

    def alone(x):
        return model(x, np.arange(len(x)), lambda _, q, k, v: attend(q, k, v, g.head_dim**-0.5)[0])

    prompts = [random.normal(size=(length, width)) for length in (300, 1, 129, 128)]
    with client.session(4) as session:
        outputs = session.run(lambda x, positions: model(x, positions, session.attend), prompts)
        for prompt, output in zip(prompts, outputs):
            np.testing.assert_allclose(output, alone(prompt), atol=1e-4)
        assert list(session.lengths) == [300, 1, 129, 128]


def test_client_threads_share_streams_and_servers(connect, server):
    client = connect(server)
    failures = []

    def work(seed):
        try:
            memory, sequences = Memory(client.geometry, seed), client.open(3)
            for _ in range(5):
                run_step(client, memory, sequences)
            client.close_sequences(sequences)
        except (AssertionError, attnd.AttndError) as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_client_asyncio_runs_many_steps_at_once(server):
    async def one(client, seed):
        memory, sequences = Memory(await client.geometry(), seed), await client.open(2)
        for stream in (True, False, True):
            async with await client.step(sequences, [3, 1], stream=stream) as step:
                for layer in range(memory.geometry.layers):
                    q, k, v = memory.tensors(4)
                    out = await step.layer(q, k, v)
                    memory.append_rows(sequences, [3, 1], layer, k, v)
                    memory.check(out, None, sequences, [3, 1], layer, q, PLAIN)
        g = memory.geometry
        k, v = memory.rows(g.layers, 700, *g.k_row), memory.rows(g.layers, 700, *g.v_row)
        assert await sequences[0].append(k, v) == 709
        await client.close_sequences(sequences)

    async def main():
        async with attnd.AsyncClient(server.address) as client:
            await asyncio.gather(*(one(client, seed) for seed in range(8)))

    asyncio.run(main())


def test_client_error_carries_the_servers_words(opened):
    client, memory, sequences = opened
    stale = sequences[3]
    stale.close()
    stale.closed = False  # as another process would still hold it
    for stream in (True, False):
        with pytest.raises(attnd.NotFound, match=r"sequences\[3\]"):
            client.step(sequences, stream=stream).layer(*memory.tensors(8))
    stale.closed = True
    with pytest.raises(attnd.InvalidArgument, match="dp_rank"):
        client.open(placement=attnd.EXPLICIT, dp_rank=60)
    with client.step(sequences[:2]) as step:
        step.layer(*memory.tensors(2))
        with pytest.raises(attnd.Aborted):
            client.step(sequences[1:2]).layer(*memory.tensors(1))


def test_client_exhausted_pages_come_with_a_retry_hint_and_change_nothing(connect, start_server):
    server = start_server(pages=4, ranks=1)
    client = connect(server, timeout=2.0)
    g = client.geometry
    sequences = client.open(2)
    k, v = np.zeros((g.layers, 200, *g.k_row), g.dtype), np.zeros((g.layers, 200, *g.v_row), g.dtype)
    with pytest.raises(attnd.ResourceExhausted):
        sequences[0].append(k, v)
    assert sequences[0].describe().length == 0
    assert sequences[0].append(k[:, :60], v[:, :60]) == 60
    client.close_sequences(sequences)


def test_client_waits_for_pages_that_another_frees(connect, start_server):
    server = start_server(pages=4, ranks=1)
    client = connect(server, timeout=20.0)
    g = client.geometry
    first, second = client.open(2)
    k, v = np.zeros((g.layers, 60, *g.k_row), g.dtype), np.zeros((g.layers, 60, *g.v_row), g.dtype)
    first.append(k, v)
    with pytest.raises(attnd.ResourceExhausted) as refused:
        second.append(iter(k), iter(v))  # iterators can be read but once: no retry
    hint = refused.value.retry_after
    assert hint is not None, "the server gives a retry hint"
    threading.Timer(hint / 2, first.close).start()
    assert second.append(k, v) == 60
    second.close()


def test_client_handles_do_not_outlive_their_server(connect, start_server):
    server = start_server()
    port = server.address.rsplit(":", 1)[1]
    client = connect(server)
    memory, sequences = Memory(client.geometry), client.open(2)
    run_step(client, memory, sequences)
    server.stop()
    with pytest.raises((attnd.Unavailable, attnd.Cancelled)):
        run_step(client, memory, sequences)
    start_server(listen=f"127.0.0.1:{port}")
    with pytest.raises(attnd.NotFound, match=r"sequences\[0\]"):
        deadline = time.monotonic() + 10
        while True:
            try:
                client.describe(sequences)
            except attnd.Unavailable:
                assert time.monotonic() < deadline
    with pytest.raises(attnd.NotFound, match=r"sequences\[0\]"):
        client.step(sequences).layer(*memory.tensors(2))


def test_client_idle_streams_do_not_hold_up_a_shutdown(connect, start_server):
    server = start_server(grace_ms=20000)
    client = connect(server)
    memory, sequences = Memory(client.geometry), client.open(2)
    run_step(client, memory, sequences)
    started = time.monotonic()
    server.stop()
    assert time.monotonic() - started < 10


def test_client_token_is_asked_for_and_checked(connect, start_server, tmp_path):
    config = tmp_path / "attnd.yaml"
    config.write_text("auth:\n  tenants:\n    - name: one\n      token: correct-horse-battery-staple\n")
    server = start_server(config=config)
    server.leaks_expected = True  # the check after the test has no token
    client = connect(server, token="correct-horse-battery-staple")
    memory, sequences = Memory(client.geometry), client.open(2)
    run_step(client, memory, sequences)
    client.close_sequences(sequences)
    assert all(rank.pages_free == rank.pages_total for rank in client.info().ranks)
    with pytest.raises(attnd.Unauthenticated):
        connect(server).open()
    with pytest.raises((attnd.PermissionDenied, attnd.Unauthenticated)):
        connect(server, token="wrong-horse-battery-staple").open()


def test_client_command_line_describes_a_server(server):
    from attnd.__main__ import main

    assert main(["info", server.address]) == 0
    assert main(["bench-ping", server.address, "--count", "20"]) == 0
