"""The four scripts as a user runs them, at toy size: what they write, what a kill leaves, what they
say to bad input."""
import argparse
import functools
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import collect
import deploy
import fit_ndm
import hand as H
import limits
import rivals
import sim
import study
import tables
import train_policy
import without
from conftest import CUBE, ROOT, WINDOWS, finish, one_line_problem, refused, run, start, wait_for

pytestmark = pytest.mark.usefixtures("grasps")

# its motors and shapes take most of the time, and are looked at in test_virtual_hand.py
PORT, WRIST = "sim:0:wrist", "palm_up"
HERE = ("--port", PORT, "--wrist", WRIST)


def shards(folder):
    return sorted(folder.glob("[0-9]*.npz"))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, toy_policy, grasps):
    """collect (without balls, which take most of the time), fit_ndm and deploy one after the
    other, without anything that Windows lacks."""
    out = tmp_path_factory.mktemp("pipeline")
    (out / "sitecustomize.py").write_text(WINDOWS)       # also for the processes that they start
    lacking = functools.partial(run, env=os.environ | {"PYTHONPATH": str(out)})
    probe = "import sys, signal; print('termios' in sys.modules, hasattr(signal, 'SIGHUP'))"
    assert lacking("-c", probe).split() == ["True", "False"]
    lacking("collect.py", "--hours", 10 / 180, *HERE, "--load", "none", "--policy", toy_policy,
            "--out", out / "data")
    said = lacking("fit_ndm.py", "--data", out / "data", "--policy", toy_policy,
                   "--out", out / "ndm", "--models", "joint", "whole", "--steps", 30,
                   "--residual-steps", 3, "--episodes", 24)
    numbers = lacking("deploy.py", "--compare", "--episodes", 2, *HERE, "--axis", "z+",
                      "--policy", toy_policy, "--residual", out / "ndm/residual.pt",
                      "--json", out / "numbers.json")
    return out, said, numbers


# ------------------------------------------------------------------------------------ collection
def test_collect_writes_trajectories_that_stand_alone(pipeline, toy_policy):
    out = pipeline[0] / "data"
    assert [p.name for p in shards(out)] == [f"{i:05d}.npz" for i in range(10)]
    assert not list(out.glob(".*")), "temporary files are left"
    expected = [H.HAND, WRIST, "none", "policy", PORT]
    sigmas = []
    for i, path in enumerate(shards(out)):
        d = sim.load_npz(path)
        assert all(d[name].shape == (400, 16) for name in ("q", "dq", "target", "current"))
        assert d["time"].shape == (400,)
        assert np.diff(d["time"]) == pytest.approx(np.full(399, 0.05), abs=1e-6)
        names = ("hand", "wrist", "load", "source", "port")
        assert [str(d[name]) for name in names] == expected
        assert int(d["index"]) == int(d["sequence"]) == i
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
    said = run("collect.py", "--hours", 10 / 180, *HERE, "--load", "none",
               "--policy", toy_policy, "--out", again, "--workers", 1)
    assert "2 new" in said
    for path in shards(again):
        old, new = sim.load_npz(pipeline[0] / "data" / path.name), sim.load_npz(path)
        assert all(np.array_equal(old[name], new[name]) for name in old), path.name
        fresh = path.name in ("00002.npz", "00007.npz")
        assert fresh or path.stat().st_mtime_ns == before[path.name]


def test_balls_bear_on_the_joints(tmp_path):
    """Where a joint jams the trajectory is tried again, or given up."""
    lag = {}
    for load in ("balls", "none"):
        hand = sim.open_hand(PORT, wrist=WRIST, load=load)
        moving = collect.waves(1, 0)[0]                      # into the balls
        outcome = collect.trajectory(hand, job_in(tmp_path / load, 2), 1, moving)
        lag[load] = outcome.lag or np.inf
        assert outcome.lag or len(outcome.jams) == collect.ATTEMPTS
    assert lag["balls"] > 1.1 * lag["none"]


def job_in(folder, total, **facts):
    usual = dict(hand=H.HAND, wrist=WRIST, load="none", source="waves", seed=0, port="test",
                 policy="0" * 16)
    return collect.Job(folder, total, usual | facts)


def held(n, seed):
    """What `simulate` returns: n of 48 episodes were held."""
    return {"a": torch.as_tensor(collect.waves(48, seed)[:n])}


@pytest.mark.parametrize("source", ["waves", "policy"])
def test_a_longer_collection_has_more_sequences_and_begins_with_the_same(
        source, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "simulate", lambda policy, content, wrists, episodes, seed, title:
                        held(20 + seed % 7, seed))
    content = {"families": ["cube"], "axes": ["+z"]}

    def sequences(folder, total):
        return collect.sequences(job_in(folder, total, source=source), None, content)

    few = sequences(tmp_path / "a", 10)
    more = sequences(tmp_path / "a", 100)
    most = sequences(tmp_path / "a", 4000)
    assert 10 <= len(few) < 60 and 100 <= len(more) < 192 <= len(most) < 250
    assert len(np.unique(most[:, 7], axis=0)) == len(most), "they all differ"
    assert np.array_equal(more[:len(few)], few) and np.array_equal(most[:len(more)], more)
    assert np.array_equal(sequences(tmp_path / "b", 4000), most), "as if made at once"
    assert np.array_equal(sequences(tmp_path / "a", 10), most), "read"
    other = collect.sequences(job_in(tmp_path / "a", 10, source=source, seed=1), None, content)
    assert not np.array_equal(other[:10], few[:10]), "of another seed"


def test_a_policy_that_drops_everything_is_no_source(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "simulate", lambda *_: held(1, 0))
    with pytest.raises(H.Problem, match="held the object 4 times in 192 episodes with palm_up"):
        collect.sequences(job_in(tmp_path, 45, source="policy"), None, {})


class FakeHand(H.Hand):
    """Joints are where they are told to be, and time stands still. `stuck(count)` says whether the
    middle finger's base is jammed in the `count`-th move; `faulty` commands raise BusError."""

    def __init__(self, realtime=False, stuck=lambda count: False, faulty=()):
        super().__init__()
        self.realtime, self.stuck, self.faulty = realtime, stuck, set(faulty)
        self.q, self.count, self.commands, self.rests, self.reconnects = H.GRASP, 0, 0, 0, 0
        self.boxes = []

    def place(self, q, stir, out):
        self.q, self.target = q, q
        self.boxes.append((stir, out))

    def move_to(self, q):
        self.command(H.GRASP)
        self.q = self.target = q
        self.count += 1
        return q

    def _write(self, target):
        self.commands += 1
        if self.commands in self.faulty:
            self.target = None
            raise H.BusError("motor 5 (mf_mcp) does not answer; the hand has let go")
        self.q = target.copy()
        if self.stuck(self.count):
            self.q[4] = -0.2

    def read(self):
        return H.Reading(self.q, np.zeros(16), np.full(16, 0.1), 0.05 * self.commands)

    def tick(self):
        pass

    def rest(self):
        self.rests, self.target = self.rests + 1, None

    def reconnect(self, patience=600):
        self.reconnects += 1


@pytest.fixture
def real(monkeypatch):
    """FakeHand in place of the attached hand; what is typed on the terminal, if there is one."""
    def attach(hand, typed=None):
        monkeypatch.setattr(sim, "open_hand", lambda port, **_: hand)
        answers = io.StringIO("\n".join(typed) + "\n" if typed else "")
        answers.isatty = lambda: typed is not None
        monkeypatch.setattr(sys, "stdin", answers)
        return hand
    return attach


SEQUENCE = np.tile(H.GRASP, (400, 1))


def test_a_jammed_trajectory_ends_early_and_is_replayed_with_other_balls(tmp_path):
    hand = FakeHand(realtime=True, stuck=lambda count: count <= 2)
    outcome = collect.trajectory(hand, job_in(tmp_path, 3), 1, SEQUENCE)
    assert hand.count == 3 and hand.rests == 3, "it lets go after every attempt"
    assert len(outcome.jams) == 2 and "mf_mcp jammed, 1.3" in outcome.jams[0]
    assert "after 1.6 s" in outcome.jams[0]
    (path,) = shards(tmp_path)
    d = sim.load_npz(path)
    assert d["q"].shape == (400, 16) and np.abs(d["q"] - d["target"]).max() < 1e-6


def test_a_trajectory_that_always_jams_is_given_up_for_good(tmp_path):
    job = job_in(tmp_path, 3)
    hand = FakeHand(stuck=lambda count: True)
    outcome = collect.trajectory(hand, job, 1, SEQUENCE)
    attempts = range(collect.ATTEMPTS)
    assert hand.boxes == [(collect.ATTEMPTS + k, collect.TAKEN_OUT * k) for k in attempts]
    assert outcome.lag is None and len(outcome.jams) == collect.ATTEMPTS
    assert shards(tmp_path) == [] and collect.missing(job) == [0, 2]
    assert collect.there(job.folder, job.facts) == (set(), {1})
    assert (tmp_path / "00001.jammed").read_text().count("mf_mcp jammed") == collect.ATTEMPTS


def test_a_box_that_jams_everything_ends_the_collection(
        real, toy_policy, tmp_path, monkeypatch):
    hand = real(FakeHand(realtime=True, stuck=lambda count: count > 6))
    with pytest.raises(H.Problem, match="3 trajectories in a row jammed"):
        collected(monkeypatch, toy_policy, "--hours", 100 / 180, "--out", tmp_path)
    assert len(shards(tmp_path)) == 6 and hand.target is None, "it has let go"


def test_a_load_that_passes_is_no_jam():
    replay, hand = collect.Replay(np.tile(H.GRASP, (400, 1))), FakeHand()
    for step in range(30 * 13):
        hand.target = replay.act(H.GRASP - 0.4 * (step % 30 > 0))
        assert not replay.watch(hand)                        # 1.45 s at a time
    hand.target = replay.act(H.GRASP)
    assert not replay.watch(hand)
    for step in range(30):
        replay.q = H.GRASP + 0.31
        assert replay.watch(hand) == (step == 29)


def collected(monkeypatch, policy, *arguments):
    monkeypatch.setattr(sys, "argv", ["collect.py", "--port", "/dev/hand", "--source", "waves",
                                      "--policy", str(policy), *map(str, arguments)])
    collect.main()


def test_a_fault_of_the_bus_costs_the_running_trajectory_and_nothing_else(
        real, toy_policy, tmp_path, monkeypatch, capsys):
    hand = real(FakeHand(realtime=True, faulty=(500,)))
    collected(monkeypatch, toy_policy, "--hours", 3 / 180, "--out", tmp_path)
    assert len(shards(tmp_path)) == 3 and hand.reconnects == 1 and hand.count == 4
    assert "1 faults" in capsys.readouterr().out
    assert "trajectory 1 lost: motor 5" in (tmp_path / "log.txt").read_text()


def test_faults_without_end_end_the_collection(real, toy_policy, tmp_path, monkeypatch):
    hand = real(FakeHand(realtime=True, faulty=range(500, 10000)))
    with pytest.raises(H.Problem, match=f"{collect.FAULTS} faults in one trajectory"):
        collected(monkeypatch, toy_policy, "--hours", 3 / 180, "--out", tmp_path)
    assert len(shards(tmp_path)) == 1 and hand.reconnects == collect.FAULTS - 1


def test_copies_and_other_files_are_no_trajectories(tmp_path):
    for name in ("00000 (1).npz", "0a.npz", "00002.npz"):
        shard(tmp_path, name)
    assert [path.name for path in collect.trajectories(tmp_path)] == ["00002.npz"]
    assert collect.there(tmp_path, {})[0] == {2}


def two_wrists(toy_policy, folder):
    content = torch.load(toy_policy, weights_only=True)
    torch.save({**content, "wrists": ["palm_up", "palm_down"]}, folder / "policy.pt")
    return folder / "policy.pt"


def test_a_virtual_hand_collects_at_every_wrist_that_the_policy_knows(toy_policy, tmp_path):
    policy = two_wrists(toy_policy, tmp_path)
    process = start(
        sys.modules["collect"].__file__, "--port", PORT, "--hours", 4 / 180, "--source", "waves",
        "--load", "none", "--policy", policy, cwd=tmp_path)
    status, out, err = finish(process)
    assert status == 0, err
    for wrist in ("palm_up", "palm_down"):
        folder = tmp_path / f"data/sim0wrist-{wrist}-none-waves"
        assert len(shards(folder)) == 2, "the hours are shared"
        assert str(sim.load_npz(shards(folder)[0], "wrist")["wrist"]) == wrist


def test_a_real_hand_goes_from_wrist_to_wrist_with_a_person(
        real, toy_policy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    policy = two_wrists(toy_policy, tmp_path)
    folders = [tmp_path / f"data/_dev_hand-{wrist}-balls-waves"
               for wrist in ("palm_up", "palm_down")]

    def lengths():
        return [len(shards(folder)) for folder in folders]

    real(FakeHand(realtime=True))                            # nobody there: one at a time
    collected(monkeypatch, policy, "--hours", 4 / 180)
    assert lengths() == [2, 0]
    said = capsys.readouterr().out
    assert "now palm_up, then palm_down" in said and "palm_down left: turn the hand" in said
    collected(monkeypatch, policy, "--hours", 4 / 180)
    assert lengths() == [2, 2] and "now palm_down\n" in capsys.readouterr().out
    real(FakeHand(realtime=True), typed=["", ""])
    collected(monkeypatch, policy, "--hours", 6 / 180)
    assert lengths() == [3, 3]
    collected(monkeypatch, policy, "--hours", 4 / 180, "--wrist", "palm_down")
    assert lengths() == [3, 4]


def test_ctrl_d_at_the_wrist_prompt_is_one_line(real, toy_policy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hand = real(FakeHand(realtime=True), typed=[])
    line = one_line_problem(
        monkeypatch, capsys, collect, "--port", "/dev/hand", "--source", "waves",
        "--policy", two_wrists(toy_policy, tmp_path), "--hours", 4 / 180)
    assert line == "error: no answer: run this again with palm_up"
    assert hand.commands == 0


def test_only_numbers_are_trajectories(tmp_path):
    for name in ("00001.jammed", "00001 (1).jammed", "copy.jammed", "old.npz"):
        (tmp_path / name).touch()
    assert collect.there(tmp_path, {}) == (set(), {1})


# -------------------------------------------------------------------------------- fit_ndm, deploy
def test_fit_ndm_writes_models_table_and_pictures(pipeline):
    out, said, _ = pipeline
    table = json.loads((out / "ndm/table.json").read_text())
    (held_out,) = table.values()
    assert list(held_out) == ["stays where it is", "joint", "whole"]
    for e in held_out.values():
        assert len(e["one"]) == len(e["open"]) == 16 and np.isfinite(e["one"] + e["open"]).all()
    for kind, e in held_out.items():
        means = [f"{np.mean(e[name]):.2f}" for name in ("one", "open")]
        assert [*kind.split(), *means] in [line.split() for line in said.splitlines()]
    assert (out / "ndm/prediction.png").read_bytes().startswith(b"\x89PNG")
    saved = train_policy.load_checkpoint(out / "ndm/dynamics.pt", "dynamics")
    f = fit_ndm.Dynamics(**saved["config"])
    f.load_state_dict(saved["weights"])
    assert f.config["groups"] == 16
    residuals = [fit_ndm.load_residual(out / f"ndm/residual{rival}.pt")[0].state_dict()
                 for rival in ("", "-whole")]            # each through its own model
    assert not torch.equal(*(weights["net.4.bias"] for weights in residuals))
    assert not list((out / "ndm").glob(".*"))


def test_compare_writes_ceiling_base_and_residual(pipeline, toy_policy):
    out, _, said = pipeline
    report = json.loads((out / "numbers.json").read_text())
    for part in (report, report["wrists"][WRIST]):
        for kind in deploy.KINDS:
            assert 0 < part[kind]["TTF"]["mean"] <= 20 and part[kind]["RotP"]["mean"] >= 0
            assert all(part[kind][m]["std"] >= 0 for m in deploy.METRICS)
        ceiling, base, residual = (part[kind]["RotR"]["mean"] for kind in deploy.KINDS)
        assert part["gain"]["RotR"]["mean"] == pytest.approx(residual - base)
        if ceiling > base:
            assert part["recovered"] == pytest.approx((residual - base) / (ceiling - base))
        else:
            assert part["recovered"] is None
    assert report["port"] == PORT and report["episodes"] == 2
    objects = sim.objects_of("cube")
    env = sim.Rotation(2, objects, [WRIST], report["axes"], seed=0, progress=False)
    policy, _ = train_policy.load_policy(toy_policy)
    same = sim.run_episodes(env, lambda env: train_policy.act(policy, env),
                            trials=sim.trials(objects, WRIST, report["axes"], 2, 0))
    assert report["ceiling"]["RotR"]["mean"] == pytest.approx(same["RotR"].mean(), abs=1e-6)
    assert re.search(r"ceiling .*\n.* base .*\n.* residual .*\n.* gain ", said)


def test_objects_are_those_asked_for_or_those_that_the_policy_learned_with(
        toy_policy, monkeypatch):
    asked = []
    monkeypatch.setattr(deploy, "on_a_virtual_hand", lambda args, policy: asked.append(args.object))
    for given in ((), ("--object", "mug+long")):
        monkeypatch.setattr(sys, "argv", ["deploy.py", "--port", "sim", "--base", "--policy",
                                          str(toy_policy), *given])
        deploy.main()
    assert asked == ["cube", "mug+long"]


def paired(ceiling, base, residual):
    numbers = {"ceiling": ceiling, "base": base, "residual": residual}
    return {kind: {m: np.array(x, float) for m in deploy.METRICS} for kind, x in numbers.items()}


def test_differences_are_taken_within_trials():
    """Trials differ by far more than hands do; a gain of 1 in each is then certain."""
    hard = np.array([100.0, 20, 60, 5, 80, 40])
    s = deploy.summary(paired(hard + 4, hard, hard + 1))
    assert s["gain"]["RotR"] == {"mean": 1, "std": 0, "sem": 0}
    assert s["recovered"] == pytest.approx(0.25)
    assert s["recovered_interval"] == pytest.approx([0.25, 0.25])
    assert s["base"]["RotR"]["std"] == pytest.approx(np.std(hard, ddof=1))
    assert s["base"]["RotR"]["sem"] == pytest.approx(np.std(hard, ddof=1) / 6 ** 0.5)


def test_nothing_is_recovered_where_nothing_is_lost():
    s = deploy.summary(paired([1, 2, 3], [1, 2, 3], [2, 3, 4]))
    assert s["recovered"] is None and s["recovered_interval"] is None
    rng = np.random.default_rng(0)
    unsure = deploy.summary(paired(rng.normal(0.1, 5, 20), rng.normal(0, 5, 20), np.ones(20)))
    assert unsure["recovered_interval"] is None, "the ratio means nothing"
    loss = rng.normal(5, 5, 400)
    low, high = deploy.summary(paired(loss, 0 * loss, 0.5 * loss + rng.normal(0, 5, 400)))[
        "recovered_interval"]
    assert 0.35 < low < 0.5 < high < 0.65


def test_hand_and_training_simulator_get_the_same_trials(pipeline, toy_policy, monkeypatch):
    """Object, mass, friction, grasp and pushes; a push changes the velocity of the object."""
    seen = []

    class Watched(sim.VirtualHand):
        def begin(self, trial):
            super().begin(trial)
            body = self._model.body("object")
            seen.append([float(body.mass[0]), self._data.qpos[self._qadr].copy(), []])

        def push(self, velocity):
            before = self._data.qvel[-6:-3].copy()
            super().push(velocity)
            seen[-1][2].append(self._data.qvel[-6:-3] - before)

    monkeypatch.setattr(sim, "VirtualHand", Watched)
    objects = sim.objects_of("cube")
    (trial,) = sim.trials(objects[:1], WRIST, ["+z"], 1, 5)
    args = argparse.Namespace(policy=toy_policy, residual=None, record=None, port="sim:3:box")
    result = deploy.measured_episode((args, trial, None, 0, None))
    (mass, q, pushes), = seen
    assert mass == pytest.approx(trial.mass)
    assert np.abs(q - trial.grasp[:16]).max() < 0.1
    assert np.allclose(pushes, trial.pushes[:len(pushes)]) and np.any(pushes)
    assert 0 < result["TTF"] <= 20 and len(pushes) >= 20 * result["TTF"]


@pytest.mark.parametrize("lost", [3, sim.EPISODE, None])
def test_what_was_dropped_is_not_recorded_not_even_in_the_last_step(
        toy_policy, tmp_path, monkeypatch, lost):
    usual, steps = deploy.still_held, iter(range(1, sim.EPISODE + 1))
    monkeypatch.setattr(sim, "FALL", np.inf)

    def still_held(hand, referee):
        if next(steps) == lost:
            monkeypatch.setattr(sim, "FALL", -1.0)
        return usual(hand, referee)

    monkeypatch.setattr(deploy, "still_held", still_held)
    (trial,) = sim.trials(sim.objects_of("cube")[:1], WRIST, ["+z"], 1, 5)
    args = argparse.Namespace(policy=toy_policy, residual=None, record=tmp_path, port="sim:3:box",
                              facts={})
    deploy.measured_episode((args, trial, None, 7, None))
    assert len(shards(tmp_path)) == (lost is None)


def test_the_benchmark_is_the_papers_table(toy_policy, tmp_path, monkeypatch, capsys):
    """With a policy that holds still: nothing turns, nothing falls, and few goals are near."""
    monkeypatch.setitem(sim.FAMILIES, "held_out", sim.FAMILIES["cube"][:2])
    monkeypatch.setattr(sim, "EPISODE", 100)
    path = tmp_path / "benchmark.json"
    monkeypatch.setattr(sys, "argv", [
        "deploy.py", "--benchmark", "--policy", str(toy_policy), "--wrist", "palm_up", "any",
        "--axis", "z+", "y-", "any", "--episodes", "3", "--json", str(path)])
    deploy.main()
    report = json.loads(path.read_text())
    for name in ("train", "held_out"):
        assert list(report[name]) == ["z", "y", "general"]
        assert list(report["cells"][name]) == [
            f"{wrist} {axis}" for wrist in ("palm_up", "any") for axis in ("+z", "-y", "any")]
        assert list(report["families"][name]) == ["cube"]
        for numbers in report[name].values():
            assert abs(numbers["RotR"]) < 5 and 0.5 < numbers["TTF"] <= 1 and numbers["RotP"] < 1
    assert 0 <= report["goal"]["success"] < 0.5
    assert path.with_suffix(".png").stat().st_size > 1000
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["paper", "z"] for line in lines)
    assert any(line.split()[:3] == ["held_out", "palm_up", "+z"] for line in lines)


def test_several_hands_make_one_table(tmp_path, capsys):
    def numbers(rad):
        return {m: {"mean": x, "std": 1.0, "sem": 0.1}
                for m, x in (("RotR", 20 * rad), ("TTF", rad), ("RotP", 0.5))}

    def part(ceiling, base, residual):
        return {"ceiling": numbers(ceiling), "base": numbers(base), "residual": numbers(residual),
                "recovered": (residual - base) / (ceiling - base)}

    # recovered: 50 and 100 %, -20 and 50 %
    for i, (up, down) in enumerate((((16, 8, 12), (16, 8, 16)), ((10, 5, 4), (20, 10, 15)))):
        report = {"port": f"sim:{i}", **part(*np.mean([up, down], 0)),
                  "wrists": {"palm_up": part(*up), "palm_down": part(*down)}}
        (tmp_path / f"sim{i}.json").write_text(json.dumps(report))
    lines = run("tests/tables.py", "--gaps", *sorted(tmp_path.glob("sim*.json"))).splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines if line[:1] in "smp" and line}
    assert table["sim:0"] == "16.00 8.00 14.00 6.00 16.0 8.0 14.0 50 75".split()
    assert table["sim:1"] == "15.00 7.50 9.50 2.00 15.0 7.5 9.5 50 27".split()
    assert table["mean"] == "15.50 7.75 11.75 4.00 15.5 7.8 11.8 50 51".split()
    assert table["std"][:4] == ["0.71", "0.35", "3.18", "2.83"], "n - 1"
    half = next(line for line in lines if line.startswith("95 %")).split()[3:]
    assert float(half[3]) == pytest.approx(12.706 * 2.0, abs=0.01)
    assert table["palm_up"][:3] == ["13.00", "6.50", "8.00"] and table["palm_up"][-1] == "15"
    assert table["palm_down"][-1] == "75"
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_rivals_are_compared_on_the_same_hands(tmp_path):
    def report(name, gain, seconds):
        numbers = {kind: {m: {"mean": x, "std": 1.0, "sem": 0.1} for m, x in pairs.items()}
                   for kind, pairs in (("ceiling", {"RotR": 400, "TTF": 20}),
                                       ("base", {"RotR": 200, "TTF": 15}),
                                       ("residual", {"RotR": 200 + 20 * gain, "TTF": seconds}))}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"port": "sim:0", "recovered": gain / 10, **numbers,
                                    "wrists": {WRIST: {"recovered": gain / 10, **numbers}}}))
        return path

    hands = [[report(f"{k}{kind}", gain, 16 + k) for kind, gain in enumerate(gains)]
             for k, gains in enumerate(((3, 1, 2), (5, 1, 0)))]
    lines = study.rivals_table(hands)
    assert [line.split()[0] for line in lines[1:]] == ["joint", "finger", "whole"]
    means = [re.findall(r"(-?[\d.]+) \+-", line) for line in lines[1:]]
    assert means == [["4.00", "1.50", "0.00"], ["1.00", "1.50", "-3.00"], ["1.00", "1.50", "-3.00"]]


def test_what_is_gained_without_a_kind_of_randomisation():
    def result(rad, seconds):
        return {f"{place} {metric} {wrist}": np.array(values) for place in ("home", "abroad")
                for metric, values in (("RotR", 20 * rad), ("TTF", seconds))
                for wrist in ("palm_up", "palm_down")}

    lines = without.table({"nothing": result(np.array([2.0, 4.0]), [10, 20]),
                           "motor": result(np.array([3.0, 3.0]), [11, 17])})
    numbers = [re.findall(r"[-+]?\d[\d.]*", line) for line in lines[1:]]
    assert numbers == [["3.0", "15.0"] * 2, ["+0.0", "0.6", "-1.0", "1.2"] * 2]


def test_a_shifted_simulator_is_sent_more_than_the_policy_sends(monkeypatch):
    seen = []

    def delta(observation, move):
        seen.append((observation.shape, move))
        return torch.full_like(move, 0.02)

    monkeypatch.setattr(rivals.Shifted, "delta", staticmethod(delta))
    shifted, plain = (kind(4, CUBE, noise=0, randomize=(), progress=False)
                      for kind in (rivals.Shifted, sim.Rotation))
    target = shifted.target + 0.01
    shifted.step(target)
    plain.step(target + 0.02)
    assert np.allclose(shifted.state, plain.state, atol=1e-6)
    assert np.array_equal(shifted.target, target)
    (shape, move), = seen
    assert shape == (4, sim.OBSERVED) and np.allclose(move, 0.01)


def test_rivals_are_told_by_what_they_gain_over_none():
    reports = [{way: {"RotR": 10 + k + 2 * (way == "delta"), "TTF": 15} for way in rivals.WAYS}
               for k in (0, 1)]
    numbers = [re.findall(r"-?[\d.]+", line) for line in rivals.table(reports)[1:]]
    assert numbers[rivals.WAYS.index("delta")] == ["12.50", "15.0", "2.00", "0.00", "0.00", "0.00"]
    assert numbers[rivals.WAYS.index("none")][2:] == ["0.00"] * 4


def test_a_limit_changes_the_hand_or_the_trial_alone(toy_policy):
    trial, = sim.trials(CUBE[:1], WRIST, ["+z"], 1, 0)
    names = "as it is", "2 degrees of play", "object of 200 g", "as it is"
    play = H.BACKLASH
    first, *others, again = (limits.episode((name, "sim:3", toy_policy, None, trial))
                             for name in names)
    assert H.BACKLASH == play and again == first and first not in others
    lines = limits.table({"as it is": {"alone": [[8.0, 20.0], [10.0, 20.0]]},
                          "worse": {"alone": [[1.0, 5.0], [3.0, 7.0]]}})
    assert re.findall(r"[\d.]+", lines[2]) == ["2.0", "12.7", "6.0", "12.7"]


def test_deploy_records_what_fit_ndm_reads_and_is_the_same_again(pipeline, toy_policy, tmp_path):
    results = []
    for attempt, workers in (("a", 1), ("b", 2)):
        run("deploy.py", "--base", "--episodes", 2, *HERE, "--axis=+z", "--policy", toy_policy,
            "--record", tmp_path / attempt, "--workers", workers,
            "--json", tmp_path / f"{attempt}.json")
        results.append(json.loads((tmp_path / f"{attempt}.json").read_text()))
    assert results[0] == results[1]
    result = results[0]["wrists"][WRIST]["base"]
    compared = json.loads((pipeline[0] / "numbers.json").read_text())
    assert result["RotR"] == pytest.approx(compared["base"]["RotR"])
    recorded = shards(tmp_path / "a")
    if result["TTF"]["mean"] == 20:
        assert len(recorded) == 2
    if recorded:
        q = fit_ndm.load_shards([tmp_path / "a"])[0]
        assert q.shape == (len(recorded), 400, 16)


def on_a_real_hand(policy, record=None):
    args = argparse.Namespace(port="/dev/hand", wrist=[WRIST], axis=["+z"], episodes=2,
                              object="cube", record=record, base=True, seed=0, policy=policy)
    deploy.on_a_real_hand(args, train_policy.load_policy(policy)[0], None)


def test_after_a_fault_of_the_bus_deploy_offers_to_go_on(real, toy_policy, capsys):
    hand = real(FakeHand(realtime=True, faulty=(100,)), typed=["", "", "", ""])
    on_a_real_hand(toy_policy)
    said = capsys.readouterr().out
    assert "episode 1 is lost: motor 5 (mf_mcp) does not answer; the hand has let go\n" in said
    assert "episode 1: 400 steps" in said and "episode 2: 400 steps" in said
    assert hand.reconnects == 1 and hand.target is None, "it rests at the end"

    hand = real(FakeHand(realtime=True, faulty=(100,)), typed=["", "q"])
    on_a_real_hand(toy_policy)
    assert hand.reconnects == 0 and "400 steps" not in capsys.readouterr().out

    real(FakeHand(realtime=True, faulty=(100,)))
    with pytest.raises(H.BusError):                          # nobody is there to put it back
        on_a_real_hand(toy_policy)


def test_a_second_session_keeps_what_the_first_recorded(real, toy_policy, tmp_path):
    for names in (["00000.npz", "00001.npz"], ["00001.npz", "00002.npz", "00003.npz"]):
        real(FakeHand(realtime=True))
        on_a_real_hand(toy_policy, tmp_path)
        assert [p.name for p in shards(tmp_path)] == names
        (tmp_path / names[0]).unlink()                       # somebody looked, and it is no good
    assert fit_ndm.load_shards([tmp_path])[2].tolist() == [2, 3]


def test_whoever_stands_by_says_whether_the_object_stayed(real, toy_policy, tmp_path):
    real(FakeHand(realtime=True), typed=["", "n", "", ""])
    on_a_real_hand(toy_policy, tmp_path)
    assert [path.name for path in shards(tmp_path)] == ["00001.npz"]


def test_an_episode_is_kept_when_the_bus_fails_at_its_end(real, toy_policy, tmp_path, capsys):
    hand = real(FakeHand(realtime=True))
    rest = hand.rest

    def failing():
        rest()
        raise H.BusError("the adapter is gone; torque may still be on there")

    hand.rest = failing
    on_a_real_hand(toy_policy, tmp_path)
    assert "whole, but the adapter is gone; torque may still be on" in capsys.readouterr().out
    assert len(shards(tmp_path)) == 2


def test_deploy_saves_with_the_hand_at_rest(real, toy_policy, tmp_path, monkeypatch):
    hand, torques = real(FakeHand(realtime=True)), []
    monkeypatch.setattr(deploy, "save_episode", lambda *_: torques.append(hand.target))
    on_a_real_hand(toy_policy)
    assert torques == [None, None]


# ------------------------------------------------------------------------------- training, kills
# the same script with a generalist of 16 units, six episodes of evaluation and 5 s for each
TOY = """
import sim
sim.EPISODE = 100
import train_policy as T
T.Generalist.__init__.__defaults__ = (T.sim.OBSERVED, 16, 1)
T.evaluate.__defaults__ = (6,)
T.GRADIENT_STEPS = 10
T.H.run(T.main)
"""
TRAIN = ("--family", "cube", "--wrist", WRIST, "--axis=+z", "--envs", 16, "--rounds", 2,
         "--fine-tune", 500)


def test_training_writes_everything_after_a_kill_and_a_resume(tmp_path):
    oracle = tmp_path / "oracle-cube.pt"
    process = start("-c", TOY, "--steps", 1000, "--out", tmp_path, *TRAIN)
    wait_for(oracle.exists, process)                            # killed while the generalist learns
    process.kill()
    finish(process)
    first = train_policy.load_checkpoint(oracle, "oracle")
    assert first["steps"] >= 1000 and not (tmp_path / "results.json").exists()
    for path in tmp_path.glob("[!.]*.pt"):
        torch.load(path, weights_only=True)                  # whole or not there
    run("-c", TOY, "--steps", 3000, "--out", tmp_path, *TRAIN)
    second = train_policy.load_checkpoint(oracle, "oracle")
    assert second["steps"] >= 3000 and second["seconds"] > first["seconds"]
    policy, content = train_policy.load_policy(tmp_path / "policy.pt")
    assert content["families"] == ["cube"] and content["fine_tuned"] >= 500
    assert (content["wrists"], content["axes"]) == ([WRIST], ["+z"])
    assert torch.isfinite(policy(torch.randn(5, sim.OBSERVED))).all()
    results = json.loads((tmp_path / "results.json").read_text())[WRIST]
    assert {"RotR", "TTF", "RotP"} <= set(results) and results["blowups"] == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes_train_to_the_end(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, tmp_path / "toy.py",
        "--steps", 1000, "--out", tmp_path, *TRAIN, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (tmp_path / "results.json").exists()
    assert train_policy.load_policy(tmp_path / "policy.pt")[1]["rounds"] == 2


def test_training_stops_after_so_many_minutes(tmp_path):
    process = start("-c", TOY, "--minutes", 0.02, "--out", tmp_path, *TRAIN)
    status, _, err = finish(process)
    assert status == 0, err
    assert train_policy.load_checkpoint(tmp_path / "oracle-cube.pt", "oracle")["steps"] < 1e6


def test_ctrl_c_while_training_leaves_no_torn_file(tmp_path):
    process = start("-c", TOY, "--steps", 1000, "--out", tmp_path, *TRAIN)
    wait_for((tmp_path / "oracle-cube.pt").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130 and "Traceback" not in err and err.rstrip().endswith("stopped"), err
    for path in tmp_path.glob("[!.]*.pt"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_collection_goes_on_after_a_kill_and_after_ctrl_c(how, toy_policy, tmp_path):
    command = ("collect.py", "--hours", 8 / 180, *HERE, "--source", "waves", "--load", "none",
               "--policy", toy_policy, "--out", tmp_path)
    process = start(*command)
    wait_for(lambda: len(shards(tmp_path)) >= 2, process)
    os.kill(process.pid, how) if how == signal.SIGKILL else os.killpg(process.pid, how)
    status, _, err = finish(process)
    if how == signal.SIGINT:
        assert status == 130 and "Traceback" not in err and err.rstrip().endswith("stopped"), err
    kept = {p.name: p.read_bytes() for p in shards(tmp_path)}
    assert 2 <= len(kept) < 8
    said = run(*command)
    assert [p.name for p in shards(tmp_path)] == [f"{i:05d}.npz" for i in range(8)]
    assert f"{8 - len(kept)} new" in said
    assert all((tmp_path / name).read_bytes() == data for name, data in kept.items())
    assert len(fit_ndm.load_shards([tmp_path])[0]) == 8


def workers(process):
    """Process ids of the virtual hands that a script works with, or that it has left behind."""
    rows = subprocess.check_output(["ps", "-wwAo", "pid=,pgid=,args="], text=True).splitlines()
    return [int(pid) for pid, group, command in (row.split(None, 2) for row in rows)
            if int(group) == process.pid and "spawn_main" in command]


@pytest.mark.parametrize("victim", ["worker", "script"])
def test_nothing_waits_for_a_process_that_is_gone(victim, toy_policy, tmp_path):
    process = start("collect.py", "--hours", 0.4, *HERE, "--source", "waves", "--load", "none",
                    "--policy", toy_policy, "--out", tmp_path)
    try:
        wait_for(lambda: len(shards(tmp_path)) >= 2, process)
        os.kill(workers(process)[0] if victim == "worker" else process.pid, signal.SIGKILL)
        process.wait(60)
        end = time.monotonic() + 20
        while workers(process):
            assert time.monotonic() < end, "the virtual hands go on alone"
            time.sleep(0.1)
    finally:
        status, _, err = finish(process)
    if victim == "worker":
        assert status == 2 and "Traceback" not in err and "a worker process was killed" in err, err


# ------------------------------------------------------------------------------------- bad input
def shard(folder, name="00000.npz", **changes):
    folder.mkdir(exist_ok=True)
    still = np.zeros((400, 16))
    data = dict(q=still, target=still, hand=H.HAND, wrist="palm_down", load="balls",
                source="policy", seed=0, port="sim:0", policy="0" * 16, sequence=0) | changes
    np.savez(folder / name, **{k: v for k, v in data.items() if v is not None})
    return folder


def small_policy(folder, policy):
    """A folder with a policy whose layers are not those of today."""
    content = torch.load(policy, weights_only=True)
    content["weights"]["out.weight"] = content["weights"]["out.weight"][:, :3].clone()
    torch.save(content, folder / "policy.pt")
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
        many = shard(tmp / "many", f"{i:05d}.npz", sequence=i)
    here, missing = ("--policy", policy), ("--policy", tmp / "missing.pt")
    into = ("--out", tmp / "out")
    virtual = ("--port", "sim")
    task = dict(wrists="palm_up", axes="+z", objects="cube")         # as deploy.py records it

    def fit(folder):
        return "--data", folder, *here, *into

    train = {
        "unknown family": (("--family", "cube", "kettle", *into), "kettle"),
        "no time": (("--minutes", -1, *into), "--minutes"),
        "no number of minutes": (("--minutes", "nan", *into), "--minutes"),
        "no steps": (("--steps", 0, *into), "--steps"),
        "steps for other families": (("--steps", 1, 2, 3, *into), "cylinder, cuboid"),
        "negative seed": (("--seed=-1", *into), "--seed"),
        "too few environments": (("--envs", 0, *into), "--envs"),
        "no number of steps": (("--fine-tune", "nan", *into), "--fine-tune"),
        "too few rounds": (("--family", "cube", "long", "--rounds", 1, *into), "--rounds"),
        "what is held out": (("--family", "cube+egg", *into), "egg"),
        "a generalist of another size": (("--out", small_policy(tmp, policy)), "another version"),
    }
    collecting = {
        "no policy": ((*virtual, *missing, *into), "missing.pt is not there"),
        "broken policy": ((*virtual, "--policy", tmp / "broken.pt", *into),
                          "broken.pt is not a checkpoint"),
        "negative hours": (("--hours=-1", *virtual, *here, *into), "--hours"),
        "negative seed": (("--seed=-1", *virtual, *here, *into), "--seed"),
        "no number of hours": (("--hours", "nan", *virtual, *here, *into), "--hours"),
        "not a seed": (("--port", "sim:x", *here, *into), "sim:7"),
        "absent port": (("--port", "/dev/ttyUSB99", "--source", "waves", *here, *into),
                        "/dev/ttyUSB99"),
        "one folder for two wrists": ((*virtual, "--wrist", "palm_up", "base_up", *here, *into),
                                      "--out is the folder of one wrist"),
        "other trajectories there": ((*virtual, *here, "--out", shard(tmp / "other")),
                                     "choose another folder"),
        "trajectories of something else": (
            (*virtual, *here, "--out", shard(tmp / "alien", wrist=None)), "has no wrist"),
        "trajectories of an older version": (
            (*virtual, *here, "--out", shard(tmp / "old", sequence=None)), "has no sequence"),
        "torn trajectory": ((*virtual, *here, "--out", torn.parent), "cannot be read"),
    }
    fitting = {
        "no folder": (fit(tmp / "absent"), "holds no trajectories"),
        "empty folder": (fit(tmp / "empty"), "holds no trajectories"),
        "NaN": (fit(shard(tmp / "nan", q=nan)), "NaN"),
        "torn": (fit(torn.parent), "cannot be read"),
        "other hand": (fit(shard(tmp / "left", hand="leap-left")), "leap-left"),
        "other length": (fit(shard(tmp / "short", q=np.zeros((10, 16)))), "(10, 16)"),
        "no data": (here, "run collect.py first"),
        "two hands": (("--data", shard(tmp / "one"), shard(tmp / "two", port="sim:9"), *here,
                       *into), "several hands"),
        "tested on another hand": ((*fit(many), "--test", shard(tmp / "task", port="sim:9")),
                                   "sim:9"),
        "tested on a copy of it": ((*fit(many), "--test", shard(tmp / "copy")), "another --seed"),
        "tested on what is learned": ((*fit(many), "--test", tmp / "few" / ".." / "many"),
                                      "--test"),
        "too few": (fit(shard(tmp / "few")), "too few"),
        "negative seed": (("--seed=-1", *fit(many)), "--seed"),
        "no price": (("--cost", "nan", *fit(many)), "--cost"),
    }
    deploying = {
        "no policy": ((*virtual, *missing), "missing.pt is not there"),
        "no residual": ((*virtual, *here, "--residual", tmp / "none.pt"), "none.pt is not there"),
        "policy as residual": ((*virtual, *here, "--residual", policy), "not a residual"),
        "not a seed": (("--port", "sim:-1", "--base", *here), "sim:7"),
        "not a difference": (("--port", "sim:1:motors", "--base", *here), "sim:7:motor+shape"),
        "absent port": (("--port", "/dev/ttyUSB99", "--base", *here), "/dev/ttyUSB99"),
        "compare on a real hand": (("--port", "/dev/ttyUSB99", "--compare", *here),
                                   "virtual hand"),
        "compare the base alone": ((*virtual, "--base", "--compare", *here), "neither --base"),
        "no such object": ((*virtual, "--base", "--object", "kettle", *here), "kettle"),
        "an object that nobody knows": (
            ("--port", "/dev/ttyUSB99", "--object", "mug", *here), "virtual hand"),
        "live at any wrist": ((*virtual, "--live", "--wrist", "any", "--base", *here), "palm_up"),
        "about any axis on a real hand": (
            ("--port", "/dev/ttyUSB99", "--axis", "any", "--base", *here), "z+"),
        "recorded with another policy": (
            (*virtual, "--base", "--wrist", "palm_up", "--axis", "z+", *here,
             "--record", shard(tmp / "taken", source="base", **task)), "choose another folder"),
        "recorded with other objects": (
            (*virtual, "--base", "--wrist", "palm_up", "--axis", "z+", "--object", "duck", *here,
             "--record", shard(tmp / "cubes", source="base", policy=train_policy.digest(policy),
                               **task)), "objects cube"),
        "no name of a file": ((*virtual, "--base", "--json", "", *here), "--json"),
        "no episodes": ((*virtual, "--base", "--episodes", 0, *here), "--episodes"),
        "negative seed": ((*virtual, "--base", "--seed=-1", *here), "--seed"),
    }
    measuring = {
        "not a gap": (("--gaps", tmp / "broken.pt"), "--compare --json"),
        "no gap": (("--gaps", tmp / "none.json"), "--compare --json"),
    }
    scripts = {train_policy: train, collect: collecting, fit_ndm: fitting, deploy: deploying,
               tables: measuring}
    return {f"{module.__name__}: {name}": (module, *case)
            for module, cases in scripts.items() for name, case in cases.items()}


def test_bad_input_is_one_clear_line_and_exit_2(tmp_path, toy_policy, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for name, (module, arguments, words) in bad_inputs(tmp_path, toy_policy).items():
        try:
            line = one_line_problem(monkeypatch, capsys, module, *arguments)
            assert words in line, line
        except (Exception, pytest.fail.Exception) as error:  # all of them in one report
            wrong.append(f"{name}: {type(error).__name__} {error}"[:300])
    assert not wrong, "\n".join(wrong)


def test_a_full_disk_is_one_clear_line_and_leaves_whole_files(toy_policy, tmp_path):
    def limit():                       # bytes a file may have: sequences fit, no trajectory does
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    rest = (*HERE, "--source", "waves", "--load", "none", "--policy", toy_policy,
            "--out", tmp_path)
    run("collect.py", "--hours", 2 / 180, *rest)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}
    status, out, err = finish(start("collect.py", "--hours", 4 / 180, *rest, preexec_fn=limit))
    assert status == 2 and "File too large" in err and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("error: cannot write")
    assert all((tmp_path / name).read_bytes() == data for name, data in whole.items())
    for path in shards(tmp_path):                            # one may be small enough
        sim.load_npz(path)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("module, arguments", [
    (train_policy, ("--axis", "up")), (collect, ("--wrist", "sideways")),
    (fit_ndm, ("--models", "toe")), (deploy, ("--speed", "9")), (deploy, ("--axis", "up")),
    (tables, ("--gaps",))])
def test_wrong_flags_are_answered_with_usage(module, arguments, monkeypatch, capsys):
    err = refused(monkeypatch, capsys, module, *arguments)
    assert "Traceback" not in err and err.startswith("usage:")
    assert ": error: " in err.splitlines()[-1]


def test_a_problem_in_a_process_of_its_own(tmp_path):
    status, out, err = finish(
        start("deploy.py", "--port", "sim:1", "--policy", tmp_path / "none.pt"))
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
