"""/metrics is Prometheus text, per rank, and moves with the calls."""

import http.client

import pytest
from attention_oracle import Model
from attnd_harness import eventually, pb
from prometheus_client.parser import text_string_to_metric_families


def families(server):
    return {family.name: family for family in text_string_to_metric_families(server.metrics_text())}


@pytest.fixture
def ranked(start_server):
    server = start_server(ranks=2, test_faults="true", rank_restart_backoff_ms=0)
    return server, Model(server.api())


def test_the_text_parses_and_every_family_has_help(ranked):
    server, model = ranked
    model.step(model.open_filled([3]))
    found = families(server)
    assert found
    for family in found.values():
        assert family.name.startswith(("attnd_", "process_")), family.name
        assert family.documentation and family.type != "unknown", family.name


def test_tokens_and_pages_are_told_by_rank(ranked):
    server, model = ranked
    model.open_filled([40], pb.PLACEMENT_EXPLICIT, 0)
    model.open_filled([16, 17], pb.PLACEMENT_EXPLICIT, 1)
    info = model.api.info()
    for rank in (0, 1):
        assert server.metric("attnd_rank_tokens", rank=str(rank)) == info.ranks[rank].tokens == (40, 33)[rank]
        assert server.metric("attnd_rank_pages_free", rank=str(rank)) == info.ranks[rank].pages_free == 512 - 3
        assert server.metric("attnd_rank_sequences", rank=str(rank)) == (1, 2)[rank]


def test_counters_move_with_calls_and_steps(ranked):
    server, model = ranked
    handles = model.open_filled([5], pb.PLACEMENT_EXPLICIT, 1)
    calls = server.metric("attnd_rank_calls_total", rank="1")
    idle = server.metric("attnd_rank_calls_total", rank="0")
    steps = server.metric("attnd_steps_committed_total")
    model.step(handles, via="unary")
    model.step(handles, via="stream")
    assert server.metric("attnd_rank_calls_total", rank="1") == calls + 4
    assert server.metric("attnd_rank_calls_total", rank="0") == idle
    assert server.metric("attnd_steps_committed_total") == steps + 2
    assert server.metric("attnd_calls_total", method="Decode", code="OK") == 2
    assert server.metric("attnd_calls_total", method="DecodeStream", code="OK") == 1
    assert server.metric("attnd_received_bytes_total", method="DecodeStream") > 2 * len(model.layer(1).fields()["q"])


def test_failed_calls_are_counted_by_code(ranked):
    server, model = ranked
    for _ in range(3):
        model.api.error("DescribeSequences", pb.DescribeSequencesRequest(sequences=[9]))

    def counted():  # a moment after the client has its answer
        return server.metric("attnd_calls_total", method="DescribeSequences", code="NOT_FOUND")

    eventually(lambda: counted() == 3, what="three calls")
    assert counted() == 3


def test_a_lost_rank_shows(ranked):
    server, _ = ranked
    assert server.metric("attnd_rank_up", rank="1") == 1
    server.fail_rank(1)
    eventually(lambda: server.metric("attnd_rank_up", rank="1") == 0, what="rank 1 down")
    assert server.metric("attnd_rank_up", rank="0") == 1
    assert server.metric("attnd_degraded") == 1
    for rank, losses in (("0", 0), ("1", 1)):
        assert server.metric("attnd_rank_state", rank=rank) == 1 + losses
        assert server.metric("attnd_rank_lost_total", rank=rank) == losses
        assert server.metric("attnd_rank_stalls_total", rank=rank) == 0
        assert server.metric("attnd_rank_restarts_total", rank=rank) == 0


def test_liveness_readiness_and_unknown_pages(ranked):
    server, _ = ranked
    for path, status in (("/healthz", 200), ("/readyz", 200), ("/metrics", 200), ("/nothing", 404), ("/", 404)):
        connection = http.client.HTTPConnection("127.0.0.1", server.metrics_port, timeout=20)
        connection.request("GET", path)
        assert connection.getresponse().status == status, path
        connection.close()


def test_without_a_metrics_port_nothing_listens(start_server):
    assert start_server(metrics_port=None).metrics_port is None
