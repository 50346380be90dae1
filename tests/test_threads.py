"""TVM's thread pool. Each script runs in a new process: a pool is set up once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phi3c.errors import InputError
from phi3c.runtime.threads import check_threads, physical_cores

ROOT = Path(__file__).parent.parent
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SPIN = "TVM_THREAD_POOL_SPIN_COUNT"
several_cpus = pytest.mark.skipif(CPUS < 2, reason="one CPU: every pool has one thread")

# What the environment says when TVM is asked for its pool.
SETTING = """
import os, tvm
from phi3c.runtime import threads

def configure(*args):
    print(os.environ.get("TVM_THREAD_POOL_SPIN_COUNT"))

functions = {"runtime.config_threadpool": configure, "runtime.NumThreads": lambda: 1}
tvm.get_global_func = functions.get
threads.use_threads(1)
"""

SEVERAL = """
import sys, threading
from phi3c.runtime.threads import pool_size, use_threads

found = {}

def other(count):
    use_threads(count)
    found[count] = pool_size()

most = int(sys.argv[1])
use_threads(1)
running = [threading.Thread(target=other, args=(count,)) for count in range(1, most + 1)]
for thread in running:
    thread.start()
for thread in running:
    thread.join()
assert found == {count: count for count in range(1, most + 1)}, found
assert pool_size() == 1
use_threads(most)
assert pool_size() == most
print("done")
"""

TOO_LATE = """
import sys, threading, tvm
from phi3c.runtime.threads import use_threads

assert tvm.get_global_func("runtime.NumThreads")() == 1
use_threads(int(sys.argv[1]))
"""


def run_python(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    ours = {SPIN, "TVM_NUM_THREADS", "OMP_NUM_THREADS"}
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_workers_sleep_instead_of_spinning():
    assert run_python(SETTING).stdout == "0\n"


def test_the_users_own_spin_count_stays():
    assert run_python(SETTING, **{SPIN: "1000"}).stdout == "1000\n"


@several_cpus
@pytest.mark.parametrize("environment", [{}, {"TVM_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1"}])
def test_each_python_thread_has_the_size_it_asked_for(environment):
    assert run_python(SEVERAL, str(min(CPUS, 4)), **environment).stdout == "done\n"


@several_cpus
def test_a_pool_that_tvm_started_before_cannot_grow_and_that_is_said():
    done = run_python(TOO_LATE, "2", TVM_NUM_THREADS="1")
    assert "threads: found 1, asked for 2" in done.stderr


def test_a_pool_that_is_large_enough_is_no_warning():
    assert run_python(TOO_LATE, "1", TVM_NUM_THREADS="1").stderr == ""


def test_threads_are_all_physical_cores_by_default():
    assert check_threads(None) == physical_cores()
    assert 1 <= physical_cores() <= CPUS


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_physical_cores_are_those_the_process_may_use():
    code = (
        "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))});"
        "from phi3c.runtime.threads import check_threads, pool_size, use_threads;"
        "use_threads(check_threads(None)); print(pool_size(), len(os.sched_getaffinity(0)))"
    )
    assert run_python(code).stdout == "1 1\n"


@pytest.mark.parametrize("threads", [0, -1, CPUS + 1, 1.0, True, "2"])
def test_threads_out_of_range_are_refused(threads):
    with pytest.raises(InputError, match=f"threads: found .*; accepted: 1 to {CPUS}, or None"):
        check_threads(threads)
