import os
import subprocess
import sys
import threading
from platform import libc_ver

import pytest
import trio

from core.limits import IO_THREADS, cpu_count, cpu_limiter, in_cpu_thread, in_io_thread, io_limiter


async def test_cpu_work_runs_in_at_most_one_thread_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEECE_THREADS", "2")
    running, most, lock = 0, 0, threading.Lock()
    gate = threading.Event()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(0.05)
        with lock:
            running -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(in_cpu_thread, work)
    assert most == 2


async def test_limiters_belong_to_the_running_loop() -> None:
    assert cpu_limiter() is cpu_limiter()
    assert io_limiter().total_tokens == IO_THREADS
    assert await in_io_thread(threading.get_ident) != threading.get_ident()


@pytest.mark.parametrize("nonsense", ["", "0", "-3", "many"])
def test_nonsense_in_the_environment_leaves_the_number_of_cores(nonsense: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEECE_THREADS", nonsense)
    assert cpu_count() >= 1


async def test_cancellation_waits_for_the_thread() -> None:
    finished = threading.Event()

    def work() -> None:
        threading.Event().wait(0.05)
        finished.set()

    with trio.move_on_after(0.01):
        await in_io_thread(work)
    assert finished.is_set()


#: Threads that all live at once, and how many places glibc has for what they free.
ARENAS = """
import ctypes, os, sys, threading
from core.limits import bound_malloc
if sys.argv[1] == "bound":
    bound_malloc()
barrier = threading.Barrier(6)
def work():
    held = bytes(100_000)
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
read, write = os.pipe()
file = ctypes.c_void_p(libc.fdopen(write, b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
print(os.read(read, 1 << 16).count(b"<heap nr="))
"""


@pytest.mark.skipif(
    libc_ver()[0] != "glibc", reason="the places (arenas) that are limited are those of glibc; others have none"
)
def test_threads_share_the_places_of_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def places(how: str, **more: str) -> int:
        line = [sys.executable, "-c", ARENAS, how]
        done = subprocess.run(line, env=environment | more, capture_output=True, text=True, check=True, timeout=60)
        return int(done.stdout)

    assert places("free") > 2
    assert places("bound") == 2
    assert places("bound", MALLOC_ARENA_MAX="3") == 3
