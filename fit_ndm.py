"""Stage 3: how each joint of this hand really answers, and the correction that makes it land
where the simulated one did.

    python fit_ndm.py                  # data/*-balls-policy and data/*-task, if all of one hand
    python fit_ndm.py --test data/sim0-task --models joint finger whole           # the comparison
    python tests/tables.py --errors runs/ndm*/table.json             # of several hands, as a table

reads   --data      the trajectories that collect.py wrote, and those of the task itself, with which
                    the correction helps more (`deploy.py --record`)
        --test      for the table, trajectories of the task itself (`deploy.py --record`)
        --policy    checkpoints/policy.pt
writes  OUT/dynamics.pt, OUT/residual.pt    the joint-wise model f of this hand, the residual
        OUT/dynamics-KIND.pt, OUT/residual-KIND.pt      with other --models, to compare with
        OUT/table.json      what is printed; OUT/prediction.png, of a held-out trajectory

Dynamics: q^i_{t+1} = f_i(h^i_t), where h^i_t are the last W = 10 positions of joint i and the
targets that were sent to it, and nothing of any other joint. f is pretrained on simulated hands,
among balls and with an object (then it is called f_sim), and fine-tuned on what this hand did in
its own Chaos Box and at the task.

Residual: min E sum_t |f_sim(q, a) - f(q, a + pi_res(o, a))|^2 through the frozen models, along
simulated episodes of the policy. `fit_residual` says why not |q_sim_{t+1} - f(...)|^2.
"""
import argparse
import copy
import os
import time
from pathlib import Path

import sim                       # before torch: it sets how torch's threads wait
import mujoco
import numpy as np
import torch
import torch.nn as nn
from mujoco import rollout

import hand as H
from collect import SIGMA, trajectories
from sim import W
from train_policy import (
    Normalizer, digest, load_network, load_policy, mlp, save_checkpoint, simulate)

# how many networks share the hand: one for each joint, for each finger, or one in all
GROUPS = {"joint": H.N, "finger": len(H.FINGERS), "whole": 1}
HIDDEN = {"joint": 64, "finger": 128, "whole": 256}
HORIZON = 10           # control steps of the open-loop error: 0.5 s
BOXES = 6              # simulated Chaos Boxes; the hand's own is none of them
BOUND = 0.06           # rad, the largest correction
SHARE = 0.5            # of it is sent: all of it turns no further and lets go sooner
# control steps of the model with the residual in the loop, 0.2 s: where a joint is after one step
# hardly depends on the target it was sent
ROLLOUT = 4


# ---------------------------------------------------------------------------------- the dynamics
def members(groups):
    """The joints (groups, most of any) of each network; a finger with fewer has its last again."""
    of = {H.N: range(H.N), 1: [0] * H.N}.get(groups, H.FINGER)
    rows = [[j for j in range(H.N) if of[j] == group] for group in dict.fromkeys(of)]
    most = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (most - len(row)) for row in rows])


class Dynamics(nn.Module):
    """`groups` networks that share the joints, one batched matrix product per layer.

    groups = N is the joint-wise model: joint i sees its own positions and targets alone."""

    def __init__(self, groups, hidden):
        super().__init__()
        self.config = {"groups": groups, "hidden": hidden}
        self.members = members(groups)
        joints = self.members.shape[1]
        self.place = [self.members.flatten().tolist().index(j) for j in range(H.N)]
        sizes = [2 * W * joints, hidden, hidden, joints]
        self.weight, self.bias = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in zip(sizes, sizes[1:]):
            usual = 0.1 if outputs == joints else 1.0        # at first nothing moves
            self.weight.append(torch.randn(groups, inputs, outputs) * usual / inputs ** 0.5)
            self.bias.append(torch.zeros(groups, 1, outputs))
        self.register_buffer("shift", torch.zeros(H.N, 2 * W))     # mean of each input
        self.register_buffer("scale", torch.ones(H.N, 2 * W))      # its standard deviation
        self.register_buffer("step", torch.ones(H.N))              # that of q_{t+1} - q_t

    @staticmethod
    def inputs(history):
        """(B, W, 2, N) rad -> (B, N, 2 W): q_t itself, everything else relative to it. The same
        numbers, better conditioned: what a joint does next depends on differences of mrad."""
        q, sent = history.transpose(1, 3).unbind(2)          # (B, N, W)
        now = q[..., -1:]
        return torch.cat([q[..., :-1] - now, now, sent - now], -1)

    def forward(self, history):
        """Pairs (q_j, a_j), history (B, W, 2, N) rad, oldest first -> q_{t+1} (B, N) rad."""
        x = (self.inputs(history) - self.shift) / self.scale
        x = x[:, self.members].flatten(2).transpose(0, 1)    # (groups, B, inputs)
        for layer, (weight, bias) in enumerate(zip(self.weight, self.bias)):
            x = torch.baddbmm(bias, x, weight)
            if layer < 2:
                x = torch.tanh(x)
        moved = x.transpose(0, 1).flatten(1)[:, self.place] * self.step
        return history[:, -1, 0] + moved

    def fit_scale(self, history, after):
        x = self.inputs(history)
        self.shift.copy_(x.mean(0))
        self.scale.copy_(x.std(0) + 1e-4)
        self.step.copy_((after - history[:, -1, 0]).std(0) + 1e-4)


def windows(q, a, index):
    """Histories (B, W, 2, N) and the position after each (B, N), of trajectories q, a (n, T, N)
    at `index` (B, 2): number of the trajectory, first step."""
    which = index[:, :1]
    steps = index[:, 1:] + torch.arange(W)
    after = q[index[:, 0], index[:, 1] + W]
    return torch.stack([q[which, steps], a[which, steps]], 2), after


def every_window(q, after=1):
    """The index of all histories that are followed by `after` steps or more."""
    n, T = q.shape[:2]
    return torch.cartesian_prod(torch.arange(n), torch.arange(T - W - after + 1))


def fit(model, q, a, steps, lr, title, batch=128, seed=0):
    """Minimise the squared one-step error, in units of each joint's usual step, by Adam with a
    cosine schedule. q, a: (n, T, N) rad."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    index = every_window(q)
    bar = sim.Progress(title, steps)
    for i in range(steps):
        some = torch.randint(len(index), (batch,), generator=generator)
        history, after = windows(q, a, index[some])
        error = (model(history) - after) / model.step
        loss = error.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if i % 100 == 0 or i + 1 == steps:
            rms = (error * model.step).detach().pow(2).mean().sqrt()
            bar(i + 1, f"{1000 * rms:.2f} mrad")


@torch.no_grad()
def errors(model, q, a, limit=40000):
    """Root mean square error per joint, mrad: after one step (N,), and after HORIZON steps (N,) in
    which predictions are fed back. model None: a joint stays where it is."""
    index = every_window(q, HORIZON)
    index = index[torch.linspace(0, len(index) - 1, min(limit, len(index))).long()]
    which, now = index[:, 0], index[:, 1] + W
    history, _ = windows(q, a, index)
    rms = []
    for k in range(HORIZON):
        guess = model(history) if model else history[:, -1, 0]
        rms.append(1000 * (guess - q[which, now + k]).pow(2).mean(0).sqrt())
        history = sim.push_history(history, guess, a[which, now + k])
    return rms[0], rms[-1]


def pretrained(kind, q, a, steps, seed):
    """A model of simulated joints: f_sim."""
    torch.manual_seed(seed)
    model = Dynamics(GROUPS[kind], HIDDEN[kind])
    index = every_window(q)
    model.fit_scale(*windows(q, a, index[torch.randperm(len(index))[:20000]]))
    fit(model, q, a, steps, 2e-3, f"{kind}: simulated", seed=seed)
    return model


# ---------------------------------------------------------------------------------- the residual
class Residual(nn.Module):
    """pi_res(o, a): what the policy sees and by how much it moves its target (N) ->
    correction (N) rad."""

    def __init__(self, hidden=256):
        super().__init__()
        self.config = {"hidden": hidden}
        size = sim.OBSERVED + H.N
        self.norm, self.net = Normalizer(size), mlp(size, hidden, hidden, H.N)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    @staticmethod
    def inputs(observation, move):
        return torch.cat([observation, move / sim.ALPHA], -1)

    def forward(self, observation, move):
        x = self.norm(self.inputs(observation, move))
        return BOUND * torch.tanh(self.net(x))


def load_residual(path):
    """The residual in `path` and what else the file says, see `train_policy.load_network`."""
    return load_network(path, "residual", Residual)


class Episodes:
    """Simulated episodes of the policy (a dict, see `train_policy.simulate`), each with BEFORE
    steps in front as if it had always been in its first state: q and base (n, BEFORE + T, N)."""
    BEFORE = 2 * W

    def __init__(self, data):
        self.wrist, self.axis = data["wrist"], data["axis"]
        first = data["first"][:, None].expand(-1, self.BEFORE, -1)
        rest = data["q"][:, :1].expand(-1, self.BEFORE, -1)
        self.q = torch.cat([rest, data["q"]], 1)
        self.base = torch.cat([first, data["a"]], 1)
        self.n, self.length = self.q.shape[:2]

    def some(self, count, last, generator):
        """Random episodes (count,) and steps (count,) of them, before step `last`."""
        which = torch.randint(self.n, (count,), generator=generator)
        return which, torch.randint(self.BEFORE, last, (count,), generator=generator)

    def pairs(self, which, t, late):
        """(q_j, a_{j - late}) for j up to t (B,): histories (B, W, 2, N)."""
        which, steps = which[:, None], t[:, None] + torch.arange(1 - W, 1)
        return torch.stack([self.q[which, steps], self.base[which, steps - late]], 2)

    def seen(self, which, t):
        """What the residual is given at steps t (B,): observation, move of the base target."""
        history = self.pairs(which, t, late=1)
        observation = sim.observation(history, self.wrist[which], self.axis[which])
        return observation, self.base[which, t] - history[:, -1, 1]

    @torch.no_grad()
    def corrections(self, residual, which, t):
        """What the residual adds in the W steps up to t (B,): (B, W, N); nothing before the
        episode begins."""
        steps = t[:, None] + torch.arange(1 - W, 1)
        c = residual(*self.seen(which.repeat_interleave(W), steps.flatten()))
        return c.view(len(t), W, H.N) * (steps >= self.BEFORE)[..., None]


# One control step of a hand with a residual, and what each network is given:
#
#     time              t-1                   t                    t+1
#     measured         q_{t-1}               q_t                  q_{t+1}
#     base target      a_{t-1}               a_t        by the policy, from o_t
#     correction       c_{t-1}               c_t        by the residual, from o_t and a_t - a_{t-1}
#     sent         a_{t-1} + c_{t-1}      a_t + c_t
#
# h_o:   pairs (q_j, a_{j-1}) up to j = t, for o_t: at t the newest target known is that of t-1.
#        What was added to it is the hand's business: the policy sees its own targets.
# h:     pairs (q_j, a_j + c_j) up to j = t; f(h) is q_{t+1} of the hand.
# h_sim: pairs (q_j, a_j) up to j = t; f_sim(h_sim) is q_{t+1} of the simulated hand.
def imagine(residual, f, f_sim, episodes, which, start):
    """The hand by its model, corrected, next to the simulated one by its own, uncorrected, for
    ROLLOUT steps from `start` (B,) in episodes `which` (B,). Mean squares in rad^2: how far apart
    they are (miss), of the corrections (size) and of their changes from step to step (change)."""
    wrist, axis = episodes.wrist[which], episodes.axis[which]
    q = q_sim = episodes.q[which, start]
    h_o = episodes.pairs(which, start, late=1)
    h_sim = episodes.pairs(which, start - 1, late=0)
    past = episodes.corrections(residual, which, start - 1)
    h = torch.stack([h_sim[:, :, 0], h_sim[:, :, 1] + past], 2)
    last = past[:, -1]
    miss, size, change = 0.0, 0.0, 0.0
    for k in range(ROLLOUT):
        a = episodes.base[which, start + k]
        c = residual(sim.observation(h_o, wrist, axis), a - h_o[:, -1, 1])
        h = sim.push_history(h, q, a + c)
        h_sim = sim.push_history(h_sim, q_sim, a)
        q = f(h)
        with torch.no_grad():
            q_sim = f_sim(h_sim)
        h_o = sim.push_history(h_o, q, a)
        miss += (q - q_sim).pow(2).mean() / ROLLOUT
        size += c.pow(2).mean() / ROLLOUT
        change += (c - last).pow(2).mean() / ROLLOUT
        last = c
    return miss, size, change


def fit_residual(f, f_sim, data, steps, cost, seed=0, batch=256):
    """Train the residual along simulated episodes `data` (see `train_policy.simulate`), so that
    the hand's model f, corrected, ends up where the model f_sim of the simulated joints does
    without; both stay frozen.

    The paper asks f to end up at the simulated q_{t+1} itself. But balls give way and an object in
    a firm grasp does not: f believes that a finger pressing on the object will go on, and a
    residual that corrects this belief lets go of the object. f_sim, learned among balls too,
    believes much the same, so that mostly the difference between the two hands' joints is left."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    residual, episodes = Residual(), Episodes(data)
    some = episodes.some(20000, episodes.length, generator)
    residual.norm.update(residual.inputs(*episodes.seen(*some)))
    optimizer = torch.optim.Adam(residual.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = sim.Progress("residual", steps)
    for i in range(steps):
        which, start = episodes.some(batch, episodes.length - ROLLOUT, generator)
        start[:batch // 8] = episodes.BEFORE         # an episode's first step is worth a share
        miss, size, change = imagine(residual, f, f_sim, episodes, which, start)
        loss = 1e4 * (miss + cost * (size + change))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(residual.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar(i + 1, f"miss {1000 * miss.item() ** 0.5:.2f} mrad, "
                   f"correction {1000 * size.item() ** 0.5:.1f} mrad")
    return residual.eval()


# -------------------------------------------------------------------------------------- the data
def load_shards(folders):
    """All trajectories in `folders`, of one hand: positions q and targets sent a (n, 400, N) rad,
    which target sequence each replays (n,), the hand's port. Raises `Problem` on another kind of
    hand, on several hands, on NaN and broken files."""
    q, a, sequence, ports = [], [], [], {}
    for folder in folders:
        files = trajectories(folder)
        if not files:
            raise H.Problem(f"{folder} holds no trajectories; run collect.py first, or name the "
                            "folder that it printed")
        for file in files:
            data = sim.load_npz(file, "q", "target", "hand", "port", "sequence")
            if str(data["hand"]) != H.HAND:
                raise H.Problem(f"{file} was recorded on the hand {data['hand']}, not {H.HAND}")
            if not data["q"].shape == data["target"].shape == (sim.EPISODE, H.N):
                raise H.Problem(f"{file} has a trajectory of shape {data['q'].shape}, "
                                f"not {(sim.EPISODE, H.N)}")
            q.append(data["q"])
            a.append(data["target"])
            sequence.append(int(data["sequence"]))
            ports[str(data["port"])] = file
    if len(ports) > 1:
        raise H.Problem(f"these are of several hands ({', '.join(map(str, ports.values()))}): "
                        "every hand needs a model of its own")
    q, a, sequence = (torch.tensor(np.array(x)) for x in (q, a, sequence))
    return q, a, sequence, *ports


def held_out(sequence):
    """Which trajectories (n,) bool are kept from training: every tenth *sequence* with all its
    replays. (A replay of what was trained on, with other balls, is no test.) Raises `Problem` if
    there is nothing to hold out or to train on."""
    different = sequence.unique()
    if len(sequence) < 10 or len(different) < 2:
        raise H.Problem(f"{len(sequence)} trajectories of {len(different)} sequences are too few; "
                        "collect at least 10, of 2 sequences or more")
    held = sequence % 10 == 9
    return held if held.any() and not held.all() else sequence == different[-1]


def simulate_box(data, seed):
    """What collect.py does on a hand, in the training simulator: the targets of `data` replayed
    open loop, half of them with noise, dealt out to BOXES different Chaos Boxes.

    Nobody's box is the simulated one: a model that knows one box alone takes the box for the hand
    when it is fine-tuned in another. Returns q, a (n, 400, N) rad."""
    rng = np.random.default_rng([seed, 16])
    a = data["a"].double().numpy()
    noisy = rng.random((len(a), 1, 1)) < 0.5
    a = np.clip(a + noisy * rng.normal(0, SIGMA, a.shape), H.LOW, H.HIGH)
    q = np.zeros_like(a)
    boxes = min(BOXES, len(a))
    bar = sim.Progress("simulate the boxes", boxes)
    for k in range(boxes):
        # balls that rub take three times as long, balls that roll ten times
        balls = sim.Balls.drawn(np.random.default_rng([seed, k]))
        balls = balls._replace(rolls=False, friction=0.0)
        share = slice(k, None, boxes)
        q[share] = _replay(balls, a[share], data["wrist"][share].numpy(), rng)
        bar(k + 1)
    return torch.tensor(q, dtype=torch.float32), torch.tensor(a, dtype=torch.float32)


def lessons(data, seed):
    """What f_sim learns from, q, a (n, 400, N): simulated boxes and the task itself, `data`.

    What a blocked joint does next depends on what blocks it. Balls alone teach f that everything
    gives way; with the task in it, f and f_sim differ less by their boxes and more by the hands."""
    boxes = simulate_box(data, seed)
    return [torch.cat(pair) for pair in zip(boxes, (data["q"], data["a"]))]


def _replay(balls, a, wrists, rng):
    """Positions (n, T, N) of n hands in boxes of the same balls, each with its wrist (n, 4), that
    are sent targets a (n, T, N)."""
    # fine steps: MuJoCo lengthens the time constant of a contact to two of them
    substeps = 2 * sim.SUBSTEPS
    compiled = {tuple(wrist): sim.build(balls=balls, wrist=wrist,
                                        timestep=1 / (H.CONTROL_HZ * substeps)).compile()
                for wrist in np.unique(wrists, axis=0)}
    models = [compiled[tuple(wrist)] for wrist in wrists]
    m = models[0]
    state = np.zeros((len(a), 1 + m.nq + m.nv))
    state[:, 1:1 + m.nq] = [sim.stirred(m, rng) for _ in a]
    state[:, sim.Q] = a[:, 0]
    q = np.zeros_like(a)
    datas = [mujoco.MjData(m) for _ in range(os.cpu_count())]
    with rollout.Rollout(nthread=len(datas)) as pool:
        for t in range(-H.CONTROL_HZ, a.shape[1]):
            now = max(t, 0)
            if t in (-H.CONTROL_HZ, 0):          # balls settle around fingers that somebody holds
                for model in compiled.values():
                    model.dof_damping[:H.N] = sim.HELD if t < 0 else 0.0
            q[:, now] = state[:, sim.Q]
            control = np.repeat(a[:, now, None], substeps, 1)
            states, _ = pool.rollout(models, datas, state, nstep=substeps, control=control)
            state = states[:, -1]
    return q


# ---------------------------------------------------------------------------- tables and pictures
def table_of(models, sets):
    """Errors of every model on every set of trajectories, mrad, printed and returned:
    {set: {model: {"one": [N], "open": [N]}}}."""
    table = {}
    print("mean over joints, mrad               one step   0.5 s open loop")
    for name, (q, a) in sets.items():
        print(f"  {name}")
        table[name] = {}
        for kind, model in models.items():
            one_step, open_loop = errors(model, q, a)
            print(f"    {kind:<32} {one_step.mean():8.2f}   {open_loop.mean():8.2f}")
            table[name][kind] = {"one": one_step.tolist(), "open": open_loop.tolist()}
    return table


@torch.no_grad()
def draw_prediction(path, f, q, a, steps=200):
    """Measured against predicted, every joint of one trajectory q, a (400, N)."""
    guess = f(windows(q[None], a[None], every_window(q[None]))[0])
    seconds = np.arange(steps) / H.CONTROL_HZ
    figure, axes = sim.subplots(4, -(-H.N // 4), figsize=(11, 8), sharex=True, squeeze=False)
    for i, axis in zip(range(H.N), axes.T.flat):
        axis.plot(seconds, a[:steps, i], color="0.75", lw=1, label="target sent")
        axis.plot(seconds, q[:steps, i], color="tab:blue", label="measured")
        axis.plot(seconds[W:], guess[:steps - W, i], color="tab:orange", ls="--", lw=1,
                  label="predicted, one step")
        axis.set_title(H.JOINTS[i].name, fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle("Held-out trajectory, rad and s: what each joint did, and what its model says")
    sim.save_figure(figure, path)


# -------------------------------------------------------------------------------------- the script
def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", type=Path,
        help="folders of trajectories (default data/*-balls-policy and data/*-task)")
    add("--test", nargs="+", type=Path, default=[],
        help="folders of `deploy.py --record`: not learned from")
    add("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    add("--models", nargs="+", default=["joint"], choices=GROUPS)
    add("--out", type=Path, default=Path("runs/ndm"))
    add("--steps", type=int, default=8000, help="gradient steps of each fit")
    add("--residual-steps", type=int, default=1200)
    add("--episodes", type=int, default=192, help="simulated episodes of the policy")
    add("--cost", type=float, default=0.1,
        help="price of a correction, and of its change in a step, against the error")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.steps, args.residual_steps, args.episodes) < 1:
        raise H.Problem("--steps, --residual-steps and --episodes must be positive")
    if args.seed < 0 or not args.cost >= 0:
        raise H.Problem("--seed and --cost must not be negative")
    tests = [folder.resolve() for folder in args.test]
    args.data = args.data or sorted(
        folder for kind in ("*-balls-policy", "*-task") for folder in Path("data").glob(kind)
        if folder.resolve() not in tests)
    if not args.data:
        raise H.Problem("there is no data/*-balls-policy; run collect.py first, or name its "
                        "folders with --data")
    return args


def simulated_episodes(args):
    policy, content = load_policy(args.policy)
    # not the very episodes whose targets collect.py replays: their seeds are 1000 seed + 0, 1, ...
    data = simulate(policy, content, content["wrists"], args.episodes, 1000 * args.seed + 500)
    if len(data["q"]) < 8:
        raise H.Problem(f"the policy kept the object in {len(data['q'])} of {args.episodes} "
                        "simulated episodes; train it longer, or simulate more --episodes")
    return data


def main():
    args = arguments()
    began = time.monotonic()
    q, a, sequence, port = load_shards(args.data)
    held = held_out(sequence)
    sets = {"in distribution: held-out trajectories": (q[held], a[held])}
    if args.test:
        *task, _, other = load_shards(args.test)
        if other != port:
            raise H.Problem(f"--test is of the hand {other}, --data of {port}: they must be of one "
                            "hand")
        known = {targets.numpy().tobytes() for targets in a}
        if any(targets.numpy().tobytes() in known for targets in task[1]):
            raise H.Problem("--test holds an episode that is in --data as well: what is learned is "
                            "no test. Name another folder, or record with another --seed")
        sets["off distribution: the task, with an object"] = task
    data = simulated_episodes(args)
    simulated = lessons(data, args.seed)
    models, residuals = {"stays where it is": None}, {}
    for kind in dict.fromkeys(["joint", *args.models]):
        f_sim = pretrained(kind, *simulated, args.steps, args.seed)
        f = models[kind] = copy.deepcopy(f_sim)
        fit(f, q[~held], a[~held], args.steps, 1e-3, f"{kind}: this hand", seed=args.seed)
        for model in (f, f_sim):
            model.requires_grad_(False)
        residuals[kind] = fit_residual(
            f, f_sim, data, args.residual_steps, args.cost, args.seed)
    table = table_of(models, sets)
    H.save_json(args.out / "table.json", table)
    draw_prediction(args.out / "prediction.png", models["joint"], q[held][0], a[held][0])
    origin = {"data": [str(folder) for folder in args.data], "port": port}
    for kind in reversed(residuals):         # residual.pt last: where it is, all is
        f, residual = models[kind], residuals[kind]
        rival = "" if kind == "joint" else f"-{kind}"
        save_checkpoint(args.out / f"dynamics{rival}.pt", "dynamics", config=f.config,
                        weights=f.state_dict(), **origin)
        save_checkpoint(args.out / f"residual{rival}.pt", "residual", config=residual.config,
                        weights=residual.state_dict(), policy=digest(args.policy), **origin)
    print(f"written to {args.out} in {(time.monotonic() - began) / 60:.1f} min")


if __name__ == "__main__":
    H.run(main)
