"""Partitions of prompts for multi-student distillation (MSD, arXiv 2410.23274): which student a prompt is for.

By words, where the first part that has one of a prompt's words takes it and the part without words takes the rest; or
by clusters, where the nearest centre of the prompts' text features does. Either way each prompt has exactly one part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

FILE = "partition.json"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # of a part: it names files and adapters
Features = Callable[[Sequence[str]], "Tensor"]  # texts -> (N, d) of unit length


class Partition(BaseModel):
    """The contents of partition.json. ``words`` or ``centres`` is the rule; ``students`` says where the students are
    that do not lie in folders of their part's name beside the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal[1] = 1
    words: dict[Name, list[str]] | None = None
    centres: dict[Name, list[float]] | None = None
    students: dict[Name, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole(self) -> Partition:
        if (self.words is None) == (self.centres is None):
            raise ValueError("a partition is by words or by centres")
        if self.words is not None:
            rest = [name for name, found in self.words.items() if not found]
            if len(rest) != 1:
                raise ValueError(
                    f"exactly one part must have no words, for all other prompts; here {len(rest)} have none"
                )
            if any(not word.strip() for found in self.words.values() for word in found):
                raise ValueError("a word is empty")
        if self.centres is not None and len({len(centre) for centre in self.centres.values()}) != 1:
            raise ValueError("centres must have as many numbers, one another")
        if odd := self.students.keys() - set(self.names):
            raise ValueError(f"there is no part '{sorted(odd)[0]}'{nearest(sorted(odd)[0], self.names)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The parts, in order."""
        return tuple(self.words if self.words is not None else self.centres or ())

    def part_of(self, prompts: Sequence[str], features: Features | None = None) -> list[str]:
        """The part of each prompt. ``features`` is called for a partition by clusters, and has to be that of the model
        which the centres were found with.

        Raises UserError where its vectors have another length than the centres."""
        if self.words is not None:
            return [self._by_words(prompt) for prompt in prompts]
        import torch

        assert features is not None and self.centres is not None
        centres = torch.tensor(list(self.centres.values()))
        found = features(prompts).float().cpu()
        if found.shape[1] != centres.shape[1]:
            raise UserError(
                f"this partition's centres have {centres.shape[1]} numbers and the model's text features "
                f"{found.shape[1]}; take the model that they were found with"
            )
        return [self.names[k] for k in torch.cdist(found, centres).argmin(1).tolist()]

    def _by_words(self, prompt: str) -> str:
        assert self.words is not None
        rest = ""
        for name, words in self.words.items():
            if any(re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", prompt, re.IGNORECASE) for word in words):
                return name
            rest = rest if words else name
        return rest

    def student(self, name: str, folder: Path) -> str:
        """Where the student of a part is; ``folder`` is that of the file, from which relative paths count."""
        given = Path(self.students.get(name, name)).expanduser()
        beside = folder / given
        return str(beside if given.is_absolute() or beside.exists() or name not in self.students else given)

    def save(self, folder: Path) -> Path:
        """Writes partition.json into ``folder``."""
        from .checkpoint import write_atomic

        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / FILE, json.dumps(self.model_dump(exclude_none=True), indent=1) + "\n")
        return folder / FILE


def read_partition(path: str | Path) -> tuple[Partition, Path]:
    """A partition from its file or folder, and the folder.

    Raises UserError when there is none, or it is damaged."""
    place = Path(path).expanduser()
    file = place / FILE if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"there is no partition at '{path}'; `diffalign pairs split` writes one")
    try:
        return Partition.model_validate(json.loads(file.read_text(encoding="utf-8"))), file.parent
    except ValidationError as error:
        raise UserError(f"'{file}' is no partition: {_reason(error)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read ({' '.join(str(error).split())})") from error


def by_words(words: Mapping[str, Any]) -> Partition:
    """A partition by words: part -> words, one part of them without (null or an empty list).

    Raises UserError where it is none."""
    try:
        if not all(found is None or isinstance(found, list) for found in words.values()):
            raise UserError("these parts are no partition: each part needs a list of words")
        return Partition(words={str(name): [str(w) for w in found or []] for name, found in words.items()})
    except ValidationError as error:
        raise UserError(f"these parts are no partition: {_reason(error)}") from None


def by_clusters(features: Tensor, count: int, rounds: int = 100) -> Partition:
    """K-means of text features (N, d): ``count`` centres, each the mean of the prompts that are nearest to it.

    The first centre is the prompt nearest to the mean of all, each further one the prompt farthest from those before:
    no draw, so that the same prompts give the same parts.

    Raises UserError for fewer different prompts than parts."""
    import torch

    x = features.float()
    distinct = len(torch.unique(x, dim=0))
    if not 1 <= count <= distinct:
        raise UserError(f"{count} parts cannot be made of {distinct} different prompts; ask for 1 to {distinct}")
    picked = [int((x - x.mean(0)).square().sum(1).argmin())]
    while len(picked) < count:
        picked.append(int(torch.cdist(x, x[picked]).amin(1).argmax()))
    centres = x[picked]
    for _ in range(rounds):
        nearest_to = torch.cdist(x, centres).argmin(1)
        moved = torch.stack(
            [x[nearest_to == k].mean(0) if (nearest_to == k).any() else centres[k] for k in range(count)]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    return Partition(centres={str(k): centre.tolist() for k, centre in enumerate(centres)})


def text_features(tokenizer: Any, encoder: Any, prompts: Sequence[str], batch: int = 64) -> Tensor:
    """What a CLIP text encoder says of whole prompts, its pooled output at unit length: (N, d)."""
    import torch

    found = []
    with torch.no_grad():
        for start in range(0, len(prompts), batch):
            tokens = tokenizer(
                list(prompts[start : start + batch]),
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            )
            said = encoder(tokens.input_ids.to(encoder.device))
            pooled = said.pooler_output if hasattr(said, "pooler_output") else said.text_embeds
            found.append(torch.nn.functional.normalize(pooled.float(), dim=1))
    return torch.cat(found)


def features_of(model: str) -> Features:
    """`text_features` by the first text encoder of a model (folder, hub id, built-in name).

    Raises UserError when the model cannot be opened."""
    import torch

    from .families import load_model
    from .recipe import ModelRecipe

    parts = load_model(ModelRecipe(path=model), torch.device("cpu"), torch.float32).parts()
    return lambda prompts: text_features(parts["tokenizer"], parts["text_encoder"], prompts)


def split_prompts(source: str, folder: Path, partition: Partition, features: Features | None = None) -> dict[str, int]:
    """Writes partition.json and the prompts of each part, as PART.tsv with their ids, which ``data.path`` takes;
    returns how many each has.

    Raises UserError for unreadable prompts, and for a part that no prompt is in."""
    import csv
    import io

    from .checkpoint import write_atomic
    from .eval.prompts import read_prompts

    prompts = read_prompts(source)
    parts = partition.part_of([p.prompt for p in prompts], features)
    counts = {name: parts.count(name) for name in partition.names}
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise UserError(f"no prompt of '{source}' is in part '{empty[0]}'; leave it out, or bring prompts for it")
    folder.mkdir(parents=True, exist_ok=True)
    for name in partition.names:
        text = io.StringIO()
        table = csv.writer(text, delimiter="\t", lineterminator="\n")
        table.writerow(["id", "prompt"])
        table.writerows([p.id, p.prompt] for p, part in zip(prompts, parts, strict=True) if part == name)
        write_atomic(folder / f"{name}.tsv", text.getvalue())
    partition.save(folder)
    return counts


def _reason(error: ValidationError) -> str:
    fault = error.errors()[0]
    where = ".".join(map(str, fault["loc"]))
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}".lstrip(": ")
