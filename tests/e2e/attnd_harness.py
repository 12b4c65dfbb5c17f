"""A real attnd server, and a client that can also send what no client should.

Nothing here uses the client package: messages come from proto/attnd.proto, compiled into a private
descriptor pool, and every call goes over a plain gRPC channel whose serializers are the identity,
so that a request is either a message or any bytes at all.

    Server    one attnd process: flags in; addresses, log and exit status out
    Api       calls against one address; remembers the sequences and steps it opened
    Stream    one DecodeStream call, message by message
    Proxy     a TCP relay that can cut its connections, for clients that vanish
    RawCall   one call below gRPC, in HTTP/2 frames
"""

import ctypes
import functools
import http.client
import json
import os
import pathlib
import queue
import re
import select
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import types
import typing

import grpc
import grpc_tools
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc
from prometheus_client.parser import text_string_to_metric_families

# The oracle's products are small, and the cores belong to the server. numpy reads this when it is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVICE = "/attnd.v1.Attention/"
CODE = grpc.StatusCode

# What a sanitizer prints when it has found something.
SANITIZER_REPORT = re.compile(
    r"ERROR: \w*Sanitizer|WARNING: ThreadSanitizer|runtime error:|LeakSanitizer: detected|SUMMARY: \w*Sanitizer"
)


def binary():
    """The server under test: $ATTND_BINARY, or what Bazel built last."""
    path = pathlib.Path(os.environ.get("ATTND_BINARY", ROOT / "bazel-bin/service/attnd"))
    if not path.exists():
        raise RuntimeError(f"no server binary at {path}: build //service:attnd, or set ATTND_BINARY")
    return str(path.resolve())


@functools.cache
def build_kind():
    """'asan', 'tsan' or 'plain': how the binary under test was built."""
    data = pathlib.Path(binary()).read_bytes()
    if b"__tsan_init" in data:
        return "tsan"
    if b"__asan_init" in data:
        return "asan"
    return "plain"


def _load_messages():
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "attnd.pb")
        failed = protoc.main(
            [
                "protoc",
                f"-I{ROOT / 'proto'}",
                f"-I{grpc_tools.__path__[0]}/_proto",
                f"--descriptor_set_out={out}",
                "attnd.proto",
            ]
        )
        if failed:
            raise RuntimeError("proto/attnd.proto does not compile")
        files = descriptor_pb2.FileDescriptorSet.FromString(pathlib.Path(out).read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    names = {}
    for file in files.file:
        for message in file.message_type:
            names[message.name] = message_factory.GetMessageClass(
                pool.FindMessageTypeByName(f"{file.package}.{message.name}")
            )
        for enum in file.enum_type:
            for value in enum.value:
                names[value.name] = value.number
    return types.SimpleNamespace(**names)


pb = _load_messages()

REQUESTS = {
    "GetServerInfo": pb.GetServerInfoRequest,
    "OpenSequences": pb.OpenSequencesRequest,
    "ForkSequence": pb.ForkSequenceRequest,
    "TruncateSequence": pb.TruncateSequenceRequest,
    "CloseSequences": pb.CloseSequencesRequest,
    "DescribeSequences": pb.DescribeSequencesRequest,
    "MoveSequence": pb.MoveSequenceRequest,
    "AppendKv": pb.AppendKvRequest,
    "ExportKv": pb.ExportKvRequest,
    "Decode": pb.DecodeRequest,
    "DecodeStream": pb.DecodeStreamRequest,
    "RestartRank": pb.RestartRankRequest,
}
RESPONSES = {
    "GetServerInfo": pb.GetServerInfoResponse,
    "OpenSequences": pb.OpenSequencesResponse,
    "ForkSequence": pb.ForkSequenceResponse,
    "TruncateSequence": pb.TruncateSequenceResponse,
    "CloseSequences": pb.CloseSequencesResponse,
    "DescribeSequences": pb.DescribeSequencesResponse,
    "MoveSequence": pb.MoveSequenceResponse,
    "AppendKv": pb.AppendKvResponse,
    "ExportKv": pb.ExportKvResponse,
    "Decode": pb.DecodeResponse,
    "DecodeStream": pb.DecodeResponse,
    "RestartRank": pb.RestartRankResponse,
}

# Generous: it only has to be longer than anything but a hang, under a sanitizer too.
TIMEOUT_S = 60.0


def to_bytes(request):
    return request if isinstance(request, (bytes, bytearray)) else request.SerializeToString()


def eventually(condition, timeout_s=10.0, what="condition"):
    """Waits until condition() is true; its last value is returned."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not reached within {timeout_s} s (last: {value!r})")
        time.sleep(0.01)


class Server:
    """One attnd process, started with the given flags: Server(ranks=2, page_size=16)."""

    # A sensible small server on the backend under test ($ATTND_TEST_BACKEND, or cpu): K and V rows of
    # different widths, two layers, a group of two.
    DEFAULTS: typing.ClassVar = {
        "listen": "127.0.0.1:0",
        "backend": os.environ.get("ATTND_TEST_BACKEND", "cpu"),
        "ranks": 2,
        "threads": 1,
        "layers": 2,
        "heads_q": 4,
        "heads_kv": 2,
        "head_dim": 64,
        "head_dim_v": 32,
        "dtype": "fp32",
        "page_size": 16,
        "pages": 512,
        "max_batch": 1024,
        "max_sequences": 4096,
        "metrics_port": 0,
        "log_level": "info",
        "grace_ms": 5000,
        "isolated": os.environ.get("ATTND_TEST_ISOLATED"),
    }

    def __init__(self, folder, bare=False, environment=None, **flags):
        """bare: only the flags given, none of DEFAULTS. A flag that is None is left out; a list repeats it."""
        self.flags = dict(flags) if bare else {**self.DEFAULTS, **flags}
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ready_file = self.folder / "ready"
        self.ready_file.unlink(missing_ok=True)
        self.log_file = self.folder / "log"
        self.log_checked = 0  # characters of the log that check_log() has seen
        self.stopped = False
        self.expected_exit = 0
        self.leaks_expected = False  # set by a test after which a leak check makes no sense (draining, TLS)
        with open(self.folder / "stdout", "wb") as stdout, open(self.log_file, "wb") as stderr:
            self.process = subprocess.Popen(
                [binary(), *self.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, **(environment or {})},
            )
        self._wait_until_ready()

    def arguments(self):
        words = ["--ready-file", str(self.ready_file)]
        for name, value in self.flags.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    words += ["--" + name.replace("_", "-"), str(one)]
        return words

    def _wait_until_ready(self):
        deadline = time.monotonic() + TIMEOUT_S
        while not self.ready_file.exists() or not self.ready_file.read_text().endswith("\n"):
            if self.process.poll() is not None:
                raise RuntimeError(f"attnd ended with {self.process.returncode} instead of serving:\n{self.log()}")
            if time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"attnd did not get ready:\n{self.log()}")
            time.sleep(0.005)
        # One address a line; the metrics' is marked by its name.
        lines = self.ready_file.read_text().split("\n")[:-1]
        self.addresses = [line for line in lines if not line.startswith("metrics")]
        self.address = self.addresses[0]
        self.metrics_port = next((int(line.rsplit(":", 1)[1]) for line in lines if line.startswith("metrics")), None)

    @property
    def pid(self):
        return self.process.pid

    def log(self):
        return self.log_file.read_text(errors="replace")

    def stdout(self):
        return (self.folder / "stdout").read_text(errors="replace")

    def log_records(self):
        """The log, parsed: every line is a JSON object."""
        return [json.loads(line) for line in self.log().splitlines() if line.strip()]

    def resident_bytes(self):
        fields = pathlib.Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def check_growth(self, before, limit):
        """Resident memory is below `before` + `limit` bytes; not under ThreadSanitizer, whose share varies."""
        grown = self.resident_bytes() - before
        assert grown < limit or build_kind() == "tsan", f"the server grew by {grown >> 20} MiB"

    def api(self, address=None, **options):
        return Api(address or self.address, **options)

    def metrics_text(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            assert response.status == 200
            return response.read().decode()
        finally:
            connection.close()

    def metric(self, name, **labels):
        """The sum of the samples of that name with these labels; at least one has to be there."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self.metrics_text())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, f"no sample {name} {labels}"
        return sum(found)

    def signal(self, number):
        self.process.send_signal(number)

    # Of a server with test_faults="true": the faults of one rank. They happen a moment later.

    def fail_rank(self, rank):
        """The rank is lost, as if its device had failed."""
        self._send_fault(0, rank)

    def stall_rank(self, rank):
        """The rank hangs from its next call on."""
        self._send_fault(1, rank)

    def release_rank(self, rank):
        """What hangs on the rank goes on."""
        self._send_fault(2, rank)

    def break_rank(self, rank):
        """The rank's device breaks at its next call: on a GPU a real error, for all ranks that share it."""
        self._send_fault(3, rank)

    def _send_fault(self, action, rank):
        value = ctypes.c_void_p(256 * action + rank)
        made = self.log().count('"fault_made"')
        assert ctypes.CDLL(None).sigqueue(self.pid, signal.SIGUSR1, value) == 0
        eventually(lambda: self.log().count('"fault_made"') > made, TIMEOUT_S, "the fault that was asked for")

    def wait(self, timeout_s=TIMEOUT_S):
        return self.process.wait(timeout_s)

    def kill(self):
        """Ends the server as a crash would; its exit status is not looked at."""
        self.process.kill()
        self.process.wait()
        self.stopped = True

    def stop(self):
        """SIGTERM; then the exit status must be 0 and the log free of sanitizer reports."""
        if self.stopped:
            return
        self.stopped = True
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            status = self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"attnd did not end after SIGTERM:\n{self.log()[-8000:]}") from None
        self.check_log()
        assert status == self.expected_exit, f"attnd ended with {status}:\n{self.log()[-8000:]}"

    def check_log(self):
        """No sanitizer report since the last check: each fails the test that caused it, not those after."""
        log, start = self.log(), self.log_checked
        self.log_checked = len(log)
        report = SANITIZER_REPORT.search(log, start)
        assert not report, f"sanitizer report:\n{log[report.start() :][:16000]}"

    def check_alive(self):
        assert self.process.poll() is None, f"attnd ended with {self.process.returncode}:\n{self.log()[-8000:]}"


class Api:
    """Calls against one server address. Requests are messages or bytes; responses are messages."""

    def __init__(self, address, metadata=(), credentials=None, **channel_options):
        self.metadata = tuple(metadata)
        options = {
            "grpc.max_receive_message_length": -1,
            "grpc.max_send_message_length": -1,
            "grpc.use_local_subchannel_pool": 1,
            "grpc.enable_retries": 0,
            **channel_options,
        }
        self.channel = (
            grpc.secure_channel(address, credentials, options=list(options.items()))
            if credentials
            else grpc.insecure_channel(address, options=list(options.items()))
        )
        self.methods = {}
        self.open_handles = set()
        self.open_steps = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.channel.close()

    def method(self, name, service=SERVICE):
        kinds = {"AppendKv": "stream_unary", "ExportKv": "unary_stream", "DecodeStream": "stream_stream"}
        kind = kinds.get(name, "unary_unary")
        key = service + name
        if key not in self.methods:
            make = getattr(self.channel, kind)
            self.methods[key] = make(key, request_serializer=to_bytes, response_deserializer=bytes)
        return self.methods[key]

    def raw(self, name, request, timeout=TIMEOUT_S, metadata=None):
        """One unary call (or an upload, given a list): response bytes (of an export a list), or grpc.RpcError."""
        body = iter(request) if name == "AppendKv" else request
        answer = self.method(name)(body, timeout=timeout, metadata=self.metadata if metadata is None else metadata)
        if name == "ExportKv":
            return list(answer)
        self._remember(name, answer)
        return answer

    def call(self, name, request=b"", **options):
        answer, parse = self.raw(name, request, **options), RESPONSES[name].FromString
        return [parse(one) for one in answer] if name == "ExportKv" else parse(answer)

    def future(self, name, request, timeout=TIMEOUT_S):
        body = iter(request) if name == "AppendKv" else request
        return self.method(name).future(body, timeout=timeout, metadata=self.metadata)

    def error(self, name, request, **options):
        """The grpc.RpcError that the call must end with."""
        try:
            self.call(name, request, **options)
        except grpc.RpcError as error:
            return error
        raise AssertionError(f"{name} succeeded")

    def stream(self, timeout=TIMEOUT_S, metadata=None):
        return Stream(self, timeout, self.metadata if metadata is None else metadata)

    # The RPCs, for people.

    def info(self):
        return self.call("GetServerInfo")

    def open(self, count=1, placement=0, dp_rank=0):
        return list(
            self.call(
                "OpenSequences", pb.OpenSequencesRequest(count=count, placement=placement, dp_rank=dp_rank)
            ).sequences
        )

    def fork(self, sequence, length):
        return self.call("ForkSequence", pb.ForkSequenceRequest(sequence=sequence, length=length)).sequence

    def truncate(self, sequence, length):
        return self.call("TruncateSequence", pb.TruncateSequenceRequest(sequence=sequence, length=length)).length

    def close_sequences(self, sequences):
        self.call("CloseSequences", pb.CloseSequencesRequest(sequences=sequences))
        self.open_handles.difference_update(sequences)

    def describe(self, sequences):
        return list(self.call("DescribeSequences", pb.DescribeSequencesRequest(sequences=sequences)).sequences)

    def export(self, sequence, position=0, tokens=0, timeout=TIMEOUT_S):
        """An ExportKv call that has begun: next() of it is a response as bytes."""
        request = pb.ExportKvRequest(sequence=sequence, position=position, tokens=tokens)
        return self.method("ExportKv")(request, timeout=timeout, metadata=self.metadata)

    def abort(self, step):
        self.call("Decode", pb.DecodeRequest(step=step, abort=True))
        self.open_steps.discard(step)

    # What this client holds on the server.

    def _remember(self, name, answer):
        if name == "OpenSequences":
            self.open_handles.update(pb.OpenSequencesResponse.FromString(answer).sequences)
        elif name == "ForkSequence":
            self.open_handles.add(pb.ForkSequenceResponse.FromString(answer).sequence)
        elif name == "Decode":
            response = pb.DecodeResponse.FromString(answer)
            if response.step and not response.committed:
                self.open_steps.add(response.step)
            else:
                self.open_steps.discard(response.step)

    def release_all(self):
        """Aborts the steps and closes the sequences that calls of this client left open."""
        for step in list(self.open_steps):
            try:
                self.abort(step)
            except grpc.RpcError as error:
                assert error.code() in (CODE.NOT_FOUND, CODE.UNAVAILABLE), error
        self.open_steps.clear()
        for handle in list(self.open_handles):
            self._close_one(handle)
        self.open_handles.clear()

    def _close_one(self, handle):
        deadline = time.monotonic() + 10
        while True:
            try:
                return self.call("CloseSequences", pb.CloseSequencesRequest(sequences=[handle]))
            except grpc.RpcError as error:
                if error.code() == CODE.NOT_FOUND:
                    return None
                # A stream that a client left is ended by the server a moment later.
                assert error.code() == CODE.ABORTED and time.monotonic() < deadline, error
                time.sleep(0.02)

    def assert_all_free(self, timeout_s=10.0):
        """Every page of every serving rank is free, nothing is held, nothing is in flight."""

        def leaks():
            found = []
            for rank in self.info().ranks:
                if rank.state != pb.RANK_STATE_SERVING:
                    continue
                held = (
                    rank.pages_total - rank.pages_free,
                    rank.sequences,
                    rank.tokens,
                    rank.tokens_in_flight,
                    rank.queue_depth,
                )
                if any(held):
                    found.append(
                        (
                            rank.rank,
                            dict(zip(("pages", "sequences", "tokens", "in_flight", "queue"), held, strict=True)),
                        )
                    )
            return found

        deadline = time.monotonic() + timeout_s
        while found := leaks():
            assert time.monotonic() < deadline, f"still held after everything was closed: {found}"
            time.sleep(0.01)


class Stream:
    """One DecodeStream call. send() does not wait; receive() takes the next answer."""

    _END = object()

    def __init__(self, api, timeout, metadata):
        self.outbox = queue.Queue()
        self.call = api.method("DecodeStream")(iter(self.outbox.get, self._END), timeout=timeout, metadata=metadata)

    def send(self, request):
        self.outbox.put(to_bytes(request))

    def receive(self):
        """The next response; raises grpc.RpcError if the call failed, StopIteration if it ended."""
        return pb.DecodeResponse.FromString(next(self.call))

    def ask(self, request):
        self.send(request)
        return self.receive()

    def end(self):
        """Half-closes, and expects the call to end well with no further answers."""
        self.outbox.put(self._END)
        rest = list(self.call)
        assert not rest, f"{len(rest)} answers that nobody asked for"
        assert self.call.code() == CODE.OK

    def error(self):
        """The error that the call must now end with; answers before it are dropped."""
        try:
            while True:
                next(self.call)
        except StopIteration:
            raise AssertionError("the stream ended well") from None
        except grpc.RpcError as error:
            self.outbox.put(self._END)
            return error

    def cancel(self):
        self.call.cancel()
        self.outbox.put(self._END)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cancel()


class Proxy:
    """A TCP relay to `address` whose connections can be cut with a reset, as if a host had vanished."""

    def __init__(self, address):
        host, port = address.rsplit(":", 1)
        self.target = (host, int(port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.wake, self.woken = socket.socketpair()
        self.thread = threading.Thread(target=self._relay, daemon=True)
        self.thread.start()

    def _relay(self):
        """The one thread that touches the sockets, and closes them."""
        peers = {}
        while True:
            ready, _, _ = select.select([self.woken, self.listener, *peers], [], [])
            if self.woken in ready:
                command = self.woken.recv(1)
                for end in peers:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.close()
                peers.clear()
                self.woken.send(command)
                if command == b"q":
                    return
                continue
            for end in ready:
                if end is self.listener:
                    near, _ = end.accept()
                    far = socket.create_connection(self.target)
                    peers.update({near: far, far: near})
                elif end in peers:
                    self._forward(end, peers)

    @staticmethod
    def _forward(end, peers):
        try:
            data = end.recv(65536)
            peers[end].sendall(data)
        except OSError:
            data = b""
        if not data:
            other = peers.pop(end)
            peers.pop(other)
            end.close()
            other.close()

    def _command(self, letter):
        self.wake.send(letter)
        self.wake.recv(1)

    def cut(self):
        """Resets every connection; new ones are relayed again."""
        self._command(b"c")

    def close(self):
        self._command(b"q")
        self.thread.join()
        for end in (self.listener, self.wake, self.woken):
            end.close()


class RawCall:
    """One HTTP/2 request written by hand: any bytes as gRPC frames, and no window updates unless asked for.

    `window`: bytes of the answer that the server may send; without any, its status does not get out either.
    """

    def __init__(self, server, method, headers=(), window=65535):
        host, port = server.address.rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.ended = None  # (status, message), once the call has
        self.h2.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self.h2.initiate_connection()
        self.stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(
            self.stream,
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", method),
                (":authority", "test"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                *headers,
            ],
        )
        self.flush()

    def flush(self):
        self.socket.sendall(self.h2.data_to_send())

    def send(self, data, end=False):
        """As far as the server's window lets it; returns the bytes sent."""
        sent = 0
        while sent < len(data):
            room = min(
                self.h2.local_flow_control_window(self.stream), self.h2.max_outbound_frame_size, len(data) - sent
            )
            if room == 0:
                break
            self.h2.send_data(self.stream, data[sent : sent + room])
            sent += room
        if end:
            self.h2.end_stream(self.stream)
        self.flush()
        return sent

    def send_message(self, message):
        """The one message of a unary call, whole."""
        data = message.SerializeToString()
        assert self.send(b"\0" + len(data).to_bytes(4, "big") + data, end=True) == len(data) + 5

    def reset(self):
        self.h2.reset_stream(self.stream)
        self.flush()

    def receive(self, wait=True):
        """Reads what is there (or, waiting, at least something); `ended` is set once the call has ended."""
        self.socket.settimeout(TIMEOUT_S if wait else 0.001)
        try:
            data = self.socket.recv(65536)
            self.ended = self._end_in(self.h2.receive_data(data)) if data else ("closed", "")
            self.flush()
        except TimeoutError:
            assert not wait, "no answer"
        except h2.exceptions.StreamClosedError:
            self.ended = ("reset", "")
        except OSError:
            self.ended = ("closed", "")
        self.socket.settimeout(TIMEOUT_S)

    @staticmethod
    def _end_in(events):
        for event in events:
            if isinstance(event, (h2.events.TrailersReceived, h2.events.ResponseReceived)):
                headers = dict(event.headers)
                if "grpc-status" in headers:
                    return int(headers["grpc-status"]), headers.get("grpc-message", "")
                if headers.get(":status", "200") != "200":
                    return "http " + headers[":status"], ""
            if isinstance(event, h2.events.StreamReset):
                return "reset", ""
        return None

    def status(self):
        """Reads until the call has ended: the gRPC status and message; or 'reset' or 'closed'."""
        while self.ended is None:
            self.receive()
        return self.ended

    def close(self):
        self.socket.close()
