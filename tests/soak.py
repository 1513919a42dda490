"""A night of collection in ten minutes: `python tests/soak.py --minutes 10`

Runs collect.py against an emulated bus in a process of its own that loses 1 % and corrupts 0.5 % of
all packets, with an overload every minute, the adapter unplugged every two, and every one or two
minutes the collection killed (or frozen, then killed) and started again. Shorter runs have the same
number of faults. The second half has motors with the faulty watchdog of firmware 51. Prints what
was finished, lost and seen by the bus; exit status 1 if anything was lost, torn, outside the limits
or too late.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import hand as H

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--minutes", type=float, default=10)
parser.add_argument("--collect", default=str(ROOT / "collect.py"), help="the script under test")
parser.add_argument("--out", help="folder for shards and logs (default: a temporary one)")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

folder = Path(args.out or tempfile.mkdtemp(prefix="soak-")).resolve()
shards = folder / "shards"
shards.mkdir(parents=True, exist_ok=True)
link, control, report = folder / "ttyLEAP", folder / "control", folder / "report.json"
by_motor = [H.JOINTS[k] for k in np.argsort(H.MOTOR_ID)]
(folder / "limits.json").write_text(json.dumps([(j.low, j.high) for j in by_motor]))
rng = np.random.default_rng(args.seed)
LIMIT = 0.3                                      # s with torque on after a kill


def start_bus(faulty):
    limits = folder / "limits.json"
    process = subprocess.Popen([
        sys.executable, ROOT / "tests/emulated_bus.py", "--link", link, "--report", report,
        "--control", control, "--limits", limits, "--stops", limits,
        "--seed", str(args.seed + faulty), "--drop", "0.01", "--drop-request", "0.01",
        "--corrupt", "0.005", "--corrupt-request", "0.005",
        *(["--faulty-watchdog"] if faulty else [])])
    while not report.exists():
        time.sleep(0.05)
    return process


def stop_bus(process):
    """End the bus and return what it saw."""
    process.terminate()
    process.wait(20)
    seen = json.loads(report.read_text())
    report.unlink()
    return seen


def start_collect():
    log = open(folder / "collect.log", "a")
    # waves: which targets are replayed is the same to the bus, and needs no simulation first
    command = [sys.executable, args.collect, "--port", link, "--out", shards, "--source", "waves",
               "--wrist", "palm_up", "--hours", str(args.minutes / 60)]
    return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)


def tell(line):
    os.write(fifo, (line + "\n").encode())


def seen_now():
    return json.loads(report.read_text())


minute = 60 * args.minutes / 10          # s: the schedule is of ten minutes, whatever they last
seen, faults, late = Counter(), Counter(), {}
finished, restarts, kills, died = set(), 0, 0, 0
begin = time.monotonic()
for faulty in (False, True):
    bus = start_bus(faulty)
    fifo = os.open(control, os.O_RDWR | os.O_NONBLOCK)
    if not faulty:
        collect = start_collect()
    start, end = time.monotonic(), begin + 5 * minute * (1 + faulty)
    # the second half has its faults at other moments than the first
    next_overload = start + 0.6 * minute
    next_unplug, next_kill = start + 1.3 * minute, start + 1.7 * minute
    while time.monotonic() < end:
        time.sleep(0.1)
        now = time.monotonic()
        if now > next_overload:
            next_overload += minute
            tell(f"overload {rng.integers(16)}")
        if now > next_unplug:
            next_unplug += 2 * minute
            tell("unplug")
            time.sleep(min(3.0, 0.2 * minute))
            tell("plug")
        if collect.poll() is not None:
            died += collect.returncode not in (0, 2)     # 0: time is up; 2: stopped with a report
            collect, restarts = start_collect(), restarts + 1
        if now > next_kill and seen_now()["any_driving"]:
            next_kill += 1.2 * minute
            how, kills = ("kill", "freeze")[kills % 2], kills + 1
            killed = time.monotonic()
            collect.send_signal(signal.SIGKILL if how == "kill" else signal.SIGSTOP)
            time.sleep(1.0)
            state = seen_now()
            took = 9.9 if state["any_driving"] else max(0.0, state["last_driving"] - killed)
            key = f"{how}, {'faulty' if faulty else 'working'} watchdog"
            late[key] = max(late.get(key, 0.0), took)
            collect.kill()
            collect.wait()
            collect, restarts = start_collect(), restarts + 1
        finished |= {p.name for p in shards.glob("[0-9]*.npz")}
    if faulty:
        collect.terminate()
        collect.wait(30)
        finished |= {p.name for p in shards.glob("[0-9]*.npz")}
    half = stop_bus(bus)
    os.close(fifo)
    faults.update(half["faults"])
    counted = ("packets", "goal_writes", "goals_outside_limits", "watchdog_trips")
    seen.update({name: half[name] for name in counted})

there, torn = {p.name: p for p in shards.glob("[0-9]*.npz")}, []
for name, path in there.items():
    try:
        with np.load(path) as shard:
            numbers = [shard[k] for k in shard.files if shard[k].dtype.kind == "f"]
            assert all(np.isfinite(x).all() for x in numbers)
            assert len(shard["q"]) == len(shard["target"]) == len(shard["time"])
    except Exception as error:
        torn.append(f"{name}: {error!r}")
result = {
    "minutes": round((time.monotonic() - begin) / 60, 2), "finished": len(there),
    "lost": len(finished - set(there)), "torn": torn, "restarts": restarts, "crashes": died,
    "seconds_with_torque_after": {k: round(v, 3) for k, v in sorted(late.items())},
    **seen, "faults": dict(faults), "folder": str(folder)}
print(json.dumps(result, indent=1))
too_late = max(late.values(), default=9.9) > LIMIT
sys.exit(bool(result["lost"] or torn or died or seen["goals_outside_limits"] or not there
              or too_late))
