"""What attnd must answer, in float64, written from the contract and not from the engine.

`attend` is the mathematics of one sequence. `Model` drives a server and mirrors every key and
value it ever sent, so that each answer can be compared with what the stored values say.

Shapes: h = heads_q, g = heads_kv, d = head_dim, e = head_dim_v;
q [rows, h, d], k [tokens, g, d], v [tokens, g, e], out [rows, h, e], lse [rows, h].
"""

import itertools
import math

import ml_dtypes
import numpy as np
from attnd_harness import pb

NUMPY_TYPES = {
    pb.DTYPE_BF16: np.dtype(ml_dtypes.bfloat16),
    pb.DTYPE_FP16: np.dtype(np.float16),
    pb.DTYPE_FP32: np.dtype(np.float32),
}

# ||out - reference|| / ||reference||, on the stored values. Each is a small multiple of what rounding the
# output to the type costs by itself; the largest absolute error of an LSE, float32 in every type, is LSE_BOUND.
OUT_BOUND = {pb.DTYPE_BF16: 2.5e-3, pb.DTYPE_FP16: 5e-4, pb.DTYPE_FP32: 1e-5}
LSE_BOUND = 1e-4

# Over keys and values stored in fp8, OUT_BOUND times this: room for one more rounding to the type.
FP8_MARGIN = 1.6


def fp8_meant(rows, scales):
    """What rows [tokens, g, d] mean once they are stored in fp8 with a scale [g] for each head: float64."""
    scales = np.asarray(scales, dtype=np.float32)[None, :, None]
    with np.errstate(over="ignore"):
        scaled = np.asarray(rows, dtype=np.float32) / scales  # in float32, as the contract has it
    stored = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return stored.astype(np.float64) * scales.astype(np.float64)


def attend(q, k, v, scale, softcap=0.0, window=0, sinks=None, read_only=False):
    """Attention of the last `rows` tokens (or, read-only, of the end) over all of k and v: (out, lse), float64."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    rows, heads_q, _ = q.shape
    length, heads_kv, _ = k.shape
    group = heads_q // heads_kv
    positions = np.full(rows, length - 1) if read_only else np.arange(length - rows, length)
    # One matrix product a KV head: [rows * group, d] with [d, tokens], and back with [tokens, e].
    by_head = q.reshape(rows, heads_kv, group, -1).transpose(1, 0, 2, 3).reshape(heads_kv, rows * group, -1)
    scores = by_head @ k.transpose(1, 2, 0) * scale
    if softcap > 0:
        scores = softcap * np.tanh(scores / softcap)
    tokens = np.arange(length)
    visible = tokens[None, :] <= positions[:, None]
    if window:
        visible &= tokens[None, :] > positions[:, None] - window
    scores = scores.reshape(heads_kv, rows, group, length).transpose(1, 0, 2, 3)
    scores = np.where(visible[:, None, None, :], scores, -np.inf).reshape(rows, heads_q, length)
    if sinks is not None:
        column = np.broadcast_to(np.asarray(sinks, dtype=np.float64)[None, :, None], (rows, heads_q, 1))
        lse = _log_sum_exp(np.concatenate([scores, column], axis=2))
    else:
        lse = _log_sum_exp(scores)
    with np.errstate(invalid="ignore"):
        weights = np.where(np.isneginf(scores), 0.0, np.exp(scores - lse[:, :, None]))
    weights = weights.reshape(rows, heads_kv, group, length).transpose(1, 0, 2, 3)
    by_head = weights.reshape(heads_kv, rows * group, length)
    out = (by_head @ v.transpose(1, 0, 2)).reshape(heads_kv, rows, group, v.shape[2]).transpose(1, 0, 2, 3)
    return out.reshape(rows, heads_q, v.shape[2]), lse


def _log_sum_exp(scores):
    if scores.shape[2] == 0:
        return np.full(scores.shape[:2], -np.inf)
    top = scores.max(axis=2)
    safe = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(scores - safe[:, :, None]).sum(axis=2)) + safe


def options(**given):
    return pb.AttentionOptions(**given)


class Answer:
    """One layer's outputs, split by sequence: outs[i] [rows, h, e], lses[i] [rows, h] or None."""

    def __init__(self, model, response, query_lengths):
        self.response = response
        self.raw_out = response.out
        geometry = model.geometry
        tokens = sum(query_lengths)
        out = np.frombuffer(response.out, dtype=model.dtype).reshape(tokens, geometry.heads_q, geometry.head_dim_v)
        borders = np.cumsum([0, *query_lengths])
        self.outs = [out[a:b] for a, b in itertools.pairwise(borders)]
        self.lses = None
        if response.lse:
            lse = np.frombuffer(response.lse, dtype=np.float32).reshape(tokens, geometry.heads_q)
            self.lses = [lse[a:b] for a, b in itertools.pairwise(borders)]


class Layer:
    """The tensors of one layer of one step, as sent: q, k, v [tokens, ...]."""

    def __init__(self, q, k=None, v=None):
        self.q, self.k, self.v = q, k, v

    def fields(self):
        fields = {"q": self.q.tobytes()}
        if self.k is not None:
            fields.update(k=self.k.tobytes(), v=self.v.tobytes())
        return fields


class Model:
    """A frontend with a memory: drives a server through `api` and knows what every sequence holds.

    Of a server that stores fp8, k_scales and v_scales [layers, g] are what it was configured with; None: 1.
    """

    def __init__(self, api, seed=0, k_scales=None, v_scales=None):
        self.api = api
        self.geometry = api.info().geometry
        self.dtype = NUMPY_TYPES[self.geometry.dtype]
        self.is_fp8 = self.geometry.kv_dtype == pb.DTYPE_FP8_E4M3
        self.out_bound = OUT_BOUND[self.geometry.dtype] * (FP8_MARGIN if self.is_fp8 else 1)
        ones = np.ones((self.geometry.layers, self.geometry.heads_kv))
        self.k_scales = ones if k_scales is None else k_scales
        self.v_scales = ones if v_scales is None else v_scales
        self.random = np.random.default_rng(seed)
        self.stored = {}  # handle -> [(k, v)] a layer

    # Tensors

    def tensor(self, *shape):
        return self.random.uniform(-2, 2, shape).astype(np.float32).astype(self.dtype)

    def queries(self, tokens):
        return self.tensor(tokens, self.geometry.heads_q, self.geometry.head_dim)

    def keys(self, tokens):
        return self.tensor(tokens, self.geometry.heads_kv, self.geometry.head_dim)

    def values(self, tokens):
        return self.tensor(tokens, self.geometry.heads_kv, self.geometry.head_dim_v)

    def layer(self, tokens, read_only=False):
        return (
            Layer(self.queries(tokens))
            if read_only
            else Layer(self.queries(tokens), self.keys(tokens), self.values(tokens))
        )

    def layers(self, tokens):
        return [self.layer(tokens) for _ in range(self.geometry.layers)]

    # Sequences

    def open(self, count=1, placement=0, dp_rank=0):
        handles = self.api.open(count, placement, dp_rank)
        for handle in handles:
            self.stored[handle] = [(self.keys(0), self.values(0)) for _ in range(self.geometry.layers)]
        return handles

    def open_filled(self, lengths, placement=0, dp_rank=0):
        """Sequences of the given lengths, filled by AppendKv."""
        handles = self.open(len(lengths), placement, dp_rank)
        for handle, length in zip(handles, lengths, strict=True):
            if length:
                self.append(handle, length)
        return handles

    def length_that_takes(self, seconds, rows):
        """How many tokens a call of `rows` queries must attend to to take about so long, on this build and machine."""
        probe = 512
        handles = self.open_filled([probe])
        answer = self.read(handles, [rows], opts=options(return_timing=True), check=False)
        self.close(handles)
        took = sum(rank.attention_us for rank in answer.response.timing) / 1e6
        return int(min(max(probe, probe * seconds / took), 10000))

    def fork(self, handle, length):
        child = self.api.fork(handle, length)
        self.stored[child] = [(k[:length], v[:length]) for k, v in self.stored[handle]]
        return child

    def truncate(self, handle, length):
        assert self.api.truncate(handle, length) == length
        self.stored[handle] = [(k[:length], v[:length]) for k, v in self.stored[handle]]

    def close(self, handles):
        self.api.close_sequences(handles)
        for handle in handles:
            del self.stored[handle]

    def length(self, handle):
        return len(self.stored[handle][0][0])

    def check_lengths(self, handles=None):
        """The server's idea of every length is the mirror's, and nothing is busy."""
        handles = list(self.stored) if handles is None else handles
        for info in self.api.describe(handles):
            assert info.length == self.length(info.sequence)
            assert not info.busy

    def grow(self, handle, rows):
        """Mirrors what a committed step or upload added: rows [(k, v)] a layer."""
        self.stored[handle] = [
            (np.concatenate([k, new_k]), np.concatenate([v, new_v]))
            for (k, v), (new_k, new_v) in zip(self.stored[handle], rows, strict=True)
        ]

    # Uploads

    def append_messages(self, handle, rows, chunk=None, layer_order=None):
        tokens = len(rows[0][0])
        chunk = chunk or tokens
        yield pb.AppendKvRequest(begin=pb.AppendKvBegin(sequence=handle, tokens=tokens, dtype=self.geometry.dtype))
        for layer in layer_order or range(len(rows)):
            k, v = rows[layer]
            for start in range(0, tokens, chunk):
                stop = min(start + chunk, tokens)
                yield pb.AppendKvRequest(
                    layer=layer,
                    token_offset=start,
                    tokens=stop - start,
                    k=k[start:stop].tobytes(),
                    v=v[start:stop].tobytes(),
                )

    def rows(self, tokens):
        return [(self.keys(tokens), self.values(tokens)) for _ in range(self.geometry.layers)]

    def append(self, handle, tokens, **how):
        rows = self.rows(tokens)
        response = self.api.call("AppendKv", list(self.append_messages(handle, rows, **how)))
        self.grow(handle, rows)
        assert response.length == self.length(handle)

    # Steps

    def step(self, handles, query_lengths=None, via="stream", opts=None, layers=None, check=True):
        """Runs and commits one step: an Answer a layer, each compared with the oracle."""
        lengths = list(query_lengths or [1] * len(handles))
        layers = layers or self.layers(sum(lengths))
        run = self._step_on_stream if via == "stream" else self._step_by_unary_calls
        answers = run(handles, lengths, layers, opts)
        borders = np.cumsum([0, *lengths])
        for i, handle in enumerate(handles):
            piece = slice(borders[i], borders[i + 1])
            self.grow(handle, [(layer.k[piece], layer.v[piece]) for layer in layers])
        if check:
            for number, (layer, answer) in enumerate(zip(layers, answers, strict=True)):
                self.check(handles, lengths, number, layer, answer, opts)
        return answers

    def _step_on_stream(self, handles, lengths, layers, opts):
        with self.api.stream() as stream:
            answers = self.step_on(stream, handles, lengths, layers, opts)
            stream.end()
        return answers

    def step_on(self, stream, handles, lengths, layers, opts=None):
        """One step on an open stream, all layers sent before the first answer is read. Mirrors nothing."""
        for number, layer in enumerate(layers):
            request = pb.DecodeStreamRequest(layer=number, **layer.fields())
            if number == 0:
                request.begin.CopyFrom(self.step_begin(handles, lengths, opts))
            stream.send(request)
        responses = [stream.receive() for _ in layers]
        assert len({response.step for response in responses}) == 1 and responses[0].step
        return self._answers(responses, lengths)

    def _answers(self, responses, lengths):
        last = len(responses) - 1
        assert [response.layer for response in responses] == list(range(len(responses)))
        assert [response.committed for response in responses] == [number == last for number in range(len(responses))]
        return [Answer(self, response, lengths) for response in responses]

    def step_begin(self, handles, lengths=None, opts=None, **more):
        return pb.StepBegin(
            sequences=handles, query_lengths=lengths or [], options=opts, dtype=self.geometry.dtype, **more
        )

    def _step_by_unary_calls(self, handles, lengths, layers, opts):
        responses = []
        for number, layer in enumerate(layers):
            request = self.decode_request(handles, lengths, layer, number, opts)
            request.step = responses[0].step if responses else 0
            responses.append(self.api.call("Decode", request))
        return self._answers(responses, lengths)

    def decode_request(self, handles, lengths, layer, number=0, opts=None):
        return pb.DecodeRequest(
            layer=number,
            sequences=handles,
            query_lengths=lengths or [],
            options=opts,
            dtype=self.geometry.dtype,
            **layer.fields(),
        )

    def read(self, handles, query_lengths=None, number=0, via="unary", opts=None, layer=None, check=True):
        """Queries that append nothing, on one layer: an Answer, compared with the oracle."""
        lengths = list(query_lengths or [1] * len(handles))
        layer = layer or self.layer(sum(lengths), read_only=True)
        if via == "unary":
            response = self.api.call("Decode", self.decode_request(handles, lengths, layer, number, opts))
        else:
            with self.api.stream() as stream:
                begin = self.step_begin(handles, lengths, opts, read_only=True)
                response = stream.ask(pb.DecodeStreamRequest(begin=begin, layer=number, **layer.fields()))
                stream.end()
        assert not response.committed
        answer = Answer(self, response, lengths)
        if check:
            self.check(handles, lengths, number, layer, answer, opts, read_only=True)
        return answer

    # Comparison

    def expected(self, handle, number, q, opts=None, length=None, read_only=False):
        k, v = (x[:length] for x in self.stored[handle][number])
        if self.is_fp8:
            k, v = fp8_meant(k, self.k_scales[number]), fp8_meant(v, self.v_scales[number])
        opts = opts or pb.AttentionOptions()
        return attend(
            q,
            k,
            v,
            scale=opts.softmax_scale or 1 / math.sqrt(self.geometry.head_dim),
            softcap=opts.softcap,
            window=opts.sliding_window,
            sinks=list(opts.sinks) or None,
            read_only=read_only,
        )

    def check(self, handles, lengths, number, layer, answer, opts=None, read_only=False):
        """Every row of a layer's answer against the oracle, after the step's rows were mirrored."""
        wanted, got, start = [], [], 0
        for i, handle in enumerate(handles):
            q = layer.q[start : start + lengths[i]]
            start += lengths[i]
            out, lse = self.expected(handle, number, q, opts, read_only=read_only)
            wanted.append(out)
            got.append(answer.outs[i].astype(np.float64))
            check_out(got[-1], out, 2 * self.out_bound, f"sequences[{i}], layer {number}")
            if opts is not None and opts.return_lse:
                check_lse(answer.lses[i], lse, f"sequences[{i}], layer {number}")
        if opts is None or not opts.return_lse:
            assert answer.lses is None, "an LSE that nobody asked for"
        check_out(np.concatenate(got), np.concatenate(wanted), self.out_bound, f"layer {number}")


def check_out(got, wanted, bound, what):
    assert np.isfinite(got).all(), f"{what}: output is not finite"
    norm = np.linalg.norm(wanted)
    error = np.linalg.norm(got - wanted)
    assert error <= bound * norm, f"{what}: relative error {error / norm if norm else math.inf:.3g} > {bound:.3g}"


def check_lse(got, wanted, what):
    empty = np.isneginf(wanted)
    assert (np.isneginf(got) == empty).all(), f"{what}: LSE -inf in the wrong places"
    error = np.abs(got[~empty].astype(np.float64) - wanted[~empty]).max(initial=0.0)
    assert error <= LSE_BOUND, f"{what}: LSE error {error:.3g} > {LSE_BOUND:.3g}"
