"""Keys and values stored in fp8: what attnd answers is the attention of what the stored values mean."""

import grpc
import ml_dtypes
import numpy as np
import pytest
from attention_oracle import Layer, Model, fp8_meant, options
from attnd_harness import Server, pb

WHOLE, SPREAD = pb.PLACEMENT_ROUND_ROBIN, pb.PLACEMENT_SPREAD
LENGTHS = [0, 1, 15, 16, 17, 64, 65, 511, 513, 1030]


def test_the_server_tells_what_it_stores(fp8, shared_server):
    assert fp8().geometry.kv_dtype == pb.DTYPE_FP8_E4M3
    assert fp8().geometry.dtype == pb.DTYPE_BF16
    for name, dtype in (("bf16", pb.DTYPE_BF16), ("fp32", pb.DTYPE_FP32)):
        assert shared_server(dtype=name).api().info().geometry.kv_dtype == dtype


@pytest.mark.parametrize("placement", [WHOLE, SPREAD], ids=["whole", "spread"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_steps_match_float64_on_the_stored_values(fp8, dtype, placement):
    model = fp8(dtype=dtype)
    handles = model.open_filled(LENGTHS, placement)
    model.step(handles, via="unary", opts=options(return_lse=True))
    model.step(handles, query_lengths=[1 + i % 5 for i in range(len(handles))], via="stream")
    for number in range(model.geometry.layers):
        model.read(handles, number=number, opts=options(return_lse=True))
    model.check_lengths()


OPTIONS = {
    "softcap": {"softcap": 3.0},
    "window": {"sliding_window": 20},
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


@pytest.mark.parametrize("placement", [WHOLE, SPREAD], ids=["whole", "spread"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_the_same_over_fp8(fp8, name, placement):
    model = fp8()
    handles = model.open_filled([0, 1, 16, 50, 65, 513, 1100], placement)
    opts = options(return_lse=True, **OPTIONS[name])
    model.step(handles, [1, 4, 1, 17, 1, 2, 1], opts=opts)
    model.read(handles, [2, 1, 1, 3, 1, 1, 1], opts=opts)


def test_batch_invariant_gives_the_same_bits_alone_in_the_batch_and_spread(fp8):
    opts = options(batch_invariant=True, return_lse=True)
    lengths = [1, 17, 512, 513, 700, 1600]
    wanted = None
    for ranks, placement in ((1, WHOLE), (2, WHOLE), (2, SPREAD), (3, SPREAD)):
        model = fp8(ranks=ranks, seed=5)
        handles = model.open_filled(lengths, placement)
        layer = model.layer(len(lengths), read_only=True)
        together = model.read(handles, opts=opts, layer=layer)
        alone = [
            model.read([handle], opts=opts, layer=Layer(layer.q[i : i + 1])).raw_out for i, handle in enumerate(handles)
        ]
        assert together.raw_out == b"".join(alone)
        wanted = wanted or together.raw_out
        assert together.raw_out == wanted, (ranks, placement)


def test_forks_and_truncations_keep_what_is_stored(fp8):
    model = fp8()
    (parent,) = model.open_filled([100])
    child = model.fork(parent, 90)
    model.step([parent, child])
    model.truncate(child, 37)
    model.step([child, parent], [3, 2])
    model.read([parent, child])


def test_one_scale_for_all(shared_server):
    server = shared_server(dtype="bf16", kv_dtype="fp8_e4m3", k_scale=0.02, v_scale=0.01)
    shape = (Server.DEFAULTS["layers"], Server.DEFAULTS["heads_kv"])
    model = Model(server.api(), k_scales=np.full(shape, 0.02), v_scales=np.full(shape, 0.01))
    handles = model.open_filled([3, 70])
    model.step(handles, opts=options(return_lse=True))


def test_scales_are_1_if_none_are_given(shared_server):
    model = Model(shared_server(dtype="fp16", kv_dtype="fp8_e4m3").api())
    handles = model.open_filled([3, 70])
    model.step(handles, opts=options(return_lse=True))


def test_what_is_too_large_saturates_and_nan_stays(fp8):
    """Of a sequence of one token the output is its value."""
    model = fp8()
    (handle,) = model.open()
    extremes = np.array([np.inf, -np.inf, 3e38, -3e38, np.nan, 0], dtype=ml_dtypes.bfloat16)
    layers = model.layers(1)
    for layer in layers:
        layer.v[..., : len(extremes)] = extremes
    answers = model.step([handle], layers=layers, check=False)
    group = model.geometry.heads_q // model.geometry.heads_kv
    for number, (layer, answer) in enumerate(zip(layers, answers, strict=True)):
        meant = np.repeat(fp8_meant(layer.v, model.v_scales[number]), group, axis=1)
        out = answer.outs[0].astype(np.float64)
        assert np.isfinite(meant[..., :4]).all()
        assert np.isnan(out[..., 4]).all()
        assert (np.delete(out, 4, axis=2) == np.delete(meant, 4, axis=2).astype(model.dtype)).all()


def test_rows_are_never_sent_in_fp8(fp8):
    model = fp8()
    (handle,) = model.open_filled([3])
    request = model.decode_request([handle], None, model.layer(1, read_only=True))
    request.dtype = pb.DTYPE_FP8_E4M3
    error = model.api.error("Decode", request)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "dtype" in error.details() and "bf16" in error.details()
