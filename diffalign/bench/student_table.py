"""Puts the table over steps together from the results of ``diffalign bench methods``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .judge import STEPS
from .method_job import Job
from .student_jobs import GROUP, Company
from .student_report import StepsReport
from .student_verdict import ALIGNED_FROM, judge_student, reference_row, student_rows
from .verdict import Row

Read = Callable[[Job], dict[str, Any] | None]


def steps_report(
    rows: Sequence[Row], jobs: Mapping[str, Sequence[Job]], company: Company, read: Read, failed: Mapping[str, str]
) -> StepsReport:
    """Of the students among ``rows`` with what is there; their verdicts go into ``rows`` as well. ``failed``: reasons
    by the job's key."""

    def there(of: Sequence[Job]) -> list[dict[str, Any]]:
        return [found for job in of if (found := read(job)) is not None]

    report = StepsReport(troubles=[f"{job.name} failed: {failed[job.key]}" for job in company.all if job.key in failed])
    found = {row.name: results for row in rows if row.group == GROUP and (results := there(jobs[row.name]))}
    if not found:
        return report
    beside = {steps: result for steps, job in company.references.items() if (result := read(job)) is not None}
    teacher = beside.get(STEPS)
    ddim = {steps: result for steps, result in beside.items() if steps != STEPS}
    for steps, result in sorted(beside.items(), reverse=True):
        line = reference_row(result, "teacher" if steps == STEPS else "ddim", teacher)
        report.rows.append(line)
        report.pictures[line.name, steps] = Path(company.references[steps].folder) / "single"
    report.rows.sort(key=lambda line: (line.kind != "teacher", line.steps))
    for row in rows:
        if row.name not in found:
            continue
        results, mine = found[row.name], jobs[row.name]
        lines = student_rows(row.name, results, teacher, ddim, cost_of_data(mine, company, read))
        starts = there(jobs.get(ALIGNED_FROM.get(row.name, ""), ()))
        verdict, why = judge_student(row.name, lines, results, teacher, ddim, starts)
        row.verdict = verdict
        row.why = "; ".join(filter(None, (why, *failures(row), *earlier(results, mine))))
        for line in lines:
            line.why = row.why
            first = next(Path(job.folder) for job in mine if read(job) is not None)
            part = first if line.steps == lines[-1].steps else first / f"steps-{line.steps}"
            report.pictures[row.name, line.steps] = part / "single"
        report.rows += lines
    return report


def cost_of_data(jobs: Sequence[Job], company: Company, read: Read) -> str:
    """In words: what the teacher's pictures cost, where these trainings need them."""
    for place in {getattr(job, "pairs", "") for job in jobs} & company.pairs.keys():
        result = read(company.pairs[place])
        if result is not None:
            size, units, cpu = result["pictures"], result["units"], result["cpu"]
            return f"its data, {size:,} pictures by the teacher, took {units:,} units and {cpu:.0f} CPU s besides, once"
    return ""


def failures(row: Row) -> list[str]:
    """Of single seeds."""
    return [f"seed {seed} failed: {why}" for seed, why in row.failed.items()]


def earlier(results: Sequence[Mapping[str, Any]], jobs: Sequence[Job]) -> list[str]:
    """A mark where a result is of other code."""
    return ["made by earlier code"] if any(result["code"] != jobs[0].code for result in results) else []
