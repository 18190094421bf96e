"""Stages "samples" and "pairs": candidates from tiny-sd, labelled by the tiny PickScore with noise, ties and flaws.

The oracle takes no part. Every prompt is of the training split.
"""

from __future__ import annotations

import io
import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from . import scenes
from .common import Log, start, to_signed
from .sampling import load_pipeline, sample
from .train_clip import embed_images, embed_text

SEED, PROMPTS, SINGLES, CANDIDATES = 6, 720, 72, 4
PAIRS, SINGLE_PAIRS, TIES = 1200, 90, 50
FLIP_FLOOR, FLIP_SCALE = 0.02, 1.0  # P(flip) = floor + (1 - floor) * sigmoid(-scale * score gap)
FOLDER_PAIRS = 150


def draw_prompts(rng: np.random.Generator) -> list[str]:
    """Two-object training captions in random order (again from the top when they run out), then single ones."""
    pool = [scenes.caption(s, p) for s in scenes.pair_scenes(heldout=False) for p in (0, 1)]
    order = np.concatenate([rng.permutation(len(pool)), rng.permutation(len(pool))])[: PROMPTS - SINGLES]
    singles = scenes.single_prompts() * (SINGLES // 24)
    return [pool[i] for i in order] + singles


def make_samples(path: Path, sd_folder: Path) -> None:
    """Write ``path`` (npz): prompts (P,) and images uint8 (P, CANDIDATES, 3, 32, 32)."""
    rng, log = start(SEED), Log("samples")
    pipe, prompts = load_pipeline(sd_folder), draw_prompts(rng)
    parts = []
    for i in range(0, len(prompts), 100):
        chunk = [p for p in prompts[i : i + 100] for _ in range(CANDIDATES)]
        first = 1_000_000 + i * CANDIDATES
        parts.append(sample(pipe, chunk, range(first, first + len(chunk))))
        log(i + 100)
    images = torch.cat(parts).view(len(prompts), CANDIDATES, 3, scenes.SIZE, scenes.SIZE)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, prompts=np.array(prompts), images=images.numpy())


@torch.no_grad()
def scores(folder: Path, prompts: list[str], images: torch.Tensor) -> np.ndarray:
    """Pick scores (N,) = exp(logit_scale) * cosine of N prompts with uint8 images (N, 3, 32, 32)."""
    tokenizer, model = CLIPTokenizer.from_pretrained(folder), CLIPModel.from_pretrained(folder).eval()
    out = []
    for i in range(0, len(prompts), 256):
        text = embed_text(model, tokenizer, prompts[i : i + 256])
        image = embed_images(model, to_signed(images[i : i + 256]))
        out.append(model.logit_scale.exp() * (text * image).sum(1))
    return torch.cat(out).double().numpy()


def jpeg(image: np.ndarray) -> bytes:
    """uint8 (3, H, W) -> JPEG bytes, quality 95 without colour subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(
        buffer, "JPEG", quality=95, subsampling=0, optimize=True
    )
    return buffer.getvalue()


def choose(values: np.ndarray, two: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int, int, bool]]:
    """Scores (P, K), two objects? (P,) -> (prompt, better, worse, is a tie) in random order.

    Two pairs a prompt: best against worst, and the wider of best against last but one, second against worst. Kept are
    the widest gaps (a quota of them for single objects) and, as ties, the narrowest of the rest.
    """
    pairs = []
    for p, v in enumerate(values):
        order = np.argsort(-v, kind="stable")
        pairs.append((p, int(order[0]), int(order[-1])))
        others = [(p, int(order[0]), int(order[-2])), (p, int(order[1]), int(order[-1]))]
        pairs.append(max(others, key=lambda x: v[x[1]] - v[x[2]]))
    pairs.sort(key=lambda x: values[x[0], x[2]] - values[x[0], x[1]])
    single = [x for x in pairs if not two[x[0]]][:SINGLE_PAIRS]
    double = [x for x in pairs if two[x[0]]]
    kept = single + double[: PAIRS - TIES - SINGLE_PAIRS]
    marked = [(*x, False) for x in kept] + [(*x, True) for x in double[-TIES:]]
    return [marked[i] for i in rng.permutation(len(marked))]


def make_pairs(folder: Path, samples: Path, pick_folder: Path) -> None:
    """Write ``pickapic.parquet``, ``folder/`` and README.md."""
    rng, log = start(SEED + 1), Log("pairs")
    data, singles = np.load(samples), scenes.single_scenes()
    prompts, images = [str(p) for p in data["prompts"]], data["images"]
    flat = torch.from_numpy(images.reshape(-1, *images.shape[2:]))
    values = scores(pick_folder, np.repeat(prompts, CANDIDATES).tolist(), flat).reshape(-1, CANDIDATES)
    table: list[dict[str, Any]] = []
    gaps: list[float] = []
    flipped = ties = 0
    for row, good, bad, tie in choose(values, np.array([scenes.parse(p) not in singles for p in prompts]), rng):
        gaps.append(float(values[row, good] - values[row, bad]))
        flip = rng.random() < FLIP_FLOOR + (1 - FLIP_FLOOR) / (1 + np.exp(FLIP_SCALE * gaps[-1]))
        label = 0.5 if tie else float(not flip)
        flipped, ties = flipped + (label == 0.0), ties + tie
        table.append(_row(prompts[row], jpeg(images[row, good]), jpeg(images[row, bad]), label, len(table), rng))
    counts = {"ties": ties, "flipped": flipped}
    log("labelled", rows=len(table), median_gap=float(np.median(gaps)), **counts)
    _write(folder, table, counts)


def _row(text: str, good: bytes, bad: bytes, label: float, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """One Pick-a-Pic row; ``label`` is the better picture's, the order of the two is a coin."""
    uids = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(2)]
    pictures, marks = [good, bad], [label, 1 - label]
    if rng.random() < 0.5:
        pictures, marks = pictures[::-1], marks[::-1]
    return {
        "are_different": True,
        "best_image_uid": "tie" if label == 0.5 else uids[int(marks[1] > marks[0])],
        "caption": text,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=index),
        "has_label": True,
        "image_0_uid": uids[0],
        "image_0_url": "",
        "image_1_uid": uids[1],
        "image_1_url": "",
        "jpg_0": pictures[0],
        "jpg_1": pictures[1],
        "label_0": marks[0],
        "label_1": marks[1],
        "model_0": "tiny-sd",
        "model_1": "tiny-sd",
        "ranking_id": index,
        "user_id": int(rng.integers(1, 20)),
        "num_example_per_prompt": 1,
    }


def _write(folder: Path, table: list[dict[str, Any]], counts: dict[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    captions = [r["caption"] for r in table]
    for r in table:
        r["num_example_per_prompt"] = captions.count(r["caption"])
    sound = [r for r in table[len(table) // 2 :] if r["label_0"] != 0.5]
    _write_folder(folder / "folder", sound[:FOLDER_PAIRS])
    same, torn, mute = table[17], table[101], table[211]  # the flaws
    same.update(jpg_1=same["jpg_0"], are_different=False)
    torn.update(jpg_1=torn["jpg_1"][: len(torn["jpg_1"]) // 3])
    mute.update(has_label=False, label_0=None, label_1=None, best_image_uid=None)
    pq.write_table(pa.Table.from_pylist(table), folder / "pickapic.parquet", compression="zstd")
    singles = sum(scenes.parse(c).second is None for c in captions)  # type: ignore[union-attr]
    (folder / "README.md").write_text(
        README.format(
            rows=len(table),
            singles=singles,
            twos=len(table) - singles,
            prompts=len(set(captions)),
            folder=FOLDER_PAIRS,
            **counts,
        )
    )


def _write_folder(folder: Path, table: list[dict[str, Any]]) -> None:
    """Pictures and metadata.jsonl (prompt, chosen, rejected); the last three rows are flawed."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, r in enumerate(table):
        order = (0, 1) if r["label_0"] > r["label_1"] else (1, 0)
        names = [f"images/{i:04d}_{side}.jpg" for side in ("chosen", "rejected")]
        for name, k in zip(names, order, strict=True):
            (folder / name).write_bytes(r[f"jpg_{k}"])
        lines.append({"prompt": r["caption"], "chosen": names[0], "rejected": names[1]})
    torn = folder / lines[-3]["rejected"]
    torn.write_bytes(torn.read_bytes()[:400])
    lines[-2]["rejected"] = "images/missing.jpg"
    (folder / "images" / f"{len(table) - 2:04d}_rejected.jpg").unlink()
    lines[-1]["rejected"] = lines[-1]["chosen"]
    (folder / f"images/{len(table) - 1:04d}_rejected.jpg").unlink()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


README = """# tiny-pairs

Preference pairs of the tiny world: pictures sampled from `tiny-sd` (20 DDIM steps, guidance 3, four candidates and
two pairs a prompt), labelled by `tiny-pickscore` with noise. No prompt is a held-out combination; the oracle
took no part. Apache-2.0.

`pickapic.parquet`: Pick-a-Pic v2 columns, JPEG bytes in `jpg_0` and `jpg_1`.

| | rows |
|---|---|
| all | {rows} |
| two objects | {twos} |
| one object | {singles} |
| different prompts | {prompts} |
| ties (labels 0.5) | {ties} |
| label against the scorer's score (noise) | {flipped} |
| flaw: the same image bytes twice (`are_different` false) | 1 |
| flaw: second image cut off | 1 |
| flaw: no label (`has_label` false) | 1 |

`folder/metadata.jsonl`: {folder} of the pairs as `prompt`, `chosen`, `rejected` (paths relative to the file). The last
three rows are flawed on purpose: a cut-off image, a missing file, the same image twice.
"""
