"""The searches by name and their settings. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import UserError, nearest

Count = Annotated[int, Field(ge=1)]


class SearchOptions(BaseModel):
    """Settings of a search; those of each are its fields. ``eta``: share of new noise in a step of DDIM."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: ClassVar[str]
    noisy: ClassVar[bool] = True  # whether it lives on steps that add noise

    eta: Annotated[float, Field(ge=0, le=1)] = 1.0

    def text(self) -> str:
        """As `parse_search` reads it."""
        given = [f"{key}={value}" for key, value in self.model_dump().items() if key in self.model_fields_set]
        return ":".join(filter(None, (self.name, ",".join(given))))


class BestOfN(SearchOptions):
    """N pictures by the model's ordinary sampler, the best one kept; N is what the budget holds. ``eta`` is for
    schedulers that take one."""

    name: ClassVar[str] = "best-of-n"
    noisy: ClassVar[bool] = False

    eta: Annotated[float, Field(ge=0, le=1)] = 0.0


class Beam(SearchOptions):
    """Latent beam search (Oshima et al., arXiv 2501.19252): ``beams`` samples under way, each with ``children``, of
    which the best ``beams`` go on. They are judged every ``every`` steps from step ``start`` on, by what ``lookahead``
    noiseless steps make of them; 1 is the network's own guess of the clean picture."""

    name: ClassVar[str] = "beam"

    beams: Count = 2
    children: Count = 2
    lookahead: Count = 1
    start: Annotated[int, Field(ge=0)] = 0
    every: Count = 1


class Greedy(SearchOptions):
    """SPO's step-wise resampling (arXiv 2406.04314) with the best of each pool of ``children`` going on, not a random
    one: a beam search of one beam. SPO begins at step 4 of 20 and, for SDXL, judges every 4 steps."""

    name: ClassVar[str] = "greedy"

    children: Count = 4
    start: Annotated[int, Field(ge=0)] = 0
    every: Count = 1

    def beam(self) -> Beam:
        """The beam search that it is."""
        return Beam(eta=self.eta, beams=1, children=self.children, start=self.start, every=self.every)


class Tree(SearchOptions):
    """Diffusion Tree Sampling and Search (Jain et al., arXiv 2506.20701); see `tree` for what is ours.

    ``mode``: ``search`` (DTS*) gives the best picture; ``sample`` (DTS) gives one drawn from the model's distribution
    times exp(reward / temperature). ``temperature``: of the soft values, in units of the reward; None, for a search
    alone: half the spread of the rewards found so far. ``exploration``: weight of UCT's bonus, in spreads.
    A node may have ``widening`` * visits ** ``growth`` children, rounded up."""

    name: ClassVar[str] = "tree"

    mode: Literal["search", "sample"] = "search"
    temperature: Annotated[float, Field(gt=0)] | None = None
    exploration: Annotated[float, Field(ge=0)] = 1.0
    widening: Annotated[float, Field(gt=0)] = 1.0
    growth: Annotated[float, Field(ge=0.1, le=1)] = 0.5


SEARCHES: dict[str, type[SearchOptions]] = {kind.name: kind for kind in (BestOfN, Beam, Greedy, Tree)}


def parse_search(text: str) -> SearchOptions:
    """``"beam"`` or ``"beam:beams=4,children=2"``. Raises UserError for what is not known or out of range."""
    name, _, rest = text.strip().partition(":")
    if name not in SEARCHES:
        raise UserError(f"unknown search '{name}'{nearest(name, SEARCHES)}")
    kind = SEARCHES[name]
    given: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if key not in kind.model_fields:
            raise UserError(f"search '{name}' has no setting '{key}'{nearest(key, kind.model_fields)}")
        if not sign or not value:
            raise UserError(f"search '{name}': '{part}' has no value; write {key}=VALUE")
        given[key] = value
    try:
        found = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"search '{name}': {where} {given.get(where, '')}: {first['msg']}") from error
    if isinstance(found, Tree) and found.mode == "sample" and found.temperature is None:
        raise UserError("search 'tree' with mode=sample draws from a tilted distribution: give its temperature=X too")
    return found
