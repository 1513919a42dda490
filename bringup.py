"""From the cable to a working hand: `python hand.py --check [--port P] [--yes] [--out DIR]`

One line for each thing that is right; the first that is wrong ends the check with what to do about it and exit status 2.
First what can be seen without moving (`DynamixelHand.bring_up`, the same checks that every script makes). Then, after a yes, with soft
motors: each joint moved a little by itself, and each pressed gently against its lower mechanical stop, which the table of hand.py
knows, so that the zero is found without any instrument. Writes `calibration.json`, which the driver reads, and `check.png`.

Mount the hand so that nothing is within reach of the fingers, also behind them: they bend back 20 degrees.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from dynamixel import CALIBRATION, COUNT, DynamixelHand, motors
from hand import CONTROL_HZ, HAND, HIGH, JOINTS, LOW, MOTOR_ID, SIGN, ZERO, N, Problem

SOFT = 250                 # mA, goal current during the check: 0.09 N m, enough to lift a finger, too little to hurt one
NUDGE = 0.15               # rad, how far each joint is moved by itself
BEND = 1.4                 # rad, of the base joints while the side joints are pressed: a bent finger swings clear of its neighbours
FINE = 0.12                # rad: a stop this close to the table's is a zero offset; further away something is mounted wrongly
FINGER_ORDER = "index, middle, ring (each: base, side, middle, tip), then thumb"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="hand.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", required=True, help="walk from the cable to a working hand")
    parser.add_argument("--port", default="auto", help="serial device, or auto")
    parser.add_argument("--yes", action="store_true", help="answer every question with yes")
    parser.add_argument("--out", default="out", help="folder for check.png")
    parser.add_argument("--calibration", default=str(CALIBRATION), help="file for the zero offsets")
    args = parser.parse_args(argv)

    def agree(question):
        if args.yes:
            return True
        print(f"{question} [y/N] ", end="", flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    passed = lambda line: print(f"ok  {line}", flush=True)
    for folder in (Path(args.out), Path(args.calibration).parent):       # now, not after a minute of moving
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            raise Problem(f"cannot write to {folder}: {error.strerror}")
    with DynamixelHand(args.port, args.calibration, agree=lambda text: agree(f"{text}. Set it?"), passed=passed) as hand:
        if not agree(f"Each joint will now move, softly: {FINGER_ORDER}. Is the space around the fingers free?"):
            print("not moved; everything that can be checked without moving is right")
            return 0
        hand._set(102, 2, SOFT, name="goal current")
        trace = []                                       # (target, q) of every tick
        moved, others, segments = nudge_each(hand, trace)
        judge_nudges(moved, others)
        passed("movement     every joint moves, and only that one")
        if not args.yes and not agree(f"Was that, in this order, {FINGER_ORDER}, each bending towards the palm or back from it?"):
            raise Problem("joints move in the wrong order: motor ids are swapped; set them with Dynamixel Wizard (id = 4 x finger "
                          "+ side 0, base 1, middle 2, tip 3; thumb 12-15)")
        hand.move_to(np.zeros(N))
        stops = find_stops(hand, trace)
        hand.move_to(np.zeros(N))
        hand.rest()
        offset = stops - LOW
        table(moved, others, stops, offset)
        picture(trace, segments, Path(args.out) / "check.png")
        judge_stops(stops, offset)
        passed(f"zeros        within {np.rad2deg(np.abs(offset).max()):.1f} degrees of the table")
        save(args.calibration, hand.offset + offset)
        print(f"zero offsets written to {args.calibration}, picture to {Path(args.out) / 'check.png'}")
        return 0


def tick(hand, target, trace):
    """One command and, a control tick later, q."""
    sent = hand.command(target)
    hand.tick()
    q = hand.read().q
    trace.append((sent, q))
    return q


def nudge_each(hand, trace):
    """Move every joint by itself. Returns the share of NUDGE that it moved (16,), the most that any other joint moved (16,) rad,
    and where each joint's part of the trace lies."""
    moved, others, segments = np.zeros(N), np.zeros(N), []
    rest = np.clip(hand.read().q, LOW, HIGH)
    for _ in range(8):                                   # motors take up their load before we look
        tick(hand, rest, trace)
    for j in range(N):
        step = np.zeros(N)
        step[j] = NUDGE if rest[j] < (LOW[j] + HIGH[j]) / 2 else -NUDGE
        start, before = len(trace), hand.read().q
        for share in (1 / 3, 2 / 3, 1, 1, 1, 1, 1):
            after = tick(hand, rest + share * step, trace)
        change = after - before
        moved[j] = change[j] / step[j]
        others[j] = np.abs(np.delete(change, j)).max()
        for share in (1 / 2, 0, 0, 0):
            tick(hand, rest + share * step, trace)
        segments.append(slice(start, len(trace)))
    return moved, others, segments


def judge_nudges(moved, others):
    drawn = np.flatnonzero(others > 0.3 * NUDGE)
    if len(drawn):
        raise Problem(f"{motors(MOTOR_ID[j] for j in drawn)}: moving it moves another joint by "
                      f"{np.rad2deg(others[drawn[0]]):.0f} degrees: a cable that pulls, or fingers that touch")
    still = np.flatnonzero(np.abs(moved) < 0.4)
    if len(still):
        raise Problem(f"{motors(MOTOR_ID[j] for j in still)}: does not move when told to ({100 * moved[still[0]]:.0f} % of the "
                      "way): jammed joint, something in its way, or a horn screw too tight")
    back = np.flatnonzero(moved < 0)
    if len(back):
        raise Problem(f"{motors(MOTOR_ID[j] for j in back)}: moves the wrong way: SIGN in the table of hand.py")


def find_stops(hand, trace):
    """Press every joint gently against its lower stop; q there (16,) rad. The same joint of all four fingers at once."""
    stops = np.zeros(N)
    for k in range(4):
        these = np.arange(k, N, 4)
        pose = np.zeros(N)
        if k == 1:
            pose[0:12:4] = BEND
            hand.move_to(pose)
        goal, q = hand.target.copy(), hand.read().q
        goal[these] = q[these]
        end = np.minimum(LOW - 1.75, -HIGH - 0.2)        # far enough to see a joint that is mirrored or turned by 90 degrees
        still = np.zeros(N, int)                         # ticks at rest although the goal is far away
        while any((still[j] < 4) and goal[j] > end[j] for j in these):
            last = q
            for j in these:
                goal[j] = max(goal[j] - 0.05, end[j], q[j] - 0.3)
            hand._tell(116, 4, np.rint((ZERO + hand.offset + SIGN * goal) / COUNT))     # beyond the limits: the only place, and soft
            hand.tick()
            q = hand.read().q
            trace.append((goal.copy(), q))
            still = np.where((q - goal > 0.2) & (np.abs(q - last) < 0.01), still + 1, 0)
        stops[these] = np.where(still[these] >= 4, q[these], np.nan)
        hand.target = np.clip(q, LOW, HIGH)
        hand.move_to(np.zeros(N))
    return stops


def judge_stops(stops, offset):
    """One clear line about the first joint whose stop is not where the table has it."""
    wrong = np.flatnonzero(~(np.abs(offset) <= FINE))
    if not len(wrong):
        return
    j = wrong[0]
    who, near = motors([MOTOR_ID[j]]), lambda a, b: abs(a - b) < 0.08
    partner = [k for k in wrong if k != j and near(stops[j], LOW[k]) and near(stops[k], LOW[j])]
    if np.isnan(stops[j]):
        raise Problem(f"{who}: turns without end: the horn screw is missing, or the finger is not attached to it")
    if partner:
        raise Problem(f"{who} and {motors([MOTOR_ID[partner[0]]])} are swapped: exchange their ids with Dynamixel Wizard")
    if near(abs(offset[j]), np.pi / 2):
        raise Problem(f"{who}: mounted {np.rad2deg(offset[j]):+.0f} degrees off: take the part off the horn and turn it by 90 degrees")
    if near(stops[j], -HIGH[j]):
        raise Problem(f"{who}: turns the wrong way: motor mounted mirrored, or SIGN in the table of hand.py")
    raise Problem(f"{who}: lower stop at {np.rad2deg(stops[j]):.0f} degrees, expected {np.rad2deg(LOW[j]):.0f}: horn mounted "
                  f"{np.rad2deg(offset[j]):+.0f} degrees off (a tooth or more), or something blocks the joint"
                  + (f"; {len(wrong) - 1} more like this" if len(wrong) > 1 else ""))


def table(moved, others, stops, offset):
    print(f"\n{'joint':8} motor  moved  others move  lower stop  table  offset")
    for j, joint in enumerate(JOINTS):
        other, stop, low, zero = np.rad2deg([others[j], stops[j], LOW[j], offset[j]])
        print(f"{joint.name:8} {joint.motor_id:5}  {100 * moved[j]:4.0f} %  {other:7.1f} deg  {stop:6.1f} deg  {low:5.1f}  {zero:+6.1f}")
    print()


def picture(trace, segments, path):
    """Command against measurement of each joint while it moved alone."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    target, q = (np.rad2deg([t[k] for t in trace]) for k in (0, 1))
    fig, axes = plt.subplots(4, 4, figsize=(11, 8), sharex=True, constrained_layout=True)
    for j, (ax, part) in enumerate(zip(axes.flat, segments)):
        t = np.arange(part.stop - part.start) / CONTROL_HZ
        ax.plot(t, target[part, j], label="command")
        ax.plot(t, q[part, j], label="measured")
        ax.set_title(f"{JOINTS[j].name} (motor {MOTOR_ID[j]})", fontsize=9)
    axes[0, 0].legend(fontsize=8)
    fig.supxlabel("s")
    fig.supylabel("degrees")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def save(path, offset):
    """Whole or not at all."""
    text = json.dumps({"hand": HAND, "offset": {j.name: round(float(o), 5) for j, o in zip(JOINTS, offset)}}, indent=1)
    Path(f"{path}.part").write_text(text + "\n")
    os.replace(f"{path}.part", path)
