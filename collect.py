"""Stage 2: a hand collects data alone in the Chaos Box, a box of soft balls.

    python collect.py --hours 2                              # the attached hand, or else the virtual hand sim:0
    python collect.py --hours 8 --port /dev/ttyUSB0 --wrist palm_down
    python collect.py --hours 1 --port sim:7 --load none --source waves     # for comparison: free hand, base waves

reads   checkpoints/policy.pt (its simulated joint targets are replayed open loop; no camera, no reset, no person)
writes  OUT/sequences.npz      the target sequences, simulated once
        OUT/00000.npz ...      one trajectory (400 steps, 20 s) each, whole or not there:
            q, dq, target, current (400, 16: rad, rad/s, rad, A), time (400, s), hand, wrist, load, source, sigma, policy
            (hash), seed, index, port
        OUT/log.txt            a line per event; OUT/film.gif, the first trajectory of a virtual hand
Run it again and it goes on after the last whole trajectory. Half of the trajectories get noise of 0.01 rad on every
target. Errors of the bus, a motor's reboot or an unplugged adapter cost the running trajectory, nothing more.
"""
import argparse
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

import hand as H
import sim
from train_policy import digest, load_policy, objects_of, targets

SIGMA = 0.01            # rad, noise on the targets of half of the trajectories
SECONDS = sim.EPISODE / H.CONTROL_HZ


def simulated_sequences(policy, content, wrist, n, seed):
    """Target sequences (n, 400, 16) rad of episodes in which the policy held the object to the end, in the training simulator."""
    objects = objects_of("+".join(content["families"]))
    env = sim.Rotation(max(2 * len(objects), min(n, 192)), objects, [wrist], content["axes"], seed=seed)
    kept, tried = [], 0
    while len(kept) < n:
        frames = []
        result = sim.run_episodes(env, lambda env: targets(policy, env), lambda env: frames.append(env.target.copy()),
                                  f"simulated sequences {len(kept)}/{n}")
        kept += list(np.array(frames).swapaxes(0, 1)[result["TTF"] >= SECONDS])
        tried += env.n
        if len(kept) < n and tried >= 20 * max(n, env.n):
            raise H.Problem(f"the policy kept the object {len(kept)} times in {tried} episodes with {wrist}; train it longer for that wrist")
    return np.array(kept[:n], np.float32)


def waves(n, seed):
    """Sine and square waves around the canonical grasp, every joint with a phase and a period of its own: (n, 400, 16) rad."""
    rng = np.random.default_rng(seed)
    t = np.arange(sim.EPISODE)[None, :, None] / H.CONTROL_HZ
    draw = lambda low, high: rng.uniform(low, high, (n, 1, H.N))
    wave = np.sin(2 * np.pi * (t / draw(1.0, 4.0) + draw(0, 1)))
    wave = np.where(rng.random((n, 1, 1)) < 0.5, wave, np.sign(wave))
    return np.clip(H.GRASP + draw(0.05, 0.4) * wave, H.LOW, H.HIGH).astype(np.float32)


def replay(hand, sequence, noise, film=None):
    """Drive the hand open loop through `sequence` + `noise` (400, 16) at 20 Hz; returns what it did as a dict of arrays.
    A list `film` is filled with the configurations of a virtual hand."""
    hand.move_to(sequence[0])
    targets = iter(sequence + noise)
    watch = None if film is None else lambda hand: film.append(hand.qpos())
    return H.drive(hand, lambda q: next(targets), len(sequence), watch)



def record(hand, index, sequence, args, facts):
    """One trajectory, from the start pose to the file; the first one of a virtual hand is filmed."""
    rng = np.random.default_rng([args.seed, index])
    sigma = SIGMA if rng.random() < 0.5 else 0.0
    film = [] if index == 0 and not hand.realtime else None
    data = replay(hand, sequence, rng.normal(0, sigma, sequence.shape) if sigma else np.zeros(sequence.shape), film)
    if film:
        sim.film(hand.model(), film[:200], args.out / "film.gif", args.wrist)
    if hand.realtime:
        hand.rest()                                      # a slow disk is no reason for the guardian to step in
    sim.save_npz(args.out / f"{index:05d}.npz", **data, index=index, sigma=sigma, **facts)
    return float(np.abs(data["target"] - data["q"]).mean()), float(np.abs(data["current"]).mean())


_virtual = {}           # a worker process keeps its virtual hand


def record_virtual(index, sequence, args, facts):
    if not _virtual:
        _virtual["hand"] = sim.open_hand(args.port, wrist=args.wrist, load=args.load)
    _virtual["hand"].place(sequence[0], stir=index)      # every trajectory depends on its index alone, so a run can be resumed
    return index, record(_virtual["hand"], index, sequence, args, facts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="hours of data in all, those already there included (default 2)")
    parser.add_argument("--port", default="auto", help="auto, sim, sim:SEED or a serial device")
    parser.add_argument("--wrist", default="palm_down", choices=sim.WRISTS)
    parser.add_argument("--load", default="balls", choices=("balls", "none"))
    parser.add_argument("--source", default="policy", choices=("policy", "waves"))
    parser.add_argument("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    parser.add_argument("--out", type=Path, help="default data/PORT-WRIST-LOAD-SOURCE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, virtual hand only")
    args = parser.parse_args()
    args.port = sim.resolve_port(args.port)
    if not 0 < args.hours < 1e4 or args.workers < 1:
        raise H.Problem("--hours and --workers must be positive")
    virtual = args.port.startswith("sim")
    args.out = args.out or Path("data") / "-".join([args.port.replace("/", "_").replace(":", ""), args.wrist, args.load, args.source])
    total = max(1, round(args.hours * 3600 / SECONDS))
    torch.set_num_threads(1 if virtual else 2)

    policy, content = load_policy(args.policy)
    facts = dict(hand=H.HAND, wrist=args.wrist, load=args.load, source=args.source, seed=args.seed, port=args.port,
                 policy=digest(args.policy))
    done = {int(p.stem) for p in args.out.glob("[0-9]*.npz")}
    for index in sorted(done)[:1]:                       # goes on only with what it began
        old = sim.load_npz(args.out / f"{index:05d}.npz", *facts)
        for name, value in facts.items():
            if str(old[name]) != str(value):
                raise H.Problem(f"{args.out} holds trajectories with {name} {old[name]}, not {value}; choose another --out")
    path = args.out / "sequences.npz"
    # 192 different episodes are replayed again and again, with other balls and other noise
    if path.exists() and str(sim.load_npz(path, "policy")["policy"]) == facts["policy"]:
        sequences = sim.load_npz(path, "sequences")["sequences"]
    else:
        n = min(total, 192)
        sequences = waves(n, args.seed) if args.source == "waves" else simulated_sequences(policy, content, args.wrist, n, args.seed)
        sim.save_npz(path, sequences=sequences, policy=facts["policy"])

    todo = [i for i in range(total) if i not in done]
    bar = sim.Progress(f"collect {args.port} {args.wrist}", total)
    bar(len(done))
    errors, currents, faults, began = [], [], 0, time.monotonic()

    def note(i, result):
        errors.append(result[0])
        currents.append(result[1])
        bar(len(done) + len(errors), f"{(len(done) + len(errors)) * SECONDS / 3600:.2f} h, lag {np.mean(errors[-50:]):.3f} rad, "
            f"{1000 * np.mean(currents[-50:]):.0f} mA, {faults} faults")

    with open(args.out / "log.txt", "a") as log:
        def say(text):
            print(time.strftime("%F %T"), text, file=log, flush=True)

        say(f"start: {len(done)} of {total} trajectories there")
        if virtual:
            with multiprocessing.get_context("spawn").Pool(args.workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
                jobs = [pool.apply_async(record_virtual, (i, sequences[i % len(sequences)], args, facts)) for i in todo]
                for job in jobs:
                    note(*job.get())
        else:
            with sim.open_hand(args.port) as hand:
                for i in todo:
                    while True:
                        seen = len(hand.events)
                        try:
                            result = record(hand, i, sequences[i % len(sequences)], args, facts)
                            break
                        except H.BusError as error:
                            faults += 1
                            say(f"trajectory {i} lost: {error}")
                            hand.reconnect()
                        finally:
                            for event in hand.events[seen:]:
                                say(f"{event[1]}: {event[2]}")
                    note(i, result)
        say(f"end: {len(done) + len(errors)} trajectories, {faults} faults")
    print(f"{len(done) + len(errors)} trajectories ({(len(done) + len(errors)) * SECONDS / 3600:.2f} h) in {args.out}; "
          f"{len(errors)} new in {(time.monotonic() - began) / 60:.1f} min, {faults} faults, mean current {1000 * np.mean(currents or [0]):.0f} mA")


if __name__ == "__main__":
    H.run(main)
