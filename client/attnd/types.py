"""The nouns of the API: geometry, load, limits, options, timing."""

from __future__ import annotations

import enum
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from attnd._proto import attnd_pb2 as pb
from attnd.errors import InvalidArgument

Array = npt.NDArray[Any]

_DTYPES: dict[pb.DType, tuple[str, Any]] = {
    pb.DTYPE_BF16: ("bf16", np.dtype(ml_dtypes.bfloat16)),
    pb.DTYPE_FP16: ("fp16", np.dtype(np.float16)),
    pb.DTYPE_FP32: ("fp32", np.dtype(np.float32)),
}
_KV_DTYPES: dict[pb.DType, tuple[str, Any]] = {
    **_DTYPES,
    pb.DTYPE_FP8_E4M3: ("fp8_e4m3", np.dtype(ml_dtypes.float8_e4m3fn)),
}


class Placement(enum.Enum):
    """Which rank of the server a new sequence lives on."""

    LEAST_TOKENS = pb.PLACEMENT_LEAST_TOKENS  #: the rank that holds the fewest tokens, in flight included
    ROUND_ROBIN = pb.PLACEMENT_ROUND_ROBIN  #: one after another
    EXPLICIT = pb.PLACEMENT_EXPLICIT  #: the rank given, obeyed or refused
    SPREAD = pb.PLACEMENT_SPREAD  #: striped over all ranks: one long sequence uses every rank's bandwidth


LEAST_TOKENS = Placement.LEAST_TOKENS
ROUND_ROBIN = Placement.ROUND_ROBIN
EXPLICIT = Placement.EXPLICIT
SPREAD = Placement.SPREAD


@dataclass(frozen=True)
class Geometry:
    """What the server computes with; the same for every sequence of a server."""

    layers: int
    heads_q: int
    heads_kv: int
    head_dim: int  #: of q and k
    head_dim_v: int  #: of v and out
    dtype: np.dtype[Any]  #: of q, k, v and out: ml_dtypes.bfloat16, numpy.float16 or numpy.float32
    dtype_name: str  #: "bf16", "fp16" or "fp32"
    page_size: int  #: tokens a page
    kv_dtype: np.dtype[Any]  #: what the server stores keys and values as: dtype, or ml_dtypes.float8_e4m3fn
    kv_dtype_name: str  #: that of dtype, or "fp8_e4m3"

    @property
    def q_row(self) -> tuple[int, int]:
        """Shape of one token's queries: [heads_q, head_dim]."""
        return (self.heads_q, self.head_dim)

    @property
    def k_row(self) -> tuple[int, int]:
        """Shape of one token's keys: [heads_kv, head_dim]."""
        return (self.heads_kv, self.head_dim)

    @property
    def v_row(self) -> tuple[int, int]:
        """Shape of one token's values: [heads_kv, head_dim_v]."""
        return (self.heads_kv, self.head_dim_v)

    @property
    def out_row(self) -> tuple[int, int]:
        """Shape of one token's output: [heads_q, head_dim_v]."""
        return (self.heads_q, self.head_dim_v)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's K and V of one layer on their way to the server: in dtype, whatever kv_dtype is."""
        return self.heads_kv * (self.head_dim + self.head_dim_v) * self.dtype.itemsize


@dataclass(frozen=True)
class RankInfo:
    """One data-parallel rank and its load."""

    rank: int
    state: str  #: "serving", "lost", or "restarting": lost, and about to serve again, empty
    device: str
    sequences: int
    tokens: int  #: held
    tokens_in_flight: int
    pages_total: int
    pages_free: int
    queue_depth: int  #: calls waiting
    calls: int  #: layer calls run since the server started
    losses: int  #: since then
    stalls: int  #: of those, because it had work and did not move
    restarts: int  #: since then
    last_error: str  #: why it was lost last, or could not be restarted; "": it never was
    process: int = 0  #: its process, where ranks have their own; 0: the server's, or the rank is lost


@dataclass(frozen=True)
class Limits:
    """The server's limits; 0 means it told none."""

    message_bytes: int  #: the largest request message
    batch: int  #: sequences a step
    query_length: int  #: rows a sequence and step
    sequences: int  #: open at once
    sequence_tokens: int  #: length of one sequence
    step_idle_ms: int  #: a unary step whose next layer does not come for so long is aborted


@dataclass(frozen=True)
class ServerInfo:
    """One server: geometry, ranks with their load, limits."""

    address: str
    version: str
    instance: str  #: random, new at every start: handles of another instance are stale
    backend: str  #: "cpu", "cuda" or "reference"
    backend_detail: str
    geometry: Geometry
    ranks: tuple[RankInfo, ...]
    limits: Limits
    uptime: float  #: seconds
    draining: bool  #: shutting down: new calls are refused
    degraded: bool  #: a rank does not serve

    @property
    def tokens(self) -> int:
        """Tokens held and in flight, over all ranks: what new sequences are balanced by."""
        return sum(rank.tokens + rank.tokens_in_flight for rank in self.ranks)

    @property
    def sequences(self) -> int:
        """Sequences open, over all ranks (a spread one counts once for each part)."""
        return sum(rank.sequences for rank in self.ranks)


@dataclass(frozen=True)
class SequenceInfo:
    """One sequence as the server sees it."""

    length: int  #: committed tokens
    dp_rank: int  #: the home rank, if spread
    spread: bool
    pages: int  #: referenced, on all ranks
    shared_pages: int  #: of those, shared with other sequences
    busy: bool  #: in a step or an upload right now


@dataclass(frozen=True)
class Options:
    """How to attend. The defaults are plain causal attention with scale 1 / sqrt(head_dim).

    Attributes:
        softmax_scale: factor on q.k; None: 1 / sqrt(head_dim).
        softcap: c > 0 makes a score c * tanh(score * scale / c); 0: off.
        sliding_window: w > 0: a query at position p sees positions p - w + 1 .. p; 0: off.
        sinks: [heads_q] logits that join the softmax's denominator only; None: none.
        return_lse: also return the natural log of the softmax's denominator.
        batch_invariant: bitwise the same output whatever else is in the batch, on any rank.
        return_timing: also return where the time went, rank by rank.
    """

    softmax_scale: float | None = None
    softcap: float = 0.0
    sliding_window: int = 0
    sinks: SequenceOf[float] | npt.NDArray[np.floating[Any]] | None = None
    return_lse: bool = False
    batch_invariant: bool = False
    return_timing: bool = False

    def to_proto(self, geometry: Geometry) -> pb.AttentionOptions:
        """The wire message. InvalidArgument if `sinks` is not one logit a query head."""
        sinks = [] if self.sinks is None else [float(sink) for sink in self.sinks]
        if self.sinks is not None and len(sinks) != geometry.heads_q:
            raise InvalidArgument(f"options.sinks: {len(sinks)} values, expected heads_q = {geometry.heads_q}")
        return pb.AttentionOptions(
            softmax_scale=self.softmax_scale or 0.0,
            softcap=self.softcap,
            sliding_window=self.sliding_window,
            sinks=sinks,
            return_lse=self.return_lse,
            batch_invariant=self.batch_invariant,
            return_timing=self.return_timing,
        )


@dataclass(frozen=True)
class RankTiming:
    """Where one layer's time went on one rank, in microseconds."""

    server: str
    rank: int
    sequences: int
    tokens: int  #: KV tokens attended to
    queue_us: float
    copy_in_us: float
    plan_us: float
    attention_us: float
    combine_us: float
    copy_out_us: float
    merged_calls: int  #: calls that shared the launch, this one included
    device_us: float  #: of attention_us, what the device's clock says of the kernels; 0 on a CPU


@dataclass(frozen=True)
class LayerResult:
    """The result of one layer.

    Attributes:
        out: [tokens, heads_q, head_dim_v] in the server's dtype. A read-only view of the response's bytes (of any
            alignment) where one server had all the sequences: copy it to write to it.
        lse: [tokens, heads_q] float32, natural log; None unless asked for. -inf where nothing was visible.
        layer: which layer.
        committed: this was the step's last layer: the sequences have grown.
        timing: of the ranks that had work; empty unless asked for.
    """

    out: Array
    lse: npt.NDArray[np.float32] | None
    layer: int
    committed: bool
    timing: tuple[RankTiming, ...] = ()


def dtype_code(geometry: Geometry) -> pb.DType:
    """The wire's number of the geometry's dtype."""
    return next(code for code, (name, _) in _DTYPES.items() if name == geometry.dtype_name)


def _geometry_of(g: pb.Geometry, stored: pb.DType) -> Geometry:
    dtype_name, dtype = _DTYPES[g.dtype]
    kv_dtype_name, kv_dtype = _KV_DTYPES[stored]
    return Geometry(
        layers=g.layers,
        heads_q=g.heads_q,
        heads_kv=g.heads_kv,
        head_dim=g.head_dim,
        head_dim_v=g.head_dim_v,
        dtype=dtype,
        dtype_name=dtype_name,
        page_size=g.page_size,
        kv_dtype=kv_dtype,
        kv_dtype_name=kv_dtype_name,
    )


_RANK_STATES = {pb.RANK_STATE_SERVING: "serving", pb.RANK_STATE_RESTARTING: "restarting"}


def rank_info_of(message: pb.RankInfo) -> RankInfo:
    """Reads one rank of a GetServerInfo response. A state that this client does not know does not serve: "lost"."""
    return RankInfo(
        rank=message.rank,
        state=_RANK_STATES.get(message.state, "lost"),
        device=message.device,
        sequences=message.sequences,
        tokens=message.tokens,
        tokens_in_flight=message.tokens_in_flight,
        pages_total=message.pages_total,
        pages_free=message.pages_free,
        queue_depth=message.queue_depth,
        calls=message.calls,
        losses=message.losses,
        stalls=message.stalls,
        restarts=message.restarts,
        last_error=message.last_error,
        process=message.process,
    )


def server_info_of(address: str, message: pb.GetServerInfoResponse) -> ServerInfo:
    """Reads a GetServerInfo response. InvalidArgument if its dtypes are none that this client knows."""
    g = message.geometry
    if g.dtype not in _DTYPES:
        raise InvalidArgument(f"geometry.dtype: {int(g.dtype)} is unknown to this client; upgrade it", address)
    stored = g.kv_dtype or g.dtype  # a server that does not tell stores what it is sent
    if stored not in _KV_DTYPES:
        raise InvalidArgument(f"geometry.kv_dtype: {int(stored)} is unknown to this client; upgrade it", address)
    return ServerInfo(
        address=address,
        version=message.version,
        instance=message.instance,
        backend=message.backend,
        backend_detail=message.backend_detail,
        geometry=_geometry_of(g, stored),
        ranks=tuple(rank_info_of(r) for r in message.ranks),
        limits=Limits(
            message_bytes=message.limits.message_bytes,
            batch=message.limits.batch,
            query_length=message.limits.query_length,
            sequences=message.limits.sequences,
            sequence_tokens=message.limits.sequence_tokens,
            step_idle_ms=message.limits.step_idle_ms,
        ),
        uptime=message.uptime_ms / 1000,
        draining=message.draining,
        degraded=message.degraded,
    )


def sequence_info_of(message: pb.SequenceInfo) -> SequenceInfo:
    """Reads one sequence of a DescribeSequences response."""
    return SequenceInfo(
        length=message.length,
        dp_rank=message.dp_rank,
        spread=message.spread,
        pages=message.pages,
        shared_pages=message.shared_pages,
        busy=message.busy,
    )


def timing_of(server: str, message: pb.RankTiming) -> RankTiming:
    """Reads one rank's timing."""
    return RankTiming(
        server=server,
        rank=message.rank,
        sequences=message.sequences,
        tokens=message.tokens,
        queue_us=message.queue_us,
        copy_in_us=message.copy_in_us,
        plan_us=message.plan_us,
        attention_us=message.attention_us,
        combine_us=message.combine_us,
        copy_out_us=message.copy_out_us,
        merged_calls=message.merged_calls,
        device_us=message.device_us,
    )
