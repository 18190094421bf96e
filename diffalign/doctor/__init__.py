"""`diffalign doctor`: what this machine can run, and what to install or change. Changes nothing, imports no torch.

Whatever may be broken is tried in processes of its own, so that a broken torch is a finding too.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .machine import TORCH, disks, hub, hub_home, judge_torch, nvidia, processors
from .packages import (
    BITSANDBYTES,
    LIBRARIES,
    TORCHVISION,
    XFORMERS,
    bound_to_torch,
    judge_bitsandbytes,
    judge_libraries,
    judge_torchvision,
    judge_xformers,
    requirements,
    version_of,
    versions,
)
from .probe import LIMIT, Probe, try_out
from .report import Finding, Report

__all__ = ["Finding", "Report", "examine"]

CACHES = """
import sys
from pathlib import Path
from diffalign.doctor.caches import main
main(Path(sys.argv[1]), "--thorough" in sys.argv[2:])
"""


def examine(
    cache: Path | None = None, output: Path = Path("runs"), thorough: bool = False, limit: float = LIMIT
) -> Report:
    """Every finding about this machine.

    Args:
        cache: the cache folder, default as training finds it.
        output: where runs will be written.
        thorough: read and hash every cache shard, not only its header.
        limit: seconds that each thing that is tried may take (the cache: none when thorough).
    """
    from ..data.files import default_root

    root = cache or default_root()
    codes = {"torch": TORCH, "libraries": LIBRARIES}
    codes |= {
        name: code
        for name, code in (("torchvision", TORCHVISION), ("xformers", XFORMERS), ("bitsandbytes", BITSANDBYTES))
        if version_of(name) is not None
    }
    patience = 24 * 3600.0 if thorough else limit
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        waiting = {name: pool.submit(try_out, code, limit=limit) for name, code in codes.items()}
        flags = ["--thorough"] if thorough else []
        stores = pool.submit(try_out, CACHES, str(root), *flags, limit=patience)
        cards = nvidia()
        tried = {name: job.result() for name, job in waiting.items()}
        found_stores = stores.result()
    findings = [*versions(), *requirements(), *bound_to_torch()]
    torchvision = tried.get("torchvision")
    if torchvision is not None:
        findings += judge_torchvision(torchvision, tried["libraries"])
    if tried["torch"].ok:  # a broken torch breaks all else, and is said once
        findings += judge_libraries(tried["libraries"], torchvision)
        findings += judge_xformers(tried["xformers"]) if "xformers" in tried else []
        findings += judge_bitsandbytes(tried["bitsandbytes"]) if "bitsandbytes" in tried else []
    findings += judge_torch(tried["torch"], cards)
    findings += processors(tried["torch"])
    findings += disks({"cache": root, "runs": output.absolute(), "hub models": hub_home()})
    findings += judge_caches(found_stores, root)
    findings += hub()
    order = list(dict.fromkeys(["packages", "extras", "torch", "gpu", "machine", "disk", "cache", "hub"]))
    return Report(sorted(findings, key=lambda found: order.index(found.topic)))


def judge_caches(probe: Probe, root: Path) -> list[Finding]:
    """What is in the cache folder: whole, torn, stale and outdated shards."""
    if not root.is_dir():
        return [Finding("ok", "cache", f"there is no cache yet at '{root}'")]
    if not probe.ok:
        return [Finding("warning", "cache", f"the cache at '{root}' could not be looked at: {probe.fault}")]
    found: list[Finding] = []
    stores = probe.facts["stores"]
    total, rows = sum(s["bytes"] for s in stores), sum(s["rows"] for s in stores)
    shards = sum(s["whole"] for s in stores)
    text = f"{len(stores)} stores, {shards} whole shards, {rows} entries, {total / 2**20:.1f} MiB at '{root}'"
    found.append(Finding("ok", "cache", text))
    for store in stores:
        folder = store["folder"]
        if store["nameless"]:
            text = f"'{folder}' has no readable cache.json, so none of it is used"
            found.append(Finding("warning", "cache", text, f"rm -r '{folder}'"))
            continue
        if store["torn"]:
            text = f"{len(store['torn'])} torn shards in '{folder}', such as {store['torn'][0]}"
            found.append(Finding("warning", "cache", text, "none needed: the next run deletes and encodes them anew"))
        if store["stale"]:
            text = f"{store['stale']} shards in '{folder}' were made by other weights or settings"
            found.append(
                Finding("warning", "cache", text, "none needed: they are never used, and the next run deletes them")
            )
        if store["outdated"]:
            text = f"'{folder}' was written by another version of diffalign and is not used"
            found.append(Finding("note", "cache", text, f"rm -r '{folder}'"))
        if store["leftovers"]:
            text = f"{store['leftovers']} files of killed processes in '{folder}'"
            found.append(Finding("note", "cache", text, "none needed: the next run deletes them"))
    return found
