"""If a process is killed while it writes a checkpoint, or the disk is full, the last complete checkpoint stays."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastcompress import files
from fastcompress.training import checkpoints
from fastcompress.training.checkpoints import CheckpointError
from tests.support.checkpoints import KEEP, check_whole, save, state
from tests.support.forking import in_fork

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.timeout(120),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, since threads do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


#: Audit events of Python's file operations. The process is killed once before each of them.
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree")


def kill_at(number: int) -> None:
    """Kill this process before the event with this number."""
    count = 0

    def hook(event: str, _: object) -> None:
        nonlocal count
        if event in EVENTS:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("steps", [(1, 2), (1, 2, 3, 4), (1, 2, 2)], ids=["first", "with deletion", "again"])
def test_killed_before_each_system_call(steps: tuple[int, ...], tmp_path: Path):
    """The process is killed while it writes the checkpoint of the last step."""
    *before, last = steps
    killed = 0
    for number in range(1, 500):
        folder = tmp_path / str(number)
        for step in before:
            save(folder, step)

        def task(folder: Path = folder, number: int = number) -> None:
            kill_at(number)
            save(folder, last)

        status = in_fork(task)
        # Every checkpoint with its final name is complete, also before `clean`.
        check_whole(folder)
        files.clean(folder)
        found = check_whole(folder)
        assert found and found[-1] in (before[-1], last)
        assert not list(folder.glob("unfinished-*"))
        if status == 0:
            assert found == sorted(set(steps))[-KEEP:]
            break
        assert status == -signal.SIGKILL
        killed += 1
    assert status == 0 and killed > 10, killed


def test_killed_at_random_moments(tmp_path: Path):
    """The process is killed from outside, also inside of libraries. The next process continues from what it finds."""
    g = random.Random(0)

    def train() -> None:
        files.clean(tmp_path)
        step = (check_whole(tmp_path) or [0])[-1]
        while True:
            step += 1
            save(tmp_path, step)

    def newest() -> int:
        found = checkpoints.found(tmp_path)
        return int(found[-1].name.removeprefix("step-")) if found else 0

    last = 0
    for _ in range(15):
        pid = os.fork()
        if pid == 0:
            try:
                train()
            finally:
                os._exit(1)
        end = time.monotonic() + 20  # wait until there is a new checkpoint
        while time.monotonic() < end and newest() <= last:
            time.sleep(0.002)
        time.sleep(g.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        files.clean(tmp_path)
        found = check_whole(tmp_path)
        assert found and found[-1] > last
        last = found[-1]


@pytest.fixture
def limit() -> Iterator[Callable[[int], None]]:
    """Limit the size of files of this process, which has the effect of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 10, 5_000, 159_000, 161_000, 200_000, 319_000])
def test_a_full_disk_leaves_the_last_checkpoint(size: int, tmp_path: Path, limit: Callable[[int], None]):
    """The disk is full while the weights are written, after them, or while the optimizer is written."""
    save(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert max(map(len, before.values())) > 319_000
    limit(size)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2)
    limit(resource.RLIM_INFINITY)
    message = str(caught.value)
    assert "step-00000002: cannot be written (" in message and "\n" not in message
    assert message.endswith(f"the last whole checkpoint is {tmp_path / 'step-00000001'}")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    save(tmp_path, 2)  # there is space again
    assert check_whole(tmp_path) == [1, 2]


CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def mount_small_disk(folder: Path) -> None:
    """Mount a disk in memory, with 2 MiB and 200 files, that only this process sees.

    Raises:
        OSError: This process has no permission.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS | CLONE_NEWUSER):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=2m,nr_inodes=200"):
        raise OSError(ctypes.get_errno(), "mount")


def save_on_a_full_disk(disk: Path) -> None:
    """Space or files run out."""
    folder, filler = disk / "run", disk / "filler"
    save(folder, 1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    filler.mkdir()
    for left in (0, 4, 100, 160, 300, 472, "files"):  # KiB, of the 480 that a checkpoint takes
        if left == "files":
            with contextlib.suppress(OSError):
                for number in range(10_000):
                    (filler / str(number)).touch()
        else:
            room = os.statvfs(folder)
            (filler / "0").write_bytes(bytes(room.f_bavail * room.f_frsize - 1024 * left))
        with pytest.raises(CheckpointError) as caught:
            save(folder, 2)
        message = str(caught.value)
        assert "step-00000002: cannot be written (" in message and "no space left on device" in message.lower(), left
        assert message.endswith(f"the last whole checkpoint is {folder / 'step-00000001'}"), left
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, left
        for path in filler.iterdir():
            path.unlink()
    save(folder, 2)
    assert check_whole(folder) == [1, 2]


def test_a_real_full_disk(tmp_path: Path):
    disk, done = tmp_path / "disk", tmp_path / "done"
    disk.mkdir()
    if in_fork(lambda: mount_small_disk(disk)):
        pytest.skip("this process has no permission to mount a disk")

    def task() -> None:
        mount_small_disk(disk)
        save_on_a_full_disk(disk)
        done.touch()

    assert in_fork(task) == 0 and done.exists()
    assert not list(disk.iterdir())  # the disk was not the folder of this process


def test_a_full_disk_leaves_a_file_as_it_was(tmp_path: Path, limit: Callable[[int], None]):
    path = tmp_path / "run.yaml"
    files.write_file(path, "good")
    limit(100)
    with pytest.raises(OSError):
        files.write_file(path, "x" * 200)
    limit(resource.RLIM_INFINITY)
    assert path.read_text() == "good" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"step": "x"}', '{"step": NaN}', "[" * 100_000, ""], ids=lambda text: text[:13]
)
def test_an_unreadable_state(content: str, tmp_path: Path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="step-00000001: cannot be read"):
        checkpoints.load(tmp_path / "step-00000001", *state(1))
