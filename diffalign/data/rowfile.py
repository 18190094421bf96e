"""The rows of a data set as a file beside the cache: the next start maps it instead of reading everything again.

``rows/NAME.arrow`` holds the rows, ``NAME.json`` says what they were read from and what the Arrow file must look like.
A file that is torn, altered, or of other data is never used: the rows are read again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import UserError
from ..recipe import DataRecipe
from .files import file_sha256, make_folder, remove_leftovers, replacing, write_atomic
from .images import ImageError
from .prompts import is_prompt_list, open_prompts, read_prompt_list
from .ranked import Lists, is_ranked, open_ranked
from .rated import open_rated
from .readers import PAIR_COLUMNS, open_images, open_pairs, row_folder, table_of
from .reading import settle
from .rowkinds import RankedRows, RatedRows, lists, lists_stream, rated, rated_stream
from .rows import FLAWS, BadRow, ImageRow, PairRow, RankedRow, Report, digest_of
from .rowtable import ImageRows, PairRows, PromptRows, Rows, Stream
from .scan import KEEP_FROM
from .table import Table

Progress = Callable[[int, int], None]
CODE = "3"  # raised whenever the same data would give other rows
# What does not decide which rows there are.
APART = {"resolution", "buckets", "crop", "flip", "caption_dropout", "cache", "cache_dir", "latents", "posterior"}
APART |= {"encode_batch", "reference_errors", "streaming", "scorer", "curriculum"}


def read_rows(recipe: DataRecipe, kind: str, progress: Progress | None = None) -> tuple[Rows | Stream, Report]:
    """Rows of the kind a method needs.

    ``pair``; ``image``: captioned pictures, or the chosen ones of pairs; ``rated``: pictures with a label, or the two
    of each pair; ``ranked``: lists with scores, or pairs as lists of two; ``prompt``: a list of prompts, or the
    different prompts of any rows.

    Where a file of an earlier reading still holds, it is mapped. With ``data.streaming`` the rows are a stream, and the
    report is complete when it has passed.

    Raises:
        UserError: as ``read_pairs``; a stream of ranked lists.
    """
    if kind == "prompt" and is_prompt_list(recipe.path):
        return read_prompt_list(recipe)
    table = table_of(recipe)
    stored = "pair" if kind in PARTS and PAIR_COLUMNS & set(table.columns) else kind
    if recipe.rewards and stored != "ranked":
        raise UserError("data.rewards names columns of ranked lists, and these rows are none; set it to []")
    if stored == "ranked" and recipe.streaming:
        raise UserError("ranked lists are read as a whole, and data.streaming is on; set data.streaming=false")
    found = None
    for form in dict.fromkeys([stored, kind] if recipe.streaming else [stored]):
        found = found or RowFile(recipe, _table_for(form, table), ROWS[form]).load()
    if found is None:
        openers: dict[str, Any] = {"pair": open_pairs, "image": open_images, "rated": open_rated, "ranked": open_ranked}
        reading = openers.get(stored, open_prompts)(recipe, progress, table)
        if recipe.streaming:
            rows = _empty(kind, recipe, table)
            if isinstance(rows, RatedRows):
                rows.of_pairs = stored != kind
            passing = PARTS[kind][1](reading.rows, recipe, reading.report) if stored != kind else reading.rows
            kept = RowFile(recipe, table, ROWS[kind])
            return Stream(passing, rows, lambda done: kept.save(done, reading.report)), reading.report
        whole = list(reading.rows) if stored == "ranked" else reading.rows
        rows = _empty(stored, recipe, table, max(len(row.pictures) for row in whole) if stored == "ranked" else 2)
        rows.extend(whole)
        RowFile(recipe, _table_for(stored, table), ROWS[stored]).save(rows, reading.report)
        found = rows, reading.report
    rows, report = found
    if isinstance(rows, PairRows) and kind in PARTS:
        rows = PARTS[kind][0](rows, recipe, report)
    if isinstance(rows, RatedRows):
        rows.of_pairs = stored != kind
    return rows, report


def _winners(rows: Iterator[PairRow], recipe: DataRecipe, report: Report) -> Iterator[ImageRow]:
    return (ImageRow(row.id, row.prompt, row.chosen, row.chosen_score) for row in rows)


def _lists(pairs: PairRows, recipe: DataRecipe, report: Report) -> RankedRows:
    """Pairs as lists; those of two equal scores are ties, and left out unless they are to be kept."""
    found = lists(pairs, recipe.ties == "keep")
    report.equal = len(pairs) - len(found)
    settle(report, report.usable - report.equal, recipe, "list")
    return found


def _lists_stream(rows: Iterator[PairRow], recipe: DataRecipe, report: Report) -> Iterator[RankedRow]:
    equal = 0
    for row in lists_stream(rows):
        if row.scores[0] == row.scores[1] and recipe.ties != "keep":
            equal += 1
        else:
            yield row
    report.equal = equal
    settle(report, report.usable - equal, recipe, "list")


ROWS: dict[str, type[Rows]] = {
    "pair": PairRows,
    "image": ImageRows,
    "rated": RatedRows,
    "ranked": RankedRows,
    "prompt": PromptRows,
}
# Kinds that pairs can be read as: what packed pairs become, and pairs that pass by.
Whole = Callable[[PairRows, DataRecipe, Report], Rows]
Passing = Callable[[Iterator[PairRow], DataRecipe, Report], Iterator[Any]]
PARTS: dict[str, tuple[Whole, Passing]] = {
    "image": (lambda pairs, *_: pairs.winners(), _winners),
    "rated": (lambda pairs, *_: rated(pairs), lambda rows, *_: rated_stream(rows)),
    "ranked": (_lists, _lists_stream),
}


def _table_for(kind: str, table: Table) -> Any:
    """What hands out the pictures of rows of a kind."""
    return Lists(table) if kind == "ranked" and is_ranked(table) else table


def _empty(kind: str, recipe: DataRecipe, table: Table, longest: int = 2) -> Rows:
    """Rows of a kind to be filled."""
    folder = row_folder(recipe)
    if kind == "ranked":
        return RankedRows(_table_for(kind, table), folder, longest, recipe.rewards if is_ranked(table) else ())
    return ROWS[kind](table, folder)


class RowFile:
    """Where the rows of a recipe's data lie, if they can be kept at all: the data must have a signature."""

    def __init__(self, recipe: DataRecipe, table: Table | Lists, kind: type[Rows]) -> None:
        self.table, self.kind, self.always = table, kind, recipe.streaming
        signature, folder = table.signature(), row_folder(recipe)
        settings = {k: v for k, v in recipe.model_dump(mode="json").items() if k not in APART}
        text = json.dumps([settings, str(Path(recipe.path).absolute()), kind.__name__, CODE], sort_keys=True)
        self.name = digest_of(text.encode())[:20]
        self.folder = folder if signature and folder is not None else None
        self.of = digest_of(text.encode(), signature.encode())

    @property
    def path(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.name}.arrow"

    def load(self) -> tuple[Rows, Report] | None:
        """The rows and their account; None when there is no file of this very data."""
        if self.folder is None or not self.path.is_file():
            return None
        try:
            note = json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8"))
            state = self.path.stat()
            if note["of"] != self.of or note["bytes"] != state.st_size:
                return None
            if note["changed"] != state.st_mtime_ns and note["sha256"] != file_sha256(self.path):
                return None
            rows = self.kind.mapped(self.path, self.table, note["present"])
            if note["pictures"] != self._pictures(rows):
                return None
            known = {field.name for field in fields(Report)}
            bad = [BadRow(b["place"], b["reason"], b["detail"], b["prompt"]) for b in note["report"].pop("bad")]
            return rows, Report(**{k: v for k, v in note["report"].items() if k in known}, bad=bad)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid, ImageError):
            return None

    def save(self, rows: Rows, report: Report) -> None:
        """Write the rows, unless they are few (reading again is as fast) or a mended picture could change them.

        Raises RunError when the disk is full."""
        if self.folder is None or (len(rows) < KEEP_FROM and not self.always):
            return
        pictures = self._pictures(rows)
        if pictures is None or (pictures and any(bad.reason in FLAWS for bad in report.bad)):
            return
        make_folder(self.folder)
        remove_leftovers(self.folder)
        with replacing(self.path) as file, pa.ipc.new_file(file, rows.schema) as writer:
            for batch in rows.batches():
                writer.write_batch(batch)
        account = {f.name: getattr(report, f.name) for f in fields(report) if f.name != "bad"}
        bad = [{k: v for k, v in asdict(b).items() if k != "images"} for b in _bare(report.bad)]
        state = self.path.stat()
        note = {
            "of": self.of,
            "bytes": state.st_size,
            "changed": state.st_mtime_ns,
            "sha256": file_sha256(self.path),
            "present": list(rows.present),
            "pictures": pictures,
            "report": {**account, "bad": bad},
        }
        write_atomic(self.path.with_suffix(".json"), json.dumps(note).encode())

    def _pictures(self, rows: Rows) -> str | None:
        """One hash of the state of all pictures that are files of their own; "" where the table holds them, None when
        they have no state that could be compared."""
        if not len(rows):
            return ""
        columns = {rows.at(0)[0].column(f"{side}_column")[0].as_py() for side in rows.sides}
        if all(column is not None and self.table.holds_bytes(column) for column in columns):
            return ""
        digest = hashlib.blake2b(digest_size=16)
        for batch in rows.batches():
            for side in rows.sides:
                places = zip(batch.column("row").to_pylist(), batch.column(f"{side}_column").to_pylist(), strict=True)
                for row, column in places:
                    stamp = "" if column is None else self.table.stamp(row, column)
                    if not stamp:
                        return None
                    digest.update(stamp.encode())
        return digest.hexdigest()


def _bare(bad: list[BadRow]) -> Iterator[BadRow]:
    """Without pictures, which cannot be written."""
    return (BadRow(b.place, b.reason, b.detail, b.prompt) for b in bad)
