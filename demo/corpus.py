#!/usr/bin/env python3
"""Collects the demo model's corpus: the texts of free-software licences, English and redistributable verbatim.

Sources:
  - /usr/share/common-licenses, the licence texts of Debian's base-files;
  - the PyPI package spdx 2.5.1 (CC0-1.0), the texts of the SPDX licence list.

One whole licence, the Mozilla Public License 2.0, is held out for perplexity: a training paragraph of which more
than a tenth of the runs of eight words also occur in it is dropped. Near-duplicates among the training paragraphs
are dropped in the same way, so that the hundred copies of the BSD terms become a few.

The result is committed (corpus/train.txt.xz, corpus/heldout.txt), because training runs on a machine without a
network. To make it again:

    pip install --target /tmp/spdx spdx==2.5.1 && python demo/corpus.py --spdx /tmp/spdx/spdx/data
"""

import argparse
import lzma
import pathlib
import re

COMMON_LICENSES = pathlib.Path("/usr/share/common-licenses")
HELD_OUT = "MPL-2.0"
SHINGLE_WORDS = 8
HELD_OUT_OVERLAP = 0.1
DUPLICATE_OVERLAP = 0.6
LINE_COLUMNS = 100
WORD = re.compile(r"[a-z]+")
ENGLISH = re.compile(r"\b(the|of|and|to|or|in|this|is|you|any)\b")
TYPOGRAPHY = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--",
              "\u00a0": " ", "\u00a9": "(C)", "\t": "    ", "\f": "\n", "\r": ""}


def plain_ascii(text):
    """Typographic quotes and dashes become their ASCII forms; any other character outside ASCII is dropped."""
    for fancy, plain in TYPOGRAPHY.items():
        text = text.replace(fancy, plain)
    return text.encode("ascii", "ignore").decode("ascii")


def fill(line):
    """Breaks a line that is a whole paragraph, as half of the sources have them, at about 72 columns."""
    if len(line) <= LINE_COLUMNS:
        return line
    lines = [""]
    for word in line.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > 72:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def paragraphs(text):
    """Paragraphs, their line breaks kept and the indent that their lines share taken away."""
    for block in re.split(r"\n[ ]*\n", plain_ascii(text)):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        if lines:
            indent = min(len(line) - len(line.lstrip()) for line in lines)
            yield "\n".join(fill(line[indent:]) for line in lines)


def is_english(text):
    words = max(1, len(WORD.findall(text.lower())))
    return len(ENGLISH.findall(text.lower())) / words > 0.15


def shingles(text):
    """The runs of SHINGLE_WORDS words in the text; a shorter text is one run."""
    words = WORD.findall(text.lower())
    return {" ".join(words[i:i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def overlap(own, seen):
    return len(own & seen) / len(own)


def documents(spdx):
    """The text of every licence but the held-out one, in a fixed order."""
    paths = [path for path in sorted(COMMON_LICENSES.iterdir()) if not path.is_symlink()]
    paths += sorted(spdx.glob("*.txt"))
    for path in paths:
        if not path.name.startswith(HELD_OUT):
            text = path.read_text("utf-8", "ignore")
            if is_english(text):
                yield text


def training_text(spdx, held_out):
    """One text of all documents, without duplicates and without what the held-out text also says."""
    held_out_shingles = shingles(held_out)
    seen = set()
    kept = []
    for text in documents(spdx):
        parts = []
        for paragraph in paragraphs(text):
            own = shingles(paragraph)
            if overlap(own, held_out_shingles) <= HELD_OUT_OVERLAP and overlap(own, seen) <= DUPLICATE_OVERLAP:
                seen |= own
                parts.append(paragraph)
        if parts:
            kept.append("\n\n".join(parts))
    return "\n\n\n".join(kept) + "\n", len(kept)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spdx", type=pathlib.Path, required=True, help="folder of the SPDX licence texts (*.txt)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "corpus",
                        help="folder to write train.txt.xz and heldout.txt to (default: %(default)s)")
    arguments = parser.parse_args()

    held_out = plain_ascii((COMMON_LICENSES / HELD_OUT).read_text("utf-8"))
    train, count = training_text(arguments.spdx, held_out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "train.txt.xz").write_bytes(lzma.compress(train.encode(), preset=9 | lzma.PRESET_EXTREME))
    (arguments.out / "heldout.txt").write_text(held_out)
    print(f"{count} documents, {len(train)} bytes to train on, {len(held_out)} bytes held out ({HELD_OUT})")


if __name__ == "__main__":
    main()
