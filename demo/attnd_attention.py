"""The attention that llama_numpy.Llama asks for, computed by an attnd server; and what can be observed of one."""

import dataclasses
import time

import numpy as np

PARTS = ("queue", "copy_in", "plan", "attention", "combine", "copy_out")


@dataclasses.dataclass
class LayerCall:
    """One layer of one pass, as it was timed. Seconds."""

    wall: float  # from handing over q, k and v to having the output
    timing: tuple  # attnd.RankTiming of each rank that had work

    def slowest_rank(self):
        """The server's parts, in seconds, on the rank that took longest: the others ran beside it."""
        ranks = [{part: getattr(rank, part + "_us") / 1e6 for part in PARTS} for rank in self.timing]
        return max(ranks, key=lambda parts: sum(parts.values()))


class AttndAttention:
    """Attends through an attnd.Session. A sequence seen for the first time is opened, on the least loaded rank.

    `calls` holds a LayerCall for each layer of each pass.
    """

    def __init__(self, session):
        self._session = session
        self.calls = []

    def begin(self, query_lengths, sequences):
        missing = max(sequences) + 1 - len(self._session.sequences)
        if missing > 0:
            self._session.add(missing)
        return self._session.begin(query_lengths, [self._session.sequences[index] for index in sequences])

    def attend(self, layer, q, k, v):
        start = time.perf_counter()
        out = self._session.attend(layer, q, k, v)
        self.calls.append(LayerCall(time.perf_counter() - start, self._session.last.timing))
        return out


class Recorded:
    """Attention that keeps the outputs of another: `outputs[pass][layer]` is [tokens, heads_q, head_dim]."""

    def __init__(self, attention):
        self._attention = attention
        self.outputs = []

    def begin(self, query_lengths, sequences):
        self.outputs.append([])
        return self._attention.begin(query_lengths, sequences)

    def attend(self, layer, q, k, v):
        out = self._attention.attend(layer, q, k, v)
        self.outputs[-1].append(np.array(out, dtype=np.float64))
        return out


class Error:
    """How far outputs are from a reference: `largest` difference, and `relative`, the norm of all of it."""

    def __init__(self):
        self.largest = 0.0
        self._difference = 0.0
        self._reference = 0.0

    def add(self, output, reference):
        difference = np.asarray(output, np.float64) - reference
        # A NaN stays: max() alone would drop it.
        self.largest = float(np.maximum(self.largest, np.abs(difference).max(initial=0.0)))
        self._difference += float((difference**2).sum())
        self._reference += float((np.asarray(reference, np.float64)**2).sum())

    @property
    def relative(self):
        return (self._difference / self._reference) ** 0.5 if self._reference else 0.0
