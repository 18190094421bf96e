"""The rows that every reader ends in, and the account of what was left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from .images import Alpha, load_image, read_file

# Reasons that are flaws of the data; the other reasons are decided by a policy and never make --strict fail.
FLAWS = ("unreadable image", "missing image", "malformed row", "no prompt", "bad label")


def digest_of(*parts: bytes) -> str:
    """A 128-bit content hash in hex."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def file_stamp(path: Path) -> str:
    """Path, size and time of change of a file; "" when there is no such file."""
    try:
        state = path.stat()
    except OSError:
        return ""
    return f"{path.absolute()}|{state.st_size}|{state.st_mtime_ns}"


class ImageTable(Protocol):
    """A table that hands out one picture at a time. ``stamp`` changes whenever the table behind it does."""

    def image(self, row: int, column: str) -> bytes | Path: ...

    def stamp(self, row: int, column: str) -> str: ...


@dataclass(frozen=True)
class Cell:
    """A picture inside a table: nothing is read before it is asked for."""

    table: ImageTable = field(compare=False, repr=False)
    row: int
    column: str


@dataclass(frozen=True)
class ImageRef:
    """Where a picture is: nothing is kept in memory but a few words. ``digest`` and ``size`` (width, height) are known
    once the picture has been looked at."""

    source: Path | bytes | Cell = field(repr=False)
    name: str
    digest: str = ""
    size: tuple[int, int] | None = None

    def locate(self) -> bytes | Path:
        """The encoded bytes, or the file that holds them. Raises ImageError when neither is there."""
        if isinstance(self.source, Cell):
            return self.source.table.image(self.source.row, self.source.column)
        return self.source

    def read(self) -> bytes:
        """The encoded bytes. Raises ImageError when they are missing."""
        found = self.locate()
        return read_file(found) if isinstance(found, Path) else found

    def load(self, alpha: Alpha = "white") -> Image.Image:
        """The picture as upright 8-bit RGB. Raises ImageError."""
        return load_image(self.read(), alpha)

    def stamp(self) -> str:
        """A name for this very state of the picture (file, size, time), or "" when there is none."""
        if isinstance(self.source, Cell):
            return self.source.table.stamp(self.source.row, self.source.column)
        return file_stamp(self.source) if isinstance(self.source, Path) else ""

    def content_hash(self) -> str:
        """Hash of the encoded bytes."""
        return self.digest or digest_of(self.read())


class Row(Protocol):
    """What rows of every kind have: pictures, prompts and numbers by name."""

    @property
    def id(self) -> str: ...

    @property
    def prompt(self) -> str: ...

    @property
    def images(self) -> dict[str, ImageRef]: ...

    @property
    def prompts(self) -> dict[str, str]: ...

    @property
    def columns(self) -> Mapping[str, float | None]: ...


@dataclass(frozen=True)
class PairRow:
    """One preference: ``chosen`` was liked better than ``rejected`` for ``prompt``.

    ``tie`` marks a pair without a preference that ``data.ties=keep`` left as it was written; ``user`` is who preferred,
    where the data say it."""

    id: str
    prompt: str
    chosen: ImageRef
    rejected: ImageRef
    rejected_prompt: str | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None
    tie: bool = False
    user: str | None = None

    @property
    def images(self) -> dict[str, ImageRef]:
        return {"chosen": self.chosen, "rejected": self.rejected}

    @property
    def prompts(self) -> dict[str, str]:
        more = {} if self.rejected_prompt is None else {"rejected_prompt": self.rejected_prompt}
        return {"prompt": self.prompt, **more}

    @property
    def columns(self) -> dict[str, float | None]:
        return {"chosen_score": self.chosen_score, "rejected_score": self.rejected_score, "tie": float(self.tie)}


@dataclass(frozen=True)
class SingleRow:
    """One picture and its prompt."""

    id: str
    prompt: str
    image: ImageRef

    @property
    def images(self) -> dict[str, ImageRef]:
        return {"image": self.image}

    @property
    def prompts(self) -> dict[str, str]:
        return {"prompt": self.prompt}


@dataclass(frozen=True)
class ImageRow(SingleRow):
    """A captioned picture, for fine-tuning without preferences."""

    score: float | None = None

    @property
    def columns(self) -> dict[str, float | None]:
        return {"score": self.score}


@dataclass(frozen=True)
class RatedRow(SingleRow):
    """A picture that was liked (``label`` 1) or not (-1)."""

    label: float

    @property
    def columns(self) -> dict[str, float | None]:
        return {"label": self.label}


@dataclass(frozen=True)
class RankedRow:
    """``pictures`` of one prompt and their ``scores``, higher is better, best first.

    ``rewards`` are further scores of the pictures by name. Among the rows of a set, a list that is shorter than the
    longest ends in its last picture again, without scores."""

    id: str
    prompt: str
    pictures: tuple[ImageRef, ...]
    scores: tuple[float | None, ...]
    rewards: tuple[tuple[str, tuple[float | None, ...]], ...] = ()

    @property
    def images(self) -> dict[str, ImageRef]:
        return {f"image_{k}": ref for k, ref in enumerate(self.pictures)}

    @property
    def prompts(self) -> dict[str, str]:
        return {"prompt": self.prompt}

    @property
    def columns(self) -> dict[str, float | None]:
        named = (("score", self.scores), *self.rewards)
        return {f"{name}_{k}": value for name, values in named for k, value in enumerate(values)}

    def padded(self, length: int) -> RankedRow:
        """As a row of a set whose longest list has ``length`` pictures."""
        lack = length - len(self.pictures)
        none = (None,) * lack
        more = tuple((name, values + none) for name, values in self.rewards)
        return RankedRow(self.id, self.prompt, self.pictures + self.pictures[-1:] * lack, self.scores + none, more)


@dataclass(frozen=True)
class PromptRow:
    """A prompt alone, for methods that draw their own pictures."""

    id: str
    prompt: str

    @property
    def images(self) -> dict[str, ImageRef]:
        return {}

    @property
    def prompts(self) -> dict[str, str]:
        return {"prompt": self.prompt}

    @property
    def columns(self) -> dict[str, float | None]:
        return {}


@dataclass(frozen=True)
class BadRow:
    """A row that is not used: where it stands, the heading it is counted under, and the detail."""

    place: str
    reason: str
    detail: str = ""
    prompt: str = ""
    images: tuple[ImageRef, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Report:
    """What a reader found. ``rows`` were looked at, ``usable`` are handed on. ``repeated``: rows whose prompt came
    before, where rows are read for their prompts alone. ``equal``: pairs of two equal scores, where lists are read."""

    source: str
    format: str
    rows: int = 0
    usable: int = 0
    ties_kept: int = 0
    available: int = 0
    repeated: int = 0
    equal: int = 0
    bad: list[BadRow] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows were left out, by reason, most frequent first."""
        found = Counter(row.reason for row in self.bad)
        found.update({"repeated prompt": self.repeated, "equal scores": self.equal})
        return {reason: count for reason, count in found.most_common() if count}

    @property
    def flaws(self) -> list[BadRow]:
        """The left-out rows whose data are wrong, apart from those that a policy skips."""
        return [row for row in self.bad if row.reason in FLAWS]

    def summary(self) -> str:
        """``100 rows, 97 usable; left out: 2 tie, 1 missing image``."""
        out = ", ".join(f"{n} {reason}" for reason, n in self.counts.items())
        return f"{self.rows} rows, {self.usable} usable" + (f"; left out: {out}" if out else "")

    def table(self) -> list[tuple[str, int]]:
        """Name and count, as a person reads them."""
        head = [("rows", self.rows), ("usable", self.usable)]
        if self.ties_kept:
            head.append(("of these ties", self.ties_kept))
        return head + list(self.counts.items())

    def json(self) -> dict[str, Any]:
        """Plain data for a file."""
        return {
            "source": self.source,
            "format": self.format,
            "available": self.available,
            "rows": self.rows,
            "usable": self.usable,
            "ties_kept": self.ties_kept,
            "left_out": self.counts,
            "bad": [{"place": b.place, "reason": b.reason, "detail": b.detail} for b in self.bad],
        }


@dataclass
class PairSet:
    """Usable pairs and the account of the others."""

    rows: Sequence[PairRow]
    report: Report


@dataclass
class ImageSet:
    """Usable captioned pictures and the account of the others."""

    rows: Sequence[ImageRow]
    report: Report
