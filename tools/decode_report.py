"""A report of the decode kernels: the table of docs/benchmarks.md and its chart, from what bench_decode printed.

  decode_report.py BF16.csv FP8.csv [--chart CHART.svg]

Prints Markdown: what the runs said of themselves, a row a shape, and the means over the shapes. Shares are of the read
bandwidth that was measured beside each row; a peer's share is of the bandwidth of its own run, since it was measured on
another machine of the kind. Ratios above 1 are faster than the peer: in bf16 of both shares, in fp8, whose peers' bytes
were not recorded, of both times.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "kernels/cuda/bench_decode_peers.csv"


@dataclass
class Run:
    """What bench_decode printed: a dict a tuning of rows by shape, and its remarks."""

    tunings: dict[str, dict[str, dict[str, str]]]
    remarks: list[str]

    def number(self, tuning: str, shape: str, column: str) -> float:
        """NaN where the tuning has no such shape."""
        row = self.tunings.get(tuning, {}).get(shape)
        return float(row[column]) if row else math.nan


def read_run(path: Path) -> Run:
    lines = path.read_text().splitlines()
    tunings: dict[str, dict[str, dict[str, str]]] = {}
    for row in csv.DictReader(line for line in lines if line and not line.startswith("#")):
        if row["repeats"] != "yes":
            sys.exit(f"decode_report: {path}: {row['name']}, {row['tuning']}: its runs differ")
        tunings.setdefault(row["tuning"], {})[row["name"]] = row
    if "best" not in tunings:
        sys.exit(f"decode_report: {path}: no row of the tuning best: not what bench_decode prints?")
    return Run(tunings, [line[2:] for line in lines if line.startswith("# ")])


@dataclass
class Shape:
    """A shape's figures: times in microseconds, shares of the read bandwidth, ratios above 1 faster than the peer."""

    name: str
    bytes_us: float
    us: float
    one_block_us: float
    overlapped_us: float
    fp8_bytes_us: float
    fp8_us: float
    fa3_share: float
    best_share: float
    best_fp8_us: float

    @property
    def share(self) -> float:
        return self.bytes_us / self.us

    @property
    def of_fa3(self) -> float:
        return self.share / self.fa3_share

    @property
    def of_best(self) -> float:
        return self.share / self.best_share

    @property
    def fp8_of_bf16(self) -> float:
        return self.fp8_us / self.us

    @property
    def of_best_fp8(self) -> float:
        return self.best_fp8_us / self.fp8_us


def collect(bf16: Run, fp8: Run, peers: Path) -> list[Shape]:
    """The shapes that have been measured in bf16, in the order of the run."""
    names = ("name", "bytes_us", "fa3", "best", "by", "best_fp8", "by_fp8")
    text = (line for line in peers.read_text().splitlines() if line and not line.startswith("#"))
    of_peers = {row["name"]: row for row in csv.DictReader(text, names)}
    shapes = []
    for name in bf16.tunings["best"]:
        if name not in of_peers:
            sys.exit(f"decode_report: {peers} has no shape {name}")
        peer = {column: float(of_peers[name][column]) for column in ("bytes_us", "fa3", "best", "best_fp8")}
        shapes.append(Shape(
            name=name,
            bytes_us=bf16.number("best", name, "bytes_us"),
            us=bf16.number("best", name, "us"),
            one_block_us=bf16.number("one_block", name, "us"),
            overlapped_us=bf16.number("overlap", name, "us"),
            fp8_bytes_us=fp8.number("best", name, "bytes_us"),
            fp8_us=fp8.number("best", name, "us"),
            fa3_share=peer["bytes_us"] / peer["fa3"],
            best_share=peer["bytes_us"] / peer["best"],
            best_fp8_us=peer["best_fp8"],
        ))
    return shapes


COLUMNS = (
    ("shape", lambda of: of.name),
    ("bytes", lambda of: f"{of.bytes_us:.2f}"),
    ("us", lambda of: f"{of.us:.2f}"),
    ("share", lambda of: f"{of.share:.3f}"),
    ("of FA3", lambda of: f"{of.of_fa3:.3f}"),
    ("of the best peer", lambda of: f"{of.of_best:.3f}"),
    ("no clusters, one block an SM", lambda of: f"{of.one_block_us:.2f}"),
    ("overlapped", lambda of: f"{of.overlapped_us:.2f}"),
    ("fp8 us", lambda of: f"{of.fp8_us:.2f}"),
    ("of bf16", lambda of: f"{of.fp8_of_bf16:.3f}"),
    ("of the best fp8 peer", lambda of: f"{of.of_best_fp8:.3f}"),
)


def table(shapes: Sequence[Shape]) -> list[str]:
    lines = ["| " + " | ".join(name for name, _ in COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    for shape in shapes:
        cells = (cell(shape).replace("nan", "-") for _, cell in COLUMNS)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def means(shapes: Sequence[Shape]) -> list[str]:
    def mean_and_least(name: str, ratios: Sequence[tuple[float, str]]) -> str:
        measured = [(ratio, shape) for ratio, shape in ratios if not math.isnan(ratio)]
        ratio, shape = min(measured)
        mean = math.exp(statistics.fmean(math.log(ratio) for ratio, _ in measured))
        return f"- {name}: geometric mean of {len(measured)} shapes {mean:.3f}, least {ratio:.3f} (`{shape}`)"

    large = [of for of in shapes if of.bytes_us > 200]
    return [
        mean_and_least("of FA3", [(of.of_fa3, of.name) for of in shapes]),
        mean_and_least("of the best peer", [(of.of_best, of.name) for of in shapes]),
        mean_and_least("fp8, of the best peer", [(of.of_best_fp8, of.name) for of in shapes]),
        "- share of those above 200 us: " + ", ".join(f"`{of.name}` {of.share:.3f}" for of in large),
    ]


def draw(shapes: Sequence[Shape], path: Path) -> None:
    """Shares of the read bandwidth, smallest shape first: ours and the peers'."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "attnd", "svg.fonttype": "none"})  # the same file from the same figures
    from matplotlib import pyplot

    ordered = sorted(shapes, key=lambda of: of.bytes_us)
    places = range(len(ordered))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 7.5), sharey=True, layout="constrained")
    left.scatter([of.fa3_share for of in ordered], places, marker="|", s=70, color="tab:red", label="FlashAttention-3")
    left.scatter([of.best_share for of in ordered], places, marker="o", s=26, facecolors="none", edgecolors="tab:grey",
                 label="the best of FA3, FlashInfer, hpc-ops")
    left.scatter([of.share for of in ordered], places, marker="o", s=26, color="tab:blue", label="attnd")
    left.set(title="bf16 cache", yticks=places, yticklabels=[f"{of.name}, {of.bytes_us:.0f} us" for of in ordered])
    shares = [of.fp8_bytes_us / of.fp8_us for of in ordered]
    right.scatter([share / of.of_best_fp8 for share, of in zip(shares, ordered)], places, marker="o", s=26,
                  facecolors="none", edgecolors="tab:grey", label="the best of FlashInfer, hpc-ops")
    right.scatter(shares, places, marker="o", s=26, color="tab:blue", label="attnd")
    right.set(title="fp8 cache")
    for axes in (left, right):
        axes.grid(axis="x", color="lightgrey", linewidth=0.6)
        axes.set(xlim=(0, 1), xlabel="share of the read bandwidth; more is faster")
        axes.legend(loc="lower right", fontsize="small")
    left.set_ylabel("shape, and the time that reading its bf16 cache takes")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bf16", type=Path, metavar="BF16.csv", help="what bench_decode printed")
    parser.add_argument("fp8", type=Path, metavar="FP8.csv", help="the same with --dtype fp8")
    parser.add_argument("--chart", type=Path, metavar="CHART.svg", help="also draws the shares, here")
    arguments = parser.parse_args()
    bf16, fp8 = read_run(arguments.bf16), read_run(arguments.fp8)
    shapes = collect(bf16, fp8, PEERS)
    print("\n".join([f"- bf16: {remark}" for remark in bf16.remarks] + [f"- fp8: {remark}" for remark in fp8.remarks]))
    print("\n" + "\n".join(table(shapes)) + "\n\n" + "\n".join(means(shapes)))
    if arguments.chart:
        draw(shapes, arguments.chart)


if __name__ == "__main__":
    main()
