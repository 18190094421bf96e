"""One few-step student and seed of ``diffalign bench methods``, or what it is judged beside: a process of its own.

``python -m diffalign.bench.students JOB.json``. A student is trained at the budget and judged as every method is, at
its own steps; then at fewer, which are those of its times that sampling with fewer steps takes. Beside it stand the
teacher and plain DDIM of the base at the same number of steps, by the same prompts and noise.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..data.files import write_atomic
from ..data.teacher import TABLE, teacher_pairs
from ..errors import RunError, UserError, one_line
from ..eval.prompts import read_prompts
from ..eval.rows import read_rows
from ..facts import FACTS, Facts, SamplingRecord, read_facts, recorded, student_record
from .judge import BATCH, GUIDANCE, PRIMARY, SINGLE, STEPS, Judged, judge
from .method_job import Job, run_job, stay_with

PAIRS_PROMPTS = "tiny-train"  # what the teacher draws for DMD's regression


@dataclass(frozen=True)
class StudentJob(Job):
    """``task``: a student; a reference, the base by ``steps`` of DDIM; or the teacher's pictures, of ``limit`` prompts.
    ``start``: the run of a student to go on from, and ``pairs``: the folder of the teacher's pictures, where this one
    needs them; other jobs leave them there."""

    task: Literal["student", "reference", "pairs"] = "student"
    steps: int = 0
    start: str = ""
    pairs: str = ""
    limit: int | None = None


@dataclass(frozen=True)
class AtSteps:
    """A model at a number of steps. ``single``: for each single-object prompt the share of its pictures that are all
    right; ``held``: for each held-out prompt 1 or 0; ``shapes`` and ``diversity`` as `Judged` has them. ``times`` are
    what the network is told, None where a scheduler chooses. ``ms``: processor time of a picture, see `drawing_ms`."""

    steps: int
    times: list[int] | None
    single: list[float]
    held: list[float]
    shapes: float
    diversity: float
    ms: float


def run_student(job: StudentJob) -> dict[str, Any]:
    """Train and judge at every step count, the most first. Pictures: ``held`` and ``single`` of the job's folder at
    all its steps, of ``steps-K`` in it at K of them.

    Raises UserError where what it starts from is not there."""
    began = time.perf_counter()
    folder = Path(job.folder)
    if job.pairs and not (Path(job.pairs) / TABLE).is_file():
        raise UserError(f"'{job.pairs}' does not hold the teacher's pictures that this method needs")
    if job.start:
        job = replace(job, recipe=going_on(job.recipe or {}, job.start))
    found = run_job(job)
    run = folder / "run"
    record = recorded(str(run))
    if record is None:
        raise RunError("its run records no few-step sampler")
    whole = Judged(**found["judged"])
    levels = [at_steps(str(run), whole, folder)]
    for steps in range(record.steps - 1, 0, -1):
        part = folder / f"steps-{steps}"
        student = cut(run, steps, part / "run")
        levels.append(at_steps(str(student), judge(str(student), part, job.prompts, (PRIMARY,)), part))
        shutil.rmtree(student)
    levels.reverse()
    return found | {"levels": [asdict(level) for level in levels], "wall": round(time.perf_counter() - began, 2)}


def run_reference(job: StudentJob) -> dict[str, Any]:
    """The base, judged as the teacher (``job.steps`` 20, its own DDIM) or by fewer DDIM steps, guided as the teacher.

    At few steps the times are spaced from the noise down (999; 999 and 499; ...), as the students' are: the base's own
    spacing would ask it at t = 1 alone."""
    began = time.perf_counter()
    folder = Path(job.folder)
    shutil.rmtree(folder, ignore_errors=True)
    model = job.model if job.steps == STEPS else str(by_ddim(job.model, job.steps, folder / "model"))
    judged = judge(model, folder, job.prompts, (PRIMARY,))
    level = at_steps(model, judged, folder)
    shutil.rmtree(folder / "model", ignore_errors=True)
    head = {"name": job.name, "seed": job.seed, "key": job.key, "code": job.code, "judged": judged.json()}
    return {**head, "levels": [asdict(level)], "wall": round(time.perf_counter() - began, 2)}


def run_pairs(job: StudentJob) -> dict[str, Any]:
    """The teacher's pictures of known noise, as `diffalign pairs teacher` makes them; goes on where it was stopped."""
    from ..pipelines.sample import SampleSpec

    prompts = read_prompts(PAIRS_PROMPTS)[: job.limit]
    began, worked = time.perf_counter(), time.process_time()
    spec = SampleSpec(job.model, steps=STEPS, guidance=GUIDANCE, batch=BATCH, device="cpu", dtype="fp32")
    teacher_pairs(spec, prompts, Path(job.folder), progress=False)
    cpu, wall = (round(now - then, 2) for now, then in ((time.process_time(), worked), (time.perf_counter(), began)))
    head = {"name": job.name, "seed": job.seed, "key": job.key, "code": job.code, "judged": None}
    return {**head, "pictures": len(prompts), "units": 2 * STEPS * len(prompts), "cpu": cpu, "wall": wall}


def going_on(recipe: dict[str, Any], run: str) -> dict[str, Any]:
    """The recipe on top of a run's student, which is fused into the base, at exactly its sampler's times and kind of
    step, whatever student the recipe itself names.

    Raises UserError where there is none."""
    record = recorded(run)
    if record is None:
        raise UserError(f"'{run}' does not hold the student that this method goes on from")
    times = {"timesteps": list(record.timesteps or ()), "scale": record.scale}
    kind = "sampler" if "sampler" in recipe["method"] else "rollout"
    times[kind] = "ddim" if record.deterministic else "renoise"
    return {
        **recipe,
        "model": {**recipe["model"], "loras": [{"path": run}]},
        "method": {**recipe["method"], **times},
    }


def at_steps(model: str, judged: Judged, folder: Path) -> AtSteps:
    """``judged``, whose pictures are in ``folder``, with what single-object prompts say one by one."""
    by_prompt: defaultdict[str, list[float]] = defaultdict(list)
    for row in read_rows(folder / "single" / "scores.jsonl"):
        if row.value is None:
            raise RunError(f"{row.scorer} has no score for {row.image}, which cannot be read; remove '{folder}'")
        by_prompt[row.id].append(float(row.value))
    record = recorded(model)
    return AtSteps(
        steps=judged.steps,
        times=list(record.timesteps) if record and record.timesteps else None,
        single=[float(np.mean(by_prompt[p.id])) for p in read_prompts(SINGLE) if p.id in by_prompt],
        held=judged.scores[PRIMARY],
        shapes=judged.shapes,
        diversity=judged.diversity,
        ms=round(drawing_ms(model, record), 3),
    )


def cut(run: Path, steps: int, folder: Path) -> Path:
    """A copy of a student's run that records only ``steps`` of its times; returns ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "model", folder / "model")
    shutil.copy(run / "recipe.yaml", folder)
    facts = read_facts(folder / "model")
    if facts is None or facts.sampling is None:
        raise RunError("its run records no few-step sampler")
    fewer = facts.sampling.model_copy(update={"steps": steps, "timesteps": facts.sampling.times(steps)})
    write_atomic(folder / "model" / FACTS, facts.model_copy(update={"sampling": fewer}).text().encode())
    return folder


def by_ddim(model: str, steps: int, folder: Path) -> Path:
    """A copy of a base that records plain DDIM at ``steps`` times from the noise down; returns ``folder``."""
    from ..families import detect
    from ..recipe import ModelRecipe

    base, family = detect(ModelRecipe(path=model))
    shutil.copytree(base.path, folder)
    total = int(base.scheduler.get("num_train_timesteps", 1000))
    times = [round(total - k * total / steps) - 1 for k in range(steps)]
    record = student_record(base.scheduler, times, renoise=False).model_copy(update={"guidance": GUIDANCE})
    facts = Facts(kind="pipeline", family=family, base=model, sampling=record)
    write_atomic(folder / FACTS, facts.text().encode())
    return folder


def drawing_ms(model: str, record: SamplingRecord | None) -> float:
    """Processor milliseconds of a picture of a batch of single-object prompts, from text to pixels; opening apart.

    The better of two calls: the first also warms up."""
    import torch

    from ..pipelines.loading import open_pipeline

    pipeline: Any = open_pipeline(model, None, 1.0, "ddim", torch.device("cpu"), torch.float32, record=record).pipeline
    call = record.call() if record else {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    texts = [p.prompt for p in read_prompts(SINGLE)]
    spent = []
    for _ in range(2):
        began = time.process_time()
        pipeline(texts, generator=torch.Generator().manual_seed(0), **call)
        spent.append(time.process_time() - began)
    return 1000 * min(spent) / len(texts)


def main(path: str) -> int:
    """Run the job of a file; one line on stderr and 1 where it fails."""
    job = StudentJob(**json.loads(Path(path).read_text(encoding="utf-8")))
    stay_with(job.parent)
    import torch

    torch.set_num_threads(1)
    try:
        found = {"student": run_student, "reference": run_reference, "pairs": run_pairs}[job.task](job)
    except (UserError, RunError) as error:
        print(f"diffalign: {one_line(str(error))}", file=sys.stderr)
        return 1
    write_atomic(Path(job.result), json.dumps(found).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
