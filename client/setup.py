"""Generates the protobuf code before setuptools looks for packages; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))
import generate

if not generate.is_current():
    generate.generate()

setup(install_requires=["grpcio>=1.60", generate.runtime_requirement(), "numpy>=1.24", "ml_dtypes>=0.3.1"])
