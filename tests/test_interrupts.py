"""Ctrl-C ends a command at once, whatever else goes on in the process."""

import subprocess
import sys

COMPUTES = "threading.Thread(target=time.sleep, args=(50,)).start(); raise KeyboardInterrupt"
LOST = "gc.callbacks.append(interrupt); gc.collect(); time.sleep(50)"
CODE = """
import atexit, gc, threading, time
from unittest import mock
from realm_jax import cli

def interrupt(*_):
    gc.callbacks.remove(interrupt)
    raise KeyboardInterrupt

def app(**_):
    print("begun")
    {act}

atexit.register(print, "cleaned")
with mock.patch.object(cli, "app", app):
    cli.main()
"""


def ended(act: str) -> None:
    run = [sys.executable, "-c", CODE.format(act=act)]
    done = subprocess.run(run, capture_output=True, check=False, timeout=40)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"begun\ncleaned\n", b"")


def test_it_waits_for_no_thread_that_still_computes():
    """One of XLA's would crash where a usual exit takes down what it uses."""
    ended(COMPUTES)


def test_it_is_not_lost_in_a_callback_of_the_garbage_collector():
    """Where JAX has one, and where the main thread comes to when it has compiled."""
    ended(LOST)
