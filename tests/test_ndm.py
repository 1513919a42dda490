"""The joint-wise dynamics against plain loops and systems whose answer is known, the residual on a
joint known to be wrong, the files."""
import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ablations
import deploy
import fit_ndm as F
import hand as H
import sim
import tables
import train_policy as T
from conftest import CUBE, ROOT, one_line_problem
from sim import W


def random_model(kind, seed=0, hidden=12):
    torch.manual_seed(seed)
    model = F.Dynamics(F.GROUPS[kind], hidden)
    for bias in model.bias:
        torch.nn.init.normal_(bias, std=0.3)
    for p in (model.scale, model.step):
        p.uniform_(0.5, 2)
    model.shift.normal_()
    return model


def random_histories(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(n, W, 2, 16, generator=generator)


def float32(x):
    return torch.tensor(np.array(x), dtype=torch.float32)


# ------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("kind", ["joint", "finger", "whole"])
def test_the_batch_is_a_loop_of_small_networks(kind):
    model, history = random_model(kind), random_histories(7)
    groups = F.GROUPS[kind]
    joints = 16 // groups
    parameters = [*model.weight, *model.bias]
    alone = [[p[g].detach().clone().requires_grad_() for p in parameters] for g in range(groups)]
    columns = []
    for g, (w1, w2, w3, b1, b2, b3) in enumerate(alone):
        group = range(g * joints, (g + 1) * joints)
        inputs = []
        for j in group:
            q, a = history[:, :, 0, j], history[:, :, 1, j]
            x = torch.cat([q[:, :9] - q[:, 9:], q[:, 9:], a - q[:, 9:]], 1)   # of this joint
            inputs.append((x - model.shift[j]) / model.scale[j])
        x = torch.tanh(torch.tanh(torch.cat(inputs, 1) @ w1 + b1) @ w2 + b2) @ w3 + b3
        for k, j in enumerate(group):
            columns.append(history[:, 9, 0, j] + x[:, k] * model.step[j])
    expected, got = torch.stack(columns, 1), model(history)
    torch.testing.assert_close(got, expected)
    expected.sin().pow(2).sum().backward()
    got.sin().pow(2).sum().backward()
    for i, p in enumerate(parameters):
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, torch.stack([group[i].grad for group in alone]))


@pytest.mark.parametrize("kind", ["joint", "finger", "whole"])
def test_a_joint_sees_its_own_group_and_nothing_else(kind):
    model, history = random_model(kind), random_histories(3).requires_grad_()
    for joint in (0, 5, 15):
        gradient = torch.autograd.grad(model(history)[:, joint].sum(), history)[0]
        seen = gradient.abs().sum((0, 1, 2)) > 0
        share = 16 // F.GROUPS[kind]
        assert seen.tolist() == [i // share == joint // share for i in range(16)]
    fingers = [{j.name[:2] for j in H.JOINTS[4 * f:4 * f + 4]} for f in range(4)]
    assert fingers == [{"if"}, {"mf"}, {"rf"}, {"th"}]


def linear_joints(n=40, steps=120, seed=0):
    """q_{t+1} = q_t + c1 (q_t - q_{t-1}) + c2 (a_t - q_t), other constants for each joint,
    wandering targets: q, a (n, T, 16)."""
    rng = np.random.default_rng(seed)
    c1, c2 = np.linspace(0.2, 0.7, 16), np.linspace(0.5, 0.15, 16)
    a = np.cumsum(rng.uniform(-0.04, 0.04, (n, steps, 16)), 1)
    q = np.zeros((n, steps, 16))
    for t in range(1, steps - 1):
        q[:, t + 1] = q[:, t] + c1 * (q[:, t] - q[:, t - 1]) + c2 * (a[:, t] - q[:, t])
    return float32(q[:, 2:]), float32(a[:, 2:])


def test_linear_joints_are_learned_and_predicted_far():
    q, a = linear_joints()
    new_q, new_a = linear_joints(seed=1)
    torch.manual_seed(0)
    model = F.Dynamics(16, 32)
    model.fit_scale(*F.windows(q, a, F.every_window(q)))
    F.fit(model, q, a, 1000, 5e-3, "linear", batch=256)
    one, far = F.errors(model, new_q, new_a, 2000)
    one_still, far_still = F.errors(None, new_q, new_a, 2000)
    assert (one < 0.08 * one_still).all(), one / one_still
    assert (far < 0.08 * far_still).all(), far / far_still
    assert one_still.min() > 5               # mrad: the task was not to stand still


def test_windows_and_errors_by_a_plain_loop():
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(3, 26, 16, generator=generator)
    a = torch.randn(3, 26, 16, generator=generator)

    def f(history):
        last, first = history[:, -1], history[:, 0]
        return last[:, 0] + 0.3 * (last[:, 1] - last[:, 0]) + 0.1 * (first[:, 0] - history[:, 3, 1])

    one, far, stay = [], [], []
    for n in range(3):
        for s in range(26 - W - F.HORIZON + 1):
            path = [q[n, s + k] for k in range(W)]
            for k in range(F.HORIZON):
                sent = [a[n, s + k + i] for i in range(W)]
                path.append(path[-1] + 0.3 * (sent[-1] - path[-1]) + 0.1 * (path[k] - sent[3]))
            one.append(path[W] - q[n, s + W])
            far.append(path[-1] - q[n, s + W + F.HORIZON - 1])
            stay.append(q[n, s + W - 1] - q[n, s + W + F.HORIZON - 1])

    def rms(rows):
        return 1000 * torch.stack(rows).pow(2).mean(0).sqrt()

    got_one, got_far = F.errors(f, q, a)
    torch.testing.assert_close(got_one, rms(one))
    torch.testing.assert_close(got_far, rms(far))
    torch.testing.assert_close(F.errors(None, q, a)[1], rms(stay))
    index = F.every_window(q)
    assert len(index) == 3 * (26 - W) and index[-1].tolist() == [2, 25 - W]
    history, after = F.windows(q, a, torch.tensor([[1, 4]]))
    assert torch.equal(history[0, :, 0], q[1, 4:14]) and torch.equal(history[0, :, 1], a[1, 4:14])
    assert torch.equal(after[0], q[1, 14])


# ---------------------------------------------------------------------------------- the residual
def episode(n, steps, seed):
    """Random numbers in place of simulated episodes."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(q=(n, steps, 16), a=(n, steps, 16), first=(n, 16), wrist=(n, 4), axis=(n, 3))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_residual_is_trained_on_what_it_will_see_on_the_hand():
    """Step by step as deploy.py does it: begin with the first position and the target before it,
    then push (q_t, a_{t-1})."""
    data = episode(3, 30, seed=0)
    episodes = F.Episodes(data)
    history, previous = sim.begin_history(data["q"][:, 0], data["first"]), data["first"]
    for t in range(30):
        if t:
            history = sim.push_history(history, data["q"][:, t], previous)
        which, step = torch.arange(3), torch.full((3,), F.Episodes.BEFORE + t)
        seen, move = episodes.seen(which, step)
        expected = sim.observation(history, data["wrist"], data["axis"])
        torch.testing.assert_close(seen, expected)
        torch.testing.assert_close(move, data["a"][:, t] - previous)
        previous = data["a"][:, t]


def test_the_imagined_hand_by_a_plain_loop():
    """`imagine` against the time line written out: which position and which target each network
    is given, from the beginning of an episode and in its middle."""
    torch.manual_seed(3)
    data = episode(1, 40, seed=4)
    residual = F.Residual(8)
    torch.nn.init.normal_(residual.net[-1].weight)
    f, f_sim = random_model("joint", 5), random_model("whole", 6)
    wrist, axis = data["wrist"], data["axis"]
    q = [data["q"][0, 0]] * 20 + list(data["q"][0])
    a = [data["first"][0]] * 20 + list(data["a"][0])

    def correction(positions, t):
        pairs = [torch.stack([positions[j], a[j - 1]]) for j in range(t - W + 1, t + 1)]
        seen = sim.observation(torch.stack(pairs)[None], wrist, axis)
        return residual(seen, (a[t] - a[t - 1])[None])[0]

    def after(model, positions, sent, t):
        pairs = [torch.stack([positions[j], sent[j]]) for j in range(t - W + 1, t + 1)]
        return model(torch.stack(pairs)[None])[0]

    for begin in (20, 23, 45):
        added = {t: correction(q, t) * (t >= 20) for t in range(begin - W, begin)}
        hand, simulated = q[:begin + 1], q[:begin + 1]
        miss = size = change = 0.0
        for t in range(begin, begin + F.ROLLOUT):
            added[t] = correction(hand, t)
            sent = {j: a[j] + added[j] for j in added}
            hand = [*hand, after(f, hand, sent, t)]
            simulated = [*simulated, after(f_sim, simulated, a, t)]
            miss += (hand[-1] - simulated[-1]).pow(2).mean() / F.ROLLOUT
            size += added[t].pow(2).mean() / F.ROLLOUT
            change += (added[t] - added[t - 1]).pow(2).mean() / F.ROLLOUT
        got = F.imagine(residual, f, f_sim, F.Episodes(data), torch.tensor([0]),
                        torch.tensor([begin]))
        for ours, expected in zip(got, (miss, size, change)):
            torch.testing.assert_close(ours, expected)


def test_the_controller_on_a_hand_does_what_the_policy_does_in_simulation(grasps):
    torch.manual_seed(0)
    policy = T.Generalist(width=16, blocks=2).eval()
    env = sim.Rotation(1, CUBE[:1], ["palm_down"], ["-z"], randomize=(), noise=0, progress=False)
    controller = deploy.Controller(policy, None, "palm_down", "-z", env.target[0])
    for _ in range(14):
        expected = np.clip(T.act(policy, env), H.LOW, H.HIGH)
        assert controller(env.measured[0]) == pytest.approx(expected[0], abs=1e-6)
        assert np.abs(expected - env.target).max() > 1e-3
        env.step(expected)


def test_the_correction_is_added_to_what_is_sent_and_hidden_from_the_policy():
    torch.manual_seed(0)
    policy, residual = T.Generalist(width=16, blocks=2).eval(), F.Residual(16)
    torch.nn.init.normal_(residual.net[-1].weight)
    alone = deploy.Controller(policy, None, "palm_up", "+z", H.GRASP)
    corrected = deploy.Controller(policy, residual, "palm_up", "+z", H.GRASP)
    rng, before = np.random.default_rng(0), H.GRASP
    for _ in range(5):
        q = H.GRASP + 0.02 * rng.normal(size=16)
        base, sent = alone(q), corrected(q)
        assert np.array_equal(base, corrected.base[0])
        seen = sim.observation(corrected.history, corrected.wrist, corrected.axis)
        move = float32(base - before)[None]
        with torch.no_grad():
            c = residual(seen, move).numpy()[0]
        assert np.abs(c).max() > 1e-4 and sent - base == pytest.approx(F.SHARE * c, abs=1e-6)
        before = base


def weak_joint(answer):
    """A hand whose joints go half of the way to `answer` (16,) times what is asked of them."""
    answer = float32(answer)

    def f(history):
        q, sent = history[:, -1].unbind(1)
        return q + 0.5 * answer * (sent - q)

    return f


def wandering(n, seed, steps=80):
    """What a simulated policy would do: smooth targets, joints that answer fully."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)[None, :, None] / 20
    turns = rng.uniform(0.3, 0.7, (n, 1, 16)) * t + rng.random((n, 1, 16))
    a = H.GRASP + 0.15 * np.sin(2 * np.pi * turns)
    q = np.zeros_like(a)
    q[:, 0] = a[:, 0]
    for t in range(steps - 1):
        q[:, t + 1] = q[:, t] + 0.5 * (a[:, t] - q[:, t])
    wrist, axis = np.tile([1.0, 0, 0, 0], (n, 1)), np.tile([0, 0, 1.0], (n, 1))
    rows = dict(q=q, a=a, first=a[:, 0], wrist=wrist, axis=axis)
    return {name: float32(x) for name, x in rows.items()}


@torch.no_grad()
def drive(f, data, residual=None):
    """As deploy.py runs it, all episodes at once: by how much the hand misses what was simulated,
    the corrections and the lags that they answer, each (n T, 16)."""
    q, previous = data["q"][:, 0], data["first"]
    history = sim.begin_history(q, previous)
    answered = sim.begin_history(q, previous)
    missed, corrections, lags = [], [], []
    for t in range(data["q"].shape[1] - 1):
        history = sim.push_history(history, q, previous)
        base = data["a"][:, t]
        c = torch.zeros_like(base)
        if residual:
            c = residual(sim.observation(history, data["wrist"], data["axis"]), base - previous)
        corrections.append(c)
        lags.append(base - q)
        answered = sim.push_history(answered, q, base + c)
        q, previous = f(answered), base
        missed.append(q - data["q"][:, t + 1])
    return torch.cat(missed), torch.cat(corrections), torch.cat(lags)


def test_the_residual_mends_a_joint_that_answers_with_less():
    """Joints 2 and 9 answer with 0.8 of what is asked, the rest fully: there the correction goes
    further the way the joint goes (0.25 of the lag, the exact answer), elsewhere there is next to
    none; and the hand, driven with it, misses far less."""
    answer = np.ones(16)
    weak = [2, 9]
    answer[weak] = 0.8
    f = weak_joint(answer)
    residual = F.fit_residual(f, weak_joint(np.ones(16)), wandering(64, 0), 400, 0.0005,
                              batch=48)
    fresh = wandering(6, 1)
    alone = drive(f, fresh)[0].pow(2).mean(0).sqrt()
    missed, c, lag = drive(f, fresh, residual)
    mended = missed.pow(2).mean(0).sqrt()
    good = [i for i in range(16) if i not in weak]
    assert (mended[weak] < 0.5 * alone[weak]).all(), (mended[weak], alone[weak])
    slope = (c * lag).sum(0) / (lag * lag).sum(0)
    assert (slope[weak] > 0.12).all() and (slope[weak] < 0.4).all(), slope
    assert slope[good].abs().max() < 0.5 * slope[weak].min()


def test_the_residual_does_not_correct_what_both_models_believe():
    """Two models that are wrong in the same way (they expect every joint to give way by 30 mrad a
    step) differ in nothing: no correction, though neither predicts what simulated joints did."""
    def f(history):
        return weak_joint(np.ones(16))(history) + 0.03

    data = wandering(32, 0)
    residual = F.fit_residual(f, f, data, 60, 0.0005, batch=48)
    assert drive(f, data, residual)[1].abs().max() < 1e-4


def test_the_correction_is_bounded_and_starts_at_nothing():
    residual = F.Residual(8)
    seen, move = 100 * torch.randn(50, sim.OBSERVED), torch.randn(50, 16)
    assert torch.equal(residual(seen, move), torch.zeros(50, 16))
    torch.nn.init.normal_(residual.net[-1].weight, std=1000)
    c = residual(seen, move)
    assert c.abs().max() <= F.BOUND and c.abs().max() > 0.99 * F.BOUND


# -------------------------------------------------------------------------------------- the data
def test_the_simulated_boxes_replay_the_targets_under_load(monkeypatch):
    monkeypatch.setattr(F, "BOXES", 2)
    drawn = []
    other = sim.Balls.drawn
    monkeypatch.setattr(sim.Balls, "drawn", lambda rng: drawn.append(other(rng)) or drawn[-1])
    n = 4
    a = H.GRASP + 0.2 * np.sin(np.arange(100)[:, None] / 8 + np.arange(H.N))
    wrist = [sim.WRISTS[name] for name in ("palm_up", "palm_up", "palm_down", "palm_down")]
    data = {"a": float32(np.tile(a, (n, 1, 1))), "wrist": float32(wrist)}
    q, sent = F.simulate_box(data, seed=0)
    again, _ = F.simulate_box(data, seed=0)
    assert len(set(drawn)) == 2                              # and the same two again
    assert q.shape == sent.shape == data["a"].shape and torch.isfinite(q).all()
    assert torch.equal(q, again)
    noise = (sent - data["a"]).std(dim=(1, 2))
    assert all(s == 0 or 0.8 * F.SIGMA < s < 1.2 * F.SIGMA for s in noise.tolist())
    moved = (q[:, 1:] - q[:, :-1]).abs().mean((1, 2))
    assert (moved > 0.002).all()
    free = F._replay(sim.Balls(count=0), sent.numpy(), data["wrist"].numpy(),
                     np.random.default_rng(0))
    pushed = np.abs(q.numpy() - free).mean((0, 1))
    assert pushed.max() > 0.01, pushed                       # balls are in the way of some joints


def save_trajectory(path, seed, **changed):
    """What collect.py writes, as far as fit_ndm.py reads it."""
    q = np.random.default_rng(seed).normal(0, 0.1, (sim.EPISODE, 16)).astype(np.float32)
    sim.save_npz(path, **(dict(q=q, target=q, hand=H.HAND, port="sim:0", sequence=0) | changed))


def test_a_sequence_is_trained_on_or_held_out_with_all_its_replays(tmp_path):
    """25 trajectories replay 12 sequences in turn, on two wrists."""
    for wrist in ("up", "down"):
        for i in range(25):
            save_trajectory(tmp_path / wrist / f"{i:05d}.npz", i, sequence=i % 12)
    q, a, sequence, port = F.load_shards([tmp_path / "up", tmp_path / "down"])
    held = F.held_out(sequence)
    assert set(sequence[held].tolist()) == {9}
    assert 9 not in sequence[~held].tolist() and held.sum() == 4
    assert q.shape == a.shape == (50, sim.EPISODE, 16) and port == "sim:0"


def test_something_is_always_held_out(tmp_path):
    for sequence in ([0, 1, 2] * 4, [9, 19, 3] * 4, list(range(10)), [9, 19] * 5):
        sequence = torch.tensor(sequence)
        held = F.held_out(sequence)
        assert held.any() and not held.all()
        assert not set(sequence[held].tolist()) & set(sequence[~held].tolist())
    for few in ([0] * 30, list(range(9)), []):
        with pytest.raises(H.Problem, match="too few"):
            F.held_out(torch.tensor(few))


def test_a_foreign_file_is_a_problem(tmp_path):
    sim.save_npz(tmp_path / "00000.npz", q=np.zeros((sim.EPISODE, 16)), hand=H.HAND)
    with pytest.raises(H.Problem, match="00000.npz has no port, sequence, target"):
        F.load_shards([tmp_path])


# ------------------------------------------------------------------------------------- the tables
def test_the_interval_is_the_textbook_one():
    # Student's own: extra hours of sleep with a drug, ten patients (t quantile 2.262)
    mean, std, half = tables.interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (mean, std) == (pytest.approx(1.58), pytest.approx(1.230, abs=1e-3))
    assert half == pytest.approx(0.880, abs=1e-3)
    for n, quantile in ((2, 12.706), (21, 2.086), (31, 2.042), (61, 2.000)):
        values = np.random.default_rng(n).normal(size=n)
        _, std, half = tables.interval(values)
        assert half == pytest.approx(quantile * std / n ** 0.5, rel=2e-3)
    assert np.isnan(tables.interval([3.0])[1:]).all() and tables.interval([3.0])[0] == 3


def test_the_errors_of_several_hands_become_one_table(tmp_path, monkeypatch, capsys):
    files = []
    for hand, (joint, finger) in enumerate(((2.0, 3.0), (4.0, 5.0), (6.0, 8.5))):
        table = {"the task": {
            "joint": {"one": [joint] * 16, "open": [10.0] * 16},
            "finger": {"one": [finger] * 16, "open": [10.0] * 16}}}
        files.append(tmp_path / f"{hand}.json")
        files[-1].write_text(json.dumps(table))
    monkeypatch.setattr(sys, "argv", ["tables.py", "--errors", *map(str, files)])
    tables.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    joint, finger = [next(row for row in rows if row[:1] == [k]) for k in ("joint", "finger")]
    assert joint == ["joint", "4.00", "sd", "2.00", "+-", "4.97"]
    assert finger[6:] == ["1.50", "sd", "0.87", "+-", "2.15"]         # hand by hand: 1, 1, 2.5
    (tmp_path / "broken.json").write_text("{}")
    assert "table.json" in one_line_problem(
        monkeypatch, capsys, tables, "--errors", files[0], tmp_path / "broken.json")


# ------------------------------------------------------------------------------------ checkpoints
class Attack:
    """What a checkpoint from a stranger may contain: unpickled carelessly, it runs a command."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_checkpoint_runs_code(tmp_path):
    struck = tmp_path / "struck"
    content = {"kind": "policy", "hand": H.HAND, "joints": Attack(struck)}
    torch.save(content, tmp_path / "torch.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(content, protocol=2))
    for name in ("torch", "pickle"):
        with pytest.raises(H.Problem, match=name):
            T.load_checkpoint(tmp_path / f"{name}.pt", "policy")
    assert not struck.exists()
    pickle.loads((tmp_path / "pickle.pt").read_bytes())      # the attack was a real one
    assert struck.exists()


def test_bad_checkpoints_are_problems(tmp_path, toy_policy, monkeypatch):
    sound = toy_policy.read_bytes()
    for name, data in (("torn", sound[:len(sound) // 2]), ("text", b"hello"), ("empty", b"")):
        (tmp_path / f"{name}.pt").write_bytes(data)
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({"kind": "policy", "hand": H.HAND}, tmp_path / "bare.pt")
    good = torch.load(toy_policy, weights_only=True)
    torch.save(good | {"config": good["config"] | {"width": 9}}, tmp_path / "misfit.pt")
    torch.save({k: v for k, v in good.items() if k != "weights"}, tmp_path / "hollow.pt")
    spoilt = good["weights"] | {"out.bias": torch.full_like(good["weights"]["out.bias"], np.nan)}
    torch.save(good | {"weights": spoilt}, tmp_path / "spoilt.pt")
    names = ("absent", "torn", "text", "empty", "list", "bare", "misfit", "hollow", "spoilt")
    for name in names:
        with pytest.raises(H.Problem, match=f"{name}.pt"):
            T.load_policy(tmp_path / f"{name}.pt")
    with pytest.raises(H.Problem, match="policy, not a residual"):
        F.load_residual(toy_policy)
    monkeypatch.setattr(H, "HAND", "other-hand")
    with pytest.raises(H.Problem, match=f"{good['hand']}.*other-hand"):
        T.load_policy(toy_policy)


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path, toy_policy):
    path = tmp_path / "policy.pt"
    path.write_bytes(toy_policy.read_bytes())
    code = ("import os, pathlib, sys, train_policy as T\n"
            "pathlib.Path.replace = os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
            "T.save_checkpoint(sys.argv[1], 'policy')")
    killed = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT)
    assert killed.returncode == -9
    assert path.read_bytes() == toy_policy.read_bytes() and T.load_policy(path)


def test_ablations_learn_from_what_they_say(tmp_path):
    simulated, hand = linear_joints(), linear_joints(seed=1)
    hand = hand[0][:, :-1], hand[1][:, 1:]               # answers a step later
    f_sim = F.pretrained("joint", *simulated, 300, 0)
    still = torch.zeros(30, 117, 16)                     # nothing is to be learned here
    data = SimpleNamespace(
        train={"box": [torch.cat([still, x]) for x in hand], "free": hand},
        test={name: hand for name in ablations.SETS})
    variants = (
        ablations.Variant("box"),
        ablations.Variant("the first of it", share=1 / 70),
        ablations.Variant("simulation alone", data=""),
        ablations.Variant("not pretrained", data="free", pretrained=False))
    args = Namespace(steps=300, seed=0)
    report = {variant.name: ablations.measure(variant, data, {"joint": f_sim}, args)
              for variant in variants}
    assert [row["minutes"] * 1200 / 117 for row in report.values()] == pytest.approx([70, 1, 0, 40])
    all_of_it, first, alone, anew = (row["task"]["open"] for row in report.values())
    before = [e.mean().item() for e in F.errors(f_sim, *hand)]
    assert [report["simulation alone"]["task"][e] for e in ablations.ERRORS] == before
    assert all_of_it < 0.7 * alone and anew < 0.7 * alone and first > 0.9 * alone
    mean, half, more, around = ablations.over_hands([report] * 2, variants[3], "task", "open")
    assert (mean, half, around) == (pytest.approx(anew), 0, 0)
    assert more == pytest.approx(anew - all_of_it)
    assert f"{alone - all_of_it:+6.2f}" in ablations.table([report] * 2, variants)
