"""How fast, how even and how true: each figure a ratio within one run, so that machines and their
moods cancel.

    python tests/benchmark.py [--quick] [--only physics ...] [--policy checkpoints/policy.pt ...]

environment     control steps per second of sim.Rotation (step and observe) over bare
                mujoco.rollout of the same models, with the paper's randomisation and with all
fit             gradient steps per second of the batched joint-wise model over 16 networks in turn
latency         policy + residual, from joint positions to joint targets, over the 50 ms tick
jitter          of the deployment loop at 20 Hz with policy, residual and the emulated motor bus,
                over the 50 ms tick
physics         RotR and TTF of every shipped policy with other numerics over those with the
                nominal ones, on the same trials, and what NaN cost
bus             one reading and one command on the emulated motor bus over the time of their bits
                on a wire of 4 Mbaud
"""
import argparse
import contextlib
import inspect
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import sim                       # before torch: it sets how torch's threads wait
import numpy as np
import torch
import torch.nn as nn

import deploy
import fit_ndm as F
import hand as H
import train_policy as T

TICK = 1 / H.CONTROL_HZ


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute instead of ten, rougher")
    parser.add_argument("--policy", type=Path, nargs="*",
                        default=sorted((ROOT / "checkpoints").glob("policy*.pt")))
    parser.add_argument("--only", nargs="+", choices=[part.__name__ for part in PARTS])
    return parser.parse_args()


def show(name, value, aim=""):
    print(f"{name:<66} {value:>15}   {aim}", flush=True)


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(spent):
    """Speed of the first over the second, from their seconds in blocks that took turns: what drifts
    cancels in a block, and the median forgets the blocks in which the machine did something else.
    The first block is to warm up."""
    return np.median([second / first for first, second in spent[1:]])


# ------------------------------------------------------------------------------------- how fast
def environment(args):
    for name, kinds in (("paper", sim.PAPER), ("everything", sim.EVERYTHING)):
        value = environment_over_rollout(kinds, 8 if args.quick else 60)
        show(f"environment: control steps/s over bare rollout, {name}", f"{value:.3f}",
             ">= 0.80, better 0.95")


def environment_over_rollout(kinds, blocks):
    env = sim.Rotation(256, sim.objects_of("cuboid+cylinder"), ["palm_up", "palm_down"],
                       ["+z", "-z"], randomize=kinds)
    rng = np.random.default_rng(0)
    moves = rng.uniform(-1, 1, (8, env.n, H.N)) * sim.ALPHA
    state = env.state.copy()
    control = np.zeros((env.n, env.substeps, H.N))
    states = np.zeros((env.n, env.substeps, state.shape[1]))
    sensors = np.zeros((env.n, env.substeps, env.models[0].nsensordata))

    def ours():
        for move in moves:
            env.step(env.target + move)
            env.observe()

    def bare():
        target = begin
        for move in moves:
            target = target + move
            control[:] = target[:, None]
            env.pool.rollout(env.models, env.datas, state, nstep=env.substeps, control=control,
                             state=states, sensordata=sensors)
            state[:] = states[:, -1]

    spent = []
    for _ in range(blocks):      # bare repeats the steps that ours made: same contacts, same work
        env.reset(np.arange(env.n))
        state[:], begin = env.state, env.target - env.zero
        spent.append((seconds(ours), seconds(bare)))
    return ratio(spent)


def fit(args):
    for batch in (inspect.signature(F.fit).parameters["batch"].default, 64):
        value = batched_over_loop(batch, 6 if args.quick else 20)
        show(f"fit: batched joint-wise model over 16 networks, batch {batch}", f"{value:.2f}",
             ">= 5")


def batched_over_loop(batch, blocks, loops=5):
    torch.manual_seed(0)
    hidden = F.HIDDEN["joint"]
    q, a = (torch.randn(16, 200, H.N).mul(0.05).cumsum(1) for _ in range(2))
    index = torch.stack([torch.randint(16, (batch,)), torch.randint(200 - sim.W, (batch,))], 1)
    history, after = F.windows(q, a, index)                  # (B, W, 2, N), (B, N)
    model = F.Dynamics(H.N, hidden)
    nets = [nn.Sequential(
        nn.Linear(2 * sim.W, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(),
        nn.Linear(hidden, 1)) for _ in range(H.N)]
    optimizer, *optimizers = (torch.optim.Adam(net.parameters(), fused=True)
                              for net in (model, *nets))

    def descend(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def batched():
        for _ in range(loops):
            descend(optimizer, (model(history) - after).pow(2).mean())

    def in_turn():
        for _ in range(loops):
            for i, net in enumerate(nets):
                q, sent = history[:, :, 0, i], history[:, :, 1, i]       # (B, W)
                now = q[:, -1:]
                x = torch.cat([q[:, :-1] - now, now, sent - now], 1)
                descend(optimizers[i], (q[:, -1] + net(x)[:, 0] - after[:, i]).pow(2).mean())

    return ratio([(seconds(batched), seconds(in_turn)) for _ in range(blocks)])


# ------------------------------------------------------------------------------------- how even
@contextlib.contextmanager
def hand_on_a_bus():
    """The driver on the emulated motor bus, a process of its own at the speed of 4 Mbaud."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        limits, report, link = (folder / name for name in ("limits", "report.json", "ttyLEAP"))
        ranges = [(H.JOINTS[k].low, H.JOINTS[k].high) for k in np.argsort(H.MOTOR_ID)]
        limits.write_text(json.dumps(ranges))
        bus = subprocess.Popen([
            sys.executable, ROOT / "tests/emulated_bus.py", "--link", link, "--report", report,
            "--limits", limits, "--stops", limits])
        try:
            while not report.exists():
                time.sleep(0.05)
            with H.DynamixelHand(str(link), folder / "calibration.json") as hand:
                yield hand
        finally:
            bus.terminate()
            bus.wait()


def controller(args):
    policy = T.load_policy(args.policy[0])[0] if args.policy else T.Generalist().eval()
    trained = ROOT / "checkpoints/residual.pt"
    residual = F.load_residual(trained)[0] if trained.exists() else F.Residual().eval()
    return deploy.Controller(policy, residual, "palm_down", "+z", H.GRASP)


def latency(args):
    act, rng, spent = controller(args), np.random.default_rng(0), []
    for _ in range(300 if args.quick else 3000):
        q = H.GRASP + 0.02 * rng.normal(size=H.N)
        spent.append(seconds(lambda: act(q)))
    for name, share, aim in (("median", 50, ""), ("p99", 99, "<= 0.04")):
        value = np.percentile(spent[20:], share)
        show(f"latency: policy + residual, {name}, over the tick", f"{value / TICK:.4f}",
             f"{aim} ({1000 * value:.2f} ms)")


def jitter(args):
    with hand_on_a_bus() as hand:
        hand.move_to(H.GRASP)
        write, times = hand._write, []
        hand._write = lambda target: (times.append(time.perf_counter()), write(target))
        H.drive(hand, controller(args), round((5 if args.quick else 60) / TICK))
    late = np.abs(np.diff(times) - TICK)
    for name, value in zip(("median", "p99", "worst"), np.percentile(late, [50, 99, 100])):
        show(f"jitter: |tick - 50 ms|, {name}, over the tick", f"{value / TICK:.4f}",
             f"({1000 * value:.2f} ms)")


def bus(args):
    # bytes: sync read of 10 bytes from 16 motors, their answers, sync write of 4 bytes to each; 10
    # bits a byte
    least = (14 + 16 + 16 * (11 + 10) + 14 + 16 * 5) * 10 / 4e6
    with hand_on_a_bus() as hand:
        q = hand.read().q
        spent = [seconds(lambda: (hand.read(), hand.command(q)))
                 for _ in range(60 if args.quick else 1000)]
    p50, p99 = np.percentile(spent[10:], [50, 99])
    show("bus: read + command, median, over the bits on the wire", f"{p50 / least:.2f}",
         f"({1000 * p50:.2f} of {1000 * least:.2f} ms, p99 {1000 * p99:.2f} ms)")


# ------------------------------------------------------------------------------------- how true
OTHER = {
    "half the time step": (dict(timestep=TICK / sim.SUBSTEPS / 2), "0.90-1.10"),
    "implicit integrator": (dict(integrator="implicit"), "0.90-1.10"),
    "impratio doubled": (dict(impratio=20), ">= 0.70"),
    "pyramidal cone": (dict(cone="pyramidal"), ">= 0.70"),
}


def paired_ratio(x, y):
    """Mean of x over mean of y, (n,) each and of the same trials, and its standard error by the
    delta method: that of x - ratio * y, over the mean of y."""
    value = x.mean() / y.mean()
    return value, (x - value * y).std(ddof=1) / len(x) ** 0.5 / y.mean()


def physics(args):
    for path in args.policy:
        policy, content = T.load_policy(path)
        objects = sim.objects_of("+".join(content["families"]))
        for wrist in content["wrists"]:
            same = sim.trials(objects, wrist, content["axes"], 96 if args.quick else 256, seed=5)
            results, lost = {}, 0
            for name, (options, _) in {"nominal": ({}, ""), **OTHER}.items():
                env = sim.Rotation(len(same), objects, [wrist], content["axes"], seed=5, **options)
                results[name] = sim.run_episodes(
                    env, lambda env: T.act(policy, env), trials=same,
                    title=f"{path.name} {wrist} {name}")
                lost += env.blowups
            compared(f"{path.name} {wrist}", results)
            show(f"{path.name} {wrist}: episodes lost to NaN", f"{lost}", "0")
    if not args.policy:
        show("physics: no shipped policy", "-")


def compared(label, results):
    nominal = results.pop("nominal")
    for metric, unit in (("RotR", "rad/s x steps"), ("TTF", "s")):
        x = nominal[metric]
        error = x.std(ddof=1) / len(x) ** 0.5
        show(f"{label}: {metric}, nominal", f"{x.mean():.1f} +- {error:.1f}", unit)
        for name, result in results.items():
            value, error = paired_ratio(result[metric], x)
            show(f"{label}: {metric}, {name}, over nominal", f"{value:.3f} +- {error:.3f}",
                 OTHER[name][1])


PARTS = environment, fit, latency, jitter, physics, bus

if __name__ == "__main__":
    chosen = arguments()
    for part in PARTS:
        if not chosen.only or part.__name__ in chosen.only:
            part(chosen)
