"""What can go wrong, one exception a gRPC status.

Every error carries the server's own message, which names the offending field and index, for example
``sequences[3]: unknown handle``. A call that failed changed nothing on the server.
"""

from __future__ import annotations

from typing import Any

import grpc


class AttndError(Exception):
    """Base of all errors of this package.

    Attributes:
        message: what is wrong, in the server's words (or the client's own, if it refused before sending).
        server: address of the server that said so; None if the client itself refused.
    """

    #: The gRPC status name.
    code = "UNKNOWN"

    def __init__(self, message: str, server: str | None = None) -> None:
        super().__init__(message if server is None else f"{message} (server {server})")
        self.message = message
        self.server = server


class InvalidArgument(AttndError, ValueError):
    """Wrong size, dtype or shape, a layer out of order, or an explicit rank that does not exist."""

    code = "INVALID_ARGUMENT"


class NotFound(AttndError, LookupError):
    """Unknown handle: closed, idled out, of another tenant, or of a server that has restarted since."""

    code = "NOT_FOUND"


class FailedPrecondition(AttndError):
    """The same sequence twice in one step."""

    code = "FAILED_PRECONDITION"


class Aborted(AttndError):
    """The sequence is in another step or upload right now, or on its way to another rank.

    Attributes:
        retry_after: seconds after which the server suggests to try again; None if it does not.
    """

    code = "ABORTED"

    def __init__(self, message: str, server: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, server)
        self.retry_after = retry_after


class ResourceExhausted(AttndError):
    """Pages, queue or quota exhausted, or a message over the server's limit.

    Attributes:
        retry_after: seconds after which the server suggests to try again; None if trying again will not help.
    """

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, server: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, server)
        self.retry_after = retry_after


class Unavailable(AttndError, ConnectionError):
    """The server cannot be reached or is draining, or the rank that held the sequence was lost."""

    code = "UNAVAILABLE"


class DeadlineExceeded(AttndError, TimeoutError):
    """The call did not end within its timeout."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(AttndError):
    """The call was cancelled."""

    code = "CANCELLED"


class Unauthenticated(AttndError, PermissionError):
    """No credentials: give the client a token."""

    code = "UNAUTHENTICATED"


class PermissionDenied(AttndError, PermissionError):
    """Wrong credentials."""

    code = "PERMISSION_DENIED"


class Unimplemented(AttndError, NotImplementedError):
    """The server does not know this call: it is older than this client, or no attnd."""

    code = "UNIMPLEMENTED"


class Internal(AttndError):
    """The server's fault."""

    code = "INTERNAL"


_BY_CODE = {error.code: error for error in AttndError.__subclasses__()}

_PUSHBACK = "grpc-retry-pushback-ms"


def _retry_after(trailers: Any) -> float | None:
    """Seconds of the server's retry hint; None without one, or if it says never (a negative hint)."""
    for key, value in trailers or ():
        if key == _PUSHBACK:
            try:
                milliseconds = int(value)
            except ValueError:
                return None
            return milliseconds / 1000 if milliseconds >= 0 else None
    return None


def error_of(rpc_error: Any, server: str) -> AttndError:
    """The exception for a failed gRPC call (a grpc.Call that has ended, or an AioRpcError)."""
    status = rpc_error.code()
    name = status.name if isinstance(status, grpc.StatusCode) else "UNKNOWN"
    message = rpc_error.details() or name
    if name in (ResourceExhausted.code, Aborted.code):
        kind = ResourceExhausted if name == ResourceExhausted.code else Aborted
        return kind(message, server, _retry_after(rpc_error.trailing_metadata()))
    return _BY_CODE.get(name, AttndError)(message, server)
