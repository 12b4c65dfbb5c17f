"""The layer bench runs against the server under test and gives figures that can be true."""

import csv
import io
import os
import pathlib
import subprocess
import sys

import attnd_harness
import pytest

pytestmark = pytest.mark.slow  # TSan would watch the client, whose gRPC it does not know

RUN = pathlib.Path(__file__).resolve().parents[1] / "bench_layer" / "run.py"
SMALL = ["--context", "70", "--heads-q", "8", "--heads-kv", "2", "--head-dim", "64", "--layers", "2"]


def bench(*arguments):
    backend = os.environ.get("ATTND_TEST_BACKEND", "cpu")
    command = [sys.executable, RUN, "--server", attnd_harness.binary(), "--backend", backend, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("dtype, plane", [("bf16", "tcp"), ("fp16", "unix"), ("fp32", "unix")])
def test_the_layer_bench_measures_every_batch(dtype, plane):
    short = ["--batch", "1,3", "--seconds", "0.05", "--calls", "150", "--rounds", "2"]
    done = bench(*SMALL, *short, "--dtype", dtype, "--plane", plane)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["batch"], row["context"], row["dtype"], row["plane"]) for row in rows] == [
        ("1", "70", dtype, plane),
        ("3", "70", dtype, plane),
    ]
    for row in rows:
        # Over 64 steps in all: the sequences were cut back.
        assert int(row["calls"]) >= 2 * 75
        assert 0 < float(row["call_p50_us"]) <= float(row["call_p99_us"])
        assert 0 < float(row["kernel_p50_us"]) <= float(row["attention_p50_us"]) + float(row["combine_p50_us"])
        assert 0 < float(row["kernel_share"]) < 1 and float(row["outside_p50_us"]) > 0


def test_the_layer_bench_says_when_the_server_does_not_start():
    done = bench("--attnd", "heads-q=3")
    assert done.returncode == 1 and "heads_q is 3" in done.stderr
