"""`diffalign doctor`: broken packages, absent and unused GPUs, torn caches; each finding with its mend.

Here alone packages are faked: a torchvision that raises and a torch that crashes are what the doctor is for.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Result, installed

from diffalign.data.store import Store
from diffalign.doctor import caches, judge_caches
from diffalign.doctor.machine import disks, hub, judge_torch, nvidia
from diffalign.doctor.packages import bound_to_torch, judge_libraries, judge_torchvision, judge_xformers, requirements
from diffalign.doctor.probe import Probe, try_out
from diffalign.doctor.report import Finding, Report


def fake(folder: Path, name: str, code: str, requires: str = "", version: str = "9.9") -> Path:
    """A package that pip would think installed."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    asks = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{asks}")
    return folder


def command(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{text}")
    (folder / name).chmod(0o755)
    return folder


def doctor(tmp_path: Path, *words: object, **env: str) -> Result:
    cache = [] if "--cache" in words else ["--cache", tmp_path / "no-cache"]
    return installed("doctor", *cache, "--out", tmp_path, *words, timeout=500, **env)


def of(findings: list[Finding], topic: str, level: str) -> list[str]:
    return [found.text for found in findings if (found.topic, found.level) == (topic, level)]


TORCHVISION = 'raise RuntimeError("operator torchvision::nms does not exist")'
SMI = 'print("NVIDIA Test 9000, 24564, 24000, 550.1")'


def test_a_broken_torchvision_and_a_cpu_torch_on_a_gpu_machine(tmp_path: Path) -> None:
    """The whole command, on a machine with two faults that are common and one package built for another torch."""
    stubs = fake(tmp_path / "stubs", "torchvision", TORCHVISION, "torch==2.15.0", "0.29.2")
    path = command(tmp_path / "bin", "nvidia-smi", SMI)
    env = {"PYTHONPATH": str(stubs), "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    done = doctor(tmp_path, "--json", **env, HF_TOKEN="hf_secret", CUDA_VISIBLE_DEVICES="")
    assert done.status == 1 and not done.err, done.err
    found = json.loads(done.out)
    assert found["counts"]["error"] == sum(f["level"] == "error" for f in found["findings"]) >= 2
    by_topic = {(f["topic"], f["level"]): f for f in found["findings"]}
    broken = by_topic["packages", "error"]
    assert "torchvision::nms does not exist" in broken["text"] and "pip uninstall torchvision" in broken["mend"]
    assert "breaks diffusers and transformers" in broken["text"]
    assert "built for torch==2.15.0" in by_topic["packages", "warning"]["text"]
    if torch.version.cuda is None:
        assert "NVIDIA Test 9000, but torch is a CPU build" in by_topic["gpu", "error"]["text"]
    assert "offline" not in done.out and "hf_secret" not in done.out
    assert "a hub token is set (by HF_TOKEN)" in by_topic["hub", "ok"]["text"]
    assert all(f["mend"] for f in found["findings"] if f["level"] == "error")


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path: Path) -> None:
    """And the text for people: nothing is fallen over, and every other part is still looked at."""
    stubs = fake(tmp_path / "stubs", "torch", "import os\nos.abort()", version="2.99.0")
    done = doctor(tmp_path, PYTHONPATH=str(stubs), PATH="/nonexistent")
    assert done.status == 1 and not done.err
    lines = done.out.splitlines()
    error = next(i for i, line in enumerate(lines) if "error" in line)
    assert "torch 2.99.0 does not work: crashed (SIGABRT)" in lines[error] and "->" in lines[error + 1]
    assert any(line.startswith("hub") for line in lines) and "1 error" in lines[-1]


def test_probes_are_bounded_and_reported() -> None:
    assert try_out("import time; time.sleep(60)", limit=0.5).fault == "did not answer within 0.5 s"
    assert try_out("raise ValueError('a\\nb')").fault.startswith("b") or "ValueError" in try_out("1/0; ").fault
    assert try_out("import os; os.kill(os.getpid(), 11)").fault == "crashed (SIGSEGV)"
    assert try_out("print('x')").fault == "printed nothing that can be read"
    good = try_out("import sys, json; print('noise'); print(json.dumps({'a': sys.argv[1]}))", "b")
    assert good.ok and good.facts == {"a": "b"}


def test_what_is_asked_for_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By diffalign's own metadata, here a copy that asks for too much."""
    lines = "\nRequires-Dist: ".join(
        ["torch>=99", "nowhere-to-be-had>=1", 'lpips-nowhere>=1; extra == "lpips"', 'other>=1; sys_platform == "plan9"']
    )
    fake(tmp_path, "diffalign", "", lines)
    monkeypatch.syspath_prepend(tmp_path)
    found = requirements()
    texts = {f.text.partition(" ")[0]: f for f in found}
    assert texts["nowhere-to-be-had"].level == "error" and "pip install" in texts["nowhere-to-be-had"].mend
    assert texts["torch"].level == "error" and "asks for >=99" in texts["torch"].text
    assert texts["[lpips]"].level == "note" and "diversity" in texts["[lpips]"].text and len(found) == 3
    fake(tmp_path, "xformers", "", "torch==1.0")
    assert [f.level for f in bound_to_torch() if "xformers" in f.text] == ["warning"]
    assert "built for torch==1.0" in next(f.text for f in bound_to_torch() if "xformers" in f.text)


def test_verdicts_on_packages() -> None:
    good, bad = Probe(), Probe(fault="ImportError: no")
    assert judge_torchvision(bad, bad)[0].level == "error" and judge_torchvision(bad, good)[0].level == "warning"
    assert judge_libraries(bad, None)[0].level == "error"
    assert judge_libraries(bad, bad) == [], "said once, by the torchvision that breaks them"
    unfit = Probe(
        said="WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions. xFormers was built for: PyTorch 1.0"
    )
    assert judge_xformers(unfit)[0].level == "warning" and judge_xformers(good)[0].level == "ok"


def facts(**changes: Any) -> Probe:
    base = {"version": "2.13.0", "cuda": "13.0", "hip": None, "mps": False, "threads": 1, "gpus": [], "said": []}
    return Probe({**base, **changes})


def test_verdicts_on_gpus() -> None:
    gpu = {"name": "Card", "total": 24 << 30, "free": 23 << 30, "capability": [8, 6], "bf16": True}
    assert [f.level for f in judge_torch(facts(gpus=[gpu]), None)] == ["ok", "ok"]
    assert "bf16" in judge_torch(facts(gpus=[gpu]), None)[1].text
    busy = {**gpu, "free": 4 << 30, "bf16": False}
    found = judge_torch(facts(gpus=[busy]), [])
    assert [f.level for f in found] == ["ok", "ok", "note"] and "fp16" in found[1].text and "20.0 GiB" in found[2].text
    dead = {**gpu, "fault": "no kernel image is available"}
    assert "no kernel image" in of(judge_torch(facts(gpus=[dead]), None), "gpu", "error")[0]
    old = judge_torch(facts(said=["The NVIDIA driver on your system is too old"]), [{"name": "Card"}])
    assert "driver on your system is too old" in of(old, "gpu", "error")[0]
    assert "an NVIDIA GPU, but torch is a CPU build" in of(judge_torch(facts(cuda=None), []), "gpu", "error")[0]
    assert of(judge_torch(facts(cuda=None), None), "gpu", "note")
    assert of(judge_torch(Probe(fault="ImportError: libc10"), None), "torch", "error")


def test_the_driver_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(command(tmp_path / "bin", "nvidia-smi", SMI)))
    assert nvidia() == [{"name": "NVIDIA Test 9000", "total": "24564", "free": "24000", "driver": "550.1"}]
    command(tmp_path / "bin", "nvidia-smi", "raise SystemExit(9)")
    monkeypatch.setattr("diffalign.doctor.machine.DRIVER", tmp_path / "version")
    assert nvidia() is None
    (tmp_path / "version").touch()
    assert nvidia() == []


def test_disks_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = disks({"cache": tmp_path / "not" / "yet"})
    assert len(found) == 1 and "GiB free" in found[0].text
    monkeypatch.setattr("diffalign.doctor.machine.TIGHT", 1e9)
    assert disks({"runs": tmp_path})[0].level == "warning" and "output.dir" in disks({"runs": tmp_path})[0].mend
    monkeypatch.setattr("diffalign.doctor.machine.LITTLE", 1e9)
    assert disks({"runs": tmp_path})[0].level == "error"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert any("HF_HUB_OFFLINE" in text for text in of(hub(), "hub", "note"))
    assert any("no hub token" in text for text in of(hub(), "hub", "note"))
    (tmp_path / "token").write_text("hf_secret")
    assert of(hub(), "hub", "ok") == ["a hub token is set (by its file)"]


def store(root: Path, name: str, keys: list[str], **made_by: str) -> Store:
    made = Store(root / name, {"vae": "abc", **made_by})
    made.repair()
    for key in keys:
        made.write([key], {"mean": torch.randn(1, 4, 8, 8)})
    return made


def test_the_cache_is_counted_and_left_as_it_is(tmp_path: Path) -> None:
    keys = [f"{i:032x}" for i in range(4)]
    root = tmp_path / "cache"
    good = store(root, "pictures-1", keys)
    store(root, "prompts-1", keys[:1], code="0")
    cut, altered, foreign, _ = sorted(good.folder.glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-10])
    data = bytearray(altered.read_bytes())
    data[-1] ^= 1
    altered.write_bytes(data)
    foreign.write_bytes(next((root / "prompts-1").glob("*.safetensors")).read_bytes())
    left = good.folder / ".x.safetensors.1.tmp"
    left.touch()
    os.utime(left, (1, 1))
    (root / "nameless").mkdir()
    (root / "nameless" / ("0" * 32 + ".safetensors")).write_bytes(b"?")
    (root / "scans").mkdir()
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*")}

    quick = {Path(h.folder).name: h for h in map(caches.look_at, caches.stores(root))}
    assert set(quick) == {"pictures-1", "prompts-1", "nameless"}
    health = quick["pictures-1"]
    assert (health.whole, len(health.torn), health.stale, health.rows, health.leftovers) == (2, 1, 1, 2, 1)
    assert quick["nameless"].nameless and quick["prompts-1"].outdated and not health.outdated
    full = caches.look_at(good.folder, thorough=True)
    assert (full.whole, len(full.torn)) == (1, 2), "an altered byte is seen by reading all of it"
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*")} == before

    from dataclasses import asdict

    found = judge_caches(Probe({"stores": [asdict(h) for h in quick.values()]}), root)
    assert [f.level for f in found] == ["ok", "warning", "warning", "warning", "note", "note"]
    assert "3 stores, 3 whole shards, 3 entries" in found[0].text
    assert judge_caches(Probe(fault="x"), root)[0].level == "warning"
    assert judge_caches(Probe(), tmp_path / "none")[0].level == "ok"


def test_only_an_error_is_an_exit_status() -> None:
    levels = ("ok", "note", "warning")
    report = Report([Finding(level, "gpu", "x") for level in levels])  # type: ignore[arg-type]
    assert report.exit_status == 0 and report.json()["counts"] == {"ok": 1, "note": 1, "warning": 1, "error": 0}
    report.findings.append(Finding("error", "gpu", "x", "y"))
    assert report.exit_status == 1
