"""batch_invariant: bitwise the same output alone and in any batch, on any number of ranks, whole or spread."""

import numpy as np
import pytest
from attention_oracle import Layer, Model, options
from attnd_harness import pb

INVARIANT = options(batch_invariant=True, return_lse=True)
LENGTHS = [1, 3, 16, 17, 64, 100, 511, 512, 513, 700, 1023, 1024, 1025, 1600, 40, 2]


class Twins:
    """The same sequences on servers of 1 to 4 ranks: whole on one rank, and spread over all of them."""

    def __init__(self, shared_server, dtype):
        self.models = []
        for ranks in (1, 2, 3, 4):
            model = Model(shared_server(ranks=ranks, dtype=dtype, pages=2048).api(), seed=7)
            self.models.append((model, self._upload(model, pb.PLACEMENT_ROUND_ROBIN)))
            if ranks > 1:
                self.models.append((model, self._upload(model, pb.PLACEMENT_SPREAD)))

    @staticmethod
    def _upload(model, placement):
        handles = model.open(len(LENGTHS), placement)
        random = np.random.default_rng(99)
        for handle, length in zip(handles, LENGTHS, strict=True):
            rows = [
                tuple(
                    random.uniform(-2, 2, (length, model.geometry.heads_kv, width))
                    .astype(np.float32)
                    .astype(model.dtype)
                    for width in (model.geometry.head_dim, model.geometry.head_dim_v)
                )
                for _ in range(model.geometry.layers)
            ]
            model.api.call("AppendKv", list(model.append_messages(handle, rows)))
            model.grow(handle, rows)
        return handles


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_200_random_batches_are_bitwise_the_same_alone_and_in_the_batch_on_1_to_4_ranks(shared_server, dtype):
    twins = Twins(shared_server, dtype)
    first_model, first_handles = twins.models[0]
    random = np.random.default_rng(3)
    queries = [first_model.queries(8) for _ in LENGTHS]
    alone = {}

    def output_alone(i, rows):
        if (i, rows) not in alone:
            answer = first_model.read([first_handles[i]], [rows], opts=INVARIANT, layer=Layer(queries[i][:rows]))
            alone[i, rows] = (answer.outs[0].tobytes(), answer.lses[0].tobytes())
        return alone[i, rows]

    for batch in range(200):
        members = random.permutation(len(LENGTHS))[: random.integers(1, len(LENGTHS) + 1)]
        rows = [int(random.choice([1, 1, 1, 2, 5, 8])) for _ in members]
        layer = Layer(np.concatenate([queries[i][:n] for i, n in zip(members, rows, strict=True)]))
        model, handles = twins.models[batch % len(twins.models)]
        answer = model.read([handles[i] for i in members], rows, opts=INVARIANT, layer=layer, check=batch % 20 == 0)
        for place, (i, n) in enumerate(zip(members, rows, strict=True)):
            got = (answer.outs[place].tobytes(), answer.lses[place].tobytes())
            assert got == output_alone(i, n), (
                f"batch {batch}, sequence of {LENGTHS[i]}, {n} rows, place {place} of {len(members)}"
            )


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_steps_are_bitwise_the_same_alone_and_in_the_batch_on_1_to_4_ranks(shared_server, dtype):
    twins = Twins(shared_server, dtype)
    sample = twins.models[0][0]
    wanted = None
    for step in range(4):
        rows = [1 + (step * 3 + i) % 4 for i in range(len(LENGTHS))]
        borders = np.cumsum([0, *rows])
        layers = sample.layers(sum(rows))
        wanted = None
        for number, (model, handles) in enumerate(twins.models):
            if number == 1:  # one sequence at a time
                outs = [
                    b"".join(
                        answer.raw_out
                        for answer in model.step(
                            [handle],
                            [rows[i]],
                            opts=INVARIANT,
                            check=False,
                            layers=[
                                Layer(*(x[borders[i] : borders[i + 1]] for x in (one.q, one.k, one.v)))
                                for one in layers
                            ],
                        )
                    )
                    for i, handle in enumerate(handles)
                ]
            else:
                answers = model.step(handles, rows, opts=INVARIANT, layers=layers, check=number == 0)
                outs = [b"".join(answer.outs[i].tobytes() for answer in answers) for i in range(len(handles))]
            wanted = wanted or outs
            assert outs == wanted, f"step {step}, variant {number}"


def test_a_truncated_fork_is_bitwise_the_same_as_a_fresh_sequence(model):
    (parent,) = model.open_filled([700])
    rows = [(k[:613], v[:613]) for k, v in model.stored[parent]]
    child = model.fork(parent, 650)
    model.truncate(child, 613)
    (fresh,) = model.open()
    model.api.call("AppendKv", list(model.append_messages(fresh, rows, chunk=100)))
    model.grow(fresh, rows)
    layer = model.layer(2, read_only=True)
    one, other = (model.read([handle], [2], opts=INVARIANT, layer=layer) for handle in (child, fresh))
    assert one.raw_out == other.raw_out
