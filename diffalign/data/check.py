"""``diffalign pairs check``: counts, sizes, prompts, score gaps and a picture sheet of a set of pairs."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..recipe import DataRecipe
from .readers import read_pairs
from .rows import PairRow, Report
from .sheet import picture_sheet

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import CLIPTokenizer

# Width : height, and its name.
RATIOS = {"1:2": 0.5, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 0.75, "1:1": 1.0, "4:3": 4 / 3, "3:2": 1.5, "16:9": 16 / 9}
RATIOS["2:1"] = 2.0
SIZES_SHOWN = 10
BAD_SHOWN = 20


@dataclass
class CheckReport:
    """What is known about a set of pairs. Pictures are counted once per pair and side."""

    report: Report
    sizes: dict[str, int]
    ratios: dict[str, int]
    resolution: int
    smaller: int
    prompts: int
    repeated_prompts: int
    most_repeated: tuple[str, int]
    cut_prompts: list[tuple[str, int]] | None
    gaps: dict[str, float] = field(default_factory=dict)
    folder: Path | None = None

    def json(self) -> dict[str, Any]:
        """Plain data for ``report.json``."""
        return {
            **self.report.json(),
            "sizes": self.sizes,
            "aspect_ratios": self.ratios,
            "resolution": self.resolution,
            "smaller_than_resolution": self.smaller,
            "prompts": self.prompts,
            "repeated_prompts": self.repeated_prompts,
            "most_repeated_prompt": {"prompt": self.most_repeated[0], "pairs": self.most_repeated[1]},
            "cut_prompts": self.cut_prompts and [{"prompt": p, "tokens_lost": n} for p, n in self.cut_prompts],
            "score_gaps": self.gaps,
        }

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of everything but the tables."""
        side = self.resolution
        facts = [(name, f"{count:,}") for name, count in self.report.table()]
        if self.report.rows < self.report.available:
            facts.insert(1, ("not looked at (data.max_pairs)", f"{self.report.available - self.report.rows:,}"))
        facts.append(("different prompts", f"{self.prompts:,}"))
        if self.repeated_prompts:
            facts.append(
                ("prompts of several pairs", f"{self.repeated_prompts:,} (up to {self.most_repeated[1]:,} pairs)")
            )
        if self.cut_prompts is None:
            facts.append(("prompts too long for the encoder", "not checked: name the model"))
        else:
            lost = f" (up to {self.cut_prompts[0][1]} tokens lost)" if self.cut_prompts else ""
            facts.append(("prompts too long for the encoder", f"{len(self.cut_prompts):,}{lost}"))
        facts.append((f"pictures with a side below {side} px (they are enlarged)", f"{self.smaller:,}"))
        if self.gaps:
            facts.append(
                (
                    "score of chosen minus rejected",
                    f"median {self.gaps['median']:.4g}, from {self.gaps['min']:.4g} to {self.gaps['max']:.4g}",
                )
            )
            facts.append(
                ("chosen scored lower or equal", f"{int(self.gaps['not_positive']):,} of {int(self.gaps['pairs']):,}")
            )
        return facts

    def size_table(self) -> list[tuple[str, int]]:
        """The most frequent sizes, and one line for the others."""
        top = list(self.sizes.items())[:SIZES_SHOWN]
        rest = len(self.sizes) - len(top)
        return [*top, (f"{rest} other sizes", sum(self.sizes.values()) - sum(n for _, n in top))] if rest else top

    def text(self) -> str:
        """The whole report as plain lines."""
        lines = [f"{self.report.source} ({self.report.format})", ""]
        lines += [f"{name:<58} {value}" for name, value in self.facts()]
        lines += ["", "size (width x height) of the pictures in use"] + [
            f"  {n:<56} {c:,}" for n, c in self.size_table()
        ]
        lines += ["", "nearest aspect ratio"] + [f"  {n:<56} {c:,}" for n, c in self.ratios.items()]
        for title, rows in (("left out", [str(bad) for bad in self.report.bad]), ("cut prompts", self._cut_lines())):
            if rows:
                lines += ["", title, *(f"  {row}" for row in rows)]
        return "\n".join(lines) + "\n"

    def render(self, console: Console) -> None:
        """The report for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=escape(f"{self.report.source} ({self.report.format})"), show_header=False, title_justify="left"
        )
        for name, value in self.facts():
            table.add_row(escape(name), escape(value))
        console.print(table)
        sizes = Table("size", "pictures", "aspect ratio", "pictures")
        left, right = self.size_table(), list(self.ratios.items())
        for i in range(max(len(left), len(right))):
            a = (left[i][0], f"{left[i][1]:,}") if i < len(left) else ("", "")
            b = (right[i][0], f"{right[i][1]:,}") if i < len(right) else ("", "")
            sizes.add_row(*a, *b)
        console.print(sizes)
        for bad in self.report.bad[:BAD_SHOWN]:
            console.print(f"left out  {bad}", markup=False, highlight=False, soft_wrap=True)
        if len(self.report.bad) > BAD_SHOWN:
            console.print(f"... and {len(self.report.bad) - BAD_SHOWN:,} more rows, all in report.txt", markup=False)
        if self.folder is not None:
            console.print(f"written: {self.folder}/report.txt, report.json, sheet.png", markup=False, soft_wrap=True)

    def _cut_lines(self) -> list[str]:
        return [f"{n} tokens lost: {prompt}" for prompt, n in self.cut_prompts or []]


def check_pairs(
    recipe: DataRecipe,
    out: Path | None = None,
    model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read all pairs as training would, and say what is there.

    Args:
        out: folder for ``report.json``, ``report.txt`` and ``sheet.png``; None writes nothing.
        model: folder, built-in name or hub id of the model whose tokenizer measures the prompts.

    Raises:
        UserError: as :func:`read_pairs`; ``out`` cannot be written.
    """
    tokenizer = None if model is None else _tokenizer(model)  # first: a wrong name should not cost the whole scan
    found = read_pairs(recipe, progress)
    rows = found.rows
    sizes = [ref.size for row in rows for ref in row.images.values() if ref.size is not None]
    side = recipe.resolution or 512
    prompts = Counter(text for row in rows for text in row.prompts.values())
    pairs_of = Counter(row.prompt for row in rows)
    report = CheckReport(
        found.report,
        {f"{w}x{h}": n for (w, h), n in Counter(sizes).most_common()},
        _by_ratio(sizes),
        side,
        sum(min(size) < side for size in sizes),
        len(prompts),
        sum(n > 1 for n in pairs_of.values()),
        pairs_of.most_common(1)[0],
        None if tokenizer is None else _cut_prompts(list(prompts), tokenizer),
        _score_gaps(rows),
        out,
    )
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "report.json").write_text(json.dumps(report.json(), indent=2, ensure_ascii=False), encoding="utf-8")
            (out / "report.txt").write_text(report.text(), encoding="utf-8")
            picture_sheet(rows, found.report.bad, recipe.alpha).save(out / "sheet.png")
        except OSError as error:
            raise UserError(f"'{out}' is not writable ({error.strerror}); choose another folder with --out") from error
    return report


def _by_ratio(sizes: Sequence[tuple[int, int]]) -> dict[str, int]:
    """How many pictures are nearest to each usual ratio, narrow to wide."""
    counts = Counter(min(RATIOS, key=lambda name: abs(math.log(RATIOS[name] * h / w))) for w, h in sizes)
    return {name: counts[name] for name in RATIOS if counts[name]}


def _score_gaps(rows: Sequence[PairRow]) -> dict[str, float]:
    gaps = [
        row.chosen_score - row.rejected_score
        for row in rows
        if row.chosen_score is not None and row.rejected_score is not None
    ]
    if not gaps:
        return {}
    return {
        "pairs": float(len(gaps)),
        "min": min(gaps),
        "median": statistics.median(gaps),
        "mean": statistics.fmean(gaps),
        "max": max(gaps),
        "not_positive": float(sum(gap <= 0 for gap in gaps)),
    }


def _tokenizer(model: str) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    from ..families import open_folder

    place = open_folder(model).path / "tokenizer"
    try:
        if place.is_dir():
            return CLIPTokenizer.from_pretrained(str(place), local_files_only=True)
        return CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"model '{model}': tokenizer cannot be loaded: {' '.join(str(error).split())[:160]}") from error


def _cut_prompts(prompts: list[str], tokenizer: CLIPTokenizer) -> list[tuple[str, int]]:
    """Prompts that the text encoder cuts, with the number of tokens lost, worst first."""
    ids = tokenizer(prompts, padding=False, truncation=False, verbose=False)["input_ids"]
    lost = [(text, len(row) - tokenizer.model_max_length) for text, row in zip(prompts, ids, strict=True)]
    return sorted(((text, n) for text, n in lost if n > 0), key=lambda pair: -pair[1])
