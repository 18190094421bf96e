"""``diffalign pairs make``: from prompts and models to pairs or ranked lists, by any scorer or mix of scorers.

Under the target, ``samples/LABEL`` holds each generator's pictures and their scores as `diffalign sample` and
`diffalign score` write them, so that every step goes on picture by picture and is shared among processes;
``metadata.jsonl`` names these pictures and is written whole, at the end. The same command with another gap or policy
only ranks anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import UserError
from .files import swap, swapping
from .mix import Policy, choose_pairs, mix_scores, parse_weights, ranking, win_rates
from .rows import ImageRef, PairRow
from .scan import look_at, workers

if TYPE_CHECKING:
    from ..eval.evaluate import ModelSpec
    from ..eval.prompts import Prompt
    from ..eval.scorers import Scorer
    from ..pipelines.spec import Sampling

TABLE, FACTS, SHEET, SAMPLES = "metadata.jsonl", "make.json", "sheet.png", "samples"
SHOWN = 12  # pairs, or lists, on the sheet


@dataclass(frozen=True)
class MakeOptions:
    """How pictures become preferences.

    ``mix`` of scorers: ``wins`` in duels with the prompt's other pictures (Syn-Pic's way, in [0, 1]), or weighted
    ``scores``, standardised where there are several; ``auto`` takes a single scorer's scores and the wins of several.
    ``policy``: which pairs of a prompt's ranking. ``gap``: the least difference of the two scores of a pair, or of a
    list's ends. A tie is a pair of equal scores, or a list whose scores are all equal. ``dedup`` exact leaves out
    pictures of equal pixels, ``near`` those whose 64-bit difference hash differs in at most that many bits from an
    earlier one's of the prompt."""

    form: Literal["pairs", "ranked"] = "pairs"
    mix: Literal["auto", "wins", "scores"] = "auto"
    policy: Policy = "best-worst"
    gap: float = 0.0
    ties: Literal["skip", "keep"] = "skip"
    dedup: Literal["exact", "none"] = "exact"
    near: int | None = None

    def __post_init__(self) -> None:
        if self.gap < 0:
            raise UserError(f"--gap {self.gap:g} is below 0; give the least difference of scores that is worth a pair")
        if self.near is not None and not 0 <= self.near <= 32:
            raise UserError(f"--near {self.near} is not from 0 to 32 of the 64 bits of a picture's hash")


@dataclass
class Shot:
    """A picture of a prompt: which generator's, its draw, and its score by each scorer (S,)."""

    label: str
    weights: str
    k: int
    seed: int | None
    file: str
    scores: np.ndarray
    phi: float = 0.0


@dataclass
class Made:
    """What was written, and the account of what was not."""

    out: Path
    form: str
    counts: dict[str, int]
    means: dict[str, dict[str, float]]

    def json(self) -> dict[str, Any]:
        """Plain data."""
        return {"out": str(self.out), "form": self.form, "counts": self.counts, "means": self.means}

    def render(self, console: Any) -> None:
        """The account for a terminal."""
        for label, means in self.means.items():
            shown = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
            console.print(f"{label}: mean {shown}", markup=False)
        console.print(account(self.counts), markup=False, soft_wrap=True)
        console.print(f"written: {self.out / TABLE}, {FACTS}, {SHEET}", markup=False, soft_wrap=True)


def make_pairs(
    models: Sequence[str],
    prompts: str | Sequence[Prompt],
    scorers: str,
    out: Path,
    options: MakeOptions,
    *,
    weights: str = "",
    sampling: Sampling | None = None,
    score_batch: int = 32,
    progress: bool = True,
) -> Made | None:
    """Sample, score, rank and write; None for all processes but the first.

    Args:
        models: generators, ``[label=]model[+lora[@scale]]``; a prompt's pictures of all of them compete.
        prompts: a text, a file, a set, or prompts.
        scorers: such as ``"hpsv21,pickscore=FOLDER"``; ``weights`` such as ``"hpsv21=2"``.
        sampling: how; ``per_prompt`` (times seeds, times models) pictures of each prompt compete.

    Raises:
        UserError: bad models, prompts, scorers, weights or settings; one picture a prompt; no pair left; ``out`` holds
            something else. Interrupted, RunError: as `sample` and `score_images`; the same command goes on.
    """
    from ..eval.evaluate import parse_models
    from ..eval.prompts import read_prompts, set_name
    from ..eval.ranks import join_ranks
    from ..eval.score import score_images
    from ..eval.scorers import load_scorers, parse_scorers
    from ..pipelines.sample import SampleSpec, sample
    from ..pipelines.spec import Sampling

    specs, names = parse_models(models), list(parse_scorers(scorers))
    shares = parse_weights(weights, names)
    settings = sampling or Sampling()
    settings.check()
    listed = read_prompts(prompts) if isinstance(prompts, str) else list(prompts)
    each = len(specs) * settings.per_prompt * len(settings.seeds)
    if each < 2:
        raise UserError("one picture a prompt has nothing to be compared with; set --per-prompt 4, or name more models")
    if options.near is not None and options.dedup == "none":
        raise UserError("--near goes with --dedup exact; leave --dedup none out")
    if (out / TABLE).exists() and not (out / FACTS).exists():
        raise UserError(f"'{out}' holds pairs that this command did not make; choose another --out")
    ranks = join_ranks(settings.device)
    loaded = load_scorers(scorers, settings.device)
    for scorer in loaded:
        scorer.check_prompts([p.prompt for p in listed])
    means: dict[str, dict[str, float]] = {}
    name = set_name(prompts) if isinstance(prompts, str) else None
    for spec in specs:
        place = out / SAMPLES / spec.label
        asked = SampleSpec(spec.model, spec.lora, spec.lora_scale, **vars(settings))
        sample(asked, listed, place, progress=progress, set_name=name)
        scored = score_images(place, None, loaded, place / "scores.jsonl", batch=score_batch, progress=progress)
        means[spec.label] = scored.means
    if not ranks.main:
        return None
    shots = gather(out, specs, loaded)
    counts = {"prompts": len(listed), "pictures": len(listed) * each}
    found = dict(filtered(out, listed, shots, options, counts))
    rate(found, shares, options)
    identity = {s.name: s.fingerprint_id for s in loaded}
    rows = list((lists if options.form == "ranked" else pairs)(listed, found, options, identity, counts))
    if not rows:
        raise UserError(f"no {options.form} left in '{out}': {account(counts)}; lower --gap, or set --ties keep")
    facts = {
        "models": {s.label: {"model": s.model, "lora": s.lora, "lora_scale": s.lora_scale} for s in specs},
        "scorers": {s.name: s.fingerprint for s in loaded},
        "weights": shares,
        "options": asdict(options),
        "sampling": vars(settings),
        "counts": counts,
        "means": means,
    }
    write(out, rows, facts, options.form)
    return Made(out, options.form, counts, means)


def account(counts: Mapping[str, int]) -> str:
    """``3 prompts, 9 pictures, 2 ties, 7 kept``."""
    return ", ".join(f"{n:,} {what}" for what, n in counts.items() if n or what == "kept")


def gather(out: Path, specs: Sequence[ModelSpec], scorers: Sequence[Scorer]) -> dict[str, list[Shot]]:
    """Every picture by its prompt's id, in the order of models and draws; NaN where a scorer gave no score."""
    from ..eval.score import read_rows

    column = {s.name: i for i, s in enumerate(scorers)}
    found: dict[str, list[Shot]] = {}
    for spec in specs:
        place = out / SAMPLES / spec.label
        hashes = json.loads((place / "sample.json").read_text(encoding="utf-8"))["settings"]["hashes"]
        weights = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]
        mine: dict[tuple[str, int], Shot] = {}
        for row in read_rows(place / "scores.jsonl"):
            if (row.id, row.k) not in mine:
                file = f"{SAMPLES}/{spec.label}/{row.image}"
                shot = Shot(spec.label, weights, row.k, row.seed, file, np.full(len(column), np.nan))
                mine[row.id, row.k] = shot
                found.setdefault(row.id, []).append(shot)
            if row.scorer in column and row.value is not None:
                mine[row.id, row.k].scores[column[row.scorer]] = row.value
    return found


def filtered(
    out: Path, prompts: Sequence[Prompt], shots: Mapping[str, list[Shot]], options: MakeOptions, counts: dict[str, int]
) -> Iterator[tuple[str, list[Shot]]]:
    """The different pictures of each prompt that every scorer could judge, where they are two or more."""
    reasons = ("without a score", "identical", "near-identical", "prompts with fewer than two pictures left")
    counts |= dict.fromkeys(reasons, 0)
    with ThreadPoolExecutor(workers()) as pool:
        for prompt in prompts:
            sound = [shot for shot in shots.get(prompt.id, []) if not np.isnan(shot.scores).any()]
            counts["without a score"] += len(shots.get(prompt.id, [])) - len(sound)
            kept: list[Shot] = []
            pixels: set[str] = set()
            hashes: list[int] = []
            refs = [ImageRef(out / shot.file, shot.file) for shot in sound]
            looks = pool.map(lambda ref: look_at(ref, "white"), refs if options.dedup == "exact" else ())
            for shot, look in zip(sound, looks, strict=True) if options.dedup == "exact" else ():
                if look.pixels in pixels:
                    counts["identical"] += 1
                elif options.near is not None and any((look.hash ^ h).bit_count() <= options.near for h in hashes):
                    counts["near-identical"] += 1
                else:
                    kept.append(shot)
                    pixels.add(look.pixels)
                    hashes.append(look.hash)
            kept = kept if options.dedup == "exact" else sound
            if len(kept) < 2:
                counts["prompts with fewer than two pictures left"] += 1
            else:
                yield prompt.id, kept


def rate(found: Mapping[str, list[Shot]], weights: Mapping[str, float], options: MakeOptions) -> None:
    """Gives every picture its one score, rounded to nine digits: ties that are ties but for rounding are ties."""
    wins = options.mix == "wins" or (options.mix == "auto" and len(weights) > 1)
    flat = [shot for shots in found.values() for shot in shots]
    if wins:
        for shots in found.values():
            for shot, phi in zip(
                shots, win_rates(np.stack([s.scores for s in shots], 1), [*weights.values()]), strict=True
            ):
                shot.phi = float(phi)
    elif flat:
        table = np.stack([shot.scores for shot in flat])
        mixed = mix_scores({name: table[:, i] for i, name in enumerate(weights)}, weights)
        for shot, value in zip(flat, mixed, strict=True):
            shot.phi = float(value)
    for shot in flat:
        shot.phi = float(f"{shot.phi:.9g}")


def pairs(
    prompts: Sequence[Prompt],
    found: Mapping[str, list[Shot]],
    options: MakeOptions,
    scorers: Mapping[str, str],
    counts: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """Rows of ``metadata.jsonl``: prompt, the two files and scores, and where they come from."""
    counts |= dict.fromkeys(("pairs compared", "ties", "below the gap", "kept"), 0)
    for prompt, shots in _with(prompts, found):
        for a, b in choose_pairs(ranking(np.array([shot.phi for shot in shots])), options.policy):
            better, worse = shots[a], shots[b]
            gap = better.phi - worse.phi
            counts["pairs compared"] += 1
            if not _worth(gap, options, counts):
                continue
            row: dict[str, Any] = {"id": f"{prompt.id}-{a}-{b}", "prompt": prompt.prompt}
            sides = {"chosen": better, "rejected": worse}
            row |= {f"{side}_file_name": shot.file for side, shot in sides.items()}
            row |= {f"{side}_score": shot.phi for side, shot in sides.items()}
            row |= {"tie": True} if gap == 0 else {}
            for side, shot in sides.items():
                row |= {f"{side}_{name}": float(v) for name, v in zip(scorers, shot.scores, strict=True)}
                row |= {f"{side}_model": shot.label, f"{side}_weights": shot.weights, f"{side}_seed": shot.seed}
            yield {**row, "scorers": dict(scorers)}


def lists(
    prompts: Sequence[Prompt],
    found: Mapping[str, list[Shot]],
    options: MakeOptions,
    scorers: Mapping[str, str],
    counts: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """The same for ranked lists, best first: ``images``, ``scores``, and where they come from."""
    counts |= dict.fromkeys(("lists compared", "ties", "below the gap", "kept"), 0)
    for prompt, shots in _with(prompts, found):
        ranked = [shots[i] for i in ranking(np.array([shot.phi for shot in shots]))]
        gap = ranked[0].phi - ranked[-1].phi
        counts["lists compared"] += 1
        if not _worth(gap, options, counts):
            continue
        row: dict[str, Any] = {"id": prompt.id, "prompt": prompt.prompt, "images": [shot.file for shot in ranked]}
        row["scores"] = [shot.phi for shot in ranked]
        row |= {name: [float(shot.scores[i]) for shot in ranked] for i, name in enumerate(scorers)}
        row |= {"models": [s.label for s in ranked], "weights": [s.weights for s in ranked]}
        yield {**row, "seeds": [shot.seed for shot in ranked], "scorers": dict(scorers)}


def _worth(gap: float, options: MakeOptions, counts: dict[str, int]) -> bool:
    """Whether a pair or a list with this gap is written; counted either way."""
    narrow = 0 < gap < options.gap
    kept = not narrow and (gap > 0 or options.ties == "keep")
    for name, found in (("ties", gap == 0), ("below the gap", narrow), ("kept", kept)):
        counts[name] += found
    return kept


def _with(prompts: Sequence[Prompt], found: Mapping[str, list[Shot]]) -> Iterator[tuple[Prompt, list[Shot]]]:
    return ((prompt, found[prompt.id]) for prompt in prompts if prompt.id in found)


def write(out: Path, rows: Sequence[dict[str, Any]], facts: Mapping[str, Any], form: str) -> None:
    """The table, the sheet and the facts, each whole or not at all. Raises UserError where that cannot be."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    chosen = [rows[i * len(rows) // min(SHOWN, len(rows))] for i in range(min(SHOWN, len(rows)))]
    try:
        swap(out / FACTS, (json.dumps(facts, indent=1, default=str) + "\n").encode())
        sheet = list_sheet(out, chosen) if form == "ranked" else pair_sheet(out, chosen)
        with swapping(out / SHEET) as file:
            sheet.save(file, "PNG")
        swap(out / TABLE, lines.encode())
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error.strerror or error}); choose another --out") from error


def pair_sheet(out: Path, rows: Sequence[dict[str, Any]]) -> Any:
    """Some of the pairs, the chosen one left."""
    from .sheet import picture_sheet

    def ref(row: dict[str, Any], side: str) -> ImageRef:
        return ImageRef(out / row[f"{side}_file_name"], row[f"{side}_model"])

    shown = [
        PairRow(
            row["id"],
            row["prompt"],
            ref(row, "chosen"),
            ref(row, "rejected"),
            None,
            row["chosen_score"],
            row["rejected_score"],
            row.get("tie", False),
        )
        for row in rows
    ]
    return picture_sheet(shown, [], "white", SHOWN)


def list_sheet(out: Path, rows: Sequence[dict[str, Any]]) -> Any:
    """Some of the lists, one a line, best first, the prompt above the first picture and scores above the others."""
    from PIL import Image

    from ..pipelines.grid import grid

    columns = max(len(row["images"]) for row in rows)
    images, labels = [], []
    for row in rows:
        loaded = [ImageRef(out / name, name).load() for name in row["images"]]
        lack = columns - len(loaded)
        images += [*loaded, *[Image.new("RGB", loaded[0].size, "white")] * lack]
        scores = [f"{score:.3g}" for score in row["scores"]]
        labels += [f"{scores[0]}: {row['prompt']}", *scores[1:], *[""] * lack]
    return grid(images, columns, labels)
