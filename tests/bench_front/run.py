#!/usr/bin/env python3
"""Measures what attnd's front costs: attnd against a bare gRPC C core echo server, side by side.

Both servers run at the same time and the same client program loads them in turn, in short slices, so
that whatever else the machine does falls on both. attnd attends to contexts of one token, which
costs next to nothing: what is left is the way of the bytes through the server. Queries of 16 KiB,
256 KiB and 2 MiB go in and outputs of the same size come back, unary and streaming, over TCP and a unix
socket, with 1 and 8 calls (streams) under way. The client checks attnd's outputs.

CSV on the standard output, medians over the rounds:
  plane,mode,payload,in_flight,echo_calls_s,attnd_calls_s,ratio,echo_p50_us,attnd_p50_us
On standard error, for each row, whether it is within the bounds: attnd_calls_s >= 0.80 of the echo's, and
attnd_p50_us <= 1.30 times the echo's (with 1 in flight: <= the echo's + 25).

With --floor a third server takes its turns: the echo server, but answering with as many bytes of its own, which
it writes for every answer and reads nothing for. What it misses, every server misses whose answer is not
its input. Two more columns: floor_calls_s,floor_p50_us, and on standard error its own rows out of bounds.
"""

import argparse
import contextlib
import csv
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HEADER = [
    "plane",
    "mode",
    "payload",
    "in_flight",
    "echo_calls_s",
    "attnd_calls_s",
    "ratio",
    "echo_p50_us",
    "attnd_p50_us",
]
FLOOR_HEADER = ["floor_calls_s", "floor_p50_us"]
PLANES = ["tcp", "unix"]
MODES = ["unary", "stream"]
PAYLOADS = [16 << 10, 256 << 10, 2 << 20]
IN_FLIGHT = [1, 8]

# What client.c sends: rows of 8 KiB, up to 256 sequences. One KV head, so that of all geometries with
# such rows this is the one whose attention costs least.
ATTND_FLAGS = {
    "backend": "cpu",
    "ranks": 1,
    "threads": 1,
    "layers": 1,
    "heads-q": 16,
    "heads-kv": 1,
    "head-dim": 256,
    "dtype": "bf16",
    "page-size": 16,
    "pages": 1024,
    "log-level": "warn",
}


def arguments():
    parser = argparse.ArgumentParser(
        prog="./dev bench front", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bin", type=pathlib.Path, required=True, help=argparse.SUPPRESS)  # given by ./dev
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="of one slice [0.5]")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="slices of each server for a row [7]")
    parser.add_argument("--plane", choices=PLANES, action="append", help="only these [tcp, unix]")
    parser.add_argument("--mode", choices=MODES, action="append", help="only these [unary, stream]")
    parser.add_argument("--payload", type=int, action="append", metavar="BYTES", help="only these; multiples of 8192")
    parser.add_argument("--in-flight", type=int, action="append", metavar="N", help="only these [1, 8]")
    parser.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="write the CSV there as well")
    parser.add_argument("--floor", action="store_true", help="measure an echo server that writes its answers, too")
    parser.add_argument("--check", action="store_true", help="fail if a row is out of bounds")
    parser.add_argument(
        "--attnd", action="append", default=[], metavar="FLAG=VALUE", help="a flag for attnd, e.g. threads=2"
    )
    return parser.parse_args()


def start_echo(folder, binary, stack, name="echo", flags=()):
    addresses = ["127.0.0.1:0", f"unix:{folder}/{name}.sock"]
    process = subprocess.Popen([binary, *flags, *addresses], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(stop, process)
    return dict(zip(PLANES, [process.stdout.readline().strip() for _ in addresses], strict=True))


def start_attnd(folder, binary, more_flags, stack):
    ready = folder / "ready"
    flags = ATTND_FLAGS | dict(flag.split("=", 1) for flag in more_flags)
    command = [binary, "--listen", "127.0.0.1:0", "--listen", f"unix:{folder}/attnd.sock", "--ready-file", ready]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    process = subprocess.Popen(command, stdout=sys.stderr)  # our standard output is the CSV
    stack.callback(stop, process)
    while not (ready.exists() and ready.read_text().endswith("\n")):
        if process.poll() is not None:
            sys.exit(f"attnd ended with {process.returncode} instead of serving")
        time.sleep(0.01)
    return dict(zip(PLANES, ready.read_text().split("\n")[:2], strict=True))


def stop(process):
    process.terminate()
    process.wait()


class Client:
    """One client process, connected to one server, told what to do slice by slice."""

    def __init__(self, binary, address, server, stack):
        command = [binary, address, "attnd" if server == "attnd" else "echo"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(stop, self.process)
        self.name = server

    def slice(self, mode, payload, in_flight, seconds):
        """Calls a second and the median latency in microseconds."""
        self.process.stdin.write(f"{mode} {payload} {in_flight} {seconds}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if len(answer) != 5:
            sys.exit(f"the client of {self.name} has failed")
        return int(answer[0]) / float(answer[1]), float(answer[2])


def measure(clients, mode, payload, in_flight, options):
    """Medians: {server: (calls a second, p50)}."""
    servers = list(clients)
    slices = {server: [] for server in servers}
    for number in range(options.rounds):
        # Who goes first alternates, so that none always follows another's heat.
        for server in servers if number % 2 == 0 else servers[::-1]:
            slices[server].append(clients[server].slice(mode, payload, in_flight, options.seconds))
    return {
        server: tuple(statistics.median(column) for column in zip(*rows, strict=True))
        for server, rows in slices.items()
    }


def within_bounds(in_flight, echo, other):
    """Whether `other` = (calls a second, p50) is near enough to the echo server's."""
    (echo_calls, echo_p50), (calls, p50) = echo, other
    latest = echo_p50 + 25 if in_flight == 1 else 1.30 * echo_p50
    return calls >= 0.80 * echo_calls and p50 <= latest


def rows(options, folder, stack):
    """Yields (plane, mode, payload, in flight), {server: (calls a second, p50)}."""
    binaries = options.bin
    client, echo = binaries / "tests/bench_front/client", binaries / "tests/bench_front/echo"
    addresses = {
        "echo": start_echo(folder, echo, stack),
        "attnd": start_attnd(folder, binaries / "service/attnd", options.attnd, stack),
    }
    if options.floor:
        addresses["floor"] = start_echo(folder, echo, stack, "floor", ["--write"])
    for plane in options.plane or PLANES:
        clients = {server: Client(client, addresses[server][plane], server, stack) for server in addresses}
        for mode in options.mode or MODES:
            for payload in options.payload or PAYLOADS:
                for in_flight in options.in_flight or IN_FLIGHT:
                    row = (plane, mode, payload, in_flight)
                    yield row, measure(clients, mode, payload, in_flight, options)


def columns(row, found):
    (echo_calls, echo_p50), (attnd_calls, attnd_p50) = found["echo"], found["attnd"]
    cells = [*row, f"{echo_calls:.0f}", f"{attnd_calls:.0f}", f"{attnd_calls / echo_calls:.3f}"]
    cells += [f"{echo_p50:.1f}", f"{attnd_p50:.1f}"]
    if "floor" in found:
        floor_calls, floor_p50 = found["floor"]
        cells += [f"{floor_calls:.0f}", f"{floor_p50:.1f}"]
    return cells


def main():
    options = arguments()
    files = [sys.stdout]
    missed = {"attnd": 0, "floor": 0}
    total = 0
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnd-bench-")))
        if options.csv:
            files.append(stack.enter_context(open(options.csv, "w", newline="")))
        writers = [csv.writer(file, lineterminator="\n") for file in files]
        for writer in writers:
            writer.writerow(HEADER + FLOOR_HEADER if options.floor else HEADER)
        for row, found in rows(options, folder, stack):
            for file, writer in zip(files, writers, strict=True):
                writer.writerow(columns(row, found))
                file.flush()
            total += 1
            for server in missed:
                if server in found and not within_bounds(row[-1], found["echo"], found[server]):
                    missed[server] += 1
                    print(f"out of bounds: {server}", *row, file=sys.stderr)
    for server in ["attnd", "floor"] if options.floor else ["attnd"]:
        print(f"{server}: {total - missed[server]} of {total} rows within the bounds", file=sys.stderr)
    return 1 if missed["attnd"] and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
