"""Pictures of multi-student distillation: every prompt by the student of its part, as `sample` draws each alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..checkpoint import write_atomic
from ..errors import UserError
from ..eval.prompts import Prompt
from ..partition import features_of, read_partition
from .sample import MANIFEST, sample
from .spec import SampleSpec


def sample_parts(
    spec: SampleSpec,
    students: str | Path,
    prompts: Sequence[Prompt],
    out: Path,
    progress: bool = True,
    set_name: str | None = None,
) -> Path:
    """``out/PART`` as `sample` leaves it, for each part of the partition ``students`` that prompts are in, and
    ``out/manifest.jsonl`` over all of them in the order of the prompts; returns its path. Resumes as `sample` does.

    Raises:
        UserError: as `sample`, `partition.read_partition`, and for a LoRA beside the students'.
    """
    if spec.lora is not None:
        raise UserError("--lora does not go with --students, which brings a LoRA for each part; leave it out")
    partition, folder = read_partition(students)
    features = features_of(spec.model) if partition.centres is not None else None
    parts = partition.part_of([p.prompt for p in prompts], features)
    rows: list[dict[str, object]] = []
    for name in (name for name in partition.names if name in parts):
        mine = [p for p, part in zip(prompts, parts, strict=True) if part == name]
        made = sample(replace(spec, lora=partition.student(name, folder)), mine, out / name, progress, set_name)
        found = [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()]
        rows += [{**row, "image": f"{name}/{row['image']}", "part": name} for row in found]
    order = {p.id: number for number, p in enumerate(prompts)}
    rows.sort(key=lambda row: order[str(row["id"])])
    if os.environ.get("RANK", "0") == "0":
        write_atomic(out / MANIFEST, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return out / MANIFEST
