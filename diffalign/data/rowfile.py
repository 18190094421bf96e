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

from ..recipe import DataRecipe
from .files import file_sha256, make_folder, remove_leftovers, replacing, write_atomic
from .images import ImageError
from .prompts import is_prompt_list, open_prompts, read_prompt_list
from .readers import open_images, open_pairs, row_folder, table_of
from .rows import FLAWS, BadRow, ImageRow, PairRow, Report, digest_of
from .rowtable import ImageRows, PairRows, PromptRows, Rows, Stream
from .scan import KEEP_FROM
from .table import Table

Progress = Callable[[int, int], None]
CODE = "1"  # raised whenever the same data would give other rows
PAIR_COLUMNS = {"chosen", "jpg_0", "chosen_file_name"}
# What does not decide which rows there are.
APART = {"resolution", "buckets", "crop", "flip", "caption_dropout", "cache", "cache_dir", "latents", "posterior"}
APART |= {"encode_batch", "reference_errors", "streaming", "scorer"}


def read_rows(recipe: DataRecipe, kind: str, progress: Progress | None = None) -> tuple[Rows | Stream, Report]:
    """Rows of the kind a method needs: ``pair``, ``image`` (captioned pictures, or the chosen ones of pairs), or
    ``prompt`` (a list of prompts, or the different prompts of any rows).

    Where a file of an earlier reading still holds, it is mapped. With ``data.streaming`` the rows are a stream, and the
    report is complete when it has passed.

    Raises:
        UserError: as ``read_pairs``.
    """
    if kind == "prompt" and is_prompt_list(recipe.path):
        return read_prompt_list(recipe)
    table = table_of(recipe)
    stored = "pair" if kind == "image" and PAIR_COLUMNS & set(table.columns) else kind
    packed, opened = {
        "pair": (PairRows, open_pairs),
        "image": (ImageRows, open_images),
        "prompt": (PromptRows, open_prompts),
    }[stored]
    kept = RowFile(recipe, table, packed)
    rows, report = kept.load() or (None, None)
    if rows is None or report is None:
        reading: Any = opened(recipe, progress, table)
        rows, report = packed(table, row_folder(recipe)), reading.report
        if recipe.streaming:
            passing = reading.rows
            if stored != kind:
                rows, passing = ImageRows(table, row_folder(recipe)), _winners(passing)
                kept = RowFile(recipe, table, ImageRows)
            return Stream(passing, rows, lambda done: kept.save(done, reading.report)), report
        rows.extend(reading.rows)
        kept.save(rows, report)
    return (rows.winners() if isinstance(rows, PairRows) and kind == "image" else rows), report


def _winners(rows: Iterator[PairRow]) -> Iterator[ImageRow]:
    return (ImageRow(row.id, row.prompt, row.chosen, row.chosen_score) for row in rows)


class RowFile:
    """Where the rows of a recipe's data lie, if they can be kept at all: the data must have a signature."""

    def __init__(self, recipe: DataRecipe, table: Table, kind: type[Rows]) -> None:
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
