"""Python client of attnd, attention compute as a remote service.

A model-serving frontend keeps the weights and the MLP; attnd keeps the paged KV cache and runs decode attention.
`Client` (blocking) and `AsyncClient` (asyncio) speak to one server or several; `Session` hides handles and steps.

Tensors are numpy arrays, row-major, in the server's dtype (ml_dtypes.bfloat16 for bf16):

    q    [tokens, heads_q,  head_dim]
    k    [tokens, heads_kv, head_dim]
    v    [tokens, heads_kv, head_dim_v]
    out  [tokens, heads_q,  head_dim_v]
    lse  [tokens, heads_q]                 float32, natural log

where `tokens` runs over the sequences of the call in order, each with its query length of rows.
"""

from attnd.aio import AsyncClient, AsyncSequence, AsyncStep
from attnd.client import Client, Sequence, Step
from attnd.errors import (
    Aborted,
    AttndError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from attnd.session import Session
from attnd.types import (
    EXPLICIT,
    LEAST_TOKENS,
    ROUND_ROBIN,
    SPREAD,
    Geometry,
    LayerResult,
    Limits,
    Options,
    Placement,
    RankInfo,
    RankTiming,
    SequenceInfo,
    ServerInfo,
)

__version__ = "0.1.0"

__all__ = [
    "EXPLICIT",
    "LEAST_TOKENS",
    "ROUND_ROBIN",
    "SPREAD",
    "Aborted",
    "AsyncClient",
    "AsyncSequence",
    "AsyncStep",
    "AttndError",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Geometry",
    "Internal",
    "InvalidArgument",
    "LayerResult",
    "Limits",
    "NotFound",
    "Options",
    "PermissionDenied",
    "Placement",
    "RankInfo",
    "RankTiming",
    "ResourceExhausted",
    "Sequence",
    "SequenceInfo",
    "ServerInfo",
    "Session",
    "Step",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
]
