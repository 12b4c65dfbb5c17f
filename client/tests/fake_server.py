"""An attnd server in plain Python: the whole protocol over a numpy attention in float64.

It serves the client's own tests where no server binary is at hand, and as an oracle that shares no code with the
server. `fail` makes calls fail in chosen ways. Slow, and checks no more than the tests need.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, Callable

import grpc
import ml_dtypes
import numpy as np

from attnd._proto import attnd_pb2 as pb
from attnd._proto import attnd_pb2_grpc as pb_grpc

DTYPES = {pb.DTYPE_BF16: ml_dtypes.bfloat16, pb.DTYPE_FP16: np.float16, pb.DTYPE_FP32: np.float32}

Status = grpc.StatusCode


def attention(q: Any, k: Any, v: Any, first_position: int | None, options: pb.AttentionOptions) -> tuple[Any, Any]:
    """Attention of one sequence in float64: (out [rows, heads_q, head_dim_v], lse [rows, heads_q]).

    Query row r is at first_position + r; None: all at the last position (a read).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows, heads_q, head_dim = q.shape
    group = heads_q // k.shape[1]
    scale = options.softmax_scale or 1 / np.sqrt(head_dim)
    out = np.zeros((rows, heads_q, v.shape[2]))
    lse = np.full((rows, heads_q), -np.inf)
    for row in range(rows):
        position = len(k) - 1 if first_position is None else first_position + row
        start = max(0, position - options.sliding_window + 1) if options.sliding_window else 0
        for head in range(heads_q):
            scores = k[start : position + 1, head // group] @ q[row, head] * scale
            if options.softcap:
                scores = options.softcap * np.tanh(scores / options.softcap)
            logits = np.append(scores, options.sinks[head]) if options.sinks else scores
            if len(logits) == 0:
                continue
            largest = logits.max()
            lse[row, head] = largest + np.log(np.exp(logits - largest).sum())
            out[row, head] = np.exp(scores - lse[row, head]) @ v[start : position + 1, head // group]
    return out, lse


class Refusal(Exception):
    """A status to end a call with."""

    def __init__(self, code: Status, message: str, pushback_ms: int | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.pushback_ms = code, message, pushback_ms


@dataclass
class Held:
    """A sequence: K and V by layer."""

    k: list[Any]
    v: list[Any]
    rank: int
    spread: bool
    busy: bool = False

    @property
    def length(self) -> int:
        return len(self.k[0])


@dataclass
class Step:
    sequences: list[Held]
    query_lengths: list[int]
    options: pb.AttentionOptions
    read_only: bool
    id: int = field(default_factory=lambda: secrets.randbits(63) | 1)
    next_layer: int = 0
    fresh: list[Any] = field(default_factory=list)  # [layer][sequence] (k, v) not yet committed


@dataclass
class Fault:
    method: str
    refusal: Refusal
    times: int
    layer: int | None  # only at this layer
    afterwards: bool  # do the work first, then fail
    delay: float


class FakeServer(pb_grpc.AttentionServicer):
    """Use it as a context manager; `address` is where it listens."""

    def __init__(
        self,
        *,
        layers: int = 2,
        heads_q: int = 4,
        heads_kv: int = 2,
        head_dim: int = 16,
        head_dim_v: int = 24,
        dtype: pb.DType = pb.DTYPE_FP32,
        ranks: int = 2,
        message_bytes: int = 1 << 20,
        batch: int = 1024,
        query_length: int = 128,
        token: str | None = None,
        tokens_elsewhere: int = 0,
        max_sequences: int = 4096,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.geometry = pb.Geometry(
            layers=layers,
            heads_q=heads_q,
            heads_kv=heads_kv,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=dtype,
            page_size=16,
        )
        self.dtype = DTYPES[dtype]
        self.ranks = ranks
        self.limits = pb.Limits(
            message_bytes=message_bytes,
            batch=batch,
            query_length=query_length,
            sequences=max_sequences,
            sequence_tokens=1 << 20,
            step_idle_ms=1000,
        )
        self.token = token
        self.tokens_elsewhere = tokens_elsewhere  # load that others put on this server
        self.draining = False
        self.sequences: dict[int, Held] = {}
        self.steps: dict[int, Step] = {}
        self.calls: list[str] = []  # method names, in order of arrival; a stream's messages as "DecodeStream.message"
        self.faults: list[Fault] = []
        self.export_chunk = 100  # tokens a response of ExportKv
        self.tamper: Callable[[list[Any]], Iterable[Any]] = lambda responses: responses  # with those of an ExportKv
        self._lock = threading.RLock()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(32), options=[("grpc.max_receive_message_length", message_bytes)]
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{self.port}"

    def _handlers(self) -> Any:
        servicer = pb_grpc.AttentionServicer

        def unary(name: str, request: Any) -> Any:
            def call(message: Any, context: Any) -> Any:
                return self._guard(name, context, lambda: getattr(self, name)(message))

            return grpc.unary_unary_rpc_method_handler(call, request.FromString, lambda m: m.SerializeToString())

        def append(messages: Any, context: Any) -> Any:
            return self._guard("AppendKv", context, lambda: self.AppendKv(messages))

        streamed = ("AppendKv", "ExportKv", "DecodeStream")
        names = [n for n in vars(servicer) if n[0].isupper() and n not in streamed]
        methods = {name: unary(name, getattr(pb, f"{name}Request")) for name in names}
        encode = lambda message: message.SerializeToString()  # noqa: E731
        methods["AppendKv"] = grpc.stream_unary_rpc_method_handler(append, pb.AppendKvRequest.FromString, encode)
        methods["ExportKv"] = grpc.unary_stream_rpc_method_handler(self._export, pb.ExportKvRequest.FromString, encode)
        methods["DecodeStream"] = grpc.stream_stream_rpc_method_handler(
            self._decode_stream, pb.DecodeStreamRequest.FromString, encode
        )
        return grpc.method_handlers_generic_handler("attnd.v1.Attention", methods)

    def __enter__(self) -> FakeServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server and every call at once."""
        self._server.stop(None).wait(5)

    # -- Faults

    def fail(
        self,
        method: str,
        code: Status,
        message: str = "told to fail",
        *,
        pushback_ms: int | None = None,
        times: int = 1,
        layer: int | None = None,
        afterwards: bool = False,
        delay: float = 0,
    ) -> None:
        """The next `times` calls of `method` (messages of a DecodeStream, of `layer`) fail so."""
        self.faults.append(Fault(method, Refusal(code, message, pushback_ms), times, layer, afterwards, delay))

    def _fault(self, method: str, layer: int | None, afterwards: bool) -> None:
        with self._lock:
            for fault in self.faults:
                matches = fault.method == method and fault.layer in (None, layer) and fault.afterwards == afterwards
                if matches and fault.times > 0:
                    fault.times -= 1
                    break
            else:
                return
        time.sleep(fault.delay)
        if fault.refusal.code is not Status.OK:
            raise fault.refusal

    def _guard(self, method: str, context: Any, work: Any) -> Any:
        self.calls.append(method)
        try:
            self._authenticate(context)
            self._fault(method, None, False)
            with self._lock:
                response = work()
            self._fault(method, None, True)
            return response
        except Refusal as refusal:
            self._end(context, refusal)

    def _authenticate(self, context: Any) -> None:
        given = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and given is None:
            raise Refusal(Status.UNAUTHENTICATED, "no credentials")
        if self.token is not None and given != f"Bearer {self.token}":
            raise Refusal(Status.PERMISSION_DENIED, "wrong credentials")

    def _end(self, context: Any, refusal: Refusal) -> None:
        if refusal.pushback_ms is not None:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", str(refusal.pushback_ms)),))
        context.abort(refusal.code, refusal.message)

    # -- Calls

    def GetServerInfo(self, request: Any) -> Any:
        ranks = [
            pb.RankInfo(
                rank=rank,
                state=pb.RANK_STATE_SERVING,
                device="fake",
                sequences=sum(s.rank == rank for s in self.sequences.values()),
                tokens=self._tokens(rank) + (self.tokens_elsewhere if rank == 0 else 0),
                pages_total=1000,
                pages_free=1000,
            )
            for rank in range(self.ranks)
        ]
        return pb.GetServerInfoResponse(
            version="fake",
            instance="1",
            backend="reference",
            backend_detail="numpy",
            geometry=self.geometry,
            ranks=ranks,
            limits=self.limits,
            uptime_ms=1500,
            draining=self.draining,
        )

    def _tokens(self, rank: int) -> int:
        return sum(s.length for s in self.sequences.values() if s.rank == rank)

    def OpenSequences(self, request: Any) -> Any:
        if self.draining:
            raise Refusal(Status.UNAVAILABLE, "draining")
        if len(self.sequences) + request.count > self.limits.sequences:
            raise Refusal(Status.RESOURCE_EXHAUSTED, "count: no room", None)
        if request.placement == pb.PLACEMENT_EXPLICIT and request.dp_rank >= self.ranks:
            raise Refusal(Status.INVALID_ARGUMENT, f"dp_rank: {request.dp_rank}, expected 0 to {self.ranks - 1}")
        g, response = self.geometry, pb.OpenSequencesResponse()
        for _ in range(request.count):
            rank = request.dp_rank
            if request.placement != pb.PLACEMENT_EXPLICIT:
                counts = [sum(s.rank == r for s in self.sequences.values()) for r in range(self.ranks)]
                rank = min(range(self.ranks), key=lambda r: (self._tokens(r), counts[r]))
            handle = secrets.randbits(63) | 1
            self.sequences[handle] = Held(
                [np.zeros((0, g.heads_kv, g.head_dim), self.dtype)] * g.layers,
                [np.zeros((0, g.heads_kv, g.head_dim_v), self.dtype)] * g.layers,
                rank,
                request.placement == pb.PLACEMENT_SPREAD,
            )
            response.sequences.append(handle)
            response.dp_ranks.append(rank)
        return response

    def _find(self, handles: Any) -> list[Held]:
        for index, handle in enumerate(handles):
            if handle not in self.sequences:
                raise Refusal(Status.NOT_FOUND, f"sequences[{index}]: unknown handle")
        return [self.sequences[handle] for handle in handles]

    def ForkSequence(self, request: Any) -> Any:
        [parent] = self._find([request.sequence])
        if request.length > parent.length:
            raise Refusal(Status.INVALID_ARGUMENT, f"length: {request.length}, expected at most {parent.length}")
        handle = secrets.randbits(63) | 1
        self.sequences[handle] = Held(
            [k[: request.length] for k in parent.k], [v[: request.length] for v in parent.v], parent.rank, parent.spread
        )
        return pb.ForkSequenceResponse(sequence=handle, dp_rank=parent.rank)

    def TruncateSequence(self, request: Any) -> Any:
        [held] = self._find([request.sequence])
        if request.length > held.length:
            raise Refusal(Status.INVALID_ARGUMENT, f"length: {request.length}, expected at most {held.length}")
        held.k = [k[: request.length] for k in held.k]
        held.v = [v[: request.length] for v in held.v]
        return pb.TruncateSequenceResponse(length=request.length)

    def MoveSequence(self, request: Any) -> Any:
        [held] = self._find([request.sequence])
        if held.spread:
            raise Refusal(Status.FAILED_PRECONDITION, "sequence: spread over all ranks")
        if request.dp_rank >= self.ranks:
            raise Refusal(Status.INVALID_ARGUMENT, f"dp_rank: {request.dp_rank}, expected 0 to {self.ranks - 1}")
        stays = not request.spread and held.rank == request.dp_rank
        held.spread, held.rank = request.spread, held.rank if request.spread else request.dp_rank
        return pb.MoveSequenceResponse(tokens=0 if stays else held.length)

    def CloseSequences(self, request: Any) -> Any:
        self._find(request.sequences)
        for handle in request.sequences:
            del self.sequences[handle]
        return pb.CloseSequencesResponse()

    def DescribeSequences(self, request: Any) -> Any:
        infos = [
            pb.SequenceInfo(
                sequence=handle,
                length=held.length,
                dp_rank=held.rank,
                spread=held.spread,
                pages=-(-held.length // 16),
                busy=held.busy,
            )
            for handle, held in zip(request.sequences, self._find(request.sequences))
        ]
        return pb.DescribeSequencesResponse(sequences=infos)

    def _array(self, name: str, data: bytes, rows: int, heads: int, dim: int) -> Any:
        expected = rows * heads * dim * np.dtype(self.dtype).itemsize
        if len(data) != expected:
            raise Refusal(Status.INVALID_ARGUMENT, f"{name}: {len(data)} bytes, expected {expected}")
        return np.frombuffer(data, self.dtype).reshape(rows, heads, dim)

    def AppendKv(self, messages: Iterator[Any]) -> Any:
        g = self.geometry
        held, total, parts = None, 0, [[] for _ in range(g.layers)]
        for message in messages:
            if message.HasField("begin"):
                [held], total = self._find([message.begin.sequence]), message.begin.tokens
            if message.tokens:
                layer = parts[message.layer]
                if message.token_offset != sum(len(k) for k, _ in layer):
                    raise Refusal(Status.INVALID_ARGUMENT, f"token_offset: {message.token_offset}, out of order")
                k = self._array("k", message.k, message.tokens, g.heads_kv, g.head_dim)
                v = self._array("v", message.v, message.tokens, g.heads_kv, g.head_dim_v)
                layer.append((k, v))
        for index, layer in enumerate(parts):
            if held is None or sum(len(k) for k, _ in layer) != total:
                raise Refusal(Status.INVALID_ARGUMENT, f"layer: {index} is not complete")
        held.k = [np.concatenate([old, *(k for k, _ in layer)]) for old, layer in zip(held.k, parts)]
        held.v = [np.concatenate([old, *(v for _, v in layer)]) for old, layer in zip(held.v, parts)]
        return pb.AppendKvResponse(length=held.length)

    def ExportKv(self, request: Any) -> Any:
        if request.sequence not in self.sequences:
            raise Refusal(Status.NOT_FOUND, "sequence: unknown, closed or not yours")
        held, position, code = self.sequences[request.sequence], request.position, self.geometry.dtype
        if position > held.length:
            raise Refusal(Status.INVALID_ARGUMENT, f"position: {position}, expected at most {held.length}")
        total = request.tokens or held.length - position
        if position + total > held.length:
            raise Refusal(Status.INVALID_ARGUMENT, f"tokens: {total}, expected at most {held.length - position}")
        if total == 0:
            return [pb.ExportKvResponse(dtype=code)]
        responses = []
        for layer, (k, v) in enumerate(zip(held.k, held.v)):
            for offset in range(0, total, self.export_chunk):
                tokens = min(self.export_chunk, total - offset)
                some = slice(position + offset, position + offset + tokens)
                responses.append(
                    pb.ExportKvResponse(
                        total=total,
                        dtype=code,
                        layer=layer,
                        token_offset=offset,
                        tokens=tokens,
                        k=k[some].tobytes(),
                        v=v[some].tobytes(),
                    )
                )
        return responses

    def _export(self, request: Any, context: Any) -> Iterator[Any]:
        responses = self._guard("ExportKv", context, lambda: self.ExportKv(request))
        yield from self.tamper(responses)
        try:
            self._fault("ExportKv.end", None, False)
        except Refusal as refusal:
            self._end(context, refusal)

    # -- Steps

    def _begin(self, handles: Any, query_lengths: Any, options: Any, read_only: bool) -> Step:
        sequences = self._find(handles)
        lengths = list(query_lengths) or [1] * len(sequences)
        if not read_only:
            for index, held in enumerate(sequences):
                if held.busy:
                    raise Refusal(Status.ABORTED, f"sequences[{index}]: in another step")
            for held in sequences:
                held.busy = True
        step = Step(sequences, lengths, options, read_only)
        if not read_only:
            self.steps[step.id] = step
        return step

    def _drop(self, step: Step) -> None:
        self.steps.pop(step.id, None)
        for held in step.sequences:
            held.busy = held.busy and step.read_only

    def _layer(self, step: Step, layer: int, request: Any, options: Any) -> Any:
        """One layer of a step or read."""
        g, rows = self.geometry, sum(step.query_lengths)
        if not step.read_only and layer != step.next_layer:
            raise Refusal(Status.INVALID_ARGUMENT, f"layer: {layer}, expected {step.next_layer}")
        q = self._array("q", request.q, rows, g.heads_q, g.head_dim)
        if not step.read_only:
            new_k = self._array("k", request.k, rows, g.heads_kv, g.head_dim)
            new_v = self._array("v", request.v, rows, g.heads_kv, g.head_dim_v)
            step.fresh.append([])
        outs, lses, row = [], [], 0
        for held, length in zip(step.sequences, step.query_lengths):
            k, v, some = held.k[layer], held.v[layer], slice(row, row + length)
            if not step.read_only:
                k, v = np.concatenate([k, new_k[some]]), np.concatenate([v, new_v[some]])
                step.fresh[-1].append((k, v))
            out, lse = attention(q[some], k, v, None if step.read_only else held.length, options)
            outs.append(out)
            lses.append(lse)
            row += length
        step.next_layer = layer + 1
        committed = not step.read_only and step.next_layer == g.layers
        if committed:
            for index, held in enumerate(step.sequences):
                held.k = [layer[index][0] for layer in step.fresh]
                held.v = [layer[index][1] for layer in step.fresh]
            self._drop(step)
        response = pb.DecodeResponse(
            step=0 if step.read_only else step.id,
            layer=layer,
            committed=committed,
            out=np.concatenate(outs).astype(self.dtype).tobytes(),
        )
        if options.return_lse:
            response.lse = np.concatenate(lses).astype(np.float32).tobytes()
        if options.return_timing:
            response.timing.add(rank=0, sequences=len(step.sequences), attention_us=12.5, merged_calls=1)
        return response

    def Decode(self, request: Any) -> Any:
        if request.step:
            if request.step not in self.steps:
                raise Refusal(Status.NOT_FOUND, "step: unknown")
            step = self.steps[request.step]
        if request.abort:
            self._drop(step)
            return pb.DecodeResponse()
        if not request.step:
            read_only = not request.HasField("k")
            step = self._begin(request.sequences, request.query_lengths, request.options, read_only)
        try:
            self._fault("Decode.layer", request.layer, False)
            response = self._layer(step, request.layer, request, request.options)
            self._fault("Decode.layer", request.layer, True)
        except Refusal:
            self._drop(step)
            raise
        return response

    def _decode_stream(self, messages: Iterator[Any], context: Any) -> Iterator[Any]:
        self.calls.append("DecodeStream")
        step: Step | None = None
        try:
            self._authenticate(context)
            for message in messages:
                self.calls.append("DecodeStream.message")
                self._fault("DecodeStream", message.layer, False)
                with self._lock:
                    if message.HasField("begin"):
                        begin = message.begin
                        step = self._begin(begin.sequences, begin.query_lengths, begin.options, begin.read_only)
                    if message.abort:
                        self._drop(step)
                        response = pb.DecodeResponse()
                    elif message.HasField("q"):
                        options = message.options if message.HasField("options") else step.options
                        response = self._layer(step, message.layer, message, options)
                    else:
                        response = pb.DecodeResponse(step=step.id)
                    step = None if response.committed or message.abort else step
                self._fault("DecodeStream", message.layer, True)
                yield response
        except Refusal as refusal:
            self._end(context, refusal)
        finally:
            if step is not None:
                with self._lock:
                    self._drop(step)
