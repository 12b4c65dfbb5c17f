"""The load test measures what it says, and leaves nothing behind."""

import csv
import os
import pathlib
import signal
import subprocess
import sys
import time

import attnd_harness
import pytest

LOAD = pathlib.Path(__file__).resolve().parents[1] / "load" / "load.py"


def load(*arguments, **options):
    command = [sys.executable, LOAD, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.slow
def test_load_measures_every_combination_and_closes_its_sequences(server, tmp_path):
    table, picture = tmp_path / "load.csv", tmp_path / "load.png"
    sizes = ["--processes", "1", "--batch", "1,3", "--context", "100", "--query-length", "2"]
    times = ["--duration", "0.7", "--warmup", "0.1"]
    done = load(server.address, *sizes, *times, "--csv", table, "--plot", picture)
    assert done.returncode == 0, done.stderr
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch"], row["context"], row["query_length"], row["errors"]) for row in rows] == [
        ("1", "100", "2", "0"),
        ("3", "100", "2", "0"),
    ]
    for row in rows:
        assert int(row["steps"]) > 0 and float(row["tokens_s"]) > 0
        layer = [float(row[f"layer_{p}_us"]) for p in ("p50", "p90", "p99")]
        step = [float(row[f"step_{p}_us"]) for p in ("p50", "p90", "p99")]
        assert 0 < layer[0] <= layer[1] <= layer[2] and step == sorted(step)
        assert step[0] > layer[0]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with attnd_harness.Api(server.address) as api:
        assert all(rank.sequences == 0 for rank in api.call("GetServerInfo").ranks)


@pytest.mark.slow
def test_load_starts_a_server_of_its_own_and_ends_it(tmp_path):
    flags = "--layers 2 --heads-q 4 --heads-kv 2 --head-dim 32 --threads 1"
    arguments = ["--server-flags", flags, "--processes", "2", "--batch", "2", "--context", "50", "--mode", "unary"]
    environment = {**os.environ, "ATTND_BINARY": attnd_harness.binary(), "TMPDIR": str(tmp_path)}
    done = load(*arguments, "--duration", "0.3", "--warmup", "0", env=environment)
    assert done.returncode == 0, done.stderr
    assert "unary" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_load_interrupted_closes_its_sequences(server):
    arguments = [server.address, "--processes", "1", "--batch", "2", "--context", "10", "--duration", "100"]
    command = [sys.executable, LOAD, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with attnd_harness.Api(server.address) as api:

        def calls():
            return sum(rank.calls for rank in api.call("GetServerInfo").ranks)

        before = calls()
        attnd_harness.eventually(lambda: calls() > before + 10, 60, "steps run")
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
        assert process.returncode == 1 and "interrupted" in words
        assert time.monotonic() - started < 40
        assert all(rank.sequences == 0 for rank in api.call("GetServerInfo").ranks)


def test_load_says_when_no_server_is_there():
    done = load("127.0.0.1:1", "--duration", "0.1")
    assert done.returncode == 1 and done.stderr.startswith("load: UNAVAILABLE")
