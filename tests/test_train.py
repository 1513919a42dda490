"""Stage 1 from the inside: reward, observation, advantages, curriculum, and going on exactly."""
import argparse
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import hand as H
import sim
import train_policy as T
from conftest import CUBE, ROOT, small_cache

pytestmark = pytest.mark.usefixtures("grasps")


def environment(n=6, **options):
    env = sim.Rotation(n, CUBE, ["palm_up", "palm_down"], ["+z", "-z"], progress=False, **options)
    return env, T.Task(env)


def arguments(out, **changes):
    usual = dict(envs=12, wrist=["palm_up", "palm_down"], axis=["+z", "-z"], seed=0, steps=1e9,
                 rounds=3, fine_tune=0, minutes=np.inf, start=None, family=["cube"], out=out,
                 randomize=sim.EVERYTHING)
    args = argparse.Namespace(**usual | changes)
    args.steps = [args.steps] * len(args.family)
    return args


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A generalist of 16 units, and one thread, so that sums are the same each time."""
    monkeypatch.setattr(T.Generalist.__init__, "__defaults__", (sim.OBSERVED, 16, 1))
    monkeypatch.setattr(T, "GRADIENT_STEPS", 20)
    torch.set_num_threads(1)


@pytest.fixture
def short(monkeypatch):
    """Episodes of 3 s."""
    for module in (sim, T):
        monkeypatch.setattr(module, "EPISODE", 60)


# ---------------------------------------------------------------------- histories and episodes
def test_a_history_moves_on_once_a_step_whoever_else_falls():
    """Every pair of neighbouring entries is a control step apart, also in steps in which other
    environments end their episodes and the value of what follows is asked for."""
    env, task = environment()
    env.steps[:3] = sim.EPISODE - 5                          # three end in the middle of the batch
    curriculum = T.Curriculum(env, task)
    torch.manual_seed(0)
    oracle, seen = T.Oracle(task.observe().shape[1]), []
    step = env.step
    env.step = lambda target: (step(target), seen.append(env.measured[5].copy()))
    with torch.no_grad():
        T.roll_out(oracle, env, task, curriculum, task.observe())
    assert len(seen) == T.HORIZON and (env.steps[:3] < sim.EPISODE - 5).all()
    assert env.history[5, -3:, 0].numpy() == pytest.approx(np.array(seen[-3:]), rel=1e-6)


def test_half_of_the_episodes_that_hold_go_on_from_where_they_are(monkeypatch):
    """The hand and its history do not jump at the end of an episode, only its task is new."""
    monkeypatch.setattr(T, "GO_ON", 1.0)
    env, task = environment()
    env.steps[:3] = sim.EPISODE - 2
    curriculum, seen, anew = T.Curriculum(env, task), [], set()
    env.level[:] = 1
    oracle, step, reset = T.Oracle(task.observe().shape[1]), env.step, env.reset
    oracle.log_std.data[:] = -5                              # or random actions let it fall
    env.step = lambda target: (step(target), seen.append(env.measured[0].copy()))
    env.reset = lambda ids: (reset(ids), anew.update(ids))
    with torch.no_grad():
        T.roll_out(oracle, env, task, curriculum, task.observe())
    assert not anew & {0, 1, 2} and env.steps[:3].tolist() == [T.HORIZON - 2] * 3
    assert len(curriculum.new) == 3 + len(anew)
    assert env.history[0, -3:, 0].numpy() == pytest.approx(np.array(seen[-3:]), rel=1e-6)


def test_what_follows_a_fall_in_cloning_belongs_to_the_new_episode(tmp_path):
    """Labels after a fall come from the goal and the history of the episode that began."""
    env, _ = environment(4)
    cloning = T.Cloning([], arguments(tmp_path), tmp_path / "policy.pt")
    torch.manual_seed(0)
    oracle, seen = T.Oracle(217), []
    fell = []
    step = env.step

    def falling(target):
        step(target)
        if env.steps[1] == 7 and not fell:
            fell.append(True)
            env.fallen[1] = True

    def spy(obs, act=oracle.act):
        seen.append(obs.clone())
        return act(obs)

    env.step, oracle.act = falling, spy
    cloning._collect(env, oracle, cloning=True)
    past_q, goal = slice(0, 3 * H.N), slice(166, 170)        # see Task.observe
    assert fell
    first = seen[7][1]
    states = first[past_q].reshape(3, H.N)
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])
    assert first[goal] == pytest.approx(seen[0][0][goal].abs() * first[goal].sign(), abs=1e-5)


# ------------------------------------------------------------------------------- the algorithm
def test_advantages_by_a_plain_loop():
    torch.manual_seed(0)
    n, oracle = 5, T.Oracle(8)
    batch = {name: torch.randn(T.HORIZON, n) for name in ("reward", "value", "after")}
    batch["ended"] = torch.rand(T.HORIZON, n) < 0.2
    obs = torch.randn(n, 8)
    with torch.no_grad():
        scale = oracle.returns.var.sqrt().item()
        last = oracle.value(obs)
        T.advantages(oracle, batch, obs)
    for i in range(n):
        for t in range(T.HORIZON):
            total, weight = 0.0, 1.0
            for s in range(t, T.HORIZON):
                ended = bool(batch["ended"][s, i])
                following = (batch["after"][s, i] if ended else
                             batch["value"][s + 1, i] if s + 1 < T.HORIZON else last[i])
                error = batch["reward"][s, i] / scale + T.GAMMA * following - batch["value"][s, i]
                total += weight * error
                if ended:
                    break
                weight *= T.GAMMA * T.LAMBDA
            assert batch["advantage"][t, i] == pytest.approx(float(total), abs=1e-5)
    assert torch.equal(batch["return"], batch["advantage"] + batch["value"])


def test_levels_rise_with_rotation_and_not_with_holding():
    env, task = environment(8)
    curriculum = T.Curriculum(env, task)
    assert not env.level.any() and not task.holds.any()
    assert env.cells[0] == (env.wrists[0], env.axes[0], "cube")
    others = len(env.cells) - 1
    enough = T.RAISE_RAD["z"]
    for turned, raised in ((0.0, 0), (enough + 1, 1), (0.8 * enough, 1), (0.4 * enough, 0)):
        curriculum.recent = [
            [(turned, held)] * curriculum.enough for held in [1.0] + others * [0.3]]
        rows = list(curriculum.raise_levels())
        assert [row[0] for row in rows] == env.cells
        assert not any(curriculum.recent)
        assert (env.level / T.RAISE[0]).tolist() == [raised] + [0] * others
        assert task.holds.tolist() == [True] + [False] * others
    env.cells *= 20                                      # each of so many is seen rarely
    assert T.Curriculum(env, task).rise == T.RAISE[1]


def test_a_family_that_is_easy_does_not_raise_the_level_of_a_hard_one():
    objects = sim.objects_of("cube") + sim.objects_of("cylinder")[:3]
    for obj in objects[3:]:
        small_cache(obj, 8)
    env = sim.Rotation(12, objects, ["palm_up"], progress=False)
    assert env.cells == [("palm_up", "+z", "cube"), ("palm_up", "+z", "cylinder")]
    task = T.Task(env)
    curriculum = T.Curriculum(env, task)
    env.omega[:] = env.axis * np.where(env.which < 3, 0.01, 0.5)[:, None]
    env.steps[:] = T.EPISODE
    for _ in range(curriculum.enough):
        for _ in range(T.EPISODE):
            curriculum.count(np.zeros(12, bool))
        curriculum.count(np.ones(12, bool))
        list(curriculum.raise_levels())
    assert env.level[0] == 0 and env.level[1] > 0
    env.reset(np.arange(12))
    assert env.g == pytest.approx(np.where(env.which < 3, 0.2, 0.2 + 0.8 * env.level[1]))


# -------------------------------------------------------------------------------- going on exactly
def weights(path, kind):
    return T.load_checkpoint(path, kind)["weights"]


def test_an_interrupted_run_is_the_run_that_was_not_interrupted(tmp_path, monkeypatch, short):
    """Oracle: stopped twice, each time in the middle of episodes. Generalist: after every round."""
    monkeypatch.setattr(T, "ENOUGH", (12, 3))
    batch = 12 * T.HORIZON
    oracles = {}
    for name, stops in (("straight", (30,)), ("interrupted", (4, 17, 30))):
        for stop in stops:
            args = arguments(tmp_path, steps=stop * batch)
            oracle, curve, _ = T.train_oracle("cube", args, tmp_path / name / "oracle.pt")
        oracles[name] = oracle, curve
        for rounds in (3,) if name == "straight" else (1, 2, 3):
            path = tmp_path / name / "policy.pt"
            cloning = T.Cloning([("cube", oracle)], arguments(tmp_path), path)
            while cloning.rounds < rounds:
                cloning.iterate()
        cloning.finish()
    one, other = (oracles[name][1] for name in ("straight", "interrupted"))
    assert len(one) > 4
    assert [row._replace(seconds=0) for row in one] == [row._replace(seconds=0) for row in other]
    for file, kind in (("oracle.pt", "oracle"), ("policy.pt", "policy")):
        one, other = (weights(tmp_path / name / file, kind) for name in oracles)
        assert all(torch.equal(one[name], other[name]) for name in one), kind
    assert not list((tmp_path / "interrupted").glob("cloning-*"))


def test_a_policy_is_gone_on_with_only_for_the_same(tmp_path, short):
    oracle = T.Oracle(217)
    path = tmp_path / "policy.pt"
    early = arguments(tmp_path, minutes=1e-9)
    for rounds in (1, 2):                                    # stopped after no round, then gone on
        cloning = T.Cloning([("cube", oracle)], early, path)
        cloning.iterate()
        assert cloning.rounds == rounds
    T.clone([("cube", oracle)], arguments(tmp_path), path)
    T.for_the_same(path, arguments(tmp_path))                # finished: nothing to do
    assert T.Cloning([("cube", oracle)], arguments(tmp_path), path).rounds == 3
    with torch.no_grad():                                    # unless the oracle has learned more
        oracle.log_std += 1
    assert T.Cloning([("cube", oracle)], arguments(tmp_path), path).rounds == 0
    for changes in (dict(rounds=4), dict(steps=2e9), dict(seed=1), dict(axis=["+z"]),
                    dict(randomize=sim.PAPER), dict(family=["cuboid"])):
        with pytest.raises(H.Problem, match="choose another --out"):
            T.Cloning([("cube", oracle)], arguments(tmp_path, **changes), path)


def test_a_run_may_begin_with_the_weights_of_another(tmp_path):
    start = tmp_path / "first.pt"
    T.train_oracle("cube", arguments(tmp_path, steps=1), start)
    training = T.Training("cube", arguments(tmp_path), tmp_path / "second.pt", start)
    first = T.load_checkpoint(start, "oracle")["weights"]
    assert all(torch.equal(value, first[name])
               for name, value in training.oracle.state_dict().items())
    assert training.steps == 0
    with pytest.raises(H.Problem, match="none.pt is not there"):
        T.Training("cube", arguments(tmp_path), tmp_path / "third.pt", tmp_path / "none.pt")


def test_a_run_begins_at_the_levels_of_another_in_the_cells_that_both_have(tmp_path):
    start = tmp_path / "first.pt"
    both = dict(wrist=["palm_up"], axis=["+z", "+x"])
    first = T.Training("cube", arguments(tmp_path, **both), start)
    first.env.level[:] = 0.25, 0.5
    first.save()
    more = T.Training("cube", arguments(tmp_path, axis=["+x", "-y"], wrist=both["wrist"]),
                      tmp_path / "second.pt", start)
    assert [cell[1] for cell in more.env.cells] == ["+x", "-y"]
    assert more.env.level.tolist() == [0.5, 0.0] and more.task.holds.tolist() == [True, False]
    weakest = more.env.weakest
    assert np.allclose(more.env.g, np.where(more.env.cell == 0, (1 + weakest) / 2, weakest))
    other = T.Training("cuboid", arguments(tmp_path, **both), tmp_path / "third.pt", start)
    assert not other.env.level.any()
    assert [training.optimizer.param_groups[0]["lr"] for training in (more, other)] == [
        T.GOING_ON, T.LEARNING_RATE]


def test_the_generalist_begins_with_the_policy_of_another_run(tmp_path):
    old = tmp_path / "old"
    oracle = T.Oracle(217)
    first = T.clone([("cube", oracle)], arguments(old), old / "policy.pt").student
    on = T.Cloning([("cube", oracle)], arguments(tmp_path, start=old), tmp_path / "policy.pt")
    assert T.fingerprint(on.student) == T.fingerprint(first)
    mean = first.norm.mean.clone()
    on.iterate()
    assert torch.equal(on.student.norm.mean, mean)           # what it has learned rests on it
    anew = T.Cloning([("cube", oracle)], arguments(tmp_path, start=old / "oracle-cube.pt"),
                     tmp_path / "other.pt")
    assert T.fingerprint(anew.student) != T.fingerprint(first)


def test_the_generalist_learns_on_and_going_on_is_exact(tmp_path, short):
    """With the critic of an oracle, from level 1, in policy.pt too; stopped and gone on with."""
    batch, oracle, results = 12 * T.HORIZON, T.Oracle(217), {}
    for name, stops in (("straight", (6,)), ("interrupted", (2, 6))):
        args = arguments(tmp_path / name)
        for stop in stops:
            args.fine_tune = stop * batch
            cloning = T.clone([("cube", oracle)], args, args.out / "policy.pt")
            if stop == stops[0]:
                cloned = {key: value.clone() for key, value in cloning.student.state_dict().items()}
            T.fine_tune(cloning.student, oracle, args)
        training = T.load_checkpoint(args.out / "fine-tuned.pt", "oracle")
        policy = T.load_checkpoint(args.out / "policy.pt", "policy")
        assert training["steps"] == policy["fine_tuned"] == 6 * batch
        assert (training["env"]["arrays"]["level"] == 1).all()
        results[name] = {**policy["weights"], **training["weights"]}
        assert any(not torch.equal(value, cloned[key]) for key, value in policy["weights"].items())
    one, other = results.values()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    with torch.no_grad():
        oracle.log_std += 1                          # another oracle: all of it begins anew
    args.minutes = 1e-9
    assert T.clone([("cube", oracle)], args, args.out / "policy.pt").rounds == 1
    assert not (args.out / "fine-tuned.pt").exists()


@pytest.mark.parametrize("there, starts", [
    (None, [None, "out/oracle-cube.pt"]),
    (["oracle-cuboid.pt"], ["old/oracle-cube.pt", "old/oracle-cuboid.pt"]),      # is not there
    (["oracle-cube.pt"], ["old/oracle-cube.pt", "out/oracle-cube.pt"])])
def test_a_family_begins_with_its_own_weights_or_those_of_the_one_before(
        tmp_path, monkeypatch, there, starts):
    begun, old = [], tmp_path / "old"
    old.mkdir()
    for name in there or []:
        (old / name).touch()
    monkeypatch.setattr(T, "arguments", lambda: arguments(
        tmp_path / "out", family=["cube", "cuboid"], start=there and old))
    monkeypatch.setattr(T, "train_oracle", lambda family, args, path, start: (
        begun.append(start), [], 0.0))
    done = argparse.Namespace(student=None, rounds=3, seconds=0.0)
    for name, result in (("draw_curve", None), ("clone", done), ("evaluate", {})):
        monkeypatch.setattr(T, name, lambda *_, result=result: result)
    (tmp_path / "out").mkdir()
    T.main()
    assert begun == [start and tmp_path / start for start in starts]


PROCESS = """
import sys, torch, argparse, train_policy as T, sim
args = argparse.Namespace(**eval(sys.argv[1], {"inf": float("inf")}))
torch.distributed.init_process_group("gloo")
training = T.Training("cube", args, __import__("pathlib").Path(sys.argv[2]))
seen = [T.gather(training.env.state.sum())]
for _ in range(2):
    training.iterate()
seen += [T.gather([value.tolist() for value in training.oracle.state_dict().values()])]
seen += [T.gather(training.optimizer.param_groups[0]["lr"]), T.gather(training.steps)]
if not T.RANK:
    other, *same = [first == second for first, second in seen]
    print("differ" if not other else "alike", *same, training.steps)
torch.distributed.destroy_process_group()
"""


def test_two_processes_hold_the_same_weights_and_other_hands(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(vars(arguments(None, envs=16))), str(tmp_path / "o.pt")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.stdout.split() == ["differ", "True", "True", "True", str(2 * 16 * T.HORIZON)], run


def test_a_run_for_something_else_is_not_gone_on_with(tmp_path):
    path = tmp_path / "oracle.pt"
    T.train_oracle("cube", arguments(tmp_path, steps=1), path)
    for changes in (dict(wrist=["palm_up"]), dict(envs=16), dict(axis=["+z"]), dict(seed=1),
                    dict(randomize=sim.PAPER)):
        with pytest.raises(H.Problem, match="choose another --out"):
            T.train_oracle("cube", arguments(tmp_path, steps=1e3, **changes), path)


def test_what_was_trained_at_any_wrist_and_axis_is_evaluated_and_filmed(tmp_path, short):
    args = arguments(tmp_path, wrist=[sim.ANY], axis=[sim.ANY])
    result = T.evaluate(T.Generalist(), args, episodes=4)
    assert set(result) == {sim.ANY} and (tmp_path / "policy-any.gif").exists()
