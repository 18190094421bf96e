"""One row and seed of ``diffalign bench methods``: a process of its own that trains at the budget, samples and judges.

``python -m diffalign.bench.method_job JOB.json``: the result is written whole, at the end; before that there is none.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.files import write_atomic
from ..errors import RunError, UserError, one_line

PROBED = 3  # steps that tell what a step costs


@dataclass(frozen=True)
class Job:
    """``recipe`` is a recipe's plain data, None for the base itself, which is judged as it is. ``folder`` is this job's
    own; it is emptied first. ``parent``: the process that waits for this one."""

    name: str
    seed: int
    key: str
    code: str
    model: str
    recipe: dict[str, Any] | None
    budget: int
    prompts: int | None
    folder: str
    result: str
    parent: int


def run_job(job: Job) -> dict[str, Any]:
    """Train, sample and judge. The pictures stay in the job's folder, and so do log, report and the trained weights."""
    began = time.perf_counter()
    from .judge import judge

    folder = Path(job.folder)
    shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = {"name": job.name, "seed": job.seed, "key": job.key, "code": job.code, "budget": job.budget}
    model = job.model
    if job.recipe is not None:
        found |= train(job, folder)
        model = str(folder / "run")
    judged = judge(model, folder, job.prompts)
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    found |= {"judged": judged.json(), "wall": round(time.perf_counter() - began, 2)}
    return found


def train(job: Job, folder: Path) -> dict[str, Any]:
    """The recipe with as many steps as the budget pays for, held-out looks off; into ``folder``/run."""
    from ..pipelines import sample  # noqa: F401 - what the run imports later shall not count as its memory
    from ..recipe import load_recipe
    from ..run import Session, train
    from .probes import clear_peak
    from .units import Spent

    recipe = load_recipe(_recipe(job))
    recipe.name, recipe.train.seed, recipe.train.device = job.name, job.seed, "cpu"
    recipe.data.cache_dir = str(folder / "cache")
    recipe.output.dir, recipe.output.trackers, recipe.output.merged = str(folder / "run"), [], False
    recipe.validate_.pairs, recipe.validate_.images, recipe.validate_.per_prompt = 0, 1, 1
    cost = step_cost(recipe)
    steps = max(1, round(job.budget / cost))
    recipe.train.steps = recipe.train.save_every = recipe.validate_.every = steps
    libraries = clear_peak()
    watched: list[Spent] = []

    def watch(session: Session) -> None:
        watched.append(Spent(session.trainer))

    train(recipe, "never", False, watch)
    spent = watched[0]
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return {
        "steps": steps,
        "batch": recipe.train.batch,
        "units": spent.units,
        "per_step": spent.per_step(),
        "seconds": round(spent.seconds, 2),
        "cpu": round(spent.cpu, 2),
        "peak_mb": round((spent.peak - libraries) / 1e6, 1),
        "libraries_mb": round(libraries / 1e6, 1),
    }


def _recipe(job: Job) -> Any:
    from ..recipe import Recipe

    return Recipe.model_validate(job.recipe)


def step_cost(recipe: Any) -> float:
    """Units of one training step, from a few of them with parts of their own."""
    from ..setup import build
    from .units import Spent

    parts = build(recipe, lambda text: None)
    spent = Spent(parts.trainer)
    try:
        for _ in range(PROBED):
            parts.trainer.train_step()
    finally:
        parts.trainer.close()
    cost = spent.units / spent.steps
    del parts, spent
    gc.collect()
    if cost == 0:
        raise RunError("its training steps call no U-Net, so a budget of U-Net calls says nothing about them")
    return cost


def stay_with(parent: int) -> None:
    """End this process when the one that waits for it is gone."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def main(path: str) -> int:
    """Run the job of a file; one line on stderr and 1 where it fails."""
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    stay_with(job.parent)
    import torch

    torch.set_num_threads(1)
    try:
        found = run_job(job)
    except (UserError, RunError) as error:
        print(f"diffalign: {one_line(str(error))}", file=sys.stderr)
        return 1
    write_atomic(Path(job.result), json.dumps(found).encode())
    return 0


def write_job(job: Job, path: Path) -> None:
    """For ``main``."""
    write_atomic(path, json.dumps(asdict(job)).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
