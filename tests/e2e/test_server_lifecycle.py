"""The process: flags, configuration, addresses, health, reflection, logs, and an orderly end."""

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time

import grpc
import pytest
from attention_oracle import Model
from attnd_harness import CODE, REQUESTS, TIMEOUT_S, Server, binary, eventually, pb
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

SERVICE_NAME = "attnd.v1.Attention"


def run(*arguments, timeout=TIMEOUT_S):
    return subprocess.run([binary(), *arguments], capture_output=True, text=True, timeout=timeout, check=False)


# The command line


def test_help_lists_every_flag_and_ends_well():
    result = run("--help")
    assert result.returncode == 0
    for flag in (
        *Server.DEFAULTS,
        "config",
        "isa",
        "step_idle_ms",
        "sequence_idle_ms",
        "max_message_mb",
        "max_queue",
        "ready_file",
    ):
        assert "--" + flag.replace("_", "-") in result.stdout


def test_version_is_the_one_that_the_server_tells(api):
    result = run("--version")
    assert result.returncode == 0
    assert api.info().version in result.stdout


BAD_FLAGS = {
    "unknown flag": (["--no-such-flag", "1"], "no-such-flag"),
    "missing value": (["--ranks"], "ranks"),
    "not a number": (["--ranks", "two"], "ranks"),
    "no ranks": (["--ranks", "0"], "ranks"),
    "too many ranks": (["--ranks", "65"], "ranks"),
    "negative": (["--pages", "-1"], "pages"),
    "overflow": (["--pages", "99999999999999999999"], "pages"),
    "head_dim": (["--head-dim", "33"], "head-dim"),
    "head_dim_v": (["--head-dim-v", "512"], "head-dim-v"),
    "heads": (["--heads-q", "7", "--heads-kv", "2"], "heads"),
    "group": (["--heads-q", "64", "--heads-kv", "1"], "heads"),
    "layers": (["--layers", "0"], "layers"),
    "dtype": (["--dtype", "int8"], "dtype"),
    "kv_dtype": (["--kv-dtype", "fp8"], "kv-dtype"),
    "kv_dtype with fp32": (["--dtype", "fp32", "--kv-dtype", "fp8_e4m3"], "geometry.kv_dtype"),
    "k_scale": (["--kv-dtype", "fp8_e4m3", "--k-scale", "0"], "k-scale"),
    "v_scale": (["--kv-dtype", "fp8_e4m3", "--v-scale", "inf"], "v-scale"),
    "scale without fp8": (["--v-scale", "0.5"], "geometry.v_scale"),
    "kv_scales_file": (["--kv-dtype", "fp8_e4m3", "--kv-scales-file", "/nonexistent/scales"], "/nonexistent/scales"),
    "page_size": (["--page-size", "48"], "page-size"),
    "backend": (["--backend", "tpu"], "backend"),
    "isa": (["--isa", "sse9"], "isa"),
    "log_level": (["--log-level", "loud"], "log-level"),
    "listen": (["--listen", "nonsense"], "listen"),
    "metrics_port": (["--metrics-port", "70000"], "metrics-port"),
    "config": (["--config", "/nonexistent/attnd.yaml"], "/nonexistent/attnd.yaml"),
}


@pytest.mark.parametrize("what", BAD_FLAGS)
def test_a_wrong_flag_is_refused_by_name_with_status_2(what):
    arguments, name = BAD_FLAGS[what]
    result = run("--listen", "127.0.0.1:0", *arguments)
    assert result.returncode == 2, result
    assert name in result.stderr


BAD_CONFIGS = {
    "unknown key": ("geometry:\n  head_dimm: 64\n", "head_dimm"),
    "unknown section": ("geometri:\n  head_dim: 64\n", "geometri"),
    "wrong type": ("geometry:\n  head_dim: wide\n", "head_dim"),
    "out of range": ("geometry:\n  head_dim: 33\n", "geometry.head_dim"),
    "kv_dtype": ("geometry:\n  kv_dtype: fp8_e5m2\n", "geometry.kv_dtype"),
    "k_scale": ("geometry:\n  kv_dtype: fp8_e4m3\n  k_scale: -1\n", "geometry.k_scale"),
    "not yaml": ("geometry: [head_dim: {\n", ""),
    "short token": ("auth:\n  tenants:\n    - name: a\n      token: short\n", "token"),
    "same token": (
        "auth:\n  tenants:\n    - {name: a, token: 0123456789abcdef}\n    - {name: b, token: 0123456789abcdef}\n",
        "token",
    ),
    "same name": (
        "auth:\n  tenants:\n    - {name: a, token: 0123456789abcdef}\n    - {name: a, token: 0123456789abcdeg}\n",
        "name",
    ),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_a_wrong_config_is_refused_by_key_with_status_2(what, tmp_path):
    text, key = BAD_CONFIGS[what]
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    result = run("--config", str(path), "--listen", "127.0.0.1:0")
    assert result.returncode == 2, result
    assert "wrong.yaml" in result.stderr and key in result.stderr
    assert "0123456789abcdef" not in result.stderr


BAD_SCALES = {
    "no such layer": ("0 k 1\n16 v 1\n", ":2: 16"),
    "wrong count": ("# heads: 8\n3 v 1 2 3\n", ":2: 3 scales"),
    "not a number": ("0 k one\n", ":1: 'one'"),
    "not above 0": ("0 k 0.0\n", ":1: '0.0'"),
    "given twice": ("5 k 1\n5 v 1\n5 k 1\n", ":3: layer 5"),
}


@pytest.mark.parametrize("what", BAD_SCALES)
def test_wrong_scales_are_refused_by_line_with_status_2(what, tmp_path):
    text, words = BAD_SCALES[what]
    path = tmp_path / "wrong.scales"
    path.write_text(text)
    result = run("--listen", "127.0.0.1:0", "--kv-dtype", "fp8_e4m3", "--kv-scales-file", str(path))
    assert result.returncode == 2, result
    assert f"geometry.kv_scales_file: {path}{words}" in result.stderr


def test_flags_win_over_the_config(start_server, tmp_path):
    config = tmp_path / "attnd.yaml"
    config.write_text("geometry:\n  head_dim: 128\n  layers: 5\n")
    flags = {"listen": "127.0.0.1:0", "config": config, "head_dim": 64, "pages": 64}
    geometry = start_server(bare=True, **flags).api().info().geometry
    assert (geometry.head_dim, geometry.layers) == (64, 5)


def test_a_port_in_use_is_refused(server):
    result = run("--listen", server.address, "--pages", "64")
    assert result.returncode not in (0, 2) and result.returncode < 128, result
    assert server.address in result.stderr


def test_a_pool_that_does_not_fit_in_memory_is_refused():
    result = run("--listen", "127.0.0.1:0", "--pages", str(2**31), "--layers", "64")
    assert result.returncode in (1, 2), result
    assert "memory" in result.stderr or "pages" in result.stderr


@pytest.mark.slow
def test_with_no_flags_at_all_it_serves_and_says_how_to_call_it(tmp_path):
    probe = socket.socket()
    try:
        probe.bind(("127.0.0.1", 7400))
    except OSError:
        pytest.skip("port 7400 is in use on this machine")
    finally:
        probe.close()
    server = Server(tmp_path, bare=True)
    try:
        assert server.address.endswith(":7400")
        with server.api() as api:
            assert api.info().ranks
        said = server.stdout() + server.log()
        assert "127.0.0.1:7400" in said
    finally:
        server.stop()


# Addresses


def test_several_addresses_tcp_and_unix_serve_the_same_sequences(start_server, tmp_path):
    path = tmp_path / "attnd.sock"
    server = start_server(listen=["127.0.0.1:0", f"unix:{path}", "127.0.0.1:0"])
    assert len(server.addresses) == 3 and f"unix:{path}" in server.addresses
    first = Model(server.api(server.addresses[0]))
    handles = first.open_filled([20, 30])
    for address in server.addresses:
        model = Model(server.api(address))
        model.stored = first.stored
        model.step(handles)
    first.check_lengths()


# Health


def test_health_check_knows_the_server_and_the_service(api):
    health = health_pb2_grpc.HealthStub(api.channel)
    for service in ("", SERVICE_NAME):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as failure:
        health.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=TIMEOUT_S)
    assert failure.value.code() == CODE.NOT_FOUND


def test_health_watch_tells_the_state_at_once_and_that_a_service_is_unknown(api):
    health = health_pb2_grpc.HealthStub(api.channel)
    for service, status in ((SERVICE_NAME, "SERVING"), ("", "SERVING"), ("nothing", "SERVICE_UNKNOWN")):
        watch = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.ServingStatus.Value(status)
        watch.cancel()


def test_health_watch_tells_of_the_drain(start_server):
    server = start_server(grace_ms=3000)
    health = health_pb2_grpc.HealthStub(server.api().channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    server.signal(signal.SIGTERM)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    started = time.monotonic()
    with pytest.raises((StopIteration, grpc.RpcError)):
        next(watch)
    # A watcher is no call in flight: it does not hold up the end.
    assert server.wait() == 0 and time.monotonic() - started < 2.5


def test_health_goes_on_while_every_rank_is_lost(start_server):
    server = start_server(ranks=1, test_faults="true", rank_restart_backoff_ms=0)
    health = health_pb2_grpc.HealthStub(server.api().channel)
    server.fail_rank(0)
    eventually(lambda: server.api().info().ranks[0].state == pb.RANK_STATE_LOST, what="rank lost")
    answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=TIMEOUT_S)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert server.api().error("OpenSequences", pb.OpenSequencesRequest(count=1)).code() == CODE.UNAVAILABLE


# Reflection


@pytest.mark.parametrize("version", ["v1alpha", "v1"])
def test_reflection_lists_the_services_and_describes_every_method(api, version):
    # v1 has the messages of v1alpha under another package.
    ask = api.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME + ".Decode"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="attnd.v1.DecodeRequest"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="grpc.health.v1.Health"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="attnd.v1.Nothing"),
        reflection_pb2.ServerReflectionRequest(file_by_filename="nothing.proto"),
    ]
    listed, service, method, message, health, nothing, no_file = ask(iter(requests), timeout=TIMEOUT_S)
    names = {one.name for one in listed.list_services_response.service}
    assert {SERVICE_NAME, "grpc.health.v1.Health", f"grpc.reflection.{version}.ServerReflection"} <= names
    methods = set()
    for raw in service.file_descriptor_response.file_descriptor_proto:
        file = descriptor_pb2.FileDescriptorProto.FromString(raw)
        methods |= {one.name for service in file.service for one in service.method if file.package == "attnd.v1"}
    assert methods == set(REQUESTS)
    for answer in (method, message, health):
        assert answer.file_descriptor_response.file_descriptor_proto, answer
    for answer in (nothing, no_file):
        assert answer.error_response.error_code == CODE.NOT_FOUND.value[0]


def test_the_file_that_reflection_gives_can_be_had_by_its_name(api):
    stub = reflection_pb2_grpc.ServerReflectionStub(api.channel)
    (answer,) = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME)]), timeout=TIMEOUT_S
    )
    raw = answer.file_descriptor_response.file_descriptor_proto
    name = descriptor_pb2.FileDescriptorProto.FromString(raw[0]).name
    (again,) = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(file_by_filename=name)]), timeout=TIMEOUT_S
    )
    assert next(iter(again.file_descriptor_response.file_descriptor_proto)) == raw[0]


@pytest.mark.parametrize(
    "path", ["/attnd.v1.Attention/Nothing", "/nothing/Nothing", "/x", "/attnd.v1.Attention/decode"]
)
def test_an_unknown_method_is_unimplemented(api, path):
    call = api.channel.unary_unary(path, request_serializer=bytes, response_deserializer=bytes)
    for _ in range(20):
        with pytest.raises(grpc.RpcError) as failure:
            call(b"", timeout=TIMEOUT_S)
        assert failure.value.code() == CODE.UNIMPLEMENTED


# Logs


def test_every_log_line_is_json_with_a_time_a_level_and_an_event(start_server):
    server = start_server(log_level="debug")
    model = Model(server.api())
    handles = model.open_filled([20])
    model.step(handles)
    model.api.error("DescribeSequences", pb.DescribeSequencesRequest(sequences=[1]))
    model.close(handles)
    server.stop()
    records = server.log_records()
    assert len(records) >= 3
    for record in records:
        assert {"time", "level", "event"} <= set(record), record
        assert record["level"] in ("debug", "info", "warn", "error")
    assert json.dumps(records)


# The end


def test_sigterm_of_an_idle_server_ends_it_at_once(start_server):
    server = start_server(grace_ms=30000)
    server.api().info()
    started = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_finishes_calls_in_flight_and_refuses_new_ones(start_server, number):
    server = start_server(
        backend="reference",
        ranks=1,
        layers=1,
        heads_q=8,
        heads_kv=1,
        head_dim=128,
        head_dim_v=128,
        pages=1000,
        grace_ms=30000,
    )
    model = Model(server.api())
    (handle,) = model.open_filled([model.length_that_takes(0.4, rows=8)])
    layer = model.layer(8, read_only=True)
    wanted = model.read([handle], [8], layer=layer)
    request = model.decode_request([handle], [8], layer)
    calls = [model.api.future("Decode", request) for _ in range(3)]
    eventually(lambda: model.api.info().ranks[0].queue_depth or calls[0].done(), what="in flight")
    server.signal(number)
    deadline = time.monotonic() + 10
    while True:  # on a connection of its own: the old one may be told to go away
        try:
            with Server.api(server) as late:
                late.call("Decode", request, timeout=5)
        except grpc.RpcError as error:
            assert error.code() == CODE.UNAVAILABLE, error
            break
        assert time.monotonic() < deadline, "new calls are still accepted"
    for call in calls:
        assert pb.DecodeResponse.FromString(call.result()).out == wanted.raw_out
    assert server.wait() == 0


def test_a_drain_lets_an_open_stream_finish_its_step(start_server):
    server = start_server(grace_ms=20000)
    model = Model(server.api())
    handles = model.open_filled([20, 3])
    layers = model.layers(2)
    stream = model.api.stream()
    stream.ask(pb.DecodeStreamRequest(begin=model.step_begin(handles), layer=0, **layers[0].fields()))
    server.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert stream.ask(pb.DecodeStreamRequest(layer=1, **layers[1].fields())).committed
    stream.end()
    assert server.wait() == 0


def test_a_client_that_never_ends_is_cut_off_after_the_grace(start_server):
    server = start_server(grace_ms=500)
    model = Model(server.api())
    handles = model.open_filled([20])
    stream = model.api.stream()
    stream.ask(pb.DecodeStreamRequest(begin=model.step_begin(handles), layer=0, **model.layer(1).fields()))
    started = time.monotonic()
    server.signal(signal.SIGTERM)
    assert stream.error().code() in (CODE.UNAVAILABLE, CODE.CANCELLED)
    assert server.wait() == 0
    assert 0.3 < time.monotonic() - started < 5


def test_sigterm_under_load_ends_with_status_0(start_server):
    server = start_server(ranks=4, grace_ms=10000)
    codes = set()

    def work(seed):
        try:
            model = Model(Server.api(server), seed=seed)
            handles = model.open_filled([10, 20, 30])
            while True:
                model.step(handles, via=("unary", "stream")[seed % 2], check=False)
        except grpc.RpcError as error:
            codes.add(error.code())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    started = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    for thread in threads:
        thread.join(TIMEOUT_S)
    # An open unary step may be waited for, a call not yet begun is refused; none may hang until the grace is over.
    assert time.monotonic() - started < 9
    assert codes <= {CODE.UNAVAILABLE, CODE.CANCELLED}, codes


def test_metrics_are_served_until_the_end(start_server):
    for _ in range(3):
        server = start_server(ranks=2)
        stop = threading.Event()

        def scrape(server=server, stop=stop):
            while not stop.is_set():
                try:
                    assert "attnd_rank_up" in server.metrics_text()
                except (OSError, http.client.HTTPException):
                    return

        threads = [threading.Thread(target=scrape) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT_S)


def test_many_starts_and_stops(start_server):
    for _ in range(5):
        server = start_server(ranks=4, threads=2)
        server.api().open(3)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_the_ready_file_is_gone_or_stale_never_early(start_server, tmp_path):
    server = start_server()
    assert server.ready_file.exists() and os.path.getsize(server.ready_file) > 0
    host, port = server.address.rsplit(":", 1)
    socket.create_connection((host, int(port)), timeout=5).close()
