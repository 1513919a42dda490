r"""Stage 4: the policy, with or without the residual, on the hand at 20 Hz.

    python deploy.py --port sim:1 --wrist palm_down --episodes 3 --gif hand.gif
    python deploy.py --port sim:1 --base --object duck --wrist palm_up --gif duck.gif
    python deploy.py --port sim:1 --compare --json results/sim1.json   # ceiling, base, residual
    python deploy.py --port sim:1 --base --record data/sim1-task --seed 1      # for fit_ndm.py
    python deploy.py --benchmark --json results/benchmark.json         # the paper's table
    python deploy.py --port /dev/ttyUSB0 --wrist palm_up --axis +z     # a real hand
    python deploy.py --live             # see it, steer it, in a window or as text; any hand
    printf 'wait 5\naxis 0 0 -1\nwait 5\n' | python deploy.py --live --gif live.gif

Keys of --live, in the terminal; standard input that is no terminal is read as words instead, one
line each (`wait 2.5` puts off the next, `wrist 0 1 0 0` is a quaternion w x y z of the hand):
    x X y Y z Z   axis 1 0 0 ...     turn the object about this axis of the hand; Z is -z
    i k j l       tilt 0 15 0 ...    tilt the axis about y or x, degrees
    arrows        turn 0 15 0 ...    turn the wrist about the hand's y or x, degrees
    space g       hold, go           hold still, go on
    r R           residual off, on   without the correction, with it
    o s q         object, reset, quit    take another object, start over, let go (so does the end)

reads   checkpoints/policy.pt, checkpoints/residual.pt (--base runs without it)
writes  with --gif a film of the first episode (of several wrists NAME-WRIST.gif; of --live the
        first minute), with --json the numbers, with --record one .npz for each episode in which the
        object stayed for 20 s: trials of another --seed than those that are to be measured

A virtual hand is also measured: RotR = sum over steps of omega . k (RotR / 20 = radians turned),
TTF = seconds until the object fell, RotP = mean of |omega x k|. --compare gives the same trials
(object, mass, friction, grasp, axis, pushes) to the training simulator, which is the ceiling, to
the hand, and to the hand with the residual; so what counts are differences within trials:
recovered = (residual - base) / (ceiling - base) in RotR.

--benchmark is the paper's table: the policy in the training simulator, every wrist and axis, on the
families that it was trained on and on shapes that it has never seen; RotR, TTF (there a share of
the 20 s), RotP; and how often it brings an object to a goal orientation (GO). It draws wrist x axis
beside the --json file.
"""
import argparse
import atexit
import functools
import itertools
import os
import queue
import re
import sys
import threading
import time
from pathlib import Path

import sim                       # before torch: it sets how torch's threads wait
import numpy as np
import torch

import hand as H
from collect import processes, there
from fit_ndm import SHARE, load_residual
from train_policy import act, digest, load_policy

HZ = H.CONTROL_HZ
METRICS = "RotR", "TTF", "RotP"
KINDS = "ceiling", "base", "residual"


class Controller:
    """From joint positions to joint targets: a_t = a_{t-1} + alpha delta_t; sent is
    a_t + SHARE pi_res(o_t, a_t - a_{t-1}).

    The policy sees its own targets a, not the corrected ones: what the residual adds is the hand's
    business, as if the hand were the one of the simulator."""

    def __init__(self, policy, residual, wrist, axis, target):
        self.policy, self.residual, self.holding = policy, residual, False
        self.wrist, self.axis = sim.wrist_of(wrist)[None], sim.axis_of(axis)[None]
        self.base, self.history = np.array([target], float), None       # (1, N) rad
        self.sent = self.base[0]

    @torch.no_grad()
    def __call__(self, q):
        """Joint positions q (N,) rad as read -> joint target (N,) rad to send."""
        q = np.asarray(q, float)[None]
        if self.history is None:
            self.history = sim.begin_history(q, self.base)
        else:
            self.history = sim.push_history(self.history, q, self.base)
        if self.holding:
            return self.sent
        obs = sim.observation(self.history, self.wrist, self.axis)
        before, self.base = self.base, sim.next_target(self.base, self.policy(obs).numpy())
        self.sent = self.base[0]
        if self.residual is not None:
            move = torch.as_tensor(self.base - before, dtype=torch.float32)
            self.sent = self.sent + SHARE * self.residual(obs, move).numpy()[0]
        return self.sent


def recorded(args):
    """Numbers of the episodes in the folder of --record. Raises `Problem` if it holds episodes of
    something else than `args.facts`, which this sets: what all in a folder have in common."""
    source = "base" if args.base else f"base + residual {digest(args.residual)}"
    args.facts = dict(
        hand=H.HAND, source=source, seed=args.seed, port=args.port, policy=digest(args.policy),
        wrists=" ".join(args.wrist), axes=" ".join(args.axis), objects=args.object)
    return there(args.record, args.facts)[0] if args.record else set()


def save_episode(args, data, wrist, load, index):
    """With --record, an episode as a trajectory like those of collect.py."""
    if args.record:
        sim.save_npz(args.record / f"{index:05d}.npz", **data, **args.facts, wrist=wrist,
                     load=load, index=index, sequence=index, sigma=0.0)


# ---------------------------------------------------------------------- measured, on virtual hands
@functools.cache
def networks(policy, residual):
    """A worker process keeps what it has read."""
    return load_policy(policy)[0], load_residual(residual)[0] if residual else None


def begin(port, trial, policy, residual):
    """The virtual hand at `port` with a trial in its fingers, its controller and its `Referee`."""
    hand = sim.open_hand(port, wrist=trial.wrist, load=trial.obj)
    hand.begin(trial)
    controller = Controller(policy, residual, trial.wrist, trial.axis, trial.grasp[H.N + 7:])
    place = hand.object_qpos()[None]
    return hand, controller, sim.Referee(controller.axis, place[:, :3], place[:, 3:])


def still_held(hand, referee):
    """One control step later: whether the virtual hand has its object, by its `Referee`."""
    place = hand.object_qpos()[None]
    return referee(place[:, :3], place[:, 3:])[0]


def measured_episode(job):
    """One trial on a virtual hand, in a worker process: its `Referee`'s dict of (1,) arrays."""
    args, trial, residual, index, picture = job
    hand, controller, referee = begin(args.port, trial, *networks(args.policy, residual))
    pushes, film = iter(trial.pushes), []

    def pushed(q):
        hand.push(next(pushes))
        return controller(q)

    def watch(hand):
        if picture:
            film.append(hand.qpos())
        return not still_held(hand, referee)

    data = H.drive(hand, pushed, sim.EPISODE, watch)
    if referee.held[0] == sim.EPISODE:
        save_episode(args, data, trial.wrist, trial.obj.name, index)
    if picture:
        sim.film(hand.model(), film, picture, sim.wrist_of(trial.wrist))
    return referee.result()


def on_the_hand(pool, args, wrist, trials, residual):
    """The trials of one wrist on the virtual hand, on all cores: dict of (n,) arrays."""
    film = args.gif if residual or args.base else None
    if film and len(args.wrist) > 1:
        film = film.with_stem(f"{film.stem}-{wrist}")
    first = 10000 * args.wrist.index(wrist)
    jobs = [(args, trial, residual, first + i, film if i == 0 else None)
            for i, trial in enumerate(trials)]
    label = "residual" if residual else "base"
    bar, rows = sim.Progress(f"{args.port} {wrist} {label}", len(trials)), []
    for result in pool.map(measured_episode, jobs):
        rows.append(result)
        turned, held = (np.mean([row[name] for row in rows]) for name in ("RotR", "TTF"))
        bar(len(rows), f"{turned / HZ:.2f} rad, {held:.1f} s")
    return {name: np.concatenate([row[name] for row in rows]) for name in METRICS}


def on_a_virtual_hand(args, policy):
    """Prints what was measured, and writes it with --json. Trials with the same number are the
    same task at every wrist: their mean over wrists is one number."""
    recorded(args)                                       # raises before anything is measured
    objects, parts = sim.objects_of(args.object), {}
    with processes(args.workers) as pool:
        for wrist in args.wrist:
            trials = sim.trials(objects, wrist, args.axis, args.episodes, args.seed)
            part = parts[wrist] = {}
            if args.compare:
                env = sim.Rotation(args.episodes, objects, [wrist], args.axis, seed=args.seed)
                part["ceiling"] = sim.run_episodes(
                    env, functools.partial(act, policy), title=f"ceiling {wrist}", trials=trials)
            if args.compare or args.base:
                part["base"] = on_the_hand(pool, args, wrist, trials, None)
            if not args.base:
                part["residual"] = on_the_hand(pool, args, wrist, trials, args.residual)
    mean = {kind: {m: np.mean([part[kind][m] for part in parts.values()], 0) for m in METRICS}
            for kind in part}
    wrists = {wrist: summary(part) for wrist, part in parts.items()}
    report = {"port": args.port, "policy": args.facts["policy"], "episodes": args.episodes,
              "seed": args.seed, "axes": args.axis, "objects": [obj.name for obj in objects],
              "wrists": wrists, **summary(mean)}
    print(f"\n{args.port}, {args.episodes} episodes a wrist, +- standard error; gain: residual - "
          f"base on the same trials\n{'':20}  turned, rad           TTF, s      RotP, rad/s")
    for wrist, numbers in wrists.items():
        print_summary(wrist, numbers)
    if len(wrists) > 1:
        print_summary("mean", report)
    if args.json:
        H.save_json(args.json, report)


def spread(x):
    """Mean, standard deviation and standard error of the mean of episodes x (n,)."""
    std = x.std(ddof=1) if len(x) > 1 else 0.0
    return {"mean": float(x.mean()), "std": float(std), "sem": float(std / len(x) ** 0.5)}


def recovered(part, draws=2000):
    """The share of what is lost in RotR that the residual recovers, and its 95 % interval by
    bootstrap over trials, each with its three results. None where nothing is lost, or where too
    many draws say so for an interval."""
    lost, won = (part[kind]["RotR"] - part["base"]["RotR"] for kind in ("ceiling", "residual"))
    if lost.mean() <= 0:
        return None, None
    share, n = float(won.mean() / lost.mean()), len(lost)
    drawn = np.random.default_rng(0).integers(n, size=(draws, n))
    lost, won = lost[drawn].mean(1), won[drawn].mean(1)
    some = lost > 0
    if n == 1 or some.mean() <= 0.975:
        return share, None
    return share, np.percentile(won[some] / lost[some], (2.5, 97.5)).tolist()


def summary(part):
    """The numbers of one wrist, or of the mean over wrists, from the metrics of its episodes."""
    numbers = {kind: {m: spread(metrics[m]) for m in METRICS} for kind, metrics in part.items()}
    if len(part) == len(KINDS):
        numbers["gain"] = {m: spread(part["residual"][m] - part["base"][m]) for m in METRICS}
        numbers["recovered"], numbers["recovered_interval"] = recovered(part)
    return numbers


def print_summary(name, numbers):
    for kind in (*KINDS, "gain"):
        if kind in numbers:
            r, t, p = (numbers[kind][m] for m in METRICS)
            print(f"{name:>10} {kind:<9}{r['mean'] / HZ:7.2f} +- {r['sem'] / HZ:4.2f}"
                  f"{t['mean']:9.1f} +- {t['sem']:3.1f}{p['mean']:9.2f} +- {p['sem']:4.2f}")
    share, interval = numbers.get("recovered"), numbers.get("recovered_interval")
    if share is not None:
        known = " to ".join(f"{100 * x:.0f}" for x in interval or ()) or "not determined"
        print(f"{name:>10} recovered {100 * share:.0f} % (95 % interval: {known})")


# ------------------------------------------------------------------------------ the paper's table
PAPER = {"x": (144.22, 0.77, 0.54), "y": (224.28, 0.88, 0.58), "z": (314.28, 0.92, 0.37),
         "general": (242.33, 0.94, 0.46)}                # RotR, TTF, RotP
PAPER_GOAL = 88.27               # per cent
ARRIVED = 0.1 * np.pi            # rad from a goal


def benchmark(args, policy, content):
    """Prints the table, writes it with --json and draws it."""
    report = {"episodes": args.episodes, "seed": args.seed, "cells": {}, "families": {}}
    for name, families in (("train", content["families"]), ("held_out", ["held_out"])):
        objects = sim.objects_of("+".join(families))
        n = len(objects) * -(-args.episodes // len(objects))
        rows = []                                        # (wrist, axis, family, RotR, TTF, RotP)
        bar = sim.Progress(f"benchmark {name}", len(args.wrist) * len(args.axis))
        for wrist, axis in itertools.product(args.wrist, args.axis):
            trials = sim.trials(objects, wrist, [axis], n, args.seed)
            env = sim.Rotation(n, objects, [wrist], [axis], seed=args.seed)
            result = sim.run_episodes(env, functools.partial(act, policy), trials=trials)
            result["TTF"] = result["TTF"] * HZ / sim.EPISODE
            rows += [(wrist, axis, trial.obj.family, *numbers) for trial, *numbers in zip(
                trials, *(result[m] for m in METRICS))]
            bar(len(rows) // n, f"{wrist} {axis}: RotR {result['RotR'].mean():.0f}")
        report[name] = table(rows, lambda row: row[1][1:] if row[1] in sim.AXES else "general")
        report["cells"][name] = table(rows, lambda row: f"{row[0]} {row[1]}")
        report["families"][name] = table(rows, lambda row: row[2])
    goals = goals_reached(policy, objects, args.wrist, 8 * n, args.seed)       # held-out shapes
    report["goal"] = {"success": goals}
    print_benchmark(report)
    if args.json:
        H.save_json(args.json, report)
        draw_benchmark(report["cells"], args, args.json.with_suffix(".png"))


def table(rows, key):
    """{key of a row: {metric: mean over its rows}}."""
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row[3:])
    return {name: dict(zip(METRICS, np.mean(group, 0).tolist())) for name, group in groups.items()}


def goals_reached(policy, objects, wrists, n, seed):
    """GO: share of n episodes that end within ARRIVED of an orientation drawn at random, rotating
    about whatever axis leads there and holding still near it."""
    env = sim.Rotation(n, objects, wrists, [sim.ANY], seed=seed)
    goal = np.random.default_rng([seed, 5]).normal(size=(n, 4))
    goal /= np.linalg.norm(goal, axis=1, keepdims=True)

    def left():
        return sim.rotation_between(env.quat, goal)

    def towards(env):
        angle = np.linalg.norm(left(), axis=1, keepdims=True)
        env.axis[:] = left() / np.maximum(angle, 1e-6)
        return np.where(angle < 0.8 * ARRIVED, env.target, act(policy, env))

    held = sim.run_episodes(env, towards, title="goals")["TTF"] == sim.EPISODE / HZ
    return float((held & (np.linalg.norm(left(), axis=1) < ARRIVED)).mean())


def print_benchmark(report):
    print(f"{'':24}RotR    TTF   RotP")
    for name in ("train", "held_out"):
        groups = report[name] | report["families"][name] | report["cells"][name]
        for group, numbers in groups.items():
            r, t, p = numbers.values()
            print(f"{name:<9}{group:<14}{r:6.1f}{t:7.2f}{p:7.2f}")
    for axis, (r, t, p) in PAPER.items():
        print(f"{'paper':<9}{axis:<14}{r:6.1f}{t:7.2f}{p:7.2f}")
    print(f"goals reached: {100 * report['goal']['success']:.0f} %; paper: {PAPER_GOAL:.0f} %")


def draw_benchmark(cells, args, path):
    """Wrist x axis: RotR as colour, TTF in figures."""
    figure, axes = sim.subplots(1, 2, figsize=(11, 4))
    for axis, (name, numbers) in zip(axes, cells.items()):
        RotR, TTF = (np.array([[numbers[f"{wrist} {k}"][m] for k in args.axis]
                               for wrist in args.wrist]) for m in METRICS[:2])
        axis.imshow(RotR, vmin=0, vmax=PAPER["z"][0])
        for (i, j), r in np.ndenumerate(RotR):
            axis.text(j, i, f"{r:.0f}\n{TTF[i, j]:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if r < 200 else "black")
        axis.set_xticks(range(len(args.axis)), args.axis)
        axis.set_yticks(range(len(args.wrist)), args.wrist)
        axis.set_title(f"{name}: RotR and TTF", fontsize=10)
    sim.save_figure(figure, path)


# ---------------------------------------------------------------------------------- on a real hand
def agreed(text, otherwise="then Enter; q to stop"):
    try:
        return input(f"{text}, {otherwise}: ").strip() == ""
    except EOFError:
        return False


def on_a_real_hand(args, policy, residual):
    """Episodes one after the other. When the bus fails the hand lets go, and whoever stands by
    decides whether to begin that episode again; without a terminal the script ends."""
    wrist, axis, number, watched = args.wrist[0], args.axis[0], 0, sys.stdin.isatty()
    last = max(recorded(args), default=-1)
    with sim.open_hand(args.port) as hand:
        while number < args.episodes:
            try:
                hand.move_to(H.GRASP)
                if watched:
                    hand.rest()
                    if not agreed(f"episode {number + 1}/{args.episodes}: hold the object between "
                                  f"the fingertips, {wrist}"):
                        return
                    hand.move_to(H.GRASP)
                controller = Controller(policy, residual, wrist, axis, H.GRASP)
                data = H.drive(hand, controller, sim.EPISODE)
            except H.BusError as error:
                if not watched:
                    raise
                print(f"episode {number + 1} is lost: {error}")
                if not agreed("mend that"):
                    return
                print("looking for the hand for up to 10 minutes; Ctrl-C ends that", flush=True)
                hand.reconnect()
                continue
            try:
                hand.rest()            # nothing strains while a slow disk is waited for
            except H.BusError as error:
                print(f"the episode is whole, but {error}")
            number += 1
            lag, current = np.abs(data["target"] - data["q"]), np.abs(data["current"])
            print(f"episode {number}: {len(data['q'])} steps, lag {lag.mean():.3f} rad, "
                  f"{1000 * current.mean():.0f} mA")
            # nothing here sees an object fall
            if not args.record or not watched or agreed(
                    "did the object stay for 20 s?", "Enter; n leaves the episode out"):
                save_episode(args, data, wrist, "object", last + number)


# ------------------------------------------------------------------------------ see it, steer it
KEYS = {
    "x": "axis 1 0 0", "y": "axis 0 1 0", "z": "axis 0 0 1",
    "X": "axis -1 0 0", "Y": "axis 0 -1 0", "Z": "axis 0 0 -1",
    "i": "tilt 0 15 0", "k": "tilt 0 -15 0", "j": "tilt -15 0 0", "l": "tilt 15 0 0",
    "\x1b[A": "turn 0 15 0", "\x1b[B": "turn 0 -15 0",       # arrows: up, down
    "\x1b[D": "turn -15 0 0", "\x1b[C": "turn 15 0 0",       # left, right
    " ": "hold", "g": "go", "r": "residual off", "R": "residual on",
    "o": "object", "s": "reset", "q": "quit", "\x03": "quit",        # Ctrl-C, a key on Windows
}
LONGEST = 200                    # characters of a line
TURNING = np.pi                  # rad/s, at which the wrist follows
FAMILIAR = np.cos(np.radians(10))        # an axis or a wrist that it was so near to is known


def vector(words, n):
    """Words as a vector (n,). ValueError if they are none, or zero."""
    v = np.array(words, float)
    if v.shape != (n,) or not 1e-6 < np.abs(v).max() < 1e6:
        raise ValueError
    return v


def rotation(words):
    """Three words, an axis times degrees, as a quaternion."""
    v = np.radians(vector(words, 3))
    return sim.from_axis_angle(sim.unit(v), np.linalg.norm(v))


class Steering:
    """What whoever steers wants now; words change it.

    axis (3,) of the hand; wrist (4,), which `turned` (4,) follows as an arm turns a hand; holding;
    corrected, by the residual; wish: None, or "reset", "object" or "quit", which is to come."""

    def __init__(self, content, wrist, axis, corrected=True):
        self.axis, self.wrist = sim.axis_of(axis), sim.wrist_of(wrist)
        self.turned, self.holding, self.corrected, self.wish = self.wrist, False, corrected, None
        axes, wrists = ([name for name in content[known] if name != sim.ANY]
                        for known in ("axes", "wrists"))
        self.axes = np.array([sim.axis_of(name) for name in axes or sim.AXES])
        self.wrists = np.array([sim.wrist_of(name) for name in wrists or sim.WRISTS])
        self.any = {"axis": sim.ANY in content["axes"], "wrist": sim.ANY in content["wrists"]}
        self.downs, self.strange = sim.gravity(self.wrists), set()
        self.heard, self.steps, self.wake = queue.Queue(1000), 0, 0

    def obey(self, line):
        """Do what a line says. ValueError, and nothing has changed, if it is malformed."""
        match line.split() if len(line) <= LONGEST else ():
            case ["axis", *words]:
                self.axis = sim.unit(vector(words, 3))
            case ["tilt", *words]:
                self.axis = sim.rotate(rotation(words), self.axis)
            case ["wrist", *words]:
                self.wrist = sim.unit(vector(words, 4))
            case ["turn", *words]:
                self.wrist = sim.multiply(self.wrist, rotation(words))
            case ["hold" | "go" as word]:
                self.holding = word == "hold"
            case ["residual", "on" | "off" as word]:
                self.corrected = word == "on"
            case ["object" | "reset" | "quit" as word]:
                self.wish = word
            case ["wait", seconds] if 0 <= float(seconds) < 1e6:
                self.wake = self.steps + HZ * float(seconds)
            case _:
                raise ValueError
        near = {"axis": self.axes @ self.axis, "wrist": self.downs @ sim.gravity(self.wrist)[0]}
        strange = {name for name in near if near[name].max() < FAMILIAR and not self.any[name]}
        for name in strange - self.strange:
            sim.say(f"note: the policy was never trained on this {name}")
        self.strange = strange

    def listen(self):
        """One control step: obey what has been said, until the next `wait`, and turn the wrist."""
        self.steps += 1
        while not self.wish and self.steps >= self.wake and not self.heard.empty():
            line = self.heard.get()
            try:
                self.obey("quit" if line is None else line)      # None: whoever steered is gone
            except ValueError:
                sim.say(f"not understood: {line[:40]!r}")
        left = sim.rotation_between(self.turned, self.wrist)
        angle = max(np.linalg.norm(left), 1e-9)
        step = sim.from_axis_angle(left / angle, min(angle, TURNING / HZ))
        self.turned = sim.multiply(step, self.turned)

    def felt(self):
        """The wrist as it is told to the policy. A hand feels which way is down, not which way is
        north: of all wrists with this gravity the one nearest to one that was trained on."""
        down = sim.gravity(self.turned)[0]
        k = (self.downs @ down).argmax()
        back = np.array([1 + self.downs[k] @ down, *np.cross(down, self.downs[k])])
        opposite = np.abs(back).max() < 1e-6
        return self.turned if opposite else sim.multiply(self.wrists[k], sim.unit(back))

    def steer(self, controller, residual):
        self.listen()
        controller.axis[0], controller.wrist[0] = self.axis, self.felt()
        controller.residual = residual if self.corrected else None
        controller.holding = self.holding


def hear(heard):
    """Put standard input into the queue `heard`: the words of a terminal's keys, or lines; None at
    its end. For a thread: nothing else waits for both on every system."""
    fd, rest, keys = sys.stdin.fileno(), "", sys.stdin.isatty()
    try:
        while text := read_some(fd, keys):
            if keys:                                     # arrows come in two dialects
                said = re.findall(r"\x1b\[[0-9;]*[A-Za-z~]|.", text.replace("\x1bO", "\x1b["))
                said = [KEYS[key] for key in said if key in KEYS]
            else:
                *said, rest = (rest + text).split("\n")
                rest = rest[:LONGEST + 1]
            for line in said:
                heard.put(line)
    finally:                                             # or the terminal is gone
        if rest:
            heard.put(rest)
        heard.put(None)


def read_some(fd, keys):
    """Text as it comes, "" at the end."""
    if keys and os.name == "nt":
        from msvcrt import getwch
        key = getwch()
        return f"\x1b[{dict(zip('HPKM', 'ABDC')).get(getwch(), '~')}" if key in "\0\xe0" else key
    return os.read(fd, 4096).decode(errors="replace")


def keys_one_by_one():
    """The terminal gives every key at once and unseen, until this script ends."""
    if os.name != "nt":
        import termios
        import tty
        fd = sys.stdin.fileno()
        atexit.register(termios.tcsetattr, fd, termios.TCSANOW, termios.tcgetattr(fd))
        tty.setcbreak(fd, termios.TCSANOW)


def readings(controller, steering, referee=None):
    """What people look at, {name: text}, and the live line of it: every 5 s without a terminal."""
    down = sim.gravity(steering.turned)[0]
    near = {name: sim.gravity(wrist)[0] @ down for name, wrist in sim.WRISTS.items()}
    wrist = max(near, key=near.get)
    off = np.degrees(np.arccos(min(1.0, near[wrist])))
    behind = np.abs(controller.base - controller.history[:, -1, 0].numpy()).mean()
    rows = {"time": f"{steering.steps / HZ:.1f} s"}
    if referee:
        rows["turned"] = f"{referee.RotR[0] / HZ:.2f} rad"
        rows["held"] = f"{referee.held[0] / HZ:.1f} s"
    if steering.holding:
        rows["holds"] = "still"
    rows["axis"] = " ".join(f"{round(x, 2) + 0:.2g}" for x in steering.axis)         # no -0
    rows["wrist"] = wrist if off < 1 else f"{wrist} +{off:.0f}"
    rows["residual"] = "off" if controller.residual is None else "on"
    rows["lag"] = f"{np.degrees(behind):.1f} deg"
    line = " ".join(f"{name} {text}" for name, text in rows.items())
    if sys.stderr.isatty():
        sim.say(line, end="")
    elif steering.steps % (5 * HZ) == 0:
        sim.say(line)
    return rows


def live(args, policy, residual, content):
    """Until somebody quits: a hand that is steered, and what it does as it happens."""
    steering = Steering(content, args.wrist[0], args.axis[0], not args.base)
    if sys.stdin.isatty():
        keys_one_by_one()
        sim.say(__doc__[__doc__.index("Keys of"):__doc__.index("reads ")])
    threading.Thread(target=hear, args=(steering.heard,), daemon=True).start()
    if args.port.startswith("sim:"):
        live_on_a_virtual_hand(args, policy, residual, steering)
    else:
        live_on_a_real_hand(args, policy, residual, steering)
    sim.say("")


def live_on_a_virtual_hand(args, policy, residual, steering):
    """In real time, unless it is a film of words from a pipe."""
    objects = sim.objects_of(args.object)
    watched = sys.stdin.isatty() or not args.gif
    which, viewer, shots, images = 0, None, [], []
    for number in itertools.count():
        which, steering.wish, fallen = which + (steering.wish == "object"), None, 0
        obj = objects[which % len(objects)]
        trial, = sim.trials([obj], args.wrist[0], args.axis, 1, args.seed + number)
        hand, controller, referee = begin(args.port, trial, policy, residual)
        hand.realtime = watched
        hand.turn(steering.turned)
        if watched and (viewer or number == 0):
            viewer = sim.open_window(hand, viewer)

        def act_as_told(q):
            steering.steer(controller, residual)
            hand.turn(steering.turned)
            return controller(q)

        def watch(hand):
            nonlocal fallen
            fallen += not still_held(hand, referee)              # control steps ago
            rows = readings(controller, steering, referee)
            if args.gif and len(shots) < 60 * HZ:
                shots.append((hand.model(), hand.qpos(), steering.turned, steering.axis))
            if viewer:
                sim.show(viewer, rows, controller.base[0], controller.history[0, -1, 0],
                         (steering.axis, sim.gravity(steering.turned)[0]))
            if viewer and not viewer.is_running():
                steering.wish = "quit"
            elif fallen == HZ and not steering.wish:     # one sees it for a second
                sim.say(f"{obj.name} fell after {referee.held[0] / HZ:.1f} s")
                steering.wish = "reset"
            return steering.wish

        while not steering.wish:
            H.drive(hand, act_as_told, sim.EPISODE, watch)
        if steering.wish == "quit":
            break
    for model, part in itertools.groupby(shots, lambda shot: shot[0]):
        images += sim.frames(model, *zip(*(shot[1:] for shot in part)))
    sim.save_gif(images, args.gif)


def live_on_a_real_hand(args, policy, residual, steering):
    """It goes to the grasp and holds still until somebody gives it an object and says go. When the
    bus fails it lets go, and comes back when somebody has mended that and says go."""
    def held_back():
        """Listen: are we to hold still? A reset is what comes anyway, so only `quit` is heard."""
        steering.wish = None
        steering.listen()
        return steering.holding and steering.wish != "quit"

    def on_the_way():
        """A tick of the move to the grasp, which `hold` and `quit` stop as well."""
        type(hand).tick(hand)
        while held_back():
            hand.read()                      # it looks after the motors
            hand.command(hand.target)
            type(hand).tick(hand)
        if steering.wish == "quit":
            sys.exit()

    def wait_for_the_hand(error):
        """Until somebody has mended it and says go, or quits."""
        while error and steering.wish != "quit":
            sim.say(f"{error}\nmend that, then go (g)")
            steering.holding, error = True, None
            while held_back():
                time.sleep(1 / HZ)
            try:
                if steering.wish != "quit":
                    hand.reconnect(patience=0)
            except H.Problem as problem:
                error = problem

    def act_as_told(q):
        steering.steer(controller, residual)
        return controller(q)

    def watch(hand):
        readings(controller, steering)
        return steering.wish

    with sim.open_hand(args.port) as hand:
        while steering.wish != "quit":
            try:
                hand.tick, steering.holding, steering.wish = on_the_way, False, None
                hand.move_to(H.GRASP)
                del hand.tick
                steering.holding, steering.wish = True, None
                sim.say("an object between the fingertips, then go (g)")
                controller = Controller(policy, residual, args.wrist[0], args.axis[0], H.GRASP)
                while not steering.wish:
                    H.drive(hand, act_as_told, sim.EPISODE, watch)
            except H.BusError as error:
                wait_for_the_hand(error)


# ------------------------------------------------------------------------------------ command line
def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--port", default="auto",
        help="auto, sim, sim:SEED, sim:SEED:motor+shape or a serial device")
    add("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    add("--residual", type=Path, default=Path("checkpoints/residual.pt"))
    add("--base", action="store_true", help="run without the residual")
    add("--compare", action="store_true",
        help="ceiling, base and base + residual, on a virtual hand")
    add("--live", action="store_true", help="run in real time, steered")
    add("--benchmark", action="store_true", help="the paper's table, in the training simulator")
    add("--wrist", nargs="+", type=sim.wrist_name, help="default: palm_up palm_down")
    add("--axis", nargs="+", type=sim.axis_name, help="default: +z -z")
    add("--object", help="a family or an object by name; default: what the policy learned with")
    add("--episodes", type=int, default=40, help="per wrist (--benchmark: and axis)")
    add("--seed", type=int, default=0)
    add("--record", type=Path, help="folder for the episodes that lasted 20 s")
    add("--gif", type=Path)
    add("--json", type=Path)
    add("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.port = "sim:0" if args.benchmark else sim.resolve_port(args.port)
    wrists = sim.WRISTS if args.benchmark else ("palm_up", "palm_down")
    axes = (*sim.AXES, sim.ANY) if args.benchmark else ("+z", "-z")
    args.wrist = list(dict.fromkeys(args.wrist or wrists))
    args.axis = list(dict.fromkeys(args.axis or axes))
    virtual = args.port.startswith("sim:")
    if args.live or not virtual:                 # one after the other
        args.wrist, args.axis = args.wrist[:1], args.axis[:1]
        if sim.ANY in args.wrist + args.axis:
            raise H.Problem("any: --live and a real hand begin with a wrist and an axis that are "
                            "known, such as palm_up and z+")
    if min(args.episodes, args.workers) < 1 or args.seed < 0:
        raise H.Problem("--episodes and --workers must be at least 1, --seed at least 0")
    if any(path is not None and not path.name for path in (args.json, args.gif)):
        raise H.Problem("--json and --gif are names of files")
    other = args.live or args.compare or args.base or args.record or args.gif or args.object
    if args.benchmark and other:
        raise H.Problem("--benchmark goes with --policy, --wrist, --axis, --episodes, --seed and "
                        "--json")
    if args.live and (args.compare or args.record or args.json):
        raise H.Problem("--live measures and records nothing: it goes with none of --compare, "
                        "--record and --json")
    if args.compare and (args.base or args.record):
        raise H.Problem("--compare runs with and without the residual: it goes with neither "
                        "--base nor --record")
    if not virtual and (args.compare or args.gif or args.json or args.object):
        raise H.Problem("--compare, --gif, --json and --object need to know the object, as only "
                        "a virtual hand does: --port sim:SEED")
    return args


def note_what_differs(args, content, fitted):
    """A line for everything here that policy and residual have not seen."""
    if fitted:
        for what, here in (("port", args.port), ("policy", digest(args.policy))):
            if fitted.get(what) != here:
                sim.say(f"note: {args.residual} was fitted to the {what} {fitted.get(what)}, "
                        f"this is {here}")
    for given, known in ((args.wrist, content["wrists"]), (args.axis, content["axes"])):
        strange = ", ".join(name for name in given if name not in known)
        if strange and sim.ANY not in known:
            sim.say(f"note: the policy was never trained on {strange}")


def main():
    args = arguments()
    policy, content = load_policy(args.policy)
    if args.benchmark:
        return benchmark(args, policy, content)
    residual, fitted = (None, None) if args.base else load_residual(args.residual)
    args.object = args.object or "+".join(content["families"])
    note_what_differs(args, content, fitted)
    with torch.no_grad():                    # a first call is slow: not while the hand waits for it
        seen = torch.zeros(1, sim.OBSERVED)
        move = policy(seen)
        if residual:
            residual(seen, move)
    if args.live:
        live(args, policy, residual, content)
    elif args.port.startswith("sim:"):
        on_a_virtual_hand(args, policy)
    else:
        on_a_real_hand(args, policy, residual)


if __name__ == "__main__":
    H.run(main)
