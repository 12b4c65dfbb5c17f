"""What the blocking and the asyncio client share: everything that does no input or output.

Checking of tensors, the partition of a batch over servers, the choice of a server for new sequences, the rule of
what is retried, and the reading of responses.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from attnd import _wire
from attnd._proto import attnd_pb2 as pb
from attnd.errors import (
    Aborted,
    AttndError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from attnd.types import Array, Geometry, LayerResult, Limits, Options, Placement, ServerInfo, dtype_code, timing_of

SERVICE = "attnd.v1.Attention"

#: Seconds for which a server's load is trusted before it is asked again.
INFO_MAX_AGE = 1.0

#: Seconds that one of several servers is given to tell its load..
INFO_TIMEOUT = 2.0

#: ..and seconds for which one that did not is passed over, as long as there are others.
DOWN_SECONDS = 5.0

#: Aimed-at size of one AppendKv message: large enough to stream well, small enough not to wait for.
APPEND_CHUNK_BYTES = 1 << 20

#: gRPC options of every channel. The server limits its requests; responses are as large as the requests ask for.
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)

#: Method name -> (request class, response class). None: bytes, see _wire.
METHODS: dict[str, tuple[Any, Any]] = {
    "GetServerInfo": (pb.GetServerInfoRequest, pb.GetServerInfoResponse),
    "OpenSequences": (pb.OpenSequencesRequest, pb.OpenSequencesResponse),
    "ForkSequence": (pb.ForkSequenceRequest, pb.ForkSequenceResponse),
    "TruncateSequence": (pb.TruncateSequenceRequest, pb.TruncateSequenceResponse),
    "CloseSequences": (pb.CloseSequencesRequest, pb.CloseSequencesResponse),
    "DescribeSequences": (pb.DescribeSequencesRequest, pb.DescribeSequencesResponse),
    "MoveSequence": (pb.MoveSequenceRequest, pb.MoveSequenceResponse),
    "AppendKv": (None, pb.AppendKvResponse),
    "ExportKv": (pb.ExportKvRequest, None),
    "Decode": (None, None),
    "DecodeStream": (None, None),
    "RestartRank": (pb.RestartRankRequest, pb.RestartRankResponse),
}

#: Calls that only look: sending one again is harmless whatever became of the first.
READ_ONLY_METHODS = frozenset({"GetServerInfo", "DescribeSequences", "ExportKv"})


def serializers(method: str) -> dict[str, Any]:
    """The keyword arguments of grpc's method factories for `method`."""
    request, response = METHODS[method]
    return {
        "request_serializer": None if request is None else request.SerializeToString,
        "response_deserializer": None if response is None else response.FromString,
    }


def addresses_of(addresses: str | Iterable[str]) -> list[str]:
    """The list of servers a client was given. InvalidArgument if empty or repeated."""
    listed = [addresses] if isinstance(addresses, str) else list(addresses)
    if not listed:
        raise InvalidArgument("addresses: none given")
    if len(set(listed)) != len(listed):
        raise InvalidArgument(f"addresses: {listed} names a server twice")
    return listed


# ----------------------------------------------------------------------------------------------------------------
# Retries

_RETRIES = 4
_FIRST_DELAY = 0.05
_LARGEST_DELAY = 1.0


def retry_delay(error: AttndError, attempt: int, read_only: bool) -> float | None:
    """Seconds to wait before sending a failed call again, or None: give up. `attempt` counts from 0.

    Two cases are safe. A RESOURCE_EXHAUSTED or ABORTED with a retry hint: the server says that it did nothing, and when
    to come back. An UNAVAILABLE of a call that only looks. Nothing else is retried: of a call that failed otherwise the
    server may have done its part, so repeating it could open sequences twice or step a sequence twice.
    """
    if attempt >= _RETRIES:
        return None
    if isinstance(error, (ResourceExhausted, Aborted)):
        return error.retry_after
    if isinstance(error, Unavailable) and read_only:
        return float(min(_LARGEST_DELAY, _FIRST_DELAY * 2**attempt) * random.uniform(0.75, 1.25))
    return None


# ----------------------------------------------------------------------------------------------------------------
# Servers for new sequences


class Asked(Protocol):
    """A server as far as its load is asked for."""

    failed_at: float  #: time.monotonic() when it last did not answer


A = TypeVar("A", bound=Asked)


def worth_asking(servers: Iterable[A], timeout: float) -> tuple[list[A], float]:
    """The servers to ask for their load, those passed over left out, and the seconds each is given."""
    listed = list(servers)
    now = time.monotonic()
    up = [server for server in listed if now - server.failed_at > DOWN_SECONDS] or listed
    return up, min(timeout, INFO_TIMEOUT) if len(up) > 1 else timeout


class Opening:
    """How the sequences of one open call are spread over the servers: each goes where the fewest tokens are.

    A new sequence is empty, but will not stay so: it is taken to weigh as much as the average open one (at least one
    token). Where the tokens are equal, the sequences count. A server that refuses its share for lack of room is asked
    for less, by bisection, before the call fails as a whole.

    `placed` [address] counts those opened less those closed since `infos` were taken; it is the client's, and kept up
    to date here.
    """

    def __init__(self, infos: SequenceOf[ServerInfo], placed: dict[str, int], count: int) -> None:
        self._infos = [info for info in infos if not info.draining] or list(infos)
        self._placed = placed
        self._room: dict[str, int] = {}  # of the servers that have refused: the most they may have left
        self.remaining = count

    def shares(self) -> dict[str, int]:
        """How many of the remaining ones to ask of each server."""
        sequences = sum(info.sequences for info in self._infos)
        weight = max(1.0, sum(info.tokens for info in self._infos) / sequences if sequences else 1.0)
        load = {info.address: info.tokens + weight * self._placed.get(info.address, 0) for info in self._infos}
        held = {info.address: info.sequences + self._placed.get(info.address, 0) for info in self._infos}
        shares = dict.fromkeys(load, 0)
        for _ in range(self.remaining):
            roomy = [address for address in load if shares[address] < self._most(address)]
            if not roomy:
                break
            target = min(roomy, key=lambda address: (load[address], held[address]))
            shares[target] += 1
            load[target] += weight
            held[target] += 1
        return {address: share for address, share in shares.items() if share}

    def _most(self, address: str) -> int:
        """The most to ask of a server."""
        return (self._room[address] + 1) // 2 if address in self._room else self.remaining

    def opened(self, address: str, share: int) -> None:
        """A server has opened its share."""
        self._placed[address] = self._placed.get(address, 0) + share
        self.remaining -= share
        if address in self._room:
            self._room[address] -= share

    def refused(self, address: str, share: int, error: ResourceExhausted) -> None:
        """A server has no room for its share. Raises `error` if the others cannot make up for it."""
        self._room[address] = share - 1
        if len(self._room) == len(self._infos) and sum(self._room.values()) < self.remaining:
            raise error


def open_request(count: int, placement: Placement, dp_rank: int | None) -> pb.OpenSequencesRequest:
    """The OpenSequences request. InvalidArgument if placement and rank do not go together."""
    if count < 1:
        raise InvalidArgument(f"count: {count}, expected 1 or more")
    if (placement is Placement.EXPLICIT) != (dp_rank is not None):
        raise InvalidArgument("dp_rank: goes with placement EXPLICIT, and only with it")
    return pb.OpenSequencesRequest(count=count, placement=placement.value, dp_rank=dp_rank or 0)


def move_request(sequence: BaseSequence, dp_rank: int | None, spread: bool) -> pb.MoveSequenceRequest:
    """The MoveSequence request. InvalidArgument unless it is told one of where to."""
    if spread != (dp_rank is None):
        raise InvalidArgument("dp_rank: a move goes to a rank, or spreads the sequence")
    return pb.MoveSequenceRequest(sequence=sequence.handle, dp_rank=dp_rank or 0, spread=spread)


def check_geometry(known: Geometry | None, info: ServerInfo) -> Geometry:
    """The geometry of all servers of a client. InvalidArgument if this one's differs."""
    if known is not None and info.geometry != known:
        raise InvalidArgument(f"geometry: {info.geometry}, but the client's other servers have {known}", info.address)
    return info.geometry


def narrow(known: Limits | None, limits: Limits) -> Limits:
    """The limits that hold on every server of a client. 0 is no limit."""
    if known is None:
        return limits
    pairs = {name: (value, getattr(limits, name)) for name, value in vars(known).items()}
    return Limits(**{name: min(pair) or max(pair) for name, pair in pairs.items()})


# ----------------------------------------------------------------------------------------------------------------
# Sequences


class BaseSequence:
    """What a client knows of a sequence: its handle, where it lives, how long it is."""

    def __init__(self, handle: int, dp_rank: int, server: str, length: int = 0) -> None:
        self.handle = handle  #: the opaque handle
        #: the rank it lives on (the home rank, if spread), as last told: a server may even out its load by moves
        self.dp_rank = dp_rank
        self.server = server  #: address of its server
        self.closed = False
        # None: unknown, because a call that may have changed it ended without an answer.
        self._length: int | None = length

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"length {'unknown' if self._length is None else self._length}"
        return f"<sequence {self.handle:#018x} on {self.server} rank {self.dp_rank}, {state}>"


S = TypeVar("S", bound=BaseSequence)


def check_open(sequences: SequenceOf[BaseSequence], servers: Iterable[str]) -> None:
    """NotFound if one is closed already, InvalidArgument if one belongs to another client's server."""
    known = set(servers)
    for index, sequence in enumerate(sequences):
        if sequence.closed:
            raise NotFound(f"sequences[{index}]: closed")
        if sequence.server not in known:
            raise InvalidArgument(f"sequences[{index}]: lives on {sequence.server}, which is no server of this client")


def by_server(sequences: Iterable[S]) -> dict[str, list[S]]:
    """The sequences of each server, in order."""
    groups: dict[str, list[S]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.server, []).append(sequence)
    return groups


# ----------------------------------------------------------------------------------------------------------------
# Batches


def _check_query_lengths(lengths: SequenceOf[int] | None, count: int, limit: int) -> list[int]:
    if lengths is None:
        return [1] * count
    checked = [int(length) for length in lengths]
    if len(checked) != count:
        raise InvalidArgument(f"query_lengths: {len(checked)} values, expected one a sequence: {count}")
    for index, length in enumerate(checked):
        if length < 1 or (limit and length > limit):
            raise InvalidArgument(f"query_lengths[{index}]: {length}, expected 1 to {limit or 'the limit'}")
    return checked


@dataclass
class Part(Generic[S]):
    """The share of a batch that one server computes."""

    server: str
    sequences: list[S] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)  #: [sequences] place of each in the batch
    query_lengths: list[int] = field(default_factory=list)  #: [sequences]
    runs: list[slice] = field(default_factory=list)  #: its rows in the batch's tensors, as few slices as possible

    @property
    def tokens(self) -> int:
        """Rows of all its sequences."""
        return sum(self.query_lengths)

    @property
    def handles(self) -> list[int]:
        """Handles of its sequences."""
        return [sequence.handle for sequence in self.sequences]

    def wire_query_lengths(self) -> list[int]:
        """As the protocol wants them: left out if they are all 1."""
        return [] if self.tokens == len(self.sequences) else self.query_lengths

    def own_words(self, error: AttndError) -> AttndError:
        """`error` with the indices of this part in its message turned into those of the batch."""

        def renumber(match: re.Match[str]) -> str:
            index = int(match[2])
            return f"{match[1]}[{self.indices[index]}]" if index < len(self.indices) else match[0]

        message = re.sub(r"\b(sequences|query_lengths)\[(\d+)\]", renumber, error.message)
        if message == error.message:
            return error
        if isinstance(error, (ResourceExhausted, Aborted)):
            return type(error)(message, error.server, error.retry_after)
        return type(error)(message, error.server)


class Batch(Generic[S]):
    """The sequences of a step or a read with their query lengths, partitioned over the servers."""

    def __init__(
        self,
        sequences: SequenceOf[S],
        query_lengths: SequenceOf[int] | None,
        geometry: Geometry,
        limits: Limits,
        servers: Iterable[str],
    ) -> None:
        self.sequences = list(sequences)
        self.geometry = geometry
        self._limits = limits
        if not self.sequences:
            raise InvalidArgument("sequences: none given")
        check_open(self.sequences, servers)
        self._check_distinct()
        self.query_lengths = _check_query_lengths(query_lengths, len(self.sequences), limits.query_length)
        self.tokens = sum(self.query_lengths)
        self.parts = self._partition()
        for part in self.parts:
            if limits.batch and len(part.sequences) > limits.batch:
                raise InvalidArgument(f"sequences: {len(part.sequences)}, expected at most {limits.batch}", part.server)

    def _check_distinct(self) -> None:
        if len({(sequence.server, sequence.handle) for sequence in self.sequences}) == len(self.sequences):
            return
        seen: dict[tuple[str, int], int] = {}
        for index, sequence in enumerate(self.sequences):
            first = seen.setdefault((sequence.server, sequence.handle), index)
            if first != index:
                raise FailedPrecondition(f"sequences[{index}]: the same sequence as sequences[{first}]")

    def _partition(self) -> list[Part[S]]:
        servers = {sequence.server for sequence in self.sequences}
        if len(servers) == 1:
            indices, runs = list(range(len(self.sequences))), [slice(0, self.tokens)]
            return [Part(servers.pop(), self.sequences, indices, self.query_lengths, runs)]
        parts: dict[str, Part[S]] = {}
        row = 0
        for index, (sequence, length) in enumerate(zip(self.sequences, self.query_lengths)):
            part = parts.setdefault(sequence.server, Part(sequence.server))
            part.sequences.append(sequence)
            part.indices.append(index)
            part.query_lengths.append(length)
            if part.runs and part.runs[-1].stop == row:
                part.runs[-1] = slice(part.runs[-1].start, row + length)
            else:
                part.runs.append(slice(row, row + length))
            row += length
        return list(parts.values())

    def tensors(self, q: Any, k: Any, v: Any) -> Tensors:
        """Checks the tensors of one layer. `k` and `v` are both given or both None."""
        if (k is None) != (v is None):
            raise InvalidArgument("k, v: give both, or neither for a read")
        geometry = self.geometry
        rows = [(_wire.Q, rows_of("q", q, self.tokens, geometry.q_row, "heads_q, head_dim", geometry))]
        if k is not None:
            rows.append((_wire.K, rows_of("k", k, self.tokens, geometry.k_row, "heads_kv, head_dim", geometry)))
            rows.append((_wire.V, rows_of("v", v, self.tokens, geometry.v_row, "heads_kv, head_dim_v", geometry)))
        tensors = Tensors(rows)
        for part in self.parts:
            check_message_size(tensors.row_bytes * part.tokens + 16 * len(part.sequences), self._limits, part.server)
        return tensors

    def join(self, responses: SequenceOf[_wire.Response], lse_wanted: bool) -> LayerResult:
        """The result of a layer from its parts' responses, rows in the batch's order."""
        out_row, header = self.geometry.out_row, responses[0].header
        lse = None
        if len(self.parts) == 1:
            server = self.parts[0].server
            out = _array("out", responses[0].out, (self.tokens, *out_row), self.geometry.dtype, server)
            if lse_wanted:
                lse = _array("lse", responses[0].lse, (self.tokens, out_row[0]), np.dtype(np.float32), server)
        else:
            out = np.empty((self.tokens, *out_row), self.geometry.dtype)
            lse = np.empty((self.tokens, out_row[0]), np.float32) if lse_wanted else None
            for part, response in zip(self.parts, responses):
                _scatter(part, "out", response.out, out)
                if lse is not None:
                    _scatter(part, "lse", response.lse, lse)
        timing = tuple(
            timing_of(part.server, rank)
            for part, response in zip(self.parts, responses)
            for rank in response.header.timing
        )
        return LayerResult(out, lse, header.layer, header.committed, timing)


class Tensors:
    """The checked tensors of one layer: [(field number, [tokens, bytes of a row])]."""

    def __init__(self, rows: list[tuple[int, Array]]) -> None:
        self._rows = rows
        self.row_bytes = sum(array.shape[1] for _, array in rows)

    @property
    def reads_only(self) -> bool:
        """Queries alone, without new keys and values."""
        return len(self._rows) == 1

    def of(self, part: Part[Any]) -> list[tuple[int, _wire.Pieces]]:
        """The rows of one part, where they lie."""
        return [(number, [array[run].data for run in part.runs]) for number, array in self._rows]


def rows_of(name: str, array: Any, rows: int, row_shape: tuple[int, int], words: str, geometry: Geometry) -> Array:
    """`array` as bytes, [rows, bytes of a row]; a view if it is packed. InvalidArgument names what was expected."""
    array = np.asarray(array)
    expected = (rows, *row_shape)
    if array.shape != expected:
        raise InvalidArgument(f"{name}: shape {array.shape}, expected {expected} [tokens, {words}]")
    if array.dtype != geometry.dtype:
        raise InvalidArgument(
            f"{name}: dtype {array.dtype}, expected {geometry.dtype}: convert it with {name}.astype(client.dtype)"
        )
    return np.ascontiguousarray(array).reshape(rows, -1).view(np.uint8)


def check_message_size(payload_bytes: int, limits: Limits, server: str) -> None:
    """ResourceExhausted if the server would refuse the message for its size."""
    size = payload_bytes + _wire.OVERHEAD_BYTES
    if limits.message_bytes and size > limits.message_bytes:
        raise ResourceExhausted(
            f"message: about {size} bytes, over the limit of {limits.message_bytes}; use fewer rows a call", server
        )


def _array(name: str, data: memoryview | None, shape: tuple[int, ...], dtype: np.dtype[Any], server: str) -> Array:
    expected = math.prod(shape) * dtype.itemsize
    if data is None or data.nbytes != expected:
        size = 0 if data is None else data.nbytes
        raise AttndError(f"{name}: {size} bytes in the response, expected {expected}", server)
    return np.frombuffer(data, dtype).reshape(shape)


def _scatter(part: Part[Any], name: str, data: memoryview | None, target: Array) -> None:
    source = _array(name, data, (part.tokens, *target.shape[1:]), target.dtype, part.server)
    row = 0
    for run in part.runs:
        count = run.stop - run.start
        target[run] = source[row : row + count]
        row += count


# ----------------------------------------------------------------------------------------------------------------
# Requests


def step_begin(part: Part[Any], geometry: Geometry, options: Options, read_only: bool) -> pb.StepBegin:
    """Announces a part's step on a stream."""
    return pb.StepBegin(
        sequences=part.handles,
        query_lengths=part.wire_query_lengths(),
        options=options.to_proto(geometry),
        dtype=dtype_code(geometry),
        read_only=read_only,
    )


def decode_header(part: Part[Any], geometry: Geometry, options: Options, layer: int, step: int) -> pb.DecodeRequest:
    """The small fields of a unary Decode; `step` 0 begins a step or reads."""
    return pb.DecodeRequest(
        step=step,
        layer=layer,
        sequences=part.handles if step == 0 else [],
        query_lengths=part.wire_query_lengths() if step == 0 else [],
        options=options.to_proto(geometry),
        dtype=dtype_code(geometry),
    )


def append_messages(
    sequence: BaseSequence, k: Iterable[Any], v: Iterable[Any], tokens: int | None, geometry: Geometry, limits: Limits
) -> Iterator[bytes]:
    """The messages of one AppendKv call, layer by layer; the begin travels with the first.

    Raises InvalidArgument midway if a layer has the wrong shape, or there are too few or too many layers.
    The last message is held back until everything has been looked at: a wrong upload is never
    complete on the wire, so no server can take it for one that is.
    """
    messages = _checked_messages(sequence, k, v, tokens, geometry, limits)
    held = next(messages)
    for message in messages:
        yield held
        held = message
    yield held


def _checked_messages(
    sequence: BaseSequence, k: Iterable[Any], v: Iterable[Any], tokens: int | None, geometry: Geometry, limits: Limits
) -> Iterator[bytes]:
    row_bytes = geometry.kv_token_bytes
    aim = min(APPEND_CHUNK_BYTES, limits.message_bytes or APPEND_CHUNK_BYTES)
    step = max(1, (aim - _wire.OVERHEAD_BYTES) // row_bytes)
    check_message_size(row_bytes, limits, sequence.server)
    layers = 0
    for layer, (layer_k, layer_v) in enumerate(_both(k, v)):
        if layer >= geometry.layers:
            raise InvalidArgument(f"k, v: more than layers = {geometry.layers} layers")
        count = len(layer_k) if tokens is None else tokens
        if count < 1:
            raise InvalidArgument(f"k[{layer}]: no tokens")
        keys = rows_of(f"k[{layer}]", layer_k, count, geometry.k_row, "heads_kv, head_dim", geometry)
        values = rows_of(f"v[{layer}]", layer_v, count, geometry.v_row, "heads_kv, head_dim_v", geometry)
        for offset in range(0, count, step):
            chunk = slice(offset, min(offset + step, count))
            header = pb.AppendKvRequest(layer=layer, token_offset=offset, tokens=chunk.stop - chunk.start)
            if tokens is None:
                tokens = count
            if layer == 0 and offset == 0:
                header.begin.sequence = sequence.handle
                header.begin.tokens = count
                header.begin.dtype = dtype_code(geometry)
            yield _wire.encode(header, [(_wire.K, [keys[chunk].data]), (_wire.V, [values[chunk].data])])
        layers += 1
    if layers < geometry.layers:
        raise InvalidArgument(f"k, v: {layers} layers, expected {geometry.layers}")


_END = object()


def _both(k: Iterable[Any], v: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs the layers of k and v. InvalidArgument if one ends before the other."""
    keys, values = iter(k), iter(v)
    while True:
        layer_k, layer_v = next(keys, _END), next(values, _END)
        if layer_k is _END and layer_v is _END:
            return
        if layer_k is _END or layer_v is _END:
            raise InvalidArgument("k, v: differ in their number of layers")
        yield layer_k, layer_v


# ----------------------------------------------------------------------------------------------------------------
# ExportKv


def export_request(sequence: BaseSequence, position: int, tokens: int | None) -> pb.ExportKvRequest:
    """The ExportKv request; `tokens` None: all from `position` on. InvalidArgument if the range is none."""
    if position < 0:
        raise InvalidArgument(f"position: {position}, expected 0 or more")
    if tokens is not None and tokens < 1:
        raise InvalidArgument(f"tokens: {tokens}, expected 1 or more, or None for all")
    return pb.ExportKvRequest(sequence=sequence.handle, position=position, tokens=tokens or 0)


class Export:
    """Puts the responses of one ExportKv call together: layers in order, the chunks of a layer without gaps.

    Each chunk is copied once, from the received bytes to where it belongs. `take` and `arrays` raise AttndError if
    the server does not keep to that.

    Args:
        tokens: as many as were asked for; None: as many as the server says.
        server: whose responses they are, for the errors.
    """

    def __init__(self, geometry: Geometry, tokens: int | None, server: str) -> None:
        self._geometry = geometry
        self._total = tokens
        self._server = server
        self._k: list[Array] = []  # [layers], once the first response has told how many tokens there are
        self._v: list[Array] = []
        self._layer = self._offset = 0  # of the chunk that comes next

    def take(self, data: bytes) -> None:
        """The next response."""
        try:
            header, k, v = _wire.decode_chunk(data)
        except (ValueError, DecodeError) as error:
            raise AttndError(f"export: {error}", self._server) from None
        geometry, total, tokens = self._geometry, header.total, header.tokens
        first = not self._k
        if self._total is not None and total != self._total:
            raise AttndError(f"total: {total} in the response, expected {self._total}", self._server)
        if first:
            self._total = total
            self._k = [np.empty((total, *geometry.k_row), geometry.dtype) for _ in range(geometry.layers)]
            self._v = [np.empty((total, *geometry.v_row), geometry.dtype) for _ in range(geometry.layers)]
        if first and total == 0 and tokens == 0:
            self._layer = geometry.layers
            return
        if self._layer == geometry.layers:
            raise AttndError("export: a response after the last one", self._server)
        if (header.layer, header.token_offset) != (self._layer, self._offset):
            raise AttndError(
                f"layer, token_offset: {header.layer}, {header.token_offset} in the response, "
                f"expected {self._layer}, {self._offset}",
                self._server,
            )
        if not 1 <= tokens <= total - self._offset:
            raise AttndError(f"tokens: {tokens} in the response, expected 1 to {total - self._offset}", self._server)
        if header.dtype != dtype_code(geometry):
            raise AttndError(f"dtype: {header.dtype} in the response, expected {geometry.dtype_name}", self._server)
        chunk = slice(self._offset, self._offset + tokens)
        for name, tensor, target in (("k", k, self._k), ("v", v, self._v)):
            rows = target[self._layer][chunk]
            rows[...] = _array(name, tensor, rows.shape, geometry.dtype, self._server)
        self._offset += tokens
        if self._offset == total:
            self._layer, self._offset = self._layer + 1, 0

    def arrays(self) -> tuple[list[Array], list[Array]]:
        """K and V of every layer, once the call has ended."""
        if self._layer < self._geometry.layers:
            raise AttndError(
                f"export: ended at layer {self._layer}, token {self._offset}, "
                f"expected {self._geometry.layers} layers of {self._total or 'all'} tokens",
                self._server,
            )
        return self._k, self._v
