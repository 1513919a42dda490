"""Steering: words and keys, the window, the film, the terminal and the real hand let go."""
import argparse
import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image

import deploy
import hand as H
import sim
import tables
import train_policy
from conftest import CUBE, LIMITS, ROOT, driving, finish, one_line_problem, start, wait_for
from emulated_bus import EmulatedBus
from test_pipeline import FakeHand

KNOWN = {"wrists": ["palm_up", "palm_down"], "axes": ["+z", "-z"]}
NO_DISPLAY = {name: value for name, value in os.environ.items()
              if name not in ("DISPLAY", "WAYLAND_DISPLAY")}


@pytest.fixture
def steering():
    return deploy.Steering(KNOWN, "palm_up", "+z")


def state(steering):
    return (*steering.axis, *steering.wrist, steering.holding, steering.corrected, steering.wish,
            steering.wake)


def hear(steering, *lines):
    for line in lines:
        steering.heard.put(line)
    steering.listen()


# ---------------------------------------------------------------------------------- words and keys
def test_words_say_what_is_wanted(steering):
    steering.obey("axis 0 -2 0")
    assert steering.axis.tolist() == [0, -1, 0]
    steering.obey("tilt 90 0 0")
    assert steering.axis == pytest.approx([0, 0, -1])
    steering.obey("wrist 0 3 0 0")
    assert steering.wrist.tolist() == [0, 1, 0, 0]
    steering.obey("turn 180 0 0")
    assert np.abs(steering.wrist) == pytest.approx([1, 0, 0, 0])
    for word, name, value in (
            ("hold", "holding", True), ("go", "holding", False),
            ("residual off", "corrected", False), ("residual on", "corrected", True),
            ("object", "wish", "object"), ("reset", "wish", "reset"), ("quit", "wish", "quit")):
        steering.obey(word)
        assert getattr(steering, name) == value


def test_every_key_is_a_word(steering):
    for word in deploy.KEYS.values():
        steering.obey(word)
    for key in "xXyYzZikjlrRogsq ":
        assert key in deploy.KEYS
    for key in "xXyYzZ":
        steering.obey(deploy.KEYS[key])
        assert steering.axis["xyz".index(key.lower())] == (1 if key.islower() else -1)


MALFORMED = [
    "", " ", "\t", "bogus", "AXIS 0 0 1", "axis", "axis 0", "axis 0 0", "axis 0 0 1 0",
    "axis 0 0 0", "axis nan 0 1", "axis 0 inf 1", "axis 0 0 -inf", "axis 1e400 0 0",
    "axis 1e308 1e308 1e308", "axis 0 0 1e-300", "axis a b c", "axis 0,0,1", "axis [0 0 1]",
    "axis 0 0 one", "axis +z", "tilt", "tilt 0 0 0", "tilt nan 0 0", "tilt 15", "tilt 1 2 3 4",
    "wrist", "wrist 1 0 0", "wrist 0 0 0 0", "wrist nan nan nan nan", "wrist 1 0 0 0 0",
    "wrist inf 0 0 0", "wrist palm_up", "turn 0 0 0", "turn 15 0", "turn x 0 0", "hold on",
    "hold hold", "go 1", "Hold", "residual", "residual maybe", "residual on off", "object 3",
    "reset now", "quit 0", "wait", "wait -1", "wait nan", "wait inf", "wait soon", "wait 1 2",
    "axis 0 0 1" + " " * 300, "hold" + "\x00" * 3, "\x00\x01\x02\xff", "\x1b[A", "hold;quit",
    "axis " + "1" * 100_000, "\ufffd" * 50, "9" * 5000,
]


@pytest.mark.filterwarnings("error")
def test_a_malformed_line_is_one_line_on_stderr_and_changes_nothing(steering, capsys):
    assert len(MALFORMED) >= 50
    steering.obey("axis 1 2 3")
    capsys.readouterr()
    before = state(steering)
    for line in MALFORMED:
        hear(steering, line)
        said = capsys.readouterr().err
        assert said.startswith("not understood: ") and said.count("\n") == 1, line[:40]
        assert said.isprintable() or said[:-1].isprintable(), "a terminal is not told to do things"
        assert len(said) < 300 and state(steering) == before, line[:40]


def test_words_wait_and_end(steering):
    hear(steering, "wait 0.2", "hold", None)
    for _ in range(3):
        steering.listen()
        assert not steering.holding
    steering.listen()
    assert steering.holding and steering.wish == "quit", "the end lets go"
    lasting = deploy.Steering(KNOWN, "palm_up", "+z")
    hear(lasting, "wait 0.5", None)
    for _ in range(9):
        lasting.listen()
    assert lasting.wish is None, "it goes on until then"
    lasting.listen()
    assert lasting.wish == "quit"


def test_words_after_a_wish_are_for_what_comes_then(steering):
    hear(steering, "object", "hold")
    assert steering.wish == "object" and not steering.holding
    steering.wish = None
    steering.listen()
    assert steering.holding


def test_the_wrist_turns_as_an_arm_would(steering):
    steering.obey("wrist 0 1 0 0")
    angles = []
    for _ in range(20):
        before = sim.gravity(steering.turned)[0]
        steering.listen()
        angles.append(np.arccos(np.clip(before @ sim.gravity(steering.turned)[0], -1, 1)))
    assert angles == pytest.approx([np.pi / 20] * 20, abs=1e-6), "half a turn in a second"
    assert sim.gravity(steering.turned)[0] == pytest.approx([0, 0, 1], abs=1e-9)
    here = steering.turned
    steering.listen()
    assert steering.turned == pytest.approx(here)


@pytest.mark.parametrize("wrist, felt", [
    ((1, 0, 0, 0), (1, 0, 0, 0)), ((-1, 0, 0, 0), (1, 0, 0, 0)), ((0, -1, 0, 0), (0, 1, 0, 0)),
    ((0, 0, 0, 1), (1, 0, 0, 0)),                # the whole hand turned about the vertical
    ((0, 0, 1, 0), (0, 1, 0, 0)),
    ((1, 0.1, 0, 0), np.array((1, 0.1, 0, 0)) / 1.01 ** 0.5)])
def test_the_policy_is_told_a_wrist_as_it_knows_them(steering, wrist, felt):
    steering.turned = sim.unit(wrist)
    assert steering.felt() == pytest.approx(felt, abs=1e-9)
    assert sim.gravity(steering.felt())[0] == pytest.approx(sim.gravity(steering.turned)[0])


def test_what_the_policy_was_not_trained_on_is_said_once(steering, capsys):
    hear(steering, "axis 0 0 -1", "wrist 0 1 0 0", "tilt 5 0 0")
    assert capsys.readouterr().err == ""
    hear(steering, "axis 1 0 0", "tilt 0 15 0", "hold")
    assert capsys.readouterr().err == "note: the policy was never trained on this axis\n"
    hear(steering, "wrist 1 1 0 0")
    assert capsys.readouterr().err == "note: the policy was never trained on this wrist\n"
    hear(steering, "axis 0 0 1", "axis 0 1 0")
    assert capsys.readouterr().err.count("axis") == 1
    assert steering.axis.tolist() == [0, 1, 0], "and it goes on"


def test_keys_of_a_windows_console(monkeypatch):
    typed = iter("z\xe0H\0Kq\xe0S")
    with monkeypatch.context() as windows:
        windows.setitem(sys.modules, "msvcrt", types.SimpleNamespace(getwch=lambda: next(typed)))
        windows.setattr(os, "name", "nt")
        keys = [deploy.read_some(0, True) for _ in range(5)]
    assert keys == ["z", "\x1b[A", "\x1b[D", "q", "\x1b[~"]


def test_macos_is_told_to_use_mjpython(monkeypatch, capsys):
    import mujoco.viewer                                 # as what it is, before
    hand = sim.VirtualHand(0)
    with monkeypatch.context() as macos:
        macos.setattr(sys, "platform", "darwin")
        assert sim.open_window(hand) is None
    said = capsys.readouterr().err
    assert said.startswith("no window, going on as text") and "use mjpython" in said
    assert said.count("\n") == 1 and mujoco.viewer


# -------------------------------------------------------------------------------------- controller
class Always:
    """A policy and a residual that move every joint alike."""
    def __call__(self, observation, move=None):
        return torch.full((1, H.N), 1.0 if move is None else 0.01 / deploy.SHARE)


def test_holding_sends_the_same_and_the_residual_comes_and_goes(steering):
    controller = deploy.Controller(Always(), Always(), "palm_up", "+z", H.GRASP)

    def step(*words):
        for word in words:
            steering.obey(word)
        steering.steer(controller, Always())
        return controller(H.GRASP) - H.GRASP

    inner = np.argmin(np.abs(H.GRASP - (H.LOW + H.HIGH) / 2))        # far from its limits
    assert step()[inner] == pytest.approx(sim.ALPHA + 0.01)
    assert step("hold")[inner] == step()[inner] == pytest.approx(sim.ALPHA + 0.01)
    assert step("go", "residual off")[inner] == pytest.approx(2 * sim.ALPHA)
    assert step("residual on")[inner] == pytest.approx(3 * sim.ALPHA + 0.01)
    assert step("axis 1 0 0")[inner] and controller.axis.tolist() == [[1, 0, 0]]
    still = deploy.Controller(Always(), None, "palm_up", "+z", H.GRASP)
    still.holding = True
    assert np.array_equal(still(H.GRASP + 0.1), H.GRASP), "from the beginning"


def test_a_virtual_hand_that_was_turned_is_one_that_is_held_so(grasps):
    held = sim.VirtualHand(3, wrist="palm_down", load=CUBE[0])
    turned = sim.VirtualHand(3, load=CUBE[0])
    assert not np.allclose(held.model().opt.gravity, turned.model().opt.gravity)
    turned.turn(sim.WRISTS["palm_down"])
    assert np.array_equal(held.model().opt.gravity, turned.model().opt.gravity)
    off = held.model().opt.gravity / 9.81 @ [0, 0, 1]
    assert np.cos(sim.WRIST_ERROR) <= off < 1, "and a little wrong"
    (trial,) = sim.trials([CUBE[0]], "palm_down", ["+z"], 1, 0)
    for hand in (held, turned):
        hand.begin(trial)
        for _ in range(5):
            hand.command(H.GRASP)
    assert np.array_equal(held.qpos(), turned.qpos())


# ------------------------------------------------------------------------------- the script, piped
def live(policy, *arguments, words=None, env=None, port="sim:0"):
    process = start(
        "deploy.py", "--live", "--base", "--port", port, "--wrist", "palm_up", "--axis=+z",
        "--policy", policy, *arguments, stdin=subprocess.PIPE, env=env or NO_DISPLAY)
    if words is not None:
        process.stdin.write(words)
        process.stdin.close()
        process.stdin = None
    return process


def test_a_script_of_words_is_filmed_without_a_display(toy_policy, grasps, tmp_path):
    film = tmp_path / "live.gif"
    words = ("wait 1\naxis 0 0 -1\nbogus\r\nwrist 0 1 0 0\nwait 1.5\nobject\nwait 0.5\n\xff\xfe\n"
             "hold\nwait 0.5\nreset\nwait 0.5")
    status, out, err = finish(live(toy_policy, "--gif", film, words=words))
    assert status == 0, err
    lines = err.splitlines()
    assert lines.count("not understood: 'bogus\\r'") == 1
    assert sum(line.startswith("not understood") for line in lines) == 2
    assert "note: the policy was never trained on this axis" in lines
    assert "note: the policy was never trained on this wrist" in lines
    assert "Traceback" not in err
    with Image.open(film) as image:
        assert 40 <= image.n_frames <= 44, "4 s at 10 pictures a second"
        first = np.asarray(image.convert("RGB"), float)
        image.seek(24)
        hanging = np.asarray(image.convert("RGB"), float)
    # the hand is dark, and the sky is not: it was below the object and hangs above it
    def height(picture):
        return np.flatnonzero((picture.sum(2) < 250).any(1)).mean()
    assert height(first) > height(hanging) + 10


def test_the_same_words_make_the_same_film(toy_policy, grasps, tmp_path):
    films = []
    for name in ("a.gif", "b.gif"):
        status, _, err = finish(live(
            toy_policy, "--gif", tmp_path / name, words="wait 0.5\naxis 0 0 -1\nwait 0.5\n"))
        assert status == 0, err
        films.append((tmp_path / name).read_bytes())
    assert films[0] == films[1]


def test_without_a_display_it_goes_on_as_text_in_real_time(toy_policy, grasps):
    process = live(toy_policy, words="residual off\nhold\nwait 6\n")
    status, out, err = finish(process)
    assert status == 0, err
    assert err.count("no window, going on as text: there is no display") == 1
    shown = [line for line in err.splitlines() if line.startswith("time ")]
    assert len(shown) == 1 and "time 5.0 s" in shown[0]
    for part in ("turned", "rad", "held", "holds still", "axis 0 0 1 wrist palm_up residual off",
                 "lag", "deg"):
        assert part in shown[0], part


@pytest.mark.parametrize("flags", [("--compare",), ("--record", "x"), ("--json", "x")])
def test_live_takes_no_measurements(monkeypatch, capsys, flags):
    line = one_line_problem(monkeypatch, capsys, deploy, "--port", "sim:0", "--live", *flags)
    assert line.startswith("error: --live")


# ------------------------------------------------------------------------------------- a terminal
@contextlib.contextmanager
def terminal(*command):
    """A script in a pseudo-terminal of its own: its process, the other side and the terminal."""
    other, own = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=NO_DISPLAY | {"COLUMNS": "150"},
        stdin=own, stdout=own, stderr=own, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, termios.TIOCSCTTY, 0))
    try:
        yield process, other, own
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        os.close(other)
        os.close(own)


def until(other, text, seconds=120):
    """What the terminal shows, until `text` appears."""
    shown, end = "", time.monotonic() + seconds
    while text not in shown:
        assert time.monotonic() < end, f"no {text!r} in {shown[-2000:]!r}"
        if select.select([other], [], [], 0.2)[0]:
            shown += os.read(other, 65536).decode(errors="replace")
    return shown


def drained(other, process, seconds=60):
    """Let it end: a terminal that nobody reads is full at some time."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < end, "it does not end"
        if select.select([other], [], [], 0.05)[0]:
            os.read(other, 65536)
    return process.returncode


def press(other, key):
    os.write(other, key.encode())


def live_arguments(policy, port="sim:0"):
    return ("deploy.py", "--live", "--base", "--port", port, "--wrist", "palm_up", "--axis=+z",
            "--policy", policy)


def modes(terminal):
    flags = termios.tcgetattr(terminal)
    return flags[:3] + [flags[3] & ~getattr(termios, "PENDIN", 0)] + flags[4:]


def test_keys_of_a_terminal_steer(toy_policy, grasps):
    with terminal(*live_arguments(toy_policy)) as (process, other, own):
        before = modes(own)
        assert "arrows" in until(other, "axis 0 0 1")
        assert modes(own) != before
        press(other, "Z")
        until(other, "axis 0 0 -1")
        press(other, "l")
        until(other, "axis 0 0.26 -0.97")
        press(other, "\x1b[C\x1b[C")
        until(other, "wrist palm_up +30")
        press(other, "\x1bOD\x1bOD")
        until(other, "wrist palm_up residual")
        press(other, "\x1bx?\x1b[3~")                    # no key, a key, no key, a key that is none
        until(other, "axis 1 0 0")
        press(other, " ")
        until(other, "holds still")
        press(other, "q")
        assert drained(other, process) == 0
        assert modes(own) == before


@pytest.mark.parametrize("sign, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_terminal_is_as_before_however_it_ends(toy_policy, grasps, sign, status):
    for delay in (None, np.random.default_rng(int(sign)).uniform(0, 0.5)):
        with terminal(*live_arguments(toy_policy)) as (process, other, own):
            before = modes(own)
            until(other, "Keys of")              # the first thing that it says
            if delay is None:
                until(other, "time 0.5 s")
            else:
                time.sleep(delay)
            if sign == signal.SIGINT:
                press(other, "\x03")             # as the terminal sends it
            else:
                process.send_signal(sign)
            assert drained(other, process) == status
            assert modes(own) == before


# --------------------------------------------------------------------------- a real hand, emulated
@pytest.fixture
def bus():
    with EmulatedBus(limits=LIMITS, stops=LIMITS) as bus:
        yield bus


def angles(bus):
    return np.array(bus.angles())[H.MOTOR_ID]


def moving_policy(folder):
    """A policy that closes every joint, as a checkpoint."""
    torch.manual_seed(0)
    policy = train_policy.Generalist(width=8, blocks=1)
    torch.nn.init.zeros_(policy.out.weight)
    torch.nn.init.constant_(policy.out.bias, 0.1)
    train_policy.save_checkpoint(
        folder / "moving.pt", "policy", config=policy.config, weights=policy.state_dict(),
        families=["cube"], wrists=["palm_up"], axes=["+z"], seed=0)
    return folder / "moving.pt"


def test_words_steer_a_real_hand(bus, tmp_path):
    process = live(moving_policy(tmp_path), port=bus.path)

    def tell(words):
        process.stdin.write(words)
        process.stdin.flush()

    wait_for(lambda: driving(bus) and np.abs(angles(bus) - H.GRASP).max() < 0.1, process)
    time.sleep(1.0)
    assert np.abs(angles(bus) - H.GRASP).max() < 0.1, "it waits for the object"
    tell("bogus\naxis 0 0 1\ngo\n")
    wait_for(lambda: (angles(bus) - H.GRASP).max() > 0.2, process)
    tell("hold\n")
    time.sleep(1.0)
    there = angles(bus)
    time.sleep(1.0)
    assert np.abs(angles(bus) - there).max() < 0.02 and driving(bus), "it holds"
    tell("reset\n")
    wait_for(lambda: np.abs(angles(bus) - H.GRASP).max() < 0.1, process)
    time.sleep(1.5)
    tell("quit\n")
    status, out, err = finish(process)
    assert status == 0, err
    assert not driving(bus) and err.count("not understood") == 1
    assert err.count("between the fingertips") == 2


def test_a_real_hand_lets_go_when_whoever_steers_is_gone(bus, toy_policy):
    process = live(toy_policy, port=bus.path)
    wait_for(lambda: driving(bus), process)
    process.stdin.close()
    process.stdin = None
    assert finish(process)[0] == 0 and not driving(bus)


@pytest.mark.parametrize("then, reconnects", [(["go", "wait 1", "quit"], 1), (["quit"], 0)])
def test_a_fault_of_the_bus_is_waited_for(steering, toy_policy, monkeypatch, capsys, then,
                                          reconnects):
    hand = FakeHand(realtime=True, faulty=(10,))
    monkeypatch.setattr(sim, "open_hand", lambda port: hand)
    for word in ("go", "wait 3", *then):
        steering.heard.put(word)
    args = argparse.Namespace(port="/dev/hand", wrist=["palm_up"], axis=["+z"])
    policy, _ = train_policy.load_policy(toy_policy)
    deploy.live_on_a_real_hand(args, policy, None, steering)
    assert hand.reconnects == reconnects and hand.count == 1 + reconnects
    said = capsys.readouterr().err
    assert said.count("motor 5 (mf_mcp) does not answer") == said.count("mend that") == 1


def test_a_hand_that_does_not_come_back_is_asked_for_again(steering, toy_policy, monkeypatch,
                                                           capsys):
    hand, tries = FakeHand(realtime=True, faulty=(10,)), []

    def reconnect(patience):
        tries.append(patience)
        if len(tries) == 1:
            raise H.Problem("no U2D2 found")

    hand.reconnect = reconnect
    monkeypatch.setattr(sim, "open_hand", lambda port: hand)
    for word in ("go", "wait 2", "go", "wait 1", "go", "wait 1", "quit"):
        steering.heard.put(word)
    args = argparse.Namespace(port="/dev/hand", wrist=["palm_up"], axis=["+z"])
    policy, _ = train_policy.load_policy(toy_policy)
    deploy.live_on_a_real_hand(args, policy, None, steering)
    said = capsys.readouterr().err
    assert tries == [0, 0] and said.count("mend that") == 2 and "no U2D2 found" in said


def test_keys_stop_a_real_hand_on_its_way_to_the_grasp(bus, toy_policy):
    with terminal(*live_arguments(toy_policy, bus.path)) as (process, other, own):
        before = modes(own)
        until(other, "Keys of")
        wait_for(lambda: driving(bus), process)
        press(other, " ")
        time.sleep(0.7)
        there = angles(bus)
        time.sleep(1.0)
        assert np.abs(angles(bus) - there).max() < 0.02 and driving(bus), "it holds"
        assert np.abs(there - H.GRASP).max() > 0.2, "on the way"
        press(other, "g")
        until(other, "between the fingertips")
        press(other, "s")
        time.sleep(0.2)
        press(other, "q")
        assert drained(other, process) == 0
        assert not driving(bus) and modes(own) == before


def test_a_reset_on_the_way_to_the_grasp_does_not_keep_it_from_stopping(bus, toy_policy):
    process = live(toy_policy, port=bus.path)
    process.stdin.write("reset\nhold\n")
    process.stdin.flush()
    wait_for(lambda: driving(bus), process)
    time.sleep(3.0)
    assert np.abs(angles(bus) - H.GRASP).max() > 0.2 and driving(bus), "it holds on the way"
    process.stdin.write("object\nquit\n")
    process.stdin.flush()
    assert finish(process)[0] == 0 and not driving(bus)


@pytest.mark.parametrize("seconds", [0.0, 0.4, 6.0])
def test_ctrl_c_at_any_moment_lets_go_and_leaves_the_terminal_as_it_was(bus, toy_policy, seconds):
    with terminal(*live_arguments(toy_policy, bus.path)) as (process, other, own):
        before = modes(own)
        until(other, "Keys of")
        if seconds:
            wait_for(lambda: driving(bus), process)
        time.sleep(seconds)
        press(other, "\x03")
        assert drained(other, process) == 130
        assert not driving(bus) and modes(own) == before


# ------------------------------------------------------------------------------------- the window
@pytest.fixture
def display(tmp_path):
    """A virtual display; the file that its picture is in."""
    if not shutil.which("Xvfb"):
        pytest.skip("Xvfb is not installed")
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "1000x700x24", "-nolisten", "tcp",
         "-fbdir", tmp_path], pass_fds=[write], stderr=subprocess.DEVNULL)
    os.close(write)
    try:
        number = b""
        while not number.endswith(b"\n"):
            chunk = os.read(read, 16)
            assert chunk, "the display did not start"
            number += chunk
        yield f":{int(number)}", tmp_path / "Xvfb_screen0"
    finally:
        os.close(read)
        server.terminate()
        server.wait(20)


def screenshot(path):
    """(height, width, 3) of an X window dump with 32 bits a pixel, as Xvfb keeps it."""
    data = path.read_bytes()
    size, _, _, _, width, height = np.frombuffer(data[:24], ">u4")
    row, colours = np.frombuffer(data[48:52], ">u4")[0], np.frombuffer(data[76:80], ">u4")[0]
    start = int(size + 12 * colours)
    pixels = np.frombuffer(data[start:start + int(row * height)], np.uint8)
    return pixels.reshape(height, row)[:, :4 * width].reshape(height, width, 4)[:, :, 2::-1]


def seen(picture):
    """How many pixels are orange (the object), dark grey (the hand) and blue (the arrow)."""
    r, g, b = np.moveaxis(picture.astype(int), 2, 0)
    return ((r > 120) & (r > g + 30) & (g > b + 30)).sum(), (
        (picture.max(2) < 90) & (np.ptp(picture.astype(int), 2) < 25) & (r > 5)).sum(), (
        (b > r + 60) & (b > 100)).sum()


def test_the_window_shows_hand_and_object(toy_policy, grasps, display):
    name, screen = display
    process = live(toy_policy, env=os.environ | {"DISPLAY": name, "LP_NUM_THREADS": "1"})

    def shown():
        try:
            thing, hand, arrow = seen(screenshot(screen))
        except ValueError:                               # being written
            return False
        return thing > 1000 and hand > 3000 and arrow > 50

    wait_for(shown, process, 240)
    process.stdin.write("object\n")                      # another model in the same window
    process.stdin.flush()
    time.sleep(2)
    wait_for(shown, process, 240)
    process.stdin.write("quit\n")
    process.stdin.close()
    process.stdin = None
    status, _, err = finish(process)
    assert status == 0 and "no window" not in err, err


# --------------------------------------------------------------------------------- what it costs
def test_the_cost_of_steering_is_measured(toy_policy, grasps, monkeypatch, capsys, tmp_path):
    content = torch.load(toy_policy, weights_only=True)
    torch.save(content | KNOWN, tmp_path / "policy.pt")
    monkeypatch.setattr(sys, "argv", [
        "tables.py", "--steer", "--policy", str(tmp_path / "policy.pt"), "--episodes", "2",
        "--workers", "1", "--port", "sim:100:wrist",
        "--residual", str(ROOT / "checkpoints/residual.pt")])
    tables.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [
        [kind, change] for kind in ("base", "residual") for change in tables.CHANGES]
    for line in lines[2:]:
        assert int(line.split()[2]) <= 2
    held = [line for line in lines if " none " in line and line.split()[2] == "2"]
    assert held and all(" 0.00 +- 0.00" in line for line in held)
