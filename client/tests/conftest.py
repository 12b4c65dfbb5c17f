"""Makes the package importable from the source tree, with its generated code."""

import sys
from pathlib import Path

CLIENT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(CLIENT), str(CLIENT / "tests")]

import generate  # noqa: E402

if not generate.is_current():
    generate.generate()
