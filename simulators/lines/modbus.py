"""Modbus slaves on pseudo-terminals (RTU) and on a socket (TCP), answering at line speed, with faults on request.

    python -m simulators.lines.modbus --buses 4 --devices 16

prints the ports as JSON and answers until its input ends; then it prints when which device was asked.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pymodbus.framer.rtu import FramerRTU
from pymodbus.framer.socket import FramerSocket
from pymodbus.pdu import DecodePDU, ExceptionResponse, ModbusPDU
from pymodbus.pdu.bit_message import ReadCoilsResponse, ReadDiscreteInputsResponse
from pymodbus.pdu.register_message import ReadHoldingRegistersResponse, ReadInputRegistersResponse

from citybrain.clock import monotonic_s, wait_s
from simulators.lines.wire import Wire

Fault = Literal["", "dead", "crc", "half", "noise", "preceded", "refuse", "foreign"]
ILLEGAL_FUNCTION, ILLEGAL_ADDRESS = 1, 2
LOOK_S = 0.1
AHEAD_S = 0.01  # an answer that begins so soon is waited for


class Slave:
    """One device: 16-bit registers and bits by address; an address that is not there is refused."""

    def __init__(self, unit_id: int, registers: dict[int, int], bits: dict[int, bool] | None = None) -> None:
        self.unit_id = unit_id
        self.registers = registers
        self.bits = bits or {}
        self.fault: Fault = ""
        self.late_s = 0.0  # how long it thinks before it answers; questions meanwhile wait for their turn
        self.busy_s = 0.0  # until when it does
        self.asked: list[float] = []  # when, on the monotonic clock
        self.told: list[float] = []

    def answer(self, request: ModbusPDU) -> ModbusPDU:
        """Return the response to a request that was understood."""
        wanted = range(request.address, request.address + request.count)
        if self.fault == "refuse" or request.function_code not in (1, 2, 3, 4):
            return ExceptionResponse(request.function_code, ILLEGAL_FUNCTION)
        table: dict[int, int] | dict[int, bool] = self.bits if request.function_code in (1, 2) else self.registers
        if not all(address in table for address in wanted):
            return ExceptionResponse(request.function_code, ILLEGAL_ADDRESS)
        if request.function_code in (1, 2):
            coils = [self.bits[address] for address in wanted]
            return (ReadCoilsResponse if request.function_code == 1 else ReadDiscreteInputsResponse)(bits=coils)
        words = [self.registers[address] for address in wanted]
        return (ReadHoldingRegistersResponse if request.function_code == 3 else ReadInputRegistersResponse)(
            registers=words
        )


class RtuBus:
    """Slaves on one wire. `start` and `stop`; `unplug` and `plug` while it runs.

    echo: the adapter at the other end hears what it sends.
    """

    def __init__(
        self, port: Path, slaves: Sequence[Slave], baud: int = 115_200, seed: int = 1, *, echo: bool = False
    ) -> None:
        self.wire = Wire(port, baud)
        self.echo = echo
        self._due: list[tuple[float, int, int, bytes]] = []  # answers: when they begin, in which order, whose
        self._order = itertools.count()
        self.slaves = {slave.unit_id: slave for slave in slaves}
        self._framer = FramerRTU(DecodePDU(True))
        self._stop = threading.Event()
        self._plugged = threading.Lock()
        self._random = random.Random(seed)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        """Plug in and answer."""
        self.wire.plug()
        self._thread.start()

    def stop(self) -> None:
        """Pull out and end."""
        self._stop.set()
        self._thread.join()
        self.wire.unplug()

    def unplug(self) -> None:
        """Pull the adapter out."""
        with self._plugged:
            self.wire.unplug()

    def plug(self) -> None:
        """Plug it in again, under the same name."""
        with self._plugged:
            self.wire.plug()

    def _serve(self) -> None:
        while not self._stop.is_set():
            with self._plugged:
                now_s = monotonic_s()
                data = self.wire.read(min(LOOK_S, max(0.0, self._due[0][0] - now_s)) if self._due else LOOK_S)
                if data:
                    self._take(data, monotonic_s())
                while self._due and self._due[0][0] <= monotonic_s() + AHEAD_S and self.wire.plugged:
                    begin_s, _, unit_id, frame = heapq.heappop(self._due)
                    self.wire.write(frame, begin_s)
                    self.slaves[unit_id].told.append(monotonic_s())
            if not data:
                wait_s(0)

    def _take(self, data: bytes, heard_s: float) -> None:
        if self.echo:
            self.wire.write(data, heard_s)
        used, unit_id, _, frame = self._framer.decode(data)
        slave = self.slaves.get(unit_id)
        request = self._framer.decoder.decode(frame) if used and frame else None
        if slave is None or request is None:
            return
        slave.asked.append(heard_s)
        if slave.fault == "dead":
            return
        response = slave.answer(request)
        response.dev_id = unit_id + (slave.fault == "foreign")
        gap_s = 0.00175 if self.wire.baud > 19_200 else 3.5 * 11 / self.wire.baud
        begin_s = heard_s + self.wire.time_s(len(data)) + gap_s
        begin_s = slave.busy_s = max(begin_s, slave.busy_s) + slave.late_s
        told = self._spoilt(self._framer.buildFrame(response), slave.fault)
        heapq.heappush(self._due, (begin_s, next(self._order), unit_id, told))

    def _spoilt(self, frame: bytes, fault: Fault) -> bytes:
        noise = self._random.randbytes(len(frame))
        if fault == "crc":
            return frame[:-1] + bytes([frame[-1] ^ 0x10])
        if fault == "half":
            return frame[: len(frame) // 2]
        return {"noise": noise, "preceded": noise[:5] + frame}.get(fault, frame)


class TcpServer:
    """Slaves behind one socket on loopback, as a Modbus/TCP gateway has them.

    echo: it gives back what it is asked before it answers, as a converter does whose serial side hears itself.
    """

    def __init__(self, slaves: Sequence[Slave], *, echo: bool = False) -> None:
        self.echo = echo
        self.slaves = {slave.unit_id: slave for slave in slaves}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._framer = FramerSocket(DecodePDU(True))
        self._clients: list[socket.socket] = []

    def start(self) -> None:
        """Answer whoever connects."""
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        """Close all connections."""
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Close the connections that are open."""
        for client in self._clients:
            client.close()
        self._clients.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        heard = b""
        try:
            while data := client.recv(4096):
                heard += data
                used, unit_id, number, frame = self._framer.decode(heard)
                if used:
                    if self.echo:
                        client.sendall(heard[:used])
                    heard = heard[used:]
                    self._answer(client, unit_id, number, frame)
        except OSError:
            return

    def _answer(self, client: socket.socket, unit_id: int, number: int, frame: bytes) -> None:
        slave, request = self.slaves.get(unit_id), self._framer.decoder.decode(frame)
        if slave is None or request is None or slave.fault == "dead":
            return
        slave.asked.append(monotonic_s())
        response = slave.answer(request)
        wait_s(slave.late_s)
        response.dev_id, response.transaction_id = unit_id + (slave.fault == "foreign"), number
        client.sendall(self._framer.buildFrame(response))


def hydrant(unit_id: int) -> Slave:
    """Return a hydrant's transmitter after the map `hydrant`: 0.31 MPa, 12 °C, upright, 3.6 V, wet, cap closed."""
    registers = [310 + unit_id % 10, 120, 5, 3600, 0b10, 0, 0, 0, 0, 0]
    return Slave(unit_id, dict(enumerate(registers)))


def main() -> int:
    """Serve buses of hydrants until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--buses", type=int, default=4)
    parser.add_argument("--devices", type=int, default=16, help="on each bus")
    parser.add_argument("--baud", type=int, default=115_200)
    parser.add_argument("--dead", type=int, default=0, help="the unit that does not answer, on the first bus")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        buses = []
        for number in range(args.buses):
            slaves = [hydrant(unit_id) for unit_id in range(1, args.devices + 1)]
            buses.append(RtuBus(Path(folder) / f"bus-{number}", slaves, args.baud))
        if args.dead:
            buses[0].slaves[args.dead].fault = "dead"
        for bus in buses:
            bus.start()
        sys.stdout.write(json.dumps([str(bus.wire.port) for bus in buses]) + "\n")
        sys.stdout.flush()
        sys.stdin.read()
        for bus in buses:
            bus.stop()
        asked = [{unit_id: slave.asked for unit_id, slave in bus.slaves.items()} for bus in buses]
        sys.stdout.write(json.dumps(asked) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
