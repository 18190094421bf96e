"""What students of ``diffalign bench methods`` need beside their own trainings: references to be judged beside, the
teacher's pictures, and students to go on from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..families import detect
from ..methods import make_method
from ..recipe import Recipe
from . import judge, students
from .judge import GUIDANCE, STEPS
from .method_job import Job
from .method_keys import asset_hash, code_hash, job_key
from .student_verdict import ALIGNED_FROM, BARS
from .students import PAIRS_PROMPTS, StudentJob

GROUP = "distillation"
PAIRS = "tiny-teacher"  # the data of a recipe that are the teacher's pictures; each bench's folder has its own


@dataclass
class Company:
    """The jobs beside students: ``references`` by DDIM steps, the teacher's 20 among them; ``pairs`` by their folder;
    ``starts`` by the run that a student goes on from."""

    references: dict[int, StudentJob] = field(default_factory=dict)
    pairs: dict[str, StudentJob] = field(default_factory=dict)
    starts: dict[str, Job] = field(default_factory=dict)

    @property
    def all(self) -> list[StudentJob]:
        """Those that are no row of a method."""
        return [*self.references.values(), *self.pairs.values()]

    def beneath(self, missing: Sequence[Job], done: Callable[[Job], bool]) -> list[Job]:
        """What ``missing`` trainings go on from and is not there: not ``done``, or done and thrown away since."""
        found: list[Job] = []
        for job in missing:
            for place, made in ((getattr(job, "pairs", ""), self.pairs), (getattr(job, "start", ""), self.starts)):
                if place and made[place] not in found and not (Path(place).is_dir() and done(made[place])):
                    found.append(made[place])
        return found


def with_students(recipes: Mapping[str, Recipe], jobs: dict[str, list[Job]], out: Path) -> Company:
    """Makes the ``jobs`` of those rows that are students' into students'; ``recipes`` are of these rows."""
    company, model, prompts = Company(), "", None
    counts = {STEPS, *BARS}
    for name, recipe in recipes.items():
        made: list[Job] = []
        for job in jobs[name]:
            model, prompts = job.model, job.prompts
            student = StudentJob(**asdict(job))
            if recipe.data.path == PAIRS:
                pairs = pairs_job(job, recipe.data.max_pairs, out)
                company.pairs[pairs.folder] = pairs
                assert student.recipe is not None
                data = {**student.recipe["data"], "path": pairs.folder}
                student = replace(student, pairs=pairs.folder, recipe={**student.recipe, "data": data})
            made.append(student)
        jobs[name] = made
        counts |= set(range(1, len(times_of(recipe)) + 1)) if name not in ALIGNED_FROM else set()
    for name, start in ALIGNED_FROM.items():
        if name in recipes and start in recipes:
            jobs[name] = [on_top(job, before, company) for job, before in zip(jobs[name], jobs[start], strict=True)]
    if model:
        company.references = {k: reference_job(model, prompts, k, out) for k in sorted(counts)}
    return company


def times_of(recipe: Recipe) -> tuple[int, ...]:
    """The times that a recipe's student is sampled at."""
    options = {name: value for name, value in recipe.method.model_dump().items() if name != "name"}
    base, _ = detect(recipe.model)
    record = make_method(recipe.method.name, options).sampling(base.scheduler)
    return tuple(record.timesteps or ()) if record else ()


def on_top(job: Job, before: Job, company: Company) -> StudentJob:
    """The job, going on from the student of another, which its key and code then depend on."""
    run = str((Path(before.folder) / "run").resolve())
    company.starts[run] = before
    key, code = (short(mine, theirs) for mine, theirs in ((job.key, before.key), (job.code, before.code)))
    moved = {name: getattr(job, name).replace(job.key, key) for name in ("folder", "result")}
    return replace(StudentJob(**asdict(job)), start=run, key=key, code=code, **moved)


def reference_job(model: str, prompts: int | None, steps: int, out: Path) -> StudentJob:
    """The base at ``steps`` of DDIM, judged."""
    name = "teacher" if steps == STEPS else f"ddim-{steps}"
    key = job_key(None, 0, 0, prompts, model)
    return plain(name, key, code_hash(judge, students), model, out, task="reference", steps=steps, prompts=prompts)


def pairs_job(job: Job, limit: int | None, out: Path) -> StudentJob:
    """The teacher's pictures."""
    key = short(job.model, asset_hash(job.model), asset_hash("prompts"), PAIRS_PROMPTS, STEPS, GUIDANCE, limit)
    return plain("teacher-pairs", key, key, job.model, out, task="pairs", limit=limit)


def plain(name: str, key: str, code: str, model: str, out: Path, **options: object) -> StudentJob:
    """A job without a training. Its folder is absolute, as recipes name it."""
    given = {"recipe": None, "budget": 0, "prompts": None, "seed": 0, "parent": os.getpid()}
    places = {
        "folder": str((out / "runs" / f"{name}-{key}").resolve()),
        "result": str(out / "results" / f"{name}-0-{key}.json"),
    }
    return StudentJob(**{"name": name, "key": key, "code": code, "model": model, **given, **places, **options})  # type: ignore[arg-type]


def short(*parts: object) -> str:
    """12 hex digits of some values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
