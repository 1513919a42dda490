"""Where it breaks: virtual hands with a fault, or with an object, beyond all that training draws.

    python tests/limits.py --hands 0 1 2 3 4         # 8 minutes on 2 cores

Everything that is foreign anyway stays so; each row changes one thing more. The same trials in each
row. With DATA/simK-ndm/residual.pt of a hand, which tests/study.py fits to the hand as it was
before the change, the policy is also measured with that correction.

reads   POLICY, DATA/simK-ndm/residual.pt
writes  RESULTS/limits.json, one number for each change, metric and hand
"""
import argparse
import itertools
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import deploy
import hand as H
import sim
import tables
import train_policy

FIRST = np.array(H.FINGER) == H.FINGERS[0]
# XC330-M288 instead of XL330-M288, by its stall torque and current at 5 V: stronger, and as fast
STRONG = {"KT": np.where(FIRST, 0.93 / 1.8, H.KT), "RESISTANCE": np.where(FIRST, 2.8, H.RESISTANCE),
          "CURRENT": np.where(FIRST, 0.550, H.CURRENT)}
LIMP = {"CURRENT": np.where(FIRST, H.CURRENT / 2, H.CURRENT)}
# what is changed in the table of the hand, and in the trial
CHANGES = {
    "as it is": ({}, {}),
    "2 degrees of play": ({"BACKLASH": (2.0, 2.0)}, {}),
    "4 degrees of play": ({"BACKLASH": (4.0, 4.0)}, {}),
    "gears rub twice as much": ({"RUB": 2 * H.RUB, "LOAD": 2 * H.LOAD}, {}),
    "first finger XC330": (STRONG, {}),
    "first finger half as strong": (LIMP, {}),
    "supply of 4.2 V": ({"SUPPLY": 4.2, "SAG": (0.0, 0.0)}, {}),
    "object of 100 g": ({}, {"mass": 0.1}),
    "object of 200 g": ({}, {"mass": 0.2}),
    "friction 0.3": ({}, {"friction": 0.3}),
}


def episode(job):
    """(rad, s) of one trial on a changed hand, in a worker process."""
    name, port, policy, residual, trial = job
    table, task = CHANGES[name]
    args = argparse.Namespace(port=port, policy=policy, record=None)
    with mock.patch.dict(vars(H), table):
        result = deploy.measured_episode((args, trial._replace(**task), residual, 0, None))
    return [result[metric][0] / unit for metric, unit in tables.UNITS.items()]


def measured(args):
    """{change: {"alone" or "corrected": [[rad, s] of each hand]}}"""
    _, content = train_policy.load_policy(args.policy)
    objects = sim.objects_of("+".join(content["families"]))
    trials = [trial for wrist in content["wrists"] for trial in sim.trials(
        objects, wrist, content["axes"], args.episodes, args.seed)]
    residuals = {k: args.data / f"sim{k}-ndm" / "residual.pt" for k in args.hands}
    kinds = {"alone": dict.fromkeys(args.hands)}
    if all(path.exists() for path in residuals.values()):
        kinds["corrected"] = residuals
    rows = list(itertools.product(CHANGES, kinds, args.hands))
    found = {name: {kind: [] for kind in kinds} for name in CHANGES}
    bar = sim.Progress("limits", len(rows), " hands")
    with deploy.processes(args.workers) as pool:
        for done, (name, kind, k) in enumerate(rows):
            job = name, f"sim:{k}", args.policy, kinds[kind][k]
            mean = np.mean(list(pool.map(episode, [(*job, trial) for trial in trials])), 0)
            found[name][kind].append(mean.tolist())
            bar(done + 1, f"{name}, sim:{k} {kind}: {mean[0]:.1f} rad, {mean[1]:.1f} s")
    return found


def table(found):
    """Lines: mean over hands and its 95 % interval."""
    kinds = list(found["as it is"])
    lines = [f"{'':<28}" + "".join(f"{f'{kind}, rad':>16}{'s':>16}" for kind in kinds)]
    for name, of in found.items():
        columns = np.concatenate([of[kind] for kind in kinds], 1)
        lines.append(f"{name:<28}" + tables.means(columns, "{:>9.1f} +-{:4.1f}"))
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hands", type=int, nargs="+", default=list(range(10)), help="seeds of virtual hands")
    add("--episodes", type=int, default=15, help="trials a wrist")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count())
    add("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    add("--data", type=Path, default=Path("runs/study"))
    add("--results", type=Path, default=Path("results/study"))
    args = parser.parse_args()
    found = measured(args)
    H.save_json(args.results / "limits.json", found)
    print("\n".join(table(found)))


if __name__ == "__main__":
    H.run(main)
