"""What every test shares: no network, few threads, markers, and a tiny random model."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from pathlib import Path

# Before any import of a Hugging Face library: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing of a person's own cache is read or written; the folder goes with this process.
os.environ["DIFFALIGN_CACHE"] = tempfile.mkdtemp(prefix="diffalign-tests-")

import pytest
import torch
import torchvision_hook

torchvision_hook.load()  # before transformers or diffusers look for it
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["DIFFALIGN_CACHE"], ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run when asked for, by --run-slow or by -m; gpu tests run where there is a CUDA device."""
    ask_slow = config.getoption("--run-slow") or "slow" in config.getoption("markexpr")
    slow = pytest.mark.skip(reason="slow: run by name with `make test-slow`")
    gpu = pytest.mark.skip(reason="gpu: no CUDA device here")
    for item in items:
        if item.get_closest_marker("slow") and not ask_slow:
            item.add_marker(slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(gpu)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the libraries made stays to the end: without it a full collection takes a millisecond, not a third of a
    second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD1.x pipeline in the diffusers layout, shared by the session: read it, never write into it."""
    from tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL pipeline in the diffusers layout, shared by the session: read it, never write into it."""
    from tiny import tiny_sdxl_pipeline

    folder = tmp_path_factory.mktemp("tiny-sdxl")
    tiny_sdxl_pipeline().save_pretrained(folder)
    return folder
