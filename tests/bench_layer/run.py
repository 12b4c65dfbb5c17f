#!/usr/bin/env python3
"""Measures what one layer call costs end to end: from a client's tensors to its outputs, on one host.

Starts attnd with the geometry given, uploads CONTEXT tokens to each of a batch's sequences, and runs decode steps of
one new token a sequence over one DecodeStream, one layer call at a time, from a client on the gRPC C core. A call
lasts from handing the request to gRPC until the whole response is there. Every layer has keys and values of its own,
so that with the default sizes no cache holds the next call's. The first output of every batch is checked.

Every other step asks for the server's timing, which on cuda costs the call a few microseconds: the times of calls are
of the steps that do not, the breakdown is of those that do. Each figure is the median over the rounds of a round's
p50 or p99.

CSV on the standard output, a line a batch; times in microseconds:
  backend,dtype,plane,batch,context,layers
  calls                   without timing, in all rounds
  call_p50_us,call_p99_us
  timed_call_p50_us       of the calls with timing
  queue, copy_in, plan, attention, combine, copy_out: each NAME_p50_us,NAME_p99_us; the server's, of its slowest rank
                          (proto/attnd.proto, RankTiming); on cuda attention is all from staging to waiting
  kernel_p50_us,kernel_p99_us   on cuda the device's clock around the kernels, which is within attention; on a CPU
                          attention and combine
  kernel_share            the median of kernel / call
  outside_p50_us          of the call, what is not in the server's breakdown: gRPC and the wire, both ways

It needs Python alone, a server (--server) and the client built with it. In a bundle, bin/bench_layer.py finds both
beside itself:
  python3 bin/bench_layer.py --backend cuda
"""

import argparse
import contextlib
import csv
import dataclasses
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
BUILT = HERE.parents[1] / "bazel-release-bin/service/attnd"
PARTS = ["queue", "copy_in", "plan", "attention", "combine", "copy_out"]
GROWTH_TOKENS = 64  # client.c cuts the sequences back then


def numbers(text):
    """A list like 1,32,128."""
    values = [int(word) for word in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="./dev bench layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--server", type=pathlib.Path, metavar="PATH", help="attnd's program [the one beside this script, or built]")
    add("--client", type=pathlib.Path, metavar="PATH", help="this bench's client [the one that belongs to the server]")
    add("--backend", default="cpu", metavar="KIND", help="cpu, cuda or reference [cpu]")
    add("--batch", type=numbers, default=[1, 32, 128], metavar="N[,N..]", help="sequences a step [1,32,128]")
    add("--context", type=int, default=4096, metavar="N", help="tokens uploaded to each sequence [4096]")
    add("--heads-q", type=int, default=32, metavar="N", help="[32]")
    add("--heads-kv", type=int, default=8, metavar="N", help="[8]")
    add("--head-dim", type=int, default=128, metavar="N", help="[128]")
    add("--dtype", default="bf16", metavar="TYPE", help="bf16, fp16 or fp32 [bf16]")
    add("--page-size", type=int, default=64, metavar="N", help="tokens a page [64]")
    add("--layers", type=int, default=8, metavar="N", help="the server's memory and the upload grow with them [8]")
    add("--plane", choices=["tcp", "unix"], default="tcp", help="how the client is connected [tcp]")
    add("--seconds", type=float, default=2.0, metavar="S", help="of one round, at least [2]")
    add("--calls", type=int, default=400, metavar="N", help="of one round, at least [400]")
    add("--rounds", type=int, default=5, metavar="N", help="[5]")
    add("--csv", type=pathlib.Path, metavar="FILE", help="write the CSV there as well")
    add("--attnd", action="append", default=[], metavar="FLAG=VALUE", help="a flag for attnd, e.g. threads=2")
    options = parser.parse_args(argv)
    if min(options.layers, options.rounds, options.calls, options.page_size) < 1 or options.context < 0:
        parser.error("counts must be 1 or more, the context 0 or more")
    options.server = options.server or next((path for path in [HERE / "attnd", BUILT] if path.exists()), BUILT)
    options.client = options.client or client_of(options.server)
    for program in (options.server, options.client):
        if not program.exists():
            parser.error(f"no program at {program}: `./dev bench layer` builds it, `./dev bundle` takes it along")
    return options


def client_of(server):
    """In a bundle it lies beside the server, else where Bazel built both."""
    beside = server.parent / "bench_layer_client"
    return beside if beside.exists() else server.absolute().parents[1] / "tests/bench_layer/client"


# ----------------------------------------------------------------------------------------------------------------
# The two programs


def pages_needed(options):
    """Pages of the largest batch, grown, and one more a sequence for the step's new token."""
    tokens = options.context + GROWTH_TOKENS + 1
    return max(64, max(options.batch) * (-(-tokens // options.page_size) + 1))


def start_server(options, folder, stack):
    """Its address on the plane asked for."""
    ready, log = folder / "ready", folder / "log"
    flags = {
        "backend": options.backend,
        "layers": options.layers,
        "heads-q": options.heads_q,
        "heads-kv": options.heads_kv,
        "head-dim": options.head_dim,
        "dtype": options.dtype,
        "page-size": options.page_size,
        "pages": pages_needed(options),
        "log-level": "warn",
        "listen": "127.0.0.1:0" if options.plane == "tcp" else f"unix:{folder}/attnd.sock",
        "ready-file": ready,
    } | dict(flag.split("=", 1) for flag in options.attnd)
    command = [options.server, *(f"--{name}={value}" for name, value in flags.items())]
    output = stack.enter_context(open(log, "wb"))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    stack.callback(stop, process)
    while not (ready.exists() and ready.read_text().endswith("\n")):
        if process.poll() is not None:
            words = log.read_text(errors="replace").strip()
            sys.exit(f"bench layer: attnd ended with {process.returncode} instead of serving:\n{words}")
        time.sleep(0.01)
    return ready.read_text().splitlines()[0]


def stop(process):
    process.terminate()
    process.wait()


@dataclasses.dataclass
class Round:
    """Microseconds, call by call."""

    plain: list[float]
    timed: list[float]
    parts: dict[str, list[float]]  # of the timed calls; "device", too


class Client:
    """The client program, told what to do line by line."""

    def __init__(self, program, address, stack):
        command = [program, address]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(stop, self.process)

    def _tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _words(self):
        words = self.process.stdout.readline().split()
        if not words:
            sys.exit("bench layer: the client has failed")
        return words

    def open(self, batch, context):
        """Yields (sequences done, of how many)."""
        self._tell(f"open {batch} {context}")
        for _ in range(batch):
            _, done, total = self._words()
            yield int(done), int(total)

    def run(self, seconds, calls):
        """Measures a round."""
        measured = Round([], [], {part: [] for part in [*PARTS, "device"]})
        self._tell(f"run {seconds} {calls}")
        while (words := self._words()) != ["end"]:
            kind, call, *parts = words
            (measured.timed if kind == "timed" else measured.plain).append(float(call))
            for values, part in zip(measured.parts.values(), parts):
                values.append(float(part))
        return measured

    def close(self):
        self._tell("close")
        self._words()


# ----------------------------------------------------------------------------------------------------------------
# Figures


def percentile(values, share):
    """Of the values as they are: none between two of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def figures_of(measured):
    """The columns of one round."""
    server = [sum(parts) for parts in zip(*(measured.parts[part] for part in PARTS))]
    kernel = [
        device or attention + combine
        for device, attention, combine in zip(*(measured.parts[part] for part in ("device", "attention", "combine")))
    ]
    figures = {
        "call_p50_us": percentile(measured.plain, 0.50),
        "call_p99_us": percentile(measured.plain, 0.99),
        "timed_call_p50_us": percentile(measured.timed, 0.50),
    }
    for name, values in [*((part, measured.parts[part]) for part in PARTS), ("kernel", kernel)]:
        figures[f"{name}_p50_us"] = percentile(values, 0.50)
        figures[f"{name}_p99_us"] = percentile(values, 0.99)
    figures["kernel_share"] = statistics.median(one / call for one, call in zip(kernel, measured.timed))
    figures["outside_p50_us"] = percentile([call - one for call, one in zip(measured.timed, server)], 0.50)
    return figures


def row_of(options, batch, rounds):
    """A line of the CSV: medians over the rounds."""
    columns = [figures_of(measured) for measured in rounds]
    medians = {name: statistics.median(one[name] for one in columns) for name in columns[0]}
    head = {
        "backend": options.backend,
        "dtype": options.dtype,
        "plane": options.plane,
        "batch": batch,
        "context": options.context,
        "layers": options.layers,
        "calls": sum(len(measured.plain) for measured in rounds),
    }
    return head | {name: round(value, 3 if name == "kernel_share" else 1) for name, value in medians.items()}


def say(line):
    """Progress on one line of stderr, if somebody is looking."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def measure(options, client, batch):
    for done, total in client.open(batch, options.context):
        say(f"batch {batch}: {done} of {total} sequences prefilled")
    rounds = []
    for number in range(options.rounds):
        say(f"batch {batch}: round {number + 1} of {options.rounds}")
        rounds.append(client.run(options.seconds, options.calls))
    client.close()
    say("")
    return row_of(options, batch, rounds)


def main(argv=None):
    options = parse(argv)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="attnd-bench-")))
        client = Client(options.client, start_server(options, folder, stack), stack)
        files = [sys.stdout]
        if options.csv:
            files.append(stack.enter_context(open(options.csv, "w", newline="")))
        for number, batch in enumerate(options.batch):
            row = measure(options, client, batch)
            for file in files:
                writer = csv.DictWriter(file, list(row), lineterminator="\n")
                if number == 0:
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
