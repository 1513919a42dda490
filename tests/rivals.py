"""A rival that does not correct the policy but trains it on, for each hand and on the same data.

    python tests/study.py --hands 0 1 2            # first
    python tests/rivals.py --hands 0 1 2           # 8 min, and 12 a hand, on one core

Four ways to drive a virtual hand, on the same trials:

none        the policy alone
residual    the method: the policy and DATA/simK-ndm/residual.pt
delta       in the way of ASAP (arXiv 2502.01143): a delta action, added to the targets of simulated
            joints, makes them answer as this hand's do; with that the policy is fine-tuned in the
            training simulator, motors being the table's otherwise, and drives the hand alone
longer      as much fine-tuning with motors drawn at random, as ever, and nothing of the hand: what
            training longer brings by itself

The delta action is what `fit_ndm.fit_residual` finds where f and f_sim change places. Stopped and
run again it goes on.

reads   POLICY, its oracle beside it, DATA/simK-ndm from study.py
writes  DATA/longer, DATA/simK-delta with the policies; RESULTS/rivals-simK.json
"""
import argparse
import json
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import sim                       # before torch: it sets how torch's threads wait
import torch

import ablations
import deploy
import fit_ndm
import hand as H
import tables
import train_policy
import without

WAYS = "none", "residual", "delta", "longer"


class Shifted(sim.Rotation):
    """The training simulator with joints that are sent more than the policy sends."""
    delta = None                 # a `fit_ndm.Residual`

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.simulator, self.pool = self.pool, self
        self.shift = np.zeros((self.n, H.N))

    @torch.no_grad()
    def step(self, target):
        move = torch.from_numpy(target - self.target).float()
        self.shift = self.delta(self.observe(), move).numpy()
        super().step(target)

    def rollout(self, models, datas, state, control, **options):
        control = control + self.shift[:, None]
        return self.simulator.rollout(models, datas, state, control, **options)


def delta_of(k, args):
    """The delta action (a `fit_ndm.Residual`) that makes simulated joints answer as those of sim:k,
    through the models of both."""
    path = args.data / f"sim{k}-delta" / "delta.pt"
    if not path.exists():
        f_sim = ablations.simulated(["joint"], args)["joint"]
        f, _ = train_policy.load_network(
            args.data / f"sim{k}-ndm" / "dynamics.pt", "dynamics", fit_ndm.Dynamics)
        for model in (f, f_sim):
            model.requires_grad_(False)
        delta = fit_ndm.fit_residual(f_sim, f, fit_ndm.simulated_episodes(args),
                                     args.residual_steps, args.cost, args.seed)
        train_policy.save_checkpoint(
            path, "residual", config=delta.config, weights=delta.state_dict())
    return fit_ndm.load_residual(path)[0]


def policy_of(way, k, args):
    """The file of the policy that drives sim:k in one of WAYS."""
    if way in ("none", "residual"):
        return args.policy
    if way == "longer":
        return without.fine_tuned([], args, args.data / "longer")
    with (mock.patch.object(Shifted, "delta", delta_of(k, args)),
          mock.patch.object(sim, "Rotation", Shifted)):
        return without.fine_tuned(["motor", "delay"], args, args.data / f"sim{k}-delta")


def measured(k, args):
    """{way: {"RotR": (n,), "TTF": (n,)}} in rad and s, all wrists together."""
    _, content = train_policy.load_policy(args.policy)
    objects, wrists = sim.objects_of("+".join(content["families"])), content["wrists"]
    found = {}
    for way in WAYS:
        residual = args.data / f"sim{k}-ndm" / "residual.pt" if way == "residual" else None
        policy = policy_of(way, k, args)
        with deploy.processes(args.workers) as pool:
            parts = [without.on_the_hand(
                pool, k, policy, wrists, wrist,
                sim.trials(objects, wrist, content["axes"], args.trials, args.seed), residual)
                for wrist in wrists]
        found[way] = {metric: np.concatenate([part[metric] for part in parts]) / unit
                      for metric, unit in tables.UNITS.items()}
    return found


def table(reports):
    """Lines, from the file's content of each hand: means over hands, and the 95 % interval of what
    is gained over none."""
    lines = [f"{'hands: ' + str(len(reports)):<12}{'turned, rad':>15}{'TTF, s':>11}"
             f"{'gain, rad':>17}{'gain, s':>17}"]
    rows = {way: np.array([[report[way][metric] for metric in tables.UNITS] for report in reports])
            for way in WAYS}
    for way, numbers in rows.items():
        turned, held = numbers.mean(0)
        gains = tables.means(numbers - rows["none"], "{:>9.2f} +-{:5.2f}")
        lines.append(f"{way:<12}{turned:>15.2f}{held:>11.1f}{gains}")
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hands", type=int, nargs="+", default=list(range(10)), help="seeds of virtual hands")
    add("--trials", type=int, default=40, help="a wrist")
    add("--fine-tune", type=float, default=7.5e5, help="control steps")
    add("--envs", type=int, default=train_policy.ENVS)
    add("--steps", type=int, default=8000, help="gradient steps of f_sim")
    add("--residual-steps", type=int, default=1200, help="of the delta action")
    add("--episodes", type=int, default=192, help="simulated episodes of the policy")
    add("--cost", type=float, default=0.1, help="price of the delta action")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--seed", type=int, default=0)
    add("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    add("--data", type=Path, default=Path("runs/study"))
    add("--results", type=Path, default=Path("results/study"))
    args = parser.parse_args()
    files = [args.results / f"rivals-sim{k}.json" for k in args.hands]
    for k, file in zip(args.hands, files):
        if not file.exists():
            H.save_json(file, {way: {metric: float(values.mean()) for metric, values in of.items()}
                               for way, of in measured(k, args).items()})
    print("\n".join(table([json.loads(file.read_text()) for file in files])))


if __name__ == "__main__":
    H.run(main)
