"""A LEAP Hand's motor bus without the hand: 16 Dynamixel X330 motors behind a pseudo-terminal.

    with EmulatedBus() as bus:                    # in a thread of this process
        hand = MyDriver(bus.path)                 # a serial device path, baud 4,000,000
        bus.overload(3); bus.unplug(); bus.plug()

    python tests/emulated_bus.py --link /tmp/leap/ttyLEAP --report /tmp/leap/report.json \\
        --control /tmp/leap/control [--faulty-watchdog] [--drop 0.01] [--corrupt 0.005] ...
    echo "overload 3" > /tmp/leap/control         # own process: outlives a killed driver

Written from the ROBOTIS manual (Protocol 2.0, XL330/XC330-M288 control tables), not from a driver.
Where the manual is silent the motor takes the side that is worse for a careless driver: a goal
written with torque off is kept, so torque-on jumps to it; after a cleared watchdog the old goal
drives again; motors behind a silent one in a sync read stay silent too (`sync_chain`).
"""
import argparse
import heapq
import json
import math
import os
import pty
import queue
import random
import select
import signal
import tempfile
import termios
import threading
import time
import tty
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass

BAUDS = (9600, 57600, 115200, 1_000_000, 2_000_000, 3_000_000, 4_000_000)  # register 8
TERMIOS_BAUD = {getattr(termios, f"B{b}"): b for b in BAUDS}
PING, READ, WRITE, REG_WRITE, ACTION, FACTORY_RESET, REBOOT, CLEAR = 1, 2, 3, 4, 5, 6, 8, 0x10
SYNC_READ, SYNC_WRITE, FAST_SYNC_READ = 0x82, 0x83, 0x8A
BULK_READ, BULK_WRITE, FAST_BULK_READ, STATUS, BROADCAST = 0x92, 0x93, 0x9A, 0x55, 254
RESULT_FAIL, INSTRUCTION, CRC, DATA_RANGE, DATA_LENGTH, DATA_LIMIT, ACCESS = range(1, 8)
VOLTAGE, OVERHEATING, OVERLOAD = 1, 4, 32       # bits of Hardware Error Status and Shutdown

# address, bytes, name, access, default, min, max; a negative min makes it signed
CONTROL_TABLE = """
0 2 model_number R 1200 0 65535              | 2 4 model_information R 0 0 0
6 1 firmware_version R 52 0 255              | 7 1 id RW 1 0 252
8 1 baud_rate RW 1 0 6                       | 9 1 return_delay_time RW 250 0 254
10 1 drive_mode RW 0 0 13                    | 11 1 operating_mode RW 3 0 16
12 1 secondary_id RW 255 0 255               | 13 1 protocol_type RW 2 2 22
20 4 homing_offset RW 0 -1044479 1044479     | 24 4 moving_threshold RW 10 0 1023
31 1 temperature_limit RW 70 0 100           | 32 2 max_voltage_limit RW 70 31 70
34 2 min_voltage_limit RW 35 31 70           | 36 2 pwm_limit RW 885 0 885
38 2 current_limit RW 1750 0 1750            | 44 4 velocity_limit RW 445 0 2047
48 4 max_position_limit RW 4095 0 4095       | 52 4 min_position_limit RW 0 0 4095
60 1 startup_configuration RW 0 0 3          | 62 1 pwm_slope RW 140 1 255
63 1 shutdown RW 53 0 255                    | 64 1 torque_enable RW 0 0 1
65 1 led RW 0 0 1                            | 68 1 status_return_level RW 2 0 2
69 1 registered_instruction R 0 0 1          | 70 1 hardware_error_status R 0 0 255
76 2 velocity_i_gain RW 1600 0 16383         | 78 2 velocity_p_gain RW 180 0 16383
80 2 position_d_gain RW 0 0 16383            | 82 2 position_i_gain RW 0 0 16383
84 2 position_p_gain RW 400 0 16383          | 88 2 feedforward_2nd_gain RW 0 0 16383
90 2 feedforward_1st_gain RW 0 0 16383       | 98 1 bus_watchdog RW 0 0 127
100 2 goal_pwm RW 0 -885 885                 | 102 2 goal_current RW 0 -2352 2352
104 4 goal_velocity RW 0 -2047 2047          | 108 4 profile_acceleration RW 0 0 32767
112 4 profile_velocity RW 0 0 32767          | 116 4 goal_position RW 0 -1048575 1048575
120 2 realtime_tick R 0 0 32767              | 122 1 moving R 0 0 1
123 1 moving_status R 0 0 255                | 124 2 present_pwm R 0 -885 885
126 2 present_current R 0 -2352 2352         | 128 4 present_velocity R 0 -32768 32767
132 4 present_position R 0 -1 0              | 136 4 velocity_trajectory R 0 -1 0
140 4 position_trajectory R 0 -1 0           | 144 2 present_input_voltage R 50 0 255
146 1 present_temperature R 28 0 255         | 147 1 backup_ready R 0 0 1
"""


@dataclass(frozen=True)
class Item:
    address: int
    size: int
    name: str
    writable: bool
    default: int
    low: int
    high: int


def _items():
    for line in CONTROL_TABLE.strip().replace("\n", "|").split("|"):
        address, size, name, access, *numbers = line.split()
        yield Item(int(address), int(size), name, access == "RW", *map(int, numbers))
    for i in range(20):
        yield Item(168 + 2 * i, 2, f"indirect_address_{i + 1}", True, 208 + i, 64, 227)
        yield Item(208 + i, 1, f"indirect_data_{i + 1}", True, 0, 0, 255)


ITEMS = {item.name: item for item in _items()}
ITEM_AT = {item.address + k: item for item in ITEMS.values() for k in range(item.size)}
TABLE_END = 228
# what differs on the metal-geared XC330-M288
MODEL_DEFAULTS = {
    1200: {},
    1240: dict(current_limit=2352, velocity_limit=350, shutdown=52, velocity_p_gain=50,
               position_d_gain=500, position_p_gain=1100),
}
GOALS = ("goal_pwm", "goal_current", "goal_velocity", "goal_position")
COUNTS = 4096 / math.tau                        # encoder counts per radian
VELOCITY_UNIT = 0.229 * math.tau / 60           # rad/s


def _crc_table():
    for byte in range(256):
        value = byte << 8
        for _ in range(8):
            value = (value << 1) ^ (0x8005 if value & 0x8000 else 0)
        yield value & 0xFFFF


CRC_TABLE = tuple(_crc_table())


def crc16(data, crc=0):
    """CRC-16, polynomial 0x8005, start 0, as in the manual."""
    for byte in data:
        crc = ((crc << 8) & 0xFFFF) ^ CRC_TABLE[(crc >> 8) ^ byte]
    return crc


def packet(id, instruction, params=b""):
    """One Protocol 2.0 packet, stuffed and with CRC. A status packet's first parameter is its
    error."""
    body = (bytes([instruction]) + bytes(params)).replace(b"\xff\xff\xfd", b"\xff\xff\xfd\xfd")
    head = b"\xff\xff\xfd\x00" + bytes([id]) + (len(body) + 2).to_bytes(2, "little") + body
    return head + crc16(head).to_bytes(2, "little")


@dataclass
class Joint:
    """A finger joint as it is really built: where it is, and how its motor's horn was put on."""
    q: float = 0.0                 # joint angle, rad
    w: float = 0.0                 # rad/s
    # motor counts at q = 0, beyond 2048 (a tooth ~ 164, 90 deg = 1024)
    zero_offset: float = 0.0
    sign: int = 1                  # -1: mounted the other way round
    stuck: bool = False            # jammed: does not move whatever the torque
    stops: tuple = (-math.inf, math.inf)   # mechanical stops, rad


class Motor:
    """One X330: control table, drive, shutdown and watchdog. `motor["goal_position"]` reads a
    register, `motor["temperature_limit"] = 60` sets it past all checks (as if the motor came like
    that)."""
    # XL330 constants identified by Rhoban (arXiv 2410.08650), at the output shaft
    KT, R, ARMATURE, FRICTION, VISCOUS = 0.366, 2.811, 0.0018, 0.0095, 0.005
    AMBIENT, COOLING, HEATING = 28.0, 1 / 120, 2.5    # deg C, 1/s, K/s per A^2
    OVERLOAD_CURRENT, OVERLOAD_TIME = 0.6, 4.0        # A, s: ours; the firmware's is not published

    def __init__(self, bus, id, model, baud, return_delay, firmware):
        self.bus, self.joint, self.model, self.firmware = bus, Joint(), model, firmware
        self.mem = bytearray(TABLE_END)
        self.silent_until = 0.0        # while rebooting, or for ever when silenced
        self.temperature = self.AMBIENT
        self.current = self.duty = 0.0     # A, -1..1
        self.tripped = self.shut_down = False
        self.overloaded_for = 0.0
        self.registered = None
        self.last_packet = self.stepped = time.monotonic()
        self.factory_reset(keep=())
        self["id"], self["baud_rate"] = id, BAUDS.index(baud)
        self["return_delay_time"] = return_delay
        self.boot()

    def __getitem__(self, name):
        item = ITEMS[name]
        part = self.mem[item.address:item.address + item.size]
        return int.from_bytes(part, "little", signed=item.low < 0)

    def __setitem__(self, name, value):
        item = ITEMS[name]
        self.mem[item.address:item.address + item.size] = (
            int(value) & (1 << 8 * item.size) - 1).to_bytes(item.size, "little")

    def _defaults(self, items):
        for item in items:
            self[item.name] = MODEL_DEFAULTS.get(self.model, {}).get(item.name, item.default)

    def factory_reset(self, keep):
        kept = {name: self[name] for name in keep}
        self._defaults(i for i in ITEMS.values() if i.address < 64)
        self["model_number"], self["firmware_version"] = self.model, self.firmware
        for name, value in kept.items():
            self[name] = value

    def boot(self):
        """RAM to its defaults; the shaft stays where it is, counted within one turn."""
        self._defaults(i for i in ITEMS.values() if i.address >= 64)
        self.turns = 0                                # whole turns counted since power-on
        self.turns = -math.floor(self.position() / 4096)
        self["goal_pwm"], self["goal_current"] = self["pwm_limit"], self["current_limit"]
        self.target = self["goal_position"] = round(self.position())
        self.tripped = self.shut_down = False
        self.overloaded_for, self.registered = 0.0, None

    # ---- the shaft
    @property
    def direction(self):
        return -1 if self["drive_mode"] & 1 else 1

    def position(self):
        """Counts, as Present Position reports them before rounding."""
        j = self.joint
        raw = 2048 + j.zero_offset + j.sign * j.q * COUNTS
        return self.direction * raw + self["homing_offset"] + 4096 * self.turns

    def angle_at(self, counts):
        """The true joint angle (rad) at which Present Position would read `counts`."""
        j = self.joint
        raw = self.direction * (counts - self["homing_offset"] - 4096 * self.turns)
        return j.sign * (raw - 2048 - j.zero_offset) / COUNTS

    @property
    def driving(self):
        """Is there torque on the shaft?"""
        return bool(self["torque_enable"]) and not (self.tripped and not self.bus.faulty_watchdog)

    def fail(self, bit):
        """A hardware error: shutdown if the Shutdown register says so."""
        self["hardware_error_status"] |= bit
        if self["shutdown"] & bit:
            self.shut_down = True
            self["torque_enable"] = 0

    def step(self, now):
        """Watchdog, shutdown, and the joint's motion up to `now` (s, monotonic)."""
        span, self.stepped = min(now - self.stepped, 1.0), now
        watchdog = self["bus_watchdog"]
        counting = self["torque_enable"] and 0 < watchdog < 128
        if counting and now - self.last_packet > 0.02 * watchdog:
            self["bus_watchdog"], self.tripped = 255, True
            self.bus.stats["watchdog_trips"] += 1
        physics = self.bus.physics
        if physics is None or not physics.moves(self):
            self._move(span)
        else:
            physics.step(now)
        self.temperature += span * (self.HEATING * self.current ** 2
                                    - self.COOLING * (self.temperature - self.AMBIENT))
        overloaded = abs(self.current) > self.OVERLOAD_CURRENT
        self.overloaded_for = self.overloaded_for + span if overloaded else 0.0
        low, high = self["min_voltage_limit"], self["max_voltage_limit"]
        if not low <= round(self.bus.voltage * 10) <= high:
            self.fail(VOLTAGE)
        elif not self["shutdown"] & VOLTAGE:          # a mere warning goes when the voltage is back
            self["hardware_error_status"] &= ~VOLTAGE
        if self.temperature > self["temperature_limit"]:
            self.fail(OVERHEATING)
        if self.overloaded_for > self.OVERLOAD_TIME:
            self.fail(OVERLOAD)

    def _move(self, span):
        """Position/velocity/current/PWM control of the joint for `span` seconds, in steps of at
        most 4 ms."""
        j, mode, driving = self.joint, self["operating_mode"], self.driving
        volts = max(self.bus.voltage, 0.1)
        if not driving:
            self.current = self.duty = 0.0
            if not j.w:
                return
        flip = j.sign * self.direction                # motor counts grow with flip * q
        zero = self.position() - flip * j.q * COUNTS
        p, d = self["position_p_gain"] / (256 * 885), self["position_d_gain"] / (16 * 885)
        goal, profile = self["goal_position"], self["profile_velocity"] * VELOCITY_UNIT * COUNTS
        goal_velocity = self["goal_velocity"] * VELOCITY_UNIT
        goal_current = self["goal_current"] / 1000
        cap = min(self["pwm_limit"], abs(self["goal_pwm"])) / 885
        amps = {0: self["current_limit"], 5: abs(self["goal_current"])}.get(mode, 5000) / 1000
        steps = max(1, math.ceil(span / 0.004))
        dt = span / steps
        for _ in range(steps):
            w = flip * j.w
            if driving:
                if mode == 0:
                    duty = (goal_current * self.R + self.KT * w) / volts
                elif mode == 1:
                    duty = (self.KT * goal_velocity + 2.0 * (goal_velocity - w)) / volts
                elif mode == 16:
                    duty = self["goal_pwm"] / 885
                else:
                    self.target = goal if not profile else \
                        self.target + max(-profile * dt, min(profile * dt, goal - self.target))
                    duty = p * (self.target - zero - flip * j.q * COUNTS) - d * w * COUNTS / 1000
                duty = max(-cap, min(cap, duty))
                self.current = max(-amps, min(amps, (duty * volts - self.KT * w) / self.R))
                self.duty = (self.current * self.R + self.KT * w) / volts
            if j.stuck:
                j.w = 0.0
                continue
            # friction is implicit in the new velocity: it stops the joint instead of shaking it
            push = dt / self.ARMATURE
            w = (w + push * self.KT * self.current) / (1 + push * self.VISCOUS)
            w = math.copysign(max(0.0, abs(w) - push * self.FRICTION), w)
            j.w = flip * w
            j.q += dt * j.w
            if not j.stops[0] <= j.q <= j.stops[1]:
                j.q, j.w = min(max(j.q, j.stops[0]), j.stops[1]), 0.0

    # ---- the control table as the bus sees it
    def error(self, number=0):
        return number | (0x80 if self["hardware_error_status"] else 0)

    def _real(self, address):
        """An Indirect Data byte stands for the address it was pointed at."""
        if 208 <= address < TABLE_END:
            slot = 168 + 2 * (address - 208)
            return int.from_bytes(self.mem[slot:slot + 2], "little")
        return address

    def read(self, address, length):
        """(error number, bytes). Gaps inside a block read as 0."""
        span = range(address, address + length)
        if not length or span[-1] >= TABLE_END or not any(a in ITEM_AT for a in span):
            return ACCESS, bytes(length)
        self["realtime_tick"] = int(time.monotonic() * 1000) % 32768
        moving = abs(self.joint.w) / VELOCITY_UNIT > self["moving_threshold"]
        self["moving"], self["moving_status"] = moving, 0 if moving else 1
        self["present_pwm"] = round(885 * self.duty)
        self["present_current"] = round(1000 * self.current)
        self["present_velocity"] = self["velocity_trajectory"] = round(
            self.joint.sign * self.direction * self.joint.w / VELOCITY_UNIT)
        self["present_position"] = round(self.position())
        self["position_trajectory"] = round(self.target)
        self["present_input_voltage"], self["present_temperature"] = \
            round(10 * self.bus.voltage), round(self.temperature)
        return 0, bytes(self.mem[self._real(a)] for a in span)

    def check(self, address, data):
        """(error number, {item name: value}) of a write, nothing changed yet."""
        values, given = {}, {self._real(address + k): byte for k, byte in enumerate(data)}
        for a in given:
            item = ITEM_AT.get(a)
            if item is None or not item.writable or (item.address < 64 and self["torque_enable"]):
                return ACCESS, {}
            raw = [given.get(item.address + k) for k in range(item.size)]
            if None in raw:
                return DATA_LENGTH, {}
            value = int.from_bytes(bytes(raw), "little", signed=item.low < 0)
            refused = item.name in GOALS and self["bus_watchdog"] == 255
            no_mode = item.name == "operating_mode" and value not in (0, 1, 3, 4, 5, 16)
            if not item.low <= value <= item.high or refused or no_mode:
                return DATA_RANGE, {}
            values[item.name] = value
        limit = {"goal_pwm": "pwm_limit", "goal_current": "current_limit",
                 "goal_velocity": "velocity_limit"}
        for name in values.keys() & limit.keys():
            if abs(values[name]) > self[limit[name]]:
                return DATA_LIMIT, {}
        if "goal_position" in values and self["operating_mode"] == 3 and not \
                self["min_position_limit"] <= values["goal_position"] <= self["max_position_limit"]:
            return DATA_LIMIT, {}
        if values.get("torque_enable") and self.shut_down:
            return RESULT_FAIL, {}                    # only a reboot brings a shut-down motor back
        return 0, values

    def write(self, address, data):
        """Error number; all or nothing."""
        error, values = self.check(address, data)
        self.bus.stats["refused_writes"] += bool(error)
        was_on, before = self["torque_enable"], self["goal_position"]
        for name, value in values.items():
            self[name] = value
        # the manual: profile and goals are reset with the mode
        if "operating_mode" in values:
            self._defaults(i for i in ITEMS.values()
                           if 76 <= i.address <= 90 or i.name.startswith("profile"))
            self["goal_pwm"], self["goal_current"] = self["pwm_limit"], self["current_limit"]
        if values.get("bus_watchdog") == 0:
            self.tripped = False
        if self["torque_enable"] and not was_on:
            self.target = before = self.position()
            if self["operating_mode"] == 3:           # position mode counts within one turn
                self.turns -= math.floor(self.position() / 4096)
                self.target = before = self.position()
            self.last_packet = time.monotonic()
        self.bus._seen_goal(self, values, before, was_on)
        return error


class EmulatedBus:
    """The chain of motors, the USB adapter and everything that can go wrong with them.

    ids            motor ids along the chain; `motors` is keyed by these, whatever register 7 says
                   later
    models         1200 (XL330-M288), 1240 (XC330-M288), or {id: model}
    baud           the motors' baud; return_delay: register 9, units of 2 us (factory 250)
    path           symlink to the pseudo-terminal (default: in a new temporary folder)
    faulty_watchdog  firmware 51: the watchdog register trips, the motor keeps driving
    baud_timing    a transaction takes at least its bits on the wire plus the return delays
    check_baud     motors are deaf unless the host's termios speed is theirs
    limits         [(low, high)] rad by chain position: goals that would put a joint outside are
                   counted
    stops          [(low, high)] rad by chain position: where the joint mechanically stops
    rates          {fault: probability per packet}, see `rate`; `delay` (s) is how late a delayed
                   reply is
    sync_chain     in a sync or bulk read, motors listed behind a silent one stay silent
    physics        set to an object with `step(now)` and `moves(motor)`, it moves the joints instead
                   of each by itself; see hand_on_the_bus.py
    report         json file of `snapshot`, rewritten every 0.2 s
    control        FIFO that takes fault commands
    """
    FAULTS = ("drop_request", "drop", "corrupt_request", "corrupt", "delay", "duplicate")
    COMMANDS = ("overload", "overheat", "hardware_error", "dip", "silence", "unplug", "plug",
                "rate", "inject", "stuck", "swap", "zero_offset", "sign", "push", "reset_stats",
                *FAULTS)

    physics = None

    def __init__(self, ids=range(16), models=1200, baud=4_000_000, return_delay=250, path=None,
                 faulty_watchdog=False, baud_timing=True, check_baud=True, reboot_time=0.3,
                 voltage=5.0, limits=None, stops=None, rates=None, delay=0.25, sync_chain=True,
                 seed=0, report=None, control=None):
        self.faulty_watchdog, self.baud_timing = faulty_watchdog, baud_timing
        self.check_baud, self.reboot_time = check_baud, reboot_time
        self.voltage, self.nominal_voltage, self.delay = voltage, voltage, delay
        self.sync_chain, self.rng, self.report = sync_chain, random.Random(seed), report
        self.rates = {kind: 0.0 for kind in self.FAULTS} | (rates or {})
        self.once = deque()             # (kind, id or None): faults to happen to the next packets
        self.reset_stats()
        model_of = models.get if isinstance(models, dict) else lambda id, _: models
        firmware = 51 if faulty_watchdog else 52
        self.motors = {id: Motor(self, id, model_of(id, 1200), baud, return_delay, firmware)
                       for id in ids}
        self.limits = limits
        for motor, stop in zip(self.motors.values(), stops if stops is not None else ()):
            motor.joint.stops = tuple(stop)
        self.joints = [m.joint for m in self.motors.values()]
        self._folder = None if path else tempfile.TemporaryDirectory(prefix="leap-bus-")
        self.path = str(path or os.path.join(self._folder.name, "ttyUSB-emulated"))
        self.master = self.slave = None
        self.buffer, self.late, self.dip_until, self._byte_time = b"", [], 0.0, 0.0
        self.calls, (self._wake_r, self._wake_w) = queue.Queue(), os.pipe()
        self.control = None
        if control:
            os.makedirs(os.path.dirname(os.path.abspath(control)), exist_ok=True)
            if not os.path.exists(control):
                os.mkfifo(control)
            # RDWR: no EOF when a writer leaves
            self.control = os.open(control, os.O_RDWR | os.O_NONBLOCK)
        self._running, self._thread = False, None
        self.plug()

    # ---- life
    def start(self):
        self._running = True
        self._thread = threading.Thread(target=self.run, daemon=True, name="emulated-bus")
        self._thread.start()
        return self

    def stop(self):
        self._running = False
        thread, self._thread = self._thread, None
        if thread:
            thread.join(5)
            self.unplug()
            for fd in (self._wake_r, self._wake_w, self.control):
                if fd is not None:
                    os.close(fd)
            if self._folder:
                self._folder.cleanup()

    __enter__ = start

    def __exit__(self, *_):
        self.stop()

    def _call(self, function):
        """Run `function` in the bus thread, so that nothing here needs a lock."""
        alive = self._thread and self._thread.is_alive()
        if not alive or self._thread is threading.current_thread():
            return function()
        future = Future()

        def call():
            try:
                future.set_result(function())
            except Exception as error:                # the caller's mistake, not the bus's
                future.set_exception(error)
        self.calls.put(call)
        os.write(self._wake_w, b"x")
        return future.result(5)

    def run(self):
        """The bus itself, until `stop`."""
        self._running, next_report = True, 0.0
        while self._running:
            now = time.monotonic()
            watched = [fd for fd in (self.master, self._wake_r, self.control) if fd is not None]
            timeout = min(0.01, max(0.0, self.late[0][0] - now)) if self.late else 0.01
            ready, _, _ = select.select(watched, [], [], timeout)
            if self._wake_r in ready:
                os.read(self._wake_r, 4096)
            while not self.calls.empty():
                self.calls.get()()
            if self.control in ready:
                for line in os.read(self.control, 4096).decode().splitlines():
                    self.command(line)
            if self.master is not None and self.master in ready:
                self._receive()
            self.step()
            if self.report and now > next_report:
                self.write_report()
                next_report = now + 0.2
        if self.report:
            self.write_report()

    def step(self):
        """Late replies, voltage, motors: everything that goes by the clock."""
        now = time.monotonic()
        while self.late and self.late[0][0] <= now:
            self._send(heapq.heappop(self.late)[1])
        if self.dip_until and now > self.dip_until:
            self.voltage, self.dip_until = self.nominal_voltage, 0.0
        for motor in self.motors.values():
            motor.step(now)
        if any(m.driving for m in self.motors.values()):
            silence, self.stats["last_driving"] = now - self.last_packet, now
            longest = self.stats["longest_silent_driving"]
            self.stats["longest_silent_driving"] = max(longest, silence)

    # ---- the wire
    def _receive(self):
        now = time.monotonic()
        # the rest of that packet will not come any more
        if now - self._byte_time > 0.05:
            self.buffer = b""
        self._byte_time = now
        try:
            self.buffer += os.read(self.master, 4096)
        except OSError:
            return
        self.take(now)

    def take(self, now):
        """Execute every whole packet that has come in."""
        while True:
            start = self.buffer.find(b"\xff\xff\xfd\x00")
            if start < 0:
                self.buffer = self.buffer[-3:]
                return
            self.buffer = self.buffer[start:]
            if len(self.buffer) < 7:
                return
            length = int.from_bytes(self.buffer[5:7], "little")
            if not 3 <= length <= 1024:
                self.buffer = self.buffer[4:]
                continue
            if len(self.buffer) < 7 + length:
                return
            raw, self.buffer = self.buffer[:7 + length], self.buffer[7 + length:]
            self._handle(raw, now)

    def _host_baud(self):
        return TERMIOS_BAUD.get(termios.tcgetattr(self.master)[5])

    def _handle(self, raw, now):
        self.stats["packets"] += 1
        self.last_packet = now
        if self._fault("drop_request"):
            return
        if self._fault("corrupt_request"):
            raw = self._corrupt(raw)
        host = self._host_baud()
        baud = host or 4_000_000
        awake = [m for m in self.motors.values() if now >= m.silent_until
                 and (not self.check_baud or BAUDS[m["baud_rate"]] == host)]
        for motor in awake:
            motor.step(now)
        id, instruction = raw[4], raw[7]
        if crc16(raw[:-2]) != int.from_bytes(raw[-2:], "little"):
            self._reply([(m, packet(id, STATUS, [m.error(CRC)])) for m in awake
                         if m["id"] == id and m["status_return_level"] == 2], len(raw), baud, now)
            return
        params = raw[8:-2].replace(b"\xff\xff\xfd\xfd", b"\xff\xff\xfd")
        for motor in awake:
            if id in (BROADCAST, motor["id"]):
                motor.last_packet = now
        if id == BROADCAST:
            replies = self._broadcast(awake, instruction, params, now)
        else:
            replies = [(m, reply) for m in awake if m["id"] == id
                       for reply in self._unicast(m, instruction, params, now)]
            for m in awake:                           # a shadow id obeys and says nothing
                if m["secondary_id"] == id != m["id"] and id < 253:
                    list(self._unicast(m, instruction, params, now))
        self._reply(replies, len(raw), baud, now)

    def _unicast(self, m, instruction, params, now):
        """Execute; the status packet as a list of none or one."""
        level, id, data = m["status_return_level"], m["id"], b""
        address = int.from_bytes(params[:2], "little")
        needed = {PING: 0, READ: 1}.get(instruction, 2)
        error, answer = 0, level >= needed
        if instruction == PING:
            data = m.mem[0:2] + m.mem[6:7]
        elif instruction == READ and len(params) == 4:
            error, data = m.read(address, int.from_bytes(params[2:4], "little"))
            data = b"" if error else data
        elif instruction == WRITE and len(params) > 2:
            error = m.write(address, params[2:])
        elif instruction == REG_WRITE and len(params) > 2:
            error, _ = m.check(address, params[2:])
            if not error:
                m.registered, m["registered_instruction"] = (address, params[2:]), 1
        elif instruction == ACTION:
            error = m.write(*m.registered) if m.registered else INSTRUCTION
            m.registered, m["registered_instruction"] = None, 0
        elif instruction == FACTORY_RESET and params[:1] in (b"\xff", b"\x01", b"\x02"):
            # answered before it happens: the reply still has the old id
            status = packet(id, STATUS, [m.error()])
            m.factory_reset({255: (), 1: ("id",), 2: ("id", "baud_rate")}[params[0]])
            m.boot()
            m.silent_until = now + self.reboot_time
            return [status] if answer else []
        elif instruction == REBOOT:
            status = packet(id, STATUS, [m.error()])
            m.boot()
            m.silent_until = now + self.reboot_time
            return [status] if answer else []
        elif instruction == CLEAR and params == b"\x01\x44\x58\x4c\x22":
            if abs(m.joint.w) > 1e-3:
                error = RESULT_FAIL
            else:
                m.turns -= math.floor(m.position() / 4096)
        else:
            error = INSTRUCTION
        return [packet(id, STATUS, bytes([m.error(error)]) + bytes(data))] if answer else []

    def _broadcast(self, awake, instruction, params, now):
        """Execute for all; [(motor, status packet)] in the order in which they answer."""
        by_id = {}
        for m in awake:
            by_id.setdefault(m["id"], []).append(m)

        def named(id):
            return by_id.get(id, [])

        if instruction == PING:
            in_order = sorted(awake, key=lambda m: m["id"])
            return [(m, self._unicast(m, PING, b"", now)[0]) for m in in_order]
        address, length = (int.from_bytes(params[i:i + 2], "little") for i in (0, 2))
        if instruction == SYNC_WRITE:
            rest = params[4:]
            for i in range(0, len(rest) - length, length + 1):
                for m in named(rest[i]):
                    m.write(address, rest[i + 1:i + 1 + length])
        elif instruction == BULK_WRITE:
            while len(params) >= 5:
                id, address = params[0], int.from_bytes(params[1:3], "little")
                length = int.from_bytes(params[3:5], "little")
                for m in named(id):
                    m.write(address, params[5:5 + length])
                params = params[5 + length:]
        elif instruction in (SYNC_READ, FAST_SYNC_READ):
            wanted = [(id, address, length) for id in params[4:]]
            return self._chain(wanted, named, instruction == FAST_SYNC_READ)
        elif instruction in (BULK_READ, FAST_BULK_READ):
            wanted = [(params[i], int.from_bytes(params[i + 1:i + 3], "little"),
                       int.from_bytes(params[i + 3:i + 5], "little"))
                      for i in range(0, len(params) - 4, 5)]
            return self._chain(wanted, named, instruction == FAST_BULK_READ)
        # refused for all at once
        elif not (instruction == FACTORY_RESET and params[:1] == b"\xff"):
            for m in awake:
                self._unicast(m, instruction, params, now)
        return []

    def _chain(self, wanted, named, fast):
        """Sync and bulk reads: each motor speaks after the one before it in the list."""
        replies, total = [], b"\xff\xff\xfd\x00\xfe" + (
            1 + sum(n + 4 for _, _, n in wanted)).to_bytes(2, "little") + bytes([STATUS])
        begun = 0                                     # bytes of the fast packet already handed over
        for id, address, length in wanted:
            motors = [m for m in named(id) if m["status_return_level"] >= 1]
            if not motors and (self.sync_chain or fast):
                break                                 # nobody to wait for: the rest stay silent
            for m in motors:
                error, data = m.read(address, length)
                if fast:    # one packet, unstuffed, after each motor the CRC of everything so far
                    total += bytes([m.error(error), id]) + data
                    total += crc16(total).to_bytes(2, "little")
                    replies.append((m, total[begun:]))
                    begun = len(total)
                else:
                    answer = bytes([m.error(error)]) + (b"" if error else data)
                    replies.append((m, packet(id, STATUS, answer)))
        return replies

    def _fault(self, kind, id=None):
        """Does this fault happen to this packet?"""
        hit = next((f for f in self.once if f[0] == kind and f[1] in (None, id)), None)
        if hit:
            self.once.remove(hit)
        elif not (self.rates[kind] and self.rng.random() < self.rates[kind]):
            return False
        self.stats["faults"][kind] += 1
        return True

    def _corrupt(self, data):
        i = self.rng.randrange(len(data))
        return data[:i] + bytes([data[i] ^ self.rng.randrange(1, 256)]) + data[i + 1:]

    def _reply(self, replies, request_bytes, baud, now):
        """Put the status packets on the wire at the time they would be through, with the faults
        asked for."""
        merged = []
        for motor, data in replies:                   # two motors with one id talk at the same time
            if merged and merged[-1][0]["id"] == motor["id"]:
                noise = bytes(self.rng.randrange(256) for _ in data)
                merged[-1] = (motor, bytes(a & b for a, b in zip(data, noise)))
                self.stats["faults"]["collision"] += 1
            else:
                merged.append((motor, data))
        due, out, waiting_since = now + request_bytes * 10 / baud, b"", now
        for motor, data in merged:
            due += motor["return_delay_time"] * 2e-6 + len(data) * 10 / baud
            self.stats["replies"] += 1
            if self._fault("drop", motor["id"]):
                continue
            if self._fault("corrupt", motor["id"]):
                data = self._corrupt(data)
            if self._fault("duplicate", motor["id"]):
                data += data
            if self._fault("delay", motor["id"]):
                heapq.heappush(self.late, (due + self.delay, data))
                continue
            out += data
            # the adapter too hands over every 1 ms
            if self.baud_timing and due - waiting_since > 1e-3:
                self._wait(due)
                self._send(out)
                out, waiting_since = b"", due
        if self.baud_timing and merged:
            self._wait(due)
        self._send(out)

    def _wait(self, due):
        time.sleep(max(0.0, due - time.monotonic()))

    def _send(self, data):
        if data and self.master is not None:
            try:
                os.write(self.master, data)
            except OSError:             # nobody reads and the buffer is full, or just unplugged
                self.stats["faults"]["lost"] += 1

    # ---- faults on demand; every one of these may be called from any thread
    def plug(self):
        """A new pseudo-terminal behind the same path."""
        def do():
            if self.master is None:
                self.master, self.slave = pty.openpty()    # our own slave end: hosts come and go
                tty.setraw(self.slave)
                os.set_blocking(self.master, False)
                os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
                fresh = f"{self.path}.{os.getpid()}"
                os.symlink(os.ttyname(self.slave), fresh)
                os.replace(fresh, self.path)
        self._call(do)

    def unplug(self):
        """The device vanishes: path gone, an open port raises. The motors keep their power and
        state."""
        def do():
            if self.master is not None:
                os.unlink(self.path)
                os.close(self.master)
                os.close(self.slave)
                self.master, self.buffer, self.late = None, b"", []
                self.stats["faults"]["unplug"] += 1
        self._call(do)

    def rate(self, kind, probability):
        """drop_request, corrupt_request: on the way to the motors. drop, corrupt, delay (by `delay`
        s, so past the host's timeout), duplicate: status packets on the way back."""
        if kind not in self.FAULTS:
            raise ValueError(f"{kind} is none of {self.FAULTS}")
        self.rates[kind] = float(probability)

    def inject(self, kind, n=1, id=None):
        """The next `n` packets (with `id`: replies of that motor) suffer `kind`."""
        if kind not in self.FAULTS:
            raise ValueError(f"{kind} is none of {self.FAULTS}")
        self._call(lambda: self.once.extend([(kind, id)] * int(n)))

    def overload(self, id):
        """Torque off and an alert in every answer until a reboot."""
        self.hardware_error(id, OVERLOAD)

    def overheat(self, id):
        """Just past the limit: it cools below it within a second or two of torque off."""
        def do():
            self.motors[id].temperature = self.motors[id]["temperature_limit"] + 0.2
            self.stats["faults"]["overheat"] += 1
            self.step()
        self._call(do)

    def hardware_error(self, id, bit):
        """Bits: 1 voltage, 4 overheating, 8 encoder, 16 electrical shock, 32 overload."""
        def do():
            self.motors[id].fail(int(bit))
            self.stats["faults"]["hardware_error"] += 1
        self._call(do)

    def dip(self, volts=3.0, seconds=0.3):
        """The supply of all motors sags to `volts` for `seconds`."""
        def do():
            self.voltage, self.dip_until = float(volts), time.monotonic() + float(seconds)
            self.stats["faults"]["dip"] += 1
            self.step()
        self._call(do)

    def silence(self, id, on=True):
        """A motor that does not answer (loose data line): it hears nothing either, and holds its
        goal."""
        def do():
            self.motors[id].silent_until = math.inf if on else 0.0
            self.stats["faults"]["silence"] += bool(on)
        self._call(do)

    # ---- how the hand is built; joints are numbered by chain position
    def stuck(self, id, on=True):
        self.motors[id].joint.stuck = bool(on)

    def zero_offset(self, id, counts):
        """The horn sits `counts` off (torque off): the motor reads that much more at the same joint
        angle."""
        self.motors[id].joint.zero_offset = counts
        self.motors[id]["goal_position"] = round(self.motors[id].position())

    def sign(self, id, sign):
        self.motors[id].joint.sign = int(sign)
        self.motors[id]["goal_position"] = round(self.motors[id].position())

    def swap(self, a, b):
        """Motors `a` and `b` move each other's joints."""
        self.motors[a].joint, self.motors[b].joint = self.motors[b].joint, self.motors[a].joint

    def push(self, joint, angle):
        """Somebody's hand puts a joint at `angle` (rad)."""
        def do():
            self.joints[joint].q, self.joints[joint].w = float(angle), 0.0
        self._call(do)

    def angles(self):
        """True joint angles by chain position, rad."""
        return [j.q for j in self.joints]

    def command(self, line):
        """One line of the control FIFO: a method or fault name and numbers; `drop 0.01` sets a
        rate."""
        name, *words = line.split() or [""]
        numbers = [float(w) if "." in w or "e" in w else int(w) if w.lstrip("-").isdigit() else w
                   for w in words]
        try:
            if name not in self.COMMANDS:
                raise ValueError("unknown")
            self.rate(name, *numbers) if name in self.FAULTS else getattr(self, name)(*numbers)
        except Exception as error:      # a typo must not end the bus in the middle of a soak test
            self.stats["bad_commands"].append(f"{line}: {error!r}")

    # ---- what was seen
    def reset_stats(self):
        self.last_packet = time.monotonic()
        self.stats = dict(packets=0, replies=0, goal_writes=0, goals_outside_limits=0,
                          refused_writes=0, watchdog_trips=0, longest_silent_driving=0.0,
                          last_driving=0.0, max_step={}, faults=Counter(), bad_commands=[])

    def _seen_goal(self, motor, values, before, was_on):
        """Book-keeping after a write to `motor`. A step counts in the counts the drive sees jump:
        from the goal before, or at torque-on from where the shaft is."""
        if "goal_position" not in values and not (motor["torque_enable"] and not was_on):
            return
        goal, id = motor["goal_position"], motor["id"]
        if "goal_position" in values:
            self.stats["goal_writes"] += 1
            if self.limits is not None:   # of the joint that would really go there, one count free
                number = next(i for i, j in enumerate(self.joints) if j is motor.joint)
                low, high = self.limits[number]
                outside = not low - 1 / COUNTS <= motor.angle_at(goal) <= high + 1 / COUNTS
                self.stats["goals_outside_limits"] += outside
        if motor["torque_enable"] and motor["operating_mode"] in (3, 4, 5):
            step = abs(round(goal - before))
            self.stats["max_step"][id] = max(self.stats["max_step"].get(id, 0), step)

    def snapshot(self):
        """`stats` and the motors' state, for json."""
        motors = self.motors.values()
        return self.stats | dict(
            faults=dict(self.stats["faults"]), time=time.time(), plugged=self.master is not None,
            torque={k: m["torque_enable"] for k, m in self.motors.items()},
            driving={k: m.driving for k, m in self.motors.items()},
            any_driving=any(m.driving for m in motors),
            last_packet_age=time.monotonic() - self.last_packet, voltage=self.voltage,
            hardware_error={k: m["hardware_error_status"] for k, m in self.motors.items()},
            position=[round(m.position()) for m in motors], angle=self.angles())

    def write_report(self):
        with open(f"{self.report}.tmp", "w") as f:
            json.dump(self.snapshot(), f)
        os.replace(f"{self.report}.tmp", self.report)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", required=True, help="path of the serial device to offer")
    parser.add_argument("--report", help="json file, rewritten every 0.2 s and at exit")
    parser.add_argument("--control", help="FIFO that takes fault commands, one a line")
    parser.add_argument(
        "--limits", help="json file, [[low, high], ...] rad by motor: goals outside are counted")
    parser.add_argument("--stops", help="json file like --limits: mechanical stops")
    parser.add_argument("--model", type=int, default=1200, choices=sorted(MODEL_DEFAULTS))
    parser.add_argument("--baud", type=int, default=4_000_000, choices=BAUDS)
    parser.add_argument("--faulty-watchdog", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    for kind in EmulatedBus.FAULTS:
        parser.add_argument("--" + kind.replace("_", "-"), type=float, default=0.0,
                            help="probability per packet")
    a = parser.parse_args()
    read = lambda path: json.load(open(path)) if path else None
    bus = EmulatedBus(
        models=a.model, baud=a.baud, path=a.link, faulty_watchdog=a.faulty_watchdog, seed=a.seed,
        limits=read(a.limits), stops=read(a.stops), report=a.report, control=a.control,
        rates={kind: getattr(a, kind) for kind in EmulatedBus.FAULTS})
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda *_: bus.stop())
    bus.run()
    bus.unplug()


if __name__ == "__main__":
    main()
