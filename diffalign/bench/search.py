"""``diffalign bench search``: searches at equal U-Net calls on prompts that are fixed beforehand, beside best-of-N.

Every search and budget is a cell: one picture a prompt, scored by the reward that was searched for, and by a judge that
was not. A cell's results lie in a file named by a hash of its settings, a line a prompt; what is there is not done
again. Prompts are searched in fixed groups, so that a run that goes on computes what the first would have.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.files import write_atomic
from ..errors import Interrupted, UserError, one_line
from ..eval.prompts import Prompt, prompts_sha256, read_prompts, set_name
from ..pipelines.searches.options import Beam, Greedy, SearchOptions, parse_search
from .search_report import Cell, SearchReport, page, picture_name

SEARCHES = ("best-of-n", "greedy", "beam", "tree")
TOGETHER = 25  # prompts that are searched at once


@dataclass(frozen=True)
class Plan:
    """What a command is about. ``searches``: the first is what the others are compared with. A beam or greedy search
    without settings gets the width that fills each budget by one pass."""

    out: Path
    model: str = "tiny-sd"
    reward: str = "tiny-pickscore"
    judge: str = "oracle"
    prompts: str = "tiny-heldout"
    limit: int | None = None
    budgets: tuple[int, ...] = (80, 160, 320)
    searches: tuple[str, ...] = SEARCHES
    steps: int = 10
    guidance: float = 3.0
    seed: int = 0
    batch: int = 32
    device: str = "auto"
    dtype: str = "auto"
    say: Callable[[str], None] = field(default=lambda text: None)

    def settings(self) -> dict[str, Any]:
        """What decides the results."""
        names = ("model", "reward", "judge", "steps", "guidance", "seed")
        return {name: getattr(self, name) for name in names}


def measure_search(plan: Plan) -> SearchReport:
    """Run what is missing, then write ``results.json``, ``table.md`` and ``report.html`` into the folder.

    Raises:
        UserError: what does not fit together, a folder that cannot be written.
        Interrupted: by Ctrl-C; finished groups stay.
    """
    for name, values in (("--budget", plan.budgets), ("--limit", [plan.limit or 1]), ("--steps", [plan.steps])):
        if not values or min(values) < 1:
            raise UserError(f"{name} {', '.join(map(str, values)) or 'without a number'} is too few; give 1 or more")
    if plan.reward.partition("=")[0] == plan.judge.partition("=")[0]:
        raise UserError(f"'{plan.judge}' cannot be reward and judge at once; take another --reward")
    searches = [parse_search(text) for text in plan.searches]
    prompts = read_prompts(plan.prompts)[: plan.limit]
    try:
        (plan.out / "results").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to '{plan.out}' ({error.strerror}); choose another --out") from error
    calls = len(prompts) * len(searches) * sum(plan.budgets)
    plan.say(f"{len(prompts)} prompts, {len(searches)} searches: at most {calls:,} U-Net calls")
    bench = Bench(plan, prompts)
    cells = []
    for budget in plan.budgets:
        for text, how in zip(plan.searches, searches, strict=True):
            fitted = how if ":" in text else bench.fitted(how, budget)
            rows = bench.run(text, fitted, budget)
            cells.append(Cell(text, fitted.text(), budget, [rows[p.id] for p in prompts]))
    settings = {**plan.settings(), "prompts": set_name(plan.prompts), "sha256": prompts_sha256(prompts)}
    report = SearchReport({**settings, "count": len(prompts)}, plan.searches[0], cells)
    last = [cell for cell in cells if cell.budget == plan.budgets[-1]]
    report.pictures = {cell.text: bench.folder(cell.fitted, cell.budget) for cell in last}
    write_atomic(plan.out / "results.json", (json.dumps(report.json(), indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(plan.out / "table.md", report.markdown().encode())
    write_atomic(plan.out / "report.html", page(report).encode())
    return report


class Bench:
    """The opened model and scorers, and the results that are there."""

    def __init__(self, plan: Plan, prompts: Sequence[Prompt]) -> None:
        from ..eval.scorers import load_scorer
        from ..families.device import pick_device, pick_dtype
        from ..pipelines.loading import open_pipeline

        self.plan, self.prompts = plan, list(prompts)
        device = pick_device(plan.device)
        opened = open_pipeline(plan.model, None, 1.0, "ddim", device, pick_dtype(plan.dtype, device))
        self.pipe: Any = opened.pipeline
        self.reward, self.judge = (load_scorer(name, None, device.type) for name in (plan.reward, plan.judge))
        self.judge.check_prompts([p.prompt for p in prompts])
        self.known = {**plan.settings(), **opened.hashes, "prompts": plan.prompts, "scorer": self.reward.fingerprint_id}

    def world(self, how: SearchOptions, prompts: Sequence[Prompt]) -> Any:
        """Some prompts as a search sees them."""
        from ..pipelines.sample import TextCache
        from ..pipelines.searches.diffusion import DiffusionWorld

        texts, guidance = [p.prompt for p in prompts], self.plan.guidance
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        return DiffusionWorld(
            self.pipe,
            texts,
            [(self.plan.seed, p.id) for p in prompts],
            TextCache(self.pipe, texts, None, guidance > 1).rows(range(len(texts))),
            self.reward,
            size=(side, side),
            steps=self.plan.steps,
            guidance=guidance,
            eta=how.eta,
        )

    def fitted(self, how: SearchOptions, budget: int) -> SearchOptions:
        """With the width that fills the budget by one pass, where it has one: children of a greedy search, beams of two
        children each."""
        from ..pipelines.searches.run import least_calls

        world, width = self.world(how, self.prompts[:1]), 1
        if not isinstance(how, Beam | Greedy):
            return how

        def wide(count: int) -> SearchOptions:
            return Greedy(children=count) if isinstance(how, Greedy) else Beam(beams=count, children=2)

        while least_calls(world, wide(width + 1)) <= budget:
            width += 1
        return wide(width)

    def folder(self, fitted: str, budget: int) -> Path:
        """Of a cell's pictures."""
        key = hashlib.sha256(json.dumps([fitted, budget, self.known], sort_keys=True).encode()).hexdigest()[:12]
        name = fitted.replace(":", "-").replace("=", "").replace(",", "-")
        return self.plan.out / "results" / f"{name}-{budget}-{key}"

    def run(self, text: str, how: SearchOptions, budget: int) -> dict[str, dict[str, Any]]:
        """Results of a cell by prompt: those that are there, and the missing groups.

        Raises Interrupted by Ctrl-C."""
        folder = self.folder(how.text(), budget)
        file = folder.with_suffix(".jsonl")
        rows = read_rows(file)
        groups = [self.prompts[i : i + TOGETHER] for i in range(0, len(self.prompts), TOGETHER)]
        for number, group in enumerate(groups):
            if all(p.id in rows for p in group):
                continue
            began = time.process_time()
            rows |= {row["id"]: row for row in self.group(how, budget, group, folder)}
            write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows.values()).encode())
            spent = time.process_time() - began
            self.plan.say(f"{how.text()}, {budget} calls: group {number + 1} of {len(groups)}, {spent:.0f} CPU s")
        return rows

    def group(self, how: SearchOptions, budget: int, group: Sequence[Prompt], folder: Path) -> list[dict[str, Any]]:
        """Searches some prompts together; their pictures go into ``folder``."""
        from ..pipelines.searches.run import search

        began = time.process_time()
        found = search(self.world(how, group), how, budget, self.plan.batch)
        if any(one.interrupted for one in found):
            raise Interrupted(f"stopped; what is done stays in '{self.plan.out}', the same command goes on")
        spent = (time.process_time() - began) / len(group)
        judged = self.judge([one.picture for one in found], [p.prompt for p in group]).tolist()
        folder.mkdir(parents=True, exist_ok=True)
        for prompt, one in zip(group, found, strict=True):
            one.picture.save(folder / picture_name(prompt.id))
        return [
            {"id": prompt.id, "prompt": prompt.prompt, **one.json(), "judge": value, "seconds": round(spent, 4)}
            for prompt, one, value in zip(group, found, judged, strict=True)
        ]


def read_rows(file: Path) -> dict[str, dict[str, Any]]:
    """A cell's lines by prompt. Raises UserError where one is damaged."""
    if not file.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {row["id"]: row for row in rows if row["reward"] is not None}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' is damaged ({one_line(str(error))}); delete it and run again") from error
