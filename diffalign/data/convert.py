"""``diffalign pairs convert``: pairs, rated pictures and ranked lists of any format into any other that can hold them.

A piece is written at a time, and a conversion goes on where it stopped.

Everything is written beside the target, under a hidden name, and takes the target's name when it is whole. A note in it
says up to which row the files are durable; what lies beyond is written again.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from ..errors import RunError, UserError
from ..recipe import DataRecipe
from .encode import ahead
from .files import swap
from .filters import ENTRY, Filters, Names
from .images import ImageError, load_image, read_file
from .ranked import ListColumns, is_ranked
from .rated import RatedColumns
from .readers import PAIR_COLUMNS, PairColumns, table_of
from .reading import Columns, Draft, Progress, draft_or_flaw, settle
from .rows import BadRow, PairRow, Report
from .scan import Look, look_bytes, workers
from .table import Table
from .writers import WRITERS, Picture, Record, Writer, suffix_of

if TYPE_CHECKING:
    from rich.console import Console

# A piece that is durable at once: rows, or bytes of pictures, whichever is first.
PIECE_ROWS = 1000
PIECE_BYTES = 256 * 2**20
AHEAD = 64  # rows that are read and decoded before they are written
NOTE, KEYS, FLAWS, LOCK = ".progress.json", ".keys", ".skipped", ".lock"
SKIPPED, REPORT = "skipped.jsonl", "convert.json"
BAD_SHOWN = 10


@dataclass(frozen=True)
class ConvertOptions:
    """``resize``: pixels of the shorter side, never enlarged; ``quality`` of JPEG, 1 to 100; either one makes new
    files, else bytes are copied. ``link`` makes symbolic links to picture files instead of copies."""

    format: str
    resize: int | None = None
    quality: int | None = None
    link: bool = False

    def check(self) -> None:
        """Raises UserError for options that contradict each other."""
        if self.link and self.format not in ("folder", "jsonl", "csv"):
            raise UserError(f"--link makes links to picture files; {self.format} holds the pictures itself: use --copy")
        if self.link and (self.resize or self.quality):
            raise UserError("--link keeps the files as they are; leave out --resize and --quality, or use --copy")

    def picture(self, data: bytes, file: Path | None, recipe: DataRecipe) -> Picture:
        """The picture as it will be written."""
        if self.resize is None and self.quality is None:
            return Picture(data, suffix_of(data), file if self.link else None)
        image, suffix = load_image(data, recipe.alpha), suffix_of(data)
        side = min(image.size)
        if self.resize is not None and side > self.resize:
            width, height = (max(self.resize, round(n * self.resize / side)) for n in image.size)
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        elif self.quality is None:
            return Picture(data, suffix)  # small enough: as it is
        buffer = io.BytesIO()
        if suffix == "png" and self.quality is None:
            image.save(buffer, "PNG")
            return Picture(buffer.getvalue(), "png")
        image.save(buffer, "JPEG", quality=self.quality or 95, subsampling=0)
        return Picture(buffer.getvalue(), "jpg")


class Change(Protocol):
    """What a command does to each row on its way. ``settings`` say what the new values depend on; ``fields`` are the
    plain columns that rows have besides the source's; ``keeps`` the source's columns that ``apply`` wants to see."""

    settings: Mapping[str, Any]
    fields: tuple[str, ...]
    keeps: tuple[str, ...]

    def apply(self, row: PairRow, source: Mapping[str, Any]) -> tuple[PairRow, dict[str, Any]]:
        """The row as it is written, and values of columns that no row has. ``source``: values of ``keeps``, and
        ``turned``: whether the source named the loser first."""

    def counts(self) -> dict[str, int]:
        """What was done, for the account."""


@dataclass
class Converted:
    """What was written: the account of the source's rows, ``what`` they are, and where they went; ``made``: counts of a
    `Change`."""

    report: Report
    target: Path
    format: str
    gone_on_from: int = 0
    made: dict[str, int] = field(default_factory=dict)
    what: str = "pair"

    def json(self) -> dict[str, Any]:
        """Plain data for a file."""
        made = {"made": self.made} if self.made else {}
        return {"target": str(self.target), "format": self.format, **self.report.json(), **made}

    def render(self, console: Console) -> None:
        """The account for a terminal."""
        if self.gone_on_from:
            console.print(f"went on from row {self.gone_on_from:,}", markup=False)
        console.print(
            f"{self.report.usable:,} {self.what}s -> {self.target} ({self.format})", markup=False, soft_wrap=True
        )
        console.print(self.report.summary(), markup=False, soft_wrap=True)
        if self.made:
            console.print(", ".join(f"{n:,} {what}" for what, n in self.made.items()), markup=False, soft_wrap=True)
        for bad in self.report.bad[:BAD_SHOWN]:
            console.print(f"left out  {bad}", markup=False, soft_wrap=True)
        if len(self.report.bad) > BAD_SHOWN:
            more = len(self.report.bad) - BAD_SHOWN
            console.print(f"... and {more:,} more, all in {self.target / SKIPPED}", markup=False, soft_wrap=True)


def convert_pairs(
    recipe: DataRecipe,
    target: Path,
    options: ConvertOptions,
    progress: Progress | None = None,
    change: Change | None = None,
    table: Table | None = None,
) -> Converted:
    """Write the rows of ``recipe.path`` to the folder ``target``: pairs, which ``change`` may change on their way,
    rated pictures, or ranked lists with the further scores that ``recipe.rewards`` names. ``table``: the table of that
    path with other values in some columns.

    Pictures are decoded once, to leave out what is no picture, and their bytes copied as they are. Ids are kept where
    the rows have their own; ties are kept as ties unless ``recipe.ties`` says otherwise. A conversion that was killed
    goes on; one that is done already is reported again.

    Raises:
        UserError: as ``read_pairs``; the target exists, cannot be written, or its format holds no such rows. RunError:
            the disk is full.
    """
    work = open_work(recipe, target, options, change, table)
    try:
        return work.run(progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(
                f"disk full: no room for more of '{target}'; {work.saved:,} rows are kept: free some space and start "
                "the same command again"
            ) from error
        raise UserError(f"'{target}' cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        work.close()


def open_work(
    recipe: DataRecipe,
    target: Path,
    options: ConvertOptions,
    change: Change | None = None,
    table: Table | None = None,
) -> Work:
    """A conversion that has not begun. Raises UserError as ``convert_pairs``."""
    options.check()
    table = table or table_of(recipe)
    columns = columns_of(table, recipe) if change is None else PairColumns.of(table)
    if recipe.rewards and columns.kind != "ranked":
        raise UserError("data.rewards names columns of ranked lists, and these rows are none; set it to []")
    if columns.kind not in WRITERS[options.format].kinds:
        forms = ", ".join(name for name, writer in WRITERS.items() if columns.kind in writer.kinds)
        raise UserError(
            f"'{table.label}' holds {columns.what}s, and {options.format} has no place for them; take {forms}"
        )
    work = Work(table, columns, recipe, target, options, change)
    if options.format == "pickapic" and "rejected_prompt" in work.fields():
        raise UserError("Pick-a-Pic's columns have no place for 'rejected_prompt'; convert to another format")
    return work


def columns_of(table: Table, recipe: DataRecipe) -> Columns[Any]:
    """What the rows of a table are. Raises UserError for one that has neither pairs, lists nor rated pictures."""
    has = set(table.columns)
    if is_ranked(table) and not has & PAIR_COLUMNS:
        return ListColumns(table, recipe.rewards)
    if has & {"image", "file_name"} and has & {"label", "split"} and not has & PAIR_COLUMNS:
        return RatedColumns(table)
    return PairColumns.of(table)


@dataclass
class Work:
    """One conversion: the source, the hidden folder and what is durable in it."""

    table: Table
    columns: Columns[Any]
    recipe: DataRecipe
    target: Path
    options: ConvertOptions
    change: Change | None = None
    next: int = 0
    kept: int = 0
    saved: int = 0
    lock: int | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(workers(), "convert"))

    def __post_init__(self) -> None:
        self.partial = self.target.absolute().parent / f".{self.target.name}.partial"
        self.report = Report(self.table.label, self.table.format)
        self.filters, self.names = Filters(self.recipe, journal=True), Names()
        facts = {
            "source": self.table.label,
            "state": self.table.signature(),
            "options": vars(self.options),
            "recipe": self.recipe.model_dump(mode="json", exclude={"cache", "cache_dir", "encode_batch"}),
        }
        if self.change is not None:
            facts["change"] = dict(self.change.settings)
        self.settings = json.loads(json.dumps(facts))

    def fields(self) -> list[str]:
        """The plain columns that are written besides id and prompt."""
        perturbed = self.recipe.perturb and self.columns.kind == "pair"
        more = [*(["rejected_prompt"] if perturbed else []), *(self.change.fields if self.change else ())]
        return list(dict.fromkeys([*self.columns.fields(), *more]))

    def run(self, progress: Progress | None) -> Converted:
        done = self.done()
        if done is not None:
            return done
        self.partial.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        writer = self._start()
        began = self.next
        self.report.bad[:0] = self.table.bad
        for _ in self._pieces(writer):
            if progress is not None:
                progress(self.next, self.table.total or 0)
        self.report.rows = self.next + len(self.table.bad)
        self.report.available = (self.table.total or self.next) + len(self.table.bad)
        if not self.kept or (self.recipe.strict and self.report.flaws):
            shutil.rmtree(self.partial)
            settle(self.report, self.kept, self.recipe, self.columns.what)
        self.report.usable = self.kept
        writer.finish()
        made = self.change.counts() if self.change is not None else {}
        result = Converted(self.report, self.target, self.options.format, began, made, self.columns.what)
        note = {"settings": self.settings, **result.json()}
        if self.report.bad:
            swap(self.partial / SKIPPED, _lines(self.report.bad))
        swap(self.partial / REPORT, (json.dumps(note, indent=1) + "\n").encode())
        os.replace(self.partial, self.target)
        self._tidy()
        return result

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        if self.lock is not None:
            os.close(self.lock)

    def done(self) -> Converted | None:
        """An earlier conversion that is whole. Raises UserError when something else lies at the target."""
        if not self.target.exists() or (self.target.is_dir() and not any(self.target.iterdir())):
            return None
        try:
            note = json.loads((self.target / REPORT).read_text(encoding="utf-8"))
            if note["settings"] != self.settings:
                raise ValueError("another conversion")
            counts = {name: note[name] for name in ("rows", "usable", "available", "ties_kept")}
            bad = [BadRow(row["place"], row["reason"], row["detail"]) for row in note["bad"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{self.target}' exists already; delete it, or name another place") from error
        self._tidy()
        report = Report(note["source"], self.report.format, **counts, bad=bad)
        return Converted(report, self.target, self.options.format, 0, note.get("made", {}), self.columns.what)

    def _tidy(self) -> None:
        for name in (NOTE, KEYS, FLAWS, LOCK):
            (self.target / name).unlink(missing_ok=True)

    def _take_lock(self) -> None:
        self.lock = os.open(self.partial / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing '{self.target}' now; wait for it") from error

    def _start(self) -> Writer:
        """The writer, where an earlier process stopped, or in an empty folder."""
        state: dict[str, Any] = {}
        try:
            note = json.loads((self.partial / NOTE).read_text(encoding="utf-8"))
            if note["settings"] != self.settings:
                raise ValueError("another conversion")
            journal = (self.partial / KEYS).read_bytes()[: note["kept"] * ENTRY.size]
            if len(journal) != note["kept"] * ENTRY.size:
                raise ValueError("a part is missing")
            skipped = (self.partial / FLAWS).read_bytes()[: note["skipped"]].splitlines()
            bad, ties = [BadRow(**json.loads(line)) for line in skipped], int(note["ties"])
        except (OSError, ValueError, KeyError, TypeError):
            for path in self.partial.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            (self.partial / KEYS).touch()
            (self.partial / FLAWS).touch()
        else:
            self.next, self.kept, state = note["next"], note["kept"], note["writer"]
            self.saved, self.report.ties_kept = self.kept, ties
            self.report.bad = bad
            self.filters.restore(journal)
            for name, size in ((KEYS, len(journal)), (FLAWS, note["skipped"])):
                os.truncate(self.partial / name, size)
        return WRITERS[self.options.format](self.partial, self.columns.kind, self.fields(), state)

    def _pieces(self, writer: Writer) -> Iterator[None]:
        """Write rows; a turn for each piece that is durable."""
        ahead_by = min(AHEAD, self.table.together)
        limit, size, rows, skipped = self.recipe.max_pairs, 0, 0, len(self.report.bad)
        if limit is not None and self.kept >= limit:
            return
        for i, found in enumerate(ahead(self._read, self._places(), self.pool, ahead_by), self.next):
            made = found if isinstance(found, BadRow) else self._make(*found)
            if isinstance(made, BadRow):
                self.report.bad.append(made)
            else:
                writer.add(made)
                self.kept += 1
                size += made.size
            rows += 1
            full = self.kept == limit
            if rows == PIECE_ROWS or size >= PIECE_BYTES or full or (self.recipe.strict and self.report.flaws):
                self._commit(writer, i + 1, skipped)
                size, rows, skipped = 0, 0, len(self.report.bad)
                yield
                if full or (self.recipe.strict and self.report.flaws):
                    return
        if rows:
            self._commit(writer, self.next + rows, skipped)
            yield

    def _places(self) -> Iterator[int]:
        i = self.next
        while self.table.exists(i):
            yield i
            i += 1

    def _read(self, i: int) -> tuple[Draft, list[Look], list[Picture], dict[str, Any]] | BadRow:
        """Bytes and looks of a row. Runs in threads."""
        draft = draft_or_flaw(self.table, i, self.columns.draft)
        if isinstance(draft, BadRow):
            return draft
        looks, pictures = [], []
        try:
            for ref in draft.refs:
                found = ref.locate()
                file = found if isinstance(found, Path) else None
                data = read_file(found) if isinstance(found, Path) else found
                look = look_bytes(data, ref.name, self.recipe.alpha)
                if look.error:
                    return draft.bad(look.reason, look.error)
                looks.append(look)
                pictures.append(self.options.picture(data, file, self.recipe))
        except ImageError as error:
            return draft.bad(error.reason, str(error))
        return draft, looks, pictures, self._others(i)

    def _others(self, i: int) -> dict[str, Any]:
        """The source's own columns that a change wants to see, or that Pick-a-Pic has besides."""
        if self.change is not None:
            return {name: self.table.value(i, name) for name in self.change.keeps if name in self.table.columns}
        if self.options.format != "pickapic" or not (isinstance(self.columns, PairColumns) and self.columns.pick):
            return {}
        return {name: self.table.value(i, name) for name in self.table.columns if not self.table.holds_bytes(name)}

    def _make(
        self, draft: Draft, looks: list[Look], pictures: list[Picture], others: dict[str, Any]
    ) -> Record | BadRow:
        row = self.columns.make(draft, looks, self.recipe, self.filters, self.names)
        if isinstance(row, BadRow):
            return row
        self.report.ties_kept += self.columns.ties(row)
        places = [ref.name for ref in draft.refs]
        order = [places.index(ref.name) for ref in row.images.values()]
        turned = order[0] > 0
        named = {name: pictures[place] for name, place in zip(row.images, order, strict=True)}
        if self.change is not None:
            row, others = self.change.apply(row, {**others, "turned": turned})
        return Record(self.kept, draft.id or None, row, named, turned, others)

    def _commit(self, writer: Writer, upto: int, skipped: int) -> None:
        """Everything up to source row ``upto`` is on the disk."""
        state = writer.commit()
        _append(self.partial / FLAWS, _lines(self.report.bad[skipped:]))
        assert self.filters.journal is not None
        _append(self.partial / KEYS, bytes(self.filters.journal))
        self.filters.journal.clear()
        self.next = upto
        note = {
            "settings": self.settings,
            "next": upto,
            "kept": self.kept,
            "ties": self.report.ties_kept,
            "skipped": (self.partial / FLAWS).stat().st_size,
            "writer": state,
        }
        swap(self.partial / NOTE, json.dumps(note).encode())
        self.saved = self.kept


def _lines(rows: list[BadRow]) -> bytes:
    facts = [{"place": bad.place, "reason": bad.reason, "detail": bad.detail} for bad in rows]
    return "".join(json.dumps(fact) + "\n" for fact in facts).encode()


def _append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
