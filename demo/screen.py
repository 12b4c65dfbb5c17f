"""Text of several sequences on the terminal, as it comes."""

import re
import shutil
import sys

PROMPT_COLUMNS = 24
PIECE_TOKENS = 16


def printable(text):
    """Bytes as one line of ASCII: a run of white space is one blank, anything else unprintable a dot."""
    return re.sub(r"\s+", " ", "".join(chr(byte) if 32 <= byte < 127 or byte in b"\n\t" else "." for byte in text))


class Screen:
    """One line a sequence: the end of its prompt, then what the model writes.

    On a terminal the lines are drawn over and over; elsewhere a piece of each sequence is printed every PIECE_TOKENS
    tokens.
    """

    def __init__(self, prompts, out=sys.stdout):
        self._prompts = prompts
        self._texts = [bytearray() for _ in prompts]
        self._out = out
        self._live = out.isatty()
        self._drawn = False

    def add(self, tokens):
        """One new token of each sequence."""
        for text, token in zip(self._texts, tokens):
            text.append(token)
        if self._live:
            self._draw()
        elif len(self._texts[0]) % PIECE_TOKENS == 0:
            self._print_pieces()
        self._out.flush()

    def _draw(self):
        columns = shutil.get_terminal_size((120, 40)).columns
        if self._drawn:
            self._out.write(f"\x1b[{len(self._texts)}A")
        self._drawn = True
        for index, (prompt, text) in enumerate(zip(self._prompts, self._texts)):
            start = printable(prompt[-PROMPT_COLUMNS:]).rjust(PROMPT_COLUMNS)
            room = max(8, columns - PROMPT_COLUMNS - 8)
            self._out.write(f"\r\x1b[K  {index:2d} {start}|{printable(text[-room:])}\n")

    def _print_pieces(self):
        first = len(self._texts[0]) - PIECE_TOKENS
        self._out.write(f"  tokens {first} to {first + PIECE_TOKENS - 1}\n")
        for index, (prompt, text) in enumerate(zip(self._prompts, self._texts)):
            before = prompt + bytes(text[:first])
            start = printable(before[-PROMPT_COLUMNS:]).rjust(PROMPT_COLUMNS)
            self._out.write(f"  {index:2d} {start}|{printable(text[first:])}\n")
