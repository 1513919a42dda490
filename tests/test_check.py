"""`hand.py --check` on hands with mass, width, friction and play, mounted in any direction.

    python tests/test_check.py --all       # 20 hands x 6 mountings, and everything broken: a table

A healthy hand must not be accused, whichever way it hangs, and what is wrong must be named.
"""
import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import hand as H
from hand_on_the_bus import GRAVITY, Clock, PhysicalBus, in_process

TOOTH = 4096 // 25                               # counts, of a spline of 25 teeth


def check(bus, *options):
    """Run it. (None or the line that tells what is wrong, offsets found or None)."""
    with tempfile.TemporaryDirectory() as folder, in_process(bus):
        path = Path(folder) / "calibration.json"
        problem = None
        try:
            H.check(["--check", "--port", bus.path, "--calibration", str(path), *options])
        except H.Problem as error:
            problem = str(error)
        return problem, H.load_calibration(path) if path.exists() else None


def healthy(seed, wrist):
    """(problem, largest error of a zero in degrees)."""
    bus = PhysicalBus(Clock(), seed, wrist)
    true = np.array([bus.motors[i].joint.zero_offset for i in H.MOTOR_ID]) * H.COUNT
    problem, found = check(bus, "--yes")
    assert not driving(bus)
    return problem, np.inf if found is None else np.rad2deg(np.abs(found - true).max())


def driving(bus):
    return any(motor.driving for motor in bus.motors.values())


# ------------------------------------------------------------------------- what can be wrong
def jammed(motor):
    return lambda bus: bus.stuck(motor)


def mirrored(motor):
    return lambda bus: bus.sign(motor, -1)


def swapped(one, other):
    return lambda bus: bus.swap(one, other)


def horn(motor, counts):
    """The horn sits on the spline `counts` further than on a healthy hand."""
    return lambda bus: bus.zero_offset(motor, bus.motors[motor].joint.zero_offset + counts)


def loose(motor):
    """No finger on the horn: the motor turns freely and the finger hangs."""
    def spoil(bus):
        bus.physics.loose.add(motor)
        bus.motors[motor].joint.stops = (-99, 99)
    return spoil


def blocked(motor, low, high):
    """Something is in the way: the joint only moves between low and high (rad)."""
    def spoil(bus):
        name = H.JOINTS[H.MOTOR_ID.index(motor)].name
        model = bus.physics.model
        model.tendon_range[model.tendon(f"{name}_stop").id] = low, high
    return spoil


def nothing(bus):
    pass


def far(motor):
    """A horn a tooth off is named by where its joint stops, or already by what it reads at rest."""
    joint = next(joint for joint in H.JOINTS if joint.motor_id == motor)
    return f"motor {motor} ({joint.name}): "


# name: (what is done, words of the message, links bound together, also in the suite with this wrist)
BROKEN = {
    "base jammed": (jammed(5), "motor 5 (mf_mcp): does not move", None, None),
    "side jammed": (jammed(0), "motor 0 (if_rot): does not move", None, None),
    "middle jammed": (jammed(10), "motor 10 (rf_pip): does not move", None, "palm_down"),
    "tip jammed": (jammed(3), "motor 3 (if_dip): does not move", None, None),
    "thumb jammed": (jammed(12), "motor 12 (th_cmc): does not move", None, None),
    "base mirrored": (mirrored(5), "motor 5 (mf_mcp): .*wrong way", None, None),
    "middle mirrored": (mirrored(2), "motor 2 (if_pip): .*wrong way", None, "palm_up"),
    "tip mirrored": (mirrored(11), "motor 11 (rf_dip): .*wrong way", None, None),
    "thumb mirrored": (mirrored(13), "motor 13 (th_axl): .*wrong way", None, None),
    "side, middle swapped": (swapped(8, 10), "swapped",
                             None, "thumb_up"),
    "base, side swapped": (swapped(1, 0), "swapped", None, None),
    "base, middle swapped": (swapped(5, 6), "swapped with motor 5 (mf_mcp)", None, None),
    "middle, tip swapped": (swapped(2, 3), "motor 2 (if_pip): .*swapped with motor 3 (if_dip)", None, None),
    **{f"{H.JOINTS[H.MOTOR_ID.index(motor)].name} {sign:+d} tooth": (
        horn(motor, sign * TOOTH), far(motor), None, "base_down" if motor == 5 else None)
       for motor in (5, 4, 6, 7, 12, 13, 14, 15) for sign in (1, -1)},
    "thumb +90 degrees": (horn(12, 1024), "motor 12 (th_cmc): .*by 90 degrees", None, "base_up"),
    "thumb -90 degrees": (horn(12, -1024), "motor 12 (th_cmc): ", None, None),
    "thumb's second +90": (horn(13, 1024), "motor 13 (th_axl): .*by 90 degrees", None, None),
    "no base on the horn": (loose(5), "motor 5 (mf_mcp): turns without end", None, None),
    "no tip on the horn": (loose(3), "motor 3 (if_dip): turns without end", None, None),
    "no thumb tip on the horn": (loose(15), "motor 15 (th_ipl): turns without end", None, "thumb_down"),
    "a string round two fingers": (nothing, "moves another finger's joint", ("string", "if_md", "mf_md"),
                                   "palm_down"),
    "two fingers taped together": (nothing, "moves another finger's joint", ("tape", "mf_ds", "rf_ds"), None),
    "base blocked": (blocked(9, 0.1, 2.2), "motor 9 (rf_mcp): lower stop at", None, None),
    "middle blocked": (blocked(6, -0.5, 1.6), "motor 6 (mf_pip): upper stop at", None, None),
}


def spoiled(name, seed, wrist):
    """(is it named?, the line)."""
    spoil, words, bound, _ = BROKEN[name]
    bus = PhysicalBus(Clock(), seed, wrist, bound)
    spoil(bus)
    problem, found = check(bus, "--yes")
    assert not driving(bus) and (problem is None) == (found is not None)
    return problem is not None and all(part in problem for part in words.split(".*")), problem


# ------------------------------------------------------------------------- in the suite: a sample
@pytest.mark.parametrize("wrist", GRAVITY)
def test_a_healthy_hand_is_not_accused_in_any_mounting(wrist):
    problem, error = healthy(0, wrist)
    assert problem is None and error < 0.6, (problem, error)


@pytest.mark.parametrize("name", [name for name, what in BROKEN.items() if what[3]])
def test_what_is_broken_is_named(name):
    named, problem = spoiled(name, 0, BROKEN[name][3])
    assert named, problem


# ------------------------------------------------------------------------- all of it: a table
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", required=True, help="run everything")
    parser.add_argument("--hands", type=int, default=20, help="healthy hands per mounting")
    parser.add_argument("--broken", type=int, default=2, help="broken hands per fault and mounting")
    args = parser.parse_args()
    say = lambda *words: print(*words, file=sys.stderr, flush=True)
    sys.stdout = open("/dev/null", "w")
    say(f"{'healthy hands':28} accused   largest error of a zero (degrees)")
    accused = 0
    for wrist in GRAVITY:
        results = [healthy(seed, wrist) for seed in range(args.hands)]
        problems = [f"hand {seed}: {problem}" for seed, (problem, _) in enumerate(results) if problem]
        accused += len(problems)
        say(f"{wrist:28} {len(problems):2} of {args.hands:3}   {max(error for _, error in results):.2f}")
        for problem in problems:
            say(f"    {problem}")
    say(f"accused {accused} of {len(GRAVITY) * args.hands}\n")
    say(f"{'broken hands, named':28} {' '.join(GRAVITY)}")
    found = tried = 0
    for name in BROKEN:
        cells, missed = [], []
        for wrist in GRAVITY:
            results = [spoiled(name, seed, wrist) for seed in range(args.broken)]
            cells.append(sum(named for named, _ in results))
            missed += [f"{wrist}, hand {seed}: {problem}" for seed, (named, problem) in enumerate(results)
                       if not named]
        found, tried = found + sum(cells), tried + len(GRAVITY) * args.broken
        say(f"{name:28} " + " ".join(f"{n:{len(wrist)}}" for n, wrist in zip(cells, GRAVITY)))
        for line in missed:
            say(f"    {line}")
    say(f"broken found {found} of {tried}")


if __name__ == "__main__":
    main()
