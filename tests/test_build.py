"""Native libraries: what makes them built anew, many processes at once, and one line for everything that goes wrong."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools
import torch

from tests.fake_cuda import FakeMachine, script
from vllm_vptq.build import BuildError, cache, cpu, cuda, plain_cuda
from vllm_vptq.build.errors import first_error
from vllm_vptq.build.toolkit import find_toolkit, gencode, parse_architectures, runs_on

ROOT = Path(__file__).parent.parent
pytest_plugins = ("tests.fake_cuda_fixtures",)
fork = multiprocessing.get_context("fork")  # the children keep what a test patched


def at_once(count: int, job: Callable[[], object]) -> list[str]:
    """The outcome of a job in several processes that start together: 'done', or the error."""
    queue = fork.Queue()

    def run() -> None:
        try:
            job()
            queue.put("done")
        except Exception as error:
            queue.put(f"{type(error).__name__}: {error}")

    workers = [fork.Process(target=run) for _ in range(count)]
    for worker in workers:
        worker.start()
    outcomes = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    return outcomes


# The CPU libraries, built for real.


def test_cpu_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    script(tmp_path / "slow-c++", f'#!/bin/sh\necho "$@" >> {calls}\nsleep 0.2\nexec {cpu.compiler()} "$@"\n')
    monkeypatch.setenv("CXX", str(tmp_path / "slow-c++"))
    monkeypatch.setenv("VLLM_VPTQ_CACHE", str(tmp_path))
    assert at_once(5, lambda: cpu.build("assign")) == ["done"] * 5
    assert sum("-shared" in line for line in calls.read_text().splitlines()) == 1
    assert [path.suffix for path in sorted((tmp_path / "vllm_vptq").iterdir())] == [".lock", ".so"]
    assert ctypes.CDLL(str(cpu.build("assign")))


def test_cpu_library_depends_on_source_headers_and_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "sources", lambda: tmp_path)
    monkeypatch.setenv("VLLM_VPTQ_CACHE", str(tmp_path))
    (tmp_path / "cpu").mkdir()
    source, header = tmp_path / "cpu" / "assign.cpp", tmp_path / "cpu" / "shared.h"
    source.write_text("int a;")
    paths = [cpu.library_path("assign")]
    header.write_text("int b;")
    paths.append(cpu.library_path("assign"))
    source.write_text("int c;")
    paths.append(cpu.library_path("assign"))
    script(tmp_path / "other-c++", "#!/bin/sh\necho other 1.0\n")
    monkeypatch.setenv("CXX", str(tmp_path / "other-c++"))
    paths.append(cpu.library_path("assign"))
    assert len(set(paths)) == 4


def test_cpu_library_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "sources", lambda: tmp_path)
    monkeypatch.setenv("VLLM_VPTQ_CACHE", str(tmp_path))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "assign.cpp").write_text("int f() { return missing; }\n")
    with pytest.raises(BuildError, match=r"could not build assign.cpp: .*missing"):
        cpu.build("assign")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler"):
        cpu.library_path("assign")


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLLM_VPTQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="set VLLM_VPTQ_CACHE to a writable folder"):
        cache.folder()


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC], ids=["another user's", "full"])
def test_cache_that_can_be_read_alone(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root may write anywhere, the refusal is made up."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache.tempfile, "TemporaryDirectory", refuse)
    target = tmp_path / "library.so"
    with pytest.raises(BuildError, match=rf"cannot write to {tmp_path} \({os.strerror(number)}\); set VLLM_VPTQ_CACHE"):
        cache.build_once(target, lambda private: private)
    target.touch()
    cache.build_once(target, lambda private: private)  # what is built needs no writing


def test_errors_of_a_build_are_its_own(tmp_path: Path) -> None:
    def build(private: Path) -> Path:
        return (private / "library").rename(private / "elsewhere")

    with pytest.raises(FileNotFoundError):
        cache.build_once(tmp_path / "library.so", build)


def test_killed_builder_leaves_nothing_that_hangs(tmp_path: Path) -> None:
    target, begun = tmp_path / "library.so", fork.Event()

    def hang(private: Path) -> Path:
        (private / "half").touch()
        begun.set()
        time.sleep(600)
        return private

    victim = fork.Process(target=lambda: cache.build_once(target, hang))
    victim.start()
    assert begun.wait(30) and list(tmp_path.glob("*.partial"))
    assert victim.pid
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()

    def build(private: Path) -> Path:
        (private / "whole").write_text("library")
        return private / "whole"

    assert at_once(3, lambda: cache.build_once(target, build)) == ["done"] * 3
    assert target.read_text() == "library" and not list(tmp_path.glob("*.partial"))


# The CUDA extension, its compiler and GPUs faked.


def test_extension_is_built_once(machine: FakeMachine) -> None:
    assert at_once(5, lambda: cuda.build(cuda.locate())) == ["done"] * 5
    assert len(machine.builds) == 1 and machine.builds[0].split()[-1] == "9.0a"
    extension = cuda.locate()
    assert extension.built and extension.path.read_text() == "library\n" and not extension.ahead_of_time
    assert {path.suffix for path in extension.path.parent.iterdir()} == {".lock", ".log", ".so"}


def test_extension_that_does_not_build_is_tried_once(machine: FakeMachine) -> None:
    machine.builder("echo kernel.cu: compiling; echo 'kernel.cu(7): error: no such thing'; echo done; exit 1")
    extension = cuda.locate()  # here, lest a busy machine have one of them ask when the others are done
    outcomes = at_once(4, lambda: cuda.build(extension))
    assert len(machine.builds) == 1 and len(set(outcomes)) == 1
    assert outcomes[0].startswith("BuildError: CUDA kernels do not build: kernel.cu(7): error: no such thing (all of")
    log = Path(outcomes[0].split()[-1].rstrip(")"))
    assert log.read_text().startswith("kernel.cu: compiling")
    machine.builder(f'echo mended > "$4/{cuda.NAME}.so"')  # say, more memory: the sources are the same
    cuda.build(cuda.locate())
    assert cuda.locate().built and not list(log.parent.glob("*.error"))


def test_extension_depends_on_all_that_goes_into_it(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [cuda.locate().path]
    for file in sorted(file for file in machine.source.rglob("*") if file.is_file() and file.parent.name != "quantize"):
        file.write_text("changed")
        paths.append(cuda.locate().path)
    assert len(paths) == 6
    for change in (
        lambda: machine.gpus((8, 0)),
        lambda: machine.gpus((8, 0), (9, 0), (8, 0)),
        lambda: machine.toolkit("13.1"),
        lambda: monkeypatch.setattr(torch.version, "cuda", "13.2"),
        lambda: monkeypatch.setattr(torch, "__version__", "9.9"),
    ):
        change()
        paths.append(cuda.locate().path)
    assert len(set(paths)) == len(paths)
    assert cuda.locate().architectures == ("8.0", "9.0a")


def test_extension_of_the_installation_is_used_where_it_fits(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = machine.package / "_C.cpython-311-x86_64-linux-gnu.so"
    library.touch()
    (machine.package / cuda.MANIFEST).write_text(cuda.manifest(machine.source, ("8.0", "9.0a")))
    assert cuda.locate() == cuda.Extension(library, ("8.0", "9.0a"), ahead_of_time=True)
    machine.gpus((8, 6))  # runs what is built for 8.0
    assert cuda.locate().ahead_of_time
    machine.gpus((9, 0), (10, 0))
    assert not cuda.locate().ahead_of_time and cuda.locate().passed_over == "built for 8.0, 9.0a, not for 10.0a"
    machine.gpus((9, 0))
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert "this is 9.9" in cuda.locate().passed_over


def test_extension_of_the_installation_grows_old(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.package / "_C.so").touch()
    (machine.package / cuda.MANIFEST).write_text(cuda.manifest(machine.source, ("9.0a",)))
    (machine.source / "cuda" / "device.cuh").write_text("changed")
    assert cuda.locate().passed_over == "built from other sources"
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(BuildError, match="the installed kernels were built from other sources; CUDA_HOME is /nowhere"):
        cuda.locate()


def test_extension_errors(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    def expect(words: str) -> None:
        with pytest.raises(BuildError, match=words) as caught:
            cuda.locate()
        assert "\n" not in str(caught.value)

    machine.gpus((10, 3))
    expect("CUDA 13.0 in .* cannot build for 10.3a")
    machine.gpus((7, 5))
    expect("compute capability 7.5; the kernels need 8.0 or more")
    machine.gpus()
    expect("torch sees no GPU; check nvidia-smi")
    machine.gpus((7, 5), (9, 0))
    assert cuda.locate().architectures == ("9.0a",)
    machine.toolkit("12.8")
    expect(r"nvcc is CUDA 12.8, but torch is built for 13.0; install the CUDA toolkit 13.0")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    expect("CUDA_HOME is /nowhere, without bin/nvcc")
    monkeypatch.setattr(torch.version, "cuda", None)
    expect("has no CUDA; install vLLM's package for GPUs")
    machine.source.rename(machine.folder / "elsewhere")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    expect("no CUDA sources")


def test_failure_is_remembered(machine: FakeMachine) -> None:
    machine.builder("echo 'fatal error: broken'; exit 1")
    cuda._outcome.cache_clear()
    try:
        for _layer in range(3):
            with pytest.raises(BuildError, match="broken"):
                cuda.cuda_extension()
        assert len(machine.builds) == 1
    finally:
        cuda._outcome.cache_clear()


def test_library_that_does_not_load_is_named(machine: FakeMachine) -> None:
    cuda._outcome.cache_clear()
    try:
        with pytest.raises(BuildError, match=r"vllm_vptq_cuda-\w+.so does not load .*; remove it"):
            cuda.cuda_extension()
    finally:
        cuda._outcome.cache_clear()


# The quantizer's CUDA library.


def test_plain_library_is_built_once_and_depends_on_its_source(machine: FakeMachine) -> None:
    library = plain_cuda.locate("assign")
    assert library.architectures == ("9.0a",) and not library.built
    assert at_once(3, lambda: plain_cuda.build(library, "assign")) == ["done"] * 3
    assert plain_cuda.locate("assign") == library and library.built
    for name in ("assign.cu", "shared.cuh"):
        plain_cuda.build(plain_cuda.locate("assign"), "assign")
        (machine.source / "quantize" / name).write_text("changed")
        assert not plain_cuda.locate("assign").built, name
    machine.gpus((8, 0), (9, 0))
    assert plain_cuda.locate("assign").architectures == ("8.0", "9.0a")


def test_plain_library_of_the_installation(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    source = machine.source / "quantize" / "assign.cu"
    plain_cuda.install(find_toolkit(), source, machine.package, ("8.0", "9.0a"))
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    found = plain_cuda.locate("assign")
    assert found.ahead_of_time and found.built and found.path.parent == machine.package


def test_plain_library_of_the_installation_that_does_not_fit(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = machine.source / "quantize" / "assign.cu"
    plain_cuda.install(find_toolkit(), source, machine.package, ("8.0",))
    found = plain_cuda.locate("assign")
    assert (found.ahead_of_time, found.passed_over) == (False, "built for 8.0, not for 9.0a")
    machine.gpus((8, 6))
    assert plain_cuda.locate("assign").ahead_of_time
    monkeypatch.setattr(torch, "__version__", "9.9")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert plain_cuda.locate("assign").ahead_of_time, "it uses nothing of torch"
    monkeypatch.setattr(torch.version, "cuda", "14.0")
    machine.toolkit("14.0")
    assert plain_cuda.locate("assign").passed_over == "built for CUDA 13, this is 14"
    source.write_text("changed")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(BuildError, match="CUDA_HOME is /nowhere"):
        plain_cuda.locate("assign")


def test_plain_library_for_a_gpu_that_nvcc_does_not_know(machine: FakeMachine) -> None:
    machine.gpus((9, 0), (10, 3))
    with pytest.raises(BuildError, match=r"CUDA 13.0 in .* cannot build for 10.3a; install a newer"):
        plain_cuda.locate("assign")


def test_installing_goes_on_without_the_plain_library(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as no_cuda:
        no_cuda.setattr(torch.version, "cuda", None)
        no_cuda.setattr(setuptools, "setup", lambda **_: None)
        no_cuda.setattr(sys, "path", [*sys.path])
        build_optional = runpy.run_path(str(ROOT / "setup.py"))["build_optional"]
    toolkit = find_toolkit()
    build_optional(toolkit, machine.source, machine.package, ("9.0a",))
    assert plain_cuda.locate("assign").ahead_of_time and not capsys.readouterr().err
    script(toolkit.nvcc, "#!/bin/sh\necho 'it(3): error: too much'\nexit 1\n")
    build_optional(toolkit, machine.source, machine.folder, ("9.0a",))
    lines = [
        f"vllm-vptq: CUDA library {name} will be built at first use ({toolkit.nvcc} could not build {name}.cu: it(3): "
        "error: too much)\n"
        for name in ("assign", "coded")
    ]
    assert capsys.readouterr().err == "".join(lines)
    assert not list(machine.folder.glob("*-cuda*"))


# Small tables.


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("a\nkernel.cu(12): error: x is undefined\n1 error detected", "kernel.cu(12): error: x is undefined"),
        ("b.cpp:3:10: fatal error: x.h: No such file", "b.cpp:3:10: fatal error: x.h: No such file"),
        (
            "nvcc fatal   : Unsupported gpu architecture 'compute_1'",
            "nvcc fatal   : Unsupported gpu architecture 'compute_1'",
        ),
        ("FAILED: x.so\n/usr/bin/ld: cannot find -lcudart\ncollect2: error: ld", "/usr/bin/ld: cannot find -lcudart"),
        (
            "Traceback\n  File x\nModuleNotFoundError: No module named 'setuptools'",
            "ModuleNotFoundError: No module named 'setuptools'",
        ),
        (
            "Traceback\nOSError: x.so: undefined symbol: y\n\nOSError: Could not load",
            "OSError: x.so: undefined symbol: y",
        ),
        ("", "no output"),
    ],
)
def test_first_error(output: str, line: str) -> None:
    assert first_error(output) == line


def test_architectures() -> None:
    assert parse_architectures("7.0 7.5 8.0 8.9 9.0 10.0+PTX 12.0+PTX") == ("8.0", "8.9", "9.0a", "10.0a", "12.0+PTX")
    assert parse_architectures("8.6;9.0a;8.6") == ("8.6", "9.0a")
    for wrong in ("Hopper", "9", "7.5"):
        with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST"):
            parse_architectures(wrong)
    assert gencode(("9.0a", "12.0+PTX")) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("8.0+PTX", (9, 0), False),
        ("10.0a", (10, 3), False),
        ("12.0", (12, 1), True),
        ("8.9+PTX", (11, 0), True),
        ("12.0+PTX", (9, 0), False),
    ],
)
def test_runs_on(built: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on((built,), capability) is runs
