"""The blocking transport: one server's channel, its streams, and the thread that ends overdue ones."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Any

import grpc

from attnd import _core, _wire
from attnd.errors import AttndError, DeadlineExceeded, Unavailable, error_of
from attnd.types import ServerInfo

_IDLE_STREAMS = 8


class Watchdog:
    """Cancels streams whose response is overdue: a blocking read of a gRPC stream has no timeout of its own.

    One daemon thread a client, started with the first stream. Arming and disarming are a dictionary access each:
    the thread is woken only if a deadline comes sooner than the one it sleeps for.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._deadlines: dict[Stream, float] = {}
        self._wake_at = float("inf")
        self._thread: threading.Thread | None = None
        self._stopped = False

    def arm(self, stream: Stream, deadline: float) -> None:
        """`stream` is cancelled at `deadline` (time.monotonic) unless disarmed before."""
        self._deadlines[stream] = deadline
        if deadline < self._wake_at:
            with self._condition:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="attnd-watchdog", daemon=True)
                    self._thread.start()
                self._wake_at = min(self._wake_at, deadline)
                self._condition.notify()

    def disarm(self, stream: Stream) -> None:
        """Ends the watch over `stream`."""
        self._deadlines.pop(stream, None)

    def stop(self) -> None:
        """Ends the thread."""
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def _run(self) -> None:
        with self._condition:
            while not self._stopped:
                now = time.monotonic()
                for stream, deadline in list(self._deadlines.items()):
                    if deadline <= now:
                        self._deadlines.pop(stream, None)
                        stream.expire()
                self._wake_at = min(list(self._deadlines.values()), default=float("inf"))
                self._condition.wait(None if self._wake_at == float("inf") else self._wake_at - now)


class Stream:
    """One DecodeStream call: messages go out through a queue, responses come back in order."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._expired = False
        self._call = server.methods["DecodeStream"](iter(self._outgoing.get, None), metadata=server.metadata)

    def send(self, message: bytes) -> None:
        """Queues one message; errors show in receive."""
        self._outgoing.put(message)

    def receive(self, timeout: float) -> _wire.Response:
        """The next response. Raises the error that ended the stream, or DeadlineExceeded."""
        address = self._server.address
        self._server.watchdog.arm(self, time.monotonic() + timeout)
        try:
            data = next(self._call)
        except StopIteration:
            raise Unavailable("the server ended the stream", address) from None
        except grpc.RpcError as error:
            if self._expired:
                raise DeadlineExceeded(f"no response within {timeout:g} s", address) from None
            raise error_of(error, address) from None
        finally:
            self._server.watchdog.disarm(self)
        return _wire.decode(data)

    def expire(self) -> None:
        """Called by the watchdog."""
        self._expired = True
        self._call.cancel()

    def is_alive(self) -> bool:
        """Whether it can still carry a step."""
        return bool(self._call.is_active())

    def close(self) -> None:
        """Half-closes: the server ends the stream."""
        self._outgoing.put(None)

    def cancel(self) -> None:
        """Ends the stream at once; the server aborts its open step."""
        self._call.cancel()
        self._outgoing.put(None)


class Server:
    """One server's channel, methods, idle streams and last known info."""

    def __init__(self, address: str, metadata: list[tuple[str, str]], credentials: Any, watchdog: Watchdog) -> None:
        self.address = address
        self.metadata = metadata
        self.watchdog = watchdog
        self.info: ServerInfo | None = None
        self.info_at = float("-inf")
        self.failed_at = float("-inf")
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=_core.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=_core.CHANNEL_OPTIONS)
        kinds = {
            "AppendKv": self._channel.stream_unary,
            "ExportKv": self._channel.unary_stream,
            "DecodeStream": self._channel.stream_stream,
        }
        self.methods = {
            name: kinds.get(name, self._channel.unary_unary)(f"/{_core.SERVICE}/{name}", **_core.serializers(name))
            for name in _core.METHODS
        }
        self._idle: deque[Stream] = deque()

    def start(self, method: str, request: Any, timeout: float) -> Any:
        """Starts a call; `result` waits for it."""
        return self.methods[method].future(request, timeout=timeout, metadata=self.metadata)

    def result(self, future: Any) -> Any:
        """The response of a started call."""
        try:
            return future.result()
        except grpc.RpcError as error:
            raise error_of(error, self.address) from None

    def call(self, method: str, request: Any, timeout: float) -> Any:
        """A call without retry."""
        try:
            return self.methods[method](request, timeout=timeout, metadata=self.metadata)
        except grpc.RpcError as error:
            raise error_of(error, self.address) from None

    def call_with_retry(self, method: str, request: Any, timeout: float) -> Any:
        """A call, repeated where that is safe (see _core.retry_delay), within `timeout` seconds altogether."""
        deadline = time.monotonic() + timeout
        attempt = 0
        while True:
            try:
                return self.call(method, request, max(0.0, deadline - time.monotonic()))
            except AttndError as error:
                delay = _core.retry_delay(error, attempt, method in _core.READ_ONLY_METHODS)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
            time.sleep(delay)
            attempt += 1

    def take_stream(self) -> Stream:
        """An idle stream, or a new one."""
        while True:
            try:
                stream = self._idle.pop()
            except IndexError:
                return Stream(self)
            if stream.is_alive():
                return stream

    def give_stream(self, stream: Stream) -> None:
        """Takes back a stream without an open step and without a response on its way."""
        if len(self._idle) < _IDLE_STREAMS:
            self._idle.append(stream)
        else:
            stream.close()

    def close(self) -> None:
        """Ends the streams and the channel; calls under way are cancelled."""
        while self._idle:
            self._idle.pop().close()
        self._channel.close()
