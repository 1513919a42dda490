"""Stage 2: a hand collects data alone in the Chaos Box, a box of soft balls.

    python collect.py --hours 2                       # the attached hand, or else sim:0
    python collect.py --hours 1 --port sim:7 --load none --source waves       # for comparison

reads   checkpoints/policy.pt: the joint targets that it sends in simulation are replayed open loop;
        no camera, no reset, no person
writes  for every wrist that the policy knows a folder data/PORT-WRIST-LOAD-SOURCE with
        sequences.npz   the target sequences, simulated once
        00000.npz ...   a trajectory (400 steps, 20 s) each, whole or not there:
                        q, dq, target, current (400, N: rad, rad/s, rad, A), time (400, s),
                        hand, wrist, load, source, seed, port, policy (hash),
                        index, sequence (its number in sequences.npz), sigma (rad, of the noise)
        00017.jammed    instead of one in which a joint jammed at every attempt
        log.txt         a line per event
        film.gif        10 s of the first trajectory of a virtual hand

Run it again and it goes on after the last whole trajectory. Errors of the bus, a motor's reboot or
an unplugged adapter cost the running trajectory, nothing more.
"""
import argparse
import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import sim                       # before torch, see there
import numpy as np
import torch

import hand as H
from sim import EPISODE
from train_policy import digest, load_policy, simulate

SIGMA = 0.01           # rad, noise on the targets of half of the trajectories
SEQUENCES = 192        # that differ; then the first comes again, with other balls and other noise
BLOCK = 48             # episodes simulated at once
# Balls wedge a joint or lie on a finger that its motor cannot lift. That teaches nothing about the
# task, and a motor that stalls for long overheats.
JAM = 0.3              # rad between target and joint: three times what saturates the motor
JAM_STEPS = 30         # 1.5 s of it
ATTEMPTS = 5           # with other balls and other noise, before a trajectory is given up
TAKEN_OUT = 2          # balls, from a virtual hand's box, before each further attempt
IN_A_ROW = 3           # given up: the box is too full
FAULTS = 10            # of the bus in one trajectory: something is broken


# --------------------------------------------------------------------------- what is replayed
def waves(n, seed):
    """Sine and square waves around the canonical grasp, every joint with a phase and a period of
    its own: (n, 400, N) rad."""
    rng = np.random.default_rng(seed)
    t = np.arange(EPISODE)[None, :, None] / H.CONTROL_HZ

    def each(low, high):
        return rng.uniform(low, high, (n, 1, H.N))

    wave = np.sin(2 * np.pi * (t / each(1.0, 4.0) + each(0, 1)))
    wave = np.where(rng.random((n, 1, 1)) < 0.5, wave, np.sign(wave))
    return np.clip(H.GRASP + each(0.05, 0.4) * wave, H.LOW, H.HIGH).astype(np.float32)


def sequences(job, policy, content):
    """The target sequences (n, 400, N) rad of a job, read from its folder or simulated: one for
    each trajectory, but no more than SEQUENCES.

    They come in blocks that depend on the seed and the block's number alone, so that a longer
    collection begins with the sequences of a shorter one. Raises `Problem` if the policy hardly
    ever holds the object."""
    path, facts = job.folder / "sequences.npz", job.facts
    found, blocks = np.zeros((0, EPISODE, H.N), np.float32), 0
    if path.exists():
        old = sim.load_npz(path)
        if all(str(old.get(name)) == str(value) for name, value in facts.items()):
            found, blocks = old["sequences"], int(old["blocks"])
    needed = min(job.total, SEQUENCES)
    while len(found) < needed:
        seed = 1000 * facts["seed"] + blocks
        if facts["source"] == "waves":
            block = waves(BLOCK, seed)
        else:
            title = f"{facts['wrist']}: sequences {len(found)}/{needed}"
            block = simulate(policy, content, [facts["wrist"]], BLOCK, seed, title)["a"].numpy()
        found = np.concatenate([found, block])
        blocks += 1
        if blocks >= 4 and len(found) < blocks * BLOCK / 20:
            raise H.Problem(
                f"the policy held the object {len(found)} times in {blocks * BLOCK} episodes "
                f"with {facts['wrist']}; train it longer for that wrist")
        sim.save_npz(path, sequences=found, blocks=blocks, **facts)
    return found


class Replay:
    """Sends targets (400, N) rad open loop, whatever the joints do, and notices a jam: `act` and
    `watch` are for `hand.drive`. With `film` it keeps the configurations of a virtual hand."""

    def __init__(self, targets, film=False):
        self.targets = iter(targets)
        self.film = [] if film else None
        self.late = np.zeros(H.N, int)       # control steps
        self.jammed = ""

    def act(self, q):
        self.q = q
        return next(self.targets)

    def watch(self, hand):
        if self.film is not None:
            self.film.append(hand.qpos())
        lag = np.abs(hand.target - self.q)
        self.late = np.where(lag > JAM, self.late + 1, 0)
        if self.late.max() < JAM_STEPS:
            return False
        joint = self.late.argmax()
        self.jammed = f"{H.JOINTS[joint].name} jammed, {lag[joint]:.2f} rad from its target"
        return True


# ------------------------------------------------------------------------------ trajectories
class Job(NamedTuple):
    """The trajectories of one hand at one wrist."""
    folder: Path
    total: int             # how many
    facts: dict            # written into every file


class Outcome(NamedTuple):
    index: int
    jams: list             # a text for every attempt that ended early
    lag: float = None      # rad, mean over joints and steps; None: nothing was saved
    current: float = 0.0   # A
    faults: int = 0        # of the bus, on the way


def trajectory(hand, job, index, sequence):
    """Trajectory `index`, from the start pose to its file. It depends on its index alone, so that
    a resumed run makes what one that was not interrupted would have made."""
    jams, path = [], job.folder / f"{index:05d}"
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([job.facts["seed"], index, attempt])
        sigma = SIGMA if rng.random() < 0.5 else 0.0
        targets = sequence + rng.normal(0, sigma, sequence.shape)
        replay = Replay(targets, film=index == 0 and not hand.realtime)
        if not hand.realtime:
            # who owns a box that jams takes balls out
            hand.place(sequence[0], stir=ATTEMPTS * index + attempt, out=TAKEN_OUT * attempt)
        hand.move_to(sequence[0])
        data = H.drive(hand, replay.act, EPISODE, replay.watch)
        if hand.realtime:
            hand.rest()                # nothing strains while a slow disk is waited for
        if not replay.jammed:
            break
        jams.append(f"{replay.jammed} after {len(data['q']) / H.CONTROL_HZ:.1f} s")
    else:
        with H.atomic_file(path.with_suffix(".jammed"), "w") as file:
            file.write("\n".join(jams) + "\n")
        return Outcome(index, jams)
    if replay.film:
        wrist = sim.wrist_of(job.facts["wrist"])
        sim.film(hand.model(), replay.film[:200], job.folder / "film.gif", wrist)
    sim.save_npz(path.with_suffix(".npz"), **data, **job.facts, index=index,
                 sequence=index % SEQUENCES, sigma=sigma)
    lag = np.abs(data["target"] - data["q"]).mean()
    return Outcome(index, jams, lag, np.abs(data["current"]).mean())


def trajectories(folder, kind="npz"):
    """The files of a folder that are trajectories, or mark "jammed" ones, in order."""
    return sorted(path for path in Path(folder).glob(f"*.{kind}") if path.stem.isdecimal())


def there(folder, facts):
    """Numbers of the trajectories in a folder, and of those that jammed. Raises `Problem` if
    they are of something else than `facts`: a folder goes on only with what it began."""
    saved = trajectories(folder)
    if saved:
        old = sim.load_npz(saved[0], *facts, "sequence")
        for name, value in facts.items():
            if str(old[name]) != str(value):
                raise H.Problem(f"{folder} holds trajectories with {name} {old[name]}, "
                                f"not {value}; choose another folder")
    jammed = trajectories(folder, "jammed")
    return {int(path.stem) for path in saved}, {int(path.stem) for path in jammed}


def missing(job):
    return sorted(set(range(job.total)).difference(*there(job.folder, job.facts)))


@contextlib.contextmanager
def processes(workers):
    """A `ProcessPoolExecutor` whose processes leave Ctrl-C to this one; then the few jobs that have
    been handed out are finished and the rest is not begun. Raises `Problem` if one is killed."""
    workers = min(workers, 61)                           # the most on Windows
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), in_a_process)
    try:
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)         # also while they start
        for _ in range(workers):
            pool.submit(int)
        signal.signal(signal.SIGINT, usual)
        yield pool
    except BrokenProcessPool:
        raise H.Problem("a worker process was killed, perhaps for want of memory: run this again, "
                        "with fewer --workers")
    finally:
        pool.shutdown(cancel_futures=True)


def in_a_process():
    def outlived():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=outlived, daemon=True).start()


virtual_hand = functools.cache(sim.open_hand)            # a worker process keeps its own


def on_a_worker(job, index, sequence):
    facts = job.facts
    hand = virtual_hand(facts["port"], wrist=facts["wrist"], load=facts["load"])
    return trajectory(hand, job, index, sequence)


def on_virtual_hands(workers, job, todo, targets):
    """As `on_a_real_hand`, on all cores."""
    with processes(workers) as pool:
        for result in [pool.submit(on_a_worker, job, i, targets[i % SEQUENCES]) for i in todo]:
            yield result.result()


def on_a_real_hand(hand, job, todo, targets, say):
    """Yields the `Outcome` of every trajectory in `todo`. A fault of the bus costs the one that
    runs; it starts again when the hand is back."""
    for index in todo:
        outcome, faults = None, 0
        while outcome is None:
            seen = len(hand.events)
            try:
                outcome = trajectory(hand, job, index, targets[index % SEQUENCES])
            except H.BusError as error:
                faults += 1
                say(f"trajectory {index} lost: {error}")
                if faults == FAULTS:
                    raise H.Problem(f"{FAULTS} faults in one trajectory; the last: {error}")
                hand.reconnect()
            finally:
                for _, kind, text in hand.events[seen:]:
                    say(f"{kind}: {text}")
        yield outcome._replace(faults=faults)


def run(job, hand, workers, policy, content):
    """Collect what is missing; `hand` is None for a virtual one, which every process has."""
    saved, given_up = there(job.folder, job.facts)
    todo, before = missing(job), len(saved)
    targets = sequences(job, policy, content)
    jams, faults, row = 0, 0, 0
    bar = sim.Progress(f"collect {job.facts['port']} {job.facts['wrist']}", job.total)
    bar(len(saved) + len(given_up))
    with open(job.folder / "log.txt", "a") as log:
        def say(text):
            print(time.strftime("%F %T"), text, file=log, flush=True)

        say(f"start: {before} of {job.total} trajectories there")
        for outcome in (on_a_real_hand(hand, job, todo, targets, say) if hand
                        else on_virtual_hands(workers, job, todo, targets)):
            for text in outcome.jams:
                say(f"trajectory {outcome.index}: {text}")
            jams += len(outcome.jams)
            faults += outcome.faults
            if outcome.lag is None:
                given_up.add(outcome.index)
                row += 1
            else:
                saved.add(outcome.index)
                row = 0
            if row == IN_A_ROW:
                raise H.Problem(
                    f"{row} trajectories in a row jammed at all {ATTEMPTS} attempts (see "
                    f"{log.name}): the box is too full, or something holds a finger. Take a few "
                    f"balls out, delete {job.folder}/*.jammed and run this again")
            bar(len(saved) + len(given_up),
                f"lag {outcome.lag or 0:.3f} rad, {1000 * outcome.current:.0f} mA, "
                f"{jams} jams, {faults} faults")
        text = (f"{len(saved)} trajectories in {job.folder}: {len(saved) - before} new, "
                f"{jams} jams, {faults} faults, {len(given_up)} given up")
        say(f"end: {text}")
        print(text)


# ------------------------------------------------------------------------------- command line
def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hours", type=float, default=2.0,
        help="of data, shared by the wrists, those there included (default 2)")
    add("--port", default="auto", help="auto, sim, sim:SEED or a serial device")
    add("--wrist", nargs="+", choices=sim.WRISTS, help="default: those that the policy knows")
    add("--load", default="balls", choices=("balls", "none"))
    add("--source", default="policy", choices=("policy", "waves"))
    add("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    add("--out", type=Path, help="folder of one wrist (default data/PORT-WRIST-LOAD-SOURCE)")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=os.cpu_count(), help="processes, virtual hand only")
    args = parser.parse_args()
    args.port = sim.resolve_port(args.port)
    if not 0 < args.hours < 1e4 or args.workers < 1 or args.seed < 0:
        raise H.Problem("--hours and --workers must be positive, --seed not negative")
    return args


def jobs_of(args, content):
    """A job for every wrist asked for, or that the policy was trained on (`content`, see
    `load_policy`) and somebody can hold: the named ones."""
    known = [name for name in content["wrists"] if name in sim.WRISTS]
    wrists = list(dict.fromkeys(args.wrist or known or sim.WRISTS))
    if args.out and len(wrists) > 1:
        raise H.Problem(f"--out is the folder of one wrist, and these are {', '.join(wrists)}: "
                        "choose one with --wrist")
    steps = args.hours * 3600 * H.CONTROL_HZ
    total = max(1, round(steps / EPISODE / len(wrists)))
    policy = digest(args.policy)
    port = args.port.replace("/", "_").replace(":", "")
    jobs = []
    for wrist in wrists:
        folder = args.out or Path("data") / "-".join([port, wrist, args.load, args.source])
        facts = dict(hand=H.HAND, wrist=wrist, load=args.load, source=args.source, seed=args.seed,
                     port=args.port, policy=policy)
        jobs.append(Job(folder, total, facts))
    return jobs


def main():
    args = arguments()
    policy, content = load_policy(args.policy)
    jobs = jobs_of(args, content)
    lacking = [job for job in jobs if missing(job)]
    for job in jobs:
        if job not in lacking:
            print(f"{job.folder} is complete")
    if args.port.startswith("sim:"):
        torch.set_num_threads(1)
        for job in lacking:
            run(job, None, args.workers, policy, content)
        return
    watched = sys.stdin.isatty()
    with sim.open_hand(args.port) as hand:
        for i, job in enumerate(lacking):
            later = ", ".join(other.facts["wrist"] for other in lacking[i + 1:])
            print(f"now {job.facts['wrist']}{later and ', then '}{later}", flush=True)
            if len(jobs) > 1 and watched:
                print("turn the hand and its box so, and press Enter", flush=True)
                if not sys.stdin.readline():           # Ctrl-D
                    raise H.Problem(f"no answer: run this again with {job.facts['wrist']}")
            run(job, hand, args.workers, policy, content)
            if later and not watched:                  # nobody is there to turn it
                print(f"{later} left: turn the hand and its box, and run this again")
                break


if __name__ == "__main__":
    H.run(main)
