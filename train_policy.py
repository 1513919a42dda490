"""Stage 1: a policy that rotates an object in the fingers, learned in simulation.

    python train_policy.py                        # cylinders and cuboids, +-z, palm up and down
    python train_policy.py --family cube --wrist palm_up --axis z+ --steps 4e6 --out runs/cube
    python train_policy.py --everything --start checkpoints/everything --out runs/all
                                                  # every family, axis and wrist: 120 M steps
    torchrun --nproc-per-node 2 train_policy.py   # with a process, and part of the hands, per core

reads   nothing (grasps are sampled on first use and cached)
writes  OUT/oracle-FAMILY.pt   one PPO specialist per object family, which sees everything that the
                               simulator knows, and begins with what the one before has learned,
                               or with --start; with all that training needs to go on
        OUT/policy.pt          the generalist: cloned from the oracles, then fine-tuned; sees joint
                               encoders alone
        OUT/fine-tuned.pt      all that fine-tuning needs to go on
        OUT/curve.png, OUT/policy-WRIST.gif, OUT/results.json
Run it again with the same --out and it goes on where it stopped, as if it had not stopped; Ctrl-C
at any moment leaves valid files.

Method and reward are the paper's (arXiv 2510.08556), not all of its weights. A comment says where
ours differ and why; results/README.md has the measurements.
"""
import argparse
import hashlib
import itertools
import os
import time
from pathlib import Path
from typing import NamedTuple

import sim                       # before torch: it sets how torch's threads wait
import numpy as np
import torch
import torch.distributed
import torch.nn as nn

import hand as H
from sim import EPISODE

# ------------------------------------------------------------------------------ hyperparameters
ENVS = 512               # hands that are stepped together
HORIZON = 16             # control steps of each between two updates
EPOCHS = 3               # passes over these
MINIBATCHES = 4
GAMMA = 0.99             # discount
LAMBDA = 0.95            # of generalised advantage estimation
CLIP = 0.2               # of PPO's ratio
KL_TARGET = 0.012        # the learning rate follows the KL divergence that an update makes
LEARNING_RATE = 5e-4     # at the start...
GOING_ON = 4e-5          # ...and where it goes on with the same cells from another run's weights
SLOWEST, FASTEST = 1e-6, 2e-3    # far enough apart that the divergence alone decides
CLIP_GRADIENT = 1.0      # actor and critic each: one clip for both starves the actor
MEAN_BOUND = 1.1         # means beyond the clip of the action have no gradient home...
MEAN_COST = 0.01         # ...so they pay

# Curriculum. It learns to hold first, with A_ROT halved until HOLDS of an episode is held. Then the
# level rises from 0 (0.2 g, nominal centre of mass, wrist, contact and motor) to 1 (1 g, these as
# far off as they may be) with success at rotating, not at holding: raised on survival alone a
# policy learns to hold still, and at full gravity from the start half a turn and a drop.
HOLDS = 0.75
RAISE_RAD = {"x": 3.2, "y": 5.0, "z": 7.0, "other": 5.4}     # rad per 20 s: 45 % of the paper's
RAISE_HELD = 0.6         # share of the episode
LOWER = 0.5              # below this share of RAISE_RAD the level goes down again
RAISE = 1 / 16, 1 / 8    # the second where so many cells are trained that each is seen rarely
ENOUGH = 192, 12         # episodes of all cells, and at least of one, before its level may change
GO_ON = 0.5              # at level 1, share of held episodes after which another task goes on

# The generalist
ROUNDS = 12, 24          # per oracle: the lesson, everything; of 400 control steps...
CLONING_ENVS = 1 / 2     # ...of this share of the hands: more rounds, not more of the same policy
CLONING = 2              # rounds per oracle in which the oracle drives
GRADIENT_STEPS = 400     # after each round
CLONING_BATCH = 1024
CLONING_RATE = 1e-3
KEPT = 0.25              # share of the control steps that are kept: neighbours are alike
REDIRECT = 1 / 200       # of wrist and axis, chance per control step while the student drives

# The generalist, fine-tuned by PPO: it has copied oracles that know what it cannot know
TUNING = 1.5e6, 0        # control steps: the lesson, everything (there it learns to hold still)
TUNING_STD = 0.2         # of its noise
TUNING_KL = 0.004        # at KL_TARGET what cuboids turn falls again
TUNING_RATE = 2e-5       # at the start

SHARES = 0.7, 0.15, 0.15         # of --minutes: oracles, cloning, fine-tuning

# ------------------------------------------------------------------------------------- reward
# r = a_rot r_rot + a_goal r_goal + r_pen, and what is marked as ours; see `Task.advance`.
# A pair is for the level 0 and 1 of the curriculum: turning is found first, then it must hold.
C_ROT = 0.75             # rad/s, clip of the rewarded rotation; paper 0.5
A_ROT = 5.0              # not given in the paper
A_GOAL, GOAL_BONUS = 0.05, 1.0
A_ROTP = 0.1, 0.5        # paper 0.1, from the 100th episode on: far too late and little here
A_LIN, A_TORQUE = 0.3, 0.1
A_WORK = 0.2             # paper 2.0, in another simulator's units: there it outweighs the rotation
A_POSE = 1.0             # paper 0.3; at the end of a stroke it pays to lift the fingers and go back
ALIVE = 1.0              # ours: a held object stays worth more than a thrown one despite A_POSE
A_CONTACT = 0.1          # ours: per fingertip in contact, up to three
A_POS = 10.0             # ours, per m from where the grasp held it: objects are squeezed out slowly
FALL_PENALTY = 40.0, 220.0       # ours: a hold is worth more than the last turn before a drop


class Task:
    """The reward and the privileged observation of one batch of `sim.Rotation` environments."""

    PAST = 3                     # control steps of joint positions and targets

    def __init__(self, env):
        self.env = env
        self.goal = np.zeros((env.n, 4))
        # what tells objects apart: the largest sizes (as MuJoCo takes them) and distances of their
        # parts, in dm, which is their extent only for a cuboid; and the primitive, if it is one
        self.shape = np.zeros((len(env.objects), 5))
        for row, obj in zip(self.shape, env.objects):
            kinds = [kind for kind, *_ in obj.parts]
            row[3:] = kinds == ["box"], kinds == ["cylinder"]
            for _, size, pos, _ in obj.parts:
                reach = np.abs(pos) + np.resize([*size, size[-1]], 3)
                row[:3] = np.maximum(row[:3], 10 * reach)
        self.shape = self.shape[env.which]
        self.holds = np.ones(len(env.cells), bool)
        self.start(np.arange(env.n))

    def redirect(self, ids):
        """Another wrist and axis for the environments `ids`, which go on from where they are."""
        self.env.redirect(ids)
        self.start(ids)

    def start(self, ids):
        """A guiding goal for the environments `ids`, whose episodes begin, or whose last goal was
        reached: the object's own orientation, a quarter turn further about k."""
        env = self.env
        quarter = sim.from_axis_angle(env.axis[ids], np.full(len(ids), np.pi / 2))
        self.goal[ids] = sim.multiply(quarter, env.quat[ids])

    def torque(self):
        """What the textbook motors do (n, N) N m."""
        env = self.env
        torque = H.STIFFNESS * (env.target - env.measured) - H.DAMPING * env.dq
        return np.clip(torque, -H.TORQUE, H.TORQUE)

    def advance(self):
        """Once after every `env.step`, before anything is reset: (n,) reward of the control step
        just made. Whoever has reached its guiding goal gets the next one."""
        env = self.env
        k, torque = env.axis, self.torque()
        level = env.level[env.cell]
        a_rotp, penalty = (np.interp(level, (0, 1), pair) for pair in (A_ROTP, FALL_PENALTY))
        r_rot = np.clip((env.omega * k).sum(1), -C_ROT, C_ROT)
        a_rot = A_ROT * np.where(self.holds, 1.0, 0.5)[env.cell]
        away = np.linalg.norm(sim.rotation_between(env.quat, self.goal), axis=1)
        reached = away < np.radians(15)
        r_goal = A_GOAL * np.clip(0.2 / (away + 0.1), 0, 1) + GOAL_BONUS * reached
        r_pen = (
            -a_rotp * np.abs(np.cross(env.omega, k)).sum(1)
            - A_LIN * (env.vel[:, :3] ** 2).sum(1)
            - A_POSE * ((env.q - H.GRASP) ** 2).sum(1)
            - A_WORK * np.abs(torque * env.dq).sum(1)
            - A_TORQUE * (torque ** 2).sum(1))
        contacts = np.minimum((env.contact[:, :, 0] > 0).sum(1), 3)
        drift = np.minimum(np.linalg.norm(env.pos - env.home, axis=1), sim.FALL)
        r = ALIVE + a_rot * r_rot + r_goal + r_pen + A_CONTACT * contacts - A_POS * drift
        self.start(np.flatnonzero(reached))
        # squares of speeds have no bound, and one glitch of the simulator among millions of steps
        # spoils the scale of the returns, then the critic, then the policy
        return np.maximum(r, -penalty) - penalty * env.fallen

    def observe(self):
        """The privileged observation, float32 tensor (n, 217 with 16 joints and 4 fingers). What
        matters most: contacts, and fingertips relative to the object. The columns: scale, which
        makes a usual value about 1, and values (rad, m, rad/s, m/s, N, N m, kg)."""
        env = self.env
        n, (w, x, y, z) = env.n, env.quat.T
        # six entries of the rotation matrix: q and -q, the same orientation, look the same
        turned = np.stack([
            1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * y + w * z),
            1 - 2 * (x * x + z * z), 2 * (x * z - w * y), 2 * (y * z + w * x)], 1)
        goal = sim.multiply(self.goal, sim.conjugate(env.quat))
        force = np.clip(env.contact[:, :, 1:], -3, 3)
        past_q, past_target = np.moveaxis(env.history[:, -self.PAST:].double().numpy(), 2, 0)
        blocks = (
            (2.0, past_q - H.GRASP),                             # 48  joint positions, 3 steps
            (10.0, past_target - past_q),                        # 48  targets: the load on each
            (0.5, env.dq),                                       # 16  joint velocities
            (20.0, env.tips - env.pos[:, None]),                 # 12  fingertips from the object
            (20.0, env.tips - sim.CENTRE),                       # 12  fingertips in the hand
            (5.0, env.tip_vel),                                  # 12  their velocities
            (20.0, env.pos - sim.CENTRE),                        #  3  object position
            (1.0, turned),                                       #  6  object orientation
            (5.0, env.vel[:, :3]),                               #  3  its velocity
            (0.5, env.vel[:, 3:]),                               #  3  angular, in its own frame
            (0.5, env.omega),                                    #  3  its rotation in the last step
            (1.0, goal * np.sign(goal[:, :1] + 1e-9)),           #  4  from here to the goal
            (10.0, self.torque()),                               # 16  motor torques
            (1.0, np.minimum(env.contact[:, :, 0], 1)),          #  4  which fingertips touch
            (1.0, force),                                        # 12  with what force
            (1.0, env.wrist),                                    #  4  wrist orientation
            (1.0, env.axis),                                     #  3  rotation axis k
            (1.0, self.shape),                                   #  5  object size and kind
            (20.0, env.mass[:, None]),                           #  1
            (1.0, env.friction[:, None]),                        #  1
            (10.0, (env.g * env.mass)[:, None]),                 #  1  its weight
        )
        rows = [scale * np.reshape(values, (n, -1)) for scale, values in blocks]
        return torch.from_numpy(np.concatenate(rows, 1).astype(np.float32))


# ---------------------------------------------------------------------------- several processes
RANK, RANKS, LOCAL_RANKS = (                             # the last: those of this machine
    int(os.environ.get(name, default))
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))


def average(*tensors):
    """Replace tensors by their mean over the processes that torchrun has started."""
    if RANKS == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor) / RANKS)


def gather(value):
    """The values of all processes."""
    values = [value] * RANKS
    if RANKS > 1:
        torch.distributed.all_gather_object(values, value)
    return values


# ----------------------------------------------------------------------------------- networks
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
        n, mean, var = RANKS * x.shape[0], x.mean(0), x.var(0, unbiased=False)
        if RANKS > 1:
            square = var + mean ** 2
            average(mean, square)
            var = (square - mean ** 2).clamp(min=0)      # a constant, rounded
        delta, total = mean - self.mean, self.count + n
        self.mean += delta * n / total
        between = delta ** 2 * self.count * n / total
        self.var.copy_((self.var * self.count + var * n + between) / total)
        self.count.copy_(total)

    def forward(self, x):
        return ((x - self.mean) / (self.var.sqrt() + 1e-4)).clamp(-5, 5)


class Oracle(nn.Module):
    """Actor and critic on the privileged observation; the action is delta, N numbers in [-1, 1]
    after clipping, drawn from a Gaussian."""

    def __init__(self, size):
        super().__init__()
        self.norm = Normalizer(size)
        self.returns = Normalizer(())            # only their standard deviation is used
        self.actor, self.critic = mlp(size, 256, 192, 128, H.N), mlp(size, 256, 192, 128, 1)
        self.log_std = nn.Parameter(torch.full((H.N,), -0.5))
        for net, gain in ((self.actor, 0.01), (self.critic, 1.0)):
            nn.init.orthogonal_(net[-1].weight, gain)
            nn.init.zeros_(net[-1].bias)

    def act(self, obs):
        return self.actor(self.norm(obs))

    def value(self, obs):
        return self.critic(self.norm(obs))[:, 0]

    def log_prob(self, mean, action):
        """Log density (n,), but for the constant, which cancels in every ratio."""
        return (-0.5 * ((action - mean) / self.log_std.exp()) ** 2 - self.log_std).sum(1)


class Generalist(nn.Module):
    """The deployable policy: residual blocks y = relu(A(x) + C(relu(B(x)))) on `sim.observation`.

    Five blocks as in the paper; width 256 instead of 1024 keeps a checkpoint at 4 MB and a step
    below a millisecond."""

    def __init__(self, size=sim.OBSERVED, width=256, blocks=5):
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


# -------------------------------------------------------------------------------- checkpoints
def save_checkpoint(path, kind, **content):
    """torch.save, all or nothing. `kind`, the hand and its joints are written into every file."""
    joints = [joint.name for joint in H.JOINTS]
    with H.atomic_file(path) as file:
        torch.save({"kind": kind, "hand": H.HAND, "joints": joints, **content}, file)


def load_checkpoint(path, kind):
    """A dict that `save_checkpoint` wrote. Raises `Problem` if it is missing, broken, of another
    kind or of another hand."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, name, joints = content["kind"], content["hand"], content["joints"]
    except FileNotFoundError:
        raise H.Problem(f"{path} is not there; train it, or name another file")
    except Exception as error:
        raise H.Problem(f"{path} is not a checkpoint of this program ({type(error).__name__})")
    if found != kind:
        raise H.Problem(f"{path} holds a {found}, not a {kind}")
    if name != H.HAND or joints != [joint.name for joint in H.JOINTS]:
        raise H.Problem(f"{path} is for the hand {name}; the table in hand.py describes {H.HAND}"
                        f"{', with other joints' if name == H.HAND else ''}")
    return content


def load_network(path, kind, network):
    """The `network` class in `path` with its weights, and what else the file says. Raises `Problem`
    as `load_checkpoint` does."""
    content = load_checkpoint(path, kind)
    try:
        net = network(**content["config"])
        net.load_state_dict(content["weights"])
    except (KeyError, TypeError, RuntimeError):
        raise H.Problem(f"{path} was written by another version of this program; train it again")
    if not all(tensor.isfinite().all() for tensor in net.state_dict().values()):
        raise H.Problem(f"{path} has weights that are no numbers (NaN or infinite); train it again")
    return net.eval(), content


def load_policy(path):
    """The generalist in `path`, ready to be called on (n, OBSERVED) float32 tensors, and what else
    the file says."""
    return load_network(path, "policy", Generalist)


def digest(path):
    """The first 16 digits of a file's SHA-256: which policy it was."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def fingerprint(network):
    """16 digits that differ if any weight does."""
    weights = b"".join(tensor.numpy().tobytes() for tensor in network.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:16]


@torch.no_grad()
def act(policy, env):
    """The policy's next targets (n, N) for every environment of `env`."""
    return sim.next_target(env.target, policy(env.observe()).numpy())


def simulate(policy, content, wrists, episodes, seed, title="simulate the policy"):
    """The policy in the training simulator: every one of `episodes` that held its object to the
    end, as float32 tensors: q (n, 400, N) positions, a (n, 400, N) targets sent, `first`
    (n, N) the target before the first of them, wrist (n, 4), axis (n, 3)."""
    objects = sim.objects_of("+".join(content["families"]))
    env = sim.Rotation(episodes, objects, wrists, content["axes"], seed=seed, noise=0)
    q, before = [], []

    def watched(env):
        q.append(env.measured.copy())
        before.append(env.target.copy())
        return act(policy, env)

    held = sim.run_episodes(env, watched, title=title)["TTF"] >= EPISODE / sim.CONTROL_HZ
    # of those that fell, which begin anew, nothing is kept
    rows = dict(q=np.swapaxes(q, 0, 1), a=np.swapaxes([*before[1:], env.target], 0, 1),
                first=before[0], wrist=env.wrist, axis=env.axis)
    return {name: torch.tensor(x[held], dtype=torch.float32) for name, x in rows.items()}


# ---------------------------------------------------------------------------------------- PPO
class Row(NamedTuple):
    """One point of a training curve: the last episodes of a cell."""
    cell: tuple          # wrist, axis, family of objects
    steps: int           # control steps in all
    seconds: float       # of training
    turned: float        # rad per 20 s
    held: float          # share of the episode
    level: float         # of the curriculum


def group(cell, cells):
    """How a cell is called where all of `cells` are shown: by what tells them apart, and wrists
    only where there are few."""
    apart = [len({other[k] for other in cells}) > 1 for k in range(len(cell))]
    apart[0] &= len(cells) <= 8
    return " ".join(word for word, shown in zip(cell, apart) if shown) or cell[0]


class Curriculum:
    """Counts finished episodes and raises `env.level` and `task.holds`, for each cell by itself:
    one that learns fast would raise the level of one that has not learned to turn yet, and at full
    gravity it never does. No level falls below `lowest`, where all begin."""

    def __init__(self, env, task, lowest=0.0):
        self.env, self.task, self.lowest = env, task, lowest
        env.level[:] = lowest
        task.holds[:] = lowest > 0
        self.turned, self.born = np.zeros(env.n), np.zeros(env.n, int)
        self.recent = [[] for _ in env.cells]            # (rad per 20 s, share held)
        self.new = []                                    # (cell, rad per 20 s, share held)
        self.enough = max(ENOUGH[0] // len(env.cells), ENOUGH[1])
        self.rise = RAISE[self.enough == ENOUGH[1]]

    def count(self, ended):
        """A control step was made, in which the episodes `ended` (n,) bool came to their end."""
        env = self.env
        self.turned += (env.omega * env.axis).sum(1) / sim.CONTROL_HZ
        for i in np.flatnonzero(ended):
            possible = EPISODE - self.born[i]            # first episodes begin in their middle
            held = max(env.steps[i] - self.born[i], 1) / possible
            turned = self.turned[i] * EPISODE / possible
            self.new.append((int(env.cell[i]), float(turned), float(held)))
        self.turned[ended], self.born[ended] = 0, 0

    def raise_levels(self):
        """Yields (cell, rad per 20 s, share held, level) of cells with enough episodes."""
        env = self.env
        for c, *episode in itertools.chain(*gather(self.new)):
            self.recent[c].append(episode)
        self.new = []
        for c, cell in enumerate(env.cells):
            if len(self.recent[c]) < self.enough:
                continue
            turned, held = np.mean(self.recent[c], 0)
            self.recent[c] = []
            self.task.holds[c] |= held > HOLDS
            success = turned / RAISE_RAD.get(cell[1][1:], RAISE_RAD["other"])
            if success > 1 and held > RAISE_HELD:
                env.level[c] = min(1.0, env.level[c] + self.rise)
            elif success < LOWER:
                env.level[c] = max(self.lowest, env.level[c] - self.rise)
            yield cell, float(turned), float(held), float(env.level[c])


def roll_out(oracle, env, task, curriculum, obs):
    """HORIZON control steps of every environment. Returns a dict of (HORIZON, n, ...) tensors and
    the observation after them."""
    steps = []
    for _ in range(HORIZON):
        oracle.norm.update(obs)
        x = oracle.norm(obs)
        mean, value = oracle.actor(x), oracle.critic(x)[:, 0]
        action = mean + oracle.log_std.exp() * torch.randn_like(mean)
        env.step(sim.next_target(env.target, action.numpy()))
        reward = torch.from_numpy(task.advance()).float()
        ended = env.fallen | (env.steps >= EPISODE)
        curriculum.count(ended)
        after = torch.zeros(env.n)
        if ended.any():
            # a time limit is no failure: the value of what would have come next goes on
            held = ended & ~env.fallen
            after = torch.where(torch.from_numpy(held), oracle.value(task.observe()), after)
            go_on = held & (env.rng.random(env.n) < GO_ON * env.level[env.cell])
            anew, on = np.flatnonzero(ended & ~go_on), np.flatnonzero(go_on)
            env.reset(anew)
            task.start(anew)
            task.redirect(on)
        steps.append({
            "obs": x, "action": action, "log_prob": oracle.log_prob(mean, action), "value": value,
            "reward": reward, "ended": torch.from_numpy(ended), "after": after})
        obs = task.observe()
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]}, obs


def advantages(oracle, batch, obs):
    """Generalised advantage estimation; returns are in units of their running standard deviation.
    Adds "advantage" and "return" (HORIZON, n) to the batch."""
    scale = oracle.returns.var.sqrt()
    reward, value, ended = batch["reward"] / scale, batch["value"], batch["ended"]
    following = torch.cat([value[1:], oracle.value(obs)[None]])
    following = torch.where(ended, batch["after"], following)
    advantage, running = torch.zeros_like(reward), torch.zeros(reward.shape[1])
    for t in reversed(range(HORIZON)):
        error = reward[t] + GAMMA * following[t] - value[t]
        running = error + GAMMA * LAMBDA * ~ended[t] * running
        advantage[t] = running
    batch["advantage"], batch["return"] = advantage, advantage + value
    oracle.returns.update((batch["return"] * scale).flatten())


def update(oracle, optimizer, batch, kl_target):
    """PPO's clipped update. Returns the KL divergence that it made and the share of ratios that
    were clipped; the learning rate follows the first (where the actor has its own, that one)."""
    flat = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
    divergences, clipped = [], []
    for _ in range(EPOCHS):
        for index in torch.randperm(len(flat["obs"])).chunk(MINIBATCHES):
            part = {name: tensor[index] for name, tensor in flat.items()}
            mean = oracle.actor(part["obs"])
            log_ratio = oracle.log_prob(mean, part["action"]) - part["log_prob"]
            ratio = log_ratio.exp()
            gain = part["advantage"]
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            surrogate = torch.min(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
            beyond = ((mean.abs() - MEAN_BOUND).clamp(min=0) ** 2).sum(1).mean()
            miss = (oracle.critic(part["obs"])[:, 0] - part["return"]).pow(2).mean()
            optimizer.zero_grad()
            (-surrogate + MEAN_COST * beyond + miss).backward()
            average(*(weights.grad for weights in oracle.parameters()))
            actor = [*oracle.actor.parameters(), oracle.log_std]
            nn.utils.clip_grad_norm_(actor, CLIP_GRADIENT)
            nn.utils.clip_grad_norm_(oracle.critic.parameters(), CLIP_GRADIENT)
            optimizer.step()
            divergences.append((ratio - 1 - log_ratio).mean().item())
            clipped.append(((ratio - 1).abs() > CLIP).float().mean().item())
    kl = float(np.mean(gather(np.mean(divergences[-MINIBATCHES:]))))
    group = optimizer.param_groups[0]
    if kl > 2 * kl_target:
        group["lr"] = max(group["lr"] / 1.5, SLOWEST)
    elif kl < kl_target / 2:
        group["lr"] = min(group["lr"] * 1.5, FASTEST)
    return kl, float(np.mean(clipped))


class Training:
    """One specialist in training by PPO, and everything that its checkpoint holds."""

    lowest, kl_target = 0.0, KL_TARGET

    def __init__(self, family, args, path, start=None):
        self.family, self.path, self.seed = family, path, args.seed
        torch.manual_seed(args.seed)
        cores = os.cpu_count() // LOCAL_RANKS
        self.env = sim.Rotation(
            args.envs // RANKS, sim.objects_of(family), args.wrist, args.axis,
            args.seed + 1000 * RANK, randomize=args.randomize, threads=max(cores, 1))
        geoms = sum(model.ngeom for model in self.env.models)            # of this hand as it is
        self.made = [self.env.cells, self.env.n, args.seed, sorted(args.randomize), geoms]
        self.task = self._task()
        self.curriculum = Curriculum(self.env, self.task, self.lowest)
        self._begin()                                    # at the lowest level
        self.obs = self.task.observe()
        self.oracle = self._network()
        self.optimizer = torch.optim.Adam(
            self._parameters(), lr=LEARNING_RATE, eps=1e-5, fused=True)
        if RANK:                                         # same weights, other noise
            torch.manual_seed(args.seed + 1000 * RANK)
        self.curve, self.steps, self.seconds = [], 0, 0.0
        if path.exists():
            self._resume(load_checkpoint(path, "oracle"))
        elif start:
            self._start(start)

    def _task(self):
        return Task(self.env)

    def _network(self):
        return Oracle(self.obs.shape[1])

    def _parameters(self):
        return self.oracle.parameters()

    def _begin(self):
        everyone = np.arange(self.env.n)
        self.env.reset(everyone)
        self.task.start(everyone)
        # spread the first time limits over the episode, or all of them end at once
        self.env.steps[:] = self.env.rng.integers(0, EPISODE // 2, self.env.n)
        self.curriculum.born[:] = self.env.steps

    def _start(self, path):
        """The weights of another run, and its levels of the cells that are trained here too."""
        saved = load_checkpoint(path, "oracle")
        try:
            self.oracle.load_state_dict(saved["weights"])
        except (KeyError, RuntimeError):
            raise H.Problem(f"{path} was trained with another observation")
        reached = {tuple(cell): level for *cell, level in saved.get("levels", ())}
        if reached.keys() & set(self.env.cells):
            self.env.level[:] = [reached.get(cell, 0.0) for cell in self.env.cells]
            self.task.holds |= self.env.level > 0
            self.optimizer.param_groups[0]["lr"] = GOING_ON
            self._begin()
            self.obs = self.task.observe()

    def iterate(self):
        """One batch: act, judge, learn. Returns the numbers that experts look at."""
        began = time.monotonic()
        with torch.no_grad():
            batch, self.obs = roll_out(
                self.oracle, self.env, self.task, self.curriculum, self.obs)
            advantages(self.oracle, batch, self.obs)
        explained = 1 - (batch["return"] - batch["value"]).var() / batch["return"].var()
        kl, clipped = update(self.oracle, self.optimizer, batch, self.kl_target)
        self.steps += RANKS * self.env.n * HORIZON
        self.seconds += float(np.mean(gather(time.monotonic() - began)))     # they stop together
        for cell, turned, held, level in self.curriculum.raise_levels():
            self.curve.append(Row(cell, self.steps, self.seconds, turned, held, level))
        return f"ev {explained:.2f} kl {kl:.3f} clip {clipped:.2f}"

    def status(self):
        """One line: rotation, holding and level per group of cells, noise, learning rate."""
        groups = {}
        for row in {row.cell: row for row in self.curve}.values():
            groups.setdefault(group(row.cell, self.env.cells), []).append(row)
        cells = "  ".join(
            f"{name}: {turned:.1f} rad {20 * held:.0f} s at {level:.2f}"
            for name, rows in groups.items()
            for turned, held, level in [np.mean([row[3:6] for row in rows], 0)])
        std, rate = self.oracle.log_std.exp().mean(), self.optimizer.param_groups[0]["lr"]
        return f"{cells}  std {std:.2f} lr {rate:.0e} blown up {self.env.blowups}"

    def save(self):
        task, curriculum = self.task, self.curriculum
        save_checkpoint(
            self.path, "oracle", family=self.family, seed=self.seed, steps=self.steps,
            seconds=self.seconds, weights=self.oracle.state_dict(),
            optimizer=self.optimizer.state_dict(),
            curve=[list(row) for row in self.curve], made=self.made,
            levels=[[*cell, level] for cell, level in zip(self.env.cells, self.env.level.tolist())],
            env=self.env.snapshot(), torch_rng=torch.get_rng_state(),
            task={name: torch.as_tensor(getattr(task, name)) for name in ("goal", "holds")},
            turned=torch.as_tensor(curriculum.turned), born=torch.as_tensor(curriculum.born),
            recent=curriculum.recent)

    def _resume(self, saved):
        try:
            self.oracle.load_state_dict(saved["weights"])
            if saved["made"] != self.made:
                raise KeyError
            self.optimizer.load_state_dict(saved["optimizer"])
            self.curriculum.recent = saved["recent"]
            if RANK:             # not the first process's hands, but at its levels, with new noise
                self.env.level[:] = saved["env"]["arrays"]["level"].numpy()
                self.task.holds[:] = saved["task"]["holds"].numpy()
                torch.manual_seed(self.seed + 1000 * RANK + saved["steps"])
                self.env.rng = np.random.default_rng([self.seed, RANK, saved["steps"]])
                self._begin()
            else:
                self.env.restore(saved["env"])
                for name, value in saved["task"].items():
                    setattr(self.task, name, value.numpy())
                self.curriculum.turned = saved["turned"].numpy()
                self.curriculum.born = saved["born"].numpy()
                torch.set_rng_state(saved["torch_rng"])
            self.steps, self.seconds = saved["steps"], saved["seconds"]
            self.curve = [Row(*row) for row in saved["curve"]]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise H.Problem(f"{self.path} was trained for something else; choose another --out")
        self.obs = self.task.observe()


def train(training, title, steps, minutes):
    """Train for so many control steps in all, or minutes; saved on the way and at the end."""
    bar = sim.Progress(title, steps, " steps")
    saved = time.monotonic()

    def going():
        return training.steps < steps and training.seconds < 60 * minutes

    while going():
        losses = training.iterate()
        if RANK:
            continue
        bar(min(training.steps, steps), f"{training.status()}  {losses}", last=not going())
        if time.monotonic() - saved > 60:
            saved = time.monotonic()
            training.save()
    if not RANK:
        training.save()


def train_oracle(family, args, path, start=None):
    """Train a specialist; goes on from `path` if that is there, else begins with the weights in
    `start`, if any. Returns the oracle, its curve and the seconds of training."""
    training, steps = Training(family, args, path, start), args.steps[args.family.index(family)]
    train(training, f"oracle {family}", steps, SHARES[0] * args.minutes / len(args.family))
    gather(None)                                         # nobody reads it before it is there
    return training.oracle, training.curve, training.seconds


# -------------------------------------------------------------------------------- the generalist
def purpose(args):
    return dict(
        families=[name for family in args.family for name in family.split("+")],
        wrists=args.wrist, axes=args.axis, seed=args.seed, steps=args.steps,
        randomize=sorted(args.randomize))


def for_the_same(path, args):
    """The policy in `path`. Raises `Problem` unless it can be gone on with for `args`."""
    _, saved = load_policy(path)
    same = all(saved.get(name) == value for name, value in purpose(args).items())
    if not same or (saved["rounds"] < args.rounds and "optimizer" not in saved):
        raise H.Problem(f"{path} is finished, or was trained for something else; choose another "
                        "--out or delete it")
    return saved


class Cloning:
    """One generalist from the oracles, on deployable observations, in rounds of one episode in
    every environment.

    The first rounds are the paper's behaviour cloning: the oracle drives with a little noise, the
    label is what it would do without, and only episodes that lasted all 400 steps are kept, unless
    none did. In the later rounds the student drives and the oracle says what it would have done
    (DAgger): the paper found that unstable, here it holds longer and turns further
    (results/README.md)."""

    def __init__(self, oracles, args, path):
        self.oracles, self.args, self.path = oracles, args, path
        torch.manual_seed(args.seed)
        begun = args.start and args.start / "policy.pt"      # there if --start is a folder with one
        self.student = load_policy(begun)[0] if begun and begun.exists() else Generalist()
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=CLONING_RATE, fused=True)
        self.rounds, self.seconds, self.data = 0, 0.0, []
        self.teachers = [fingerprint(oracle) for _, oracle in oracles]
        if path.exists():
            self._resume(for_the_same(path, args))

    def _file(self, number):
        return self.path.with_name(f"cloning-{number:02d}.npz")

    def _resume(self, saved):
        if saved.get("teachers") != self.teachers:
            print("the oracles have learned more since: the generalist begins anew")
            return
        self.student.load_state_dict(saved["weights"])
        self.rounds, self.seconds = saved["rounds"], saved["seconds"]
        if self.rounds < self.args.rounds:
            self.optimizer.load_state_dict(saved["optimizer"])
            for number in range(self.rounds):
                data = sim.load_npz(self._file(number), "obs", "label")
                self.data.append([torch.from_numpy(data[name]) for name in ("obs", "label")])

    def iterate(self):
        """One round: collect, learn, save. Returns the numbers for the progress line."""
        began, number = time.monotonic(), self.rounds
        torch.manual_seed(1000 * (number + 1) + self.args.seed)
        family, oracle = self.oracles[number % len(self.oracles)]
        cloning = number < CLONING * len(self.oracles)
        env = sim.Rotation(
            round(CLONING_ENVS * self.args.envs), sim.objects_of(family), self.args.wrist,
            self.args.axis, seed=1000 * (number + 1) + self.args.seed,
            randomize=self.args.randomize)
        obs, label, result = self._collect(env, oracle, cloning)
        if self.student.norm.count < 1:                      # it has seen nothing yet
            self.student.norm.update(obs.float())
        self.data.append([obs, label])
        sim.save_npz(self._file(number), obs=obs.numpy(), label=label.numpy())
        loss = self._learn()
        self.rounds += 1
        self.seconds += time.monotonic() - began
        self._save(optimizer=self.optimizer.state_dict())
        return (f"driven by the {'oracle' if cloning else 'student'}: "
                f"{result['RotR'].mean() / sim.CONTROL_HZ:.1f} rad {result['TTF'].mean():.1f} s, "
                f"loss {loss:.4f}")

    @torch.no_grad()
    def _collect(self, env, oracle, cloning):
        """A share KEPT of what was seen in one episode of every environment and what the oracle
        would have done: (rows, OBSERVED) and (rows, N) float16; and the episodes' metrics."""
        task, seen, labels, lasted = Task(env), [], [], np.ones(env.n, bool)

        def drive(env):
            task.start(np.flatnonzero(env.steps == 0))
            seen.append(env.observe().half())
            mean = oracle.act(task.observe()).clamp(-1, 1)
            labels.append(mean.half())
            noise = 0.5 * oracle.log_std.exp() * torch.randn_like(mean)
            delta = mean + noise if cloning else self.student(seen[-1].float())
            return sim.next_target(env.target, delta.numpy())

        def watch(env):
            task.advance()
            lasted[env.fallen] = False
            if not cloning:
                env.redirect(np.flatnonzero(env.rng.random(env.n) < REDIRECT))

        result = sim.run_episodes(env, drive, watch)
        rows = torch.rand(len(seen), env.n) < KEPT
        if cloning and lasted.any():
            rows &= torch.from_numpy(lasted)
        return torch.stack(seen)[rows], torch.stack(labels)[rows], result

    def _learn(self):
        left = 1 - self.rounds / self.args.rounds
        for group in self.optimizer.param_groups:
            group["lr"] = CLONING_RATE * max(left, 0.05)
        for _ in range(GRADIENT_STEPS):
            obs, label = self.data[torch.randint(len(self.data), (1,)).item()]
            index = torch.randint(len(obs), (CLONING_BATCH,))
            loss = (self.student(obs[index].float()) - label[index].float()).pow(2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), CLIP_GRADIENT)
            self.optimizer.step()
        return loss.item()

    def finish(self):
        """Leave a policy without what only training needs, as it is shipped."""
        for number in range(self.rounds):
            self._file(number).unlink(missing_ok=True)
        self._save()

    def _save(self, **more):
        save_checkpoint(
            self.path, "policy", config=self.student.config, weights=self.student.state_dict(),
            rounds=self.rounds, seconds=self.seconds, teachers=self.teachers, **purpose(self.args),
            **more)


def clone(oracles, args, path):
    """One generalist from `oracles`, a list of (family, oracle); goes on from `path`. Returns the
    `Cloning`."""
    cloning = Cloning(oracles, args, path)
    bar = sim.Progress("generalist", args.rounds, " rounds")

    def going():
        return cloning.rounds < args.rounds and cloning.seconds < 60 * SHARES[1] * args.minutes

    if not cloning.rounds:
        path.with_name("fine-tuned.pt").unlink(missing_ok=True)     # it was of another one
    while going():
        text = cloning.iterate()
        bar(cloning.rounds, text, last=not going())
    if cloning.rounds >= args.rounds:
        cloning.finish()
    return cloning


class FineTuned(Oracle):
    """The generalist as the actor, beside the critic of an oracle. Its observation has two parts:
    the privileged one, for the critic, and the deployable one, for the actor."""

    def __init__(self, generalist, oracle):
        privileged = len(oracle.norm.mean)
        super().__init__(privileged)
        self.norm = FirstPart(privileged)
        self.load_state_dict(oracle.state_dict())
        self.actor = nn.Sequential(Columns(privileged, None), generalist)
        self.critic = nn.Sequential(Columns(0, privileged), self.critic)
        self.log_std.data.fill_(np.log(TUNING_STD))


class FirstPart(Normalizer):
    """Leaves the columns beyond its own as they are."""

    def update(self, x):
        super().update(x[:, :len(self.mean)])

    def forward(self, x):
        own = len(self.mean)
        return torch.cat([super().forward(x[:, :own]), x[:, own:]], 1)


class Columns(nn.Module):
    def __init__(self, first, end):
        super().__init__()
        self.columns = slice(first, end)

    def forward(self, x):
        return x[:, self.columns]


class FineTuningTask(Task):
    def observe(self):
        """Privileged and deployable observation, float32 tensor (n, 217 + OBSERVED)."""
        return torch.cat([super().observe(), self.env.observe()], 1)


class FineTuning(Training):
    """The generalist `student` in training by PPO at level 1: its oracles knew friction, mass and
    motors, and to do the same without knowing is not the best that can be done without
    (results/README.md). It begins with the critic of `oracle`."""

    lowest, kl_target = 1.0, TUNING_KL

    def __init__(self, student, oracle, args, path):
        self.student, self.critic_of = student, oracle
        super().__init__("+".join(args.family), args, path)

    def _task(self):
        return FineTuningTask(self.env)

    def _network(self):
        return FineTuned(self.student, self.critic_of)

    def _parameters(self):
        net = self.oracle
        return [{"params": [*net.actor.parameters(), net.log_std], "lr": TUNING_RATE},
                {"params": net.critic.parameters()}]

    def save(self):
        super().save()
        path = self.path.with_name("policy.pt")
        policy = load_checkpoint(path, "policy")
        policy |= {"weights": self.student.state_dict(), "fine_tuned": self.steps}
        save_checkpoint(path, **policy)


def fine_tune(student, oracle, args):
    """Fine-tune `student`, the policy in OUT/policy.pt; returns the seconds of training."""
    training = FineTuning(student, oracle, args, args.out / "fine-tuned.pt")
    train(training, "fine-tuning", args.fine_tune, SHARES[2] * args.minutes)
    return training.seconds


# ------------------------------------------------------------------------------------- results
def draw_curve(path, curve):
    """Rotation, holding and level over the steps of training, per group of cells."""
    figure, axes = sim.subplots(1, 3, figsize=(13, 4))
    columns = (("turned", 1, "radians per 20 s"), ("held", 20, "time to fall, s"),
               ("level", 1, "level of the curriculum"))
    cells = list(dict.fromkeys(row.cell for row in curve))
    for name in dict.fromkeys(group(cell, cells) for cell in cells):
        rows = [row for row in curve if group(row.cell, cells) == name]
        window = len({row.cell for row in rows})         # rows of its cells come about in turn
        million = [row.steps / 1e6 for row in rows[window - 1:]]
        for axis, (field, scale, title) in zip(axes, columns):
            values = [scale * getattr(row, field) for row in rows]
            axis.plot(million, np.convolve(values, np.ones(window) / window, "valid"), label=name,
                      lw=1)
            axis.set_xlabel("million control steps")
            axis.set_title(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  fontsize=8)
    sim.save_figure(figure, path)


def evaluate(policy, args, episodes=256):
    """The policy at full gravity with the paper's randomisation, per wrist: printed, and one
    episode as a film. Returns {wrist: {metric: [mean, standard deviation over episodes]}}."""
    results = {}
    for wrist in args.wrist:
        env = sim.Rotation(episodes, sim.objects_of("+".join(args.family)), [wrist], args.axis,
                           seed=args.seed + 77)
        frames = []
        r = sim.run_episodes(
            env, lambda env: act(policy, env),
            lambda env: frames.append(env.state[:, sim.QPOS].copy()))
        results[wrist] = {name: [float(v.mean()), float(v.std(ddof=1))] for name, v in r.items()}
        results[wrist] |= {"episodes": episodes, "blowups": env.blowups}
        turned = r["RotR"] / sim.CONTROL_HZ
        error = 1.96 * turned.std(ddof=1) / episodes ** 0.5
        print(f"{wrist}: {turned.mean():.2f} rad (95 % +-{error:.2f}, spread "
              f"{turned.std(ddof=1):.1f}), TTF {r['TTF'].mean():.1f} s, "
              f"{100 * (r['TTF'] >= 20).mean():.0f} % last 20 s, RotP {r['RotP'].mean():.2f} "
              f"rad/s, {episodes} episodes, {env.blowups} blow-ups")
        best = int(np.argmax(np.where(r["TTF"] >= 20, r["RotR"], -np.inf)))
        sim.film(env.models[best], [frame[best] for frame in frames],
                 args.out / f"policy-{wrist}.gif", env.wrist[best])
    return results


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--everything", action="store_true", help="all families, wrists and axes, unless given")
    add("--family", nargs="+", help="an oracle for each; 'cuboid+cylinder' is one oracle for both")
    add("--wrist", nargs="+", type=sim.wrist_name, help=f"{', '.join(sim.WRISTS)}, or any")
    add("--axis", nargs="+", type=sim.axis_name, help="+z or z+ and so on, 'x y z', or any")
    add("--steps", type=float, nargs="+",
        help="control steps of the oracles, a number for each or one for all")
    add("--start", type=Path,
        help="the first begins with this oracle's weights; a folder: each, and the policy, with "
             "its own there")
    add("--rounds", type=int,
        help="of cloning (default: {} for each oracle; --everything: {})".format(*ROUNDS))
    add("--fine-tune", type=float,
        help="control steps for the generalist after cloning (default: {:,.0f}; --everything: "
             "{:,.0f})".format(*TUNING))
    add("--minutes", type=float, default=np.inf, help="stop earlier, after so long in all")
    add("--envs", type=int, default=ENVS, help="hands that learn together")
    add("--randomize", nargs="*", default=sim.EVERYTHING, choices=sim.EVERYTHING,
        help="what differs from episode to episode (default: all)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/policy"))
    args = parser.parse_args()
    lesson = ["cylinder", "cuboid"], ["palm_up", "palm_down"], ["+z", "-z"]
    everything = ([*lesson[0], "long", "small", "angular", "round"],
                  [*sim.WRISTS, sim.ANY], [*sim.AXES, sim.ANY])
    args.steps = args.steps or (
        [20e6] if args.everything else [7.5e6] if args.family else [4.5e6, 6.5e6])
    for name, *usual in zip(("family", "wrist", "axis"), lesson, everything):
        setattr(args, name, getattr(args, name) or usual[args.everything])
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    args.steps *= len(args.family) if len(args.steps) == 1 else 1
    if args.rounds is None:
        args.rounds = ROUNDS[args.everything] * len(args.family)
    if args.fine_tune is None:
        args.fine_tune = TUNING[args.everything]
    if len(args.steps) != len(args.family):
        raise H.Problem(f"--steps: one number, or one for each of {', '.join(args.family)}")
    for family in args.family:                           # raises on an unknown one
        if any(obj.family == "held_out" for obj in sim.objects_of(family)):
            raise H.Problem(f"{family}: what is held out is for measuring, not for training")
    if not all(number > 0 for number in (*args.steps, args.minutes)):
        raise H.Problem("--steps and --minutes must be positive")
    if args.seed < 0 or not args.fine_tune >= 0:
        raise H.Problem("--seed and --fine-tune must not be negative")
    if args.rounds < len(args.family) or args.envs < 4 * RANKS:
        raise H.Problem("--rounds must be at least one for each family, and --envs at least 4 for "
                        "each process")
    return args


def main():
    global RANKS, LOCAL_RANKS
    args = arguments()
    if (args.out / "policy.pt").exists():                # not after hours
        for_the_same(args.out / "policy.pt", args)
    if RANKS > 1:
        torch.distributed.init_process_group("gloo")
    curve, oracles, seconds, start = [], [], 0.0, args.start
    for family in args.family:
        path = args.out / f"oracle-{family.replace('+', '-')}.pt"
        if args.start and args.start.is_dir():
            own = args.start / path.name
            if own.exists() or start == args.start:
                start = own
        oracle, rows, spent = train_oracle(family, args, path, start)
        start = path
        oracles.append((family, oracle))
        curve, seconds = curve + rows, seconds + spent
        if not RANK:
            draw_curve(args.out / "curve.png", curve)
    if RANKS > 1:
        torch.distributed.destroy_process_group()
    if RANK:
        return
    RANKS = LOCAL_RANKS = 1                              # the rest is for one, on all cores
    cloning = clone(oracles, args, args.out / "policy.pt")
    seconds += cloning.seconds
    if args.fine_tune and cloning.rounds >= args.rounds:
        seconds += fine_tune(cloning.student, oracles[-1][1], args)
    print(f"trained for {seconds / 60:.0f} minutes")
    results = evaluate(cloning.student, args)
    H.save_json(args.out / "results.json", results)


if __name__ == "__main__":
    H.run(main)
