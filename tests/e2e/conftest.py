"""Fixtures for tests against a real attnd.

    server           the shared server (Server.DEFAULTS)
    shared_server    shared_server(dtype="bf16", ranks=4): one for the whole session for each set of flags
    start_server     start_server(pages=4): a server of the test's own, stopped after it
    api, model       a client of `server`; the same with a memory and an oracle
    fp8              fp8(dtype="fp16"): such a model of a shared server that stores fp8

Whatever a test does, afterwards: the server lives (or ends with status 0 when stopped), its log has
no sanitizer report, and once the test's sequences are closed every page of every rank is free.
Clients made through `server.api()` are tracked; a test that opens sequences in another way (the
client package, say) closes them itself, or has the leak check fail.

Marker: slow, left out under ThreadSanitizer (-m "not slow"). The binary under test is $ATTND_BINARY, or
bazel-bin/service/attnd.
"""

import itertools
import types

import attnd_harness
import numpy as np
import pytest
from attention_oracle import Model


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out under ThreadSanitizer")


class TrackedServer:
    """A server as one test sees it: knows the clients that the test made."""

    def __init__(self, server):
        self._server = server
        self._apis = []

    def __getattr__(self, name):
        return getattr(self._server, name)

    def __setattr__(self, name, value):
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._server, name, value)

    def api(self, address=None, **options):
        self._apis.append(self._server.api(address, **options))
        return self._apis[-1]

    def close_clients(self):
        """Closes what the test's clients opened, and the clients."""
        for api in self._apis:
            if self._server.process.poll() is None:
                api.release_all()
            api.close()
        self._apis.clear()

    def check_nothing_leaked(self):
        self._server.check_alive()
        self._server.check_log()
        with self._server.api() as api:
            api.assert_all_free()


@pytest.fixture(scope="session")
def _session_servers(tmp_path_factory):
    servers = {}

    def get(**flags):
        key = tuple(sorted((name, str(value)) for name, value in flags.items()))
        if key not in servers:
            servers[key] = attnd_harness.Server(tmp_path_factory.mktemp("attnd"), **flags)
        return servers[key]

    yield get
    failures = []
    for server in servers.values():
        try:
            server.stop()
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n".join(failures)


@pytest.fixture
def shared_server(_session_servers):
    used = {}

    def get(**flags):
        server = _session_servers(**flags)
        if id(server) not in used:
            server.check_alive()
            used[id(server)] = TrackedServer(server)
        return used[id(server)]

    yield get
    for server in used.values():
        server.close_clients()
        server.check_nothing_leaked()


@pytest.fixture
def server(shared_server):
    return shared_server()


@pytest.fixture
def api(server):
    return server.api()


@pytest.fixture
def model(api):
    return Model(api)


@pytest.fixture(scope="session")
def admin(tmp_path_factory):
    """An admin token: its file, and the metadata that brings it."""
    token = "an-admin-token-of-the-tests"
    path = tmp_path_factory.mktemp("admin") / "token"
    path.write_text(token + "\n")
    return types.SimpleNamespace(token=token, path=path, metadata=(("authorization", "Bearer " + token),))


@pytest.fixture(scope="session")
def scales(tmp_path_factory):
    """Other scales for every layer and KV head, and the file that has them."""
    random = np.random.default_rng(8)
    shape = (attnd_harness.Server.DEFAULTS["layers"], attnd_harness.Server.DEFAULTS["heads_kv"])
    k, v = (random.uniform(0.004, 0.06, shape).astype(np.float32) for _ in range(2))
    path = tmp_path_factory.mktemp("scales") / "scales"
    lines = [
        f"{layer} {name} {' '.join(repr(float(one)) for one in rows[layer])}\n"
        for name, rows in (("k", k), ("v", v))
        for layer in range(shape[0])
    ]
    path.write_text("# layer, keys or values, a scale a KV head\n" + "".join(lines))
    return types.SimpleNamespace(k=k, v=v, path=path)


@pytest.fixture
def fp8(shared_server, scales):
    """fp8(dtype="fp16"): the model of a shared server that stores fp8 with those scales."""

    def get(seed=0, **flags):
        flags = {"dtype": "bf16", **flags}
        server = shared_server(kv_dtype="fp8_e4m3", kv_scales_file=scales.path, **flags)
        return Model(server.api(), seed=seed, k_scales=scales.k, v_scales=scales.v)

    return get


@pytest.fixture
def start_server(tmp_path):
    servers = []
    numbers = itertools.count()

    def start(**flags):
        servers.append(TrackedServer(attnd_harness.Server(tmp_path / f"attnd{next(numbers)}", **flags)))
        return servers[-1]

    yield start
    failures = []
    for server in servers:
        try:
            server.close_clients()
            if not server.stopped and server.process.poll() is None and not server.leaks_expected:
                server.check_nothing_leaked()
        except AssertionError as failure:
            failures.append(str(failure))
        try:
            server.stop()
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n".join(failures)
