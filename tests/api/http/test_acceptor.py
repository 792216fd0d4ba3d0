"""Thousands of connections at once: descriptors do not run out, and the log says it in a line."""

from __future__ import annotations

import resource
import signal
import socket
import threading
import time
from pathlib import Path

from tests.api.test_serve import START_S, Process, read_to_end, start
from tests.waiting import wait_until

NUM_FILES = 300  # that the server may have open
NUM_CONNECTIONS = 900


def open_many(port: int, number: int) -> list[socket.socket]:
    """Connections that the kernel has taken, whether the server has or not."""
    sockets = []
    for _ in range(number):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", port))
        sockets.append(sock)
    return sockets


def num_files(process: Process) -> int:
    return len(list(Path(f"/proc/{process.popen.pid}/fd").iterdir()))


def test_a_storm_of_connections_leaves_descriptors_and_the_log_alone(
    tokenizer_folder: Path,
) -> None:
    with start(tokenizer_folder) as process:
        resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (NUM_FILES, NUM_FILES))
        wait_until(lambda: process.is_in("ready"), START_S)
        num_before = num_files(process)
        streams = [process.stream(200) for _ in range(3)]
        replies = []
        readers = [
            threading.Thread(target=lambda sock=sock: replies.append(read_to_end(sock)))
            for sock in streams
        ]
        for reader in readers:
            reader.start()
        storm = []
        for _ in range(2):
            # All wait to be accepted when it goes on: as many as one turn would have taken.
            process.popen.send_signal(signal.SIGSTOP)
            storm += open_many(process.port, NUM_CONNECTIONS // 2)
            process.popen.send_signal(signal.SIGCONT)
            slowest_s = 0.0
            for _ in range(10):
                asked_s = time.monotonic()
                assert process.health() is not None
                slowest_s = max(slowest_s, time.monotonic() - asked_s)
            assert slowest_s < 10.0
        assert num_files(process) < NUM_FILES - 64
        for reader in readers:
            reader.join(30)
        assert all(reply.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for reply in replies)
        for sock in storm:
            sock.close()
        wait_until(lambda: num_files(process) <= num_before)
        assert "Traceback" not in process.log and "Too many open files" not in process.log
        assert process.log.count("idle ones are closed for new ones") == 1


def test_where_descriptors_run_out_all_the_same_it_is_said_and_goes_on(
    tokenizer_folder: Path,
) -> None:
    """The limit falls while the server runs, or the rest of the process has taken more of them."""
    with start(tokenizer_folder) as process:
        wait_until(lambda: process.is_in("ready"), START_S)
        limit = num_files(process) + 20
        resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (limit, limit))
        storm = open_many(process.port, 200)
        wait_until(lambda: "connections cannot be accepted: Too many open files" in process.log)
        wait_until(lambda: process.health() is not None, 30)
        for sock in storm:
            sock.close()
        assert process.is_in("ready")
        assert "Traceback" not in process.log
        assert process.log.count("cannot be accepted") == 1
