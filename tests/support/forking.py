"""Run a task in a fork of this process, which has imported what the task needs."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable


def in_fork(task: Callable[[], None], seconds: float = 60.0) -> int:
    """Run a task in a fork, and return its exit status, or minus the number of the signal that ended it.

    A task that computes sets the number of threads to 1 first, since the threads of OpenMP do not survive a fork.

    Raises:
        AssertionError: If the task was killed because it was not done after ``seconds``.
    """
    return wait(start(task), seconds)


def start(task: Callable[[], None]) -> int:
    """Start a task in a fork and return the process."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            task()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return pid


def wait(pid: int, seconds: float = 60.0) -> int:
    """Wait for a process that ``start`` returned. See ``in_fork``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the forked process was not done after {seconds} s")


def write_to(stdout: int, stderr: int, unbuffered: bool = False) -> None:
    """Use these descriptors as the standard output and error of this process, a fork."""
    for name, source, target in (("stdout", stdout, 1), ("stderr", stderr, 2)):
        os.dup2(source, target)
        raw = io.FileIO(target, "wb", closefd=False)
        buffered = raw if unbuffered else io.BufferedWriter(raw)
        lines = name == "stderr" or os.isatty(target)
        text = io.TextIOWrapper(buffered, "utf-8", write_through=unbuffered, line_buffering=lines)
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
