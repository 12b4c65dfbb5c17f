"""The blocking client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from attnd import _core, _wire
from attnd._channel import Server, Stream, Watchdog
from attnd._core import BaseSequence, Batch, Part, Tensors
from attnd._proto import attnd_pb2 as pb
from attnd.errors import Aborted, AttndError, FailedPrecondition, InvalidArgument, ResourceExhausted, error_of
from attnd.types import (
    LEAST_TOKENS,
    Array,
    Geometry,
    LayerResult,
    Limits,
    Options,
    Placement,
    RankInfo,
    SequenceInfo,
    ServerInfo,
    rank_info_of,
    sequence_info_of,
    server_info_of,
)

if TYPE_CHECKING:
    from attnd.session import Session

_DEFAULT_OPTIONS = Options()


class Sequence(BaseSequence):
    """One sequence on a server. Made by Client.open and Sequence.fork; a context manager that closes it.

    Not for use by several threads at once.
    """

    def __init__(self, client: Client, handle: int, dp_rank: int, server: str, length: int = 0) -> None:
        super().__init__(handle, dp_rank, server, length)
        self._client = client

    @property
    def length(self) -> int:
        """Committed tokens. Asks the server only if a call that may have changed it ended without an answer."""
        if self._length is None:
            self._length = self.describe().length
        return self._length

    def describe(self) -> SequenceInfo:
        """The sequence as the server sees it."""
        return self._client.describe([self])[0]

    def fork(self, length: int | None = None) -> Sequence:
        """A new sequence on the same rank that shares the first `length` tokens (None: all); nothing is copied."""
        return self._client.fork(self, length)

    def truncate(self, length: int) -> None:
        """Rolls back to `length` tokens, as after rejected speculative tokens."""
        self._client.truncate(self, length)

    def move(self, dp_rank: int | None = None, *, spread: bool = False) -> int:
        """Moves it to another rank, or spreads it over all; see Client.move_sequence."""
        return self._client.move_sequence(self, dp_rank, spread=spread)

    def append(self, k: Iterable[Any], v: Iterable[Any], tokens: int | None = None) -> int:
        """Uploads prefilled keys and values; see Client.append_kv."""
        return self._client.append_kv(self, k, v, tokens)

    def export(self, position: int = 0, tokens: int | None = None) -> tuple[list[Array], list[Array]]:
        """Reads `tokens` keys and values back from `position` on (None: all); see Client.export_kv."""
        return self._client.export_kv(self, position, tokens)

    def close(self) -> None:
        """Frees it on the server. Harmless if it is closed already."""
        self._client.close_sequences([self])

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except AttndError:
            if error is None:
                raise


class _Lane:
    """How one part of a step reaches its server: base of the two transports."""

    def __init__(self, server: Server, part: Part[Sequence], geometry: Geometry, options: Options) -> None:
        self.server = server
        self.part = part
        self.geometry = geometry
        self.options = options
        self.fresh = True  # no layer has been answered yet: the server has no step of ours
        self.pending = False  # a message is out and its response has not come

    def send(self, layer: int, tensors: Tensors, options: Options | None, timeout: float) -> None:
        """Sends one layer, without waiting."""
        raise NotImplementedError

    def receive(self, timeout: float) -> _wire.Response:
        """Waits for the response."""
        raise NotImplementedError

    def finish(self) -> None:
        """After the last layer's response."""
        raise NotImplementedError

    def abort(self) -> None:
        """Drops the step on the server, whatever state the lane is in. Raises nothing."""
        raise NotImplementedError


class _StreamLane(_Lane):
    def __init__(
        self, server: Server, part: Part[Sequence], geometry: Geometry, options: Options, read_only: bool
    ) -> None:
        super().__init__(server, part, geometry, options)
        self._read_only = read_only
        self._stream: Stream | None = None

    def send(self, layer: int, tensors: Tensors, options: Options | None, timeout: float) -> None:
        header = pb.DecodeStreamRequest(layer=layer)
        if self._stream is None:
            self._stream = self.server.take_stream()
            header.begin.CopyFrom(_core.step_begin(self.part, self.geometry, self.options, self._read_only))
        if options is not None:
            header.options.CopyFrom(options.to_proto(self.geometry))
        self.pending = True
        self._stream.send(_wire.encode(header, tensors.of(self.part)))

    def receive(self, timeout: float) -> _wire.Response:
        assert self._stream is not None
        try:
            response = self._stream.receive(timeout)
        except AttndError:
            self._drop()
            raise
        self.pending = self.fresh = False
        return response

    def finish(self) -> None:
        if self._stream is not None:
            self.server.give_stream(self._stream)
            self._stream = None

    def abort(self) -> None:
        if self._stream is None:
            return
        if self.pending:
            self._drop()
            return
        try:
            self._stream.send(pb.DecodeStreamRequest(abort=True).SerializeToString())
            self._stream.receive(timeout=5.0)
        except AttndError:
            self._drop()
        else:
            self.finish()

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
        self._stream = None
        self.pending = False


class _UnaryLane(_Lane):
    def __init__(
        self, server: Server, part: Part[Sequence], geometry: Geometry, options: Options, parallel: bool
    ) -> None:
        super().__init__(server, part, geometry, options)
        self._parallel = parallel
        self._step = 0
        self._message = b""
        self._future: Any = None

    def send(self, layer: int, tensors: Tensors, options: Options | None, timeout: float) -> None:
        header = _core.decode_header(self.part, self.geometry, options or self.options, layer, self._step)
        message = _wire.encode(header, tensors.of(self.part))
        self.pending = True
        if self._parallel:
            self._future = self.server.start("Decode", message, timeout)
        else:
            self._message = message  # sent by receive: a blocking call is quicker than a future

    def receive(self, timeout: float) -> _wire.Response:
        try:
            if self._parallel:
                data = self.server.result(self._future)
            else:
                data = self.server.call("Decode", self._message, timeout)
        finally:
            self.pending, self._future, self._message = False, None, b""
        response = _wire.decode(data)
        self.fresh = False
        self._step = response.header.step
        return response

    def finish(self) -> None:
        self._step = 0

    def abort(self) -> None:
        if self._future is not None:
            self._future.cancel()
            self._future = None
        if self._step:
            with contextlib.suppress(AttndError):  # gone already, or unreachable: then it idles out
                self.server.call("Decode", pb.DecodeRequest(step=self._step, abort=True).SerializeToString(), 5.0)
            self._step = 0


class Step:
    """One step: a transaction over all layers. Made by Client.step; use it as a context manager.

    The sequences grow by their query lengths when the last layer has been answered. Leaving the block before that,
    by an exception or not, aborts the step and leaves every sequence at its old length.

    If the sequences live on several servers, each layer runs on them at the same time. Should one server fail at the
    last layer after another has committed, the committed sequences are truncated to their old lengths.
    """

    def __init__(
        self, client: Client, batch: Batch[Sequence], options: Options, read_only: bool, stream: bool, timeout: float
    ) -> None:
        self._client = client
        self._batch = batch
        self._options = options
        self._read_only = read_only
        self._timeout = timeout
        self._lanes = [self._lane(part, stream) for part in batch.parts]
        self._over = False
        self._next_layer = 0
        self._last: LayerResult | None = None

    def _lane(self, part: Part[Sequence], stream: bool) -> _Lane:
        server, geometry = self._client._server(part.server), self._batch.geometry
        if stream:
            return _StreamLane(server, part, geometry, self._options, self._read_only)
        return _UnaryLane(server, part, geometry, self._options, parallel=len(self._batch.parts) > 1)

    @property
    def next_layer(self) -> int:
        """The layer that comes next; the number of layers once committed."""
        return self._next_layer

    @property
    def committed(self) -> bool:
        """Whether the last layer has been answered: the sequences have grown."""
        return self._last is not None and self._last.committed

    @property
    def last(self) -> LayerResult:
        """Everything about the latest layer: out, lse, timing."""
        if self._last is None:
            raise FailedPrecondition("step: no layer has run yet")
        return self._last

    def layer(
        self, q: Any, k: Any = None, v: Any = None, *, layer: int | None = None, options: Options | None = None
    ) -> Array:
        """Runs the next layer: appends k and v, attends with q, causally among the new tokens.

        `tokens` runs over the sequences in order, each with its query length of rows.

        Args:
            q: [tokens, heads_q, head_dim] in the server's dtype.
            k: [tokens, heads_kv, head_dim]; None in a read-only step.
            v: [tokens, heads_kv, head_dim_v]; likewise.
            layer: which layer; None: the next one. Only a read-only step may take them in another order.
            options: for this layer, instead of the step's.

        Returns:
            out [tokens, heads_q, head_dim_v] in the server's dtype, read-only. `last` has the LSE and the timing.

        Raises:
            InvalidArgument: wrong shape or dtype, before anything was sent; the step goes on.
            AttndError: any failure of the call; the step is aborted.
        """
        if self._over:
            raise FailedPrecondition("step: it is over")
        index = self._next_layer if layer is None else layer
        tensors = self._batch.tensors(q, k, v)
        if tensors.reads_only != self._read_only:
            raise InvalidArgument(f"k, v: {'given in a read-only step' if self._read_only else 'missing'}")
        for lane in self._lanes:
            lane.send(index, tensors, options, self._timeout)
        responses: list[_wire.Response | None] = []
        failure: AttndError | None = None
        for lane in self._lanes:
            try:
                responses.append(self._receive(lane, index, tensors, options))
            except AttndError as error:
                responses.append(None)
                failure = failure or lane.part.own_words(error)
        if failure is not None:
            self._fail(index, responses)
            raise failure
        return self._succeed(index, [response for response in responses if response is not None], options)

    def _receive(self, lane: _Lane, layer: int, tensors: Tensors, options: Options | None) -> _wire.Response:
        """Waits for a response. A refusal of the very first layer with a retry hint started nothing: it is repeated."""
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            try:
                return lane.receive(self._timeout)
            except ResourceExhausted as error:
                delay = _core.retry_delay(error, attempt, read_only=False) if lane.fresh else None
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
            time.sleep(delay)
            attempt += 1
            lane.send(layer, tensors, options, deadline - time.monotonic())

    def _succeed(self, layer: int, responses: list[_wire.Response], options: Options | None) -> Array:
        self._last = self._batch.join(responses, (options or self._options).return_lse)
        self._next_layer = layer + 1
        if self._last.committed:
            self._over = True
            for lane in self._lanes:
                lane.finish()
            for sequence, length in zip(self._batch.sequences, self._batch.query_lengths):
                if sequence._length is not None:
                    sequence._length += length
        return self._last.out

    def _fail(self, layer: int, responses: list[_wire.Response | None]) -> None:
        self._over = True
        for lane, response in zip(self._lanes, responses):
            if response is None:
                if layer == self._batch.geometry.layers - 1:
                    _forget_lengths(lane)  # the server may have committed before the answer was lost
                lane.abort()
            elif response.header.committed:
                lane.finish()
                self._undo(lane)
            else:
                lane.abort()

    def _undo(self, lane: _Lane) -> None:
        """Rolls back what one server committed while another failed."""
        for sequence, length in zip(lane.part.sequences, lane.part.query_lengths):
            committed = sequence._length
            sequence._length = None
            try:
                before = sequence.length - length if committed is None else committed
                sequence.truncate(before)
            except AttndError:
                sequence._length = None  # to be asked for when it is next needed

    def abort(self) -> None:
        """Drops the step: the sequences stay as they were. Harmless if it is over."""
        if self._over:
            return
        self._over = True
        for lane in self._lanes:
            if lane.pending and self._next_layer == self._batch.geometry.layers - 1:
                _forget_lengths(lane)
            lane.abort()

    def __enter__(self) -> Step:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


def _forget_lengths(lane: _Lane) -> None:
    for sequence in lane.part.sequences:
        sequence._length = None


class Client:
    """A connection to one attnd server, or to several that hold different sequences.

    Example:
        >>> with attnd.Client("127.0.0.1:7400") as client:
        ...     sequences = client.open(8)
        ...     with client.step(sequences) as step:
        ...         for layer in range(client.geometry.layers):
        ...             out = step.layer(q[layer], k[layer], v[layer])

    New sequences go to the server that holds the fewest tokens; a step or read whose sequences live on several servers
    is split, runs on them at the same time, and comes back in order. All servers must have the same geometry.

    What is retried: info, describe and export_kv, if the server is unavailable; any call that the server refused for
    lack of room, or because a sequence is busy, with a hint when to come back (of a step, only its first layer).
    Nothing else: whether a lost step has run is not knowable, so that is the caller's to decide, with
    Sequence.describe.

    Several threads may share a client, but not a Sequence, a Step or a Session.

    Args:
        addresses: "host:port" or "unix:/path", or several.
        token: sent as "authorization: Bearer <token>".
        timeout: seconds for each call, retries included; for each layer of a step.
        credentials: grpc.ChannelCredentials for TLS; None: plain text.
    """

    def __init__(
        self,
        addresses: str | Iterable[str],
        *,
        token: str | None = None,
        timeout: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        metadata = [("authorization", f"Bearer {token}")] if token else []
        self._timeout = timeout
        self._watchdog = Watchdog()
        self._servers = {
            address: Server(address, metadata, credentials, self._watchdog) for address in _core.addresses_of(addresses)
        }
        self._placed: dict[str, int] = {}  # sequences opened, less those closed, since the infos were taken
        self._geometry: Geometry | None = None
        self._limits: Limits | None = None

    @property
    def addresses(self) -> list[str]:
        """The servers."""
        return list(self._servers)

    # -- The server

    def info(self, server: str | None = None) -> ServerInfo:
        """Geometry, ranks with their load, and limits of a server (None: the first), asked anew."""
        chosen = self._server(server or next(iter(self._servers)))
        response = chosen.call_with_retry("GetServerInfo", pb.GetServerInfoRequest(), self._timeout)
        return self._learn(chosen, response)

    def restart_rank(self, rank: int, *, server: str | None = None) -> RankInfo:
        """Begins to restart a lost rank; info() tells when it serves. For a client with the server's admin token.

        Args:
            rank: which one; its sequences stay lost until they are closed.
            server: of which server; None: the first.

        Raises:
            FailedPrecondition: it is not lost.
            InvalidArgument: there is no such rank.
            PermissionDenied: the client's token is not the admin token, or the server has none.
        """
        chosen = self._server(server or next(iter(self._servers)))
        response = chosen.call("RestartRank", pb.RestartRankRequest(rank=rank), self._timeout)
        return rank_info_of(response.rank)

    @property
    def geometry(self) -> Geometry:
        """Layers, heads, dimensions and dtype; the same for all servers. Asked for once."""
        if self._geometry is None:
            self._fresh_infos(self._servers.values())
        assert self._geometry is not None
        return self._geometry

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of q, k, v and out: ml_dtypes.bfloat16, numpy.float16 or numpy.float32."""
        return self.geometry.dtype

    @property
    def limits(self) -> Limits:
        """The limits that hold on every server. Asked for once."""
        if self._limits is None:
            self._fresh_infos(self._servers.values())
        assert self._limits is not None
        return self._limits

    def _learn(self, server: Server, response: pb.GetServerInfoResponse) -> ServerInfo:
        info = server_info_of(server.address, response)
        self._geometry = _core.check_geometry(self._geometry, info)
        self._limits = _core.narrow(self._limits, info.limits)
        server.info, server.info_at = info, time.monotonic()
        self._placed.pop(server.address, None)
        return info

    def _fresh_infos(self, servers: Iterable[Server]) -> list[ServerInfo]:
        """Infos at most INFO_MAX_AGE old of the servers that answer. Raises if none does."""
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            failure: AttndError | None = None
            infos = []
            calls = []
            asked, limit = _core.worth_asking(servers, self._timeout)
            for server in asked:
                stale = server.info is None or time.monotonic() - server.info_at > _core.INFO_MAX_AGE
                request = pb.GetServerInfoRequest()
                calls.append((server, server.start("GetServerInfo", request, limit) if stale else None))
            for server, call in calls:
                try:
                    infos.append(server.info if call is None else self._learn(server, server.result(call)))
                except InvalidArgument:
                    raise
                except AttndError as error:
                    failure, server.failed_at = error, time.monotonic()
            known = [info for info in infos if info is not None]
            if known:
                return known
            assert failure is not None
            delay = _core.retry_delay(failure, attempt, read_only=True)
            if delay is None or time.monotonic() + delay >= deadline:
                raise failure
            time.sleep(delay)
            attempt += 1

    def _server(self, address: str) -> Server:
        try:
            return self._servers[address]
        except KeyError:
            raise InvalidArgument(f"server: {address} is none of {self.addresses}") from None

    # -- Sequences

    def open(
        self,
        count: int = 1,
        *,
        placement: Placement = LEAST_TOKENS,
        dp_rank: int | None = None,
        server: str | None = None,
    ) -> list[Sequence]:
        """Opens `count` empty sequences, all or none.

        Args:
            count: 1 or more.
            placement: which rank of its server each goes to.
            dp_rank: the rank, with placement EXPLICIT.
            server: the server they all go to; None: each to the one with the fewest tokens, as of the last second.

        Raises:
            InvalidArgument: no such rank.
            ResourceExhausted: no room on any server, after the retries that the servers asked for.
            Unavailable: no server can be reached, or the one chosen was lost during the call.
        """
        request = _core.open_request(count, placement, dp_rank)
        candidates = [self._server(server)] if server else list(self._servers.values())
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            try:
                return self._open_on(candidates, request)
            except ResourceExhausted as error:
                delay = _core.retry_delay(error, attempt, read_only=False)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
            time.sleep(delay)
            attempt += 1

    def _open_on(self, candidates: list[Server], request: pb.OpenSequencesRequest) -> list[Sequence]:
        """Opens on the least loaded, passing on from full servers to the others."""
        opening = _core.Opening(self._fresh_infos(candidates), self._placed, request.count)
        opened: list[Sequence] = []
        try:
            while opening.remaining:
                for address, share in opening.shares().items():
                    try:
                        opened += self._open_share(self._server(address), share, request)
                        opening.opened(address, share)
                    except ResourceExhausted as error:
                        opening.refused(address, share, error)
        except AttndError:
            self._close_quietly(opened)
            raise
        return opened

    def _open_share(self, server: Server, count: int, request: pb.OpenSequencesRequest) -> list[Sequence]:
        share = pb.OpenSequencesRequest(count=count, placement=request.placement, dp_rank=request.dp_rank)
        response = server.call("OpenSequences", share, self._timeout)
        return [Sequence(self, h, rank, server.address) for h, rank in zip(response.sequences, response.dp_ranks)]

    def fork(self, sequence: Sequence, length: int | None = None) -> Sequence:
        """A new sequence on the same rank that shares the first `length` tokens (None: all); nothing is copied."""
        _core.check_open([sequence], self._servers)
        shared = sequence.length if length is None else length
        request = pb.ForkSequenceRequest(sequence=sequence.handle, length=shared)
        response = self._server(sequence.server).call_with_retry("ForkSequence", request, self._timeout)
        return Sequence(self, response.sequence, response.dp_rank, sequence.server, shared)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Rolls a sequence back to `length` tokens."""
        _core.check_open([sequence], self._servers)
        request = pb.TruncateSequenceRequest(sequence=sequence.handle, length=length)
        sequence._length = None
        response = self._server(sequence.server).call_with_retry("TruncateSequence", request, self._timeout)
        sequence._length = response.length

    def describe(self, sequences: SequenceOf[Sequence]) -> list[SequenceInfo]:
        """Length, rank, pages and state of sequences, in order."""
        _core.check_open(sequences, self._servers)
        infos: dict[int, SequenceInfo] = {}
        for address, group in _core.by_server(sequences).items():
            request = pb.DescribeSequencesRequest(sequences=[sequence.handle for sequence in group])
            response = self._server(address).call_with_retry("DescribeSequences", request, self._timeout)
            for sequence, message in zip(group, response.sequences):
                infos[id(sequence)] = sequence_info_of(message)
                sequence._length = message.length
                sequence.dp_rank = message.dp_rank
        return [infos[id(sequence)] for sequence in sequences]

    def move_sequence(self, sequence: Sequence, dp_rank: int | None = None, *, spread: bool = False) -> int:
        """Moves a sequence to another rank of its server, or spreads it over all: it stays the same, bit by bit.

        A step or upload that it is in is waited for, a few seconds at most; a step that begins meanwhile waits.

        Args:
            dp_rank: where it goes.
            spread: instead of `dp_rank`: its chunks go to all ranks, so that every rank's bandwidth is used for it.

        Returns:
            How many tokens moved; 0 if it was there already.

        Raises:
            InvalidArgument: no such rank.
            FailedPrecondition: it is spread already.
            Aborted: it is still in a step or upload, after the retries.
            ResourceExhausted: no pages there.
            Unavailable: a rank is lost.
        """
        _core.check_open([sequence], self._servers)
        request = _core.move_request(sequence, dp_rank, spread)
        response = self._server(sequence.server).call_with_retry("MoveSequence", request, self._timeout)
        if dp_rank is not None:
            sequence.dp_rank = dp_rank
        return int(response.tokens)

    def close_sequences(self, sequences: SequenceOf[Sequence]) -> None:
        """Frees sequences; those closed already are skipped. On each server all or none."""
        remaining = [sequence for sequence in sequences if not sequence.closed]
        for address, group in _core.by_server(remaining).items():
            request = pb.CloseSequencesRequest(sequences=[sequence.handle for sequence in group])
            self._server(address).call_with_retry("CloseSequences", request, self._timeout)
            self._placed[address] = self._placed.get(address, 0) - len(group)
            for sequence in group:
                sequence.closed = True

    def _close_quietly(self, sequences: SequenceOf[Sequence]) -> None:
        for sequence in sequences:
            try:
                self.close_sequences([sequence])
            except AttndError:
                sequence.closed = True

    # -- Tensors

    def append_kv(
        self,
        sequence: Sequence,
        k: Iterable[Any],
        v: Iterable[Any],
        tokens: int | None = None,
        *,
        timeout: float | None = None,
    ) -> int:
        """Uploads the keys and values of prefilled tokens to the end of a sequence. All or nothing.

        Args:
            k: [layers, tokens, heads_kv, head_dim] in the server's dtype, or an iterator that yields the layers.
            v: [layers, tokens, heads_kv, head_dim_v], likewise. Layers are taken as they are sent.
            tokens: how many; None: what the first layer has.
            timeout: seconds for the whole upload; None: the client's.

        Returns:
            The sequence's new length.
        """
        _core.check_open([sequence], self._servers)
        server, limit = self._server(sequence.server), self._timeout if timeout is None else timeout
        repeatable = isinstance(k, (np.ndarray, list, tuple)) and isinstance(v, (np.ndarray, list, tuple))
        deadline = time.monotonic() + limit
        attempt = 0
        while True:
            try:
                return self._upload(server, sequence, k, v, tokens, deadline - time.monotonic())
            except (ResourceExhausted, Aborted) as error:
                delay = _core.retry_delay(error, attempt, read_only=False) if repeatable else None
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
            time.sleep(delay)
            attempt += 1

    def _upload(
        self, server: Server, sequence: Sequence, k: Iterable[Any], v: Iterable[Any], tokens: int | None, timeout: float
    ) -> int:
        mistakes: list[Exception] = []
        source = _core.append_messages(sequence, k, v, tokens, self.geometry, self.limits)

        def messages() -> Iterable[bytes]:
            # Runs on gRPC's thread, where an exception cancels the call and would be lost.
            try:
                yield from source
            except Exception as mistake:
                mistakes.append(mistake)
                raise

        known, sequence._length = sequence._length, None
        try:
            response = server.methods["AppendKv"](messages(), timeout=timeout, metadata=server.metadata)
        except grpc.RpcError as error:
            if mistakes:
                sequence._length = known
                raise mistakes[0] from None
            raise error_of(error, server.address) from None
        sequence._length = response.length
        return int(response.length)

    def export_kv(
        self,
        sequence: Sequence,
        position: int = 0,
        tokens: int | None = None,
        *,
        timeout: float | None = None,
    ) -> tuple[list[Array], list[Array]]:
        """Reads keys and values back: of the range's tokens, as they are when the call begins. Changes nothing.

        `client.append_kv(other, *client.export_kv(sequence))` copies a sequence, to another server too.

        Args:
            position: of the first token.
            tokens: how many; None: all from there on.
            timeout: seconds for the whole download, retries included; None: the client's.

        Returns:
            k and v, an array a layer: [tokens, heads_kv, head_dim] and [tokens, heads_kv, head_dim_v] in the server's
            dtype, bitwise what was appended (with fp8 keys and values: what is stored, times its scale). An empty
            range gives arrays of no tokens, which append_kv refuses.

        Raises:
            InvalidArgument: `position`, or `position` and `tokens`, beyond the sequence's length.
            Unavailable: a rank that holds it is lost.
            AttndError: any other failure of the call, or responses that do not fit together.
        """
        _core.check_open([sequence], self._servers)
        server, limit = self._server(sequence.server), self._timeout if timeout is None else timeout
        request, geometry = _core.export_request(sequence, position, tokens), self.geometry
        deadline = time.monotonic() + limit
        attempt = 0
        while True:
            export = _core.Export(geometry, tokens, server.address)
            try:
                return self._download(server, request, export, max(0.0, deadline - time.monotonic()))
            except AttndError as error:
                delay = _core.retry_delay(error, attempt, read_only=True)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
            time.sleep(delay)
            attempt += 1

    def _download(
        self, server: Server, request: pb.ExportKvRequest, export: _core.Export, timeout: float
    ) -> tuple[list[Array], list[Array]]:
        call = server.methods["ExportKv"](request, timeout=timeout, metadata=server.metadata)
        try:
            for data in call:
                export.take(data)
        except grpc.RpcError as error:
            raise error_of(error, server.address) from None
        finally:
            call.cancel()  # harmless if it has ended
        return export.arrays()

    def step(
        self,
        sequences: SequenceOf[Sequence],
        query_lengths: SequenceOf[int] | None = None,
        options: Options | None = None,
        *,
        read_only: bool = False,
        stream: bool = True,
        timeout: float | None = None,
    ) -> Step:
        """A step over all layers; see Step. Nothing is sent before its first layer.

        Args:
            sequences: distinct, 1 or more, of any servers.
            query_lengths: new tokens of each sequence, 1 to limits.query_length; None: 1 each.
            options: for every layer that brings none of its own.
            read_only: queries only, layers in any order: nothing is appended or committed.
            stream: over a DecodeStream, which is the faster way; False: a unary call for each layer.
            timeout: seconds for each layer; None: the client's.
        """
        batch = Batch(sequences, query_lengths, self.geometry, self.limits, self._servers)
        if read_only and not stream:
            raise InvalidArgument("stream: a unary read is no step; use attend")
        return Step(
            self, batch, options or _DEFAULT_OPTIONS, read_only, stream, self._timeout if timeout is None else timeout
        )

    def attend(
        self,
        sequences: SequenceOf[Sequence],
        layer: int,
        q: Any,
        query_lengths: SequenceOf[int] | None = None,
        options: Options | None = None,
        *,
        timeout: float | None = None,
    ) -> LayerResult:
        """Attends to all that is there, with every query; appends nothing.

        For cross attention, or a merge of one's own.

        Args:
            sequences: distinct, 1 or more, of any servers.
            layer: which layer.
            q: [tokens, heads_q, head_dim] in the server's dtype.
            query_lengths: rows of each sequence; None: 1 each.
            options: return_lse=True gives the log normaliser that merging with other results needs.
        """
        batch = Batch(sequences, query_lengths, self.geometry, self.limits, self._servers)
        if not 0 <= layer < batch.geometry.layers:
            raise InvalidArgument(f"layer: {layer}, expected 0 to {batch.geometry.layers - 1}")
        tensors = batch.tensors(q, None, None)
        chosen = options or _DEFAULT_OPTIONS
        limit = self._timeout if timeout is None else timeout
        requests = []
        for part in batch.parts:
            message = _wire.encode(_core.decode_header(part, batch.geometry, chosen, layer, 0), tensors.of(part))
            requests.append((part, self._server(part.server), message))
        if len(requests) == 1:
            part, server, message = requests[0]
            answers = [_attempt(part, lambda: server.call_with_retry("Decode", message, limit))]
        else:
            futures = [(part, server, server.start("Decode", message, limit)) for part, server, message in requests]
            answers = [_attempt(part, lambda s=server, f=future: s.result(f)) for part, server, future in futures]
        return batch.join([_wire.decode(answer) for answer in answers], chosen.return_lse)

    def session(
        self,
        count: int = 0,
        *,
        options: Options | None = None,
        placement: Placement = LEAST_TOKENS,
        stream: bool = True,
        timeout: float | None = None,
    ) -> Session:
        """A Session with `count` empty sequences: the loop of a model without handles and steps."""
        from attnd.session import Session

        session = Session(self, options=options, placement=placement, stream=stream, timeout=timeout)
        if count:
            session.add(count)
        return session

    def close(self) -> None:
        """Ends the streams and channels. Sequences stay open on their servers until closed or idled out."""
        for server in self._servers.values():
            server.close()
        self._watchdog.stop()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _attempt(part: Part[Sequence], call: Any) -> Any:
    try:
        return call()
    except AttndError as error:
        raise part.own_words(error) from None
