"""Stage 4: the policy, with or without the residual, on the hand at 20 Hz.

    python deploy.py --port sim:1 --wrist palm_down --episodes 3 --gif hand.gif
    python deploy.py --port sim:1 --compare --episodes 100 --json results.json      # ceiling, base, residual
    python deploy.py --table results/sim*.json                                       # several hands as a table and bars
    python deploy.py --port sim:1 --base --record data/sim1-task                     # trajectories for fit_ndm.py --test
    python deploy.py --port /dev/ttyUSB0 --wrist palm_up --axis +z                   # a real hand

reads   checkpoints/policy.pt, checkpoints/residual.pt (--base runs without it)
writes  with --gif a film of the first episode, with --json the numbers, with --record one .npz per episode

A virtual hand is also measured: RotR = sum over steps of omega . k (RotR / 20 = radians turned), TTF = seconds until the
object fell, RotP = mean of |omega x k|. `ceiling` is the same policy in the simulator that it was trained in, `recovered` =
(residual - base) / (ceiling - base) in RotR.
"""
import argparse
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
from train_policy import FAMILIES, digest, load_policy, objects_of, targets

HZ = H.CONTROL_HZ


class Controller:
    """From joint positions to joint targets: a_t = a_{t-1} + alpha delta_t, sent: a_t + pi_res(o_t, a_t).

    The policy sees its own targets a, not the corrected ones: what the residual adds is the hand's business, as if the
    hand were the one of the simulator."""

    def __init__(self, policy, residual, wrist, axis, target):
        self.policy, self.residual = policy, residual
        self.wrist, self.axis = np.array([sim.WRISTS[wrist]], float), np.array([sim.AXES[axis]], float)
        self.base, self.history = np.array(target, float), None

    @torch.no_grad()
    def __call__(self, q):
        """Joint positions q (16,) rad as read -> joint target (16,) rad to send."""
        if self.history is None:
            self.history = np.broadcast_to(np.stack([q, self.base]), (1, sim.W, 2, H.N)).copy()
        else:
            self.history[:, :-1] = self.history[:, 1:]
            self.history[:, -1] = q, self.base
        obs = torch.from_numpy(sim.deployable(self.history, self.wrist, self.axis))
        move = sim.ALPHA * self.policy(obs).clamp(-1, 1)
        before, self.base = self.base, np.clip(self.base + move[0].numpy(), sim.NEAR, sim.FAR)
        if self.residual is None:
            return self.base
        return self.base + self.residual(obs, torch.from_numpy(self.base - before).float()[None])[0].numpy()


def episode(hand, controller, watch=None, steps=sim.EPISODE):
    """Run one episode; returns what was read and sent as a dict of arrays. `watch(hand)`, if given, is called after each
    step and ends the episode by returning True."""
    return H.drive(hand, controller, steps, watch)


def save_record(args, data, wrist, load, index):
    """With --record, an episode that lasted 20 s as a trajectory like those of collect.py."""
    if args.record and len(data["q"]) == sim.EPISODE:
        sim.save_npz(args.record / f"{index:05d}.npz", **data, hand=H.HAND, wrist=wrist, load=load, port=args.port, sigma=0.0,
                     source="base" if args.base else "base + residual", seed=args.seed, index=index)


class Referee:
    """Watches the object of a virtual hand and keeps the metrics of one episode; nothing counts after a fall."""

    def __init__(self, hand, axis, film=None):
        self.axis, self.film = np.array(sim.AXES[axis], float), film
        self.home = self.last = hand.object_qpos()
        self.RotR, self.RotP, self.steps = 0.0, 0.0, 0

    def __call__(self, hand):
        now = hand.object_qpos()
        if self.film is not None:
            self.film.append(hand.qpos())
        if np.linalg.norm(now[:3] - self.home[:3]) > sim.FALL:
            return True
        omega = sim.rotation_vector(sim.multiply(now[3:], sim.conjugate(self.last[3:]))) * HZ
        self.RotR += omega @ self.axis
        self.RotP += np.linalg.norm(np.cross(omega, self.axis))
        self.steps, self.last = self.steps + 1, now

    def result(self):
        return {"RotR": self.RotR, "TTF": self.steps / HZ, "RotP": self.RotP / max(self.steps, 1)}


def virtual_episode(job):
    """One measured episode on a virtual hand. The object, its mass and friction, the grasp and the axis depend on the
    seed and the episode's number alone, so base and residual face the same."""
    torch.set_num_threads(1)
    args, wrist, number, corrected, film = job
    policy, content = load_policy(args.policy)
    residual = load_residual(args.residual)[0] if corrected else None
    rng = np.random.default_rng([args.seed, number, 4])
    objects = chosen_objects(args, content)
    obj = objects[rng.integers(len(objects))]
    axis = args.axis[rng.integers(len(args.axis))]
    grasps = sim.grasp_cache(obj, progress=False)
    g = grasps[rng.integers(len(grasps))]
    hand = sim.open_hand(args.port, wrist=wrist, load=obj)
    hand.place(g[:16], g[23:], g[16:23], mass=rng.uniform(0.01, 0.05), friction=rng.uniform(0.5, 2.0))
    referee = Referee(hand, axis, [] if film else None)
    data = episode(hand, Controller(policy, residual, wrist, axis, g[23:]), referee)
    save_record(args, data, wrist, obj.name, 10000 * args.wrist.index(wrist) + number)
    if film:
        sim.film(hand.model(), referee.film, film, wrist)
    return referee.result()


def chosen_objects(args, content):
    return objects_of("+".join(args.object or content["families"]))


def measure(pool, args, wrist, corrected, film=None):
    """Episodes on the virtual hand, on all cores: dict of (episodes,) arrays. `film` is the GIF of the first one; of several
    wrists each has its own."""
    label = "base + residual" if corrected else "base"
    if film and len(args.wrist) > 1:
        film = film.with_stem(f"{film.stem}-{wrist}")
    jobs = [(args, wrist, i, corrected, film if i == 0 else None) for i in range(args.episodes)]
    bar, rows = sim.Progress(f"{args.port} {wrist} {label}", len(jobs)), []
    for result in pool.imap(virtual_episode, jobs):
        rows.append(result)
        bar(len(rows), f"{np.mean([r['RotR'] for r in rows]) / HZ:.2f} rad, {np.mean([r['TTF'] for r in rows]):.1f} s")
    return {name: np.array([r[name] for r in rows]) for name in rows[0]}


def ceiling(args, policy, content, wrist):
    """The same task in the training simulator. Four times the episodes: they cost little there, and its error is in every share recovered."""
    env = sim.Rotation(4 * args.episodes, chosen_objects(args, content), [wrist], args.axis, seed=args.seed)
    return sim.run_episodes(env, lambda env: targets(policy, env))


def summary(results):
    """Mean, standard deviation over episodes and standard error of the mean of every metric."""
    return {name: {"mean": float(x.mean()), "std": float(x.std()), "sem": float(x.std() / len(x) ** 0.5)} for name, x in results.items()}


def compare(args, pool):
    policy, content = load_policy(args.policy)
    parts = {}
    for wrist in args.wrist:
        parts[wrist] = {"ceiling": ceiling(args, policy, content, wrist), "base": measure(pool, args, wrist, False),
                        "residual": measure(pool, args, wrist, True, args.gif)}
    everything = {kind: {m: np.concatenate([p[kind][m] for p in parts.values()]) for m in ("RotR", "TTF", "RotP")}
                  for kind in ("ceiling", "base", "residual")}
    report = {"port": args.port, "episodes": args.episodes, "seed": args.seed, "axes": args.axis, "wrists": {}}
    print(f"\n{args.port}, {args.episodes} episodes a wrist (ceiling: {len(parts[args.wrist[0]]['ceiling']['RotR'])})\n"
          f"{'':20} {'RotR (rad)':>23} {'TTF (s)':>13} {'RotP (rad/s)':>16}   recovered")
    for name, part in [*parts.items(), ("all", everything)]:
        s = {kind: summary(results) for kind, results in part.items()}
        lost = s["ceiling"]["RotR"]["mean"] - s["base"]["RotR"]["mean"]
        # nothing was lost: nothing can be recovered, and the ratio means nothing
        recovered = (s["residual"]["RotR"]["mean"] - s["base"]["RotR"]["mean"]) / lost if lost > 0 else None
        for kind, row in s.items():
            r, t, p = row["RotR"], row["TTF"], row["RotP"]
            note = f"   {100 * recovered:4.0f} %" if kind == "residual" and recovered is not None else ""
            print(f"{name:>10} {kind:<9} {r['mean']:7.1f} +- {r['sem']:4.1f} ({r['mean'] / HZ:5.2f}) {t['mean']:6.1f} +- {t['sem']:3.1f}"
                  f"   {p['mean']:6.2f} +- {p['sem']:4.2f}{note}")
        numbers = {kind: {**{m: row[m]["mean"] for m in row}, "spread": row} for kind, row in s.items()} | {"recovered": recovered}
        report.update(numbers) if name == "all" else report["wrists"].update({name: numbers})
    return report


def gap_table(files, picture):
    """The reports of several --compare runs as one table with mean and spread over hands, and as bars."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reports = []
    for file in files:
        try:
            reports.append(json.loads(Path(file).read_text()))
            reports[-1]["wrists"], reports[-1]["recovered"], reports[-1]["ceiling"]["RotR"]
        except (OSError, ValueError, KeyError, TypeError):
            raise H.Problem(f"{file} is not a file that --compare --json wrote")
    kinds = ("ceiling", "base", "residual")

    def columns(parts):
        """Rows of (ceiling, base, residual) rad, the same in s, lost and recovered in percent, for parts of reports: (parts, 8)."""
        turned, held = (np.array([[part[kind][m] for kind in kinds] for part in parts]) for m in ("RotR", "TTF"))
        recovered = [np.nan if part["recovered"] is None else 100 * part["recovered"] for part in parts]
        return np.column_stack([turned / HZ, held, 100 * (1 - turned[:, 1] / turned[:, 0]), recovered])

    print("hand            turned, rad                TTF, s                  lost   recovered\n"
          "          ceiling   base  residual   ceiling  base  residual")
    line = lambda name, c, note="": print(f"{name:<9} {c[0]:7.2f} {c[1]:6.2f} {c[2]:9.2f}   {c[3]:7.1f} {c[4]:5.1f} {c[5]:9.1f}   {c[6]:4.0f} %   {c[7]:5.0f} %{note}")
    whole = columns(reports)
    for report, row in zip(reports, whole):
        line(report["port"], row)
    line("mean", np.nanmean(whole, 0))
    line("std", np.nanstd(whole, 0))
    for wrist in reports[0]["wrists"]:
        part = columns([r["wrists"][wrist] for r in reports if wrist in r["wrists"]])
        line(wrist, np.nanmean(part, 0), f"  ({', '.join(f'{x:.0f}' for x in part[:, 7])})")
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for axis, metric, scale, label in ((axes[0], "RotR", 1 / HZ, "radians turned in 20 s"), (axes[1], "TTF", 1, "time to fall, s")):
        for k, (kind, color) in enumerate(zip(kinds, ("0.7", "tab:red", "tab:green"))):
            sem = [r[kind]["spread"][metric]["sem"] * scale for r in reports]
            axis.bar(np.arange(len(reports)) + 0.27 * (k - 1), [r[kind][metric] * scale for r in reports], 0.25, yerr=sem, color=color,
                     label={"ceiling": "training simulator", "base": "hand, policy alone", "residual": "hand, policy + residual"}[kind])
        axis.set_xticks(range(len(reports)), [r["port"] for r in reports])
        axis.set_ylabel(label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
    with H.atomic_file(picture) as file:
        figure.savefig(file, dpi=90)
    print(f"bars in {picture}")


def on_a_real_hand(args):
    policy, _ = load_policy(args.policy)
    residual = None if args.base else load_residual(args.residual)[0]
    wrist, axis = args.wrist[0], args.axis[0]
    with sim.open_hand(args.port) as hand:
        for number in range(args.episodes):
            hand.move_to(H.GRASP)
            if sys.stdin.isatty():
                hand.rest()
                input(f"episode {number + 1}/{args.episodes}: hold the object between the fingertips, {wrist}, and press Enter ")
                hand.move_to(H.GRASP)
            data = episode(hand, Controller(policy, residual, wrist, axis, H.GRASP))
            lag = np.abs(data["target"] - data["q"]).mean()
            print(f"episode {number + 1}: {len(data['q'])} steps, lag {lag:.3f} rad, {1000 * np.abs(data['current']).mean():.0f} mA")
            save_record(args, data, wrist, "object", number)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", default="auto", help="auto, sim, sim:SEED or a serial device")
    parser.add_argument("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    parser.add_argument("--residual", type=Path, default=Path("checkpoints/residual.pt"))
    parser.add_argument("--base", action="store_true", help="run without the residual")
    parser.add_argument("--compare", action="store_true", help="ceiling, base and base + residual, on a virtual hand")
    parser.add_argument("--wrist", nargs="+", default=["palm_up", "palm_down"], choices=sim.WRISTS)
    parser.add_argument("--axis", nargs="+", default=["+z", "-z"], choices=sim.AXES, type=str.strip)
    parser.add_argument("--object", nargs="+", default=[], choices=FAMILIES, help="default: what the policy was trained on")
    parser.add_argument("--episodes", type=int, default=20, help="per wrist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="folder for one .npz per episode that lasted 20 s")
    parser.add_argument("--gif", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", nargs="+", type=Path, help="only print and draw (gap.png beside the first) these --json files of --compare")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(sim.arguments())
    if args.table:
        return gap_table(args.table, args.table[0].with_name("gap.png"))
    args.port = sim.resolve_port(args.port)
    if args.episodes < 1 or args.workers < 1:
        raise H.Problem("--episodes and --workers must be at least 1")
    if args.compare and (args.base or args.record):
        raise H.Problem("--compare runs with and without the residual: it goes with neither --base nor --record")
    virtual = args.port.startswith("sim:")
    if not virtual and (args.compare or args.gif or args.json):
        raise H.Problem("--compare, --gif and --json need to see the object, which only a virtual hand can: --port sim:SEED")
    _, content = load_policy(args.policy)                          # fail early and in one place
    if not args.base:
        fitted = load_residual(args.residual)[1]
        for what, found, used in (("hand", fitted.get("port"), args.port), ("policy", fitted.get("policy"), digest(args.policy))):
            if found != used:
                print(f"note: {args.residual} was fitted to the {what} {found}, this is {used}", file=sys.stderr)
    for name, given in (("wrists", args.wrist), ("axes", args.axis)):
        strange = [g for g in given if g not in content[name]]
        if strange:
            print(f"note: the policy was never trained on {', '.join(strange)}", file=sys.stderr)
    if not virtual:
        return on_a_real_hand(args)

    for obj in chosen_objects(args, content):                      # once, before the workers all want them
        sim.grasp_cache(obj)
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        if args.compare:
            report = compare(args, pool)
        else:
            report = {"port": args.port, "seed": args.seed}
            for wrist in args.wrist:
                s = summary(measure(pool, args, wrist, not args.base, args.gif))
                report[wrist] = s
                print(f"{args.port} {wrist}: {s['RotR']['mean'] / HZ:.2f} rad (RotR {s['RotR']['mean']:.0f} +- {s['RotR']['sem']:.0f}), "
                      f"TTF {s['TTF']['mean']:.1f} s, RotP {s['RotP']['mean']:.2f} rad/s, {args.episodes} episodes")
    if args.json:
        with H.atomic_file(args.json, "w") as file:
            file.write(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    H.run(main)
