"""What scoring costs (``diffalign bench score``): one pass over 1024 px PNGs with every scorer, beside scripts that
take one image at a time, decode again for each scorer, or read the weights for each call. All take turns in one process
on the same files, so that ratios mean something on a busy machine too.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from ..eval.items import Item, read_items
from ..eval.preprocess import decode
from ..eval.rows import read_rows
from ..eval.score import score_images
from ..eval.scorers import Scorer, load_scorer, load_scorers, parse_scorers
from .step import Ratio

if TYPE_CHECKING:
    from rich.console import Console

SCORERS = "tiny-clip,tiny-pickscore,tiny-hps"
PROMPTS_EACH = 2  # images of one prompt, so that a prompt counted twice would show
RELOADED = 4  # images that the arm which reads the weights for each call does, at most


@dataclass
class Arm:
    """One way to score: images (times scorers) a second over the rounds, and what it is."""

    name: str
    about: str
    images_per_second: float


@dataclass
class ScoreReport:
    """What ``measure_score`` found. ``ratios`` of seconds an image: ``singles`` one image at a time over one pass, for
    one scorer; ``per_scorer`` a loop that decodes for each scorer and image over one pass of all; ``reload`` the same
    loop reading the weights for each call over one pass of all. ``agreement``: largest difference of the scores of the
    loop and of the pass, relative to the largest score. ``texts``: prompts that each scorer encoded in one pass.
    ``work``: the same ratios by this process's processor seconds, which other programs do not disturb; what threads
    gain on idle cores is not in them."""

    scorers: list[str]
    device: str
    threads: int
    images: int
    prompts: int
    size: int
    rounds: int
    arms: list[Arm]
    ratios: dict[str, Ratio]
    work: dict[str, Ratio]
    agreement: float
    texts: dict[str, int]
    decode_ms: float

    def json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def render(self, console: Console) -> None:
        """A table and the ratios."""
        from rich.table import Table

        table = Table(title=f"{self.images} PNGs of {self.size} px on {self.device}, {self.threads} threads")
        table.add_column("way")
        table.add_column("images/s", justify="right")
        table.add_column("what it does")
        for arm in self.arms:
            table.add_row(arm.name, f"{arm.images_per_second:.2f}", arm.about)
        console.print(table)
        words = {
            "singles": "one image at a time takes {} times as long as one pass, by one scorer",
            "per_scorer": "a loop that decodes for each scorer and image takes {} times as long as one pass of all",
            "reload": "a loop that reads the weights for each call takes {} times as long as one pass of all",
        }
        for name, ratio in self.ratios.items():
            shown = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
            console.print(words[name].format(shown) + f"; by processor time {self.work[name].median:.2f}")
        counts = ", ".join(f"{name} {count}" for name, count in self.texts.items())
        console.print(f"prompts encoded in one pass of {self.prompts} prompts: {counts}")
        console.print(
            f"decoding alone: {self.decode_ms:.1f} ms an image; largest relative difference {self.agreement:.1e}"
        )


def measure_score(
    scorers: str = SCORERS,
    images: int = 32,
    size: int = 1024,
    rounds: int = 5,
    device: str = "auto",
    dtype: str = "auto",
    batch: int = 32,
) -> ScoreReport:
    """Measure scoring ``images`` PNGs of ``size`` x ``size`` pixels, ``rounds`` times each way, in turns.

    Args:
        scorers: names; the first is the one that is measured alone. Oracles are refused: they judge one world.

    Raises:
        UserError: unknown scorers, or too few images or rounds.
    """
    names = list(parse_scorers(scorers))
    if "oracle" in names:
        raise UserError("scorer 'oracle' judges the tiny world's captions only; leave it out of the measurement")
    if images < 2 or rounds < 2 or size < 64:
        raise UserError(f"{images} images of {size} px in {rounds} rounds are too few; give 2, 64 and 2 or more")
    loaded = load_scorers(scorers, device, dtype)
    specs = [f"{name}={path}" if path else name for name, path in parse_scorers(scorers).items()]
    with tempfile.TemporaryDirectory(prefix="diffalign-bench-") as place:
        folder = Path(place)
        write_pictures(folder / "images", images, size)
        items = read_items(folder / "images").items
        seconds, work, agreement, texts = _measure(folder, items, loaded, specs, rounds, device, dtype, batch)
    one = len(items)
    rate = {name: statistics.median(values) for name, values in seconds.items()}
    few = min(RELOADED, len(items))
    arms = [
        Arm(f"one pass, {names[0]}", "decodes ahead in threads, batches", one / rate["one"]),
        Arm(f"singles, {names[0]}", "one image at a time, weights loaded once", one / rate["singles"]),
        Arm(f"one pass, all {len(loaded)}", "one decode for all scorers", one / rate["all"]),
        Arm("loop, all", "decodes for each scorer and image, weights loaded once", one / rate["loop"]),
        Arm("reload, all", "as the loop, and reads the weights for each call", few / rate["reload"]),
    ]
    arms += [Arm(f"one pass, {name}", "alone", one / rate[f"alone {name}"]) for name in names[1:]]
    return ScoreReport(
        scorers=names,
        device=str(getattr(loaded[0], "device", device)),
        threads=torch.get_num_threads(),
        images=one,
        prompts=len({item.prompt for item in items}),
        size=size,
        rounds=rounds,
        arms=arms,
        ratios=_ratios(seconds, few, one),
        work=_ratios(work, few, one),
        agreement=agreement,
        texts=texts,
        decode_ms=1000 * rate["decode"] / one,
    )


def _ratios(seconds: dict[str, list[float]], few: int, one: int) -> dict[str, Ratio]:
    return {
        "singles": Ratio.of(seconds["singles"], seconds["one"]),
        "per_scorer": Ratio.of(seconds["loop"], seconds["all"]),
        "reload": Ratio.of([s / few for s in seconds["reload"]], [s / one for s in seconds["all"]]),
    }


def write_pictures(folder: Path, count: int, size: int) -> None:
    """Smooth pictures with some grain, as a sampler's are (noise alone would be all decompression), and a manifest."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for n in range(count):
        rng = np.random.default_rng([7, n])
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
        pixels = (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        name = f"images/{n:04d}.png"
        Image.fromarray(pixels).save(folder / name)
        prompt = n // PROMPTS_EACH
        text = f"picture number {prompt} of a red square above a blue circle"
        rows.append({"id": f"p{prompt}", "prompt": text, "k": n % PROMPTS_EACH, "image": name})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _measure(
    folder: Path,
    items: Sequence[Item],
    loaded: Sequence[Scorer],
    specs: Sequence[str],
    rounds: int,
    device: str,
    dtype: str,
    batch: int,
) -> tuple[dict[str, list[float]], dict[str, list[float]], float, dict[str, int]]:
    passed: dict[str, list[float]] = {}
    texts: dict[str, int] = {}

    def one_pass(scorers: Sequence[Scorer]) -> None:
        forget(scorers)
        target = folder / "scores.jsonl"
        target.unlink(missing_ok=True)
        target.with_suffix(".meta.json").unlink(missing_ok=True)
        done = score_images(folder / "images", None, list(scorers), target, batch=batch, progress=False)
        if len(scorers) == len(loaded):
            texts.update(done.texts)
            passed.clear()
            for row in read_rows(target):
                passed.setdefault(row.scorer, []).append(row.value or 0.0)

    looped: dict[str, list[float]] = {}

    def loop(scorers: Sequence[Scorer], keep: bool = False) -> None:
        for scorer in scorers:
            values = []
            for item in items:
                forget([scorer])  # a script encodes the prompt with each image
                values += singly(scorer, item)
            if keep:
                looped[scorer.name] = values

    def reload() -> None:
        for spec in specs:
            for item in items[:RELOADED]:
                singly(load_scorer(spec, None, device, dtype), item)

    def decode_all() -> None:
        for item in items:
            decode(item.read())

    ways: dict[str, Callable[[], None]] = {
        "one": lambda: one_pass(loaded[:1]),
        "singles": lambda: loop(loaded[:1]),
        "all": lambda: one_pass(loaded),
        "loop": lambda: loop(loaded, keep=True),
        "reload": reload,
        "decode": decode_all,
    }
    for scorer in loaded[1:]:
        ways[f"alone {scorer.name}"] = lambda scorer=scorer: one_pass([scorer])  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began, busy = time.perf_counter(), time.process_time()
            way()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
                work[name].append(time.process_time() - busy)
    largest = max(abs(v) for values in passed.values() for v in values)
    apart = max(abs(a - b) for name in passed for a, b in zip(passed[name], looped[name], strict=True))
    return seconds, work, apart / largest, texts


def singly(scorer: Scorer, item: Item) -> list[float]:
    """Score one image as a script does: open, prepare, forward."""
    picture = decode(item.read())
    found = scorer.score_prepared([scorer.prepare(picture.image)], [item.prompt]).values
    return [float(found[0])]


def forget(scorers: Sequence[Scorer]) -> None:
    """Every prompt is to be encoded anew."""
    for scorer in scorers:
        known = getattr(scorer, "_texts", None)
        if isinstance(known, dict):
            known.clear()
