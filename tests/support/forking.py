"""Run a task in a fork of this process."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable


def in_fork(task: Callable[[], None], seconds: float = 60.0) -> int:
    """Run a task in a fork, and return its exit status, or minus the number of the signal that ended it.

    Raises:
        AssertionError: If the task was killed because it was not done after ``seconds``.
    """
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
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the forked process was not done after {seconds} s")
