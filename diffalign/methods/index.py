"""``python -m diffalign.methods.index``: writes index.json and the table of docs/methods.md from the classes.

Listings read the file and so import no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import method_class, method_modules


def build_index() -> list[dict[str, Any]]:
    """One row a method, from its class."""
    rows = []
    for name, module in method_modules().items():
        cls = method_class(name)
        schema = cls.Config.model_json_schema()["properties"] if cls.Config.model_fields else {}
        rows.append(
            {
                "name": name,
                "group": module.split(".")[-2],
                "title": cls.paper.title,
                "arxiv": cls.paper.arxiv,
                "implements": cls.paper.implements,
                "differs": cls.paper.differs,
                "needs": cls.needs.batch,
                "roles": list(cls.roles),
                "phases": [phase.name for phase in cls.phases],
                "options": {
                    key: {"default": value.get("default"), "help": value.get("description", "")}
                    for key, value in schema.items()
                },
            }
        )
    return rows


START, END = "<!-- methods: written by `make index` -->", "<!-- end of methods -->"


def table(rows: list[dict[str, Any]]) -> str:
    """The methods as a Markdown table."""
    lines = ["| method | paper | needs | what is implemented |", "|---|---|---|---|"]
    for row in rows:
        paper = f"[{row['title']}](https://arxiv.org/abs/{row['arxiv']})" if row["arxiv"] else row["title"]
        lines.append(f"| `{row['name']}` | {paper} | {row['needs']} | {row['implements']} |")
    return "\n".join(lines)


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with its table renewed between the two marks."""
    head, _, rest = page.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n{table(rows)}\n{END}{tail}"


if __name__ == "__main__":
    found = build_index()
    Path(__file__).with_name("index.json").write_text(json.dumps(found, indent=1) + "\n")
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    page.write_text(with_table(page.read_text(), found))
