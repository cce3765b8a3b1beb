"""New Python processes in a tenth of the time: forks of a process that has imported torch and nothing else.

``run`` takes the arguments of an interpreter, such as ``["-m", "fastcompress", "info"]``. The new process has no module
of fastcompress, and the environment that the caller gives. Use ``subprocess`` for what the C library and the
interpreter read when a process starts, such as ``MALLOC_PERTURB_`` and ``PYTHONWARNINGS``.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

from tests.support import ROOT
from tests.support.forking import write_to

_MESSAGE = 1 << 17  # bytes of the largest request
_server: tuple[int, socket.socket, subprocess.Popen[bytes]] | None = None  # with the process that started it


def run(
    arguments: Sequence[str],
    *,
    stdout: IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    seconds: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end, and return its exit status, or minus the number of a signal, and what it wrote.

    Args:
        arguments: Arguments of an interpreter.
        stdout: File that is its standard output, which is returned otherwise.
        env: Whole environment; by default that of this process.
        cwd: Folder; by default that of this process.
        seconds: Limit of its time.

    Raises:
        subprocess.TimeoutExpired: It was killed because it did not end in time.
    """
    request = {
        "arguments": [str(argument) for argument in arguments],
        "env": {"PYTHONPATH": str(ROOT)} | dict(os.environ if env is None else env),
        "cwd": str(cwd or os.getcwd()),
    }
    receive, send = os.pipe()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(receive, "rb", 0) as status:
        files = [(stdout or out).fileno(), err.fileno(), send]
        socket.send_fds(_connection(), [json.dumps(request).encode()], files)
        os.close(send)
        pid = int(status.readline())
        if not select.select([status], [], [], seconds)[0]:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(arguments), seconds)
        code = int(status.readline())
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(list(arguments), code, *texts)


def _connection() -> socket.socket:
    """Return the connection to the server, which is started when it is needed first."""
    global _server
    if _server is None or _server[0] != os.getpid():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE)
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        code += f"from tests.support import processes; processes.serve({theirs.fileno()})"
        command = [sys.executable, "-c", code]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTCOMPRESS_")}
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL
        )
        theirs.close()
        _server = (os.getpid(), ours, process)
        atexit.register(_stop)
    return _server[1]


def _stop() -> None:
    if _server is not None and _server[0] == os.getpid():
        _server[1].close()
        _server[2].wait()


# In the server and its children


def serve(descriptor: int) -> None:
    """Start a child for each request."""
    import torch  # noqa: F401

    gc.freeze()  # the collector writes to the memory of what it visits, and so copies it

    connection = socket.socket(fileno=descriptor)
    while True:
        message, files, _, _ = socket.recv_fds(connection, _MESSAGE, 3)
        if not message:
            while _reap():
                pass
            os._exit(0)
        if os.fork() == 0:
            connection.close()
            _child(json.loads(message), *files)
        for file in files:
            os.close(file)
        while _reap(os.WNOHANG):
            pass


def _reap(options: int = 0) -> bool:
    try:
        return os.waitpid(-1, options)[0] > 0
    except ChildProcessError:
        return False


def _child(request: dict, stdout: int, stderr: int, status: int) -> None:
    """Fork once more: the parent reports process and status, and the child runs the program."""
    pid = os.fork()
    if pid:
        os.write(status, f"{pid}\n".encode())
        os.close(stdout)
        os.close(stderr)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, f"{code}\n".encode())
        os._exit(0)
    os.close(status)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    write_to(stdout, stderr, unbuffered=bool(os.environ.get("PYTHONUNBUFFERED")))
    os.close(stdout)
    os.close(stderr)
    _as_at_the_start()
    kind, *rest = request["arguments"]
    paths = [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if path]
    sys.path[:] = ["", *paths, *(path for path in sys.path if path not in ("", str(ROOT)))]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        _run(lambda: exec(rest[0], vars(sys.modules["__main__"])))
    if kind == "-m":
        sys.argv = rest
        _run(lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True))
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(kind).parent)
    _run(lambda: runpy.run_path(kind, run_name="__main__"))


def _run(program: Callable[[], object]) -> NoReturn:
    """Run a program and exit as the interpreter does, but without the second that it takes to delete all of torch."""
    code: object = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        traceback.print_exc()
        code = 120
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _as_at_the_start() -> None:
    """Forget the modules of the checkout, and apply the number of threads, which torch read when it was imported."""
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
