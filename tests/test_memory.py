"""What glibc's allocator is told, seen in a process of its own."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

_COUNT_ARENAS = """
import ctypes, sys, threading
from boneage_hf.memory import share_arenas
if sys.argv[2] == "shared":
    share_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
meet = threading.Barrier(12)
def allocate():
    meet.wait()
    libc.malloc(ctypes.c_size_t(1000))
    meet.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
stream = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, stream)
libc.fclose(stream)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_threads_share_two_arenas(tmp_path: Path) -> None:
    def arenas(setting: str) -> int:
        target = tmp_path / f"{setting}.xml"
        subprocess.run([sys.executable, "-c", _COUNT_ARENAS, str(target), setting], check=True)
        return target.read_text().count("<heap nr=")

    assert arenas("shared") == 2
    assert arenas("own") > 2
