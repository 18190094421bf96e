"""``votes.jsonl``: every vote one line, only ever appended to, so that nothing a person said is lost.

A vote: ``time, labeller, pair, vote, prompt, left, right``, where ``vote`` is left, right, tie or skip and the last two
are the pictures as they were shown. A line with ``vote: undo`` takes the labeller's vote on that pair back.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from ..errors import RunError, UserError
from .candidates import pair_id

VOTES, IMAGES = "votes.jsonl", "images"
LONGEST_NAME = 64
Choice = Literal["left", "right", "tie", "skip"]
CHOICES: tuple[str, ...] = get_args(Choice)


class BadLine(Exception):
    """A line that is no vote."""


@dataclass(frozen=True)
class Vote:
    """What one labeller said of one pair. ``left`` and ``right``: paths of the pictures beside the file."""

    labeller: str
    pair: str
    vote: str
    prompt: str
    left: str
    right: str

    @property
    def pictures(self) -> tuple[str, str]:
        """In the order of a pair, the same for every labeller."""
        first, second = sorted((self.left, self.right), key=lambda path: PurePosixPath(path).name)
        return first, second

    @property
    def verdict(self) -> str:
        """first | second | tie | skip: of the pair's pictures, not of the sides."""
        if self.vote not in ("left", "right"):
            return self.vote
        return "first" if (self.left if self.vote == "left" else self.right) == self.pictures[0] else "second"


class VoteFile:
    """The votes that stand, as of the last look at the file: ``votes[labeller][pair]``, oldest first.

    Several processes may have the file open: each change is made under a lock on the folder, after looking again.

    Raises:
        UserError: a line is damaged or was edited into something that is no vote; the file is left as it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / VOTES
        self.votes: dict[str, dict[str, Vote]] = {}
        self._stamp: tuple[int, ...] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Look again, if the file is not as this process left it. Raises UserError."""
        stamp = self._state()
        if stamp == self._stamp:
            return
        try:
            data = self.file.read_bytes() if stamp else b""
        except OSError as error:
            raise UserError(f"'{self.file}' cannot be read: {error.strerror or error}") from error
        self.votes = self._read(data)
        self._stamp = stamp

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Nobody else changes anything meanwhile, and the votes are those of now. Raises UserError."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self.refresh()
            yield
        finally:
            os.close(handle)

    def add(self, vote: Vote) -> None:
        """One vote; call it while `changing`. On the disk when this returns. Raises RunError when it cannot be."""
        self._append({"time": _now(), **asdict(vote)})
        self.votes.setdefault(vote.labeller, {})[vote.pair] = vote

    def undo(self, labeller: str, pair: str) -> None:
        """Take a vote back, by another line; as `add`."""
        self._append({"time": _now(), "labeller": labeller, "pair": pair, "vote": "undo"})
        del self.votes[labeller][pair]

    def by_pair(self) -> dict[str, list[Vote]]:
        """All votes that stand but skips, by pair."""
        found: dict[str, list[Vote]] = {}
        for mine in self.votes.values():
            for vote in mine.values():
                if vote.vote != "skip":
                    found.setdefault(vote.pair, []).append(vote)
        return found

    def _state(self) -> tuple[int, ...]:
        try:
            state = self.file.stat()
        except FileNotFoundError:
            return ()
        return state.st_ino, state.st_size, state.st_mtime_ns

    def _append(self, record: dict[str, str]) -> None:
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        size = self._stamp[1] if self._stamp else 0
        try:
            with open(self.file, "ab+", buffering=0) as file:
                if size:
                    file.seek(size - 1)
                    line = line if file.read(1) == b"\n" else b"\n" + line  # an editor can leave the last line open
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "no space left")
                os.fsync(file.fileno())
        except OSError as error:
            if self.file.exists():
                os.truncate(self.file, size)  # no half line stays
            raise RunError(f"the vote was not written to '{self.file}': {error.strerror or error}") from error
        self._stamp = self._state()

    def _read(self, data: bytes) -> dict[str, dict[str, Vote]]:
        votes: dict[str, dict[str, Vote]] = {}
        lines: dict[tuple[str, str], int] = {}
        bad: list[str] = []
        for number, raw in enumerate(data.split(b"\n"), 1):
            if not raw.strip():
                continue
            try:
                record = _record(raw)
                labeller, pair = record["labeller"], record["pair"]
                mine = votes.setdefault(labeller, {})
                if record["vote"] == "undo":
                    if mine.pop(pair, None) is None:
                        raise BadLine(f"takes back a vote of {labeller} that does not stand")
                elif pair in mine:
                    raise BadLine(f"is a second vote of {labeller} on the pair of line {lines[labeller, pair]}")
                else:
                    mine[pair] = _vote(record)
                    lines[labeller, pair] = number
            except BadLine as error:
                bad.append(f"line {number} {error}")
        if bad:
            more = f"; {len(bad) - 1} more lines are wrong, too" if len(bad) > 1 else ""
            raise UserError(
                f"'{self.file}' {bad[0]}; put that line back as it was or delete it (a line is one vote; the others "
                f"stay), then start again{more}"
            )
        return votes


def check_name(name: str) -> str:
    """A labeller's name. Raises UserError for one that cannot stand in a line."""
    name = name.strip()
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise UserError(f"--labeller '{name}' is no name; give 1 to {LONGEST_NAME} printable characters")
    return name


def _record(raw: bytes) -> dict[str, str]:
    """A line's texts by name, as far as votes and undos share them."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadLine("is torn or no JSON") from error
    if not isinstance(record, dict):
        raise BadLine("is no object {...}")
    undo = record.get("vote") == "undo"
    for name in ("labeller", "pair", "vote", *(() if undo else ("prompt", "left", "right"))):
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise BadLine(f"has no text '{name}'")
    if not undo and record["vote"] not in CHOICES:
        raise BadLine(f"has the vote '{record['vote']}', which is none of {', '.join(CHOICES)}, undo")
    return record


def _vote(record: dict[str, str]) -> Vote:
    """Prompt and pictures make the pair's name, so that an edited one is noticed."""
    paths = [PurePosixPath(record[side]) for side in ("left", "right")]
    try:
        same = pair_id(record["prompt"], *(path.stem for path in paths)) == record["pair"]
        same = same and all(str(path.parent) == IMAGES for path in paths)
    except UnicodeEncodeError:  # JSON can hold half a character
        same = False
    if not same:
        raise BadLine("names a prompt or pictures that are not those of its pair")
    return Vote(**{name: record[name] for name in ("labeller", "pair", "vote", "prompt", "left", "right")})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
