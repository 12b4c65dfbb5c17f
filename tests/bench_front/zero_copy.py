#!/usr/bin/env python3
"""Shows what attnd allocates and copies for a call, for payloads of different sizes.

Runs attnd with a library preloaded that counts allocations and copies by who calls for them
(count_allocations.c), loads it with the front bench's client, and prints one line a payload: for each
call, the heap allocations and the copied bytes of attnd's own code, those of gRPC and the libraries below it,
and the tensor bytes that a rank read in place and those it gathered (from /metrics).

Fails unless attnd's own code allocates less than 1 KiB a call whatever the payload, and copies no more than
what the rank gathered, 1 KiB and one percent of the payload.
"""

import argparse
import contextlib
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

from run import ATTND_FLAGS, Client, stop  # beside this script

COLUMNS = {
    "attnd_allocations": 2,
    "attnd_allocated": 0,
    "attnd_copied": 0,
    "grpc_allocated": 0,
    "grpc_copied": 0,
    "in_place": 0,
    "gathered": 0,
}  # and their decimals


def read_counters(path):
    names = ("allocations", "allocated", "copies", "copied")
    values = struct.unpack("<8Q", path.read_bytes())
    return {
        f"{who}_{name}": values[4 * i + j] for i, who in enumerate(("attnd", "grpc")) for j, name in enumerate(names)
    }


def read_metrics(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        text = page.read().decode()
    sums = {"in_place": 0, "gathered": 0}
    for place in sums:
        pattern = rf'^attnd_rank_tensor_bytes_total{{rank="\d+",place="{place}"}} (\d+)$'
        sums[place] = sum(int(value) for value in re.findall(pattern, text, re.MULTILINE))
    calls = re.findall(r'^attnd_layer_seconds_count{method="(?:Decode|DecodeStream)"} (\d+)$', text, re.MULTILINE)
    return sums | {"calls": sum(map(int, calls))}


def start_attnd(binaries, folder, stack):
    """The socket's address, the metrics' port and the file of the counters."""
    ready, counters = folder / "ready", folder / "counters"
    library = binaries.resolve() / "tests/bench_front/libcount_allocations.so"
    command = [
        binaries / "service/attnd",
        "--listen",
        f"unix:{folder}/sock",
        "--metrics-port",
        "0",
        "--ready-file",
        ready,
    ]
    for name, value in ATTND_FLAGS.items():
        command += [f"--{name}", str(value)]
    environment = {"LD_PRELOAD": str(library), "ATTND_COUNTERS": str(counters)}
    server = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    stack.callback(stop, server)
    while not (ready.exists() and ready.read_text().endswith("\n")):
        if server.poll() is not None:
            sys.exit(f"attnd ended with {server.returncode}")
        time.sleep(0.01)
    port = re.search(r"^metrics.*:(\d+)$", ready.read_text(), re.MULTILINE)[1]
    return f"unix:{folder}/sock", port, counters


def measure(client, port, counters, mode, payload, seconds):
    """What one call costs, by column."""
    client.slice(mode, payload, 1, 0.3)  # buffers reach their size
    before = read_counters(counters) | read_metrics(port)
    client.slice(mode, payload, 1, seconds)
    after = read_counters(counters) | read_metrics(port)
    calls = after["calls"] - before["calls"]
    return {name: (after[name] - before[name]) / calls for name in COLUMNS}


def holds(call, payload):
    return call["attnd_allocated"] < 1024 and call["attnd_copied"] <= call["gathered"] + 0.01 * payload + 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="bazel-bin")
    parser.add_argument("--seconds", type=float, default=1.0, help="of load a payload and mode [1]")
    options = parser.parse_args()
    good = True
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnd-zero-copy-")))
        address, port, counters = start_attnd(options.bin, folder, stack)
        client = Client(options.bin / "tests/bench_front/client", address, "attnd", stack)
        print("mode,payload," + ",".join(COLUMNS))
        for mode in ("unary", "stream"):
            for payload in (16 << 10, 256 << 10, 2 << 20):
                call = measure(client, port, counters, mode, payload, options.seconds)
                print(
                    f"{mode},{payload}," + ",".join(f"{call[name]:.{digits}f}" for name, digits in COLUMNS.items()),
                    flush=True,
                )
                good &= holds(call, payload)
    print("zero copy: " + ("holds" if good else "DOES NOT HOLD"), file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
