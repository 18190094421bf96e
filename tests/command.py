"""The command line for tests: as installed, and forked from a process that has its libraries loaded already.

A fresh `diffalign train` imports for seconds before its first step. `diffalign(...)` forks a server that imported the
same modules and then runs the same entry point, in a process of its own that can be killed, limited and looked at.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

BIN = Path(sys.executable).parent
WARM = ["diffalign.cli", "diffalign.run", "diffalign.eval.report", "diffalign.pipelines.sample"]
WARM += ["diffalign.plan", "omegaconf", "pandas"]  # pyarrow imports the last when it hands out rows
WARM += [f"transformers:{name}" for name in ("CLIPTextModel", "CLIPTokenizer")]
WARM += [f"diffusers:{name}" for name in ("StableDiffusionPipeline", "AutoencoderKL", "UNet2DConditionModel")]
WARM += [f"diffusers:{name}" for name in ("PNDMScheduler", "DDIMScheduler")]


@dataclass(frozen=True)
class Result:
    """Exit status (negative: the signal) and what was printed."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of an error. Fails when stderr holds anything else."""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("diffalign: "), f"not one line:\n{self.err}"
        assert "Traceback" not in self.out + self.err
        return lines[0]


def installed(*args: object, timeout: float = 120, module: bool = False, **env: str) -> Result:
    """The command as a person starts it: the script beside the interpreter, or ``python -m diffalign``."""
    head = [sys.executable, "-m", "diffalign"] if module else [str(BIN / "diffalign")]
    done = subprocess.run(
        [*head, *map(str, args)], capture_output=True, text=True, timeout=timeout, env={**os.environ, **env}
    )
    return Result(done.returncode, done.stdout, done.stderr)


class Child:
    """A running command, leader of its own process group."""

    def __init__(self, server: Server, pid: int, folder: Path) -> None:
        self.server, self.pid, self.folder = server, pid, folder

    def send(self, number: int) -> None:
        """A signal, if it still runs."""
        self.server.ask({"signal": number, "pid": self.pid})

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.server.ask({"wait": self.pid, "timeout": 0}) is None

    def wait(self, timeout: float = 120) -> Result:
        """Its end; killed and failed after ``timeout`` seconds."""
        status = self.server.ask({"wait": self.pid, "timeout": timeout})
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        if status is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s\n{out}\n{err}")
        return Result(status, out, err)

    def err(self) -> str:
        """What stderr holds so far; the file is made as the process begins."""
        file = self.folder / "err"
        return file.read_text() if file.exists() else ""


class Server:
    """The warm process and the pipe to it."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="diffalign-")
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        atexit.register(self.close)

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        return json.loads(self.process.stdout.readline())

    def start(self, request: dict[str, Any]) -> Child:
        self.count += 1
        place = Path(self.folder.name) / str(self.count)
        place.mkdir()
        return Child(self, self.ask({**request, "folder": str(place)}), place)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.folder.cleanup()


_servers: list[Server] = []


def start(*args: object, code: str = "", file_bytes: int | None = None, **env: str) -> Child:
    """Start the command. ``code`` runs before it in its process (it may set a fault); without arguments it runs alone.
    ``file_bytes`` limits the size of any file it writes."""
    if not _servers:
        _servers.append(Server())
    return _servers[0].start({"args": [*map(str, args)], "code": code, "file_bytes": file_bytes, "env": env})


def script(code: str, *arguments: object) -> Child:
    """Start code, not the command, with ``arguments`` as it finds them in sys.argv[1:]."""
    return start(code=f"import sys\nsys.argv[1:] = {[*map(str, arguments)]!r}\n{code}")


def group(processes: int, *args: object, timeout: float = 300, code: str = "", **env: str) -> Result:
    """Run the command in processes that find one another, as torchrun starts them, but without importing anything anew.

    Once one has failed, the others have ten seconds to end; its status is the group's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    env["LOCAL_WORLD_SIZE"] = env["WORLD_SIZE"]
    ranks = [start(*args, code=code, **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    end = time.monotonic() + timeout
    while any(rank.running() for rank in ranks):
        if any(rank.wait().status for rank in ranks if not rank.running()):
            end = min(end, time.monotonic() + 10)
        if time.monotonic() > end:
            for rank in ranks:
                rank.send(signal.SIGKILL)
        time.sleep(0.02)
    done = [rank.wait() for rank in ranks]
    status = max((each.status for each in done), key=lambda status: (status != 0, status))
    return Result(status, "".join(each.out for each in done), "".join(each.err for each in done))


def diffalign(*args: object, timeout: float = 120, **options: Any) -> Result:
    """Run the command to its end."""
    return start(*args, **options).wait(timeout)


# ---- the warm process -----------------------------------------------------------------------------------------------


def _serve() -> dict[str, Any] | None:
    """Answer requests until the pipe closes (None), or return a child's own request in the child."""
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["timeout"], ended)
        elif "signal" in request:
            answer = _wait(request["pid"], 0, ended)
            if answer is None:
                os.killpg(request["pid"], request["signal"])
        else:
            answer = os.fork()
            if not answer:
                return request
        print(json.dumps(answer), flush=True)
    return None


def _wait(pid: int, timeout: float, ended: dict[int, int]) -> int | None:
    end = time.monotonic() + timeout
    while pid not in ended:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            return None
        else:
            time.sleep(0.005)
    return ended[pid]


def _run(request: dict[str, Any]) -> None:
    os.setsid()
    for number, name in ((0, "in"), (1, "out"), (2, "err")):
        opened = os.open(f"{request['folder']}/{name}", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["env"])
    sys.argv = ["diffalign", *request["args"]]
    exec(request["code"], {})
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], request["file_bytes"]))
    if request["args"]:
        from diffalign.cli import main

        main()


def _end(request: dict[str, Any]) -> NoReturn:
    """Run to the exit status. The interpreter is not taken down: that touches, and so copies, every page it shares."""
    status: int | str | None = 0
    try:
        _run(request)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else status is not None)


def _warm() -> None:
    """Import what a run imports. No tensor is computed: a process with threads cannot be forked safely."""
    for name in WARM:
        module, _, part = name.partition(":")
        getattr(import_module(module), part or "__name__")


if __name__ == "__main__":
    # what the command's entry point sets before the libraries read it
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # a second interrupt at the terminal is for the tests, not for this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _warm()
    gc.collect()
    gc.freeze()
    mine = _serve()
    if mine is not None:
        _end(mine)
