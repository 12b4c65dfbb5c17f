"""A Session hides handles and steps: what is left of attention in a model's loop is one call a layer."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from attnd.errors import AttndError, FailedPrecondition, InvalidArgument
from attnd.types import LEAST_TOKENS, Array, LayerResult, Options, Placement

if TYPE_CHECKING:
    from attnd.client import Client, Sequence, Step

Positions = npt.NDArray[np.int64]


class Session:
    """The sequences of one model loop, and the step that is under way. Made by Client.session.

    A forward pass begins with `begin`, which says how many new tokens each sequence has and gives their positions,
    and calls `attend` once a layer; the last layer commits:

        def forward(tokens, positions):                     # one new token a row
            x = embedding[tokens]
            for index, layer in enumerate(layers):
                q, k, v = layer.project(x, positions)
                x = layer.finish(x, session.attend(index, q, k, v))
            return head(x)

        logits = session.run(forward, prompts)              # any lengths: prefill, in pieces where it must be
        while ...:
            logits = session.run(forward, [[token] for token in sampled])

    `run` calls `begin` itself. Without `begin`, `attend` at layer 0 takes one new token a sequence.

    A failed or abandoned pass leaves every sequence as it was; the session goes on with the next. A context manager
    that closes its sequences. For one thread.
    """

    def __init__(
        self,
        client: Client,
        *,
        options: Options | None = None,
        placement: Placement = LEAST_TOKENS,
        stream: bool = True,
        timeout: float | None = None,
    ) -> None:
        self.client = client
        self._options = options
        self._placement = placement
        self._stream = stream
        self._timeout = timeout
        self._sequences: list[Sequence] = []
        self._step: Step | None = None
        self._last: LayerResult | None = None

    # -- Sequences

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Its sequences, in the order in which tensors have their rows."""
        return tuple(self._sequences)

    @property
    def lengths(self) -> Positions:
        """[sequences] committed tokens of each."""
        return np.array([sequence.length for sequence in self._sequences], dtype=np.int64)

    def add(self, count: int = 1) -> list[Sequence]:
        """Opens `count` sequences and appends them to the session's. Between passes."""
        self._check_between_passes()
        opened = self.client.open(count, placement=self._placement)
        self._sequences += opened
        return opened

    def adopt(self, sequence: Sequence) -> None:
        """Appends a sequence opened or forked elsewhere; the session closes it with its own. Between passes."""
        self._check_between_passes()
        self._sequences.append(sequence)

    def fork(self, sequence: Sequence, length: int | None = None) -> Sequence:
        """Forks a sequence and appends the fork to the session's. Between passes."""
        fork = self.client.fork(sequence, length)
        self.adopt(fork)
        return fork

    def remove(self, *sequences: Sequence) -> None:
        """Closes sequences and takes them out of the session. Between passes."""
        self._check_between_passes()
        for sequence in sequences:
            self._sequences.remove(sequence)
        self.client.close_sequences(sequences)

    # -- Passes

    def begin(
        self, query_lengths: SequenceOf[int] | None = None, sequences: SequenceOf[Sequence] | None = None
    ) -> Positions:
        """Begins a pass over all layers. Nothing is sent before its first layer.

        Args:
            query_lengths: new tokens of each sequence, 1 to limits.query_length; None: 1 each.
            sequences: which of the session's sequences take part; None: all.

        Returns:
            [tokens] the position of each row in its sequence, as RoPE wants it.
        """
        self._check_between_passes()
        chosen = self._sequences if sequences is None else list(sequences)
        lengths = [1] * len(chosen) if query_lengths is None else [int(length) for length in query_lengths]
        self._step = self.client.step(chosen, lengths, self._options, stream=self._stream, timeout=self._timeout)
        starts = [sequence.length for sequence in chosen]
        return np.concatenate(
            [np.arange(start, start + length, dtype=np.int64) for start, length in zip(starts, lengths)]
        )

    def attend(self, layer: int, q: Any, k: Any, v: Any, options: Options | None = None) -> Array:
        """One layer of the pass: appends k and v, attends with q, causally among the new tokens.

        Floating-point tensors of another dtype are rounded to the server's.

        Args:
            layer: 0, 1, .. layers - 1, in this order; the last one commits the pass.
            q: [tokens, heads_q, head_dim].
            k: [tokens, heads_kv, head_dim].
            v: [tokens, heads_kv, head_dim_v].
            options: for this layer, instead of the session's.

        Returns:
            out [tokens, heads_q, head_dim_v] in the server's dtype, read-only. `last` has the LSE and the timing.
        """
        if self._step is None:
            if layer != 0:
                raise InvalidArgument(f"layer: {layer}, expected 0: no pass has begun")
            self.begin()
        step = self._step
        assert step is not None
        if layer != step.next_layer:
            raise InvalidArgument(f"layer: {layer}, expected {step.next_layer}")
        tensors = [self._cast(tensor) for tensor in (q, k, v)]
        try:
            out = step.layer(*tensors, options=options)
        except AttndError:
            self.abort()
            raise
        self._last = step.last
        if step.committed:
            self._step = None
        return out

    def abort(self) -> None:
        """Drops the pass under way, if any: every sequence stays as it was."""
        if self._step is not None:
            self._step.abort()
            self._step = None

    @property
    def last(self) -> LayerResult:
        """Everything about the latest layer: out, lse, timing."""
        if self._last is None:
            raise FailedPrecondition("session: no layer has run yet")
        return self._last

    def run(
        self,
        forward: Callable[[Array, Positions], Any],
        inputs: SequenceOf[Any],
        sequences: SequenceOf[Sequence] | None = None,
    ) -> list[Array]:
        """Runs a model over any number of new tokens a sequence: all in one pass if they are few, else in several.

        A step takes at most limits.query_length rows a sequence, and a message has a limit, so long prompts are
        prefilled in pieces. A sequence whose rows are used up sits the remaining passes out.

        Args:
            forward: called as forward(rows, positions) for each pass, rows being the inputs of that pass, packed
                [tokens, ...], and positions [tokens]; calls `attend` for every layer; returns an array [tokens, ...].
            inputs: for each sequence an array [its new tokens, ...], of any length, 0 included.
            sequences: which of the session's; None: all.

        Returns:
            For each sequence the outputs of its rows, [its new tokens, ...].

        If a pass fails, the passes before it stay committed: each sequence's length says how far it got.
        """
        chosen = list(self._sequences if sequences is None else sequences)
        rows = [np.asarray(rows) for rows in inputs]
        if len(rows) != len(chosen):
            raise InvalidArgument(f"inputs: {len(rows)} arrays, expected one a sequence: {len(chosen)}")
        outputs: list[list[Array]] = [[] for _ in rows]
        for takes in self._passes([len(array) for array in rows]):
            indices = [index for index, take in enumerate(takes) if take.stop > take.start]
            lengths = [takes[index].stop - takes[index].start for index in indices]
            positions = self.begin(lengths, [chosen[index] for index in indices])
            try:
                result = np.asarray(
                    forward(np.concatenate([rows[index][takes[index]] for index in indices]), positions)
                )
                if self._step is not None:
                    raise FailedPrecondition(f"forward: returned before layer {self._step.next_layer} was attended")
            finally:
                self.abort()
            if len(result) != sum(lengths):
                raise InvalidArgument(f"forward: returned {len(result)} rows, expected {sum(lengths)}")
            for index, piece in zip(indices, np.split(result, np.cumsum(lengths)[:-1])):
                outputs[index].append(piece)
        return [np.concatenate(pieces) if pieces else np.empty((0,)) for pieces in outputs]

    def _passes(self, lengths: SequenceOf[int]) -> list[list[slice]]:
        """Cuts the rows of each sequence into passes: [pass][sequence] which of its rows."""
        limit = self.client.limits.query_length or max(lengths, default=0)
        done = [0] * len(lengths)
        passes = []
        while any(position < length for position, length in zip(done, lengths)):
            room = self._rows_per_message()
            waiting = sum(position < length for position, length in zip(done, lengths))
            takes = []
            for position, length in zip(done, lengths):
                share = max(1, room // max(1, waiting))  # what a sequence leaves over goes to those after it
                take = min(length - position, share, limit)
                takes.append(slice(position, position + take))
                room -= take
                waiting -= position < length
            done = [take.stop for take in takes]
            passes.append(takes)
        return passes

    def _rows_per_message(self) -> int:
        """Rows of q, k and v that fit into one message."""
        geometry, limit = self.client.geometry, self.client.limits.message_bytes
        row_bytes = geometry.kv_token_bytes + geometry.heads_q * geometry.head_dim * geometry.dtype.itemsize
        return max(1, (limit - 64 * 1024) // row_bytes) if limit else 1 << 30

    def _cast(self, tensor: Any) -> Array:
        array = np.asarray(tensor)
        dtype = self.client.dtype
        return array if array.dtype == dtype or array.dtype.kind not in "fV" else array.astype(dtype)

    def _check_between_passes(self) -> None:
        if self._step is not None:
            raise FailedPrecondition(
                f"session: a pass is under way, layer {self._step.next_layer} comes next; finish it, or call abort()"
            )

    # -- The end

    def close(self) -> None:
        """Drops the pass under way and closes the sequences."""
        self.abort()
        sequences, self._sequences = self._sequences, []
        self.client.close_sequences(sequences)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except AttndError:
            if error is None:
                raise
