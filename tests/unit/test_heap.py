"""Large blocks go back to the system when they are freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

SCRIPT = """
import ctypes, sys
from pathlib import Path
from understudy.devices.heap import return_large_blocks

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "1":
    return_large_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size = 24 * 2**20
libc.free(libc.malloc(size))  # from this glibc learns
before = resident()
blocks = [libc.malloc(size if number % 2 else 2**16) for number in range(20)]
for number, block in enumerate(blocks):
    ctypes.memset(block, 1, size if number % 2 else 2**16)
for block in blocks[1::2]:
    libc.free(block)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_freed_between_small_blocks_does_not_stay() -> None:
    kept = {
        called: int(subprocess.run([sys.executable, "-c", SCRIPT, called], capture_output=True, check=True).stdout)
        for called in ("0", "1")
    }
    assert kept["1"] < 2 * 24 * 2**20 < kept["0"]
