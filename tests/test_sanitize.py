"""``scripts/sanitize.sh`` without a GPU: its families reach all kernels, and how it tells what the sanitizer said."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantize import native
from tests import sanitize
from tests.packers import Plan, flat
from tests.shards import CPU, fused_layer
from vllm_vptq.build.cache import sources
from vllm_vptq.layouts import stationary
from vllm_vptq.layouts.work import ABSENT, Kind

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "sanitize.sh"


def test_every_kernel_belongs_to_a_family():
    found = set()
    for file in [*(sources() / "cuda").iterdir(), *(sources() / "quantize").iterdir()]:
        for signature in re.findall(r"__global__([^{]*)\{", file.read_text()):
            found.add(re.findall(r"\b(\w+)\(const|\b(\w+)\(Stream|\b(\w+)\(float", signature)[-1])
    names = {next(filter(None, groups)) for groups in found}
    assert len(names) > 10
    assert names == {kernel for family in sanitize.FAMILIES.values() for kernel in family.kernels}


def plans(family: str):
    """The plan of each layer of a family as an H200 gets it, and the variants that its calls take."""
    for case in sanitize.FAMILIES[family].cases:
        shards, _ = fused_layer(case.specs())
        shared = sanitize.SMALL_SHARED_BYTES if sanitize.FAMILIES[family].small else stationary.SHARED_BYTES
        gpu = stationary.Gpu(132, not sanitize.FAMILIES[family].small, shared)
        layout = stationary.build(shards, torch.float16, CPU, gpu, 160, case.layout == "stationary")
        plan = Plan(layout.work.tolist(), layout.plan)
        last = plan.variants[-1]
        yield plan, [next((v for v in plan.variants if tokens <= v.max_tokens), last) for tokens in case.tokens]


def kinds(variant, wide: bool) -> set[int]:
    """Of the jobs in a variant's launches by ``wide.cuh``, or by ``multiply.cu``."""
    return {job.kind for launch in variant.launches if (launch.wide != ABSENT) == wide for job in flat(launch)}


def test_wide_has_every_kernel():
    called = {
        (launch.wide, v.max_tokens) for _, variants in plans("wide") for v in variants for launch in v.launches
    }  # fmt: skip
    assert called >= {
        (kind, tokens)
        for kind in (Kind.BYTES, Kind.BYTE_PAIRS, Kind.SHORTS, Kind.FAR, Kind.FAR_BYTES, Kind.DOT)
        for tokens in (8, 16, 32, 64, 128)
    }


@pytest.mark.parametrize("family", ["sliced", "single"])
def test_lists_are_served_by_lists(family):
    widths = set()
    for plan, variants in plans(family):
        assert all(Kind.SLICED in kinds(v, wide=False) for v in variants)
        widths |= {job.width for v in plan.variants for launch in v.launches for job in flat(launch)}
    assert 16 in widths, "no lists of two planes"


def test_resident_has_every_kind():
    found = set()
    for _, variants in plans("resident"):
        assert all(not kinds(v, wide=True) for v in variants)
        found |= set().union(*(kinds(v, wide=False) for v in variants))
    assert found >= {Kind.BYTES, Kind.BYTE_PAIRS, Kind.SHORTS}


def test_prepare_and_decode_are_reached():
    assert any(v.preparations for _, variants in plans("prepare") for v in variants)
    assert all(plan.direct_tokens < 300 and plan.decodings for plan, _ in plans("decode"))
    few = [max(part.splits for part in v.parts) for _, variants in plans("finish") for v in variants]
    assert max(few) >= 8, "no sums of so many pieces that several threads add them up"


def test_the_search_is_compared_with_torchs(monkeypatch: pytest.MonkeyPatch):
    sanitize.search(CPU)
    for name in ("assign", "code_block", "sweep_block"):
        with monkeypatch.context() as broken:
            broken.setattr(native, name, nothing_after(getattr(native, name)))
            with pytest.raises(AssertionError):
                sanitize.search(CPU)


def nothing_after(function):
    """Finds the first of its centroids for the last fifth of all rows or points."""

    @functools.wraps(function)
    def broken(*arguments):
        result = function(*arguments)
        for codes in arguments[-1] if isinstance(arguments[-1], tuple) else result:
            if codes is not None:
                codes[..., -codes.shape[-1] // 5 :] = 0
        return result

    return broken


# ---------------------------------------------------------------------------------------------------------------
# The script

FAKE = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in
  *"memcheck"*wide) echo "========= Invalid __global__ read of size 4"; exit 99 ;;
  *"memcheck"*sliced) sleep 60 ;;
  *"memcheck"*decode) exit 4 ;;
  *"memcheck"*packing) kill -9 $$ ;;
  *"memcheck"*assign) exit 0 ;;
  *"memcheck"*single) echo "RuntimeError: [broken]"; exit 1 ;;
  *"memcheck"*) echo "========= ERROR SUMMARY: 0 errors" ;;
  *) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
esac
"""
# A Python on a machine with a GPU.
PYTHON = """#!/bin/sh
case "$*" in *--build) exit 0 ;; esac
exec {python} "$@"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a compute-sanitizer and a GPU that are not there."""
    for name, text in (("compute-sanitizer", FAKE), ("python", PYTHON)):
        file = tmp_path / name
        file.write_text(text.format(calls=tmp_path / "calls", python=sys.executable))
        file.chmod(0o755)
    found = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "COMPUTE_SANITIZER")}
    return found | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def call(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *words], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )


def rows(output: str) -> dict[tuple[str, str], str]:
    """How each run ended, by family and tool."""
    table = output.partition("== compute-sanitizer")[2]
    found = re.findall(r"^(\w+) +(memcheck|racecheck) +(.*?)  +\d+ s$", table, re.MULTILINE)
    return {(family, tool): ended for family, tool, ended in found}


def test_the_table_says_how_each_run_ended(environment: dict[str, str], tmp_path: Path):
    done = call(environment, "--limit", "2", "--jobs", "20")
    assert done.returncode == 1, done.stdout + done.stderr
    found = rows(done.stdout)
    assert set(found) == {(name, tool) for name in sanitize.FAMILIES for tool in ("memcheck", "racecheck")}
    bad = {
        "wide": "found errors",
        "sliced": "over 2 s",
        "decode": "not on this GPU",
        "packing": "killed",
        "assign": "no summary",
        "single": "failed (1)",
    }
    assert {name: ended for (name, tool), ended in found.items() if tool == "memcheck" and ended != "clean"} == bad
    assert {ended for (_, tool), ended in found.items() if tool == "racecheck"} == {"clean"}
    assert "Invalid __global__ read of size 4" in done.stdout and "RuntimeError: [broken]" in done.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 * len(sanitize.FAMILIES)
    (finish,) = (line for line in calls if line.endswith("finish") and "racecheck" in line)
    assert "--tool racecheck" in finish and "--error-exitcode 99" in finish
    assert "--kernel-name kns=finish_kernel --kernel-name kns=finish_many_kernel" in finish


def test_families_and_a_tool_can_be_chosen(environment: dict[str, str]):
    done = call(environment, "--tool", "racecheck", "wide", "packing")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(done.stdout) == {("wide", "racecheck"): "clean", ("packing", "racecheck"): "clean"}
    assert "error: no family wid; --list shows them" in call(environment, "wid").stderr


def test_kernels_that_the_gpu_lacks_are_left_out_but_not_all(environment: dict[str, str]):
    some = call(environment, "--tool", "memcheck", "decode", "finish")
    assert some.returncode == 0, some.stdout + some.stderr
    assert rows(some.stdout) == {("decode", "memcheck"): "not on this GPU", ("finish", "memcheck"): "clean"}
    none = call(environment, "--tool", "memcheck", "decode")
    assert none.returncode == 1 and "error: nothing was watched: this GPU has no kernels of these" in none.stderr


def test_without_the_packages_of_tests_it_says_how_to_install_them(environment: dict[str, str], tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    done = call(environment, "--list")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"error: no pytest or no hypothesis for {python}; pip install -e '.[test]' in its environment\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_lists_and_refuses(environment: dict[str, str]):
    environment["PYTHON"] = sys.executable
    listed = call(environment, "--list")
    assert listed.returncode == 0
    assert [line.split("\t")[0] for line in listed.stdout.splitlines()] == list(sanitize.FAMILIES)
    refused = call(environment, "wide")
    assert refused.returncode == 1 and "error: no GPU that torch can use" in refused.stderr
