"""The paper's ablations at the prediction: which model, learned from which data, predicts the task?

    python tests/study.py --hands 1 2 5                    # first: the data of these hands
    python tests/ablations.py --hands 1 2 5                # 15 min a hand on one core

Of each virtual hand every variant of fit_ndm.py's model is tested on what none of them has learned
from: the trajectories in the box whose sequences `fit_ndm.held_out` keeps, and the recorded trials
of the task with even numbers. Only the last variant learns from the task, from those with odd ones;
f_sim, with which all but one begin, has seen the task in simulation. What is recorded are trials
that were held for 20 s. Everything has one seed: intervals are over hands, not over trainings. A
free hand and waves in the box are collected here. Stopped and run again it goes on with the next
variant; after a change of code delete what it has written.

reads   DATA/simK-WRIST, DATA/simK-task    what study.py has collected and recorded
writes  DATA/simK-WRIST-none, DATA/simK-WRIST-waves, DATA/f_sim-*.pt
        RESULTS/ablations-simK.json, RESULTS/ablations.png
"""
import argparse
import copy
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import sim                       # before torch: it sets how torch's threads wait
import torch

import collect
import fit_ndm
import hand as H
import study
import tables
import train_policy


class Variant(NamedTuple):
    name: str
    kind: str = "joint"          # of fit_ndm.GROUPS
    data: str = "box"            # of this hand, see `Data`; "": none
    share: float = 1.0           # of that data
    pretrained: bool = True      # on simulated joints
    against: str = "box"         # the variant with as much data


VARIANTS = (
    Variant("box"),
    Variant("box, 1/2", share=1 / 2),
    Variant("box, 1/4", share=1 / 4),
    Variant("box, 1/8", share=1 / 8),
    Variant("simulation alone", data=""),
    Variant("not pretrained", pretrained=False),
    Variant("finger-wise", kind="finger"),
    Variant("whole-hand", kind="whole"),
    Variant("all with noise", data="noisy", against="box, 1/2"),
    Variant("none with noise", data="plain", against="box, 1/2"),
    Variant("free hand", data="free"),
    Variant("waves in the box", data="waves", against="box, 1/4"),
    Variant("box and task", data="box+task"),
)
SETS = "box", "task"
ERRORS = "one", "open"           # after a step, after 0.5 s in the open loop


class Data:
    """What was measured on one hand: name -> (q, a), each (n, 400, N) rad, to learn from (`train`)
    and to be tested on (`test`)."""

    def __init__(self, k, args, wrists):
        boxes = [args.data / f"sim{k}-{wrist}" for wrist in wrists]
        task = args.data / f"sim{k}-task"
        for folder in (*boxes, task):
            collect.there(folder, {"policy": train_policy.digest(args.policy)})      # or `Problem`
        q, a, sequence, _ = fit_ndm.load_shards(boxes)
        held = fit_ndm.held_out(sequence)
        noisy = torch.tensor([float(sim.load_npz(file, "sigma")["sigma"]) > 0
                              for folder in boxes for file in collect.trajectories(folder)])
        self.train = {name: (q[some], a[some]) for name, some in (
            ("box", ~held), ("noisy", ~held & noisy), ("plain", ~held & ~noisy))}
        self.test = {"box": (q[held], a[held])}

        q, a, sequence = self._collected(k, args, wrists, "none", 0.4, "--load", "none")
        held = fit_ndm.held_out(sequence)                # of the same sequences as in the box
        self.train["free"] = q[~held], a[~held]
        waves = self._collected(k, args, wrists, "waves", 0.1, "--source", "waves")      # they jam
        self.train["waves"] = waves[:2]

        q, a, number, _ = fit_ndm.load_shards([task])
        even = number % 2 == 0
        self.test["task"] = q[even], a[even]
        whole = len(self.train["box"][0])
        rest = evenly(whole, max(1, whole - int((~even).sum())))         # as much in all
        self.train["box+task"] = tuple(
            torch.cat([box[rest], x[~even]]) for box, x in zip(self.train["box"], (q, a)))

    @staticmethod
    def _collected(k, args, wrists, name, hours, *words):
        folders = [args.data / f"sim{k}-{wrist}-{name}" for wrist in wrists]
        for wrist, folder in zip(wrists, folders):
            study.run("collect.py", "--port", f"sim:{k}", "--policy", args.policy, "--wrist",
                      wrist, "--hours", hours / len(wrists), "--out", folder, *words)
        return fit_ndm.load_shards(folders)[:3]


def evenly(n, count):
    """`count` of n numbers, evenly spread: of both wrists."""
    return torch.linspace(0, n - 1, count).round().long()


def simulated(kinds, args):
    """Model kind -> f_sim of that kind, learned as fit_ndm.py does; kept in DATA."""
    models, lessons, policy = {}, None, train_policy.digest(args.policy)
    for kind in kinds:
        path = args.data / f"f_sim-{kind}-{policy}-{args.steps}-{args.episodes}-{args.seed}.pt"
        if not path.exists():
            lessons = lessons or fit_ndm.lessons(fit_ndm.simulated_episodes(args), args.seed)
            f_sim = fit_ndm.pretrained(kind, *lessons, args.steps, args.seed)
            train_policy.save_checkpoint(
                path, "dynamics", config=f_sim.config, weights=f_sim.state_dict())
        models[kind], _ = train_policy.load_network(path, "dynamics", fit_ndm.Dynamics)
    return models


def measure(variant, data, models, args):
    """The variant's model of this hand: {set: {error: mrad, mean over joints}}, and how many
    minutes of this hand it has learned from."""
    model, seconds = copy.deepcopy(models[variant.kind]), 0.0
    if variant.data:
        q, a = data.train[variant.data]
        some = evenly(len(q), max(1, round(variant.share * len(q))))
        q, a, steps, rate = q[some], a[some], args.steps, 1e-3
        if not variant.pretrained:           # as many steps as f_sim and it have had together
            torch.manual_seed(args.seed)
            model, steps, rate = fit_ndm.Dynamics(**model.config), 2 * steps, 2e-3
            model.fit_scale(*fit_ndm.windows(q, a, fit_ndm.every_window(q)))
        fit_ndm.fit(model, q, a, steps, rate, variant.name, seed=args.seed)
        seconds = q.shape[0] * q.shape[1] / H.CONTROL_HZ
    model.requires_grad_(False)
    errors = {name: fit_ndm.errors(model, *data.test[name]) for name in SETS}
    report = {name: {error: float(rms.mean()) for error, rms in zip(ERRORS, pair)}
              for name, pair in errors.items()}
    return report | {"minutes": seconds / 60}


def ablate(k, args, wrists):
    """{variant: its errors} of the hand sim:k, read or measured."""
    path = args.results / f"ablations-sim{k}.json"
    asked = {"policy": train_policy.digest(args.policy), "steps": args.steps,
             "episodes": args.episodes, "seed": args.seed}
    report = json.loads(path.read_text()) if path.exists() else {**asked, "mrad": {}}
    if any(report[name] != value for name, value in asked.items()):
        raise H.Problem(f"{path} is of another policy, --steps, --episodes or --seed: delete it")
    missing = [variant for variant in VARIANTS if variant.name not in report["mrad"]]
    if missing:
        data = Data(k, args, wrists)
        models = simulated(dict.fromkeys(variant.kind for variant in VARIANTS), args)
    for variant in missing:
        report["mrad"][variant.name] = measure(variant, data, models, args)
        H.save_json(path, report)
    return report["mrad"]


def over_hands(reports, variant, of, error):
    """An error of a variant: mean and half width of its 95 % interval over hands, and of what it is
    more than that of the variant with as much data, on the same hands."""
    value, other = ([report[name][of][error] for report in reports]
                    for name in (variant.name, variant.against))
    mean, _, half = tables.interval(value)
    more, _, around = tables.interval([x - y for x, y in zip(value, other)])
    return mean, half, more, around


def minutes(reports, variant):
    return sum(report[variant.name]["minutes"] for report in reports) / len(reports)


def table(reports, variants=VARIANTS):
    lines = [f"mrad, mean over joints and {len(reports)} hands, 95 % over hands; in brackets more "
             "than as much data of the box"]
    for error, title in zip(ERRORS, ("after one step", "after 0.5 s, open loop")):
        lines += ["", f"{title:<24}{'min':>4}{'the box':>28}{'the task':>32}"]
        for variant in variants:
            cells = ("{:7.2f} +-{:5.2f} ({:+6.2f} +-{:5.2f})".format(
                *over_hands(reports, variant, of, error)) for of in SETS)
            lines.append(f"  {variant.name:<22}{minutes(reports, variant):4.0f}" + "  ".join(cells))
    return "\n".join(lines)


def draw(reports, path):
    """Left the amount of data, right everything else, against as much of the box; 0.5 s, open
    loop."""
    figure, (left, right) = sim.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 3))
    amounts = [variant for variant in VARIANTS if variant.name.startswith("box, ")]
    amounts.append(VARIANTS[0])
    x = [minutes(reports, variant) for variant in amounts]
    for of in SETS:
        points = [over_hands(reports, variant, of, "open")[:2] for variant in amounts]
        left.errorbar(x, *zip(*points), capsize=3, marker="o", label=f"the {of}")
    left.set(xscale="log", xlabel="minutes in the box", ylabel="mrad after 0.5 s, open loop")
    left.set_xticks(x, [f"{m:.0f}" for m in x])
    left.minorticks_off()
    left.legend(fontsize=8)
    others = [variant for variant in VARIANTS if variant not in amounts][::-1]
    means, halves = zip(*(over_hands(reports, variant, "task", "open")[2:] for variant in others))
    right.barh([variant.name for variant in others], means, xerr=halves, capsize=3, color="0.7")
    right.axvline(0, color="black", lw=1)
    right.set_xlabel("the task: mrad after 0.5 s, open loop, more than with as much of the box")
    sim.save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hands", type=int, nargs="+", required=True, help="seeds of virtual hands")
    add("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    add("--data", type=Path, default=Path("runs/study"))
    add("--results", type=Path, default=Path("results/study"))
    add("--steps", type=int, default=8000, help="gradient steps of each fit")
    add("--episodes", type=int, default=192, help="simulated episodes of the policy")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    wrists = train_policy.load_policy(args.policy)[1]["wrists"]
    reports = [ablate(k, args, wrists) for k in args.hands]
    print(table(reports))
    draw(reports, args.results / "ablations.png")


if __name__ == "__main__":
    H.run(main)
