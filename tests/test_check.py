"""`hand.py --check` on hands with mass, width, friction and play, mounted in any direction.

    python tests/test_check.py --all       # 20 hands x 6 mountings, and everything broken: a table

A healthy hand must not be accused, whichever way it hangs, and what is wrong must be named.
"""
import argparse
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import hand as H
from conftest import driving
from hand_on_the_bus import GRAVITY, Clock, PhysicalBus, in_process, patched

TOOTH = 4096 // 25                               # counts, of a spline of 25 teeth


def check(bus, answers="y\n" * 20):
    """Run it. (None or the line that tells what is wrong, offsets found or None)."""
    with tempfile.TemporaryDirectory() as folder, in_process(bus), \
            patched(sys, stdin=io.StringIO(answers)):
        path = Path(folder) / "calibration.json"
        problem = None
        try:
            H.check(["--check", "--port", bus.path, "--calibration", str(path)])
        except H.Problem as error:
            problem = str(error)
        return problem, H.load_calibration(path) if path.exists() else None


def healthy(seed, wrist):
    """(problem, largest error of a zero in degrees)."""
    bus = PhysicalBus(Clock(), seed, wrist)
    true = np.array([bus.motors[i].joint.zero_offset for i in H.MOTOR_ID]) * H.COUNT
    problem, found = check(bus)
    assert not driving(bus)
    return problem, np.inf if found is None else np.rad2deg(np.abs(found - true).max())


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


class Fault(NamedTuple):
    spoil: Callable                              # what is done to a healthy hand
    words: tuple                                 # what the line that ends the check must say
    wrist: str | None = None                     # in the suite in this mounting
    bound: tuple | None = None                   # see hand_on_the_bus.build


def a_tooth_off(motor, sign):
    """Named by where the joint stops, or already by what it reads at rest."""
    return Fault(horn(motor, sign * TOOTH), (f"{name(motor)}: ",))


def name(motor):
    return H.motors(H.MOTOR_ID.index(motor))


BROKEN = {
    "base jammed": Fault(jammed(5), (f"{name(5)}: does not move",)),
    "side jammed": Fault(jammed(0), (f"{name(0)}: does not move",)),
    "middle jammed": Fault(jammed(10), (f"{name(10)}: does not move",), "palm_down"),
    "tip jammed": Fault(jammed(3), (f"{name(3)}: does not move",)),
    "thumb jammed": Fault(jammed(12), (f"{name(12)}: does not move",)),
    "base mirrored": Fault(mirrored(5), (f"{name(5)}: ", "wrong way")),
    "middle mirrored": Fault(mirrored(2), (f"{name(2)}: ", "wrong way"), "palm_up"),
    "tip mirrored": Fault(mirrored(11), (f"{name(11)}: ", "wrong way")),
    "thumb mirrored": Fault(mirrored(13), (f"{name(13)}: ", "wrong way")),
    "side, middle swapped": Fault(swapped(8, 10), ("(rf_", "swapped"), "thumb_up"),
    "base, side swapped": Fault(swapped(1, 0), ("(if_", "swapped")),
    "base, middle swapped": Fault(swapped(5, 6), ("(mf_", "swapped")),
    "middle, tip swapped": Fault(swapped(2, 3), ("(if_", "swapped")),
    "base a tooth off": a_tooth_off(5, 1)._replace(wrist="base_down"),
    "base a tooth back": a_tooth_off(5, -1),
    "side a tooth off": a_tooth_off(4, 1),
    "side a tooth back": a_tooth_off(0, -1),
    "middle a tooth off": a_tooth_off(6, 1),
    "middle a tooth back": a_tooth_off(10, -1),
    "tip a tooth off": a_tooth_off(7, 1),
    "tip a tooth back": a_tooth_off(7, -1),
    "thumb a tooth off": a_tooth_off(12, 1),
    "thumb a tooth back": a_tooth_off(14, -1),
    "thumb tip a tooth off": a_tooth_off(15, 1),
    "thumb +90 degrees": Fault(horn(12, 1024), (f"{name(12)}: ", "by 90 degrees"), "base_up"),
    "thumb -90 degrees": Fault(horn(12, -1024), (f"{name(12)}: reads",)),
    "thumb's second +90": Fault(horn(13, 1024), (f"{name(13)}: ", "by 90 degrees")),
    "no base on its horn": Fault(loose(5), (f"{name(5)}: turns without end",)),
    "no tip on its horn": Fault(loose(3), (f"{name(3)}: turns without end",)),
    "no thumb on its horn": Fault(loose(15), (f"{name(15)}: turns without end",), "thumb_down"),
    "a string round fingers": Fault(nothing, ("moves another finger's",), "palm_down",
                                    bound=("string", "if_md", "mf_md")),
    "fingers taped together": Fault(nothing, ("moves another finger's",),
                                    bound=("tape", "mf_ds", "rf_ds")),
    "base blocked": Fault(blocked(9, 0.1, 2.2), (f"{name(9)}: stops early", "blocks")),
    "middle blocked": Fault(blocked(6, -0.5, 1.6), (f"{name(6)}: stops early", "blocks")),
}


def spoiled(fault, seed, wrist):
    """(is it named?, the line)."""
    fault = BROKEN[fault]
    bus = PhysicalBus(Clock(), seed, wrist, fault.bound)
    fault.spoil(bus)
    problem, found = check(bus)
    assert not driving(bus) and (problem is None) == (found is not None)
    return problem is not None and all(word in problem for word in fault.words), problem


# ------------------------------------------------------------------------- in the suite: a sample
@pytest.mark.parametrize("wrist", GRAVITY)
def test_a_healthy_hand_is_not_accused_in_any_mounting(wrist):
    problem, error = healthy(0, wrist)
    assert problem is None and error < 0.6, (problem, error)


@pytest.mark.parametrize("fault", [name for name, fault in BROKEN.items() if fault.wrist])
def test_what_is_broken_is_named(fault):
    named, problem = spoiled(fault, 0, BROKEN[fault].wrist)
    assert named, problem


def test_a_mirrored_motor_that_the_table_knows_is_healthy(monkeypatch):
    signs = H.SIGN.copy()
    signs[H.MOTOR_ID.index(2)] = -1
    monkeypatch.setattr(H, "SIGN", signs)
    bus = PhysicalBus(Clock(), 0, "palm_up")
    bus.sign(2, -1)
    bus.zero_offset(2, 40)
    problem, found = check(bus)
    assert problem is None
    assert abs(found[H.MOTOR_ID.index(2)] - 40 * H.COUNT) < np.deg2rad(0.6)


def test_full_motors_are_soft_while_they_are_checked():
    """Their own current limit is 550 mA."""
    bus, seen = PhysicalBus(Clock(), 0, "palm_up", models=1240), set()

    def step(now, step=bus.physics.step):
        step(now)
        seen.update(m["goal_current"] for m in bus.motors.values() if m.driving)
    bus.physics.step = step
    problem, _ = check(bus)
    assert problem is None and seen == {H.SOFT}


@pytest.mark.parametrize("answers, words", [
    ("y\ny\ny\nn\n", "not moved"), ("y\ny\ny\ny\nn\n", "motor ids are swapped")])
def test_answers(answers, words, capsys):
    """Three settings to agree to, then the movement, then the order in which they moved."""
    bus = PhysicalBus(Clock(), 0, "palm_up")
    problem, found = check(bus, answers)
    assert words in (problem or capsys.readouterr().out) and found is None
    assert (bus.stats["goal_writes"] == 0) == (words == "not moved")


# ------------------------------------------------------------------------- all of it: a table
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true", required=True, help="run everything")
    parser.add_argument("--hands", type=int, default=20, help="healthy hands, in each mounting")
    parser.add_argument("--broken", type=int, default=1, help="hands of each fault and mounting")
    args = parser.parse_args()

    def row(title, cells):
        print(f"{title:24}" + "".join(f"{cell:>12}" for cell in cells), file=table, flush=True)

    table, sys.stdout = sys.stdout, open(os.devnull, "w")
    lines = []
    row("healthy: error (degrees)", GRAVITY)
    for seed in range(args.hands):
        results = [healthy(seed, wrist) for wrist in GRAVITY]
        row(f"hand {seed}", ["ACCUSED" if problem else f"{error:.2f}"
                             for problem, error in results])
        lines += [f"hand {seed}, {wrist}: {problem}"
                  for wrist, (problem, _) in zip(GRAVITY, results) if problem]
    print(f"accused: {len(lines)} of {len(GRAVITY) * args.hands}", *lines, sep="\n    ", file=table)

    tried, lines = 0, []
    row("broken: named", GRAVITY)
    for fault in BROKEN:
        cells = []
        for wrist in GRAVITY:
            results = [spoiled(fault, seed, wrist) for seed in range(args.broken)]
            cells.append(f"{sum(named for named, _ in results)} of {args.broken}")
            lines += [f"{fault}, {wrist}: {problem}" for named, problem in results if not named]
            tried += args.broken
        row(fault, cells)
    print(f"named: {tried - len(lines)} of {tried}", *lines, sep="\n    ", file=table)


if __name__ == "__main__":
    main()
