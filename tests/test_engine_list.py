"""The list of engine tests itself: what it takes for the same, which jobs it runs, and that it sees what fails."""

from __future__ import annotations

import copy
import json
import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.engine import __main__ as command
from tests.engine import cases as listed
from tests.engine.cases import Case, Job, Real, all_cases
from tests.engine.compare import Bound, DisagreementError, compare, identical
from tests.engine.models import Model
from tests.engine.runner import Cards, Runner, verdict
from vllm_vptq.format import dequantize, read_layer_specs, validate
from vllm_vptq.layouts import choice

BOUND = Bound(mean=0.01, worst=0.1, near_tie=0.05)


def answer(seed: int, tokens: int = 20, forced: int = 50) -> dict:
    draw = random.Random(seed)
    best = [-draw.random() for _ in range(tokens)]
    return {
        "tokens": [draw.randrange(1000) for _ in range(tokens)],
        "logprobs": best,
        "runner_up": [value - 1 for value in best],
        "prompt_logprobs": [-5 * draw.random() for _ in range(forced)],
    }


@pytest.fixture
def pair():
    """Equal answers, to be made unequal."""
    wanted = [answer(seed) for seed in range(6)]
    return copy.deepcopy(wanted), wanted


def disagree(pair, match: str) -> None:
    with pytest.raises(DisagreementError, match=match) as caught:
        compare(*pair, BOUND)
    assert "\n" not in str(caught.value)


def test_noise_within_the_bounds_passes(pair):
    draw = random.Random(0)
    for found in pair[0]:
        for key in ("logprobs", "prompt_logprobs"):
            found[key] = [value + draw.gauss(0, 0.005) for value in found[key]]
    agreed = compare(*pair, BOUND)
    assert 0.002 < agreed.mean < 0.008
    assert (agreed.logprobs, agreed.tokens, agreed.parted) == (6 * 70, 120, 0)


@pytest.mark.parametrize("key", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [0.2, -0.2, float("nan"), float("-inf")])
def test_one_logprob_beyond_the_worst(pair, key, value):
    pair[0][3][key][7] += value
    disagree(pair, "worst")


def test_all_logprobs_a_little_off(pair):
    for found in pair[0]:
        found["prompt_logprobs"] = [value + 0.02 for value in found["prompt_logprobs"]]
    disagree(pair, "bounds are mean 0.01")


def test_another_token_that_was_no_near_tie(pair):
    pair[0][2]["tokens"][5] += 1
    disagree(pair, "sequence 2, token 5")


@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)])
def test_another_token_at_a_near_tie_needs_it_on_both_sides(pair, sides):
    for side in sides:
        pair[side][2]["runner_up"][5] = pair[side][2]["logprobs"][5] - 0.04
    pair[0][2]["tokens"][5] += 1
    if len(sides) == 1:
        disagree(pair, "sequence 2, token 5")
        return
    # From there on the texts differ, and nothing of them is compared.
    pair[0][2]["tokens"][6:] = [0] * 14
    pair[0][2]["logprobs"][5:] = [-9.0] * 15
    agreed = compare(*pair, BOUND)
    assert (agreed.tokens, agreed.parted) == (105, 1)


def test_most_sequences_parted(pair):
    for sequences in pair:
        for a in sequences:
            a["runner_up"][0] = a["logprobs"][0] - 0.01
    for found in pair[0][:4]:
        found["tokens"][0] += 1
    disagree(pair, "most sequences parted")
    for found, wanted in zip(*pair, strict=True):
        found["tokens"] = list(wanted["tokens"])
    compare(*pair, BOUND)


@pytest.mark.parametrize("key", ["tokens", "prompt_logprobs"])
def test_missing_answers(pair, key):
    pair[0][1][key].pop()
    disagree(pair, "sequence 1")
    pair[0].pop()
    disagree(pair, "5 answers, expected 6")
    with pytest.raises(DisagreementError):
        compare([], [], BOUND)
    nothing = {"tokens": [], "logprobs": [], "runner_up": []}
    with pytest.raises(DisagreementError, match="no logprobs"):
        compare([nothing], [nothing], BOUND)


def test_identical(pair):
    identical(*pair)
    pair[0][4]["prompt_logprobs"][0] += 1e-7
    with pytest.raises(DisagreementError, match="sequence 4 differs in prompt_logprobs"):
        identical(*pair)


# ---------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize(
    "model",
    [
        Model("v8-k256-16", "bfloat16", perm=True, norm=True, shape="narrow"),
        Model("v8-k256-16", "bfloat16", perm=True, norm=True, groups=4, outliers=64, shape="narrow"),
        Model("v8-k256-0+v3-k64-0", "bfloat16", shape="narrow"),
    ],
    ids=lambda model: model.name,
)
def test_twins_and_the_planted_error(model, tmp_path):
    model.write(tmp_path)
    model.write(tmp_path)
    folder = tmp_path / model.name
    vptq, dense, planted = (load_file(folder / side / "model.safetensors") for side in ("vptq", "dense", "planted"))
    specs = read_layer_specs(json.loads((folder / "vptq" / "config.json").read_text()))
    assert len(specs) == 21
    formats = [f"v{s.vector_len}-k{s.num_centroids}-{s.num_res_centroids}" for s in specs.layers.values()]
    assert set(formats[:2]) == set(formats) == set(model.format.split("+"))
    assert {(s.group_num, s.outlier_size) for s in specs.layers.values()} == {(model.groups, model.outliers)}
    wrong = {}
    for name, spec in specs.items():
        own, spoilt = (
            {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            for tensors in (vptq, planted)
        )
        validate(name, spoilt, spec)
        assert torch.equal(dequantize(own, spec).bfloat16(), dense.pop(f"{name}.weight"))
        rows = (dequantize(own, spec) != dequantize(spoilt, spec)).any(1).nonzero().flatten().tolist()
        if rows:
            wrong[name] = rows
    assert wrong == {"model.layers.1.self_attn.o_proj": list(range(8))}
    assert dense.keys() <= vptq.keys()
    assert "quantization_config" not in json.loads((folder / "dense" / "config.json").read_text())


# ---------------------------------------------------------------------------------------------------------------
# Runs

A, B = Job(Model("v8-k16-0")), Job(Model("v8-k16-0"), "dense")


class Fake(Runner):
    """Runs no process; answers with the side, or fails for ``planted``."""

    ran: list[str]

    def _process(self, job, cards):
        self.ran.append(job.side)
        if job.side == "planted":
            raise OSError("no such thing")
        return {"answers": [job.side, cards], "start_s": 1.0}


def fake(tmp_path, cards: int) -> Fake:
    Fake.ran = []
    return Fake(tmp_path, cards)


def sides(outcomes) -> str:
    found = [listed.answers(outcome) for outcome in outcomes.values()]
    assert "dense" in found, found
    return "+".join(found)


CASES = [
    Case("both", {"vptq": A, "dense": B}, sides),
    Case("one", {"vptq": A}, sides),
    Case("again", {"dense": Job(Model("v8-k16-0"), "dense")}, sides, cpu=True),
    Case("broken", {"dense": B, "bad": Job(Model("v8-k16-0"), "planted")}, sides),
    Case("stumbles", {"dense": B}, lambda outcomes: outcomes["nothing"]),
    Case("two", {"dense": replace(B, cards=2)}, sides),
]


def test_a_run(tmp_path):
    runner, seen = fake(tmp_path, 1), []
    rows = runner.run(CASES, seen.append)
    assert sorted(runner.ran) == ["dense", "planted", "vptq"], "equal jobs run once"
    assert [row["name"] for row in rows] == [case.name for case in CASES]
    assert sorted(row["name"] for row in seen) == sorted(case.name for case in CASES)
    assert [(row["result"], row["detail"]) for row in rows] == [
        ("passed", "vptq+dense"),
        ("FAILED", "['vptq']"),
        ("passed", "dense"),
        ("FAILED", "OSError: no such thing; bad: OSError: no such thing"),
        ("FAILED", "KeyError: 'nothing'"),
        ("skipped", "needs 2 GPUs"),
    ]


def test_a_run_without_a_gpu(tmp_path):
    rows = fake(tmp_path, 0).run(CASES, lambda row: None)
    assert [row["result"] for row in rows] == ["skipped", "skipped", "passed", "skipped", "skipped", "skipped"]


def test_two_jobs_link_a_real_model_at_a_time(tmp_path, monkeypatch):
    model = Real(tmp_path / "coded", tmp_path / "dense")
    link = Path.symlink_to

    def outrun(path, target):
        link(path, target)  # by the other job
        link(path, target)

    monkeypatch.setattr(Path, "symlink_to", outrun)
    model.write(tmp_path / "models")
    made = tmp_path / "models" / "coded"
    assert [(made / side).readlink() for side in ("vptq", "dense")] == [model.vptq, model.dense]


def test_cards_are_shared_evenly_and_never_by_too_many():
    cards, most, lock = Cards(3, per_card=2), [0, 0, 0], threading.Lock()
    in_use = [0, 0, 0]

    def job(count: int) -> None:
        with cards.take(count) as taken:
            assert len(set(taken)) == count
            with lock:
                for card in taken:
                    in_use[card] += 1
                    most[card] = max(most[card], in_use[card])
            time.sleep(0.01)
            with lock:
                for card in taken:
                    in_use[card] -= 1

    threads = [threading.Thread(target=job, args=(1 + i % 3,)) for i in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert most == [2, 2, 2]
    assert cards.load == [0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "limit", "match"),
    [("nothing", 60, r"KeyError: 'nothing' \(.*log\)"), ("engine", 0.1, r"no end within 0 s \(.*log\)")],
)
def test_a_process_that_fails_or_does_not_end(tmp_path, kind, limit, match):
    runner = Runner(tmp_path, 0, limit_s=limit)
    case = Case("x", {"vptq": Job(Model("v8-k16-0", shape="narrow"), kind=kind)}, sides, cpu=True)
    (row,) = runner.run([case], lambda _: None)
    assert row["result"] == "FAILED"
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(row["detail"])


@pytest.mark.parametrize("case", [case for case in all_cases() if "aligned layout" in case.name][:1])
def test_a_named_layout_is_the_one_that_served(case, monkeypatch):
    line = "INFO VPTQ weights: 0.02 GiB in {} layout (2.09 bits/weight)\n"
    served = {"answers": [[answer(0)]], "seconds": 1.0}
    for name, result in (("aligned", "passed"), ("compact", "FAILED")):
        row = verdict(case, {"vptq": served | {"log": line.format(name)}, "dense": served | {"log": ""}})
        assert row["result"] == result, row
    assert row["detail"] == "['compact']"
    # What choice.lay_out says on a GPU without the kernels, and how the list takes it.
    few = dict(major=8, minor=0, shared_memory_per_block_optin=99 << 10, multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), few))
    with pytest.raises(RuntimeError) as refused:
        choice.lay_out("aligned", [], torch.float16, torch.device("cuda", 0), 1)
    row = verdict(case, {"vptq": {"error": str(refused.value), "seconds": 1.0, "log": ""}, "dense": served})
    assert row["result"] == "skipped" and "VLLM_VPTQ_LAYOUT=aligned" in row["detail"]


@pytest.mark.parametrize(
    "case", [case for case in all_cases() if case.name.startswith("tp 2") and "aligned" in case.name]
)
def test_ranks_have_the_named_layout(case):
    assert case.jobs["vptq"].env == case.jobs["one"].env == {"VLLM_VPTQ_LAYOUT": "aligned"} and case.cards == 2
    line = "(Worker_TP0) INFO VPTQ weights: 0.02 GiB in {} layout (3.2 bits/weight)\n"
    one = {"answers": [[answer(0)]], "seconds": 1.0, "log": ""}
    ranks = [{"weights": 1 << 20, "host_peak": 1 << 30}] * 2
    for name, result in (("aligned", "passed"), ("stationary", "FAILED")):
        both = one | {"answers": [[answer(0)], {"ranks": ranks}], "log": line.format(name)}
        row = verdict(case, {"vptq": both, "one": one, "dense": one})
        assert row["result"] == result and name in row["detail"], row


# ---------------------------------------------------------------------------------------------------------------
# The list and its command


def test_the_list():
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.cards for case in cases} == {1, 2, 4}
    jobs = {job.key: job for case in cases for job in case.jobs.values()}
    assert len(jobs) < sum(len(case.jobs) for case in cases), "dense twins are shared"
    formats = {job.model.format for job in jobs.values()}
    public = {"v8-k65536-0", "v8-k65536-256", "v8-k65536-65536", "v16-k65536-65536", "v8-k256-256", "v6-k4096-0"}
    assert public | {"v12-k4096-4096"} <= formats
    parallel = [case.jobs["vptq"] for case in cases if case.name.startswith("tp 2 pp 1")]
    assert {"v8-k65536-0", "v8-k256-256", "v12-k4096-4096"} <= {job.model.format for job in parallel}
    assert any(job.model.groups > 1 and job.model.outliers for job in parallel)
    four = {case.jobs["vptq"].model.format for case in cases if case.name.startswith("tp 4 pp 1")}
    assert four == {"v8-k65536-0", "v12-k4096-4096"}
    assert {job.model.dtype for job in jobs.values()} == {"float16", "bfloat16"}


def run_command(monkeypatch, *words: str):
    monkeypatch.setattr(command, "unready", lambda cases, cpu: None)
    monkeypatch.setattr(command.machine, "nvidia_smi", lambda: [("NVIDIA H200", "580.1")])
    monkeypatch.setattr(command, "all_cases", lambda reals: CASES)
    monkeypatch.setattr(command, "Runner", lambda *arguments: fake(arguments[0], arguments[1]))
    return CliRunner().invoke(command.app, list(words))


def test_the_command_writes_results_and_ends_with_a_table(monkeypatch, tmp_path):
    out = tmp_path / "results" / "engine.json"
    found = run_command(monkeypatch, "both", "again", "two", "--out", str(out))
    assert found.exit_code == 0, found.output
    assert found.output.rstrip().splitlines()[-1].startswith("2 passed, 0 failed, 1 skipped in ")
    written = json.loads(out.read_text())
    assert written["gpus"] == ["NVIDIA H200"]
    assert written["versions"]["torch"] == torch.__version__
    assert {row["name"]: row["result"] for row in written["cases"]} == {
        "both": "passed", "again": "passed", "two": "skipped",
    }  # fmt: skip
    assert run_command(monkeypatch, "broken", "again").exit_code == 1


def test_the_command_chooses(monkeypatch):
    names = run_command(monkeypatch, "--list", "--cards", "2,4").output.split()
    assert names == ["2", "two"]


@pytest.mark.parametrize(
    ("entries", "gpus", "cpu", "match"),
    [([], [1], False, "pip install"), (["vptq"], [], False, "no GPU"), (["vptq"], [], True, None)],
)
def test_what_a_machine_lacks(monkeypatch, entries, gpus, cpu, match):
    found = [type("Entry", (), {"name": name}) for name in entries]
    monkeypatch.setattr(command.metadata, "entry_points", lambda group: found)
    monkeypatch.setattr(command.machine, "nvidia_smi", lambda: gpus)
    problem = command.unready(CASES, cpu)
    assert problem is None if match is None else match in problem
    assert "--list" in command.unready([], cpu)
