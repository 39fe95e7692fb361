"""Commands that schedulers end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from extract.interrupts import EXIT_INTERRUPTED, stops_interrupt, stops_wait

NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
# Ends as a command does; SIGUSR1 comes again while it gives back what it holds, from scripts that repeat it.
COMMAND = """
import os, signal, sys, time
from extract.interrupts import one_line_interrupts, stops_interrupt
with one_line_interrupts(), stops_interrupt():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        print("given back", flush=True)
"""


@pytest.mark.parametrize("number", NUMBERS)
def test_the_signals_of_schedulers_interrupt_a_block(number):
    before = [signal.getsignal(each) for each in NUMBERS]
    with pytest.raises(KeyboardInterrupt), stops_interrupt():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert [signal.getsignal(each) for each in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_a_command_gives_back_what_it_holds_however_often_it_is_told(number):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said, error = process.communicate(timeout=30)
    assert said == "given back\n"
    assert process.returncode == EXIT_INTERRUPTED
    assert error == "\ninterrupted: what is finished is kept; the same command continues.\n"


@pytest.mark.parametrize("number", [*NUMBERS, signal.SIGINT])
def test_a_block_that_stops_wait_for_ends_by_itself_and_then_is_interrupted(number):
    before = [signal.getsignal(each) for each in NUMBERS]
    saved = []
    with pytest.raises(KeyboardInterrupt), stops_wait() as is_asked:
        assert not is_asked()
        os.kill(os.getpid(), number)
        assert is_asked()
        saved.append(True)
    assert saved and signal.getsignal(signal.SIGTERM) == before[0]
    signal.signal(signal.SIGUSR1, before[1])


def test_a_second_ctrl_c_does_not_wait():
    reached = []
    with pytest.raises(KeyboardInterrupt), stops_wait():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        reached.append(2)
    assert reached == [1]


def test_a_block_that_nothing_stops_is_left_as_it_was():
    before = [signal.getsignal(each) for each in (*NUMBERS, signal.SIGINT)]
    with stops_wait() as is_asked:
        pass
    assert not is_asked() and [signal.getsignal(each) for each in (*NUMBERS, signal.SIGINT)] == before
