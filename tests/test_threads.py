"""How many threads there are, and the pool that is linked into every library (thread_pool.c)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import phi3c
from phi3c.errors import ArtifactError, InputError
from phi3c.linker import find_linker
from phi3c.runtime.threads import ThreadPool, check_threads, physical_cores
from phi3c.targets import parse_target

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "phi3c" / "thread_pool.c"
STRESS = Path(__file__).with_name("thread_pool_stress.c")
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
several_cpus = pytest.mark.skipif(CPUS < 2, reason="one CPU: every pool has one thread")
linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")

TASK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@pytest.fixture
def pool(tmp_path):
    """A library of nothing but the pool."""
    path = tmp_path / "pool.so"
    find_linker(parse_target("cpu"))(str(path), [])
    library = ctypes.CDLL(str(path))
    yield library
    library.phi3c_end_workers()


@pytest.fixture(scope="module")
def tiny_artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("threads") / "tiny"
    phi3c.compile(ROOT / "configs" / "tiny.json", output=folder)
    return folder


def launch(library: ctypes.CDLL, parts: int, fails=()) -> tuple[int, list[tuple[int, int]]]:
    """(what the launch returns, (part, thread) of every call)"""
    calls = []

    def task(part: int, group: int, data: int) -> int:
        calls.append((part, threading.get_native_id()))
        return int(part in fails)

    return library.phi3c_parallel_launch(TASK(task), None, parts), calls


def tasks_of_this_process() -> int:
    exiting = 4  # PF_EXITING: one that was joined is listed until the kernel is done with it
    alive = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            alive += not int(fields[6]) & exiting
    return alive


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 100])
def test_every_part_is_done_once(pool, threads, parts):
    pool.phi3c_set_threads(threads)
    for _ in range(20):
        code, calls = launch(pool, parts)
        assert code == 0
        assert sorted(part for part, _ in calls) == list(range(parts))
        assert len({thread for _, thread in calls}) <= threads


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_loop_of_its_own_size_has_a_few_parts_a_thread(pool, threads):
    pool.phi3c_set_threads(threads)
    parts = len(launch(pool, 0)[1])
    assert parts == 1 if threads == 1 else threads < parts <= 8 * threads


@linux
def test_there_are_as_many_threads_as_asked_for(pool):
    gc.collect()  # models of other tests have threads too
    before = tasks_of_this_process()
    for threads in (3, 1, 2, 5):
        pool.phi3c_set_threads(threads)
        launch(pool, 0)
        assert tasks_of_this_process() == before + threads - 1
    pool.phi3c_end_workers()
    assert tasks_of_this_process() == before
    launch(pool, 0)
    assert tasks_of_this_process() == before + 4


@pytest.mark.parametrize("threads", [1, 3])
def test_a_part_that_fails_fails_the_launch_in_the_callers_thread(pool, threads):
    pool.phi3c_set_threads(threads)
    code, calls = launch(pool, 10, fails={7})
    assert code != 0
    assert calls[-1] == (7, threading.get_native_id())
    assert launch(pool, 10)[0] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_the_child_of_a_fork_has_workers_of_its_own(pool):
    pool.phi3c_set_threads(3)
    launch(pool, 9)
    child = os.fork()
    if child == 0:
        _, calls = launch(pool, 9)
        pool.phi3c_end_workers()
        os._exit(0 if sorted(part for part, _ in calls) == list(range(9)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(launch(pool, 9)[1]) == 9


@linux
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_many_launches_under_sanitizers(tmp_path, sanitizer):
    program = tmp_path / "stress"
    flags = ["-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    subprocess.run(["gcc", *flags, SOURCE, STRESS, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "every part was done once\n"), done.stderr


def test_a_library_without_a_pool_is_refused(tmp_path):
    path = tmp_path / "other.so"
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", path], check=True)
    with pytest.raises(ArtifactError, match="other.so: not a library that phi3c has linked"):
        ThreadPool(path)


@linux
@several_cpus
def test_a_model_runs_on_the_threads_it_was_loaded_with(tiny_artifact):
    def logits(model: phi3c.CompiledPhi3) -> np.ndarray:
        cache = model.create_paged_kv_cache()
        cache.add_sequence(0)
        with cache.forward([0], [5]):
            return model.prefill(model.embed([1, 2, 3, 4, 5]), cache)[0].numpy()

    gc.collect()  # models of other tests have threads too
    before = tasks_of_this_process()
    one = phi3c.load(tiny_artifact, threads=1)
    alone = logits(one)
    assert tasks_of_this_process() == before
    two = phi3c.load(tiny_artifact, threads=2)
    assert np.array_equal(logits(two), alone)
    assert tasks_of_this_process() == before + 1
    assert np.array_equal(logits(one), alone)
    assert tasks_of_this_process() == before
    logits(two)
    del one, two
    gc.collect()
    assert tasks_of_this_process() == before


@several_cpus
def test_models_of_one_library_in_several_python_threads_at_once(tiny_artifact):
    models = [phi3c.load(tiny_artifact, threads=2) for _ in range(3)]
    found = {}

    def run(index: int) -> None:
        model = models[index]
        cache = model.create_paged_kv_cache()
        cache.add_sequence(0)
        for _ in range(20):
            with cache.forward([0], [3]):
                found[index] = model.prefill(model.embed([7, 8, 9]), cache)[0].numpy()
            cache.popn(0, 3)

    running = [threading.Thread(target=run, args=(i,)) for i in range(len(models))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert all(np.array_equal(found[i], found[0]) for i in range(len(models)))


def test_threads_are_all_physical_cores_by_default():
    assert check_threads(None) == physical_cores()
    assert 1 <= physical_cores() <= CPUS


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_physical_cores_are_those_the_process_may_use():
    code = (
        "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))});"
        "from phi3c.runtime.threads import check_threads; print(check_threads(None))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("threads", [0, -1, CPUS + 1, 1.0, True, "2"])
def test_threads_out_of_range_are_refused(threads):
    with pytest.raises(InputError, match=f"threads: found .*; accepted: 1 to {CPUS}, or None"):
        check_threads(threads)
