"""What is installed: the wheel against the tracked files, and that it works without the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("eval", "pipelines", "configs", "assets")
HEAVY = ("torch", "diffusers", "transformers", "datasets", "scipy", "matplotlib", "peft", "accelerate")


def tracked() -> list[str]:
    """Tracked files that are there, relative to the checkout."""
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in out.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tracked files, with what a used checkout also has lying about."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    for folder in ("diffalign", *MAPPED):
        (copy / folder / "__pycache__").mkdir()
        (copy / folder / "__pycache__" / "junk.cpython-311.pyc").touch()
        (copy / folder / ".DS_Store").touch()
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("*.whl")
    return found


def test_wheel_holds_exactly_the_tracked_package_files(wheel: Path) -> None:
    expected = set()
    for name in tracked():
        top = name.split("/")[0]
        if top in MAPPED:
            expected.add(f"diffalign/{name}")
        elif top == "diffalign":
            expected.add(name)
    names = zipfile.ZipFile(wheel).namelist()
    found = {n for n in names if ".dist-info/" not in n and not n.endswith("/")}
    assert found - expected == set(), "in the wheel, not tracked"
    assert expected - found == set(), "tracked, not in the wheel: packages or package-data of pyproject.toml"
    tops = {n.split("/")[0] for n in names}
    assert tops == {"diffalign", next(t for t in tops if t.endswith(".dist-info"))}
    assert any(n.endswith("licenses/LICENSE") for n in names)


def run_python(code: str, cwd: Path, path: Path | None = None) -> str:
    """The output of ``code`` in a new interpreter, with ``path`` first on its search path."""
    script = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}" if path else code
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOCATE = """
import importlib, importlib.resources, pathlib
for name in ("diffalign", "diffalign.eval", "diffalign.pipelines", "diffalign.configs", "diffalign.assets"):
    folder = pathlib.Path(str(importlib.resources.files(name)))
    assert folder.is_dir() and importlib.import_module(name).__doc__
    print(name, folder.resolve())
"""


def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(place)
    for line in run_python(LOCATE, tmp_path, place).splitlines():
        name, folder = line.split(" ", 1)
        assert folder == str((place / name.replace(".", "/")).resolve())


def test_editable_install_finds_the_mapped_folders(tmp_path: Path) -> None:
    for line in run_python(LOCATE, tmp_path).splitlines():
        name, folder = line.split(" ", 1)
        assert folder == str(ROOT / name.removeprefix("diffalign.").replace(".", "/"))


def test_constraints_name_what_is_installed() -> None:
    """The pins are those of the environment that runs this; torch's without its local build label."""
    from importlib.metadata import PackageNotFoundError, version

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    assert not any(name.lower() == "torchvision" for name in pins)
    wrong = {}
    for name, pin in pins.items():
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            found = "absent"
        if found != pin:
            wrong[name] = (pin, found)
    assert not wrong, f"constraints.txt against this environment (pin, installed): {wrong}"


def test_license_is_apache_2() -> None:
    words = " ".join((ROOT / "LICENSE").read_text().split())
    assert words.startswith("Apache License Version 2.0, January 2004") and "END OF TERMS AND CONDITIONS" in words


@pytest.mark.parametrize("name", ["one_gpu", "multi_gpu", "multi_node"])
def test_accelerate_files_are_read_by_accelerate(name: str) -> None:
    path = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    config = ClusterConfig.from_yaml_file(str(path))  # refuses unknown keys
    assert (config.num_processes > 1) == (name != "one_gpu") == (config.distributed_type.value == "MULTI_GPU")
    assert (config.num_machines > 1) == (name == "multi_node")
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"  # the recipe's train.precision decides


@pytest.mark.parametrize("what", ["import diffalign", "import diffalign.errors", "import diffalign.recipe"])
def test_light_imports_stay_light(what: str, tmp_path: Path) -> None:
    code = f"{what}; import sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code, tmp_path).strip() == "[]"
