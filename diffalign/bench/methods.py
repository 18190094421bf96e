"""``diffalign bench methods``: every method that is installed and has a tiny recipe, trained from one tiny base.

All get the same budget of U-Net work (:mod:`.units`), a few that buy little with it a multiple (``TIMES``, which the
table says), and are judged on the same held-out prompts and noise
(:mod:`.judge`), beside three controls: the base itself, fine-tuning on the chosen pictures (``sft``), and ``tiny/dpo``
with shuffled labels. A row is a recipe ``tiny/NAME`` on tiny-sd: a new method or recipe joins by being there. Few-step
students are judged at each number of steps, beside the teacher and plain DDIM (:mod:`.students`).

Each row and seed is a process of its own on one thread. Its result is a file named by a hash of its settings: the
recipe, the seed, the budget and the shipped files that it reads. What is there is not run again, unless the code of the
method, the denoiser or the bench has changed since (comments aside). A change elsewhere in the library (the loop, the
families) is not seen: delete the folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..data.files import write_atomic
from ..errors import Interrupted, UserError, nearest, one_line
from ..methods import list_methods
from ..recipe import Recipe, builtin_recipes, load_recipe
from . import guided, method_job, students
from .guided import UnguidedJob, guided_report, unguided_job
from .judge import IN_LOOP
from .method_job import Job, write_job
from .method_keys import job_code, job_key
from .methods_page import page
from .methods_report import MethodsReport
from .student_jobs import GROUP, with_students
from .student_table import steps_report
from .student_verdict import ALIGNED_FROM
from .students import StudentJob
from .verdict import Kind, Row, fill

MODEL, DPO = "tiny-sd", "tiny/dpo"
UNITS_A_PAIR = 8  # of Diffusion-DPO: winner and loser through the student and back, and through the base
BUDGET = 300 * 16 * UNITS_A_PAIR  # what tiny/dpo's own 300 steps of 16 pairs cost
# by method: the budget times this, chosen by hand: a fake score takes most of the work of these students
TIMES = dict.fromkeys(("dmd", "dmd2", "decoupled_dmd", "f_distill", "sid"), 2)
SEEDS = (0, 1, 2)
CONTROLS = {"shuffled": "tiny/dpo with shuffled labels", "sft": "fine-tuning on the chosen pictures"}
LABELLERS = {"tiny-pairs": (IN_LOOP,), "tiny-ranked": (IN_LOOP, "tiny-hps")}
POLL = 0.2  # seconds between looks at the processes


LATER = {"hypersd-feedback", "hypersd-dmd"}  # recipes of later stages, which go on from another run's student
TWO_RUNS = {"disback": "no tiny recipe of one run: tiny/disback follows the path of tiny/disback-path"}


@dataclass
class Entry:
    """A row to be: its recipe, or why there is none."""

    name: str
    kind: Kind
    method: str = ""
    group: str = ""
    note: str = ""
    recipe: Recipe | None = None


def find_entries(overrides: Sequence[str] = (), only: Sequence[str] = ()) -> list[Entry]:
    """Base and controls first, then every tiny recipe on tiny-sd, then the methods without one.

    ``only``: rows, or groups such as ``preference``; ``overrides`` change their recipes (all methods', where it is
    empty).

    Raises UserError for an unknown name in ``only`` and for overrides that a recipe does not take."""
    makers = [row for row in list_methods() if "student" in row.get("roles", ["student"])]  # no preference models
    groups = {
        row["name"]: (guided.GROUP | dict.fromkeys(ALIGNED_FROM, GROUP)).get(row["name"], row["group"])
        for row in makers
    }
    sources = {name.partition("/")[2]: name for name in builtin_recipes() if name.startswith("tiny/")}
    entries = [Entry("base", "base", note=MODEL)]
    for name, source in {"shuffled": DPO, "sft": "tiny/sft", **sources}.items():
        if name in LATER:
            continue
        if name in CONTROLS:
            given = ["data.shuffle_labels=true"] if name == "shuffled" else []
            entry = Entry(name, "control", note=CONTROLS[name])
        else:
            given, entry = [], Entry(name, "method")
        recipe = load_recipe(source, given)
        if recipe.model.path != MODEL or recipe.method.name not in {*groups} - {*TWO_RUNS}:
            continue  # of another base, such as tiny/sdxl-dpo, or no maker of pictures in one run
        entry.method = recipe.method.name
        entry.group = groups.get(entry.method, "")
        changed = overrides and (entry.name in only or (entry.kind == "method" and is_asked(entry, only)))
        entry.recipe = load_recipe(source, [*given, *overrides]) if changed else recipe
        entries.append(entry)
    covered = {entry.method for entry in entries}
    entries += [
        Entry(name, "method", name, group, note=TWO_RUNS.get(name, f"no tiny recipe (configs/tiny/{name}.yaml)"))
        for name, group in groups.items()
        if name not in covered
    ]
    known = {entry.name for entry in entries} | set(groups.values())
    for name in only:
        if name not in known:
            raise UserError(f"--only {name}: there is no such row{nearest(name, known)}")
    return entries


def is_asked(entry: Entry, only: Sequence[str]) -> bool:
    """Whether a row is to be run: all are, where ``only`` names none; the base always is; a group has its controls."""
    return not only or entry.kind == "base" or entry.name in only or entry.group in only


@dataclass
class Plan:
    """What a command is about. ``shown``: run nothing."""

    out: Path
    seeds: tuple[int, ...] = SEEDS
    budget: int = BUDGET
    prompts: int | None = None
    jobs: int | None = None
    only: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    shown: bool = False
    say: Callable[[str], None] = field(default=lambda text: None)


def measure_methods(plan: Plan) -> MethodsReport:
    """Run what is missing, then write ``results.json``, ``table.md`` and ``report.html`` into the folder.

    With ``only``, those rows and the base are run; controls and rows whose results are there already are shown too.

    Raises:
        UserError: unknown rows, a budget or number of prompts that is none, a folder that cannot be written.
        Interrupted: by Ctrl-C; finished results stay.
    """
    for name, value in (("--budget", plan.budget), ("--prompts", plan.prompts), ("--jobs", plan.jobs)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value} is too few; give 1 or more")
    entries = find_entries(plan.overrides, plan.only)
    try:
        (plan.out / "results").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to '{plan.out}' ({error.strerror}); choose another --out") from error
    jobs = {entry.name: make_jobs(entry, plan) for entry in entries}
    recipes = {entry.name: entry.recipe for entry in entries if entry.group == GROUP and entry.recipe}
    company = with_students(recipes, jobs, plan.out)
    wanted = [job for entry in entries if is_asked(entry, plan.only) for job in jobs[entry.name]]
    if any(isinstance(job, StudentJob) for job in wanted):
        wanted += company.references.values()
    plain = unguided_job(MODEL, plan.prompts, plan.out)
    if any(entry.method in guided.GROUP and is_asked(entry, plan.only) for entry in entries):
        wanted.append(plain)
    missing = [job for job in wanted if not is_done(job)]
    missing += [job for job in company.beneath(missing, is_done) if job not in missing]
    # seeds in turn, so that a table of fewer seeds is there early; what others go on from comes first
    missing.sort(key=lambda job: job.seed)
    failed: dict[str, str] = {}
    for later in (False, True):
        some = [job for job in missing if waits(job) == later]
        failed |= {} if plan.shown else run_jobs(some, plan)
    report = collect(entries, jobs, failed, plan)
    report.over_steps = steps_report(report.rows, jobs, company, read_result, failed)
    report.guided = guided_report(report.rows, jobs, plain, read_result, failed)
    write_atomic(plan.out / "results.json", (json.dumps(report.json(), indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(plan.out / "table.md", report.markdown().encode())
    write_atomic(plan.out / "report.html", page(report).encode())
    return report


def waits(job: Job) -> bool:
    """Whether it goes on from what another job leaves."""
    return isinstance(job, StudentJob) and bool(job.start or job.pairs)


def make_jobs(entry: Entry, plan: Plan) -> list[Job]:
    """One a seed; one in all for the base, none without a recipe."""
    if entry.recipe is None and entry.kind != "base":
        return []
    budget = plan.budget * TIMES.get(entry.method, 1)
    jobs, code = [], job_code(entry.recipe, *([students] if entry.group == GROUP else []))
    for seed in plan.seeds if entry.recipe else (0,):
        key = job_key(entry.recipe, seed, budget, plan.prompts, MODEL)
        name = f"{entry.name}-{seed}-{key}"
        jobs.append(
            Job(
                name=entry.name,
                seed=seed,
                key=key,
                code=code,
                model=MODEL,
                recipe=entry.recipe.dump() if entry.recipe else None,
                budget=budget,
                prompts=plan.prompts,
                folder=str(plan.out / "runs" / name),
                result=str(plan.out / "results" / f"{name}.json"),
                parent=os.getpid(),
            )
        )
    return jobs


def read_result(job: Job) -> dict[str, Any] | None:
    """A finished job's result. Raises UserError when the file is damaged."""
    path = Path(job.result)
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != job.key or "judged" not in found:
            raise ValueError("it is of another job")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is no result ({one_line(str(error))}); delete it and run again") from error
    return found


def is_done(job: Job) -> bool:
    """Whether there is a result, made by the code as it is."""
    found = read_result(job)
    return found is not None and found["code"] == job.code


def collect(entries: Sequence[Entry], jobs: dict[str, list[Job]], failed: dict[str, str], plan: Plan) -> MethodsReport:
    """The rows with what is there."""
    results = {name: [r for job in of if (r := read_result(job))] for name, of in jobs.items()}
    base = results["base"][0] if results["base"] else None
    rows, pictures = [], {}
    for entry in entries:
        of = jobs[entry.name]
        row = Row(entry.name, entry.kind, entry.group, entry.method, entry.note)
        row.trained_on = trained_on(entry.recipe)
        row.failed = {job.seed: failed[job.key] for job in of if job.key in failed}
        if not of:
            row.verdict, row.why = "not run", entry.note
        if not is_asked(entry, plan.only) and not results[entry.name]:
            continue
        rows.append(fill(row, results[entry.name], base, results["shuffled"]))
        if of and any(r["code"] != of[0].code for r in results[entry.name]):
            row.why = "; ".join(filter(None, (row.why, "made by earlier code")))
        done = [job for job in of if Path(job.result).is_file()]
        if done:
            pictures[entry.name] = Path(done[0].folder) / "held"
    settings = {
        "model": MODEL,
        "budget": plan.budget,
        "times": {row.name: TIMES[row.method] for row in rows if row.method in TIMES},
        "seeds": list(plan.seeds),
        "prompts": len(base["judged"]["ids"]) if base else 0,
        "overrides": list(plan.overrides),
    }
    return MethodsReport(settings, rows, pictures)


def trained_on(recipe: Recipe | None) -> tuple[str, ...]:
    """The judges whose scores made a recipe's data: those that labelled the pairs or lists, and those it asks for."""
    if recipe is None:
        return ()
    asked = [*LABELLERS.get(recipe.data.path, ()), *recipe.data.rewards, recipe.data.scorer or ""]
    return tuple(dict.fromkeys(name.partition("=")[0] for name in asked if name))


def run_jobs(jobs: Sequence[Job], plan: Plan) -> dict[str, str]:
    """Every job in a process of its own, at most one a core; returns the reasons of those that failed, by key.

    Raises Interrupted by Ctrl-C, when the processes have ended."""
    limit = plan.jobs or os.cpu_count() or 1
    waiting, failed, done = list(jobs), {}, 0  # type: list[Job], dict[str, str], int
    running: list[tuple[Job, subprocess.Popen[bytes], float]] = []
    if jobs:
        plan.say(f"{len(jobs)} trainings to do, {min(limit, len(jobs))} at a time")
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                job = waiting.pop(0)
                running.append((job, start(job), time.monotonic()))
            time.sleep(POLL)
            for one in list(running):
                job, process, began = one
                if process.poll() is None:
                    continue
                running.remove(one)
                done += 1
                result = read_result(job)
                head = f"{done} of {len(jobs)}: {job.name}, seed {job.seed}"
                if process.returncode or result is None:
                    failed[job.key] = reason(job, process.returncode)
                    plan.say(f"{head} failed: {failed[job.key]}")
                else:
                    plan.say(f"{head}: {told(result)}; {time.monotonic() - began:.0f} s in all")
    except KeyboardInterrupt as error:
        for _, process, _ in running:
            process.send_signal(signal.SIGKILL)
            process.wait()
        text = f"stopped; {done} of {len(jobs)} are done in '{plan.out}', the same command goes on"
        raise Interrupted(text) from error
    return failed


def told(result: dict[str, Any]) -> str:
    """A finished job in a few words."""
    if result["judged"] is None:
        return f"{result['pictures']:,} pictures"
    right = result["judged"]["scores"]["oracle"]
    trained = f", {result['steps']} steps in {result['seconds']:.0f} s" if "seconds" in result else ""
    return f"{sum(right) / len(right):.3f} all right{trained}"


def start(job: Job) -> subprocess.Popen[bytes]:
    """One thread, nothing shared; what it says goes to a file beside its folder."""
    folder = Path(job.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    described = folder.with_suffix(".job.json")
    write_job(job, described)
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", runner(job).__name__, str(described)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **quiet, **threads},
        )


def runner(job: Job) -> ModuleType:
    """The module that a job's process runs."""
    return guided if isinstance(job, UnguidedJob) else students if isinstance(job, StudentJob) else method_job


def reason(job: Job, status: int) -> str:
    """Why a process failed, in a line: the last that it said."""
    if status < 0:
        return f"ended by signal {-status} ({signal.Signals(-status).name})"
    text = Path(job.folder).with_suffix(".log").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return one_line(lines[-1].removeprefix("diffalign: ")) if lines else f"exit status {status}"
