"""One labeller at work: which pair is next, what becomes of a vote, and the files that training reads.

In the folder: ``votes.jsonl`` (what was said, append-only), ``images/`` (the pictures voted on, named by content) and,
made anew from these after every vote, ``metadata.jsonl`` (one row a pair) and ``labellers.jsonl`` (one row a vote).
"""

from __future__ import annotations

import json
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.files import swap
from ..data.images import ImageError
from ..data.rows import ImageRef, digest_of
from ..data.writers import suffix_of
from ..errors import Note, RunError, UserError
from ..keyed import generator
from .agreement import Agreement, agreement
from .candidates import Pair
from .votes import CHOICES, IMAGES, VOTES, Vote, VoteFile, check_name

ROWS, BY_LABELLER = "metadata.jsonl", "labellers.jsonl"
AHEAD = 3  # pairs whose pictures the page fetches before they are shown


class Refused(Exception):
    """What a page asked for does not fit what is there now; nothing was changed."""


@dataclass(frozen=True)
class Shown:
    """A pair as a labeller sees it. ``left`` and ``right``: digests of the pictures."""

    id: str
    prompt: str
    left: str
    right: str


@dataclass(frozen=True)
class State:
    """Where a labeller stands: ``done`` of ``total`` pairs, of these ``skipped``; the pair to judge (None: all done),
    the next ones, the pair that an undo would bring back. ``kappas``: as `Agreement`, of this labeller alone."""

    labeller: str
    done: int
    total: int
    skipped: int
    pair: Shown | None
    ahead: tuple[Shown, ...]
    last: str | None
    kappas: tuple[tuple[str, str, int, float, float | None], ...]


class Session:
    """The pairs of a source, one labeller, and the folder of the votes.

    Raises:
        UserError: a bad name; the folder holds something else; a damaged line of votes.
    """

    def __init__(self, folder: Path, pairs: Sequence[Pair], labeller: str) -> None:
        self.folder, self.labeller = folder, check_name(labeller)
        self.pairs = {pair.id: pair for pair in pairs}
        self.refs = {ref.digest: ref for pair in pairs for ref in pair.pictures}
        self.lock = threading.Lock()  # the pages of one process; processes exclude each other by the folder's lock
        self.file = open_votes(folder)
        with self.file.changing():
            keep_edited(self.file)
            write_rows(self.file)

    def state(self) -> State:
        """As of now. Raises UserError for a file of votes that was damaged meanwhile."""
        with self.lock:
            self.file.refresh()
            return self._state()

    def vote(self, pair: str, vote: str) -> State:
        """Keep a vote: pictures, line, rows, in this order.

        Raises:
            Refused: no such pair or vote, or this labeller judged it already (in another tab, say); a picture changed.
            UserError: as `state`. RunError: it cannot be written.
        """
        with self.lock, self.file.changing():
            known = self.pairs.get(pair)
            if known is None or vote not in CHOICES:
                raise Refused("no such pair or vote")
            if pair in self._mine:
                raise Refused("this pair is labelled already; here is the next one")
            shown = self._shown(known)
            sides = [
                f"{IMAGES}/{digest}" if vote == "skip" else self._kept(digest) for digest in (shown.left, shown.right)
            ]
            self.file.add(Vote(self.labeller, pair, vote, known.prompt, *sides))
            self._write_rows()
            return self._state()

    def undo(self, pair: str) -> State:
        """Take back the last vote, which must be on ``pair``. Raises as `vote`."""
        with self.lock, self.file.changing():
            if pair != self._last():
                raise Refused("another vote is the last one by now; look again")
            self.file.undo(self.labeller, pair)
            self._write_rows()
            return self._state()

    def picture(self, digest: str) -> bytes:
        """The encoded bytes of a listed picture. Raises Refused for any other, or when it is not what it was."""
        ref = self.refs.get(digest)
        if ref is None:
            raise Refused("no such picture")
        return _bytes(ref)

    @property
    def _mine(self) -> dict[str, Vote]:
        return self.file.votes.get(self.labeller, {})

    def _last(self) -> str | None:
        return next((pair for pair in reversed(self._mine) if pair in self.pairs), None)

    def _state(self) -> State:
        mine = self._mine
        done = [mine[pair].vote for pair in self.pairs if pair in mine]
        left = (self._shown(pair) for name, pair in self.pairs.items() if name not in mine)
        waiting = [*islice(left, 1 + AHEAD)]
        return State(
            labeller=self.labeller,
            done=len(done),
            total=len(self.pairs),
            skipped=done.count("skip"),
            pair=waiting[0] if waiting else None,
            ahead=tuple(waiting[1:]),
            last=self._last(),
            kappas=tuple(row for row in agreement(verdicts(self.file)).kappas if self.labeller in row[:2]),
        )

    def _shown(self, pair: Pair) -> Shown:
        """Sides by a coin keyed by labeller and pair: the same after a restart, another for another labeller."""
        sides = [ref.digest for ref in pair.pictures]
        if generator("label side", self.labeller, pair.id).random() < 0.5:
            sides.reverse()
        return Shown(pair.id, pair.prompt, *sides)

    def _kept(self, digest: str) -> str:
        """Path of the folder's own copy of a picture, which is made here."""
        known = next((self.folder / IMAGES).glob(f"{digest}.*"), None)
        if known is not None:
            return f"{IMAGES}/{known.name}"
        data = _bytes(self.refs[digest])
        name = f"{IMAGES}/{digest}.{suffix_of(data)}"
        try:
            (self.folder / IMAGES).mkdir(exist_ok=True)
            swap(self.folder / name, data)
        except OSError as error:
            raise RunError(f"'{self.folder / name}' cannot be written: {error.strerror or error}") from error
        return name

    def _write_rows(self) -> None:
        try:
            write_rows(self.file)
        except OSError as error:
            raise RunError(
                f"the vote is kept, but '{self.folder / ROWS}' cannot be written ({error.strerror or error}); it is "
                "made anew with the next vote or start"
            ) from error


def open_votes(folder: Path) -> VoteFile:
    """The votes of a folder, which is made where there is none. Raises UserError."""
    if (folder / ROWS).exists() and not (folder / VOTES).exists():
        raise UserError(f"'{folder}' holds pairs that this command did not make; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / VOTES).touch()
    except OSError as error:
        raise UserError(f"'{folder}' cannot be written ({error.strerror or error}); choose another folder") from error
    return VoteFile(folder)


def rows_of(file: VoteFile) -> list[dict[str, Any]]:
    """One row a pair: what most labellers said; a tie where they are level or most said so. ``votes``: for the chosen
    picture, for the rejected one, ties."""
    rows = []
    for name, votes in file.by_pair().items():
        counts = Counter(vote.verdict for vote in votes)
        (verdict, most), *others = counts.most_common()
        tie = verdict == "tie" or any(count == most for _, count in others)
        pictures, order = votes[0].pictures, ("first", "second")
        if verdict == "second" and not tie:
            pictures, order = pictures[::-1], order[::-1]
        row = {"id": name, "prompt": votes[0].prompt, "chosen": pictures[0], "rejected": pictures[1]}
        rows.append({**row, **_marked(tie), "votes": [counts[one] for one in (*order, "tie")]})
    return rows


def rows_by_labeller(file: VoteFile) -> list[dict[str, Any]]:
    """One row a vote, with ``user``: for methods that tell people apart."""
    rows = []
    for votes in file.by_pair().values():
        for vote in votes:
            chosen, rejected = vote.pictures[:: -1 if vote.verdict == "second" else 1]
            row = {"id": f"{vote.pair}-{vote.labeller}", "prompt": vote.prompt, "chosen": chosen, "rejected": rejected}
            rows.append({**row, **_marked(vote.verdict == "tie"), "user": vote.labeller})
    return rows


def _marked(tie: bool) -> dict[str, bool]:
    return {"tie": True} if tie else {}


def write_rows(file: VoteFile) -> None:
    """Both tables, each as a whole or not at all. Raises OSError."""
    for name, rows in ((ROWS, rows_of(file)), (BY_LABELLER, rows_by_labeller(file))):
        if rows or (file.folder / name).exists():
            swap(file.folder / name, _lines(rows))


def keep_edited(file: VoteFile) -> None:
    """Rows that the votes do not give were edited, or the votes were: they stay under another name, with a note."""
    place = file.folder / ROWS
    if not place.exists() or place.read_bytes() == _lines(rows_of(file)):
        return
    kept = next(p for n in range(1, 10**6) if not (p := file.folder / f"metadata-{n}.jsonl").exists())
    place.replace(kept)
    warnings.warn(
        f"'{place}' was not what {VOTES} gives and is made anew from the votes; what it was is kept as {kept.name}",
        Note,
        stacklevel=2,
    )


def verdicts(file: VoteFile) -> dict[str, dict[str, str]]:
    """``[pair][labeller]``: first, second or tie."""
    return {pair: {vote.labeller: vote.verdict for vote in votes} for pair, votes in file.by_pair().items()}


@dataclass(frozen=True)
class Summary:
    """Who labelled how much, how far they agree, and which pairs came of it. ``labellers``: by name the counts of left,
    right, tie and skip."""

    folder: Path
    labellers: dict[str, dict[str, int]]
    pairs: int
    ties: int
    agreement: Agreement

    @staticmethod
    def of(file: VoteFile) -> Summary:
        """Of the votes that stand."""
        people = {}
        for name, mine in sorted(file.votes.items()):
            counts = Counter(vote.vote for vote in mine.values())
            people[name] = {choice: counts[choice] for choice in CHOICES}
        rows = rows_of(file)
        return Summary(file.folder, people, len(rows), sum("tie" in row for row in rows), agreement(verdicts(file)))

    def json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "folder": str(self.folder)}

    def render(self, console: Any) -> None:
        """For a terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table("labeller", "left", "right", "tie", "skip", "left of left and right")
        for name, counts in self.labellers.items():
            sides = counts["left"] + counts["right"]
            leaning = f"{counts['left'] / sides:.0%}" if sides else ""
            table.add_row(escape(name), *(f"{counts[choice]:,}" for choice in CHOICES), leaning)
        console.print(table)
        found = self.agreement
        if found.share is not None:
            alpha = "" if found.alpha is None else f", Krippendorff's alpha {found.alpha:.2f}"
            console.print(f"agreement on {found.pairs:,} pairs that several labelled: {found.share:.0%}{alpha}")
        for one, other, pairs, share, kappa in found.kappas:
            shown = "" if kappa is None else f", Cohen's kappa {kappa:.2f}"
            console.print(f"  {one} and {other}: {share:.0%} of {pairs:,}{shown}", markup=False)
        console.print(f"{self.pairs:,} pairs, {self.ties:,} of them ties: {self.folder / ROWS}", markup=False)


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _bytes(ref: ImageRef) -> bytes:
    try:
        data = ref.read()
    except ImageError as error:
        raise Refused(f"picture '{ref.name}': {error}; skip this pair") from error
    if digest_of(data) != ref.digest:
        raise Refused(f"picture '{ref.name}' changed meanwhile; skip this pair, or start again")
    return data
