"""Decode and DecodeStream answer what the float64 oracle says, on every dtype, rank count and placement."""

import pathlib

import numpy as np
import pytest
from attention_oracle import Layer, Model, options
from attnd_harness import pb

PLACEMENTS = {
    "least_tokens": pb.PLACEMENT_LEAST_TOKENS,
    "round_robin": pb.PLACEMENT_ROUND_ROBIN,
    "explicit": pb.PLACEMENT_EXPLICIT,
    "spread": pb.PLACEMENT_SPREAD,
}

# Around page borders, and around those of the 512-token chunks that spread sequences are striped by.
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1030]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_steps_match_float64_on_every_dtype_rank_count_and_placement(shared_server, dtype, ranks, placement):
    model = Model(shared_server(dtype=dtype, ranks=ranks).api(), seed=ranks)
    handles = model.open_filled(LENGTHS, PLACEMENTS[placement], dp_rank=ranks - 1)
    model.step(handles, via="unary", opts=options(return_lse=True))
    model.step(handles, query_lengths=[1 + i % 5 for i in range(len(handles))], via="stream")
    for number in range(model.geometry.layers):
        model.read(handles, number=number, opts=options(return_lse=True))
    model.check_lengths()


@pytest.mark.parametrize("placement", ["least_tokens", "spread"])
@pytest.mark.parametrize("via", ["unary", "stream"])
def test_query_lengths_1_to_128_are_causal_among_the_new_tokens(shared_server, via, placement):
    model = Model(shared_server(ranks=4).api())
    lengths = [0, 5, 16, 100, 500, 510, 700, 1, 0, 33, 1024]
    query_lengths = [128, 1, 2, 3, 7, 8, 16, 17, 31, 100, 127]
    handles = model.open_filled(lengths, PLACEMENTS[placement])
    model.step(handles, query_lengths, via=via, opts=options(return_lse=True))
    model.step(handles, query_lengths[::-1], via=via)
    model.check_lengths()


@pytest.mark.slow
def test_every_query_length_from_1_to_128(shared_server):
    model = Model(shared_server().api())
    handles = model.open(128, pb.PLACEMENT_ROUND_ROBIN)
    model.step(handles, list(range(1, 129)), opts=options(return_lse=True))


OPTIONS = {
    "scale": {"softmax_scale": 0.37},
    "softcap": {"softcap": 3.0},
    "window_of_one": {"sliding_window": 1},
    "window": {"sliding_window": 20},
    "window_longer_than_a_chunk": {"sliding_window": 600},
    "sinks": {"sinks": [0.5, -3.0, 8.0, 0.0]},
    "batch_invariant": {"batch_invariant": True},
    "all_together": {
        "softmax_scale": 0.2,
        "softcap": 5.0,
        "sliding_window": 70,
        "sinks": [1.0, 2.0, -1.0, 3.0],
        "batch_invariant": True,
    },
}


@pytest.mark.parametrize("placement", ["least_tokens", "spread"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_the_contract_says(shared_server, name, placement):
    model = Model(shared_server(ranks=2).api())
    handles = model.open_filled([0, 1, 16, 50, 65, 513, 1100], PLACEMENTS[placement])
    opts = options(return_lse=True, **OPTIONS[name])
    model.step(handles, [1, 4, 1, 17, 1, 2, 1], opts=opts)
    model.read(handles, [2, 1, 1, 3, 1, 1, 1], opts=opts)


GEOMETRIES = {
    "mqa_group_of_16": {"heads_q": 16, "heads_kv": 1, "head_dim": 128, "head_dim_v": 128, "page_size": 64},
    "no_group": {"heads_q": 3, "heads_kv": 3, "head_dim": 32, "head_dim_v": 32, "page_size": 16},
    "group_of_5": {"heads_q": 10, "heads_kv": 2, "head_dim": 40, "head_dim_v": 72, "page_size": 32},
    "group_of_8_widest_heads": {"heads_q": 8, "heads_kv": 1, "head_dim": 256, "head_dim_v": 256, "page_size": 128},
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometries(start_server, geometry, dtype):
    model = Model(start_server(dtype=dtype, pages=128, layers=2, **GEOMETRIES[geometry]).api())
    whole = model.open_filled([0, 1, 127, 128, 129, 600])
    spread = model.open_filled([700, 1200], pb.PLACEMENT_SPREAD)
    model.step(whole + spread, [1, 3, 1, 9, 1, 1, 2, 1], opts=options(return_lse=True))


@pytest.mark.parametrize("backend", [{"backend": "reference"}, {"isa": "portable"}, {"isa": "avx2"}])
def test_other_backends_and_instruction_sets(start_server, backend):
    if backend.get("isa") == "avx2" and " avx2 " not in pathlib.Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no AVX2")
    model = Model(start_server(dtype="bf16", **backend).api())
    handles = model.open_filled([0, 20, 65]) + model.open_filled([600], pb.PLACEMENT_SPREAD)
    model.step(handles, [2, 1, 1, 1], opts=options(return_lse=True))


def test_outputs_come_in_request_order_whatever_the_ranks(shared_server):
    model = Model(shared_server(ranks=4).api())
    handles = model.open_filled([40] * 16, pb.PLACEMENT_ROUND_ROBIN)
    layer = model.layer(16, read_only=True)
    straight = model.read(handles, layer=layer, opts=options(batch_invariant=True))
    for _ in range(5):
        order = model.random.permutation(16)
        shuffled = model.read(
            [handles[i] for i in order], layer=Layer(layer.q[order]), opts=options(batch_invariant=True)
        )
        for place, i in enumerate(order):
            assert shuffled.outs[place].tobytes() == straight.outs[i].tobytes()


def test_a_read_attends_to_any_layer_and_appends_nothing(model):
    handles = model.open_filled([30, 0, 77])
    model.step(handles)
    for number in (1, 0, 1):
        for via in ("unary", "stream"):
            answer = model.read(handles, [3, 2, 1], number=number, via=via, opts=options(return_lse=True))
            assert answer.response.layer == number
    model.check_lengths()


def test_a_unary_read_has_no_step(model):
    (handle,) = model.open_filled([5])
    assert model.read([handle]).response.step == 0


def test_a_read_of_an_empty_sequence_is_zero_with_lse_minus_infinity(model):
    handles = model.open(2)
    answer = model.read(handles, [1, 3], opts=options(return_lse=True))
    for out, lse in zip(answer.outs, answer.lses, strict=True):
        assert (out == 0).all()
        assert np.isneginf(lse).all()


def test_a_sink_on_an_empty_sequence_is_its_lse(model):
    (handle,) = model.open()
    answer = model.read([handle], opts=options(return_lse=True, sinks=[1.5, -2.0, 0.0, 3.0]))
    assert (answer.outs[0] == 0).all()
    assert np.allclose(answer.lses[0], [1.5, -2.0, 0.0, 3.0])


def test_several_reads_of_one_stream_take_layers_in_any_order(model):
    handles = model.open_filled([30, 61])
    with model.api.stream() as stream:
        stream.send(pb.DecodeStreamRequest(begin=model.step_begin(handles, read_only=True)))
        assert stream.receive().out == b""
        for number in (1, 0, 0, 1):
            layer = model.layer(2, read_only=True)
            response = stream.ask(pb.DecodeStreamRequest(layer=number, **layer.fields()))
            out = np.frombuffer(response.out, dtype=model.dtype).reshape(2, model.geometry.heads_q, -1)
            for i, handle in enumerate(handles):
                wanted, _ = model.expected(handle, number, layer.q[i : i + 1], read_only=True)
                assert np.linalg.norm(out[i : i + 1] - wanted) <= 1e-5 * np.linalg.norm(wanted)
            assert response.layer == number and not response.committed
        stream.end()


def test_a_step_announced_alone_is_named_before_its_first_layer(model):
    handles = model.open_filled([9, 2])
    layers = model.layers(2)
    with model.api.stream() as stream:
        named = stream.ask(pb.DecodeStreamRequest(begin=model.step_begin(handles)))
        assert named.step and named.out == b"" and not named.committed
        assert all(info.busy for info in model.api.describe(handles))
        for number, layer in enumerate(layers):
            response = stream.ask(pb.DecodeStreamRequest(layer=number, **layer.fields()))
            assert response.step == named.step
        assert response.committed
        stream.end()
    assert [info.length for info in model.api.describe(handles)] == [10, 3]


def test_a_layers_own_options_replace_those_of_the_step(model):
    (handle,) = model.open_filled([40])
    layers = model.layers(1)
    own = options(sliding_window=4, return_lse=True)
    with model.api.stream() as stream:
        first = stream.ask(
            pb.DecodeStreamRequest(
                begin=model.step_begin([handle], opts=options(softcap=2.0)), layer=0, **layers[0].fields()
            )
        )
        second = stream.ask(pb.DecodeStreamRequest(layer=1, options=own, **layers[1].fields()))
        stream.end()
    assert not first.lse and second.lse
    model.grow(handle, [(layer.k, layer.v) for layer in layers])
    for number, (response, opts) in enumerate([(first, options(softcap=2.0)), (second, own)]):
        out = np.frombuffer(response.out, dtype=model.dtype).reshape(1, model.geometry.heads_q, -1)
        wanted, _ = model.expected(handle, number, layers[number].q, opts)
        assert np.linalg.norm(out - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_an_aborted_step_on_a_stream_leaves_the_stream_usable(model):
    handles = model.open_filled([15, 16])
    with model.api.stream() as stream:
        layer = model.layer(2)
        stream.ask(pb.DecodeStreamRequest(begin=model.step_begin(handles), layer=0, **layer.fields()))
        aborted = stream.ask(pb.DecodeStreamRequest(abort=True))
        assert aborted.out == b"" and not aborted.committed
        model.check_lengths()
        layers = model.layers(2)
        answers = model.step_on(stream, handles, [1, 1], layers)
        stream.end()
    for i, handle in enumerate(handles):
        model.grow(handle, [(layer.k[i : i + 1], layer.v[i : i + 1]) for layer in layers])
    for number, (layer, answer) in enumerate(zip(layers, answers, strict=True)):
        model.check(handles, [1, 1], number, layer, answer)


def test_an_aborted_unary_step_leaves_lengths_and_pages(model):
    (handle,) = model.open_filled([16])
    free = [rank.pages_free for rank in model.api.info().ranks]
    response = model.api.call("Decode", model.decode_request([handle], [40], model.layer(40)))
    assert response.step and not response.committed
    model.api.abort(response.step)
    model.check_lengths()
    assert [rank.pages_free for rank in model.api.info().ranks] == free
    model.step([handle])


def test_later_layers_of_a_unary_step_may_leave_out_the_sequences(model):
    handles = model.open_filled([3, 4])
    layers = model.layers(2)
    first = model.api.call("Decode", model.decode_request(handles, None, layers[0]))
    second = model.api.call("Decode", pb.DecodeRequest(step=first.step, layer=1, **layers[1].fields()))
    assert second.committed and second.step == first.step
    assert [info.length for info in model.api.describe(handles)] == [4, 5]


@pytest.mark.parametrize("placement", ["round_robin", "spread"])
def test_timing_is_returned_for_the_ranks_that_had_work_and_no_others(shared_server, placement):
    model = Model(shared_server(ranks=4).api())
    handles = model.open_filled([2100, 300] if placement == "spread" else [100, 200, 300], PLACEMENTS[placement])
    homes = [info.dp_rank for info in model.api.describe(handles)]
    for via in ("unary", "stream"):
        answer = model.read(handles, via=via, opts=options(return_timing=True))
        timing = answer.response.timing
        ranks = [one.rank for one in timing]
        assert len(set(ranks)) == len(ranks)
        if placement == "spread":
            assert set(ranks) == {0, 1, 2, 3}
        else:
            assert set(ranks) == set(homes)
            assert sum(one.sequences for one in timing) == len(handles)
        assert sum(one.tokens for one in timing) == sum(model.length(handle) for handle in handles)
        for one in timing:
            parts = [one.queue_us, one.copy_in_us, one.plan_us, one.attention_us, one.combine_us, one.copy_out_us]
            assert all(0 <= part < 60e6 for part in parts)
            assert one.attention_us > 0
            assert one.merged_calls >= 1
    assert not model.read(handles).response.timing


def test_1024_sequences_in_one_step(shared_server):
    model = Model(shared_server(ranks=4).api())
    handles = model.open(1024, pb.PLACEMENT_ROUND_ROBIN)
    model.step(handles, check=False)
    layers = model.layers(1024)
    answers = model.step(handles, layers=layers, check=False)
    for i in (0, 1, 511, 512, 1022, 1023):
        for number, (layer, answer) in enumerate(zip(layers, answers, strict=True)):
            wanted, _ = model.expected(handles[i], number, layer.q[i : i + 1])
            assert np.linalg.norm(answer.outs[i] - wanted) <= 1e-5 * np.linalg.norm(wanted)
    model.check_lengths()


def test_a_long_stream_of_steps(model):
    handles = model.open_filled([3, 14, 60])
    layers_of_steps = [model.layers(3) for _ in range(200)]
    with model.api.stream() as stream:
        for step, layers in enumerate(layers_of_steps):
            answers = model.step_on(stream, handles, [1, 1, 1], layers)
            for i, handle in enumerate(handles):
                model.grow(handle, [(layer.k[i : i + 1], layer.v[i : i + 1]) for layer in layers])
            if step % 20 == 19:
                for number, (layer, answer) in enumerate(zip(layers, answers, strict=True)):
                    model.check(handles, [1, 1, 1], number, layer, answer)
        stream.end()
    model.check_lengths()


def test_steps_pipelined_on_one_stream_before_any_answer_is_read(model):
    handles = model.open_filled([7, 20])
    with model.api.stream() as stream:
        sent = []
        for _ in range(10):
            layers = model.layers(2)
            sent.append(layers)
            for number, layer in enumerate(layers):
                request = pb.DecodeStreamRequest(layer=number, **layer.fields())
                if number == 0:
                    request.begin.CopyFrom(model.step_begin(handles))
                stream.send(request)
        for layers in sent:
            answers = model._answers([stream.receive() for _ in layers], [1, 1])
            for i, handle in enumerate(handles):
                model.grow(handle, [(layer.k[i : i + 1], layer.v[i : i + 1]) for layer in layers])
            for number, (layer, answer) in enumerate(zip(layers, answers, strict=True)):
                model.check(handles, [1, 1], number, layer, answer)
        stream.end()
    model.check_lengths()
