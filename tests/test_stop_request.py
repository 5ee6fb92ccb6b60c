"""A request to stop: noted the first time, obeyed at once the second, and nothing of it left afterwards."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from vkd_plugin.engine.signals import STOP_SIGNALS, StopRequest

PATIENCE = 15.0  # seconds


@dataclass
class Child:
    """A process with a process group of its own, and what it says."""

    pid: int
    said: int

    def hears(self, number: int) -> None:
        os.kill(self.pid, number)

    def says(self, patience: float = PATIENCE) -> bytes:
        """A byte; nothing if none comes."""
        ready, _, _ = select.select([self.said], [], [], patience)
        return os.read(self.said, 1) if ready else b""

    def ends_with(self) -> int:
        """The exit code; minus the number of a signal that ended it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        raise AssertionError("the process goes on")


@contextmanager
def child(work: Callable[[Callable[[bytes], Any]], Any]) -> Iterator[Child]:
    """Runs ``work(say)`` in a forked process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            work(lambda byte: os.write(writer, byte))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    try:
        yield Child(pid, reader)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)
        os.close(reader)


def announce(stop: StopRequest, say: Callable[[bytes], Any]) -> None:
    """Says ``r`` as soon as a request is known, from a thread: the main one may be busy."""

    def watch() -> None:
        while not stop.requested:
            time.sleep(0.002)
        say(b"r")

    threading.Thread(target=watch, daemon=True).start()


# What the main thread may be in the middle of.


def reads() -> None:
    os.read(os.pipe()[0], 1)


def sleeps() -> None:
    time.sleep(1000)


def waits_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def waits_for_a_thread() -> None:
    thread = threading.Thread(target=sleeps, daemon=True)
    thread.start()
    thread.join()


def computes() -> None:
    while True:
        torch.linalg.svd(torch.randn(200, 200))


def counts() -> None:
    while True:
        pass


@pytest.mark.parametrize("busy", [reads, sleeps, waits_for_a_lock, waits_for_a_thread, computes, counts])
def test_the_second_signal_ends_a_process_that_is_busy(busy: Callable[[], None]) -> None:
    def work(say: Callable[[bytes], Any]) -> None:
        with (stop := StopRequest()):
            announce(stop, say)
            say(b"b")
            busy()

    with child(work) as process:
        assert process.says() == b"b"
        time.sleep(0.1)
        assert process.says(0) == b""
        process.hears(signal.SIGTERM)
        assert process.says() == b"r"
        assert os.waitpid(process.pid, os.WNOHANG) == (0, 0)
        process.hears(signal.SIGTERM)
        assert process.ends_with() == 128 + signal.SIGTERM


@pytest.mark.parametrize("first", STOP_SIGNALS)
@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_signals_of_any_kind_count(first: int, second: int) -> None:
    def work(say: Callable[[bytes], Any]) -> None:
        with (stop := StopRequest()):
            announce(stop, say)
            say(b"b")
            sleeps()

    with child(work) as process:
        assert process.says() == b"b"
        process.hears(first)
        assert process.says() == b"r"
        process.hears(second)
        assert process.ends_with() == 128 + second


def test_one_signal_lets_the_step_be_finished() -> None:
    def work(say: Callable[[bytes], Any]) -> None:
        with (stop := StopRequest()):
            say(b"b")
            while not stop.requested:
                pass
            sum(range(10**5))
        say(b"f")

    for number in STOP_SIGNALS:
        with child(work) as process:
            assert process.says() == b"b"
            process.hears(number)
            assert process.says() == b"f"
            assert process.ends_with() == 0


def test_other_signals_are_nobodys_request() -> None:
    def work(say: Callable[[bytes], Any]) -> None:
        signal.signal(signal.SIGUSR2, lambda *_: say(b"2"))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with (stop := StopRequest()):
            say(b"b")
            for _ in range(3):
                subprocess.run(["true"], check=True)
                os.kill(os.getpid(), signal.SIGUSR2)
            say(b"r" if stop.requested else b"n")

    with child(work) as process:
        assert [process.says() for _ in range(5)] == [b"b", b"2", b"2", b"2", b"n"]
        assert process.ends_with() == 0


def test_after_the_end_signals_do_what_they_did_before() -> None:
    def work(say: Callable[[bytes], Any]) -> None:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        say(b"r" if stop.requested else b"n")
        sleeps()

    with child(work) as process:
        assert process.says() == b"r"
        process.hears(signal.SIGTERM)
        assert process.ends_with() == -signal.SIGTERM


def test_a_new_request_counts_anew() -> None:
    def work(say: Callable[[bytes], Any]) -> None:
        for _ in range(3):
            with StopRequest() as stop:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
                say(b"r" if stop.requested else b"n")

    with child(work) as process:
        assert [process.says() for _ in range(3)] == [b"r", b"r", b"r"]
        assert process.ends_with() == 0


# Processes that the run forks.


def _worker() -> None:
    with suppress(KeyboardInterrupt):
        sleeps()


def _workers() -> list[Any]:
    return [multiprocessing.get_context("fork").Process(target=_worker, daemon=True) for _ in range(3)]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_what_forked_workers_get_does_not_count(number: int) -> None:
    """A Ctrl-C reaches all processes of the group."""

    def work(say: Callable[[bytes], Any]) -> None:
        with (stop := StopRequest()):
            workers = _workers()
            for worker in workers:
                worker.start()
            announce(stop, say)
            time.sleep(0.2)  # until they sleep
            say(b"b")
            sleeps()

    with child(work) as process:
        assert process.says() == b"b"
        os.killpg(process.pid, number)
        assert process.says() == b"r"
        time.sleep(0.3)
        assert os.waitpid(process.pid, os.WNOHANG) == (0, 0)
        process.hears(number)
        assert process.ends_with() == 128 + number


def test_forked_workers_alone_make_no_request() -> None:
    def work(say: Callable[[bytes], Any]) -> None:
        with (stop := StopRequest()):
            workers = _workers()
            for worker in workers:
                worker.start()
            time.sleep(0.2)
            for worker in workers:
                for number in STOP_SIGNALS:
                    os.kill(worker.pid, number)
            time.sleep(0.2)
            say(b"r" if stop.requested else b"n")
            os.kill(os.getpid(), signal.SIGTERM)
            announce(stop, say)
            sleeps()

    with child(work) as process:
        assert process.says() == b"n"
        assert process.says() == b"r"
        process.hears(signal.SIGTERM)
        assert process.ends_with() == 128 + signal.SIGTERM


def test_a_process_that_a_thread_forked_does_not_count_either() -> None:
    def work(say: Callable[[bytes], Any]) -> None:
        with (stop := StopRequest()):

            def fork() -> None:
                if os.fork() == 0:
                    sleeps()
                    os._exit(0)

            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()
            announce(stop, say)
            say(b"b")
            sleeps()

    with child(work) as process:
        assert process.says() == b"b"
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.says() == b"r"
        time.sleep(0.2)
        assert os.waitpid(process.pid, os.WNOHANG) == (0, 0)


def test_a_forked_worker_can_be_terminated() -> None:
    def work(say: Callable[[bytes], Any]) -> None:
        with StopRequest():
            (worker, *_) = _workers()
            worker.start()
            time.sleep(0.2)
            worker.terminate()
            worker.join(2)
            say(b"g" if worker.is_alive() else b"t")

    with child(work) as process:
        assert process.says() == b"t"


def test_a_forked_process_that_leaves_takes_nothing_with_it() -> None:
    def work(say: Callable[[bytes], Any]) -> None:
        with (stop := StopRequest()):
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)
                announce(stop, say)
                say(b"b")
                sleeps()
        os._exit(0)  # the forked one, by the way that all go

    with child(work) as process:
        assert process.says() == b"b"
        process.hears(signal.SIGTERM)
        assert process.says() == b"r"
        process.hears(signal.SIGTERM)
        assert process.ends_with() == 128 + signal.SIGTERM


# What is left afterwards.


def _open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _own_wakeup() -> int:
    number = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(number)
    return number


def test_nothing_is_left_after_many_runs() -> None:
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    threads, files, wakeup = threading.enumerate(), len(_open_files()), _own_wakeup()
    for place in range(50):
        with suppress(ZeroDivisionError), StopRequest():
            assert len(threading.enumerate()) == len(threads) + 1
            if place % 3 == 0:
                raise ZeroDivisionError
    assert threading.enumerate() == threads
    assert len(_open_files()) == files
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert _own_wakeup() == wakeup


def test_what_was_there_before_is_put_back() -> None:
    def own(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGUSR1, own), signal.signal(signal.SIGTERM, signal.SIG_IGN)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer)
    try:
        with StopRequest() as outer:
            inside = [signal.getsignal(number) for number in STOP_SIGNALS]
            with StopRequest() as inner:
                os.kill(os.getpid(), signal.SIGTERM)
            assert [signal.getsignal(number) for number in STOP_SIGNALS] == inside
            assert (inner.requested, outer.requested) == (True, False)
        assert signal.getsignal(signal.SIGUSR1) is own
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGUSR1)
        assert os.read(reader, 9) == bytes([signal.SIGUSR1])
        assert signal.set_wakeup_fd(wakeup) == writer
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGTERM, before[1])
        os.close(reader)
        os.close(writer)


def test_outside_of_the_main_thread_nothing_is_done() -> None:
    found: list[object] = []
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]

    def enter() -> None:
        count, files = threading.active_count(), _open_files()
        with StopRequest() as stop:
            found.append([signal.getsignal(number) for number in STOP_SIGNALS] == handlers)
            found.append(threading.active_count() - count)
            found.append(len(_open_files()) - len(files))
        found.append(stop.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [True, 0, 0, False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_a_process_that_was_not_forked(number: int) -> None:
    script = """
import os, time
from vkd_plugin.engine.signals import StopRequest
with StopRequest() as stop:
    print("b", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("r", flush=True)
    os.read(os.pipe()[0], 1)
"""
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "b\n"
        process.send_signal(number)
        assert process.stdout.readline() == "r\n"
        process.send_signal(number)
        assert process.wait(PATIENCE) == 128 + number
