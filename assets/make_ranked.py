"""Stage "ranked": lists of four samples of tiny-sd a prompt, ranked as Syn-Pic is, by `diffalign pairs make`.

The scores are the shares of duels won under tiny-pickscore and tiny-hps. The oracle takes no part, and every prompt is
of the training split.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffalign.data.make import MakeOptions, make_pairs
from diffalign.eval.prompts import Prompt, read_prompts
from diffalign.pipelines.spec import Sampling

from .common import Log, start
from .make_pairs import jpeg
from .sampling import GUIDANCE, STEPS

SEED, PROMPTS, SINGLES, PICTURES = 8, 400, 24, 4
SCORERS = ("tiny-pickscore", "tiny-hps")


def draw_prompts(file: Path) -> list[Prompt]:
    """Training prompts of two objects in random order, and all of one object."""
    rng, known = start(SEED), read_prompts(file)
    singles = [p for p in known if p.category == "single"][:SINGLES]
    twos = [p for p in known if p.category != "single"]
    drawn = [*singles, *(twos[i] for i in rng.permutation(len(twos))[: PROMPTS - len(singles)])]
    return [drawn[i] for i in rng.permutation(len(drawn))]


def make_ranked(root: Path, work: Path) -> None:
    """Write ``root/tiny-ranked``: ``ranked.parquet`` and README.md. ``work`` keeps the samples."""
    log = Log("ranked")
    made = make_pairs(
        [f"tiny-sd={root / 'tiny-sd'}"],
        draw_prompts(root / "prompts" / "tiny-train.jsonl"),
        ",".join(f"{name}={root / name}" for name in SCORERS),
        work,
        MakeOptions("ranked", "wins"),
        sampling=Sampling(
            steps=STEPS, guidance=GUIDANCE, scheduler="ddim", seed=SEED, per_prompt=PICTURES, batch=64, device="cpu"
        ),
        score_batch=64,
    )
    assert made is not None
    rows = [json.loads(line) for line in (work / "metadata.jsonl").read_text().splitlines()]
    table = [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "images": [_encoded(work / name) for name in row["images"]],
            "scores": row["scores"],
            **{name: row[name] for name in SCORERS},
        }
        for row in rows
    ]
    folder = root / "tiny-ranked"
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), folder / "ranked.parquet", compression="zstd")
    spread = np.array([row["scores"][0] - row["scores"][-1] for row in rows])
    agree = np.mean([np.argmax(row[SCORERS[0]]) == np.argmax(row[SCORERS[1]]) for row in rows])
    facts = {"rows": len(rows), "pictures": sum(len(row["images"]) for row in rows), "spread": float(spread.mean())}
    left = {"same": made.counts["identical"], "ties": made.counts["ties"]}
    (folder / "README.md").write_text(README.format(**facts, **left, agree=agree))
    log("ranked", **facts, agree=float(agree))


def _encoded(file: Path) -> bytes:
    with Image.open(file) as image:
        return jpeg(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


README = """# tiny-ranked

Ranked lists of the tiny world, for RankDPO and its kin: pictures sampled from `tiny-sd` (20 DDIM steps, guidance 3,
four a prompt) and ranked by `diffalign pairs make --as ranked --mix wins` under `tiny-pickscore` and `tiny-hps`, as
Syn-Pic is by its five scorers. No prompt is a held-out combination; the oracle took no part. Apache-2.0.

`ranked.parquet`: `id`, `prompt`, `images` (JPEG bytes, best first), `scores` (in [0, 1]: the share of duels with the
prompt's other pictures that each wins, over both scorers; a draw counts half), and each scorer's own numbers.

| | |
|---|---|
| lists | {rows} |
| pictures | {pictures} |
| pictures left out: pixels equal to another's of the prompt | {same} |
| lists left out: all scores equal | {ties} |
| mean of best minus worst score | {spread:.3f} |
| lists whose best picture is the same for both scorers | {agree:.0%} |
"""
