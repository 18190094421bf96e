"""What the doctor found: a level, a line, and the command that mends it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

Level = Literal["ok", "note", "warning", "error"]
STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    """``topic`` is one of `TOPICS`; ``mend`` is empty where there is nothing to do."""

    level: Level
    topic: str
    text: str
    mend: str = ""


@dataclass
class Report:
    """All findings, by topic. An error is what stops training or sampling here; anything less does not."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """1 when there is an error, else 0."""
        return int(any(found.level == "error" for found in self.findings))

    def json(self) -> dict[str, Any]:
        """For programs: the findings, and how many there are of each level."""
        counts = {level: sum(found.level == level for found in self.findings) for level in STYLES}
        return {"counts": counts, "findings": [asdict(found) for found in self.findings]}

    def render(self, console: Console) -> None:
        """For people: a line for each finding, its mend below it."""
        topic = ""
        for found in self.findings:
            if found.topic != topic:
                topic = found.topic
                console.print(topic, style="bold", markup=False)
            console.print(f"  {found.level:<8}", style=STYLES[found.level], end="", markup=False)
            console.print(found.text, markup=False)
            if found.mend:
                console.print(f"          -> {found.mend}", markup=False)
        counts = self.json()["counts"]
        shown = ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n and level != "ok")
        console.print(shown or "all is well", markup=False)
