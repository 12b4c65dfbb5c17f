"""A model of what sequences hold, kept beside the server: random tensors in, float64 attention expected out."""

from __future__ import annotations

from typing import Any

import numpy as np
from fake_server import attention

import attnd
from attnd._proto import attnd_pb2 as pb

TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}


class Oracle:
    """Keeps K and V of sequences by their handle and computes what a layer must give."""

    def __init__(self, geometry: attnd.Geometry, seed: int = 0) -> None:
        self.geometry = geometry
        self.random = np.random.default_rng(seed)
        self.k: dict[int, list[Any]] = {}
        self.v: dict[int, list[Any]] = {}

    def tensors(self, tokens: int) -> tuple[Any, Any, Any]:
        """Random q, k, v rows in the server's dtype."""
        g = self.geometry
        return tuple(self.random.uniform(-2, 2, (tokens, *row)).astype(g.dtype) for row in (g.q_row, g.k_row, g.v_row))  # type: ignore[return-value]

    def held(self, sequence: Any, layer: int) -> tuple[Any, Any]:
        g = self.geometry
        empty = (np.zeros((0, *g.k_row), g.dtype), np.zeros((0, *g.v_row), g.dtype))
        if sequence.handle not in self.k:
            return empty
        return self.k[sequence.handle][layer], self.v[sequence.handle][layer]

    def append(self, sequence: Any, k: Any, v: Any) -> None:
        """k [layers, tokens, heads_kv, head_dim], v likewise, as uploaded or stepped."""
        old = [self.held(sequence, layer) for layer in range(self.geometry.layers)]
        self.k[sequence.handle] = [np.concatenate([ok, nk]) for (ok, _), nk in zip(old, k)]
        self.v[sequence.handle] = [np.concatenate([ov, nv]) for (_, ov), nv in zip(old, v)]

    def expect(
        self, sequences: Any, lengths: Any, layer: int, q: Any, k: Any = None, v: Any = None, options: Any | None = None
    ) -> tuple[Any, Any]:
        """(out, lse) in float64 of one layer; without k and v of a read."""
        wire = (options or attnd.Options()).to_proto(self.geometry) if options else pb.AttentionOptions()
        outs, lses, row = [], [], 0
        for sequence, length in zip(sequences, lengths):
            some = slice(row, row + length)
            keys, values = self.held(sequence, layer)
            first = None if k is None else len(keys)
            if k is not None:
                keys, values = np.concatenate([keys, k[some]]), np.concatenate([values, v[some]])
            out, lse = attention(q[some], keys, values, first, wire)
            outs.append(out)
            lses.append(lse)
            row += length
        return np.concatenate(outs), np.concatenate(lses)

    def check(self, out: Any, expected: Any) -> None:
        """Asserts that an output is right within the dtype's rounding."""
        assert out.dtype == self.geometry.dtype
        error = np.linalg.norm(np.asarray(out, np.float64) - expected) / max(1e-30, np.linalg.norm(expected))
        assert error <= TOLERANCE[self.geometry.dtype_name], error
