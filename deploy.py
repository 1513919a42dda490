"""Stage 4: the policy, with or without the residual, on the hand at 20 Hz.

    python deploy.py --port sim:1 --wrist palm_down --episodes 3 --gif hand.gif
    python deploy.py --port sim:1 --compare --json results/sim1.json   # ceiling, base, residual
    python deploy.py --port sim:1:motor+shape --compare           # a hand that differs only there
    python deploy.py --port sim:1 --base --record data/sim1-task       # for fit_ndm.py --test
    python deploy.py --port /dev/ttyUSB0 --wrist palm_up --axis +z     # a real hand

reads   checkpoints/policy.pt, checkpoints/residual.pt (--base runs without it)
writes  with --gif a film of the first episode, with --json the numbers, with --record one .npz for
        each episode that lasted 20 s

A virtual hand is also measured: RotR = sum over steps of omega . k (RotR / 20 = radians turned),
TTF = seconds until the object fell, RotP = mean of |omega x k|. --compare gives the same trials
(object, mass, friction, grasp, axis, pushes) to the training simulator, which is the ceiling, to
the hand, and to the hand with the residual; so what counts are differences within trials:
recovered = (residual - base) / (ceiling - base) in RotR. `tests/tables.py --gaps` makes one table
of the --json files of several hands.
"""
import argparse
import functools
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

import hand as H
import sim
from fit_ndm import load_residual
from train_policy import act, digest, load_policy

HZ = H.CONTROL_HZ
METRICS = "RotR", "TTF", "RotP"
KINDS = "ceiling", "base", "residual"


class Controller:
    """From joint positions to joint targets: a_t = a_{t-1} + alpha delta_t, sent: a_t + pi_res.

    The policy sees its own targets a, not the corrected ones: what the residual adds is the hand's
    business, as if the hand were the one of the simulator."""

    def __init__(self, policy, residual, wrist, axis, target):
        self.policy, self.residual = policy, residual
        self.wrist, self.axis = np.array([sim.WRISTS[wrist]]), np.array([sim.AXES[axis]])
        self.base, self.history = np.array([target], float), None       # (1, N) rad

    @torch.no_grad()
    def __call__(self, q):
        """Joint positions q (N,) rad as read -> joint target (N,) rad to send."""
        q = np.asarray(q, float)[None]
        if self.history is None:
            self.history = sim.begin_history(q, self.base)
        else:
            self.history = sim.push_history(self.history, q, self.base)
        obs = sim.observation(self.history, self.wrist, self.axis)
        before, self.base = self.base, sim.next_target(self.base, self.policy(obs).numpy())
        if self.residual is None:
            return self.base[0]
        move = torch.as_tensor(self.base - before, dtype=torch.float32)
        return (self.base + self.residual(obs, move).numpy())[0]


def save_episode(args, data, wrist, load, index):
    """With --record, an episode that lasted 20 s as a trajectory like those of collect.py."""
    if args.record and len(data["q"]) == sim.EPISODE:
        sim.save_npz(
            args.record / f"{index:05d}.npz", **data, hand=H.HAND, wrist=wrist, load=load,
            source="base" if args.base else "base + residual", seed=args.seed, port=args.port,
            policy=digest(args.policy), index=index, sigma=0.0)


# ---------------------------------------------------------------------- measured, on virtual hands
@functools.cache
def networks(policy, residual):
    """A worker process keeps what it has read."""
    torch.set_num_threads(1)
    return load_policy(policy)[0], load_residual(residual)[0] if residual else None


def measured_episode(job):
    """One trial on a virtual hand, in a worker process; returns what `Referee` says."""
    args, trial, corrected, index, picture = job
    policy, residual = networks(args.policy, args.residual if corrected else None)
    hand = sim.open_hand(args.port, wrist=trial.wrist, load=trial.obj)
    hand.begin(trial)
    controller = Controller(policy, residual, trial.wrist, trial.axis, trial.grasp[H.N + 7:])
    place, pushes, film = hand.object_qpos()[None], iter(trial.pushes), []
    referee = sim.Referee([sim.AXES[trial.axis]], place[:, :3], place[:, 3:])

    def pushed(q):
        hand.push(next(pushes))
        return controller(q)

    def watch(hand):
        if picture:
            film.append(hand.qpos())
        place = hand.object_qpos()[None]
        return not referee(place[:, :3], place[:, 3:])[0]

    data = H.drive(hand, pushed, sim.EPISODE, watch)
    save_episode(args, data, trial.wrist, trial.obj.name, index)
    if film:
        sim.film(hand.model(), film, picture, trial.wrist)
    return {name: float(value[0]) for name, value in referee.result().items()}


def on_the_hand(pool, args, trials, corrected, film=None):
    """The trials of one wrist on the virtual hand, on all cores: dict of (n,) arrays. `film` is
    the GIF of the first one."""
    wrist = trials[0].wrist
    if film and len(args.wrist) > 1:
        film = film.with_stem(f"{film.stem}-{wrist}")
    first = 10000 * args.wrist.index(wrist)
    jobs = [(args, trial, corrected, first + i, film if i == 0 else None)
            for i, trial in enumerate(trials)]
    label = "base + residual" if corrected else "base"
    bar, rows = sim.Progress(f"{args.port} {wrist} {label}", len(trials)), []
    for result in pool.imap(measured_episode, jobs):
        rows.append(result)
        turned, held = (np.mean([row[name] for row in rows]) for name in ("RotR", "TTF"))
        bar(len(rows), f"{turned / HZ:.2f} rad, {held:.1f} s")
    return {name: np.array([row[name] for row in rows]) for name in METRICS}


# ------------------------------------------------------------------------------------ statistics
def spread(x):
    """Mean, standard deviation and standard error of the mean of episodes x (n,)."""
    std = x.std(ddof=1) if len(x) > 1 else 0.0
    return {"mean": float(x.mean()), "std": float(std), "sem": float(std / len(x) ** 0.5)}


def recovered(part, draws=2000):
    """The share of what is lost in RotR that the residual recovers, and its 95 % interval by
    bootstrap: trials are drawn anew, each with its three results. None where nothing is lost, or
    where too many draws say so for an interval."""
    x = np.stack([part[kind]["RotR"] for kind in KINDS])               # (3, n)
    n = x.shape[1]
    drawn = x[:, np.random.default_rng(0).integers(n, size=(draws, n))].mean(2)
    lost, won = drawn[0] - drawn[1], drawn[2] - drawn[1]
    share, interval = None, None
    ceiling, base, residual = x.mean(1)
    if ceiling > base:
        share = float((residual - base) / (ceiling - base))
        if n > 1 and (lost <= 0).mean() < 0.025:
            some = lost > 0
            interval = np.percentile(won[some] / lost[some], (2.5, 97.5)).tolist()
    return share, interval


def summary(part):
    """The numbers of one wrist, or of the mean over wrists, from the metrics of its episodes."""
    share, interval = recovered(part)
    gain = {m: spread(part["residual"][m] - part["base"][m]) for m in METRICS}
    return {**{kind: {m: spread(part[kind][m]) for m in METRICS} for kind in KINDS},
            "gain": gain, "recovered": share, "recovered_interval": interval}


HEADING = f"{'':20}  turned, rad           TTF, s      RotP, rad/s      (+- standard error)"


def line(name, kind, numbers):
    r, t, p = (numbers[m] for m in METRICS)
    return (f"{name:>10} {kind:<9}{r['mean'] / HZ:7.2f} +- {r['sem'] / HZ:4.2f}"
            f"{t['mean']:9.1f} +- {t['sem']:3.1f}{p['mean']:9.2f} +- {p['sem']:4.2f}")


def print_summary(name, s):
    """gain: residual - base on the same trials."""
    for kind in (*KINDS, "gain"):
        print(line(name, kind, s[kind]))
    if s["recovered"] is None:
        print(f"{name:>10} nothing is lost that could be recovered")
    else:
        low, high = s["recovered_interval"] or (np.nan, np.nan)
        known = "not determined" if np.isnan(low) else f"{100 * low:.0f} to {100 * high:.0f} %"
        print(f"{name:>10} recovered {100 * s['recovered']:.0f} % (95 % interval: {known})")


def compare(args, policy, objects, pool):
    """Ceiling, base and residual on the same trials; printed and returned as a report. Trials with
    the same number are the same task at every wrist: their mean over wrists is one number."""
    parts = {}
    for wrist in args.wrist:
        trials = sim.trials(objects, wrist, args.axis, args.episodes, args.seed)
        parts[wrist] = {
            "ceiling": sim.run_episodes(
                sim.Rotation(len(trials), objects, [wrist], args.axis, seed=args.seed),
                lambda env: act(policy, env), title=f"ceiling {wrist}", trials=trials),
            "base": on_the_hand(pool, args, trials, False),
            "residual": on_the_hand(pool, args, trials, True, args.gif)}
    mean = {kind: {m: np.mean([part[kind][m] for part in parts.values()], 0) for m in METRICS}
            for kind in KINDS}
    wrists = {wrist: summary(part) for wrist, part in parts.items()}
    report = {"port": args.port, "episodes": args.episodes, "seed": args.seed, "axes": args.axis,
              "objects": [obj.name for obj in objects], "wrists": wrists, **summary(mean)}
    print(f"\n{args.port}, {args.episodes} episodes a wrist; gain: residual - base on the same "
          f"trials\n{HEADING}")
    for wrist, s in wrists.items():
        print_summary(wrist, s)
    if len(wrists) > 1:
        print_summary("mean", report)
    return report


def measure(args, objects, pool):
    """The hand with or without the residual; printed and returned as a report."""
    report = {"port": args.port, "seed": args.seed}
    for wrist in args.wrist:
        trials = sim.trials(objects, wrist, args.axis, args.episodes, args.seed)
        results = on_the_hand(pool, args, trials, not args.base, args.gif)
        report[wrist] = {name: spread(x) for name, x in results.items()}
    print(f"\n{args.port}, {args.episodes} episodes a wrist\n{HEADING}")
    for wrist in args.wrist:
        print(line(wrist, "base" if args.base else "residual", report[wrist]))
    return report


def on_a_virtual_hand(args, policy, content):
    objects = sim.objects_of("+".join(args.object or content["families"]))
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        if args.compare:
            report = compare(args, policy, objects, pool)
        else:
            report = measure(args, objects, pool)
    if args.json:
        with H.atomic_file(args.json, "w") as file:
            file.write(json.dumps(report, indent=1) + "\n")


# ---------------------------------------------------------------------------------- on a real hand
def agreed(text):
    try:
        return input(f"{text}, then Enter; q to stop: ").strip().lower() != "q"
    except EOFError:
        return False


def on_a_real_hand(args, policy, residual):
    """Episodes one after the other. When the bus fails the hand lets go, and whoever stands by
    decides whether to begin that episode again; without a terminal the script ends."""
    wrist, axis, number, watched = args.wrist[0], args.axis[0], 0, sys.stdin.isatty()
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
                hand.rest()            # nothing strains while a slow disk is waited for
            except H.BusError as error:
                if not watched:
                    raise
                print(f"episode {number + 1} is lost: {error}")
                if not agreed("mend that"):
                    return
                hand.reconnect()
                continue
            number += 1
            lag, current = np.abs(data["target"] - data["q"]), np.abs(data["current"])
            print(f"episode {number}: {len(data['q'])} steps, lag {lag.mean():.3f} rad, "
                  f"{1000 * current.mean():.0f} mA")
            save_episode(args, data, wrist, "object", number - 1)


# ------------------------------------------------------------------------------------ command line
def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", default="auto",
                        help="auto, sim, sim:SEED, sim:SEED:motor+shape or a serial device")
    parser.add_argument("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    parser.add_argument("--residual", type=Path, default=Path("checkpoints/residual.pt"))
    parser.add_argument("--base", action="store_true", help="run without the residual")
    parser.add_argument("--compare", action="store_true",
                        help="ceiling, base and base + residual, on a virtual hand")
    parser.add_argument("--wrist", nargs="+", default=["palm_up", "palm_down"],
                        choices=sim.WRISTS)
    parser.add_argument("--axis", nargs="+", default=["+z", "-z"], choices=sim.AXES,
                        type=sim.axis_name)
    parser.add_argument("--object", nargs="+", default=[], choices=sim.FAMILIES,
                        help="default: what the policy was trained on")
    parser.add_argument("--episodes", type=int, default=40, help="per wrist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="folder for the episodes that lasted 20 s")
    parser.add_argument("--gif", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.port = sim.resolve_port(args.port)
    args.wrist = list(dict.fromkeys(args.wrist))
    if args.episodes < 1 or args.workers < 1:
        raise H.Problem("--episodes and --workers must be at least 1")
    if args.compare and (args.base or args.record):
        raise H.Problem("--compare runs with and without the residual: it goes with neither "
                        "--base nor --record")
    if not args.port.startswith("sim:") and (args.compare or args.gif or args.json):
        raise H.Problem("--compare, --gif and --json need to see the object, which only a "
                        "virtual hand can: --port sim:SEED")
    return args


def note_what_differs(args, content, fitted):
    """A line for everything here that policy and residual have not seen."""
    def note(text):
        print(f"note: {text}", file=sys.stderr)

    facts = {"hand": ("port", args.port), "policy": ("policy", digest(args.policy))}
    for what, (name, used) in facts.items() if fitted else ():
        if fitted.get(name) != used:
            note(f"{args.residual} was fitted to the {what} {fitted.get(name)}, this is {used}")
    for name, given in (("wrists", args.wrist), ("axes", args.axis)):
        strange = [g for g in given if g not in content[name]]
        if strange:
            note(f"the policy was never trained on {', '.join(strange)}")


def main():
    args = arguments()
    policy, content = load_policy(args.policy)
    residual, fitted = (None, None) if args.base else load_residual(args.residual)
    note_what_differs(args, content, fitted)
    if args.port.startswith("sim:"):
        on_a_virtual_hand(args, policy, content)
    else:
        on_a_real_hand(args, policy, residual)


if __name__ == "__main__":
    H.run(main)
