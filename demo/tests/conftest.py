import pathlib
import sys

import pytest
from threadpoolctl import threadpool_limits

DEMO = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(DEMO), str(DEMO.parent / "client")]


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread():
    """As in the demo itself: on small matrices BLAS threads spend their time waiting for each other."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield
