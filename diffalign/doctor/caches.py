"""Health of the stores under a cache folder, read and never written.

Runs as `python -m diffalign.doctor.caches ROOT [--thorough]` in a process of its own, since reading them needs torch.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..data.files import STALE_SECONDS
from ..data.layout import CODE
from ..data.store import NAME, Shard, TornShard, fingerprint_of, maker_of


@dataclass
class StoreHealth:
    """One store: shards that are whole, torn or made by something else (``stale``); rows and bytes of the whole ones;
    files that killed processes left. ``nameless``: its cache.json is gone or torn; ``outdated``: another version of
    the code made it. Neither is ever used."""

    folder: str
    whole: int = 0
    torn: list[str] = field(default_factory=list)
    stale: int = 0
    rows: int = 0
    bytes: int = 0
    leftovers: int = 0
    nameless: bool = False
    outdated: bool = False


def look_at(folder: Path, thorough: bool = False) -> StoreHealth:
    """Opens every shard of a store; ``thorough`` reads and hashes all of it."""
    health = StoreHealth(str(folder))
    made_by = maker_of(folder)
    health.nameless = made_by is None
    health.outdated = made_by is not None and made_by.get("code", CODE) != CODE
    fingerprint = fingerprint_of(made_by or {})
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") and path.name.endswith(".tmp"):
            health.leftovers += time.time() - path.stat().st_mtime > STALE_SECONDS
        elif NAME.fullmatch(path.name):
            try:
                shard = Shard.open(path, fingerprint)
                if thorough:
                    shard.verify()
            except TornShard as error:
                if "made by" in str(error):
                    health.stale += 1
                else:
                    health.torn.append(f"{path.name}: {error}")
            else:
                health.whole += 1
                health.rows += len(shard.keys)
                health.bytes += shard.size
    return health


def stores(root: Path) -> list[Path]:
    """Folders of stores under a cache folder: those with a cache.json, or with shards."""
    if not root.is_dir():
        return []
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    return [p for p in folders if (p / "cache.json").is_file() or any(NAME.fullmatch(f.name) for f in p.iterdir())]


def main(root: Path, thorough: bool) -> None:
    """Prints the health of every store as one line of JSON."""
    print(json.dumps({"stores": [asdict(look_at(folder, thorough)) for folder in stores(root)]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--thorough" in sys.argv[2:])
