"""Layers coded by other processes: what travels, and the same bits in the end."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.cluster import Cluster
from quantize.devices import Done, Job
from quantize.errors import QuantizeError
from quantize.pipeline import quantize_model
from quantize.report import Report
from tests.tiny import COARSE, read

pytest_plugins = ("tests.tiny_fixtures",)
CPU = torch.device("cpu")


def through_pickle(jobs: Sequence[Job], done: Done) -> list:
    """A cluster of one machine, which gets and gives bytes."""
    results = []
    for i, (_, work) in enumerate(jobs):
        results.append(pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(work))(CPU))))
        done(i, results[-1])
    return results


@pytest.mark.parametrize("update", [{}, {"bits": 4.0, "correction": 0.5}], ids=["fixed", "measured"])
def test_jobs_can_travel(tied: Path, text_file: Path, tmp_path: Path, update: dict) -> None:
    same_files(tied, text_file, tmp_path, update, through_pickle)


def same_files(model: Path, text: Path, folder: Path, update: dict, cluster: Any) -> None:
    recipe = COARSE.model_copy(update={"calibration": (str(text),), "device": "cpu"} | update)
    quantize_model(str(model), folder / "here", recipe, Report())
    quantize_model(str(model), folder / "there", recipe, Report(), cluster)
    here, there = read(folder / "here"), read(folder / "there")
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def test_without_ray_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(QuantizeError, match="pip install"):
        Cluster("auto")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Cluster]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield Cluster("local")
    ray.shutdown()


@pytest.mark.parametrize("update", [{}, {"bits": 4.0, "correction": 0.5}], ids=["fixed", "measured"])
def test_rays_workers_write_what_one_process_writes(
    tied: Path, text_file: Path, tmp_path: Path, update: dict, ray_cluster: Cluster
) -> None:
    same_files(tied, text_file, tmp_path, update, ray_cluster)


def test_an_error_in_a_worker_is_raised_here(ray_cluster: Cluster) -> None:
    with pytest.raises(QuantizeError, match=r"^layer 3$"):
        ray_cluster([(1.0, partial(fail, "layer 3"))], lambda i, result: None)


def fail(what: str, device: torch.device) -> None:
    raise QuantizeError(what)
