"""Shared by all tests: a throw-away grasp cache with few grasps, a toy policy, and ways to run the
scripts."""
import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# in the background or under nohup these are ignored, and what tests start inherits that
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# never the user's own cache: the grasps put there below are too few to train with
os.environ["DEXNDM_CACHE"] = tempfile.mkdtemp(prefix="dexndm-cache-")
atexit.register(shutil.rmtree, os.environ["DEXNDM_CACHE"], ignore_errors=True)
# toy sizes: threads only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import hand as H
import sim
import train_policy

CUBE = sim.FAMILIES["cube"]
LIMITS = [(joint.low, joint.high) for joint in sorted(H.JOINTS, key=lambda j: j.motor_id)]


def small_cache(obj, n=24):
    """Put n grasps where `grasp_cache` looks for its full count: sampling those would be most of
    the suite's time, and scripts that run as processes of their own are to find them too."""
    sample = sim._sample_grasps

    def fewer(model, name, test, progress):
        return sample(model, name, test | {"count": n}, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim, "_sample_grasps", fewer)
        sim.grasp_cache(obj, progress=False)


@pytest.fixture(scope="session")
def grasps():
    """Wanted by every test that holds a cube of the toy family."""
    for obj in CUBE:
        small_cache(obj)


@pytest.fixture(scope="session")
def toy_policy(tmp_path_factory):
    """A policy that holds still, as a checkpoint."""
    torch.manual_seed(0)
    policy = train_policy.Generalist(width=8, blocks=1)
    torch.nn.init.zeros_(policy.out.weight)
    torch.nn.init.zeros_(policy.out.bias)
    path = tmp_path_factory.mktemp("toy") / "policy.pt"
    train_policy.save_checkpoint(
        path, "policy", config=policy.config, weights=policy.state_dict(), families=["cube"],
        wrists=["palm_up"], axes=["+z"], seed=0)
    return path


# takes away what a Python on Windows has not
WINDOWS = """
import signal, sys
missing = "termios fcntl pty tty resource dynamixel_sdk serial".split()
sys.modules.update(dict.fromkeys(missing))               # importing them fails
for name in ("SIGHUP", "SIGQUIT", "SIGALRM"):
    delattr(signal, name)
"""


def start(*command, **options):
    """A script as a user starts it, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=options.pop("cwd", ROOT), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options)


def finish(process):
    """(exit status, stdout, stderr), and nothing of its group left behind."""
    try:
        out, err = process.communicate(timeout=900)
    finally:
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass
    return process.returncode, out, err


def run(*command, **options):
    """The output of a script that ends well."""
    status, out, err = finish(start(*command, **options))
    assert status == 0, err
    return out


def wait_for(condition, process, seconds=120):
    """Until `condition()`; a process that ends before has something to say."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def driving(bus):
    return any(motor.driving for motor in bus.motors.values())


def refused(monkeypatch, capsys, module, *arguments):
    """Run a script's main as its `__main__` does, expect status 2 and return what it says."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        H.run(module.main)
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    return said


def one_line_problem(monkeypatch, capsys, module, *arguments):
    """As `refused`; returns the one line."""
    printed = refused(monkeypatch, capsys, module, *arguments).splitlines()
    lines = [line for line in printed if line.startswith(("error:", "Traceback"))]
    assert len(lines) == 1, lines
    return lines[0]
