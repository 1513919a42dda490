"""The joint-wise dynamics against plain loops and systems whose answer is known, the residual on a joint known to be wrong, the files."""
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import deploy
import fit_ndm as F
import hand as H
import sim
import train_policy as T
from conftest import CUBE, ROOT
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


def histories(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(n, 16, W, 2, generator=g), torch.randn(n, 16, generator=g)


# -------------------------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("kind", ["joint", "finger", "whole"])
def test_the_batch_is_a_loop_of_small_networks(kind):
    model = random_model(kind)
    h, _ = histories(7)
    groups = F.GROUPS[kind]
    joints = 16 // groups
    plain = [[p[g].detach().clone().requires_grad_() for p in [*model.weight, *model.bias]] for g in range(groups)]
    columns = []
    for g, (w1, w2, w3, b1, b2, b3) in enumerate(plain):
        inputs = []
        for j in range(g * joints, (g + 1) * joints):
            q, a = h[:, j, :, 0], h[:, j, :, 1]
            x = torch.cat([q[:, :9] - q[:, 9:], q[:, 9:], a - q[:, 9:]], 1)        # twenty numbers of this joint
            inputs.append((x - model.shift[j]) / model.scale[j])
        x = torch.tanh(torch.tanh(torch.cat(inputs, 1) @ w1 + b1) @ w2 + b2) @ w3 + b3
        for k, j in enumerate(range(g * joints, (g + 1) * joints)):
            columns.append(h[:, j, 9, 0] + x[:, k] * model.step[j])
    expected, got = torch.stack(columns, 1), model(h)
    torch.testing.assert_close(got, expected)
    expected.sin().pow(2).sum().backward()
    got.sin().pow(2).sum().backward()
    for i, p in enumerate([*model.weight, *model.bias]):
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, torch.stack([group[i].grad for group in plain]))


@pytest.mark.parametrize("kind", ["joint", "finger", "whole"])
def test_a_joint_sees_its_own_group_and_nothing_else(kind):
    model, (h, _) = random_model(kind), histories(3)
    h.requires_grad_()
    for joint in (0, 5, 15):
        seen = torch.autograd.grad(model(h)[:, joint].sum(), h)[0].abs().sum((0, 2, 3)) > 0
        share = 16 // F.GROUPS[kind]
        assert seen.tolist() == [i // share == joint // share for i in range(16)]
    fingers = [{j.name[:2] for j in H.JOINTS[4 * f:4 * f + 4]} for f in range(4)]
    assert fingers == [{"if"}, {"mf"}, {"rf"}, {"th"}]


def linear_joints(n=40, T_=120, seed=0):
    """q_{t+1} = q_t + c1 (q_t - q_{t-1}) + c2 (a_t - q_t), other constants for each joint, wandering targets: q, a (n, T, 16)."""
    rng = np.random.default_rng(seed)
    c1, c2 = np.linspace(0.2, 0.7, 16), np.linspace(0.5, 0.15, 16)
    a = np.cumsum(rng.uniform(-0.04, 0.04, (n, T_, 16)), 1)
    q = np.zeros((n, T_, 16))
    for t in range(1, T_ - 1):
        q[:, t + 1] = q[:, t] + c1 * (q[:, t] - q[:, t - 1]) + c2 * (a[:, t] - q[:, t])
    return torch.tensor(q[:, 2:], dtype=torch.float32), torch.tensor(a[:, 2:], dtype=torch.float32)


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
    assert one_still.min() > 5                                           # mrad: the task was not to stand still


def test_windows_and_errors_by_a_plain_loop():
    g = torch.Generator().manual_seed(2)
    q, a = torch.randn(3, 26, 16, generator=g), torch.randn(3, 26, 16, generator=g)
    f = lambda h: h[:, :, -1, 0] + 0.3 * (h[:, :, -1, 1] - h[:, :, -1, 0]) + 0.1 * (h[:, :, 0, 0] - h[:, :, 3, 1])
    one, far, stay = [], [], []
    for n in range(3):
        for s in range(26 - W - F.HORIZON + 1):
            qs = [q[n, s + k] for k in range(W)]
            for k in range(F.HORIZON):
                sent = [a[n, s + k + i] for i in range(W)]
                nxt = qs[-1] + 0.3 * (sent[-1] - qs[-1]) + 0.1 * (qs[k] - sent[3])
                qs.append(nxt)
            one.append(qs[W] - q[n, s + W])
            far.append(qs[-1] - q[n, s + W + F.HORIZON - 1])
            stay.append(q[n, s + W - 1] - q[n, s + W + F.HORIZON - 1])
    rms = lambda rows: 1000 * torch.stack(rows).pow(2).mean(0).sqrt()
    got_one, got_far = F.errors(f, q, a)
    torch.testing.assert_close(got_one, rms(one))
    torch.testing.assert_close(got_far, rms(far))
    torch.testing.assert_close(F.errors(None, q, a)[1], rms(stay))
    index = F.every_window(q)
    assert len(index) == 3 * (26 - W) and index[-1].tolist() == [2, 25 - W]
    h, after = F.windows(q, a, torch.tensor([[1, 4]]))
    assert torch.equal(h[0, 6, :, 0], q[1, 4:14, 6]) and torch.equal(h[0, 6, :, 1], a[1, 4:14, 6]) and torch.equal(after[0], q[1, 14])


# ----------------------------------------------------------------------------------------------------- the residual
def test_the_observation_is_the_one_that_is_deployed():
    rng = np.random.default_rng(0)
    history = rng.normal(size=(5, W, 2, 16)).astype(np.float32)
    wrist, axis = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)
    ours = F.observation(torch.tensor(history[:, :, 0]), torch.tensor(history[:, :, 1]), torch.tensor(wrist), torch.tensor(axis))
    torch.testing.assert_close(ours, torch.from_numpy(sim.deployable(history, wrist, axis)), rtol=1e-5, atol=1e-5)


def test_the_controller_on_a_hand_does_what_the_policy_does_in_simulation(grasps):
    torch.manual_seed(0)
    policy = T.Generalist(width=16, blocks=2).eval()
    env = sim.Rotation(1, CUBE[:1], ["palm_down"], ["-z"], randomize=False, noise=0, progress=False)
    controller = deploy.Controller(policy, None, "palm_down", "-z", env.target[0])
    for _ in range(14):
        expected = np.clip(T.targets(policy, env), H.LOW, H.HIGH)
        assert controller(env.q[0]) == pytest.approx(expected[0], abs=1e-6)
        assert np.abs(expected - env.target).max() > 1e-3
        env.step(expected)


def test_the_correction_is_added_to_what_is_sent_and_hidden_from_the_policy():
    torch.manual_seed(0)
    policy, residual = T.Generalist(width=16, blocks=2).eval(), F.Residual(16)
    torch.nn.init.normal_(residual.net[-1].weight)
    plain = deploy.Controller(policy, None, "palm_up", "+z", H.GRASP)
    corrected = deploy.Controller(policy, residual, "palm_up", "+z", H.GRASP)
    rng = np.random.default_rng(0)
    for _ in range(5):
        q = H.GRASP + 0.02 * rng.normal(size=16)
        base, sent = plain(q), corrected(q)
        assert np.array_equal(base, corrected.base)
        assert 1e-4 < np.abs(sent - base).max() <= F.BOUND + 1e-6


def weak_joint(answer):
    """A hand whose joints go half of the way to `answer` (16,) times what is asked of them."""
    return lambda h: h[..., -1, 0] + 0.5 * torch.as_tensor(answer, dtype=torch.float32) * (h[..., -1, 1] - h[..., -1, 0])


def wandering(n, seed):
    """What a simulated policy would do: smooth targets, joints that answer fully."""
    rng = np.random.default_rng(seed)
    t = np.arange(80)[None, :, None] / 20
    a = H.GRASP + 0.15 * np.sin(2 * np.pi * (rng.uniform(0.3, 0.7, (n, 1, 16)) * t + rng.random((n, 1, 16))))
    q = np.zeros_like(a)
    q[:, 0] = a[:, 0]
    for t in range(79):
        q[:, t + 1] = q[:, t] + 0.5 * (a[:, t] - q[:, t])
    tensor = lambda x: torch.tensor(x, dtype=torch.float32)
    return {"q": tensor(q), "a": tensor(a), "first": tensor(a[:, 0]), "wrist": tensor(np.tile([1.0, 0, 0, 0], (n, 1))), "axis": tensor(np.tile([0, 0, 1.0], (n, 1)))}


def test_the_residual_mends_a_joint_that_answers_with_less():
    """Joints 2 and 9 answer with 0.8 of what is asked, the rest fully: there the correction goes further the way the joint goes
    (0.25 of the lag, the exact answer), elsewhere there is next to none; and the hand, driven with it, misses far less."""
    answer = np.ones(16)
    answer[[2, 9]] = 0.8
    f = weak_joint(answer)
    residual = F.fit_residual(f, weak_joint(np.ones(16)), wandering(64, 0), 400, 0.0005, 0.0005, batch=48)
    fresh = wandering(6, 1)
    miss, corrections, lags = {}, [], []
    for corrected in (False, True):
        missed = []
        for n in range(6):                                              # as deploy.py runs it: history of what was read, base targets
            q, before = fresh["q"][n, 0], fresh["a"][n, 0]
            history = np.tile(torch.stack([q, before]).numpy(), (W, 1, 1))
            for t in range(79):
                history = np.concatenate([history[1:], [[q.numpy(), before.numpy()]]])
                a = fresh["a"][n, t]
                c = torch.zeros(16)
                if corrected:
                    obs = sim.deployable(history[None], fresh["wrist"][n:n + 1].numpy(), fresh["axis"][n:n + 1].numpy())
                    with torch.no_grad():
                        c = residual(torch.from_numpy(obs), (a - before)[None])[0]
                    corrections.append(c)
                    lags.append(a - q)
                q = f(torch.stack([q, a + c], -1)[:, None][None])[0]
                before = a
                missed.append(q - fresh["q"][n, t + 1])
        miss[corrected] = torch.stack(missed).pow(2).mean(0).sqrt()
    c, lag = torch.stack(corrections), torch.stack(lags)
    weak, good = [2, 9], [i for i in range(16) if i not in (2, 9)]
    assert (miss[True][weak] < 0.5 * miss[False][weak]).all(), (miss[True][weak], miss[False][weak])
    slope = (c * lag).sum(0) / (lag * lag).sum(0)
    assert (slope[weak] > 0.12).all() and (slope[weak] < 0.4).all(), slope
    assert slope[good].abs().max() < 0.5 * slope[weak].min()


def test_the_residual_does_not_correct_what_both_models_believe():
    """Two models that are wrong in the same way (they expect every joint to give way by 30 mrad a step) differ in nothing: no
    correction, though neither predicts what the simulated joints did."""
    f = lambda h: weak_joint(np.ones(16))(h) + 0.03
    data = wandering(32, 0)
    residual = F.fit_residual(f, f, data, 60, 0.0005, 0.0005, batch=48)
    obs = F.observation(data["q"][:, 20:30], data["a"][:, 19:29], data["wrist"], data["axis"])
    with torch.no_grad():
        c = residual(obs, data["a"][:, 29] - data["a"][:, 28])
    assert c.abs().max() < 1e-4


def test_the_simulated_box_replays_the_targets_under_load():
    env = sim.Rotation(4, CUBE[:1], ["palm_up", "palm_down"], progress=False)
    a = H.GRASP + 0.2 * np.sin(np.arange(sim.EPISODE)[:, None] / 8 + np.arange(H.N))
    a = torch.tensor(np.tile(a, (4, 1, 1)), dtype=torch.float32)
    q, sent = F.simulate_box({"a": a, "wrist": torch.tensor(env.wrist)}, seed=0)
    again, _ = F.simulate_box({"a": a, "wrist": torch.tensor(env.wrist)}, seed=0)
    assert q.shape == sent.shape == a.shape and torch.isfinite(q).all() and torch.equal(q, again)
    noise = (sent - a).std(dim=(1, 2))
    assert all(s == 0 or 0.8 * F.SIGMA < s < 1.2 * F.SIGMA for s in noise.tolist())
    spread = (q[:, 1:] - q[:, :-1]).abs().mean((1, 2))
    assert (spread > 0.002).all()                                          # the hand moves
    late = (q - sent).abs().mean((0, 1))
    assert late.max() > 0.05 and late.min() < 0.05                         # and balls are in the way of some joints, not of all


def test_the_correction_is_bounded_and_starts_at_nothing():
    residual = F.Residual(8)
    obs, move = 100 * torch.randn(50, 327), torch.randn(50, 16)
    assert torch.equal(residual(obs, move), torch.zeros(50, 16))
    torch.nn.init.normal_(residual.net[-1].weight, std=1000)
    c = residual(obs, move)
    assert c.abs().max() <= F.BOUND and c.abs().max() > 0.99 * F.BOUND


# ------------------------------------------------------------------------------------------------------- checkpoints
class Attack:
    """What a checkpoint from a stranger may contain: unpickled carelessly, it runs a command."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_checkpoint_runs_code(tmp_path):
    struck = tmp_path / "struck"
    torch.save({"kind": "policy", "hand": H.HAND, "joints": Attack(struck)}, tmp_path / "torch.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"kind": "policy", "hand": H.HAND, "joints": Attack(struck)}, protocol=2))
    for name in ("torch", "pickle"):
        with pytest.raises(H.Problem, match=name):
            T.load_checkpoint(tmp_path / f"{name}.pt", "policy")
    assert not struck.exists()
    pickle.loads((tmp_path / "pickle.pt").read_bytes())                 # the attack was a real one
    assert struck.exists()


def test_bad_checkpoints_are_problems(tmp_path, toy_policy, monkeypatch):
    whole = toy_policy.read_bytes()
    for name, data in (("torn", whole[:len(whole) // 2]), ("text", b"hello"), ("empty", b"")):
        (tmp_path / f"{name}.pt").write_bytes(data)
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({"kind": "policy", "hand": H.HAND}, tmp_path / "bare.pt")
    good = torch.load(toy_policy, weights_only=True)
    torch.save(good | {"config": good["config"] | {"width": 9}}, tmp_path / "misfit.pt")
    torch.save({k: v for k, v in good.items() if k != "weights"}, tmp_path / "hollow.pt")
    for name in ("absent", "torn", "text", "empty", "list", "bare", "misfit", "hollow"):
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
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == -9
    assert path.read_bytes() == toy_policy.read_bytes() and T.load_policy(path)
