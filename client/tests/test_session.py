"""Sessions: a small transformer in numpy must not notice that its attention is remote, nor in how many pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from fake_server import FakeServer, attention

import attnd
from attnd._proto import attnd_pb2 as pb

WIDTH, VOCABULARY = 32, 11


class Model:
    """Random weights; rotary-like positions enter through an additive embedding."""

    def __init__(self, geometry: attnd.Geometry) -> None:
        self.geometry = g = geometry
        random = np.random.default_rng(7)

        def weight(*shape: int) -> Any:
            return random.normal(0, shape[0] ** -0.5, shape)

        self.embedding = weight(VOCABULARY, WIDTH)
        self.layers = [
            (
                weight(WIDTH, g.heads_q * g.head_dim),
                weight(WIDTH, g.heads_kv * g.head_dim),
                weight(WIDTH, g.heads_kv * g.head_dim_v),
                weight(g.heads_q * g.head_dim_v, WIDTH),
            )
            for _ in range(g.layers)
        ]

    def forward(self, attend: Any, tokens: Any, positions: Any) -> Any:
        g = self.geometry
        x = self.embedding[tokens] + np.sin(positions[:, None] / (1 + np.arange(WIDTH)))
        for index, (wq, wk, wv, wo) in enumerate(self.layers):
            q, k, v = (x @ wq).reshape(-1, *g.q_row), (x @ wk).reshape(-1, *g.k_row), (x @ wv).reshape(-1, *g.v_row)
            out = attend(index, q, k, v)
            x = x + np.asarray(out, np.float64).reshape(len(x), -1) @ wo
        return x

    def alone(self, tokens: Any) -> Any:
        """The same over one whole sequence with local attention."""
        options = pb.AttentionOptions()
        return self.forward(lambda _, q, k, v: attention(q, k, v, 0, options)[0], tokens, np.arange(len(tokens)))


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(query_length=8, heads_q=2, heads_kv=1, head_dim=8, head_dim_v=8) as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[attnd.Client]:
    with attnd.Client(server.address, timeout=10) as opened:
        yield opened


def forward_of(model: Model, session: attnd.Session) -> Any:
    return lambda tokens, positions: model.forward(session.attend, tokens, positions)


@pytest.mark.parametrize("stream", [True, False])
def test_a_models_outputs_do_not_depend_on_how_its_prompt_was_cut(client: attnd.Client, stream: bool) -> None:
    model = Model(client.geometry)
    random = np.random.default_rng(1)
    prompts = [random.integers(0, VOCABULARY, length) for length in (1, 8, 9, 30, 0, 17)]
    with client.session(len(prompts), stream=stream) as session:
        outputs = session.run(forward_of(model, session), prompts)
        assert list(session.lengths) == [len(prompt) for prompt in prompts]
        for prompt, output in zip(prompts, outputs):
            assert len(output) == len(prompt)
            if len(prompt):
                np.testing.assert_allclose(output, model.alone(prompt), rtol=1e-4, atol=1e-4)
        tokens = [np.array([index]) for index in range(len(prompts))]  # and one more token each
        outputs = session.run(forward_of(model, session), tokens)
        for prompt, token, output in zip(prompts, tokens, outputs):
            np.testing.assert_allclose(output, model.alone(np.append(prompt, token))[-1:], rtol=1e-4, atol=1e-4)


def test_long_prompts_take_as_few_passes_as_the_limits_allow(server: FakeServer, client: attnd.Client) -> None:
    model = Model(client.geometry)
    passes = []
    with client.session(3) as session:

        def forward(tokens: Any, positions: Any) -> Any:
            passes.append(len(tokens))
            return model.forward(session.attend, tokens, positions)

        session.run(forward, [np.zeros(n, int) for n in (20, 3, 8)])
    assert passes == [19, 8, 4]


def test_passes_stay_under_the_message_limit() -> None:
    fake = FakeServer(message_bytes=72 * 1024, query_length=128, layers=1)
    with fake as server, attnd.Client(server.address) as client, client.session(2) as session:
        model = Model(client.geometry)
        outputs = session.run(forward_of(model, session), [np.zeros(60, int), np.zeros(2, int)])
        assert [len(output) for output in outputs] == [60, 2]
        assert server.calls.count("DecodeStream.message") > 3


def test_without_begin_every_sequence_has_one_new_token(client: attnd.Client) -> None:
    g = client.geometry
    with client.session(3) as session:
        for layer in range(g.layers):
            out = session.attend(layer, np.ones((3, *g.q_row)), np.ones((3, *g.k_row)), np.ones((3, *g.v_row)))
            assert out.shape == (3, *g.out_row) and out.dtype == client.dtype
        assert session.last.committed
        assert list(session.lengths) == [1, 1, 1]


def test_begin_gives_the_position_of_every_row(client: attnd.Client) -> None:
    model = Model(client.geometry)
    with client.session(2) as session:
        session.run(forward_of(model, session), [np.zeros(5, int), np.zeros(2, int)])
        assert session.begin([3, 2]).tolist() == [5, 6, 7, 2, 3]
        session.abort()
        assert session.begin(None, session.sequences[1:]).tolist() == [2]


def test_sequences_come_and_go_between_passes(server: FakeServer, client: attnd.Client) -> None:
    model = Model(client.geometry)
    with client.session() as session:
        first, second = session.add(2)
        prompt = np.arange(6)
        session.run(forward_of(model, session), [prompt, prompt[:3]])
        session.remove(second)
        fork = session.fork(first, 4)
        [one, two] = session.run(forward_of(model, session), [[1], [2, 3]])
        np.testing.assert_allclose(one, model.alone(np.append(prompt, 1))[-1:], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(two, model.alone([0, 1, 2, 3, 2, 3])[-2:], rtol=1e-4, atol=1e-4)
        [three] = session.run(forward_of(model, session), [[5]], [fork])
        np.testing.assert_allclose(three, model.alone([0, 1, 2, 3, 2, 3, 5])[-1:], rtol=1e-4, atol=1e-4)
        assert list(session.lengths) == [7, 7]
    assert not server.sequences


def test_layers_out_of_order_are_refused_and_the_pass_goes_on(client: attnd.Client) -> None:
    g = client.geometry
    tensors = np.ones((1, *g.q_row)), np.ones((1, *g.k_row)), np.ones((1, *g.v_row))
    with client.session(1) as session:
        with pytest.raises(attnd.InvalidArgument, match="layer: 1, expected 0"):
            session.attend(1, *tensors)
        session.attend(0, *tensors)
        with pytest.raises(attnd.InvalidArgument, match="layer: 0, expected 1"):
            session.attend(0, *tensors)
        with pytest.raises(attnd.FailedPrecondition, match="layer 1 comes next"):
            session.add()
        session.attend(1, *tensors)
        session.add()
        assert list(session.lengths) == [1, 0]


def test_a_failed_pass_leaves_the_session_as_it_was(server: FakeServer, client: attnd.Client) -> None:
    model = Model(client.geometry)
    prompt = np.arange(7)
    with client.session(1) as session:
        forward = forward_of(model, session)

        def broken(tokens: Any, positions: Any) -> Any:
            session.attend(0, *_ones(client, len(tokens)))
            raise ZeroDivisionError

        server.fail("DecodeStream", grpc.StatusCode.INTERNAL, layer=1)
        with pytest.raises(attnd.Internal):
            session.run(forward, [prompt])
        with pytest.raises(ZeroDivisionError):
            session.run(broken, [prompt])
        with pytest.raises(attnd.FailedPrecondition, match="returned before layer 0"):
            session.run(lambda tokens, positions: tokens, [prompt])
        assert list(session.lengths) == [0]
        np.testing.assert_allclose(session.run(forward, [prompt])[0], model.alone(prompt), rtol=1e-4, atol=1e-4)


def test_integers_are_no_tensors(client: attnd.Client) -> None:
    g = client.geometry
    with client.session(1) as session, pytest.raises(attnd.InvalidArgument, match="dtype int64"):
        session.attend(0, np.ones((1, *g.q_row), int), np.ones((1, *g.k_row)), np.ones((1, *g.v_row)))


def _ones(client: attnd.Client, rows: int) -> Any:
    g = client.geometry
    return np.ones((rows, *g.q_row)), np.ones((rows, *g.k_row)), np.ones((rows, *g.v_row))
