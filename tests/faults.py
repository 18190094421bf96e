"""Faults for the tests: kills at random instants, small disks, damaged files."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from command import Child, diffalign, start

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float | None:
    """Processor time of a process with its threads; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / TICKS


def run_through(*args: object, **options: object) -> float:
    """Run a command to its end, which must be good. Returns its processor time."""
    child, last = start(*args, **options), 0.0  # type: ignore[arg-type]
    while (now := cpu_seconds(child.pid)) is not None:
        last = now
        time.sleep(0.01)
    done = child.wait()
    assert done.status == 0, done.err
    return last


def kill_at(child: Child, seconds: float) -> bool:
    """kill -9 once the process has used that much processor time: an instant that the load of the machine does not
    move. False when it ended before."""
    while (now := cpu_seconds(child.pid)) is not None:
        if now >= seconds:
            child.send(signal.SIGKILL)
            break
        time.sleep(0.003)
    done = child.wait()
    assert done.status in (0, -signal.SIGKILL), done.err
    assert "Traceback" not in done.err
    return done.status != 0


def kill_again_and_again(
    args: list[object],
    kills: int,
    seconds: tuple[float, float],
    rng: random.Random,
    after_kill: Callable[[], None],
    finished: Callable[[], None],
    **options: object,
) -> int:
    """Kill a command at random instants, start it again each time; whenever it ends, ``finished`` compares what is
    there with what it should be and clears it away. Returns how often it ended."""
    ended = 0
    while kills:
        child = start(*args, **options)  # type: ignore[arg-type]
        if kill_at(child, rng.uniform(*seconds)):
            kills -= 1
            after_kill()
        else:
            finished()
            ended += 1
    done = diffalign(*args, timeout=600, **options)  # type: ignore[arg-type]
    assert done.status == 0, done.err
    finished()
    return ended + 1


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    """A file system of its own in memory; None where that is not allowed."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def leave_room(disk: Path, room: int) -> None:
    """Fill a disk until ``room`` bytes are free; 0 takes the filler away."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    if room:
        free = shutil.disk_usage(disk).free
        filler.write_bytes(b"0" * max(0, free - room))


def tree(folder: Path, *but: str) -> dict[str, str]:
    """Hash of every file under a folder, by name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in but)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
