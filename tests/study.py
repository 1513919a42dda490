"""The whole loop on many virtual hands, and how much of the gap it closes on each.

    python tests/study.py --hands 0 1 2 3 4 5 6 7 8 9       # 12 min a hand on 2 slow cores
    python tests/study.py --hands 0 1 2 3 4 --apart     # 4 min more a hand: what costs how much
    python tests/study.py --hands 0 1 2 3 4 --rivals    # residuals through other models

For each hand: collect.py in its Chaos Box at every wrist, `deploy.py --base --record` of the task,
fit_ndm.py, and `deploy.py --compare` on trials that none of these saw; just the scripts, as anyone
would call them. Stopped and run again it goes on with what is missing, of trajectories too.
--apart measures policy and residual also where only one thing of the hand differs from the training
simulator, or all but its motors. --rivals measures, on the same trials, residuals that were trained
in the same way and on the same data through one model for each finger, and one for the whole hand.

reads   checkpoints/policy.pt
writes  OUT/simK-*       data, models and residual of each hand
        RESULTS/simK.json, RESULTS/simK-PART.json, RESULTS/simK-RIVAL.json, RESULTS/gap.png
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import hand as H
import tables
import train_policy

RECORDED, COMPARED = 1, 0                # seeds of the trials: what is recorded is no test
PARTS = "motor", "shape", "contact", "object", "wrist", "shape+contact+object+wrist"
RIVALS = "finger", "whole"


def run(script, *words):
    """One of the scripts, to its end; its messages are its own."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    status = subprocess.run(command).returncode
    if status:
        raise H.Problem(f"{script} ended with status {status}; run this again to go on from there")


def study(k, args, wrists):
    """The loop on the virtual hand sim:k. Returns the files with its numbers: the method's, and
    those of its rivals."""
    fitted, results, residuals = args.out / f"sim{k}-ndm", {}, {}
    for kind in ("joint", *(RIVALS if args.rivals else ())):
        suffix = "" if kind == "joint" else f"-{kind}"
        results[kind] = args.results / f"sim{k}{suffix}.json"
        residuals[kind] = fitted / f"residual{suffix}.pt"
    missing = [kind for kind, result in results.items() if not result.exists()]
    asked = {"policy": train_policy.digest(args.policy), "episodes": args.episodes}
    for kind in results.keys() - missing:
        report = json.loads(results[kind].read_text())
        if any(report[name] != value for name, value in asked.items()):
            raise H.Problem(f"{results[kind]} is of another policy, or of other --episodes: delete "
                            "it, or name other --results")
    unfitted = [kind for kind in missing if not residuals[kind].exists()]
    if unfitted:
        fit(k, args, wrists, fitted, unfitted)
    for kind in missing:
        compare(f"sim:{k}", args, wrists, residuals[kind], results[kind])
    return list(results.values())


def fit(k, args, wrists, fitted, kinds):
    """Collect in the box, record the task, and learn from both."""
    port, policy = f"sim:{k}", args.policy
    boxes, task = [args.out / f"sim{k}-{wrist}" for wrist in wrists], args.out / f"sim{k}-task"
    for wrist, folder in zip(wrists, boxes):
        run("collect.py", "--port", port, "--policy", policy, "--wrist", wrist,
            "--hours", args.hours / len(wrists), "--out", folder)
    if args.recorded:
        run("deploy.py", "--base", "--port", port, "--policy", policy, "--wrist", *wrists,
            "--episodes", args.recorded, "--seed", RECORDED, "--record", task)
    run("fit_ndm.py", "--data", *boxes, *[task] * bool(args.recorded), "--policy", policy,
        "--models", *kinds, "--out", fitted)


def compare(port, args, wrists, residual, result):
    run("deploy.py", "--compare", "--port", port, "--policy", args.policy, "--wrist", *wrists,
        "--residual", residual, "--episodes", args.episodes, "--seed", COMPARED, "--json", result)


def take_apart(args, wrists):
    """The lines of a table: over hands, what each part of the difference costs by itself."""
    lines = [f"{'mean, 95 % +-':<29}" + "".join(
        f"{f'{name}, {unit}':>17}" for unit in ("rad", "s") for name in tables.KINDS)]
    for part in ("everything", *PARTS):
        files = []
        for k in args.hands:
            # with everything foreign it is what `study` has measured
            name = f"sim{k}" if part == "everything" else f"sim{k}-{part}"
            files.append(args.results / f"{name}.json")
            if not files[-1].exists():
                residual = args.out / f"sim{k}-ndm" / "residual.pt"
                compare(f"sim:{k}:{part}", args, wrists, residual, files[-1])
        rows = [tables.gap_row(report) for report in tables.read_gaps(files)]
        columns = np.delete(rows, 3, 1)[:, :6]           # without the gain
        lines.append(f"{part:<29}" + tables.means(columns, "{:>9.1f} +-{:4.1f}"))
    return lines


def rivals_table(files):
    """The lines of a table, from the files (hands, 1 + rivals) of `study`: over hands, what each
    residual turns and holds more than none, and turns more than the joint-wise one."""
    rows = np.array([[tables.gap_row(report) for report in tables.read_gaps(hand)]
                     for hand in files])
    gain, held = rows[..., 3], rows[..., 6] - rows[..., 5]
    heads = "gain, rad", "held, s", "against joint"
    lines = ["mean, 95 %  " + "".join(f"{head:>16}" for head in heads)]
    for n, kind in enumerate(("joint", *RIVALS)):
        columns = np.stack([gain[:, n], held[:, n], gain[:, n] - gain[:, 0]], 1)
        lines.append(f"{kind:<12}" + tables.means(columns, "{:>8.2f} +-{:5.2f}"))
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hands", type=int, nargs="+", default=list(range(10)), help="seeds of virtual hands")
    add("--hours", type=float, default=0.4, help="in the Chaos Box, all wrists together")
    add("--recorded", type=int, default=40, help="trials of the task a wrist; 0: the box alone")
    add("--episodes", type=int, default=40, help="trials a wrist that are compared")
    add("--apart", action="store_true", help="also what each part of the difference costs")
    add("--rivals", action="store_true", help="also residuals through other models")
    add("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    add("--out", type=Path, default=Path("runs/study"))
    add("--results", type=Path, default=Path("results/study"))
    args = parser.parse_args()
    wrists = train_policy.load_policy(args.policy)[1]["wrists"]
    files = [study(k, args, wrists) for k in args.hands]
    reports = tables.read_gaps([hand[0] for hand in files])
    print("\n".join(tables.gap_table(reports)))
    tables.draw_gaps(reports, args.results / "gap.png")
    if args.rivals:
        print("\n".join(rivals_table(files)))
    if args.apart:
        print("\n".join(take_apart(args, wrists)))


if __name__ == "__main__":
    H.run(main)
