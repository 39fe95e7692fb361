"""Commands that schedulers end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from extract.interrupts import EXIT_INTERRUPTED, stops_interrupt

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
