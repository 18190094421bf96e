"""``diffalign pairs caption``: pairs in which each picture has a caption of its own, as DCPO trains on them.

Captions are made batch by batch and written down as they come, in a hidden folder beside the target; then the pairs are
written as ``pairs convert`` writes them. Either half goes on where it was killed. Processes of a launcher share the
batches, and the first one writes the pairs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import torch

from ..errors import Interrupted, RunError, UserError, nearest
from ..eval.ranks import Ranks, join_ranks
from ..keyed import generator
from ..recipe import DataRecipe
from .captioner import DESCRIBE, RULES, Captioner, Perturber, RulePerturber, load_captioner, load_perturber
from .convert import Converted, ConvertOptions, convert_pairs, open_work
from .files import make_folder, write_atomic
from .images import ImageError
from .perturb import LEVELS
from .readers import read_pairs
from .reading import Progress
from .rows import PairRow
from .rowtable import PairRows

STRATEGIES = ("caption", "perturb", "hybrid")
SETTINGS = "settings.json"


@dataclass(frozen=True)
class CaptionOptions:
    """What the captions are. ``caption``: each picture as the captioner sees it (DCPO-c). ``perturb``: the prompt for
    the winner, a perturbed one for the loser (DCPO-p). ``hybrid``: both captioned, the loser's then perturbed (DCPO-h).

    ``captioner``, ``perturber``: models by folder or hub id, or ``rules`` for the latter. ``level``: of perturbation.
    ``tokenizer``: the perturber's, where it is not with it. ``instruction``: what a chat model is told, {prompt} in it
    is the pair's prompt. ``batch``: pairs at a time; like ``seed`` it decides what is sampled."""

    strategy: Literal["caption", "perturb", "hybrid"] = "perturb"
    captioner: str | None = None
    perturber: str = RULES
    level: str = "medium"
    tokenizer: str | None = None
    instruction: str = DESCRIBE
    max_tokens: int = 128
    batch: int = 8
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Raises UserError for values that make no sense together, before anything is loaded."""
        if self.strategy not in STRATEGIES:
            raise UserError(f"unknown strategy '{self.strategy}'{nearest(self.strategy, STRATEGIES)}")
        if self.level not in LEVELS:
            raise UserError(f"unknown level '{self.level}'{nearest(self.level, LEVELS)}")
        if self.strategy != "perturb" and not self.captioner:
            raise UserError(
                f"strategy '{self.strategy}' needs an image-to-text model: --captioner FOLDER_OR_HUB_ID, such as "
                "Salesforce/blip-image-captioning-large; --strategy perturb needs none"
            )
        if self.strategy == "perturb" and self.captioner:
            raise UserError("strategy 'perturb' looks at no picture; leave --captioner out, or say --strategy hybrid")
        if self.batch < 1 or self.max_tokens < 1:
            raise UserError("--batch and --max-tokens must be at least 1")

    def settings(self) -> dict[str, Any]:
        """What the texts depend on."""
        unused = {"caption": {"perturber", "level", "tokenizer"}, "perturb": {"captioner", "instruction", "max_tokens"}}
        left_out = unused.get(self.strategy, set()) | {"device"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True)
class Made:
    """The two captions of a pair. ``empty``: how often a model said nothing, so that the text before it stayed."""

    prompt: str
    rejected_prompt: str
    empty: int = 0


@dataclass
class Captions:
    """The `convert.Change` that puts captions into rows; the prompt goes to ``original_prompt``."""

    settings: Mapping[str, Any]
    made: dict[str, Made] = field(default_factory=dict)
    fields: tuple[str, ...] = ("rejected_prompt", "original_prompt")
    keeps: tuple[str, ...] = ("original_prompt",)

    def apply(self, row: PairRow, source: Mapping[str, Any]) -> tuple[PairRow, dict[str, Any]]:
        """The row with its captions."""
        made = self.made[row.id]
        original = source.get("original_prompt") or row.prompt
        changed = replace(row, prompt=made.prompt, rejected_prompt=made.rejected_prompt)
        return changed, {"original_prompt": str(original)}

    def counts(self) -> dict[str, int]:
        """For the account."""
        alike = sum(made.prompt == made.rejected_prompt for made in self.made.values())
        found = {"pairs captioned": len(self.made)}
        empty = sum(made.empty for made in self.made.values())
        return (
            found
            | ({"empty captions replaced by the text before": empty} if empty else {})
            | ({"pairs with two equal captions": alike} if alike else {})
        )


def caption_pairs(
    recipe: DataRecipe,
    target: Path,
    options: ConvertOptions,
    captions: CaptionOptions,
    progress: Progress | None = None,
) -> Converted:
    """Write the pairs of ``recipe.path`` to the folder ``target`` with ``prompt`` as the winner's caption,
    ``rejected_prompt`` as the loser's, and the prompt that both were drawn for in ``original_prompt``.

    What is perturbed is the loser's own caption where the row has one, so that captioning and perturbing may be two
    commands. A model that says nothing for a picture leaves the text before it; how often is counted.

    Raises:
        UserError: as ``convert_pairs``; options that do not fit, a model that is none, a captioner that never says
            anything. RunError: memory or disk full. Interrupted: by Ctrl-C; what was captioned is kept.
    """
    captions.check()
    ranks = join_ranks(captions.device)
    change = Captions(captions.settings())
    work = open_work(recipe, target, options, change)
    try:
        done = work.done()
        settings = work.settings
    finally:
        work.close()
    ranks.barrier()
    if done is not None:
        return done
    rows = read_pairs(recipe).rows
    assert isinstance(rows, PairRows)
    folder = target.absolute().parent / f".{target.name}.captions"
    log = Log(folder, {name: settings[name] for name in ("state", "recipe", "change")}, ranks)
    try:
        _make(rows, captions, recipe, log, ranks, progress)
    except KeyboardInterrupt as error:
        raise Interrupted("stopped; the captions made so far are kept, the same command goes on") from error
    except torch.OutOfMemoryError as error:
        raise RunError("out of memory; lower --batch (captions made so far are kept)") from error
    finally:
        log.close()
    ranks.barrier()
    change.made = log.read()
    if sum(m.empty for m in change.made.values()) >= (1 if captions.strategy == "perturb" else 2) * len(change.made):
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"'{captions.captioner or captions.perturber}' gave no text for any pair; take another model")
    if ranks.main:
        result = convert_pairs(recipe, target, options, None, change)
        shutil.rmtree(folder, ignore_errors=True)
    ranks.barrier()
    return result if ranks.main else convert_pairs(recipe, target, options, None, change)


class Log:
    """Captions as they were made, one line a pair, a file a process; thrown away when they were made otherwise."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], ranks: Ranks) -> None:
        self.folder = folder
        if ranks.main:
            now = json.dumps(settings, sort_keys=True)
            file = folder / SETTINGS
            if not file.is_file() or file.read_text(encoding="utf-8") != now:
                shutil.rmtree(folder, ignore_errors=True)
                make_folder(folder)
                write_atomic(file, now.encode())
        ranks.barrier()
        self.done = self.read()
        ranks.barrier()
        own = folder / f"{ranks.rank}.jsonl"
        whole = own.read_bytes().rpartition(b"\n")[0] if own.is_file() else b""
        self.file: IO[bytes] = open(own, "ab")  # noqa: SIM115  closed by close
        self.file.truncate(len(whole) + bool(whole))

    def read(self) -> dict[str, Made]:
        """What all processes made so far, by the ids of the rows."""
        found = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last one was torn
                values = json.loads(line)
                name = values.pop("id")
                found[name] = Made(**values)
        return found

    def add(self, made: Mapping[str, Made]) -> None:
        """A batch, on the disk when this returns."""
        lines = [json.dumps({"id": name, **asdict(texts)}) + "\n" for name, texts in made.items()]
        self.file.write("".join(lines).encode())
        self.file.flush()

    def close(self) -> None:
        """No more."""
        self.file.close()


def _make(
    rows: PairRows, options: CaptionOptions, recipe: DataRecipe, log: Log, ranks: Ranks, progress: Progress | None
) -> None:
    """This process's batches. They are cut from the list of all rows, so that a second start makes the very same."""
    batches = range(ranks.rank, -(-len(rows) // options.batch), ranks.world)
    models: tuple[Captioner | None, Perturber | None] | None = None
    for count, number in enumerate(batches, 1):
        part = rows[number * options.batch : (number + 1) * options.batch]
        if any(row.id not in log.done for row in part):
            if models is None:
                models = _load(options)
            log.add(dict(_captioned(part, options, recipe, *models)))
        if progress is not None:
            progress(count, len(batches))


def _load(options: CaptionOptions) -> tuple[Captioner | None, Perturber | None]:
    if options.strategy == "perturb" and options.perturber == RULES:
        return None, RulePerturber(options.level, options.seed)
    from ..families.device import pick_device, pick_dtype

    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    captioner = perturber = None
    if options.strategy != "perturb":
        assert options.captioner is not None
        captioner = load_captioner(options.captioner, device, dtype, options.instruction, options.max_tokens)
    if options.strategy != "caption":
        perturber = load_perturber(options.perturber, options.level, device, dtype, options.tokenizer, options.seed)
    return captioner, perturber


def _captioned(
    rows: list[PairRow],
    options: CaptionOptions,
    recipe: DataRecipe,
    captioner: Captioner | None,
    perturber: Perturber | None,
) -> Iterator[tuple[str, Made]]:
    """Ids and captions of one batch of pairs."""
    winners = [row.prompt for row in rows]
    losers = [row.rejected_prompt or row.prompt for row in rows]
    empty = [0] * len(rows)
    if captioner is not None:
        refs = [row.chosen for row in rows] + [row.rejected for row in rows]
        try:
            pictures = [ref.load(recipe.alpha) for ref in refs]
        except ImageError as error:
            raise RunError(f"a picture cannot be read ({error}); captions so far are kept, start again") from error
        said = captioner(pictures, [row.prompt for row in rows] * 2)
        for texts, own in ((winners, said[: len(rows)]), (losers, said[len(rows) :])):
            _take(texts, own, empty)
    if perturber is not None:
        seed = int(generator(options.seed, "perturb-batch", rows[0].id).integers(2**31))
        _take(losers, perturber(losers, seed), empty)
    for row, winner, loser, count in zip(rows, winners, losers, empty, strict=True):
        yield row.id, Made(winner, loser, count)


def _take(texts: list[str], said: list[str], empty: list[int]) -> None:
    """What was said in the place of the texts, where something was."""
    for i, text in enumerate(said):
        if text.strip():
            texts[i] = text
        else:
            empty[i] += 1
