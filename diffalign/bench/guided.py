"""Guidance at half the calls: what distils it, beside the guided teacher and the base that is not guided.

``python -m diffalign.bench.guided JOB.json`` judges the base without guidance: as many calls as a student of these
takes, and the same noise. How near pictures are to the guided teacher's is their mean squared difference.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.files import write_atomic
from ..errors import RunError, UserError, one_line
from ..eval.rows import read_rows
from ..facts import FACTS, Facts, SamplingRecord
from . import judge as judging
from .judge import GUIDANCE, PRIMARY, STEPS, judge
from .method_job import Job, stay_with
from .method_keys import code_hash, job_key
from .student_jobs import short
from .student_table import earlier, failures
from .verdict import PROMPTS_ASKED, SEEDS_ASKED, Estimate, Row, Word, mean

if TYPE_CHECKING:
    from rich.console import Console

GROUP = dict.fromkeys(("agd", "lora_guidance"), "guidance")  # as many steps as the base, at half the forwards
LOST, NEARER = (
    0.05,
    0.5,
)  # of prompts all right that may be lost; the share of the unguided base's error that may be left
TITLE = "Guidance at half the calls: held-out prompts"
HEADS = ("method", "calls", "verdict", "all right", "over the teacher", "by seed", "error", "of the unguided's")
EXPLAINED = (
    f"The teacher is the base guided by {GUIDANCE:g}, two calls a step; unguided: the base at one. error: mean squared "
    "difference from the teacher's pictures of the same noise, RGB in [0, 1]; all right: share of held-out prompts, "
    f"intervals 95 % over prompts. Matches: no more than {100 * LOST:.0f} points are lost by the pooled interval, and "
    f"every seed leaves at most {100 * NEARER:.0f} % of the unguided base's error."
)


@dataclass(frozen=True)
class UnguidedJob(Job):
    """The base without guidance."""


@dataclass
class Line:
    """A row of the table. ``error`` and ``share`` are means over seeds, ``over`` is pooled."""

    name: str
    calls: int
    right: float
    over: Estimate | None = None
    by_seed: list[float] = field(default_factory=list)
    error: float | None = None
    shares: list[float] = field(default_factory=list)
    verdict: str = "reference"
    why: str = ""


def unguided_job(model: str, prompts: int | None, out: Path) -> UnguidedJob:
    """Judges the base at guidance 1."""
    key = short("unguided", job_key(None, 0, 0, prompts, model))
    name = f"unguided-0-{key}"
    return UnguidedJob(
        name="unguided",
        seed=0,
        key=key,
        code=code_hash(judging, sys.modules[__name__]),
        model=model,
        recipe=None,
        budget=0,
        prompts=prompts,
        folder=str(out / "runs" / name),
        result=str(out / "results" / f"{name}.json"),
        parent=os.getpid(),
    )


def run_unguided(job: Job) -> dict[str, Any]:
    """Draw and judge; the pictures stay in the job's folder."""
    began = time.perf_counter()
    folder = Path(job.folder)
    shutil.rmtree(folder, ignore_errors=True)
    model = unguided(job.model, folder / "model")
    judged = judge(str(model), folder, job.prompts)
    shutil.rmtree(model)
    head = {"name": job.name, "seed": job.seed, "key": job.key, "code": job.code, "judged": judged.json()}
    return {**head, "wall": round(time.perf_counter() - began, 2)}


def unguided(model: str, folder: Path) -> Path:
    """A copy of a base that records its own sampler without guidance; returns ``folder``."""
    from ..families import detect
    from ..recipe import ModelRecipe

    base, family = detect(ModelRecipe(path=model))
    shutil.copytree(base.path, folder)
    config = {name: value for name, value in base.scheduler.items() if name != "_class_name"}
    record = SamplingRecord(scheduler="DDIMScheduler", config=config, steps=STEPS, guidance=1.0)
    write_atomic(folder / FACTS, Facts(kind="pipeline", family=family, base=model, sampling=record).text().encode())
    return folder


def error(mine: Path, teacher: Path) -> float | None:
    """Mean squared difference of two folders' pictures, prompt by prompt, RGB in [0, 1]; None where they are gone."""
    from PIL import Image

    def pictures(folder: Path) -> dict[str, np.ndarray]:
        scores = folder / "scores.jsonl"
        rows = [row for row in read_rows(scores) if row.scorer == PRIMARY] if scores.is_file() else []
        files = {row.id: folder / row.image for row in rows if (folder / row.image).is_file()}
        return {name: np.asarray(Image.open(file).convert("RGB"), np.float64) / 255 for name, file in files.items()}

    ours, theirs = pictures(mine), pictures(teacher)
    both = ours.keys() & theirs.keys()
    if not both or len(both) < max(len(ours), len(theirs)):
        return None
    return float(np.mean([np.square(ours[name] - theirs[name]).mean() for name in sorted(both)]))


def decide(over: Estimate, shares: Sequence[float], seeds: int, prompts: int, compared: bool) -> tuple[str, str]:
    """(verdict, reason) by the rule that is said under the table. Open: too few seeds or prompts, pictures that are
    gone, or no unguided base to compare with (``compared``)."""
    against = []
    if over.low < -LOST:
        against.append(f"may lose {-100 * over.low:.1f} points of prompts all right")
    if shares and max(shares) > NEARER:
        against.append(f"a seed leaves {max(shares):.0%} of the unguided base's error")
    if against:
        return "does not match", "; ".join(against)
    if not compared:
        return "open", "the base without guidance was not judged, or its pictures or the teacher's are gone"
    if len(shares) < seeds:
        return "open", "pictures of some seeds are gone"
    for count, asked, what in ((seeds, SEEDS_ASKED, "seeds"), (prompts, PROMPTS_ASKED, "prompts")):
        if count < asked:
            return "open", f"{count} of {asked} {what}"
    return "matches", ""


@dataclass
class GuidedReport:
    """The teacher, the unguided base, and what distils guidance; empty where none of these was run."""

    lines: list[Line] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def json(self) -> list[dict[str, Any]]:
        """Plain data."""
        return [asdict(line) for line in self.lines]

    @property
    def notes(self) -> list[str]:
        """Why a row does not match, and what failed."""
        return [*(f"{line.name}: {line.verdict}: {line.why}" for line in self.lines if line.why), *self.troubles]

    def render(self, console: Console) -> None:
        """For a person."""
        from rich.table import Table

        if self.lines:
            table = Table(title=TITLE)
            for i, head in enumerate(HEADS):
                table.add_column(head, justify="left" if i in (0, 2) else "right")
            for line in self.lines:
                table.add_row(*cells(line))
            console.print(table)
        for note in self.notes:
            console.print(note, highlight=False, markup=False)

    def markdown(self) -> str:
        """The table; empty without rows."""
        if not self.lines:
            return ""
        rows = ["", f"## {TITLE}", "", "| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
        rows += ["| " + " | ".join(cells(line)) + " |" for line in self.lines]
        return "\n".join([*rows, "", EXPLAINED, "", *(f"* {note}" for note in self.notes)]) + "\n"

    def page(self) -> dict[str, Any]:
        """For the page; empty without rows."""
        if not self.lines:
            return {}
        lines = [(line, cells(line)) for line in self.lines]
        return {"title": TITLE, "heads": HEADS, "lines": lines, "explained": EXPLAINED, "notes": self.notes}


def cells(line: Line) -> list[str]:
    """The row as texts, in the order of ``HEADS``."""
    return [
        line.name,
        str(line.calls),
        line.verdict,
        f"{line.right:.3f}",
        line.over.text() if line.over else "",
        " ".join(f"{value:+.3f}" for value in line.by_seed),
        "" if line.error is None else f"{line.error:.5f}",
        f"{np.mean(line.shares):.0%}" if line.shares else "",
    ]


def guided_report(
    rows: Sequence[Row],
    jobs: Mapping[str, Sequence[Job]],
    plain: Job,
    read: Callable[[Job], dict[str, Any] | None],
    failed: Mapping[str, str],
) -> GuidedReport:
    """Of those among ``rows`` that distil guidance, with what is there; their verdicts go into ``rows`` as well.
    ``failed``: reasons by the job's key."""
    troubles = [f"{plain.name} failed: {failed[plain.key]}"] if plain.key in failed else []
    found = {row.name: [(job, r) for job in jobs[row.name] if (r := read(job))] for row in rows if row.method in GROUP}
    base = next(((job, r) for job in jobs["base"] if (r := read(job))), None)
    beside = read(plain)
    if base is None or not any(found.values()):
        return GuidedReport(troubles=troubles)
    ground = np.array(base[1]["judged"]["scores"][PRIMARY])
    held = Path(base[0].folder) / "held"
    lines = [Line("teacher", 2 * base[1]["judged"]["steps"], float(ground.mean()))]
    reference = None
    if beside is not None:
        right = np.array(beside["judged"]["scores"][PRIMARY])
        reference = error(Path(plain.folder) / "held", held)
        told = "" if beside["code"] == plain.code else "made by earlier code"
        line = Line("unguided", beside["judged"]["steps"], float(right.mean()), mean(right - ground), error=reference)
        lines.append(replace(line, why=told))
    for row in rows:
        if not found.get(row.name):
            continue
        gaps = [np.array(r["judged"]["scores"][PRIMARY]) - ground for _, r in found[row.name]]
        errors = [e for job, _ in found[row.name] if (e := error(Path(job.folder) / "held", held)) is not None]
        calls = found[row.name][0][1]["judged"]["steps"]
        line = Line(row.name, calls, float(ground.mean() + np.mean(gaps)), mean(np.mean(gaps, 0)))
        line.by_seed = [float(gap.mean()) for gap in gaps]
        line.error = float(np.mean(errors)) if errors else None
        line.shares = [e / reference for e in errors] if reference else []
        assert line.over is not None
        line.verdict, why = decide(line.over, line.shares, len(gaps), len(ground), reference is not None)
        old = earlier([result for _, result in found[row.name]], jobs[row.name])
        line.why = "; ".join(filter(None, (why, *failures(row), *old)))
        words: dict[str, Word] = {"matches": "learning", "does not match": "not learning", "open": "open"}
        row.verdict, row.why = words[line.verdict], line.why or "as the guided teacher, at half the calls"
        lines.append(line)
    return GuidedReport(lines, troubles)


def main(path: str) -> int:
    """Run the job of a file; one line on stderr and 1 where it fails."""
    job = UnguidedJob(**json.loads(Path(path).read_text(encoding="utf-8")))
    stay_with(job.parent)
    import torch

    torch.set_num_threads(1)
    try:
        found = run_unguided(job)
    except (UserError, RunError) as failure:
        print(f"diffalign: {one_line(str(failure))}", file=sys.stderr)
        return 1
    write_atomic(Path(job.result), json.dumps(found).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
