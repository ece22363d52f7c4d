import ctypes
import subprocess
import sys

import pytest

CHURN = """
import resource
import sys

import numpy as np

from fedloom.core.runtime.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    buffers = [np.ones(2 << 20, np.uint8) for _ in range(12)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc only")
def test_memory_freed_by_one_round_serves_the_next() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", CHURN, how], capture_output=True, check=True).stdout)
        for how in ("kept", "returned")
    }

    # Twelve buffers of 2 MiB are 6,144 pages: once at most if they are kept, twenty times if they are not.
    assert faults["kept"] < 2 * 6_144 < faults["returned"]
