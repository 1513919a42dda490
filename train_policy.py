"""Stage 1: a policy that rotates an object in the fingers, learned in simulation.

    python train_policy.py                                        # cuboids and cylinders, +-z, palm up and down
    python train_policy.py --family cube --wrist palm_up --axis +z --minutes 20 --out runs/cube

reads   nothing (grasps are sampled on first use and cached)
writes  OUT/oracle-FAMILY.pt   one PPO specialist per object family, sees everything the simulator knows
        OUT/policy.pt          the generalist: behaviour-cloned from the oracles, sees joint encoders alone
        OUT/curve.png, OUT/policy.gif, OUT/results.json
Run it again with the same --out and it goes on where it stopped; Ctrl-C at any moment leaves valid files.

The method, the reward and its weights are the paper's (arXiv 2510.08556); what differs says why, with a measurement.
"""
import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import hand as H
import sim
from sim import ALPHA, EPISODE

# ------------------------------------------------------------------------------------------------------- objects
# Full sizes in m, +-5 % in size by the choice of members. Aspect ratios as in the paper: normal cylinders 1.6-2.4
# (height over radius), normal cuboids 1.25-1.5 (longest over shortest edge), and the cube everyone asks about.
FAMILIES = {
    "cube": [sim.box(s, s, s) for s in (0.0525, 0.055, 0.0575)],
    "cuboid": [sim.box(s, s, s * r) for s in (0.0525, 0.0575) for r in (1.0, 1.25)] + [sim.box(0.055, 0.055 / 1.25, 0.055),
                                                                                      sim.box(0.05, 0.05, 0.075)],
    "cylinder": [sim.cylinder(d, d / 2 * r) for d in (0.0525, 0.055, 0.0575) for r in (1.6, 2.0, 2.4)],
}

# ------------------------------------------------------------------------------------------- observation and reward
# r = a_rot r_rot + a_goal r_goal + a_pen r_pen. Where the weights differ from the paper's, what was measured (2 cores, both
# wrists, +-z, cuboids and cylinders, 1-2.6 M steps at 0.2 g, one seed each):
#   C_ROT 0.7, A_ROT 2.5, A_POSE 0.15-0.5, FALL 5-10    twists the object half a turn in one stroke and throws it: 2.6 rad, 4 s
#   C_ROT 0.5, A_ROT 2.5, A_POSE 0.3, FALL 20           one stroke of 1 rad, then holds: 0.9 rad, 19 s
#   C_ROT 0.5, A_ROT 5.0, A_POSE 0.3, FALL 20           throws again, rising slowly: 2.6 rad, 10 s
#   the values below                                    twists and drops: 1.6 rad, 12 s after 2.6 M
#   the same, but A_ROT halved until it holds           lifts its fingers and takes new holds: 3 rad, 17 s after 3.2 M; see README for the end
C_ROT = 0.5            # rad/s, clip of the rewarded rotation
A_ROT = 5.0            # not given in the paper
A_POSE = 1.0           # paper 0.3; at the end of a stroke it is worth while to lift the fingers one by one and go back
ALIVE = 1.0            # ours: a held object stays worth more than a thrown one in spite of A_POSE
A_LIN, A_TORQUE = 0.3, 0.1
A_WORK = 0.2           # paper 2.0, in the units of another simulator; at 2.0 it outweighs the rotation
A_ROTP = 0.1           # grows linearly from 0 at the 10th episode to this at the 100th
A_GOAL, GOAL_BONUS = 0.05, 1.0
A_CONTACT = 0.1        # ours: per fingertip in contact, up to three
A_POS = 10.0           # ours, per m from where the grasp held it: objects are squeezed out sideways long before they fall
FALL_PENALTY = 20.0    # ours: a hold must be worth more than the last quarter turn before a drop


class Task:
    """The reward and the privileged observation of one batch of `sim.Rotation` environments."""

    def __init__(self, env):
        self.env = env
        self.goal = np.zeros((env.n, 4))
        self.target3 = np.zeros((env.n, 3, H.N))
        self.q3 = np.zeros((env.n, 3, H.N))
        size = {"box": 0, "cylinder": 1}
        shapes = [o.parts[0] for o in env.objects]
        # half extents in dm, and which primitive it is
        self.shape = np.array([[*(10 * np.resize([*s[1], s[1][-1]], 3)), *np.eye(2)[size.get(s[0], 0)]] for s in shapes])[env.which]
        self.holds = np.ones(len(env.wrists), bool)
        self.episodes = 0
        self.start(np.arange(env.n))

    def start(self, ids):
        env = self.env
        self.q3[ids], self.target3[ids] = env.q[ids, None], env.target[ids, None]
        self._ahead(ids)
        self.episodes += len(ids) / env.n

    def _ahead(self, ids):
        """The guiding goal: the object's own orientation, a quarter turn further about k."""
        env = self.env
        self.goal[ids] = sim.multiply(sim.from_axis_angle(env.axis[ids], np.full(len(ids), np.pi / 2)), env.quat[ids])

    def torque(self):
        env = self.env
        return np.clip(H.STIFFNESS * (env.target - env.q) - H.DAMPING * env.dq, -H.TORQUE, H.TORQUE)

    def reward(self):
        """(n,) reward of the control step just made; moves goals that were reached."""
        env = self.env
        k, tau = env.axis, self.torque()
        r_rot = np.clip((env.omega * k).sum(1), -C_ROT, C_ROT)
        angle = np.linalg.norm(sim.rotation_vector(sim.multiply(self.goal, sim.conjugate(env.quat))), axis=1)
        reached = angle < np.radians(15)
        r_goal = np.clip(0.2 / (angle + 0.1), 0, 1) + GOAL_BONUS / A_GOAL * reached
        self._ahead(np.flatnonzero(reached))
        a_rotp = A_ROTP * np.clip((self.episodes - 10) / 90, 0, 1)
        r_pen = (-a_rotp * np.abs(np.cross(env.omega, k)).sum(1) - A_LIN * (env.vel[:, :3] ** 2).sum(1)
                 - A_POSE * ((env.q - H.GRASP) ** 2).sum(1) - A_WORK * np.abs(tau * env.dq).sum(1)
                 - A_TORQUE * (tau ** 2).sum(1))
        contacts = np.minimum((env.contact[:, :, 0] > 0).sum(1), 3)
        drift = np.minimum(np.linalg.norm(env.pos - env.home, axis=1), sim.FALL)
        a_rot = A_ROT * np.where(self.holds, 1.0, 0.5)[env.which_wrist]
        r = ALIVE + a_rot * r_rot + A_GOAL * r_goal + r_pen + A_CONTACT * contacts - A_POS * drift
        # squares of speeds have no bound: one glitch of the simulator among 4 M steps spoiled the scale of the returns, then the critic
        # (explained variance 0.97 -> 0.2), then the policy (5.5 rad -> 0.6)
        return np.maximum(r, -FALL_PENALTY) - FALL_PENALTY * env.fallen

    def observe(self):
        """The privileged observation (n, 254), float32, the blocks of the paper's table; what mattered most: contacts
        and fingertips relative to the object (without them 2-3 rad, with them 13)."""
        env = self.env
        noise = env.rng.uniform(-env.noise, env.noise, (env.n, H.N))
        self.q3 = np.concatenate([self.q3[:, 1:], (env.q + noise)[:, None]], 1)
        self.target3 = np.concatenate([self.target3[:, 1:], env.target[:, None]], 1)
        n, (w, x, y, z) = env.n, env.quat.T
        R = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * y + w * z), 1 - 2 * (x * x + z * z),
                      2 * (x * z - w * y), 2 * (y * z + w * x)], 1)      # first two columns of the rotation matrix: no sign flips
        goal = sim.multiply(self.goal, sim.conjugate(env.quat))
        blocks = [
            (self.q3 - H.GRASP).reshape(n, -1) * 2, 10 * (self.target3 - self.q3).reshape(n, -1), env.dq * 0.5,
            20 * (env.tips - env.pos[:, None]).reshape(n, -1), 20 * (env.tips - sim.CENTRE).reshape(n, -1),
            5 * env.tip_vel.reshape(n, -1), 20 * (env.pos - sim.CENTRE), R, 5 * env.vel[:, :3], 0.5 * env.vel[:, 3:],
            0.5 * env.omega, goal * np.sign(goal[:, :1] + 1e-9), 10 * self.torque(),
            np.minimum(env.contact[:, :, 0], 1), np.clip(env.contact[:, :, 1:].reshape(n, -1), -3, 3),
            env.wrist, env.axis, self.shape, 20 * env.mass[:, None], env.friction[:, None], env.g[:, None] * 10 * env.mass[:, None],
        ]
        return np.concatenate(blocks, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- networks
def mlp(*sizes):
    layers = []
    for a, b in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(a, b), nn.ELU()]
    return nn.Sequential(*layers[:-1])


class Normalizer(nn.Module):
    """Running mean and standard deviation of what it sees in `update`."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.tensor(1e-4))

    def update(self, x):
        n, mean, var = x.shape[0], x.mean(0), x.var(0, unbiased=False)
        delta, total = mean - self.mean, self.count + n
        self.mean += delta * n / total
        self.var.copy_((self.var * self.count + var * n + delta ** 2 * self.count * n / total) / total)
        self.count.copy_(total)

    def forward(self, x):
        return ((x - self.mean) / (self.var.sqrt() + 1e-4)).clamp(-5, 5)


class Oracle(nn.Module):
    """Actor and critic on the privileged observation; the action is delta, 16 numbers in [-1, 1] after clipping."""

    def __init__(self, size):
        super().__init__()
        self.norm = Normalizer(size)
        self.returns = Normalizer(())
        self.actor, self.critic = mlp(size, 256, 192, 128, H.N), mlp(size, 256, 192, 128, 1)
        self.log_std = nn.Parameter(torch.full((H.N,), -0.5))
        for net, gain in ((self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(net[-1].weight, gain)
            nn.init.zeros_(net[-1].bias)

    def act(self, obs):
        return self.actor(self.norm(obs))


class Generalist(nn.Module):
    """The deployable policy: residual blocks y = relu(A(x) + C(relu(B(x)))) on `sim.deployable` observations.

    Five blocks as in the paper; width 256 instead of 1024 keeps a checkpoint at 4 MB and a step below a millisecond."""

    def __init__(self, size=2 * H.N * sim.W + 7, width=256, blocks=5):
        super().__init__()
        self.config = {"size": size, "width": width, "blocks": blocks}
        self.norm = Normalizer(size)
        sizes = [size] + [width] * blocks
        self.A = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.B = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.C = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.out = nn.Linear(width, H.N)

    def forward(self, obs):
        x = self.norm(obs)
        for A, B, C in zip(self.A, self.B, self.C):
            x = torch.relu(A(x) + C(torch.relu(B(x))))
        return self.out(x)


# ------------------------------------------------------------------------------------------------------------- files
def save_checkpoint(path, kind, **content):
    """torch.save, whole or not at all. `kind`, the hand and its joints are written into every file."""
    with H.atomic_file(path) as file:
        torch.save({"kind": kind, "hand": H.HAND, "joints": [j.name for j in H.JOINTS], **content}, file)


def load_checkpoint(path, kind):
    """A dict that `save_checkpoint` wrote. Raises `Problem` if it is missing, broken, of another kind or another hand."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, name, joints = content["kind"], content["hand"], content["joints"]
    except FileNotFoundError:
        raise H.Problem(f"{path} is not there; train it, or name another file")
    except Exception as error:
        raise H.Problem(f"{path} is not a checkpoint of this program ({type(error).__name__})")
    if found != kind:
        raise H.Problem(f"{path} holds a {found}, not a {kind}")
    if name != H.HAND or joints != [j.name for j in H.JOINTS]:
        raise H.Problem(f"{path} is for the hand {name}; the table in hand.py describes {H.HAND}")
    return content


def load_network(path, kind, network):
    """The `network` class in `path` with its weights, and what else the file says. Raises `Problem` as `load_checkpoint` does."""
    content = load_checkpoint(path, kind)
    try:
        net = network(**content["config"])
        net.load_state_dict(content["weights"])
    except (KeyError, TypeError, RuntimeError):
        raise H.Problem(f"{path} was written by another version of this program; train it again")
    return net.eval(), content


def load_policy(path):
    """The generalist in `path`, ready to be called on (n, 327) float32 tensors, and what else the file says."""
    return load_network(path, "policy", Generalist)


def digest(path):
    """The first 16 digits of a file's SHA-256: which policy it was."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@torch.no_grad()
def targets(policy, env):
    """a_t = a_{t-1} + alpha delta_t for every environment of `env`."""
    return env.target + ALPHA * policy(torch.from_numpy(env.observe())).clamp(-1, 1).numpy()


# --------------------------------------------------------------------------------------------------------------- PPO
def log_prob(mu, log_std, a):
    """Log density (n,) of actions a (n, 16) under a Gaussian, but for the constant, which cancels in every ratio."""
    return (-0.5 * ((a - mu) / log_std.exp()) ** 2 - log_std).sum(1)


def train_oracle(family, args, minutes, path, curve):
    """One specialist by PPO on the privileged observation; returns it. Goes on from `path` if that is there."""
    n, horizon, epochs, batches = args.envs, 16, 3, 4
    gamma, lam, clip, kl_target = 0.99, 0.95, 0.2, 0.012
    torch.manual_seed(args.seed)
    env = sim.Rotation(n, objects_of(family), args.wrist, args.axis, seed=args.seed)
    task = Task(env)
    obs = torch.from_numpy(task.observe())
    oracle = Oracle(obs.shape[1])
    opt = torch.optim.Adam(oracle.parameters(), lr=5e-4, eps=1e-5, fused=True)
    # Gravity rises with success at rotating, not at holding: raised on survival alone a policy learns to hold still
    # (1.6 rad); at full gravity from the start it learns half a turn and a drop (3 rad, 4 s).
    level = np.full(len(args.wrist), 0.2)
    # Before that it learns to hold, with A_ROT halved until 85 % of an episode is held.
    holds = task.holds
    holds[:] = False
    done_s, steps, best, lr = 0.0, 0, -1.0, 5e-4
    if path.exists():
        saved = load_checkpoint(path, "oracle")
        if saved["size"] != obs.shape[1]:
            raise H.Problem(f"{path} was trained with another observation; choose another --out")
        oracle.load_state_dict(saved["last"])
        opt.load_state_dict(saved["opt"])
        level, done_s, steps, best, lr = np.array(saved["level"]), saved["seconds"], saved["steps"], saved["best"], saved["lr"]
        best_weights = saved["weights"]
        holds[:] = saved["holds"]
        curve[:] = [row for row in saved["curve"]]
    env.gravity_scale = level
    env.reset(np.arange(n))
    task.start(np.arange(n))
    obs = torch.from_numpy(task.observe())
    if done_s == 0:                                          # spread the first time limits over the episode, or all end at once
        env.steps[:] = env.rng.integers(0, EPISODE // 2, n)
    turned, born = np.zeros(n), env.steps.copy()
    recent = [[] for _ in args.wrist]                        # (rad per 20 s, steps held / steps possible) of finished episodes
    start, saved_at = time.monotonic(), time.monotonic()
    bar = sim.Progress(f"oracle {family}", minutes * 60, " s")
    keep = lambda *shape: torch.zeros(horizon, n, *shape)
    O, A, LP, R, D, V, VT = keep(obs.shape[1]), keep(H.N), keep(), keep(), keep(), keep(), keep()

    while True:
        # --- rollout
        for t in range(horizon):
            with torch.no_grad():
                oracle.norm.update(obs)
                x = oracle.norm(obs)
                mu, V[t] = oracle.actor(x), oracle.critic(x)[:, 0]
                std = oracle.log_std.exp()
                a = mu + std * torch.randn_like(mu)
                O[t], A[t], LP[t] = x, a, log_prob(mu, oracle.log_std, a)
            env.step(env.target + ALPHA * a.clamp(-1, 1).numpy())
            r = task.reward()
            turned += (env.omega * env.axis).sum(1) / sim.CONTROL_HZ
            ended = env.fallen | (env.steps >= EPISODE)
            obs = torch.from_numpy(task.observe())
            with torch.no_grad():                            # a time limit is no failure: its value goes on
                VT[t] = oracle.critic(oracle.norm(obs))[:, 0] if ended.any() else 0
            R[t] = torch.from_numpy(r)
            D[t] = torch.from_numpy(ended.astype(np.float32))
            VT[t] *= torch.from_numpy((ended & ~env.fallen).astype(np.float32))
            if ended.any():
                ids = np.flatnonzero(ended)
                for i in ids:
                    life = max(env.steps[i] - born[i], 1)
                    recent[env.which_wrist[i]].append((turned[i] * EPISODE / (EPISODE - born[i]), life / (EPISODE - born[i])))
                turned[ids], born[ids] = 0, 0
                env.reset(ids)
                task.start(ids)
                obs = torch.from_numpy(task.observe())
            steps += n
        # --- advantages (GAE), returns in units of their running standard deviation
        with torch.no_grad():
            scale = oracle.returns.var.sqrt()
            last = oracle.critic(oracle.norm(obs))[:, 0]
            adv, gae = torch.zeros_like(R), torch.zeros(n)
            for t in reversed(range(horizon)):
                nxt = last if t == horizon - 1 else V[t + 1]
                nxt = torch.where(D[t] > 0, VT[t], nxt)
                gae = R[t] / scale + gamma * nxt - V[t] + gamma * lam * (1 - D[t]) * gae
                adv[t] = gae
            ret = adv + V
            oracle.returns.update((ret * scale).flatten())
            explained = 1 - (ret - V).var() / ret.var()
        # --- update; actor and critic have their own gradient clips, or a large value loss starves the actor
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        o, a, lp, g, rt = map(flat, (O, A, LP, adv, ret))
        kls, clipped = [], []
        for _ in range(epochs):
            for idx in torch.randperm(len(o)).chunk(batches):
                mu = oracle.actor(o[idx])
                new = log_prob(mu, oracle.log_std, a[idx])
                ratio = (new - lp[idx]).exp()
                ga = g[idx]
                ga = (ga - ga.mean()) / (ga.std() + 1e-8)
                loss_pi = -torch.min(ratio * ga, ratio.clamp(1 - clip, 1 + clip) * ga).mean()
                bound = ((mu.abs() - 1.1).clamp(min=0) ** 2).sum(1).mean()     # means beyond the clip have no gradient home
                loss_v = (oracle.critic(o[idx])[:, 0] - rt[idx]).pow(2).mean()
                entropy = oracle.log_std.sum()
                opt.zero_grad()
                (loss_pi + 0.01 * bound - args.entropy * entropy + loss_v).backward()
                nn.utils.clip_grad_norm_([*oracle.actor.parameters(), oracle.log_std], 1.0)
                nn.utils.clip_grad_norm_(oracle.critic.parameters(), 1.0)
                opt.step()
                with torch.no_grad():
                    kls.append(((ratio - 1) - (new - lp[idx])).mean().item())
                    clipped.append(((ratio - 1).abs() > clip).float().mean().item())
            kl = float(np.mean(kls[-batches:]))              # the step size follows the KL divergence that it makes
            lr = max(lr / 1.5, 5e-5) if kl > 2 * kl_target else min(lr * 1.5, 2e-3) if kl < kl_target / 2 else lr
            for group in opt.param_groups:
                group["lr"] = lr
        # --- curriculum
        for w in range(len(args.wrist)):
            if len(recent[w]) >= n // 4:
                rot, held = np.mean(recent[w], 0)
                holds[w] |= held > 0.85
                if level[w] < 1 and rot > 4.0 and held > 0.5:
                    level[w] = min(1.0, level[w] + 0.05)
                curve.append([family, w, steps, done_s + time.monotonic() - start, float(rot), float(20 * held), float(level[w]),
                              float(explained), kl])
                score = np.mean([c[4] * c[6] for c in curve[-8:]])
                if score > best and len(curve) >= 8:
                    best, best_weights = score, {k: v.clone() for k, v in oracle.state_dict().items()}
                recent[w] = []
        # --- progress, checkpoint
        seconds = done_s + time.monotonic() - start
        over = seconds >= minutes * 60
        latest = {c[1]: c for c in curve[-2 * len(args.wrist):]}
        bar(min(seconds, minutes * 60), "  ".join(f"{args.wrist[w]}: {c[4]:.1f} rad {c[5]:.0f} s at {c[6]:.2f} g" for w, c in
            sorted(latest.items())) + f"  ev {explained:.2f} kl {kl:.3f} clip {np.mean(clipped):.2f} std {oracle.log_std.exp().mean():.2f}"
            f" lr {lr:.0e} blown up {env.blowups}  {steps / 1e6:.2f} M, {steps / seconds:,.0f} steps/s")
        if over or time.monotonic() - saved_at > 60:
            saved_at = time.monotonic()
            save_checkpoint(path, "oracle", family=family, size=O.shape[2], weights=best_weights if best > 0 else oracle.state_dict(),
                            last=oracle.state_dict(), opt=opt.state_dict(), level=level.tolist(), holds=holds.tolist(), seconds=seconds, steps=steps,
                            best=float(best), lr=lr, curve=curve, seed=args.seed)
        if over:
            break
    oracle.load_state_dict(best_weights if best > 0 else oracle.state_dict())
    return oracle


# -------------------------------------------------------------------------------------------------- the generalist
def distil(oracles, args, minutes, path):
    """One generalist from the oracles, on deployable observations, in rounds of one episode in every environment.

    The first rounds are the paper's behaviour cloning: the oracle drives with a little noise, the label is what it would do
    without, and only episodes that lasted all 400 steps are kept. In the later rounds the student drives and the oracle says
    what it would have done (DAgger). The paper found that unstable; here three rounds of cloning (600,000 steps) gave 16.4 rad and
    15.4 s, five more rounds with the student driving 17.5 rad and 17 s (one seed, 512 episodes)."""
    torch.manual_seed(args.seed)
    n = args.envs
    student = Generalist()
    X, Y, buffer = [], [], 12                                # rounds that are kept
    opt = torch.optim.Adam(student.parameters(), lr=1e-3, fused=True)
    task_of = dict(families=families_of(args), wrists=args.wrist, axes=args.axis)
    rounds, seconds = 0, 0.0
    if path.exists():
        saved = load_checkpoint(path, "policy")
        if any(saved.get(name) != value for name, value in task_of.items()) or "rounds" not in saved:
            raise H.Problem(f"{path} was trained for something else; choose another --out")
        student.load_state_dict(saved["weights"])
        rounds, seconds = saved["rounds"], saved["seconds"]
    if seconds >= minutes * 60:
        return student.eval()
    start = time.monotonic() - seconds
    bar = sim.Progress("generalist", minutes * 60, " s")
    teams = [(oracle, sim.Rotation(n, objects_of(family), args.wrist, args.axis, seed=args.seed + 1000)) for family, oracle in oracles]
    while seconds < minutes * 60:
        oracle, env = teams[rounds % len(teams)]
        task = Task(env)
        cloning = rounds < args.cloning * len(teams)
        xs, ys, lasted = [], [], np.ones(n, bool)

        @torch.no_grad()
        def act(env):
            if len(xs) == 0:
                task.start(np.arange(n))
            obs = env.observe()
            mu = oracle.act(torch.from_numpy(task.observe())).clamp(-1, 1)
            xs.append(torch.from_numpy(obs).half())
            ys.append(mu.half())
            drive = mu + 0.5 * oracle.log_std.exp() * torch.randn_like(mu) if cloning else student(torch.from_numpy(obs))
            return env.target + ALPHA * drive.clamp(-1, 1).numpy()

        def watch(env):
            task.reward()                                    # moves the guiding goals on
            lasted[env.fallen] = False
            task.start(np.flatnonzero(env.fallen))

        result = sim.run_episodes(env, act, watch)
        x, y = torch.stack(xs, 1), torch.stack(ys, 1)        # (n, 400, ...)
        keep = torch.from_numpy(lasted) if cloning else torch.ones(n, dtype=torch.bool)
        if not keep.any():                                   # nothing lasted yet: better imitate that than nothing
            keep[:] = True
        if rounds == 0:
            student.norm.update(x[keep].float().reshape(-1, x.shape[2]))
        X, Y = (X + [x[keep].reshape(-1, x.shape[2])])[-buffer:], (Y + [y[keep].reshape(-1, H.N)])[-buffer:]
        rounds += 1
        left = 1 - (time.monotonic() - start) / (minutes * 60)
        for group in opt.param_groups:
            group["lr"] = 1e-3 * max(left, 0.05)
        for _ in range(400):
            which = torch.randint(len(X), (1,)).item()
            idx = torch.randint(len(X[which]), (2048,))
            loss = (student(X[which][idx].float()) - Y[which][idx].float()).pow(2).mean()
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            opt.step()
        seconds = time.monotonic() - start
        bar(min(seconds, minutes * 60), f"round {rounds} driven by the {'oracle' if cloning else 'student'}: "
            f"{result['RotR'].mean() / sim.CONTROL_HZ:.1f} rad {result['TTF'].mean():.1f} s  loss {loss.item():.4f}")
        save_checkpoint(path, "policy", config=student.config, weights=student.state_dict(), seed=args.seed, rounds=rounds, seconds=seconds,
                        **task_of)
    return student.eval()


def draw_curve(path, curve, args):
    """Rotation, time to fall and gravity over the steps of training, per wrist and family."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for family in dict.fromkeys(row[0] for row in curve):
        for w, wrist in enumerate(args.wrist):
            rows = np.array([row[2:7] for row in curve if row[0] == family and row[1] == w])
            for axis, column, label in zip(axes, (2, 3, 4), ("radians per 20 s", "time to fall, s", "gravity, g")):
                if len(rows):
                    axis.plot(rows[:, 0] / 1e6, rows[:, column], label=f"{family} {wrist}")
                axis.set_xlabel("million control steps")
                axis.set_title(label, fontsize=10)
    axes[0].legend(fontsize=8)
    with H.atomic_file(path) as file:
        figure.savefig(file, dpi=90)
    plt.close(figure)


def evaluate(policy, args, episodes=256):
    """The policy at full gravity, randomised, per wrist: printed and written to results.json; one episode as a GIF."""
    results = {}
    for wrist in args.wrist:
        env = sim.Rotation(episodes, objects_of("+".join(args.family)), [wrist], args.axis, seed=args.seed + 77)
        frames = []
        r = sim.run_episodes(env, lambda env: targets(policy, env), lambda env: frames.append(env.state[:, 1:].copy()))
        results[wrist] = {k: [float(v.mean()), float(v.std())] for k, v in r.items()} | {
            "episodes": episodes, "blowups": env.blowups}
        print(f"{wrist}: {r['RotR'].mean() / sim.CONTROL_HZ:.2f} +- {r['RotR'].std() / sim.CONTROL_HZ:.2f} rad, TTF {r['TTF'].mean():.1f} s, "
              f"{100 * (r['TTF'] >= 20).mean():.0f} % last 20 s, RotP {r['RotP'].mean():.2f} rad/s, {episodes} episodes, {env.blowups} lost to NaN")
        best = int(np.argmax(np.where(r["TTF"] >= 20, r["RotR"], -np.inf)))
        sim.film(env.models[best], [f[best, :env.models[best].nq] for f in frames], args.out / f"policy-{wrist}.gif", wrist)
    with H.atomic_file(args.out / "results.json", "w") as file:
        file.write(json.dumps(results, indent=1) + "\n")
    return results


def objects_of(family):
    """The objects of a family, or of several joined by "+"."""
    return [o for f in family.split("+") for o in FAMILIES[f]]


def families_of(args):
    return [f for family in args.family for f in family.split("+")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", default=["cuboid+cylinder"],
                        help="an oracle for each of these; 'cuboid+cylinder' is one oracle for both")
    parser.add_argument("--wrist", nargs="+", default=["palm_up", "palm_down"], choices=sim.WRISTS)
    parser.add_argument("--axis", nargs="+", default=["+z", "-z"], choices=sim.AXES, type=str.strip)
    parser.add_argument("--minutes", type=float, default=40, help="training time in all (default 40)")
    parser.add_argument("--envs", type=int, default=512)
    parser.add_argument("--entropy", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/policy"))
    parser.add_argument("--cloning", type=int, default=3, help="rounds of pure behaviour cloning before the student drives")
    args = parser.parse_args(sim.arguments())
    strange = [f for f in families_of(args) if f not in FAMILIES]
    if strange:
        raise H.Problem(f"no family is called {', '.join(strange)}; there are {', '.join(FAMILIES)}")
    if not args.minutes > 0 or args.envs < 4:
        raise H.Problem("--minutes must be positive and --envs at least 4")
    share = 0.8 * args.minutes / len(args.family)
    curve, oracles = [], []
    for family in args.family:
        rows = []
        oracles.append((family, train_oracle(family, args, share, args.out / f"oracle-{family.replace('+', '-')}.pt", rows)))
        curve += rows
        draw_curve(args.out / "curve.png", curve, args)
    policy = distil(oracles, args, 0.2 * args.minutes, args.out / "policy.pt")
    evaluate(policy, args)


if __name__ == "__main__":
    H.run(main)
