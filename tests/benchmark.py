"""How fast, how even and how true: each figure a ratio within one run, so that machines and their moods cancel.

    python tests/benchmark.py [--quick] [--policy checkpoints/policy.pt ...]

environment     control steps per second of sim.Rotation (step and observe) over bare mujoco.rollout of the same models
fit             gradient steps per second of the batched joint-wise model over a loop of 16 networks
latency         policy + residual, from joint positions to joint targets, over the 50 ms tick
jitter          of the deployment loop at 20 Hz with policy, residual and the emulated motor bus, over the 50 ms tick
physics         RotR and TTF of every shipped policy with other numerics over those with the nominal ones, and what NaN cost
bus             one reading and one command on the emulated motor bus over the time of their bits on a wire of 4 Mbaud
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

import numpy as np
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import deploy
import fit_ndm as F
import hand as H
import sim
import train_policy as T

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="a minute instead of ten, and rougher")
parser.add_argument("--policy", type=Path, nargs="*", default=sorted((ROOT / "checkpoints").glob("policy*.pt")))
parser.add_argument("--only", nargs="+", choices=("environment", "fit", "latency", "jitter", "physics", "bus"))
args = parser.parse_args()
TICK = 1 / H.CONTROL_HZ


def show(name, value, aim=""):
    print(f"{name:<58} {value:>9}   {aim}", flush=True)


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(spent):
    """Speed of the first over the second, from their seconds in blocks that took turns: what drifts cancels in a block, and the
    median forgets the blocks in which the machine did something else. The first block is to warm up."""
    return np.median([second / first for first, second in spent[1:]])


def environment():
    env = sim.Rotation(256, T.objects_of("cuboid+cylinder"), ["palm_up", "palm_down"], ["+z", "-z"])
    rng = np.random.default_rng(0)
    moves = rng.uniform(-1, 1, (8, env.n, H.N)) * sim.ALPHA
    state, ctrl = env.state.copy(), np.zeros((env.n, env.substeps, H.N))
    states, sensors = np.zeros((env.n, env.substeps, state.shape[1])), np.zeros((env.n, env.substeps, env.models[0].nsensordata))

    def ours():
        for move in moves:
            env.step(env.target + move)
            env.observe()

    def bare():
        target = begin
        for move in moves:
            target = np.clip(target + move, H.LOW, H.HIGH)
            ctrl[:] = target[:, None]
            env.pool.rollout(env.models, env.datas, state, nstep=env.substeps, control=ctrl, state=states, sensordata=sensors)
            state[:] = states[:, -1]

    spent = []
    for _ in range(8 if args.quick else 60):                             # bare repeats the steps that ours made: same contacts, same work
        env.reset(np.arange(env.n))
        state[:], begin = env.state, env.target.copy()
        spent.append((seconds(ours), seconds(bare)))
    show("environment: control steps/s over bare rollout", f"{ratio(spent):.3f}", ">= 0.80, better 0.95")


def fit():
    for batch in (inspect.signature(F.fit).parameters["batch"].default, 64):
        fit_steps(batch)


def fit_steps(batch):
    torch.manual_seed(0)
    q, a = torch.randn(16, 200, 16).mul(0.05).cumsum(1), torch.randn(16, 200, 16).mul(0.05).cumsum(1)
    loops = 5
    model = F.Dynamics(16, F.HIDDEN["joint"])
    hidden = F.HIDDEN["joint"]
    nets = [nn.Sequential(nn.Linear(2 * sim.W, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)) for _ in range(16)]
    opt, opts = torch.optim.Adam(model.parameters(), fused=True), [torch.optim.Adam(net.parameters(), fused=True) for net in nets]
    h, after = F.windows(q, a, torch.stack([torch.randint(16, (batch,)), torch.randint(200 - sim.W, (batch,))], 1))

    def batched():
        for _ in range(loops):
            loss = (model(h) - after).pow(2).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()

    def loop():
        for _ in range(loops):
            for i, (net, opt_i) in enumerate(zip(nets, opts)):
                qi, ai = h[:, i, :, 0], h[:, i, :, 1]
                x = torch.cat([qi[:, :-1] - qi[:, -1:], qi[:, -1:], ai - qi[:, -1:]], 1)
                loss = (qi[:, -1] + net(x)[:, 0] - after[:, i]).pow(2).mean()
                opt_i.zero_grad()
                loss.backward()
                opt_i.step()

    spent = [(seconds(batched), seconds(loop)) for _ in range(6 if args.quick else 20)]
    show(f"fit: batched joint-wise model over 16 networks, batch {batch}", f"{ratio(spent):.2f}", ">= 5")


@contextlib.contextmanager
def hand_on_a_bus():
    """The driver on the emulated motor bus, which runs in a process of its own at the speed of 4 Mbaud."""
    with tempfile.TemporaryDirectory() as folder:
        limits, report, link = (Path(folder) / name for name in ("limits.json", "report.json", "ttyLEAP"))
        limits.write_text(json.dumps([(H.JOINTS[k].low, H.JOINTS[k].high) for k in np.argsort(H.MOTOR_ID)]))
        bus = subprocess.Popen([sys.executable, ROOT / "tests/emulated_bus.py", "--link", link, "--report", report,
                                "--limits", limits, "--stops", limits])
        try:
            while not report.exists():
                time.sleep(0.05)
            with H.DynamixelHand(str(link), Path(folder) / "calibration.json") as hand:
                yield hand
        finally:
            bus.terminate()
            bus.wait()


def controller():
    policy = T.load_policy(args.policy[0])[0] if args.policy else T.Generalist().eval()
    trained = ROOT / "checkpoints/residual.pt"
    residual = F.load_residual(trained)[0] if trained.exists() else F.Residual().eval()
    return deploy.Controller(policy, residual, "palm_down", "+z", H.GRASP)


def latency():
    act, rng = controller(), np.random.default_rng(0)
    spent = []
    for _ in range(300 if args.quick else 3000):
        q = H.GRASP + 0.02 * rng.normal(size=H.N)
        start = time.perf_counter()
        act(q)
        spent.append(time.perf_counter() - start)
    p50, p99 = np.percentile(spent[20:], [50, 99])
    show("latency: policy + residual, median over the tick", f"{p50 / TICK:.4f}", f"({1000 * p50:.2f} ms)")
    show("latency: policy + residual, p99 over the tick", f"{p99 / TICK:.4f}", f"<= 0.04 ({1000 * p99:.2f} ms)")


def jitter():
    with hand_on_a_bus() as hand:
        hand.move_to(H.GRASP)
        write, times = hand._write, []
        hand._write = lambda target: (times.append(time.perf_counter()), write(target))
        deploy.episode(hand, controller(), steps=round((5 if args.quick else 60) / TICK))
    late = np.abs(np.diff(times) - TICK)
    for name, value in zip(("median", "p99", "worst"), np.percentile(late, [50, 99, 100])):
        show(f"jitter: |tick - 50 ms|, {name}, over the tick", f"{value / TICK:.4f}", f"({1000 * value:.2f} ms)")


OTHER = {
    "half the time step": (dict(timestep=1 / (2 * H.CONTROL_HZ * sim.SUBSTEPS)), "0.90-1.10"),
    "implicit integrator": (dict(integrator="implicit"), "0.90-1.10"),
    "pyramidal cone": (dict(cone="pyramidal"), ">= 0.70"),
    "impratio doubled": (dict(impratio=20), ">= 0.70"),
}


def physics():
    for path in args.policy:
        policy, content = T.load_policy(path)
        objects = [o for family in content["families"] for o in T.FAMILIES[family]]
        for wrist in content["wrists"]:
            results, lost = {}, 0
            for name, (options, _) in {"nominal": ({}, ""), **OTHER}.items():
                env = sim.Rotation(96 if args.quick else 256, objects, [wrist], content["axes"], seed=5, **options)
                r = sim.run_episodes(env, lambda env: T.targets(policy, env), title=f"{path.name} {wrist} {name}")
                results[name], lost = (r["RotR"].mean(), r["TTF"].mean()), lost + env.blowups
            rotr, ttf = results.pop("nominal")
            show(f"{path.name} {wrist}: RotR, nominal", f"{rotr:.1f}", f"({rotr / H.CONTROL_HZ:.2f} rad in 20 s)")
            show(f"{path.name} {wrist}: TTF, nominal", f"{ttf:.1f}", "s")
            for name, (r, t) in results.items():
                show(f"{path.name} {wrist}: RotR, {name}, over nominal", f"{r / rotr:.3f}" if rotr else "-", OTHER[name][1])
                show(f"{path.name} {wrist}: TTF, {name}, over nominal", f"{t / ttf:.3f}" if ttf else "-", OTHER[name][1])
            show(f"{path.name} {wrist}: episodes lost to NaN", f"{lost}", "0")
    if not args.policy:
        show("physics: no shipped policy", "-")


def bus():
    # bytes: fast sync read of 10 bytes from 16 motors, their one long answer, sync write of 4 bytes to each; 10 bits a byte
    least = (14 + 16 + 8 + 16 * (10 + 4) + 14 + 16 * 5) * 10 / 4e6
    with hand_on_a_bus() as hand:
        q, spent = hand.read().q, []
        for _ in range(60 if args.quick else 1000):
            start = time.perf_counter()
            hand.read()
            hand.command(q)
            spent.append(time.perf_counter() - start)
    p50, p99 = np.percentile(spent[10:], [50, 99])
    show("bus: read + command, median over the bits on the wire", f"{p50 / least:.2f}", f"({1000 * p50:.2f} of {1000 * least:.2f} ms, p99 {1000 * p99:.2f} ms)")


if __name__ == "__main__":
    for part in (environment, fit, latency, jitter, physics, bus):
        if not args.only or part.__name__ in args.only:
            part()
