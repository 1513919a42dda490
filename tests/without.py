"""What each kind of randomisation in training costs at home and buys abroad.

    python tests/without.py                      # 11 runs, each some 10 minutes of one core
    python tests/without.py --kinds motor delay  # these; in a second terminal: others

The policy is fine-tuned on, as train_policy.py does it: with everything randomised, and without
each kind. Then all of these are measured on the same trials, at home (the training simulator with
the paper's randomisation) and abroad (virtual hands that differ in everything, alone). Printed is
what is gained by leaving the kind out, and the standard error of that over trials; one training
each. Stopped and run again it goes on.

reads   POLICY, and beside it the oracle of its last family, whose critic fine-tuning begins with
writes  OUT/without-KIND/ with the fine-tuned policy and trials.npz
"""
import argparse
import functools
import os
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import sim
import deploy
import hand as H
import tables
import train_policy

NOTHING = "nothing"              # is left out
HOME, ABROAD = 1, 2              # seeds of the trials


def fine_tuned(left_out, args, out):
    """The policy after --fine-tune steps more without some kinds of randomisation; the file it is
    in."""
    own = out / "policy.pt"
    if not own.exists():
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(args.policy, own)
    student, content = train_policy.load_policy(own)
    critic = args.policy.with_name(f"oracle-{content['families'][-1]}.pt")
    weights = train_policy.load_checkpoint(critic, "oracle")["weights"]
    oracle = train_policy.Oracle(len(weights["norm.mean"]))
    oracle.load_state_dict(weights)
    train_policy.fine_tune(student, oracle, argparse.Namespace(
        family=content["families"], wrist=content["wrists"], axis=content["axes"],
        randomize=[kind for kind in sim.EVERYTHING if kind not in left_out], envs=args.envs,
        seed=args.seed, out=out, fine_tune=args.fine_tune, minutes=np.inf))
    return own


def measured(path, args):
    """{"home RotR palm_up": (n,), ...} on trials that are the same for every policy."""
    policy, content = train_policy.load_policy(path)
    wrists, axes, found = content["wrists"], content["axes"], {}
    objects = sim.objects_of("+".join(content["families"]))
    with deploy.processes(args.workers) as pool:
        for wrist in wrists:
            trials = sim.trials(objects, wrist, axes, args.home, HOME)
            env = sim.Rotation(args.home, objects, [wrist], axes, seed=HOME)
            home = sim.run_episodes(env, functools.partial(train_policy.act, policy), trials=trials)
            trials = sim.trials(objects, wrist, axes, args.abroad, ABROAD)
            abroad = [on_the_hand(pool, k, path, wrists, wrist, trials) for k in args.hands]
            for metric in tables.UNITS:
                found[f"home {metric} {wrist}"] = home[metric]
                found[f"abroad {metric} {wrist}"] = np.concatenate([one[metric] for one in abroad])
    return found


def on_the_hand(pool, k, policy, wrists, wrist, trials, residual=None):
    """The trials of one of `wrists` on sim:k, by the policy (a file), see `deploy.on_the_hand`."""
    args = argparse.Namespace(port=f"sim:{k}", policy=policy, wrist=wrists, base=not residual,
                              gif=None, record=None)
    return deploy.on_the_hand(pool, args, wrist, trials, residual)


def table(results):
    """Lines, from {kind that was left out: what `measured` returned}; all wrists together."""
    columns = [(place, metric) for place in ("home", "abroad") for metric in tables.UNITS]
    mean = {column: together(results[NOTHING], *column) for column in columns}
    lines = [f"{'left out':<12}" + "".join(f"{f'{place}, {unit}':>15}" for place in
                                           ("home", "abroad") for unit in ("rad", "s")),
             f"{NOTHING:<12}" + "".join(f"{mean[column].mean():>15.1f}" for column in columns)]
    for kind, result in results.items():
        if kind == NOTHING:
            continue
        line = f"{kind:<12}"
        for column in columns:
            gain = together(result, *column) - mean[column]
            line += f"{gain.mean():>+9.1f} ({gain.std(ddof=1) / len(gain) ** 0.5:.1f})"
        lines.append(line)
    return lines


def together(result, place, metric):
    """Radians, or seconds, of all trials at a place."""
    return np.concatenate([values / tables.UNITS[metric] for name, values in result.items()
                           if name.startswith(f"{place} {metric}")])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, kinds = parser.add_argument, (NOTHING, *sim.EVERYTHING)
    add("--kinds", nargs="+", default=kinds, choices=kinds, help="what is left out, one at a time")
    add("--fine-tune", type=float, default=7.5e5, help="control steps")
    add("--envs", type=int, default=train_policy.ENVS)
    add("--home", type=int, default=195, help="trials a wrist")
    add("--hands", type=int, nargs="+", default=list(range(100, 106)), help="virtual hands")
    add("--abroad", type=int, default=15, help="trials a wrist and hand")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--seed", type=int, default=0)
    add("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    add("--out", type=Path, default=Path("runs/without"))
    args = parser.parse_args()
    for kind in args.kinds:
        out = args.out / f"without-{kind}"
        if not (out / "trials.npz").exists():
            sim.save_npz(out / "trials.npz", **measured(fine_tuned([kind], args, out), args))
    found = {kind: args.out / f"without-{kind}" / "trials.npz" for kind in kinds}
    results = {kind: sim.load_npz(path) for kind, path in found.items() if path.exists()}
    if NOTHING in results:
        print("\n".join(table(results)))


if __name__ == "__main__":
    H.run(main)
