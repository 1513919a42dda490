"""The four scripts as a user runs them, at toy size: what they write, what a kill leaves, what they say to bad input."""
import json
import os
import re
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import collect
import deploy
import fit_ndm
import hand as H
import sim
import train_policy
from conftest import finish, one_line_problem, start

pytestmark = pytest.mark.usefixtures("grasps")

PORT, WRIST = "sim:3", "palm_up"


def until(process, condition):
    """Wait until `condition()`; a process that ends before has something to say."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def shards(folder):
    return sorted(folder.glob("[0-9]*.npz"))


def run(*command):
    status, out, err = finish(start(*command))
    assert status == 0, err
    return out


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, toy_policy, grasps):
    """collect, fit_ndm and deploy one after the other."""
    out = tmp_path_factory.mktemp("pipeline")
    run("collect.py", "--hours", 10 / 180, "--port", PORT, "--wrist", WRIST, "--policy", toy_policy, "--out", out / "data")
    said = run("fit_ndm.py", "--data", out / "data", "--policy", toy_policy, "--out", out / "ndm", "--models", "joint", "whole",
               "--steps", 30, "--residual-steps", 3, "--episodes", 24)
    numbers = run("deploy.py", "--compare", "--episodes", 2, "--port", PORT, "--wrist", WRIST, "--axis=+z", "--policy", toy_policy,
                  "--residual", out / "ndm/residual.pt", "--json", out / "numbers.json")
    return out, said, numbers


def test_collect_writes_trajectories_that_stand_alone(pipeline, toy_policy):
    out = pipeline[0] / "data"
    assert [p.name for p in shards(out)] == [f"{i:05d}.npz" for i in range(10)]
    assert not list(out.glob(".*")), "temporary files are left"
    sigmas = []
    for i, path in enumerate(shards(out)):
        d = sim.load_npz(path)
        assert all(d[name].shape == (400, 16) for name in ("q", "dq", "target", "current")) and d["time"].shape == (400,)
        assert np.diff(d["time"]) == pytest.approx(np.full(399, 0.05), abs=1e-6)
        assert [str(d[name]) for name in ("hand", "wrist", "load", "source", "port", "index")] == [H.HAND, WRIST, "balls", "policy", PORT, str(i)]
        assert len(str(d["policy"])) == 16 and int(d["seed"]) == 0
        sequence = sim.load_npz(out / "sequences.npz", "sequences")["sequences"][i]
        noise = d["target"] - np.clip(sequence, H.LOW, H.HIGH)
        sigmas.append(float(d["sigma"]))
        assert noise[1:].std() == pytest.approx(sigmas[-1], rel=0.1, abs=1e-6)
        assert 0.001 < np.abs(d["q"] - d["target"]).mean() < 0.2
    assert set(sigmas) == {0.0, 0.01}


def test_a_trajectory_depends_on_its_index_alone(pipeline, toy_policy, tmp_path):
    """So that a resumed run is the run that was not interrupted."""
    again = tmp_path / "data"
    shutil.copytree(pipeline[0] / "data", again)
    for i in (2, 7):
        (again / f"{i:05d}.npz").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in shards(again)}
    said = run("collect.py", "--hours", 10 / 180, "--port", PORT, "--wrist", WRIST, "--policy", toy_policy, "--out", again, "--workers", 1)
    assert "2 new" in said
    for path in shards(again):
        old, new = sim.load_npz(pipeline[0] / "data" / path.name), sim.load_npz(path)
        assert all(np.array_equal(old[name], new[name]) for name in old), path.name
        assert path.name in ("00002.npz", "00007.npz") or path.stat().st_mtime_ns == before[path.name]


def test_fit_ndm_writes_models_table_and_pictures(pipeline):
    out, said, _ = pipeline
    table = json.loads((out / "ndm/table.json").read_text())
    (held_out,) = table.values()
    assert list(held_out) == ["stays where it is", "joint", "whole"]
    for e in held_out.values():
        assert len(e["one"]) == len(e["open"]) == 16 and np.isfinite(e["one"] + e["open"]).all()
    assert (out / "ndm/table.txt").read_text().strip() in said
    for name in ("prediction", "error", "correction"):
        assert (out / f"ndm/{name}.png").read_bytes().startswith(b"\x89PNG")
    f = fit_ndm.Dynamics(**train_policy.load_checkpoint(out / "ndm/dynamics.pt", "dynamics")["config"])
    f.load_state_dict(train_policy.load_checkpoint(out / "ndm/dynamics.pt", "dynamics")["weights"])
    assert f.config["groups"] == 16
    fit_ndm.load_residual(out / "ndm/residual.pt")
    assert not list((out / "ndm").glob(".*"))


def test_compare_writes_ceiling_base_and_residual(pipeline):
    out, _, said = pipeline
    report = json.loads((out / "numbers.json").read_text())
    for part in (report, report["wrists"][WRIST]):
        for kind in ("ceiling", "base", "residual"):
            assert {"RotR", "TTF", "RotP", "spread"} <= set(part[kind])
            assert 0 < part[kind]["TTF"] <= 20 and part[kind]["RotP"] >= 0
            assert all(part[kind]["spread"][m]["std"] >= 0 for m in ("RotR", "TTF", "RotP"))
        lost = part["ceiling"]["RotR"] - part["base"]["RotR"]
        assert part["recovered"] is None if lost <= 0 else part["recovered"] == pytest.approx((part["residual"]["RotR"] - part["base"]["RotR"]) / lost)
    assert report["port"] == PORT and report["episodes"] == 2
    assert re.search(r"ceiling .*\n.* base .*\n.* residual ", said)


def test_several_hands_make_one_table(tmp_path):
    row = lambda rad: {"RotR": 20 * rad, "TTF": rad, "RotP": 0.5, "spread": {m: {"sem": 0.1} for m in ("RotR", "TTF", "RotP")}}
    part = lambda ceiling, base, residual: {"ceiling": row(ceiling), "base": row(base), "residual": row(residual),
                                            "recovered": (residual - base) / (ceiling - base)}
    for i, (up, down) in enumerate((((16, 8, 12), (16, 8, 16)), ((10, 5, 4), (20, 10, 15)))):      # recovered: 50 and 100, -20 and 50 %
        whole = part(*np.mean([up, down], 0))
        (tmp_path / f"sim{i}.json").write_text(json.dumps({"port": f"sim:{i}", **whole, "wrists": {"palm_up": part(*up), "palm_down": part(*down)}}))
    lines = run("deploy.py", "--table", *sorted(tmp_path.glob("sim*.json"))).splitlines()
    table = {line.split()[0]: line.split() for line in lines if line and line[0] in "smp"}
    assert table["sim:0"][1:4] == ["16.00", "8.00", "14.00"] and table["sim:0"][-4::2] == ["50", "75"]
    assert table["sim:1"][1:4] == ["15.00", "7.50", "9.50"] and table["sim:1"][-4::2] == ["50", "27"]
    assert table["mean"][1:7] == ["15.50", "7.75", "11.75", "15.5", "7.8", "11.8"] and table["mean"][-2] == "51"
    assert table["palm_up"][1:4] == ["13.00", "6.50", "8.00"] and table["palm_up"][-4:] == ["15", "%", "(50,", "-20)"]
    assert table["palm_down"][-4:] == ["75", "%", "(100,", "50)"]
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")

    errors = lambda one, far: {"joint": {"one": [one] * 16, "open": [far] * 16}}
    for i, e in enumerate((errors(4, 30), errors(6, 34))):
        (tmp_path / f"table{i}.json").write_text(json.dumps({"held out": e}))
    said = run("fit_ndm.py", "--table", *tmp_path.glob("table*.json"))
    assert re.search(r"2 hands.*\n  held out\n    joint +5\.00 \+- 1\.00 +32\.0 \+- 2\.0", said), said


def test_deploy_records_what_fit_ndm_reads_and_is_the_same_again(pipeline, toy_policy, tmp_path):
    results = []
    for attempt in ("a", "b"):
        run("deploy.py", "--base", "--episodes", 2, "--port", PORT, "--wrist", WRIST, "--axis=+z", "--policy", toy_policy, "--object", "cube",
            "--record", tmp_path / attempt, "--json", tmp_path / f"{attempt}.json", "--workers", 1 if attempt == "a" else 2)
        results.append(json.loads((tmp_path / f"{attempt}.json").read_text()))
    assert results[0] == results[1]
    assert results[0][WRIST]["RotR"]["mean"] == pytest.approx(json.loads((pipeline[0] / "numbers.json").read_text())["base"]["RotR"])
    if results[0][WRIST]["TTF"]["mean"] == 20:
        q, a, _ = fit_ndm.load_shards([tmp_path / "a"])
        assert q.shape == a.shape == (2, 400, 16)


# ------------------------------------------------------------------------------------------------- training, kills
# the same script with a generalist of 16 units and six episodes of evaluation
TOY = ("import sys, train_policy as T\n"
       "T.Generalist.__init__.__defaults__ = (327, 16, 1)\n"
       "T.evaluate.__defaults__ = (6,)\n"
       "T.H.run(T.main)")
TRAIN = ("--family", "cube", "--wrist", WRIST, "--axis=+z", "--envs", 16)


def test_training_writes_everything_after_a_kill_and_a_resume(tmp_path):
    oracle = tmp_path / "oracle-cube.pt"
    process = start("-c", TOY, "--minutes", 0.03, "--out", tmp_path, *TRAIN)
    until(process, oracle.exists)                                        # killed while the generalist learns
    process.kill()
    finish(process)
    first = train_policy.load_checkpoint(oracle, "oracle")
    assert first["steps"] > 0 and not (tmp_path / "results.json").exists()
    for path in tmp_path.glob("[!.]*.pt"):
        torch.load(path, weights_only=True)                              # whole or not there
    run("-c", TOY, "--minutes", 0.1, "--out", tmp_path, *TRAIN)
    second = train_policy.load_checkpoint(oracle, "oracle")
    assert second["steps"] > first["steps"] and second["seconds"] > first["seconds"]
    policy, content = train_policy.load_policy(tmp_path / "policy.pt")
    assert (content["families"], content["wrists"], content["axes"]) == (["cube"], [WRIST], ["+z"])
    assert torch.isfinite(policy(torch.randn(5, 327))).all()
    results = json.loads((tmp_path / "results.json").read_text())[WRIST]
    assert {"RotR", "TTF", "RotP"} <= set(results) and results["blowups"] == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_while_training_leaves_no_torn_file(tmp_path):
    process = start("train_policy.py", "--minutes", 0.03, "--out", tmp_path, *TRAIN)
    until(process, (tmp_path / "oracle-cube.pt").exists)
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130 and "Traceback" not in err and err.rstrip().endswith("stopped"), err
    for path in tmp_path.glob("[!.]*.pt"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_collection_goes_on_after_a_kill_and_after_ctrl_c(how, toy_policy, tmp_path):
    command = ("collect.py", "--hours", 8 / 180, "--port", PORT, "--source", "waves", "--load", "none", "--policy", toy_policy, "--out", tmp_path)
    process = start(*command)
    until(process, lambda: len(shards(tmp_path)) >= 2)
    os.kill(process.pid, how) if how == signal.SIGKILL else os.killpg(process.pid, how)
    status, _, err = finish(process)
    if how == signal.SIGINT:
        assert status == 130 and "Traceback" not in err and err.rstrip().endswith("stopped"), err
    kept = {p.name: p.read_bytes() for p in shards(tmp_path)}
    assert 2 <= len(kept) < 8
    said = run(*command)
    assert [p.name for p in shards(tmp_path)] == [f"{i:05d}.npz" for i in range(8)] and f"{8 - len(kept)} new" in said
    assert all((tmp_path / name).read_bytes() == data for name, data in kept.items())
    q, _, _ = fit_ndm.load_shards([tmp_path])
    assert len(q) == 8


# --------------------------------------------------------------------------------------------------------- bad input
def shard(folder, name="00000.npz", **changes):
    folder.mkdir(exist_ok=True)
    data = dict(q=np.zeros((400, 16)), target=np.zeros((400, 16)), hand=H.HAND, wrist="palm_down", load="balls", source="policy",
                seed=0, port="sim:0", policy="0" * 16) | changes
    np.savez(folder / name, **{k: v for k, v in data.items() if v is not None})
    return folder


def bad_inputs(tmp, policy):
    """name: (script, arguments, words of the one line)"""
    (tmp / "empty").mkdir()
    (tmp / "broken.pt").write_bytes(b"not a checkpoint")
    torn = shard(tmp / "torn") / "00000.npz"
    torn.write_bytes(torn.read_bytes()[:200])
    nan = np.zeros((400, 16))
    nan[3, 4] = np.nan
    for i in range(10):
        many = shard(tmp / "many", f"{i:05d}.npz")
    here, missing = ("--policy", policy), ("--policy", tmp / "missing.pt")
    into = ("--out", tmp / "out")
    fit = lambda folder: ("--data", folder, *here, *into)
    return {
        "train: unknown family": (train_policy, ("--family", "cube", "teapot", *into), "teapot"),
        "train: no time": (train_policy, ("--minutes", -1, *into), "--minutes"),
        "train: too few environments": (train_policy, ("--envs", 0, *into), "--envs"),
        "collect: no policy": (collect, ("--port", "sim", *missing, *into), "missing.pt is not there"),
        "collect: broken policy": (collect, ("--port", "sim", "--policy", tmp / "broken.pt", *into), "broken.pt is not a checkpoint"),
        "collect: negative hours": (collect, ("--hours=-1", "--port", "sim", *here, *into), "--hours"),
        "collect: no number of hours": (collect, ("--hours", "nan", "--port", "sim", *here, *into), "--hours"),
        "collect: not a seed": (collect, ("--port", "sim:x", *here, *into), "sim:7"),
        "collect: absent port": (collect, ("--port", "/dev/ttyUSB99", "--source", "waves", *here, *into), "/dev/ttyUSB99"),
        "collect: other trajectories there": (collect, ("--port", "sim", *here, "--out", shard(tmp / "other")), "choose another --out"),
        "collect: trajectories of something else": (collect, ("--port", "sim", *here, "--out", shard(tmp / "alien", wrist=None)), "has no wrist"),
        "collect: torn trajectory": (collect, ("--port", "sim", *here, "--out", torn.parent), "cannot be read"),
        "fit: no folder": (fit_ndm, fit(tmp / "absent"), "holds no trajectories"),
        "fit: empty folder": (fit_ndm, fit(tmp / "empty"), "holds no trajectories"),
        "fit: NaN": (fit_ndm, fit(shard(tmp / "nan", q=nan)), "NaN"),
        "fit: torn": (fit_ndm, fit(torn.parent), "cannot be read"),
        "fit: other hand": (fit_ndm, fit(shard(tmp / "left", hand="leap-left")), "leap-left"),
        "fit: other length": (fit_ndm, fit(shard(tmp / "short", q=np.zeros((10, 16)))), "(10, 16)"),
        "fit: no data": (fit_ndm, here, "run collect.py first"),
        "fit: two hands": (fit_ndm, ("--data", shard(tmp / "one"), shard(tmp / "two", port="sim:9"), *here, *into), "several hands"),
        "fit: tested on another hand": (fit_ndm, (*fit(many), "--test", shard(tmp / "task", port="sim:9")), "sim:9"),
        "fit: not a table": (fit_ndm, ("--table", tmp / "broken.pt"), "table.json"),
        "fit: too few": (fit_ndm, fit(shard(tmp / "few")), "too few"),
        "deploy: no policy": (deploy, ("--port", "sim", *missing), "missing.pt is not there"),
        "deploy: no residual": (deploy, ("--port", "sim", *here, "--residual", tmp / "none.pt"), "none.pt is not there"),
        "deploy: policy as residual": (deploy, ("--port", "sim", *here, "--residual", policy), "not a residual"),
        "deploy: not a seed": (deploy, ("--port", "sim:-1", "--base", *here), "sim:7"),
        "deploy: absent port": (deploy, ("--port", "/dev/ttyUSB99", "--base", *here), "/dev/ttyUSB99"),
        "deploy: compare on a real hand": (deploy, ("--port", "/dev/ttyUSB99", "--compare", *here), "virtual hand"),
        "deploy: compare the base alone": (deploy, ("--port", "sim", "--base", "--compare", *here), "neither --base"),
        "deploy: no episodes": (deploy, ("--port", "sim", "--base", "--episodes", 0, *here), "--episodes"),
    }


def test_bad_input_is_one_clear_line_and_exit_2(tmp_path, toy_policy, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for name, (module, arguments, words) in bad_inputs(tmp_path, toy_policy).items():
        try:
            line = one_line_problem(monkeypatch, capsys, module, *arguments)
            assert words in line, line
        except (Exception, pytest.fail.Exception) as error:              # all of them in one report
            wrong.append(f"{name}: {type(error).__name__} {error}"[:300])
    assert not wrong, "\n".join(wrong)


def test_a_full_disk_is_one_clear_line_and_leaves_whole_files(toy_policy, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))      # bytes a file may have: log and picture, but no trajectory
    command = ("collect.py", "--hours", 2 / 180, "--port", PORT, "--source", "waves", "--load", "none", "--policy", toy_policy, "--out", tmp_path)
    run(*command)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}
    status, out, err = finish(start(*command[:2], 4 / 180, *command[3:], preexec_fn=limit))
    assert status == 2 and err.splitlines()[-1].startswith("error: cannot write") and "File too large" in err and "Traceback" not in err, err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")} == whole and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("command", [("train_policy.py", "--axis", "up"), ("collect.py", "--wrist", "sideways"), ("fit_ndm.py", "--models", "toe"), ("deploy.py", "--speed", "9")])
def test_wrong_flags_are_answered_with_usage(command):
    status, out, err = finish(start(*command))
    assert status == 2 and "Traceback" not in err and err.startswith("usage:") and ": error: " in err.splitlines()[-1]


def test_a_problem_in_a_process_of_its_own(tmp_path):
    status, out, err = finish(start("deploy.py", "--port", "sim:1", "--policy", tmp_path / "none.pt"))
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
