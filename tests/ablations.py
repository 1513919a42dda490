"""The paper's ablations at the prediction: which model, learned from which data, predicts the task?

    python tests/study.py --hands 1 2 5                    # first: the data of these hands
    python tests/ablations.py --hands 1 2 5                # 20 min a hand on one core

Of each virtual hand every variant of fit_ndm.py's model is tested on what none of them has learned
from: the trajectories in the box that `fit_ndm.held_out` keeps, and every other recorded trial of
the task. Only the last variant learns from the task, from the other half of the trials. A free hand
and waves in the box are collected here. Stopped and run again it goes on with the next variant.

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


BOX = "box, 24 min"
VARIANTS = (
    Variant(BOX),
    Variant("box, 12 min", share=1 / 2),
    Variant("box, 6 min", share=1 / 4),
    Variant("box, 3 min", share=1 / 8),
    Variant("simulation alone", data=""),
    Variant("not pretrained", pretrained=False),
    Variant("finger-wise", kind="finger"),
    Variant("whole-hand", kind="whole"),
    Variant("box, 12 min, noise", data="noisy"),
    Variant("box, 12 min, no noise", data="plain"),
    Variant("free hand, 24 min", data="none"),
    Variant("waves in the box, 6 min", data="waves"),
    Variant("box and task", data="box+task"),
)
SETS = "box", "task"
ERRORS = "one", "open"           # after a step, after 0.5 s in the open loop


class Data:
    """What was measured on one hand: name -> (q, a), each (n, 400, N) rad, to learn from (`train`)
    and to be tested on (`test`)."""

    def __init__(self, k, args, wrists):
        folders = [args.data / f"sim{k}-{wrist}" for wrist in wrists]
        self.train, self.test = {}, {}
        q, a, sequence, _ = fit_ndm.load_shards(folders)
        held = fit_ndm.held_out(sequence)
        noisy = torch.tensor([float(sim.load_npz(file, "sigma")["sigma"]) > 0
                              for folder in folders for file in collect.trajectories(folder)])
        self.train["box"], self.test["box"] = (q[~held], a[~held]), (q[held], a[held])
        self.train["noisy"] = q[~held & noisy], a[~held & noisy]
        self.train["plain"] = q[~held & ~noisy], a[~held & ~noisy]
        for other, hours, *words in (
                ("none", 0.4, "--load", "none"), ("waves", 0.1, "--source", "waves")):   # they jam
            made = [args.data / f"sim{k}-{wrist}-{other}" for wrist in wrists]
            for wrist, folder in zip(wrists, made):
                study.run("collect.py", "--port", f"sim:{k}", "--policy", args.policy, "--wrist",
                          wrist, "--hours", hours / len(wrists), "--out", folder, *words)
            self.train[other] = fit_ndm.load_shards(made)[:2]
        q, a, *_ = fit_ndm.load_shards([args.data / f"sim{k}-task"])
        self.test["task"] = q[::2], a[::2]
        self.train["box+task"] = tuple(
            torch.cat(pair) for pair in zip(self.train["box"], (q[1::2], a[1::2])))


def simulated(args):
    """Model kind -> f_sim of that kind, learned as fit_ndm.py does; kept in DATA."""
    models, lessons, policy = {}, None, train_policy.digest(args.policy)
    for kind in dict.fromkeys(variant.kind for variant in VARIANTS):
        path = args.data / f"f_sim-{kind}-{policy}-{args.steps}.pt"
        if not path.exists():
            lessons = lessons or fit_ndm.lessons(fit_ndm.simulated_episodes(args), args.seed)
            f_sim = fit_ndm.pretrained(kind, *lessons, args.steps, args.seed)
            train_policy.save_checkpoint(
                path, "dynamics", config=f_sim.config, weights=f_sim.state_dict())
        models[kind], _ = train_policy.load_network(path, "dynamics", fit_ndm.Dynamics)
    return models


def measure(variant, data, models, args):
    """The variant's model of this hand: {set: {error: mrad, mean over joints}}."""
    model = copy.deepcopy(models[variant.kind])
    if variant.data:
        q, a = data.train[variant.data]
        n = max(1, round(variant.share * len(q)))
        some = torch.linspace(0, len(q) - 1, n).round().long()     # of both wrists
        rate = 1e-3
        if not variant.pretrained:
            torch.manual_seed(args.seed)
            scales = model
            model, rate = fit_ndm.Dynamics(**model.config), 2e-3
            for name in ("shift", "scale", "step"):
                getattr(model, name).copy_(getattr(scales, name))
        fit_ndm.fit(model, q[some], a[some], args.steps, rate, variant.name, seed=args.seed)
    model.requires_grad_(False)
    errors = {name: fit_ndm.errors(model, *data.test[name]) for name in SETS}
    return {name: {error: float(rms.mean()) for error, rms in zip(ERRORS, pair)}
            for name, pair in errors.items()}


def ablate(k, args, wrists):
    """{variant: its errors} of the hand sim:k, read or measured."""
    path = args.results / f"ablations-sim{k}.json"
    asked = {"policy": train_policy.digest(args.policy), "steps": args.steps}
    report = json.loads(path.read_text()) if path.exists() else {**asked, "mrad": {}}
    if any(report[name] != value for name, value in asked.items()):
        raise H.Problem(f"{path} is of another policy, or of other --steps: delete it")
    missing = [variant for variant in VARIANTS if variant.name not in report["mrad"]]
    if missing:
        data, models = Data(k, args, wrists), simulated(args)
    for variant in missing:
        report["mrad"][variant.name] = measure(variant, data, models, args)
        with H.atomic_file(path, "w") as file:
            file.write(json.dumps(report, indent=1) + "\n")
    return report["mrad"]


def over_hands(reports, name, of, error):
    """An error of a variant: mean and half width of its 95 % interval over hands, and of what it is
    more than that of the first variant, on the same hands."""
    value, first = ([report[row][of][error] for report in reports] for row in (name, BOX))
    mean, _, half = tables.interval(value)
    more, _, around = tables.interval([x - y for x, y in zip(value, first)])
    return mean, half, more, around


def table(reports):
    lines = [f"mrad, mean over joints and {len(reports)} hands, 95 % over hands; in brackets more "
             f"than '{BOX}'"]
    for error, title in zip(ERRORS, ("after one step", "after 0.5 s, open loop")):
        lines += ["", f"{title:<28}{'the box':>28}{'the task':>32}"]
        for name in reports[0]:
            cells = ("{:7.2f} +-{:5.2f} ({:+6.2f} +-{:5.2f})".format(
                *over_hands(reports, name, of, error)) for of in SETS)
            lines.append(f"  {name:<26}" + "  ".join(cells))
    return "\n".join(lines)


def draw(reports, path):
    """Left the amount of data, right everything else: the task, 0.5 s in the open loop."""
    figure, (left, right) = sim.subplots(1, 2, figsize=(12, 4), width_ratios=(2, 3))
    minutes = {f"box, {m} min": m for m in (3, 6, 12, 24)}
    for of in SETS:
        points = [over_hands(reports, name, of, "open")[:2] for name in minutes]
        left.errorbar(list(minutes.values()), *zip(*points), capsize=3, marker="o",
                      label=f"the {of}")
    left.set(xscale="log", xlabel="minutes in the box", ylabel="mrad after 0.5 s, open loop")
    left.set_xticks(list(minutes.values()), list(map(str, minutes.values())))
    left.minorticks_off()
    left.legend(fontsize=8)
    names = [name for name in reports[0] if name not in minutes or name == BOX][::-1]
    points = [over_hands(reports, name, "task", "open")[:2] for name in names]
    means, halves = zip(*points)
    right.barh(names, means, xerr=halves, capsize=3, color=[
        "tab:orange" if name == BOX else "0.7" for name in names])
    right.set_xlabel("the task: mrad after 0.5 s, open loop")
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
