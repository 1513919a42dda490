"""Stage 3: how each joint of this hand really answers, and the correction that makes it land where the simulated one did.

    python fit_ndm.py                                                                  # all that is in data/, if it is of one hand
    python fit_ndm.py --data data/sim0-palm_down-balls-policy data/sim0-palm_up-balls-policy
    python fit_ndm.py --data ... --test data/sim0-task --models joint finger whole     # the comparison table
    python fit_ndm.py --table runs/ndm*/table.json                                     # of several hands, with the spread

reads   the trajectories that collect.py wrote (--data), and for the table trajectories of the task itself (--test, written
        by `deploy.py --record`), checkpoints/policy.pt
writes  OUT/dynamics.pt    joint-wise neural dynamics f_i, pretrained on simulated transitions, fine-tuned on the hand's
        OUT/residual.pt    the residual policy
        OUT/table.txt, OUT/table.json, OUT/prediction.png, OUT/error.png, OUT/correction.png

q^i_{t+1} = f_i(h^i_t), h^i_t = the last W = 10 (position, target) pairs of joint i and of no other joint. f is pretrained in the
simulated Chaos Box (then called f_sim) and fine-tuned on the hand's. Residual: min E sum_t |f_sim(q, a) - f(q, a + pi_res(o, a))|^2
through the frozen models, on simulated trajectories of the policy; `fit_residual` says why not q_sim_{t+1} as in the paper.
"""
import argparse
import copy
import json
import os
import time
from pathlib import Path

import mujoco
import numpy as np
import torch
import torch.nn as nn
from mujoco import rollout

import hand as H
import sim
from collect import SIGMA
from sim import W
from train_policy import digest, load_network, load_policy, objects_of, save_checkpoint, targets

GROUPS = {"joint": 16, "finger": 4, "whole": 1}     # how many models share the hand: 16 x 1, 4 x 4 or 1 x 16 joints
HIDDEN = {"joint": 64, "finger": 128, "whole": 256}
HORIZON = 10                                        # steps of the open-loop error: 0.5 s
BOUND = 0.06           # rad, largest correction
ROLLOUT = 4            # steps of the model with the residual in the loop, 0.2 s: what happens in one step hardly depends on its target


# ------------------------------------------------------------------------------------------------------- the model
class Dynamics(nn.Module):
    """G networks of 16 / G joints each, in one batched matrix product per layer. G = 16 is the joint-wise model."""

    def __init__(self, groups, hidden):
        super().__init__()
        self.config = {"groups": groups, "hidden": hidden}
        J = H.N // groups
        sizes = [2 * W * J, hidden, hidden, J]
        self.weight = nn.ParameterList(nn.Parameter(torch.randn(groups, a, b) * (1 if b != J else 0.1) / a ** 0.5)
                                       for a, b in zip(sizes, sizes[1:]))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(groups, 1, b)) for b in sizes[1:])
        self.register_buffer("scale", torch.ones(H.N, 2 * W))      # standard deviation of each input
        self.register_buffer("shift", torch.zeros(H.N, 2 * W))
        self.register_buffer("step", torch.ones(H.N))              # of q_{t+1} - q_t

    @staticmethod
    def inputs(h):
        """h (B, 16, W, 2) rad -> (B, 16, 20): q_t itself, everything else relative to it. The same 20 numbers, better
        conditioned: what the joint does next depends on differences of milliradians."""
        q, a = h[..., 0], h[..., 1]
        now = q[..., -1:]
        return torch.cat([q[..., :-1] - now, now, a - now], -1)

    def forward(self, h):
        """Histories h (B, 16, W, 2) rad, oldest first -> next joint positions (B, 16) rad."""
        B, G = len(h), self.config["groups"]
        x = (self.inputs(h) - self.shift) / self.scale
        x = x.reshape(B, G, -1).transpose(0, 1)                    # (G, B, inputs): fingers are four joints in a row
        for i, (weight, bias) in enumerate(zip(self.weight, self.bias)):
            x = torch.baddbmm(bias, x, weight)
            x = torch.tanh(x) if i < 2 else x
        return h[:, :, -1, 0] + x.transpose(0, 1).reshape(B, H.N) * self.step

    def fit_scale(self, h, after):
        x = self.inputs(h)
        self.shift.copy_(x.mean(0))
        self.scale.copy_(x.std(0) + 1e-4)
        self.step.copy_((after - h[:, :, -1, 0]).std(0) + 1e-4)


def windows(q, a, index):
    """Histories (B, 16, W, 2) and next positions (B, 16) at `index` (B, 2: trajectory, first step) of q, a (n, T, 16)."""
    steps = index[:, 1:] + torch.arange(W)
    which = index[:, :1]
    return torch.stack([q[which, steps], a[which, steps]], -1).transpose(1, 2), q[index[:, 0], index[:, 1] + W]


def every_window(q, after=1):
    n, T = q.shape[:2]
    return torch.cartesian_prod(torch.arange(n), torch.arange(T - W - after + 1))


def fit(model, q, a, steps, lr, title, batch=128, seed=0):
    """Minimise the squared one-step error in units of each joint's usual step, by Adam with a cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    opt = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    n, T = q.shape[:2]
    bar = sim.Progress(title, steps)
    for i in range(steps):
        index = torch.stack([torch.randint(n, (batch,), generator=generator), torch.randint(T - W, (batch,), generator=generator)], 1)
        h, after = windows(q, a, index)
        error = (model(h) - after) / model.step
        loss = error.pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if i % 100 == 0 or i + 1 == steps:
            bar(i + 1, f"{1000 * ((error * model.step).detach().pow(2).mean().sqrt()):.2f} mrad")


@torch.no_grad()
def errors(model, q, a, limit=40000):
    """Root mean square one-step and 0.5 s open-loop error per joint, (16,) and (16,) mrad. model None: stays where it is."""
    index = every_window(q, HORIZON)
    index = index[torch.linspace(0, len(index) - 1, min(limit, len(index))).long()]
    h, after = windows(q, a, index)
    one = (model(h) if model else h[:, :, -1, 0]) - after
    for k in range(HORIZON):                                       # feed predictions back; the targets are those that were sent
        nxt = model(h) if model else h[:, :, -1, 0]
        sent = a[index[:, 0], index[:, 1] + W + k]
        h = torch.cat([h[:, :, 1:], torch.stack([nxt, sent], -1)[:, :, None]], 2)
    far = nxt - q[index[:, 0], index[:, 1] + W + HORIZON - 1]
    return 1000 * one.pow(2).mean(0).sqrt(), 1000 * far.pow(2).mean(0).sqrt()


# ---------------------------------------------------------------------------------------------------- the residual
class Residual(nn.Module):
    """pi_res(o, a): deployable observation (327) and base target relative to the last one (16) -> correction (16) rad."""

    def __init__(self, hidden=256):
        super().__init__()
        self.config = {"hidden": hidden}
        size = 2 * H.N * W + 7 + H.N
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.net = nn.Sequential(nn.Linear(size, hidden), nn.ELU(), nn.Linear(hidden, hidden), nn.ELU(), nn.Linear(hidden, H.N))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, obs, move):
        x = ((torch.cat([obs, move / sim.ALPHA], -1) - self.mean) / self.std).clamp(-5, 5)
        return BOUND * torch.tanh(self.net(x))


def observation(q, a, wrist, axis):
    """`sim.deployable` in torch: q, a (B, W, 16), wrist (B, 4), axis (B, 3) -> (B, 327)."""
    B = len(q)
    return torch.cat([(q - torch.tensor(H.GRASP, dtype=torch.float32)).reshape(B, -1), 10 * (a - q).reshape(B, -1), wrist, axis], 1)


def fit_residual(f, f_sim, data, steps, size_cost, change_cost, seed=0, batch=256):
    """Train the residual on simulated trajectories `data` (see `simulate`), so that the hand's model f with corrected targets
    ends up where the model f_sim of the simulated joints does without; both stay frozen.

    The paper asks f to end up at the simulated q_{t+1} itself. But balls give way and an object in a firm grasp does not: f believes that a
    finger pressing on the object will go on (measured on a joint of sim:100: 36 mrad too far after 0.35 s of the task), and a
    residual that corrects this belief lets go of the object. f_sim, learned in the same box, believes the same, so that only the
    difference between the two hands' joints is left.

    Over ROLLOUT steps positions are fed back; before, the history of f holds the simulated positions and the targets as they would have been
    corrected. The observation is what the residual sees on the hand: positions and *base* targets."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    residual = Residual()
    P = 2 * W                                                      # an episode begins as if it had always been in its first state
    pad = data["first"][:, None]
    q = torch.cat([data["q"][:, :1].expand(-1, P, -1), data["q"]], 1)
    a = torch.cat([pad.expand(-1, P, -1), data["a"]], 1)           # the command at t
    before = torch.cat([pad, a[:, :-1]], 1)                        # the target when it was given
    n, T = q.shape[:2]

    def draw(size, last):
        return torch.randint(n, (size,), generator=generator), torch.randint(P, last, (size,), generator=generator)

    def seen(which, t):
        """The arguments of the residual at steps t of trajectories `which`, both (B,)."""
        back = t[:, None] + torch.arange(1 - W, 1)
        which_ = which[:, None]
        return (observation(q[which_, back], before[which_, back], data["wrist"][which], data["axis"][which]),
                a[which, t] - before[which, t])

    obs, move = seen(*draw(20000, T))
    x = torch.cat([obs, move / sim.ALPHA], 1)
    residual.mean.copy_(x.mean(0))
    residual.std.copy_(x.std(0) + 1e-2)
    opt = torch.optim.Adam(residual.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    bar = sim.Progress("residual", steps)
    for i in range(steps):
        which, start = draw(batch, T - ROLLOUT)
        start[: batch // 8] = P                                    # the first step of an episode is worth its own share
        past = start[:, None] + torch.arange(1 - W, 0)             # (B, W - 1)
        with torch.no_grad():
            c = residual(*seen(which[:, None].expand_as(past).reshape(-1), past.reshape(-1))).view(*past.shape, H.N)
            c = c * (past >= P)[..., None]
        plain, last = a[which[:, None], past], c[:, -1]
        corrected = plain + c
        back = start[:, None] + torch.arange(1 - W, 1)
        hq, hb = q[which[:, None], back], before[which[:, None], back]
        goals = hq
        wrist, axis = data["wrist"][which], data["axis"][which]
        miss, size, change = 0.0, 0.0, 0.0
        for k in range(ROLLOUT):
            base = a[which, start + k]
            c = residual(observation(hq, hb, wrist, axis), base - hb[:, -1])
            corrected, plain = torch.cat([corrected, (base + c)[:, None]], 1), torch.cat([plain, base[:, None]], 1)
            q_hand = f(torch.stack([hq, corrected], -1).transpose(1, 2))
            with torch.no_grad():
                q_sim = f_sim(torch.stack([goals, plain], -1).transpose(1, 2))
            miss = miss + (q_hand - q_sim).pow(2).mean() / ROLLOUT
            size = size + c.pow(2).mean() / ROLLOUT
            change = change + (c - last).pow(2).mean() / ROLLOUT
            last, corrected, plain = c, corrected[:, 1:], plain[:, 1:]
            hq, goals, hb = (torch.cat([x[:, 1:], new[:, None]], 1) for x, new in ((hq, q_hand), (goals, q_sim), (hb, base)))
        loss = 1e4 * (miss + size_cost * size + change_cost * change)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(residual.parameters(), 1.0)
        opt.step()
        schedule.step()
        bar(i + 1, f"miss {1000 * miss.item() ** 0.5:.2f} mrad, correction {1000 * size.item() ** 0.5:.1f} mrad")
    return residual.eval()


def load_residual(path):
    return load_network(path, "residual", Residual)


# ------------------------------------------------------------------------------------------------------------ data
def load_shards(folders):
    """Trajectories of `folders`: q, a (n, 400, 16) rad float32 tensors, and the port of the hand that made them. Raises `Problem` on
    other hands, more than one hand, NaN, broken files."""
    qs, targets_, ports = [], [], {}
    for folder in folders:
        files = sorted(Path(folder).glob("[0-9]*.npz"))
        if not files:
            raise H.Problem(f"{folder} holds no trajectories; run collect.py first, or name the folder that it printed")
        for file in files:
            data = sim.load_npz(file, "q", "target", "hand", "port")
            if str(data["hand"]) != H.HAND:
                raise H.Problem(f"{file} was recorded on the hand {data['hand']}, not {H.HAND}")
            if data["q"].shape != (sim.EPISODE, H.N) or data["target"].shape != (sim.EPISODE, H.N):
                raise H.Problem(f"{file} has trajectories of shape {data['q'].shape}, not {(sim.EPISODE, H.N)}")
            qs.append(data["q"])
            targets_.append(data["target"])
            ports[str(data["port"])] = file
    if len(ports) > 1:
        raise H.Problem(f"these are of several hands ({', '.join(map(str, ports.values()))}): every hand needs a model of its own")
    return torch.tensor(np.array(qs)), torch.tensor(np.array(targets_)), *ports


def simulate(policy, content, wrists, episodes, seed):
    """Simulated trajectories of the policy that kept the object to the end, a dict: q (n, 400, 16) positions and a (n, 400, 16)
    targets sent, `first` (n, 16) the target before the first of them, wrist (n, 4), axis (n, 3)."""
    objects = objects_of("+".join(content["families"]))
    env = sim.Rotation(episodes, objects, wrists, content["axes"], seed=seed)
    q, a, facts = [], [], {}

    def act(env):
        facts.setdefault("wrist", env.wrist.copy())
        facts.setdefault("axis", env.axis.copy())
        facts.setdefault("first", env.target.copy())
        q.append(env.q.copy())
        a.append(targets(policy, env))
        return a[-1]

    kept = sim.run_episodes(env, act, title="simulate the policy")["TTF"] >= sim.EPISODE / sim.CONTROL_HZ
    if kept.sum() < 8:
        raise H.Problem(f"the policy kept the object in {kept.sum()} of {episodes} simulated episodes; train it longer")
    tensor = lambda x: torch.tensor(np.asarray(x)[kept], dtype=torch.float32)
    return {"q": tensor(np.swapaxes(q, 0, 1)), "a": tensor(np.clip(np.swapaxes(a, 0, 1), sim.NEAR, sim.FAR)),
            **{name: tensor(value) for name, value in facts.items()}}


def simulate_box(data, seed):
    """What collect.py does on a hand, in the training simulator: the targets of `data` replayed open loop in the Chaos Box, half of
    them with noise. Returns q, a (n, 400, 16) rad."""
    rng = np.random.default_rng([seed, 16])
    a, wrists = data["a"].double().numpy(), data["wrist"].numpy()
    a = np.clip(a + rng.normal(0, SIGMA, a.shape) * (rng.random((len(a), 1, 1)) < 0.5), H.LOW, H.HIGH)
    boxes = {tuple(w): sim.build(box_of_balls=True, wrist=w, looks=False).compile() for w in np.unique(wrists, axis=0)}
    models = [boxes[tuple(w)] for w in wrists]
    m = models[0]
    state = np.zeros((len(a), 1 + m.nq + m.nv))
    state[:, 1:1 + H.N], state[:, 1 + H.N:1 + m.nq] = a[:, 0], rng.uniform(-0.02, 0.02, (len(a), m.nq - H.N))
    q, bar = np.zeros_like(a), sim.Progress("simulate the box", sim.EPISODE)
    with rollout.Rollout(nthread=os.cpu_count()) as pool:
        datas = [mujoco.MjData(m) for _ in range(os.cpu_count())]
        for t in range(-H.CONTROL_HZ, sim.EPISODE):                # one second for the balls to settle
            q[:, max(t, 0)] = state[:, 1:1 + H.N]
            control = np.repeat(a[:, max(t, 0), None], sim.SUBSTEPS, 1)
            state = pool.rollout(models, datas, state, nstep=sim.SUBSTEPS, control=control)[0][:, -1]
            if t >= 0:
                bar(t + 1, f"lag {np.abs(a[:, t] - q[:, t]).mean():.3f} rad")
    return torch.tensor(q, dtype=torch.float32), torch.tensor(a, dtype=torch.float32)


# -------------------------------------------------------------------------------------------------- table, pictures
def table_of(models, sets):
    """Errors of every model on every set of trajectories: {set: {model: {"one": [16], "open": [16]}}} in mrad."""
    return {name: {kind: dict(zip(("one", "open"), (e.tolist() for e in errors(model, q, a)))) for kind, model in models.items()}
            for name, (q, a) in sets.items()}


def format_table(table):
    lines = ["mean over joints, mrad               one step   0.5 s open loop"]
    for name, models in table.items():
        lines += [f"  {name}"] + [f"    {kind:<32} {np.mean(e['one']):8.2f}   {np.mean(e['open']):8.2f}" for kind, e in models.items()]
    for name, models in table.items():
        lines += ["", f"per joint, {name}: one step / 0.5 s", " " * 12 + "".join(f"{kind:>18}" for kind in models)]
        lines += [f"  {joint.name:<10}" + "".join(f"{e['one'][i]:9.2f} /{e['open'][i]:7.2f}" for e in models.values())
                  for i, joint in enumerate(H.JOINTS)]
    return "\n".join(lines)


def table_of_hands(files):
    """The table.json of several hands as one: error averaged over joints, mean and standard deviation over hands."""
    try:
        tables = [json.loads(Path(file).read_text()) for file in files]
        mean = {name: {kind: {e: np.array([np.mean(t[name][kind][e]) for t in tables]) for e in ("one", "open")} for kind in kinds}
                for name, kinds in tables[0].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise H.Problem(f"not all of these are a table.json of the same comparison ({type(error).__name__}: {error})")
    print(f"mean over joints, mrad; {len(tables)} hands         one step     0.5 s open loop")
    for name, kinds in mean.items():
        print(f"  {name}")
        for kind, e in kinds.items():
            print(f"    {kind:<32} {e['one'].mean():6.2f} +- {e['one'].std():.2f}   {e['open'].mean():6.1f} +- {e['open'].std():.1f}")


@torch.no_grad()
def draw(out, models, table, q, a, residual, data):
    """prediction.png: measured against predicted; error.png: error per joint; correction.png: what the residual applies."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure, name):
        with H.atomic_file(out / name) as file:
            figure.savefig(file, dpi=90)

    f = models["joint"]
    time_s = np.arange(q.shape[1]) / H.CONTROL_HZ
    index = torch.stack([torch.zeros(q.shape[1] - W, dtype=torch.long), torch.arange(q.shape[1] - W)], 1)
    h, after = windows(q[:1], a[:1], index)
    guess = f(h)
    figure, axes = plt.subplots(4, 4, figsize=(15, 9), sharex=True, layout="constrained")
    for i, axis in enumerate(axes.T.flat):
        axis.plot(time_s[:200], a[0, :200, i], color="0.75", lw=1, label="target sent")
        axis.plot(time_s[:200], q[0, :200, i], color="tab:blue", label="measured")
        axis.plot(time_s[W:200], guess[:200 - W, i], color="tab:orange", ls="--", lw=1, label="predicted, one step")
        axis.set_title(H.JOINTS[i].name, fontsize=9)
    axes[0, 0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("s")
    for axis in axes[:, 0]:
        axis.set_ylabel("rad")
    figure.suptitle("Held-out trajectory: what each joint did, and what its model says it would")
    save(figure, "prediction.png")

    figure, axes = plt.subplots(len(table), 1, figsize=(11, 3.2 * len(table)), layout="constrained", squeeze=False)
    for axis, (name, kinds) in zip(axes[:, 0], table.items()):
        kinds = {k: e for k, e in kinds.items() if k != "stays where it is"}
        for j, (kind, e) in enumerate(kinds.items()):
            axis.bar(np.arange(H.N) + 0.8 * (j / len(kinds) - 0.4), e["open"], 0.8 / len(kinds), label=kind)
        axis.set_xticks(range(H.N), [joint.name for joint in H.JOINTS], rotation=45, fontsize=8)
        axis.set_ylabel("mrad")
        axis.set_title(f"0.5 s open-loop error, {name}", fontsize=10)
    axes[0, 0].legend(fontsize=8)
    save(figure, "error.png")

    if residual is not None:
        qs, targets_ = data["q"][:1], data["a"][:1]
        before = torch.cat([data["first"][:1, None], targets_[:, :-1]], 1)
        back = torch.arange(qs.shape[1] - W)[:, None] + torch.arange(W)
        n = len(back)
        obs = observation(qs[0][back], before[0][back], data["wrist"][:1].expand(n, -1), data["axis"][:1].expand(n, -1))
        c = residual(obs, (targets_ - before)[0, W - 1:-1])
        figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
        im = axis.imshow(1000 * c.T, aspect="auto", cmap="RdBu", vmin=-1000 * BOUND, vmax=1000 * BOUND,
                         extent=(W / H.CONTROL_HZ, qs.shape[1] / H.CONTROL_HZ, H.N - 0.5, -0.5), interpolation="none")
        axis.set_yticks(range(H.N), [joint.name for joint in H.JOINTS], fontsize=8)
        axis.set_xlabel("s")
        axis.set_title("The correction that the residual adds to the targets of one simulated episode, mrad")
        figure.colorbar(im)
        save(figure, "correction.png")
    plt.close("all")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, help="folders of collect.py (default data/*-balls-policy)")
    parser.add_argument("--test", nargs="+", type=Path, default=[], help="folders of `deploy.py --record`: the task itself")
    parser.add_argument("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    parser.add_argument("--models", nargs="+", default=["joint"], choices=GROUPS)
    parser.add_argument("--out", type=Path, default=Path("runs/ndm"))
    parser.add_argument("--steps", type=int, default=8000, help="gradient steps of each fit")
    parser.add_argument("--residual-steps", type=int, default=400)
    parser.add_argument("--episodes", type=int, default=192, help="simulated episodes of the policy")
    parser.add_argument("--size-cost", type=float, default=0.03, help="price of the correction against the error")
    parser.add_argument("--change-cost", type=float, default=0.03, help="price of its changes from step to step")
    parser.add_argument("--no-residual", action="store_true", help="the table only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", nargs="+", type=Path, help="only print these table.json as one")
    args = parser.parse_args()
    if args.table:
        return table_of_hands(args.table)
    args.data = args.data or sorted(Path("data").glob("*-balls-policy"))
    if not args.data:
        raise H.Problem("there is no data/*-balls-policy; run collect.py first, or name its folders with --data")
    torch.manual_seed(args.seed)
    began = time.monotonic()

    q, a, port = load_shards(args.data)
    if len(q) < 10:
        raise H.Problem(f"{len(q)} trajectories are too few; collect at least 10")
    held = torch.arange(len(q)) % 10 == 9                          # every tenth trajectory is never trained on
    sets = {"in distribution: held-out trajectories": (q[held], a[held])}
    if args.test:
        *task, tested = load_shards(args.test)
        if tested != port:
            raise H.Problem(f"--test is of the hand {tested}, --data of {port}: they must be of one hand")
        sets["off distribution: the task, with an object"] = task
    policy, content = load_policy(args.policy)
    data = simulate(policy, content, content["wrists"], args.episodes, args.seed)
    simulated = simulate_box(data, args.seed)

    models = {"stays where it is": None}
    for kind in dict.fromkeys(["joint", *args.models]):
        torch.manual_seed(args.seed)
        model = models[kind] = Dynamics(GROUPS[kind], HIDDEN[kind])
        index = every_window(simulated[0])
        model.fit_scale(*windows(*simulated, index[torch.randperm(len(index))[:20000]]))
        fit(model, *simulated, args.steps, 2e-3, f"{kind}: simulated", seed=args.seed)
        if kind == "joint":
            f_sim = copy.deepcopy(model).requires_grad_(False)
        fit(model, q[~held], a[~held], args.steps, 1e-3, f"{kind}: this hand", seed=args.seed)
    save_checkpoint(args.out / "dynamics.pt", "dynamics", config=models["joint"].config, weights=models["joint"].state_dict(),
                    data=[str(d) for d in args.data], port=port)
    table = table_of(models, sets)
    text = format_table(table)
    print(text)
    for name, lines in (("table.txt", text), ("table.json", json.dumps(table, indent=1))):
        with H.atomic_file(args.out / name, "w") as file:
            file.write(lines + "\n")

    residual = None
    if not args.no_residual:
        f = models["joint"].requires_grad_(False)
        residual = fit_residual(f, f_sim, data, args.residual_steps, args.size_cost, args.change_cost, args.seed)
        save_checkpoint(args.out / "residual.pt", "residual", config=residual.config, weights=residual.state_dict(),
                        data=[str(d) for d in args.data], port=port, policy=digest(args.policy))
    draw(args.out, models, table, *(x[held] for x in (q, a)), residual, data)
    print(f"{args.out}: dynamics.pt, {'residual.pt, ' if residual else ''}table.txt and pictures in {(time.monotonic() - began) / 60:.1f} min")


if __name__ == "__main__":
    H.run(main)
