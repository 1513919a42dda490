"""The whole loop on many virtual hands, and how much of the gap it closes on each.

    python tests/study.py --hands 0 1 2 3 4 5 6 7 8 9              # 5 min a hand on 2 cores

For each hand: collect.py in its Chaos Box at every wrist, `deploy.py --base --record` of the task,
fit_ndm.py, and `deploy.py --compare` on trials that none of these saw; just the scripts, as anyone
would call them. Stopped and run again it goes on with what is missing, of trajectories too.

reads   checkpoints/policy.pt
writes  OUT/simK-*       data, models and residual of each hand
        RESULTS/simK.json, RESULTS/gap.png
"""
import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import hand as H
import tables
import train_policy

RECORDED, COMPARED = 1, 0                # seeds of the trials: what is recorded is no test


def run(script, *words):
    """One of the scripts, to its end; its messages are its own."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    status = subprocess.run(command).returncode
    if status:
        raise H.Problem(f"{script} ended with status {status}; run this again to go on from there")


def study(k, args, wrists):
    """The loop on the virtual hand sim:k. Returns the file with its numbers."""
    result = args.results / f"sim{k}.json"
    if result.exists():
        return result
    port, policy = f"sim:{k}", args.policy
    boxes = [args.out / f"sim{k}-{wrist}" for wrist in wrists]
    for wrist, folder in zip(wrists, boxes):
        run("collect.py", "--port", port, "--policy", policy, "--wrist", wrist,
            "--hours", args.hours / len(wrists), "--out", folder)
    task, fitted = (args.out / f"sim{k}-{name}" for name in ("task", "ndm"))
    if not (fitted / "residual.pt").exists():            # and so what was recorded is whole
        if args.recorded:
            run("deploy.py", "--base", "--port", port, "--policy", policy, "--wrist", *wrists,
                "--episodes", args.recorded, "--seed", RECORDED, "--record", task)
        run("fit_ndm.py", "--data", *boxes, *[task] * bool(args.recorded), "--policy", policy,
            "--out", fitted)
    run("deploy.py", "--compare", "--port", port, "--policy", policy, "--wrist", *wrists,
        "--residual", fitted / "residual.pt", "--episodes", args.episodes, "--seed", COMPARED,
        "--json", result)
    return result


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hands", type=int, nargs="+", default=list(range(10)), help="seeds of virtual hands")
    add("--hours", type=float, default=0.4, help="in the Chaos Box, all wrists together")
    add("--recorded", type=int, default=40, help="trials of the task a wrist; 0: the box alone")
    add("--episodes", type=int, default=40, help="trials a wrist that are compared")
    add("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    add("--out", type=Path, default=Path("runs/study"))
    add("--results", type=Path, default=Path("results/study"))
    args = parser.parse_args()
    wrists = train_policy.load_policy(args.policy)[1]["wrists"]
    files = [study(k, args, wrists) for k in args.hands]
    reports = tables.read_gaps(files)
    print("\n".join(tables.gap_table(reports)))
    tables.draw_gaps(reports, args.results / "gap.png")


if __name__ == "__main__":
    H.run(main)
