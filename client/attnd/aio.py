"""The asyncio client: the same words as the blocking one, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from attnd import _core, _wire
from attnd._core import BaseSequence, Batch, Part, Tensors
from attnd._proto import attnd_pb2 as pb
from attnd.errors import (
    Aborted,
    AttndError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    error_of,
)
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

_DEFAULT_OPTIONS = Options()
_IDLE_STREAMS = 64


class _Server:
    """One server's channel, methods, idle streams and last known info. The channel is made on the running loop."""

    def __init__(self, address: str, metadata: list[tuple[str, str]], credentials: Any) -> None:
        self.address = address
        self.metadata = metadata
        self.info: ServerInfo | None = None
        self.info_at = float("-inf")
        self.failed_at = float("-inf")
        self._credentials = credentials
        self._idle: deque[Any] = deque()

    @cached_property
    def channel(self) -> Any:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.address, options=_core.CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(self.address, self._credentials, options=_core.CHANNEL_OPTIONS)

    @cached_property
    def methods(self) -> dict[str, Any]:
        kinds = {
            "AppendKv": self.channel.stream_unary,
            "ExportKv": self.channel.unary_stream,
            "DecodeStream": self.channel.stream_stream,
        }
        return {
            name: kinds.get(name, self.channel.unary_unary)(f"/{_core.SERVICE}/{name}", **_core.serializers(name))
            for name in _core.METHODS
        }

    async def call(self, method: str, request: Any, timeout: float) -> Any:
        """A call without retry."""
        try:
            return await self.methods[method](request, timeout=timeout, metadata=self.metadata)
        except grpc.RpcError as error:
            raise error_of(error, self.address) from None

    async def call_with_retry(self, method: str, request: Any, timeout: float) -> Any:
        """A call, repeated where that is safe (see _core.retry_delay), within `timeout` seconds altogether."""
        deadline = time.monotonic() + timeout
        attempt = 0
        while True:
            try:
                return await self.call(method, request, max(0.0, deadline - time.monotonic()))
            except AttndError as error:
                delay = _core.retry_delay(error, attempt, method in _core.READ_ONLY_METHODS)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
            await asyncio.sleep(delay)
            attempt += 1

    def take_stream(self) -> Any:
        """An idle DecodeStream call, or a new one."""
        while self._idle:
            stream = self._idle.pop()
            if not stream.done():
                return stream
        return self.methods["DecodeStream"](metadata=self.metadata)

    def give_stream(self, stream: Any) -> None:
        """Takes back a stream without an open step and without a response on its way."""
        if len(self._idle) < _IDLE_STREAMS:
            self._idle.append(stream)
        else:
            stream.cancel()

    async def close(self) -> None:
        """Ends the streams and the channel."""
        while self._idle:
            stream = self._idle.pop()
            with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                await stream.done_writing()
        if "channel" in self.__dict__:
            await self.channel.close()


class AsyncSequence(BaseSequence):
    """One sequence on a server. Made by AsyncClient.open and AsyncSequence.fork; an async context manager."""

    def __init__(self, client: AsyncClient, handle: int, dp_rank: int, server: str, length: int = 0) -> None:
        super().__init__(handle, dp_rank, server, length)
        self._client = client

    @property
    def length(self) -> int:
        """Committed tokens. FailedPrecondition if a call that may have changed it ended without an answer: describe."""
        if self._length is None:
            raise FailedPrecondition("length: unknown since a call failed; await describe() first")
        return self._length

    async def describe(self) -> SequenceInfo:
        """The sequence as the server sees it; makes its length known again."""
        return (await self._client.describe([self]))[0]

    async def fork(self, length: int | None = None) -> AsyncSequence:
        """A new sequence on the same rank that shares the first `length` tokens (None: all); nothing is copied."""
        return await self._client.fork(self, length)

    async def truncate(self, length: int) -> None:
        """Rolls back to `length` tokens."""
        await self._client.truncate(self, length)

    async def move(self, dp_rank: int | None = None, *, spread: bool = False) -> int:
        """Moves it to another rank, or spreads it over all; see AsyncClient.move_sequence."""
        return await self._client.move_sequence(self, dp_rank, spread=spread)

    async def append(self, k: Iterable[Any], v: Iterable[Any], tokens: int | None = None) -> int:
        """Uploads prefilled keys and values; see AsyncClient.append_kv."""
        return await self._client.append_kv(self, k, v, tokens)

    async def export(self, position: int = 0, tokens: int | None = None) -> tuple[list[Array], list[Array]]:
        """Reads `tokens` keys and values back from `position` on (None: all); see AsyncClient.export_kv."""
        return await self._client.export_kv(self, position, tokens)

    async def close(self) -> None:
        """Frees it on the server. Harmless if it is closed already."""
        await self._client.close_sequences([self])

    async def __aenter__(self) -> AsyncSequence:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except AttndError:
            if error is None:
                raise


class _Lane:
    """How one part of a step reaches its server: a stream, or a unary call a layer."""

    def __init__(
        self,
        server: _Server,
        part: Part[AsyncSequence],
        geometry: Geometry,
        options: Options,
        read_only: bool,
        stream: bool,
    ) -> None:
        self.part = part
        self._server = server
        self._geometry = geometry
        self._options = options
        self._read_only = read_only
        self._streamed = stream
        self._stream: Any = None
        self._step = 0
        self.pending = False  # a message is out and its response has not come

    async def layer(self, index: int, tensors: Tensors, options: Options | None, timeout: float) -> _wire.Response:
        """One layer; the very first is repeated if the server refused it with a retry hint: that started nothing."""
        deadline = time.monotonic() + timeout
        fresh = self._step == 0 and self._stream is None
        attempt = 0
        while True:
            self.pending = True
            try:
                exchange = self._exchange_streamed if self._streamed else self._exchange_unary
                data = await exchange(index, tensors, options, deadline - time.monotonic())
            except ResourceExhausted as error:
                delay = _core.retry_delay(error, attempt, read_only=False) if fresh else None
                if delay is None or time.monotonic() + delay >= deadline:
                    raise self.part.own_words(error) from None
            except AttndError as error:
                raise self.part.own_words(error) from None
            else:
                self.pending = False
                response = _wire.decode(data)
                self._step = response.header.step
                return response
            await asyncio.sleep(delay)
            attempt += 1

    async def _exchange_streamed(self, index: int, tensors: Tensors, options: Options | None, timeout: float) -> bytes:
        header = pb.DecodeStreamRequest(layer=index)
        if self._stream is None:
            self._stream = self._server.take_stream()
            header.begin.CopyFrom(_core.step_begin(self.part, self._geometry, self._options, self._read_only))
        if options is not None:
            header.options.CopyFrom(options.to_proto(self._geometry))
        return await self._send_and_read(_wire.encode(header, tensors.of(self.part)), timeout)

    async def _send_and_read(self, message: bytes, timeout: float) -> bytes:
        stream, address = self._stream, self._server.address
        try:
            data = await asyncio.wait_for(_write_and_read(stream, message), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            self._drop()
            raise DeadlineExceeded(f"no response within {timeout:g} s", address) from None
        except grpc.RpcError as error:
            self._drop()
            raise error_of(error, address) from None
        except asyncio.CancelledError:
            self._drop()
            raise
        if data is grpc.aio.EOF:
            self._drop()
            raise await _end_of(stream, address)
        return bytes(data)

    async def _exchange_unary(self, index: int, tensors: Tensors, options: Options | None, timeout: float) -> bytes:
        header = _core.decode_header(self.part, self._geometry, options or self._options, index, self._step)
        return bytes(await self._server.call("Decode", _wire.encode(header, tensors.of(self.part)), timeout))

    def finish(self) -> None:
        """After the last layer's response."""
        if self._stream is not None:
            self._server.give_stream(self._stream)
        self._stream, self._step = None, 0

    async def abort(self) -> None:
        """Drops the step on the server, whatever state the lane is in."""
        with contextlib.suppress(AttndError):  # gone already, or unreachable: then it idles out
            if self._stream is not None and self.pending:
                self._drop()
            elif self._stream is not None:
                await self._send_and_read(pb.DecodeStreamRequest(abort=True).SerializeToString(), 5.0)
            elif self._step and not self._streamed:
                await self._server.call(
                    "Decode", pb.DecodeRequest(step=self._step, abort=True).SerializeToString(), 5.0
                )
        self.finish()

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
        self._stream = None


async def _write_and_read(stream: Any, message: bytes) -> Any:
    with contextlib.suppress(asyncio.InvalidStateError):  # the server has ended the stream: read says how
        await stream.write(message)
    return await stream.read()


async def _end_of(stream: Any, address: str) -> AttndError:
    """Why a stream has ended."""
    status = await stream.code()
    if status is grpc.StatusCode.OK:
        return Unavailable("the server ended the stream", address)
    trailers = await stream.trailing_metadata()
    return error_of(grpc.aio.AioRpcError(status, grpc.aio.Metadata(), trailers, await stream.details()), address)


class AsyncStep:
    """One step: a transaction over all layers. Made by AsyncClient.step; use it as an async context manager.

    As Step: the sequences grow when the last layer has been answered; leaving the block before that aborts.
    """

    def __init__(
        self,
        client: AsyncClient,
        batch: Batch[AsyncSequence],
        options: Options,
        read_only: bool,
        stream: bool,
        timeout: float,
    ) -> None:
        self._batch = batch
        self._options = options
        self._read_only = read_only
        self._timeout = timeout
        self._lanes = [
            _Lane(client._server(part.server), part, batch.geometry, options, read_only, stream) for part in batch.parts
        ]
        self._over = False
        self._next_layer = 0
        self._last: LayerResult | None = None

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

    async def layer(
        self, q: Any, k: Any = None, v: Any = None, *, layer: int | None = None, options: Options | None = None
    ) -> Array:
        """Runs the next layer: appends k and v, attends with q, causally among the new tokens.

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
        if len(self._lanes) == 1:
            calls = [await _outcome(self._lanes[0].layer(index, tensors, options, self._timeout))]
        else:
            calls = await asyncio.gather(
                *(_outcome(lane.layer(index, tensors, options, self._timeout)) for lane in self._lanes)
            )
        failures = [call for call in calls if isinstance(call, AttndError)]
        if failures:
            await self._fail(index, calls)
            raise failures[0]
        return self._succeed(index, [call for call in calls if isinstance(call, _wire.Response)], options)

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

    async def _fail(self, layer: int, calls: SequenceOf[_wire.Response | AttndError]) -> None:
        self._over = True
        for lane, call in zip(self._lanes, calls):
            if isinstance(call, AttndError):
                if layer == self._batch.geometry.layers - 1:
                    _forget_lengths(lane)  # the server may have committed before the answer was lost
                await lane.abort()
            elif call.header.committed:
                lane.finish()
                await self._undo(lane)
            else:
                await lane.abort()

    async def _undo(self, lane: _Lane) -> None:
        """Rolls back what one server committed while another failed."""
        for sequence, length in zip(lane.part.sequences, lane.part.query_lengths):
            with contextlib.suppress(AttndError):
                known = sequence._length
                await sequence.truncate((await sequence.describe()).length - length if known is None else known)

    async def abort(self) -> None:
        """Drops the step: the sequences stay as they were. Harmless if it is over."""
        if self._over:
            return
        self._over = True
        for lane in self._lanes:
            if lane.pending and self._next_layer == self._batch.geometry.layers - 1:
                _forget_lengths(lane)
            await lane.abort()

    async def __aenter__(self) -> AsyncStep:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.abort()


async def _outcome(call: Any) -> _wire.Response | AttndError:
    """The response, or the error as a value: with several servers all answers are waited for."""
    try:
        return await call  # type: ignore[no-any-return]
    except AttndError as error:
        return error


def _forget_lengths(lane: _Lane) -> None:
    for sequence in lane.part.sequences:
        sequence._length = None


class AsyncClient:
    """The asyncio twin of Client: same arguments, same behaviour; methods are awaited.

    Example:
        >>> async with attnd.AsyncClient("127.0.0.1:7400") as client:
        ...     sequences = await client.open(8)
        ...     geometry = await client.geometry()
        ...     async with await client.step(sequences) as step:
        ...         for layer in range(geometry.layers):
        ...             out = await step.layer(q[layer], k[layer], v[layer])

    For one event loop: the one that its first call runs on.
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
        self._servers = {address: _Server(address, metadata, credentials) for address in _core.addresses_of(addresses)}
        self._placed: dict[str, int] = {}  # sequences opened, less those closed, since the infos were taken
        self._geometry: Geometry | None = None
        self._limits: Limits | None = None

    @property
    def addresses(self) -> list[str]:
        """The servers."""
        return list(self._servers)

    # -- The server

    async def info(self, server: str | None = None) -> ServerInfo:
        """Geometry, ranks with their load, and limits of a server (None: the first), asked anew."""
        chosen = self._server(server or next(iter(self._servers)))
        response = await chosen.call_with_retry("GetServerInfo", pb.GetServerInfoRequest(), self._timeout)
        return self._learn(chosen, response)

    async def restart_rank(self, rank: int, *, server: str | None = None) -> RankInfo:
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
        response = await chosen.call("RestartRank", pb.RestartRankRequest(rank=rank), self._timeout)
        return rank_info_of(response.rank)

    async def geometry(self) -> Geometry:
        """Layers, heads, dimensions and dtype; the same for all servers. Asked for once."""
        if self._geometry is None:
            await self._fresh_infos(self._servers.values())
        assert self._geometry is not None
        return self._geometry

    async def limits(self) -> Limits:
        """The limits that hold on every server. Asked for once."""
        if self._limits is None:
            await self._fresh_infos(self._servers.values())
        assert self._limits is not None
        return self._limits

    def _learn(self, server: _Server, response: pb.GetServerInfoResponse) -> ServerInfo:
        info = server_info_of(server.address, response)
        self._geometry = _core.check_geometry(self._geometry, info)
        self._limits = _core.narrow(self._limits, info.limits)
        server.info, server.info_at = info, time.monotonic()
        self._placed.pop(server.address, None)
        return info

    async def _fresh_infos(self, servers: Iterable[_Server]) -> list[ServerInfo]:
        """Infos at most INFO_MAX_AGE old of the servers that answer. Raises if none does."""
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            asked, limit = _core.worth_asking(servers, self._timeout)
            answers = await asyncio.gather(*(self._fresh_info(server, limit) for server in asked))
            infos = [answer for answer in answers if isinstance(answer, ServerInfo)]
            if infos:
                return infos
            failure = next(answer for answer in answers if isinstance(answer, AttndError))
            delay = _core.retry_delay(failure, attempt, read_only=True)
            if delay is None or time.monotonic() + delay >= deadline:
                raise failure
            await asyncio.sleep(delay)
            attempt += 1

    async def _fresh_info(self, server: _Server, timeout: float) -> ServerInfo | AttndError:
        if server.info is not None and time.monotonic() - server.info_at <= _core.INFO_MAX_AGE:
            return server.info
        try:
            return self._learn(server, await server.call("GetServerInfo", pb.GetServerInfoRequest(), timeout))
        except InvalidArgument:
            raise
        except AttndError as error:
            server.failed_at = time.monotonic()
            return error

    def _server(self, address: str) -> _Server:
        try:
            return self._servers[address]
        except KeyError:
            raise InvalidArgument(f"server: {address} is none of {self.addresses}") from None

    # -- Sequences

    async def open(
        self,
        count: int = 1,
        *,
        placement: Placement = LEAST_TOKENS,
        dp_rank: int | None = None,
        server: str | None = None,
    ) -> list[AsyncSequence]:
        """Opens `count` empty sequences, all or none; see Client.open."""
        request = _core.open_request(count, placement, dp_rank)
        candidates = [self._server(server)] if server else list(self._servers.values())
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            try:
                return await self._open_on(candidates, request)
            except ResourceExhausted as error:
                delay = _core.retry_delay(error, attempt, read_only=False)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
            await asyncio.sleep(delay)
            attempt += 1

    async def _open_on(self, candidates: list[_Server], request: pb.OpenSequencesRequest) -> list[AsyncSequence]:
        """Opens on the least loaded, passing on from full servers to the others."""
        opening = _core.Opening(await self._fresh_infos(candidates), self._placed, request.count)
        opened: list[AsyncSequence] = []
        try:
            while opening.remaining:
                for address, share in opening.shares().items():
                    try:
                        opened += await self._open_share(self._server(address), share, request)
                        opening.opened(address, share)
                    except ResourceExhausted as error:
                        opening.refused(address, share, error)
        except AttndError:
            for sequence in opened:
                with contextlib.suppress(AttndError):
                    await self.close_sequences([sequence])
            raise
        return opened

    async def _open_share(self, server: _Server, count: int, request: pb.OpenSequencesRequest) -> list[AsyncSequence]:
        share = pb.OpenSequencesRequest(count=count, placement=request.placement, dp_rank=request.dp_rank)
        response = await server.call("OpenSequences", share, self._timeout)
        return [AsyncSequence(self, h, rank, server.address) for h, rank in zip(response.sequences, response.dp_ranks)]

    async def fork(self, sequence: AsyncSequence, length: int | None = None) -> AsyncSequence:
        """A new sequence on the same rank that shares the first `length` tokens (None: all); nothing is copied."""
        _core.check_open([sequence], self._servers)
        shared = sequence.length if length is None else length
        request = pb.ForkSequenceRequest(sequence=sequence.handle, length=shared)
        response = await self._server(sequence.server).call_with_retry("ForkSequence", request, self._timeout)
        return AsyncSequence(self, response.sequence, response.dp_rank, sequence.server, shared)

    async def truncate(self, sequence: AsyncSequence, length: int) -> None:
        """Rolls a sequence back to `length` tokens."""
        _core.check_open([sequence], self._servers)
        request = pb.TruncateSequenceRequest(sequence=sequence.handle, length=length)
        response = await self._server(sequence.server).call_with_retry("TruncateSequence", request, self._timeout)
        sequence._length = response.length

    async def describe(self, sequences: SequenceOf[AsyncSequence]) -> list[SequenceInfo]:
        """Length, rank, pages and state of sequences, in order."""
        _core.check_open(sequences, self._servers)
        infos: dict[int, SequenceInfo] = {}
        for address, group in _core.by_server(sequences).items():
            request = pb.DescribeSequencesRequest(sequences=[sequence.handle for sequence in group])
            response = await self._server(address).call_with_retry("DescribeSequences", request, self._timeout)
            for sequence, message in zip(group, response.sequences):
                infos[id(sequence)] = sequence_info_of(message)
                sequence._length = message.length
                sequence.dp_rank = message.dp_rank
        return [infos[id(sequence)] for sequence in sequences]

    async def move_sequence(self, sequence: AsyncSequence, dp_rank: int | None = None, *, spread: bool = False) -> int:
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
        response = await self._server(sequence.server).call_with_retry("MoveSequence", request, self._timeout)
        if dp_rank is not None:
            sequence.dp_rank = dp_rank
        return int(response.tokens)

    async def close_sequences(self, sequences: SequenceOf[AsyncSequence]) -> None:
        """Frees sequences; those closed already are skipped. On each server all or none."""
        remaining = [sequence for sequence in sequences if not sequence.closed]
        for address, group in _core.by_server(remaining).items():
            request = pb.CloseSequencesRequest(sequences=[sequence.handle for sequence in group])
            await self._server(address).call_with_retry("CloseSequences", request, self._timeout)
            self._placed[address] = self._placed.get(address, 0) - len(group)
            for sequence in group:
                sequence.closed = True

    # -- Tensors

    async def append_kv(
        self,
        sequence: AsyncSequence,
        k: Iterable[Any],
        v: Iterable[Any],
        tokens: int | None = None,
        *,
        timeout: float | None = None,
    ) -> int:
        """Uploads the keys and values of prefilled tokens to the end of a sequence, all or nothing; returns its length.

        Args:
            k: [layers, tokens, heads_kv, head_dim] in the server's dtype, or an iterator that yields the layers.
            v: [layers, tokens, heads_kv, head_dim_v], likewise.
            tokens: how many; None: what the first layer has.
            timeout: seconds for the whole upload; None: the client's.
        """
        _core.check_open([sequence], self._servers)
        server, limit = self._server(sequence.server), self._timeout if timeout is None else timeout
        geometry, limits = await self.geometry(), await self.limits()
        repeatable = isinstance(k, (np.ndarray, list, tuple)) and isinstance(v, (np.ndarray, list, tuple))
        deadline = time.monotonic() + limit
        attempt = 0
        while True:
            messages = _core.append_messages(sequence, k, v, tokens, geometry, limits)
            try:
                return await self._upload(server, sequence, messages, deadline - time.monotonic())
            except (ResourceExhausted, Aborted) as error:
                delay = _core.retry_delay(error, attempt, read_only=False) if repeatable else None
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
            await asyncio.sleep(delay)
            attempt += 1

    async def _upload(self, server: _Server, sequence: AsyncSequence, messages: Iterable[bytes], timeout: float) -> int:
        call = server.methods["AppendKv"](timeout=timeout, metadata=server.metadata)
        known, sequence._length = sequence._length, None
        try:
            for message in messages:
                await call.write(message)
            await call.done_writing()
        except asyncio.InvalidStateError:
            pass  # the server has ended the call: the response says how
        except InvalidArgument:
            call.cancel()
            sequence._length = known
            raise
        except grpc.RpcError as error:
            raise error_of(error, server.address) from None
        except BaseException:
            call.cancel()
            raise
        try:
            sequence._length = (await call).length
        except grpc.RpcError as error:
            raise error_of(error, server.address) from None
        return sequence.length

    async def export_kv(
        self,
        sequence: AsyncSequence,
        position: int = 0,
        tokens: int | None = None,
        *,
        timeout: float | None = None,
    ) -> tuple[list[Array], list[Array]]:
        """Reads keys and values back: of the range's tokens, as they are when the call begins. See Client.export_kv.

        Args:
            position: of the first token.
            tokens: how many; None: all from there on.
            timeout: seconds for the whole download, retries included; None: the client's.

        Returns:
            k and v, an array a layer: [tokens, heads_kv, head_dim] and [tokens, heads_kv, head_dim_v] in the server's
            dtype.
        """
        _core.check_open([sequence], self._servers)
        server, limit = self._server(sequence.server), self._timeout if timeout is None else timeout
        request, geometry = _core.export_request(sequence, position, tokens), await self.geometry()
        deadline = time.monotonic() + limit
        attempt = 0
        while True:
            export = _core.Export(geometry, tokens, server.address)
            try:
                return await self._download(server, request, export, max(0.0, deadline - time.monotonic()))
            except AttndError as error:
                delay = _core.retry_delay(error, attempt, read_only=True)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
            await asyncio.sleep(delay)
            attempt += 1

    async def _download(
        self, server: _Server, request: pb.ExportKvRequest, export: _core.Export, timeout: float
    ) -> tuple[list[Array], list[Array]]:
        call = server.methods["ExportKv"](request, timeout=timeout, metadata=server.metadata)
        try:
            async for data in call:
                export.take(data)
        except grpc.RpcError as error:
            raise error_of(error, server.address) from None
        finally:
            call.cancel()  # harmless if it has ended
        return export.arrays()

    async def step(
        self,
        sequences: SequenceOf[AsyncSequence],
        query_lengths: SequenceOf[int] | None = None,
        options: Options | None = None,
        *,
        read_only: bool = False,
        stream: bool = True,
        timeout: float | None = None,
    ) -> AsyncStep:
        """A step over all layers; see Client.step. Nothing is sent before its first layer."""
        if read_only and not stream:
            raise InvalidArgument("stream: a unary read is no step; use attend")
        batch = Batch(sequences, query_lengths, await self.geometry(), await self.limits(), self._servers)
        return AsyncStep(
            self, batch, options or _DEFAULT_OPTIONS, read_only, stream, self._timeout if timeout is None else timeout
        )

    async def attend(
        self,
        sequences: SequenceOf[AsyncSequence],
        layer: int,
        q: Any,
        query_lengths: SequenceOf[int] | None = None,
        options: Options | None = None,
        *,
        timeout: float | None = None,
    ) -> LayerResult:
        """Attends to all that is there, with every query; appends nothing. See Client.attend."""
        batch = Batch(sequences, query_lengths, await self.geometry(), await self.limits(), self._servers)
        if not 0 <= layer < batch.geometry.layers:
            raise InvalidArgument(f"layer: {layer}, expected 0 to {batch.geometry.layers - 1}")
        tensors = batch.tensors(q, None, None)
        chosen = options or _DEFAULT_OPTIONS

        async def ask(part: Part[AsyncSequence]) -> _wire.Response:
            message = _wire.encode(_core.decode_header(part, batch.geometry, chosen, layer, 0), tensors.of(part))
            limit = self._timeout if timeout is None else timeout
            try:
                return _wire.decode(await self._server(part.server).call_with_retry("Decode", message, limit))
            except AttndError as error:
                raise part.own_words(error) from None

        return batch.join(await asyncio.gather(*(ask(part) for part in batch.parts)), chosen.return_lse)

    async def close(self) -> None:
        """Ends the streams and channels. Sequences stay open on their servers until closed or idled out."""
        for server in self._servers.values():
            await server.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
