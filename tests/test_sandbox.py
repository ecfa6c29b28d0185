"""Test the sandbox with programs that cheat (hostile.py) and with programs that are only unusual.

Each attack is tried twice: it must succeed against a naive runner, or the test proves nothing, and fail in the sandbox.
"""
import contextlib
import gc
import glob
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import hostile  # noqa: E402
import sandbox  # noqa: E402
from plumbing import sandbox_child, sandbox_worker  # noqa: E402

os.environ["DUST_SECRET"] = "sk-secret"  # before the first worker starts
sandbox.run("pass")  # prints here, once, what this system does not allow
ISOLATED = sandbox_worker.Worker.mode == "isolated"
needs_namespaces = pytest.mark.skipif(not ISOLATED, reason="this system allows no namespaces")
LINUX = sys.platform == "linux"


def fill(code, folder="", number=0, **more):
    """Fill in the folders, ids and names of this run in the code of an attack."""
    for name, value in {"folder": folder, "home": os.path.expanduser("~"), "caller": os.getpid(), "number": number,
                        "exit": 60 if os.uname().machine == "x86_64" else 93,
                        "tag": f"dust-{os.getpid()}-{number}", **more}.items():
        code = code.replace("{%s!r}" % name, repr(value)).replace("{%s}" % name, str(value))
    return code


def processes_named(tag):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as f:
            found += [int(pid)] * f.read().startswith(tag)
    return found


# ------------------------------------------------------------------------------------------------------ hostile programs


@pytest.mark.parametrize("name", hostile.FORGERIES)
def test_wrong_program_is_not_paid(name, tmp_path):
    """A program must not become right by ending the process of the verdict, or by changing what is compared."""
    code, tests = hostile.FORGERIES[name]
    assert hostile.naive_verdict(code, tests, str(tmp_path)), "this attack does not even fool the naive runner"
    verdict = sandbox.run_tests(code, tests, timeout=3)
    assert not verdict and verdict.failed_test == 0 and verdict.reason and not verdict.passed


# ------------------------------------------------------------------------------------------------------------- asserts


def asserts(source, entry_point="f"):
    return [{"asserts": source, "entry_point": entry_point}]


FORGED_ASSERTS = {name: (code, f"assert f(3) == {tests[0]['expected']}")
                  for name, (code, tests) in hostile.FORGERIES.items() if "fn_name" in tests[0]} | {
    "an_end_of_the_values": ("def f(x): raise StopIteration", "assert all(map(f, [1, 2]))"),
    "a_patched_builtin": ("import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 7", "assert abs(f(3) - 1) < 1e-6"),
    "a_builtin_of_its_own": ("def abs(x): return 0\ndef f(x): return 7", "assert abs(f(3) - 1) < 1e-6"),
    "a_patched_module": ("import math\nmath.isclose = lambda *a: True\ndef f(x): return 7",
                         "import math\nassert math.isclose(f(3), 1)"),
    "its_callers_names": ("import sys\ndef f(x):\n sys._getframe(1).f_globals['abs'] = lambda x: 0\n return 7",
                          "v = f(3)\nassert abs(v - 1) < 1e-6"),
    "an_exit_where_an_error_is_due": ("import os\ndef f(x): os._exit(0)",
                                      "try:\n f(3)\n assert 0\nexcept BaseException as e: assert type(e) is ValueError"),
    "an_exit_in_the_last_call": ("import os\ndef f(x): os._exit(0)", "try: f(3)\nexcept BaseException: pass"),
    "a_system_exit_in_a_caught_call": ("def f(x): raise SystemExit", "try: f(3)\nexcept BaseException: pass"),
    "an_object_where_any_error_is_due": ("def f(x): return {f: 1}", "try: f(3)\nexcept Exception: pass"),
}


@pytest.mark.parametrize("name", FORGED_ASSERTS)
def test_wrong_program_does_not_get_past_asserts(name, tmp_path):
    """Most runners of HumanEval run the asserts in the program's process. There the program can skip them."""
    code, source = FORGED_ASSERTS[name]
    path = tmp_path / "solution.py"
    path.write_text(f"{code}\n{source}\n")
    naive = subprocess.run([sys.executable, path], cwd=tmp_path, timeout=20, capture_output=True)
    assert naive.returncode == 0, f"the naive runner holds it: {naive.stderr}"
    verdict = sandbox.run_tests(code, asserts(source), timeout=3)
    assert not verdict and verdict.failed_test == 0 and verdict.results[0].status != "ok", verdict


@pytest.mark.parametrize("act", [
    "key = inspect_key()\nfor fd in range(64):\n try: os.pwrite(fd, key + b'true', 0)\n except OSError: pass",
    "for fd in range(3, 64):\n try: os.write(fd, b'[true]\\n' * 99)\n except OSError: pass",
    "for fd in range(3, 64):\n try: socket.socket(fileno=fd).shutdown(2)\n except OSError: pass",
    "for fd in range(3, 64):\n try: os.write(fd, b'[' * 99999 + b'\\n{\"int\": [1]}\\n{\"eval\": \"1\"}\\n')\n except OSError: pass",
    "for fd in range(3, 64):\n try: os.write(fd, b'{\"tuple\": [[\"SystemExit\", \"KeyboardInterrupt\"], \"\"]}\\n')\n except OSError: pass",
    "for fd in range(3, 64):\n try:\n  while True: os.write(fd, b'x' * 65536)\n except OSError: pass",
], ids=itertools.count())
def test_nothing_said_on_the_wire_is_a_verdict(act):
    """The program's process has one end of a socket and can write anything into it."""
    code = ("import os, socket, sys\ndef inspect_key():\n frame = sys._getframe()\n while frame:\n"
            "  for value in frame.f_locals.values():\n   if type(value) is bytes and len(value) == 16: return value\n"
            "  frame = frame.f_back\n return b''\n")
    for place in (act, "def f(x):\n " + act.replace("\n", "\n ") + "\n return x"):
        verdict = sandbox.run_tests(code + place + "\n", asserts("assert f(3) == 1234567\nassert f(4) == 7654321"), timeout=3)
        assert not verdict and verdict.results[0].status != "ok", verdict


@pytest.mark.parametrize("kind", ["SystemExit", "no_error", "StopIteration"])
def test_no_error_on_the_wire_ends_a_loop_of_the_asserts(kind):
    """An error that was not an Exception once became a StopIteration. Then all(map(f, ...)) was true for any f."""
    code = ("import os\ndef f(x):\n for fd in range(3, 64):\n  try: os.write(fd, b'{\"tuple\": [[\"%s\"], \"\"]}\\n' * 9)\n"
            "  except OSError: pass\n return 7" % kind)
    for source in ("assert all(map(f, [1, 2]))", "for v in map(f, [1, 2]): assert v == 1"):
        verdict = sandbox.run_tests(code, asserts(source), timeout=3)
        assert not verdict and verdict.results[0].status == "error", verdict


@pytest.mark.parametrize("code, source", [
    ("def f(x, y=1): return x + y", "assert f(1) == 2 and f(1, 2) == 3 and f(y=5, x=1) == 6"),
    ("class Solution:\n def f(self, x): return x", "assert f(1) == 1"), ("f = lambda: print('noise', flush=True)", "assert f() is None"),
    ("def f(x): return 0.1 + 0.2", "assert abs(f(1) - .3) < 1e-6"), ("from math import gcd as f", "assert f(4, 6) == 2"),
    ("def f(x):\n if x < 0: raise ValueError('no')\n return x", "assert f(1) == 1\ntry: f(-1)\nexcept ValueError as e: assert str(e) == 'no'\nelse: assert 0"),
    ("class E(KeyError): pass\ndef f(): raise E", "try: f()\nexcept KeyError: pass\nelse: assert 0"),
    ("from collections import *\ndef f(): return Counter('a'), OrderedDict(b=1), namedtuple('N', 'x')(2)", "assert f() == ({'a': 1}, {'b': 1}, (2,))"),
    ("def f(): yield from (1, 2)", "assert list(f()) == [1, 2] != f()"), ("n = 0\ndef f():\n global n\n n += 1\n return n", "assert f() + f() == 3"),
    ("def g(x): return -x\ndef f(x): return g(x)", "assert g(f(3)) == 3"), ("def f(): return sum(range(10))\nif __name__ == '__main__': input()", "assert f() == 45"),
    ("def f(x): return f(x - 1) + 1 if x else 0", "assert f(40000) == 40000"), ("def f(x): return x", "from copy import deepcopy\nassert f([[]]) == deepcopy([[]])"),
], ids=itertools.count())
def test_honest_program_passes_its_asserts(code, source):
    verdict = sandbox.run_tests(code, asserts(source), timeout=20)
    assert verdict, (verdict.reason, verdict.results[-1].stderr)


def test_values_keep_their_kind_on_the_way_to_the_asserts_and_back():
    """With plain JSON, right answers failed: it turns tuples into lists, and loses bytes, sets and non-string keys."""
    value = "[(1, [2]), {3}, frozenset([4]), {(1, 2): b'x', 0: None}, 1j, float('inf'), True, 10 ** 400, '\\ud800é', (), set(), {}, ''] "
    source = f"v = {value}\nassert f(v) == v and repr(f(v)) == repr(v)\nimport math\nassert math.isnan(f(math.nan))"
    assert sandbox.run_tests("def f(x): return x", asserts(source))
    assert not sandbox.run_tests("def f(x): return list(x)", asserts("assert f((1, 2)) == (1, 2)"))


def test_a_name_of_the_prelude_does_not_stand_in_for_the_program():
    """The prelude defines gcd. A program without a function gcd must not pass with it."""
    for entry_point in ("gcd", ""):
        assert not sandbox.run_tests("x = 1", asserts("assert gcd(4, 6) == 2", entry_point))
        assert not sandbox.run_tests("def gcd(a, b): return 1", asserts("assert gcd(4, 6) == 2", entry_point))
        assert sandbox.run_tests("def gcd(a, b): return 2", asserts("assert gcd(4, 6) == 2", entry_point))
        mentioned = "import math\ndef find_gcd(a, b): return math.gcd(a, b)"  # its .gcd is a name of the prelude too
        assert not sandbox.run_tests(mentioned, asserts("assert gcd(4, 6) == 2", entry_point))
        for code in ("from math import gcd", "import math\ngcd = math.gcd"):
            assert sandbox.run_tests(code, asserts("assert gcd(4, 6) == 2", entry_point))


def test_limits_hold_for_programs_behind_asserts():
    start = time.monotonic()
    for code in ("while True: pass", "def f(x):\n while True: pass"):
        assert sandbox.run_tests(code, asserts("f(1)"), timeout=0.5).results[0].status == "timeout"
    assert sandbox.run_tests("def f(x): return x", asserts("while True: f(1)"), timeout=0.5).results[0].status == "timeout"
    assert time.monotonic() - start < 6
    large, same = "def f(x):\n y = bytearray(300 << 20)\n return x", "def f(x): return x"
    assert sandbox.run_tests(large, asserts("assert f(1) == 1"))
    both = (large, "assert f(1) == 1"), (same, "y = bytearray(300 << 20)\nassert f(1) == 1")
    for code, source in both if LINUX else ():
        assert sandbox.run_tests(code, asserts(source), memory_mb=256).results[0].status == "memory"
    assert sandbox.run_tests("\0", asserts("f(1)")).results[0].status == "refused"


def test_both_sides_of_asserts_start_again_when_a_worker_dies():
    """If only one side started again, the other side would still be in the middle of the old exchange."""
    killed = []

    def kill():
        wait_until(lambda: len(sandbox.shared_pool.busy) == 2)
        time.sleep(0.3)
        os.killpg(next(iter(sandbox.shared_pool.busy)).process.pid, signal.SIGKILL)
        killed.append(1)

    for _ in range(2):
        killer = threading.Thread(target=kill)
        killer.start()
        assert sandbox.run_tests("import time\ndef f(x):\n time.sleep(.4)\n return x", asserts("assert f(1) == 1 and f(2) == 2"))
        killer.join()
    assert len(killed) == 2


def test_problems_of_all_kinds_share_a_pool():
    right, wrong = "def f(x): return x + 1\nif __name__ == '__main__': print(7)", "def f(x): return x"
    tests = [*asserts("assert f(1) == 2"), {"fn_name": "f", "args": [1], "expected": 2}, {"input": "", "output": "7"}]
    with sandbox.Pool(2) as pool:
        assert pool.label([(right, tests), (wrong, tests), (right, tests[::-1]), (wrong, tests[1:])] * 5) == [True, False] * 10
        verdicts = {verdict.job: verdict for verdict in pool.run_tests([(right, tests * 2), (wrong, tests)])}
    assert len(verdicts[0].results) == 6 and verdicts[1].failed_test == 0


# ------------------------------------------------------------------------------------------------- from test to test


@pytest.mark.parametrize("name", hostile.MEMORIES)
def test_nothing_is_remembered_from_test_to_test(name, tmp_path):
    """A test must not find what an earlier test left on the disk, in shared memory or in a living process."""
    code = fill(hostile.MEMORIES[name], str(tmp_path), random.randrange(1 << 28))
    if not ISOLATED and name not in ("by_a_file_in_the_folder", "by_a_deep_folder", "by_a_symbolic_link"):
        pytest.skip("this system allows no namespaces")
    try:
        assert hostile.naive_verdict(code, hostile.TWICE, str(tmp_path)), "the naive runner is not fooled"
    finally:
        for folder in "/tmp", "/var/tmp", "/dev/shm":
            for file in os.listdir(folder):
                if file.startswith(f"dust-{os.getpid()}-"):
                    os.remove(f"{folder}/{file}")
    (tmp_path / "again").mkdir()
    again = fill(hostile.MEMORIES[name], str(tmp_path / "again"), random.randrange(1 << 28))
    verdict = sandbox.run_tests(again, hostile.TWICE, timeout=5)
    assert verdict.failed_test is not None
    assert not [file for folder in ("/tmp", "/var/tmp", "/dev/shm") for file in os.listdir(folder)
                if file.startswith(f"dust-{os.getpid()}-")]


@pytest.mark.parametrize("name", hostile.TRACES)
def test_nothing_is_remembered_in_the_memory_of_a_process(name, tmp_path):
    """If tests share a process, the second test finds what the first one left in its memory."""
    code = hostile.TRACES[name]
    assert hostile.one_process_verdict(code, hostile.TWICE, str(tmp_path)), "the one process is not fooled"
    verdict = sandbox.run_tests(code, hostile.TWICE, timeout=5)
    assert verdict.failed_test == 1 and verdict.results[0].stdout.strip() == "1", verdict


LATE_TESTS = [{"input": text, "output": number} for text, number in (("", ""), ("a", "1"), ("b", "2"))]


def test_a_test_sees_no_old_names_and_no_old_generators():
    """A generator in a reference cycle ends when garbage is collected. It may then print into a later test's output."""
    names = "try: n += 1\nexcept NameError: n = 1\nprint(n)"
    late = ("def f():\n try: yield\n finally: print(2)\nimport sys\nif sys.stdin.read() == 'a':\n g = [f()]\n g.append(g)\n next(g[0])\n"
            " print(1)\nelse: l = [[] for i in range(99999)]")
    assert sandbox.run_tests(names, hostile.TWICE).failed_test == 1
    # other ways to run code late: an iterator with a close method, and one more kind of try
    other = late.replace("try: yield\n finally: print(2)", "yield from I(abs, [1, 2])")
    other = "class I(map):\n def close(self): print(2)\n" + other
    for code in [other] + [late.replace(" finally", " except* ValueError: pass\n finally")] * (sys.version_info >= (3, 11)):
        assert hostile.one_process_verdict(code, LATE_TESTS, "/"), code
        assert sandbox.run_tests(code, LATE_TESTS).failed_test == 2
    deep = ("import sys\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\nif input() == 'a': sys.setrecursionlimit(10**6)\n"
            "print(f(60000))")
    assert sandbox.run_tests(deep, [{"input": name, "output": "60000"} for name in "ab"]).failed_test == 1
    assert hostile.one_process_verdict(late, LATE_TESTS, "/") and sandbox.run_tests(late, LATE_TESTS).failed_test == 2


@pytest.mark.parametrize("code", [
    "import sys\ntry:\n sys.stdin.fileno()\n print(1)\nexcept ValueError: print(2)",
    "import sys\nprint(1 if 'name=' in str(sys.stdin) else 2)", "import sys\nprint(1 + hasattr(sys.stdin, 'name'))",
    "import sys\nprint(sys.stdin.buffer.getvalue())",
    "import sys\nclass A:\n def getvalue(self): pass\nprint(sys.stdin.buffer.getvalue())", "print('\\ud800')", "import sys\nprint(sys.stdout.errors)",
    "import sys\nsys.setrecursionlimit(100)\ndef f(n):\n try: return f(n + 1)\n except RecursionError: return n\n"
    "print(f(0))", "l = []\ntry:\n l.append(bytes(600 << 20))\n l.append(l)\n print(1)\nexcept MemoryError: print(2)",
    "from typing import List\nclass A:\n def f(self): pass\nList[A]\ntry:\n big = bytes(600 << 20)\n print(1)\n"
    "except MemoryError: print(2)", "def g(): yield '{0.gi_frame.f_back.f_locals}'.format(G)\nG = g()\nprint(len(next(G)) > 3000)",
    "print('{:{0.__class__}}')", "print('{0.real} {0[0]}'.format(7) if 0 else 3)",
], ids=itertools.count())
def test_every_run_of_a_program_prints_the_same(code):
    """In a process that is used again, the runner's streams, errors and frames could differ from the first test's."""
    first = sandbox.run(code)
    verdict = sandbox.run_tests(code, [{"input": "", "output": first.stdout}] * 3)
    assert verdict or verdict.results[0].status == first.status == "error", verdict


def test_the_code_of_a_program_is_compiled_once():
    """Compiling takes a large part of a short run. Without this, every further test would compile again."""
    with contextlib.ExitStack() as stack:
        program = sandbox.memory_file(stack, b"import os\nprint(7)")
        for _ in range(2):
            result, _ = sandbox.run_once(sandbox.shared_pool, program, sandbox.prepare(PRINTS_7[0]), 5, 512)
            assert result.stdout == "7\n" and os.pread(program, 1, 0) == sandbox_child.COMPILED


def test_a_slow_test_does_not_take_the_time_of_the_next():
    """The timeout is for each test. Six tests of 0.4 s take longer than 2 s together, and must pass."""
    code = "import time\nn = input()\nwhile time.process_time() < 0.4: pass\nprint(n)"
    verdict = sandbox.run_tests(code, [{"input": f"{i}\n", "output": f"{i}"} for i in range(6)], timeout=2)
    assert verdict and len(verdict.results) == 6 and sum(result.seconds for result in verdict.results) > 2


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Make things that belong to the caller: files, a secret, and sockets of three kinds."""
    folder = tmp_path_factory.mktemp("caller")
    (folder / "secret").write_text("sk-secret")
    tcp, udp, local = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX)
    tcp.bind(("127.0.0.1", 0))
    tcp.listen(9)
    udp.bind(tcp.getsockname())
    local.bind(f"\0dust-{os.getpid()}-0")
    local.listen(9)
    named = socket.socket(socket.AF_UNIX)
    named.bind(f"/tmp/dust-{os.getpid()}-named")
    named.listen(9)
    os.chmod(f"/tmp/dust-{os.getpid()}-named", 0o777)
    with tcp, udp, local, named:
        yield {"folder": str(folder), "port": tcp.getsockname()[1]}
    os.remove(f"/tmp/dust-{os.getpid()}-named")


@pytest.mark.skipif(not LINUX, reason="the attacks are written for Linux")
@pytest.mark.parametrize("name", hostile.ESCAPES)
def test_program_does_not_get_out(name, outside):
    code, isolation = hostile.ESCAPES[name]
    if isolation and not ISOLATED:
        pytest.skip("this system allows no namespaces")
    if not ISOLATED and name in ("150_processes", "150_threads") and os.getuid():
        pytest.skip("without namespaces the limit of an ordinary user counts all processes of that user")
    code = fill(code, **outside)
    victim = os.path.join(outside["folder"], "victim")
    open(victim, "w").close()
    with contextlib.suppress(OSError):
        os.remove(outside["folder"] + "/new")
    naive = hostile.naive_run(code, timeout=20, cwd=outside["folder"])
    if name == "a_new_user_namespace" and "ESCAPED" not in naive[0]:
        pytest.skip("this system allows no user namespaces")
    assert "ESCAPED" in naive[0], f"the naive runner holds it: {naive[1]}"
    open(victim, "w").close()
    memory = 8192 if name.startswith("150") else 128  # 150 processes would exceed the small limit too
    result = sandbox.run(code, timeout=10, memory_mb=memory)
    assert "ESCAPED" not in result.stdout and result.status != "timeout", result
    assert os.path.getsize(victim) == 0


@pytest.mark.skipif(not LINUX, reason="finds processes by /proc")
@pytest.mark.parametrize("name", hostile.ORPHANS)
def test_no_process_outlives_its_run(name):
    tag = f"dust-{os.getpid()}-{random.randrange(1 << 28)}"
    code = hostile.ORPHANS[name].replace("{tag}", tag)
    hostile.naive_run(code)
    left = processes_named(tag)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left, "the naive runner leaves nothing"
    sandbox.run(code, timeout=5)
    assert not processes_named(tag)


def test_output_held_open_by_a_grandchild_is_not_waited_for():
    """subprocess.run waits until a grandchild closes the pipe. Then a program that has finished counts as too slow."""
    code = "import os, time\nprint(7, flush=True)\nif os.fork() == 0:\n os.setsid()\n time.sleep({})\n"
    assert hostile.naive_run(code.format(3), timeout=1)[0] == ""
    result = sandbox.run(code.format(60), timeout=30)
    assert result.status == "ok" and result.stdout == "7\n"


@pytest.mark.parametrize("code", [
    "while True: pass", "import time\ntime.sleep(99)", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "import signal, time\nfor s in (1, 2, 3, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "import threading\nwhile True: threading.Event().wait(9)", "while True:\n try:\n  while True: pass\n except: pass",
    "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
    "import atexit, time\natexit.register(time.sleep, 99)", "import os\nwhile True:\n os.wait() if os.fork() else 0",
])
def test_a_program_that_does_not_end_is_ended(code):
    start = time.monotonic()
    result = sandbox.run(code, timeout=0.5)
    assert result.status in ("timeout", "error", "memory") and time.monotonic() - start < 8
    assert result.status == "timeout" or "fork" in code


def test_a_fork_bomb_does_not_starve_the_next_run():
    bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    with sandbox.Pool(2, timeout=1) as pool:
        good = ("import os\np = os.fork()\nif p: os.wait(); print(7)", [{"input": "", "output": "7"}])
        jobs = [(bomb, good[1]), good, good, good, (bomb, good[1]), good]
        assert pool.label(jobs) == [False, True, True, True, False, True]


@needs_namespaces
def test_a_candidate_cannot_kill_its_worker_or_its_neighbours():
    attack = ("import os, signal\nfor s in range(1, 65):\n for p in (1, -1):\n"
              "  try: os.kill(p, s)\n  except (OSError, ValueError): pass\nprint('alive')")
    beside, test = "import time\ntime.sleep(.6)\nprint('alive')", [{"input": "", "output": "alive"}]
    with sandbox.Pool(2) as pool:
        assert pool.label([(beside, test)] * 2) == [True, True]
        workers = set(pool.idle)
        assert pool.label([(beside, test), (attack, test)]) == [True, True]
        assert len(workers) == 2 and set(pool.idle) == workers  # a dead worker is replaced, and its run begins again


def test_lowered_limits_of_the_worker_do_not_reach_the_next_program():
    """A program could lower the limits of a worker with its user id. The next programs then had too little memory."""
    sandbox.run("import os, resource as r\nfor k in (r.RLIMIT_NOFILE, r.RLIMIT_AS, r.RLIMIT_NPROC):\n"
                " try: r.prlimit(os.getppid(), k, (9, 9))\n except OSError: pass")
    for _ in range(3):
        assert sandbox.run("x = open('a', 'w')\nprint(len(b'x' * 1000000))").stdout == "1000000\n"


@pytest.mark.skipif(not LINUX, reason="/proc")
def test_a_candidate_has_three_descriptors_and_few_variables(monkeypatch):
    secret = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(secret, True)
    code = ("import os\nopen_ = []\nfor fd in range(1024):\n try: os.fstat(fd)\n except OSError: continue\n"
            " open_.append(fd)\nprint(open_, sorted(os.environ))")
    monkeypatch.setattr(sandbox, "shared_pool", sandbox.Pool(1))
    with sandbox.shared_pool:  # its worker starts now, and could inherit the descriptor
        result = sandbox.run(code)
    os.close(secret)
    assert result.stdout.startswith("[0, 1, 2] "), result
    assert set(eval(result.stdout[10:])) == {*sandbox_worker.ENVIRONMENT, "HOME", "TMPDIR"}


@needs_namespaces
def test_python_cannot_be_changed_for_the_next_program():
    code = "import json, os\nopen(json.__file__, 'a').write('x')\n"
    assert "Read-only" in sandbox.run(code).stderr or "Permission" in sandbox.run(code).stderr
    assert sandbox.run("import os\nos.mkdir('/new')").status == "error"


def test_output_is_cut_and_said():
    for stream in "stdout", "stderr":
        result = sandbox.run(f"import sys\nwhile True: sys.{stream}.write('x' * 99999)", timeout=20)
        assert result.status == "output" and len(getattr(result, stream)) <= sandbox.OUTPUT_CAP
    result = sandbox.run("import signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\ntry:\n"
                         " while True: sys.stdout.write('x' * 99999)\nexcept OSError: import os; os._exit(0)", timeout=20)
    assert result.status == "output"


def test_what_a_function_sends_back_is_only_data():
    """Results that are deep, huge or odd must count as wrong answers. They must not raise in the trainer."""
    for body in ("x = []\n for i in range(40000): x = [x]\n return x", "return float('nan')", "return [1] * 300000",
                 "return 10 ** 9000", "return '\\ud800'", "return {1, 2}", "return lambda: 0", "return b'1'",
                 "x = []\n x.append(x)\n return x", "return {(1, 2): 3}", "return float('inf')", "return object()"):
        assert not sandbox.run_tests(f"def f():\n {body}", [{"fn_name": "f", "args": [], "expected": 1}], timeout=20), body
    assert not sandbox.same_value("1", b'{"dict": 3}') and not sandbox.same_value("1", b'{"int": [1]}')
    assert not sandbox.same_value("1", b'{"dict": [[{"dict": []}, 1]]}') and not sandbox.same_value("1", b"\xff")
    assert not sandbox.same_value("1", b"[" * 1000) and not sandbox.same_value("null", b"")


FLOODS = {
    "short_lines": ("print('7\\n' * 6_000_000)", {"input": "", "output": "7\n7"}),
    "one_line": ("print('7 ' * 6_000_000)", {"input": "", "output": "7"}),
    "one_word": ("print('7' * 12_000_000)", {"input": "", "output": "7"}),
    "wide_letters": ("print('x' * 12_000_000 + chr(0x1F600))", {"input": "", "output": "7"}),
    "blanks_behind": ("print('7' + ' \\n' * 6_000_000)", {"input": "", "output": "7"}),
    "blanks_in_front": ("print(' \\n' * 6_000_000 + '7')", {"input": "", "output": "7"}),
    "blanks_only": ("print(' \\n' * 6_000_000)", {"input": "", "output": "\n"}),
    "a_word_behind_blanks": ("print('7' + ' \\n' * 6_000_000 + '8')", {"input": "", "output": "7"}),
    "words_around_blanks": ("print('7' + ' ' * 12_000_000 + '8')", {"input": "", "output": "7 8"}),
    "stderr": ("import sys\nprint('7\\n' * 6_000_000, file=sys.stderr)\nprint(7)", {"input": "", "output": "7"}),
    "the_text_of_an_error": ("raise ValueError('x' * 12_000_000)", {"input": "", "output": "7"}),
    "a_value": ("def f(): return [7] * 6_000_000", {"fn_name": "f", "args": [], "expected": [7, 7]}),
    "a_text": ("def f(): return '7' * 12_000_000", {"fn_name": "f", "args": [], "expected": "7"}),
    "stdout_of_a_function": ("def f(): print('7\\n' * 6_000_000); return 7", {"fn_name": "f", "args": [], "expected": 7}),
    "stdout_behind_asserts": ("def f(): print('7\\n' * 6_000_000); return 7", {"asserts": "assert f() == 7", "entry_point": "f"}),
}


@pytest.mark.parametrize("name", FLOODS)
def test_what_floods_the_judge_does_not_fill_its_memory(name):
    """The comparison once split the whole of what was printed: 12 MB of short lines took 137 MB."""
    code, test = FLOODS[name]
    sandbox.run("pass")
    tracemalloc.start()
    try:
        verdict = sandbox.run_tests(code, [test] * 3, timeout=30)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # a judge that splits everything into words would also accept words_around_blanks
    assert verdict.passed is name.startswith(("std", "blanks")), verdict.reason
    assert peak < 20 << 20 and held < 2 << 20, f"{name}: {peak >> 20} MB at the peak, {held >> 20} MB kept"


@pytest.mark.parametrize("blank", "\n ")
def test_the_comparison_does_not_cut_a_flood_into_its_pieces(blank):
    """The bound on what is compared grows with what is expected, so it does not bound the number of pieces."""
    got = f"77{blank}" * 4_000_000
    tracemalloc.start()
    try:
        assert sandbox.difference("77", got)
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()


def test_a_verdict_that_was_read_is_let_go():
    """Pool.run_tests once kept every verdict, with all that the programs had printed, until the last one was read."""
    left = 0
    with sandbox.Pool(1) as pool:
        for number, _ in enumerate(pool.run_tests([GOOD] * 60)):
            if number == 58:
                left = sum(type(thing) is sandbox.Verdict for thing in gc.get_objects())
    assert left < 20


@pytest.mark.parametrize("expected, got, same", [
    ("7", "7" + " \n" * 40_000, True), ("7", "7." + "0" * 40_000, True), ("7", "\n" * 40_000 + "7", True),
    ("7", "7" + "\n" * 40_000 + "8", False), ("7\n" * 40_000, "7.0\n" * 40_000, True), ("7", "7 " * 40_000, False),
    ("7\n" * 40_000, "7\n" * 39_999, False), ("\n7", " 7", True), ("1\n\n2", "1\n2", False), ("", "7", False), ("7", "", False),
], ids=itertools.count())
def test_lazy_comparison_reads_all_that_matters(expected, got, same):
    test = [{"input": "", "output": expected}]
    assert bool(sandbox.run_tests(f"print({got!r})", test)) is same is (sandbox.difference(expected, got) == "")


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


class NoShape:
    @property
    def shape(self):
        raise OSError


class NoItem:
    shape = ()

    def item(self):
        raise StopIteration


class NoText(Exception):
    def __str__(self):
        raise OSError


def raising(error):
    yield 1
    raise error


def function_test(args, expected):
    return {"fn_name": "f", "args": args, "expected": expected}


BROKEN_TESTS = [
    function_test([], nested(600)), function_test([], nested(90_000)), function_test([nested(90_000)], 1),
    function_test([], object()), function_test([], {1: {2: {3}}, (): [object]}), function_test([object()], 1),
    function_test(None, 1), {"fn_name": "f"}, {"input": "", "output": 7}, {"input": ""}, {"output": ""},
    {"input": 7, "output": ""}, {"input": "", "output": "\ud800"}, {"asserts": "x = '\ud800'; assert 0"}, {},
    {"asserts": None}, {"asserts": b""}, {"asserts": "", "entry_point": object()}, None, 7, [],
    function_test([], NoShape()), function_test([], [NoItem()]), function_test([], raising(NotImplementedError("x" * 999))),
    function_test(raising(NoText()), 1), function_test([raising(OSError())], 1), function_test([], {1: raising(EOFError())}),
]


@pytest.mark.parametrize("test", BROKEN_TESTS, ids=itertools.count())
def test_what_is_wrong_with_one_test_is_one_wrong_label(test):
    """An expected value nested 600 deep once ended a run with RecursionError in the middle of labelling."""
    with sandbox.Pool(1) as pool:
        verdicts = {verdict.job: verdict for verdict in pool.run_tests([GOOD, ("def f(*a): return 1", [test]), GOOD])}
    verdict = verdicts[1]
    assert verdicts[0] and verdicts[2] and not verdict
    assert verdict.failed_test == 0 and 0 < len(verdict.reason) < 300 and len(verdict.results) == 1


@pytest.mark.parametrize("test", [{"fn_name": "f", "args": []}, {"fn_name": "f", "args": [], "output": "True"},
                                  {"input": ""}, {"output": "True\n"}])
def test_a_test_without_what_is_expected_passes_no_program(test):
    """Once a function passed it if it returned True, as asserts do. The loader refuses such a test."""
    verdict = sandbox.run_tests("def f(): return True\nprint(True)", [test])
    assert not verdict and "KeyError" in verdict.reason and verdict.results[0].status == "refused"


@pytest.mark.parametrize("digits", [4_301, 6_000, 60_000])
def test_numbers_of_many_digits_are_ordinary_values(digits):
    """Python refuses to turn more than 4,300 digits into a number, unless it is told otherwise."""
    number, text = 10 ** digits - 1, "9" * digits
    tests = [{"fn_name": "f", "args": [number, [number]], "expected": [number + 1, {"a": -number}]}] * 2
    assert sandbox.run_tests("def f(n, m): return (n + 1, {'a': -m[0]})", tests)
    assert not sandbox.run_tests("def f(n, m): return (n + 2, {'a': -m[0]})", tests)
    assert not sandbox.run_tests("def f(n, m): return (n + 1, {'a': m[0]})", tests)  # another sign
    assert sandbox.run_tests("print(input())", [{"input": text, "output": text + ".0"}])
    assert not sandbox.run_tests("print(input())", [{"input": text, "output": text[:-1] + "8"}])
    assert sandbox.run_tests("def f(n): return n * n", asserts(f"n = 10 ** {digits} - 1\nassert f(n) == n * n"))
    if digits <= 50_000:  # LiveCodeBench's limit for the programs
        assert sandbox.run_tests("print(int(input()) + 1)", [{"input": text, "output": "1" + "0" * digits}])
        assert sandbox.run_tests("def f(n): return n + 1", asserts(f"assert f({text}) == 10 ** {digits}"))


def test_a_worker_that_dies_is_replaced_and_the_label_stands():
    sandbox.run("pass")
    worker = sandbox.shared_pool.idle[-1]
    threading.Timer(0.3, lambda: os.killpg(worker.process.pid, signal.SIGKILL)).start()
    assert sandbox.run("import time\ntime.sleep(.8)\nprint(7)").stdout == "7\n"
    os.killpg(sandbox.shared_pool.idle[-1].process.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert sandbox.run("print(8)").stdout == "8\n"


def test_failure_of_the_sandbox_is_an_exception(monkeypatch):
    monkeypatch.setattr(sandbox, "shared_pool", sandbox.Pool(1))
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(sandbox.SandboxError, match="^sandbox: cannot start a worker: [^\n]+$"):
        sandbox.run("print(1)")
    with pytest.raises(sandbox.SandboxError), sandbox.Pool(2) as pool:
        pool.label([("print(1)", [{"input": "", "output": "1"}])] * 5)


def test_a_room_that_cannot_be_entered_is_no_label():
    """A child that failed before the program started was once taken for a program that fails."""
    caller = script("""
        import os, sandbox
        from plumbing.sandbox_worker import Worker
        Worker.mode = "plain"
        box = sandbox.run("import os; print(os.environ['HOME'])").stdout.strip()
        os.rmdir(box)
        open(box, "w").close()
        try: print(sandbox.run("print(7)"))
        except sandbox.SandboxError as error: print(error)
        print(sandbox.run("print(7)").stdout)
        os.remove(box)
    """)
    out, _ = caller.communicate(timeout=60)
    assert out.startswith("sandbox: [Errno 20]") and out.endswith("\n7\n\n"), out


# ------------------------------------------------------------------------------------------------------- benign programs

BENIGN = {
    "unicode": ("print(input()[::-1])", "héé→字😀\n", "😀字→ééh"),
    "two_megabytes": ("print('x' * (2 << 20))", "", "x" * (2 << 20)),
    "ten_megabytes_of_input": ("import sys\nprint(len(sys.stdin.read()))", "y" * (10 << 20), str(10 << 20)),
    "recursion": ("def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(50000))", "", "50000"),
    "recursion_in_a_thread": (
        "import sys, threading\nsys.setrecursionlimit(300000)\nthreading.stack_size(128 << 20)\n"
        "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
        "t = threading.Thread(target=lambda: print(f(50000)))\nt.start()\nt.join()", "", "50000"),
    "an_array_of_400_MB": ("x = bytearray(400 << 20)\nx[::4096] = b'x' * len(x[::4096])\nprint(len(x) >> 20)", "", "400"),
    "nine_threads": (
        "import threading\nt = [threading.Thread(target=print, args=(i,), kwargs={'end': '\\n'}) for i in range(9)]\n"
        "for x in t: x.start(); x.join()", "", "\n".join(map(str, range(9)))),
    "threads_are_joined": (
        "import threading, time\ndef f():\n time.sleep(.2)\n print('late')\nthreading.Thread(target=f).start()", "", "late"),
    "atexit_runs": ("import atexit\natexit.register(print, 'bye')\nprint('hi')", "", "hi\nbye"),
    "main_can_pickle": (
        "import pickle\nclass A:\n x = 3\nprint(pickle.loads(pickle.dumps(A())).x, __name__)", "", "3 __main__"),
    "exit_exists": ("print(1)\nexit()", "", "1"),
    "quit_exists": ("print(1)\nquit(0)\nprint(2)", "", "1"),
    "argv_is_alone": ("import sys\nprint(len(sys.argv), sys.stdin.isatty(), sys.stdout.isatty())", "", "1 False False"),
    "carriage_returns_arrive": ("import sys\nprint(repr(sys.stdin.read()))", "a\r\nb", "'a\\r\\nb'"),
    "bytes_of_stdin": ("import sys\nprint(sys.stdin.buffer.read())", "é", "b'\\xc3\\xa9'"),
    "open_0": ("print(sum(map(int, open(0))))", "1\n2\n", "3"),
    "os_read": ("import os\nprint(os.read(0, 9))", "ab", "b'ab'"),
    "a_file_left_open": ("out = open(1, 'w', closefd=False)\nout.write('7')", "", "7"),
    "own_files": ("open('a', 'w').write('x')\nprint(open('a').read())", "", "x"),
    "temporary_files": ("import tempfile\nf = tempfile.TemporaryFile('w+')\nf.write('7')\nf.seek(0)\nprint(f.read())", "", "7"),
    "subprocess": ("import subprocess\nprint(subprocess.check_output(['/bin/echo', 'x']).decode())", "", "x"),
    "processes": (
        "import concurrent.futures as c\ndef f(x): return x * x\nif __name__ == '__main__':\n"
        " with c.ProcessPoolExecutor(2) as p: print(*p.map(f, [1, 2, 3]))", "", "1 4 9"),
    "thread_pool": (
        "import concurrent.futures as c\nwith c.ThreadPoolExecutor(4) as p: print(*p.map(str, [1, 2]))", "", "1 2"),
    "asyncio": ("import asyncio\nasync def f(): print(1)\nasyncio.run(f())", "", "1"),
    "dataclass": ("import dataclasses\n@dataclasses.dataclass\nclass A:\n x: int\nprint(A(3))", "", "A(x=3)"),
    "slow_start": ("import time\ntime.sleep(.5)\nprint(1)", "", "1"),
    "prelude": ("print(gcd(4, 6), sqrt(4), Counter('aa')['a'], math.pi > 3, pow(2, 9, 5), randint(3, 3))", "", "2 2.0 2 True 2 3"),
    "a_coding_line": ("# coding: latin-1\nprint('é')", "", "é"),
    "a_byte_order_mark": ("\ufeffprint(1)", "", "1"),
    "exact_decimals": ("print('1.0 2.50')\nprint('x 1.0')", "", "1 2.5\nx 1.0"),
    "blanks_and_crlf": ("print('  a b  \\n\\n c\\n\\n')", "", "a b\r\n\r\nc\r\n"),
    "fast_io_by_descriptors": (  # as in the templates that contestants paste
        "import os, sys\nfrom io import BytesIO, IOBase\nclass FastIO(IOBase):\n def __init__(self, file):\n"
        "  self._file = file\n  self._fd = file.fileno()\n  self.buffer = BytesIO()\n"
        "  self.writable = 'x' in file.mode or 'r' not in file.mode\n def write(self, b): self.buffer.write(b.encode())\n"
        " def flush(self): os.write(self._fd, self.buffer.getvalue()); self.buffer = BytesIO()\n"
        "sys.stdout = FastIO(sys.stdout)\nprint(os.read(sys.stdin.fileno(), 9).decode())\nsys.stdout.flush()", "7", "7"),
    "closed_stdout": ("import sys\nprint(7)\nsys.stdout.close()", "", "7"),
    "closed_stderr": ("import sys\nprint(7)\nsys.stderr.close()", "", "7"),
    "no_stdout": ("import sys\nprint(7)\nsys.stdout = None", "", "7"),
    "a_larger_stack": (
        "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (0x10000000, resource.RLIM_INFINITY))\nprint(7)", "", "7"),
    "programs_that_share_its_files": (
        "import subprocess\nopen('a', 'w').write('7')\nprint(subprocess.check_output(['/bin/cat', 'a']).decode())", "", "7"),
    "children_that_share_its_memory": (
        "import os, time\nx = bytearray(90 << 20)\nfor i in range(6):\n if os.fork() == 0:\n  time.sleep(.3)\n  os._exit(0)\n"
        "for i in range(6): os.wait()\nprint(7)", "", "7"),
    "hashes_repeat": ("print(hash('a') == int(input()))", None, "True"),
}


DEEP = {  # recursion through C code; f(n) is n
    "cache": "@cache\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)",
    "a_cached_method": "class A:\n @lru_cache(None)\n def f(self, n): return 0 if n == 0 else 1 + self.f(n - 1)\nf = A().f",
    "max_of_a_generator": "def f(n): return 0 if n == 0 else 1 + max(f(n - 1) for _ in [0])",
    "cache_and_min": "@cache\ndef f(n): return 0 if n == 0 else 1 + min(f(n - i) for i in [1])",
    "sum_of_map": "def f(n): return 0 if n == 0 else 1 + sum(map(f, [n - 1]))",
    "call": "class A:\n def __call__(self, n): return 0 if n == 0 else 1 + self(n - 1)\nf = A()",
    "operator": "class A:\n def __init__(self, n): self.n = n\n def __add__(self, o): return 0 if self.n == 0 else 1 + (A(self.n - 1) + 0)\n"
                "f = lambda n: A(n) + 0",
    "missing": "class A(dict):\n def __missing__(self, n): return 0 if n == 0 else 1 + self[n - 1]\nf = A().__getitem__",
    "reduce": "def f(n): return 0 if n == 0 else reduce(lambda a, b: a + f(n - 1), [1, 1])",
    "init": "class A:\n def __init__(self, n): self.v = 0 if n == 0 else 1 + A(n - 1).v\nf = lambda n: A(n).v",
}
PYTHONS = [sys.executable, *sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.1[0-9].*/bin/python")))]


@pytest.mark.skipif(not LINUX, reason="on macOS the stack of the main thread is small")
@pytest.mark.parametrize("python", PYTHONS)
def test_labels_of_recursion_through_c_code_do_not_depend_on_the_python(python):
    """Python 3.12 once ended @cache, max(f() for ...) and the like after 450 calls, Python 3.13 after 3,300."""
    top = "import sys, threading\nfrom functools import *\n"
    bare = [top + form + "\nprint(f(int(input())))" for form in DEEP.values()]
    deep = [code.replace("\n", "\nsys.setrecursionlimit(10 ** 6)\n", 1) for code in bare]
    thread = (top + DEEP["cache"] + "\n{0}threading.stack_size(128 << 20)\ndef main():\n {1}print(f(50000))\n"
              "t = threading.Thread(target=main)\nt.start()\nt.join()")
    limit = "sys.setrecursionlimit(10 ** 6); "
    endless = top + "@cache\ndef f(n): return f(n + 1)\ntry: f(0)\nexcept RecursionError: print(50000)"
    # with a higher limit, Python before 3.12 crashes here, and later ones raise RecursionError: both are wrong
    crash = top + limit + "\n@cache\ndef f(n): return f(n + 1)\nprint(50000, flush=True)\nf(0)"
    program = f"""
        import json, sys
        sys.path.insert(0, {os.path.dirname(HERE)!r})
        import sandbox
        bare, deep, threads, crash = json.load(sys.stdin)
        jobs = [(code, [{{"input": depth, "output": depth}}]) for depth, codes in
                (("50000", deep + threads), ("10000", bare), ("60000", bare), ("50000", crash)) for code in codes]
        with sandbox.Pool(2, timeout=60) as pool: print(json.dumps(pool.label(jobs)))
    """
    threads = [thread.format(limit, ""), thread.format("", limit), endless]
    done = subprocess.run([python, "-B", "-c", textwrap.dedent(program)], input=json.dumps([bare, deep, threads, [crash]]),
                          text=True, capture_output=True, timeout=500)
    assert done.stdout, done.stderr
    labels = json.loads(done.stdout)
    assert labels == [True] * (2 * len(DEEP) + 3) + [False] * (len(DEEP) + 1), labels


def test_what_this_python_cannot_do_is_said_once(tmp_path):
    """A Python whose counter of calls is not found would label right programs wrong in silence."""
    with open(sandbox_child.__file__) as f:
        source = f.read()
    changed = source.replace("if sys.version_info < (3, 12)", "if True").replace(">= (3, 12)", ">= (3, 0)")
    assert changed.count("(3, 12)") == source.count("(3, 12)") - 2
    (tmp_path / "child.py").write_text(changed)
    code = (f"import sys\nsys.path.insert(0, {os.path.dirname(HERE)!r})\nimport sandbox\n"
            f"from plumbing import sandbox_child\nsandbox_child.__file__ = {str(tmp_path / 'child.py')!r}\n"
            "with sandbox.Pool(2) as pool: print(pool.label([('print(7)', [{'input': '', 'output': '7'}])] * 4))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{[True] * 4}\n", done.stderr
    assert done.stderr.count("sandbox: ") == 1 == done.stderr.count("\n") and "@cache" in done.stderr, done.stderr


@pytest.mark.parametrize("name", BENIGN)
def test_honest_program_passes(name):
    code, stdin, output = BENIGN[name]
    if name == "processes" and not ISOLATED:
        pytest.skip("without namespaces a program has no private /dev/shm")
    if stdin is None:
        stdin = sandbox.run("print(hash('a'))").stdout
    memory = 400 if name.startswith("children") else 1024
    verdict = sandbox.run_tests(code, [{"input": stdin, "output": output}], timeout=30, memory_mb=memory)
    assert verdict, (verdict.reason, verdict.results[-1].stderr[-500:])
    assert verdict.failed_test is None and len(verdict.results) == 1 and verdict.results[0].exit_code == 0


@pytest.mark.parametrize("code, args, expected", [
    ("def f(x): return x + 1", [1], 2), ("f = lambda x: x", [[1, 2]], [1, 2]), ("def f(x): return (x, (1,))", [1], [1, [1]]),
    ("class Solution:\n def f(self, x): return 2.0", [1], 2), ("def f(): return None", [], None), ("def f(): pass", [], None),
    ("def f(x): print('noise'); return x", ["é"], "é"), ("def f(x): return {'a': [x], 2: 3}", [1], {2: 3, "a": (1,)}),
    ("def f(n): return [10 ** n]", [6000], [10**6000]), ("def f(): return deque([1])[0], inf", [], [1, float("inf")]),
    ("def f(x: List[int]) -> Optional[int]: return heapq.nsmallest(1, x)[0]", [[3, 1]], 1),
    ("def f(): return 0.1 + 0.2", [], 0.1 + 0.2), ("def f(x): x.append(1); return x", [[]], [1]),
    ("def f(): return __name__ != '__main__'\nif __name__ == '__main__': input()", [], True),
], ids=itertools.count())
def test_honest_function_passes(code, args, expected):
    tests = [{"fn_name": "f", "args": args, "expected": expected}] * 2
    before = pickle.dumps(tests)
    verdict = sandbox.run_tests(code, tests, timeout=30)
    assert verdict, (verdict.reason, verdict.results[-1].stderr)
    assert pickle.dumps(tests) == before


@pytest.mark.parametrize("value", ["int64(5)", "float32(5)", "bool_(True) * 5", "array([5])[0]"])
def test_numpy_scalars_are_numbers(value):
    if "1" not in sandbox.run("try: import numpy; print(1)\nexcept ImportError: pass", timeout=60).stdout:
        pytest.skip("numpy is not installed")
    tests = [{"fn_name": "f", "args": [], "expected": 5}]
    assert sandbox.run_tests(f"import numpy as np\ndef f(): return np.{value}", tests, timeout=60)


@pytest.mark.parametrize("expected, got, same", [
    ("1 2", "1 2", True), ("1 2\n", "1.0   2.00", True), ("a", "b", False), ("1\n2", "1", False), ("1", "1\n1", False),
    ("0.3", "0.30000000000000004", False), ("nan", "nan", True), ("nan", "NaN", False), ("1", "sNaN", False),
    ("1", "1e999999999999999999999", False), ("1e400", "1E+400", True), ("", "\n \n", True), ("1 x", "1.0 x", False),
    ("1", "1" * 200000, False), ("Yes", "yes", False), ("1 2", "12", False), ("a\n\nb", "a\nb", False),
], ids=itertools.count())
def test_outputs_compare_as_in_livecodebench(expected, got, same):
    assert (sandbox.difference(expected, got) == "") is same


@pytest.mark.parametrize("code, status", [
    ("1/0", "error"), ("print(1", "error"), ("exit(3)", "error"), ("exit('no')", "error"), ("x = [0] * 10**10", "memory"),
    ("raise MemoryError", "memory"), ("x = []\nwhile True: x.append(bytes(1 << 20))", "memory"), ("\0", "refused"),
    ("x = '\ud800'", "refused"), ("pass", "ok"), ("", "ok"), ("import os; os.kill(os.getpid(), 11)", "error"),
    ("exit(256)", "ok"), ("exit(None)", "ok"), ("raise KeyboardInterrupt", "error"), ("def f(): f()\nf()", "error"),
    ("import sys\nsys.stdout.close()", "ok"), ("import sys\nsys.exit(0.0)", "error"), ("(" * 5000, None), ("x = " + "-" * 90000 + "1", None),
], ids=itertools.count())
def test_status(code, status):
    result = sandbox.run(code, timeout=20, memory_mb=256)
    assert result.status == (status or result.status) and result.status != "timeout", result
    assert result.exit_code is None or isinstance(result.exit_code, int)
    assert (result.exit_code == 0) == (result.status == "ok")


def test_results_end_with_the_first_failure():
    tests = [{"input": str(i), "output": "0" if i < 2 else "x"} for i in range(9)]
    verdict = sandbox.run_tests("print(0)", tests)
    assert not verdict and verdict.failed_test == 2 and len(verdict.results) == 3 and "line 1" in verdict.reason
    with pytest.raises(ValueError):
        sandbox.run_tests("print(0)", [])


def test_random_differs_and_the_folder_is_empty():
    assert len({sandbox.run("import random; print(random.random())").stdout for _ in range(3)}) == 3
    sandbox.run("import os\nos.makedirs('/'.join('d' * 900))\nos.chmod('d', 0)\nopen('f', 'w').write('x')")
    assert sandbox.run("import os; print(os.listdir())").stdout == "[]\n"


def test_traceback_shows_the_program_only():
    said = sandbox.run("def f(): 1/0\nf()").stderr
    assert said.startswith('Traceback (most recent call last):\n  File "<solution>", line 2') and said.count("  File ") == 2


# -------------------------------------------------------------------------------------------------------- how it is used

PRINTS_7 = [{"input": "", "output": "7"}] * 2
GOOD, BAD = [("print(int(input()) + 1)", [{"input": "1", "output": answer}]) for answer in "23"]


def test_labels_come_in_order_and_a_pool_can_be_used_again():
    pool = sandbox.Pool(2)
    for _ in range(2):
        with pool:
            assert pool.label([]) == [] and pool.label(iter([GOOD, BAD] * 20)) == [True, False] * 20
            verdicts = {verdict.job: verdict for verdict in pool.run_tests([BAD, GOOD])}
            assert not verdicts[0] and verdicts[1]
            next(iter(pool.run_tests([GOOD] * 50)))  # abandoned after the first verdict
            assert pool.label([GOOD]) == [True]
    assert sandbox.Pool(0).workers >= 1


@pytest.mark.skipif(not LINUX, reason="a process of macOS cannot be bound to cores")
def test_there_are_no_more_workers_than_this_process_may_use_cores(monkeypatch, tmp_path):
    """A machine says how many cores it has. With more workers than usable ones right programs exceed the time limit."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert sandbox.Pool(0).workers == 1
    finally:
        os.sched_setaffinity(0, before)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(sandbox_worker, "Path", lambda _, name: tmp_path / name)
    assert sandbox.usable_cores() == 64
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for file in (tmp_path / "cpu" / "cpu.cfs_quota_us", tmp_path / "cpu.max"):
        for quota, cores in (("-1" if "cfs" in file.name else "max", 64), ("350000", 3), ("50000", 1)):
            file.write_text(quota + (" 100000\n" if file.name == "cpu.max" else "\n"))
            assert sandbox.usable_cores() == cores
        file.unlink()


def test_from_threads_and_after_a_fork():
    labels = []
    threads = [threading.Thread(target=lambda: labels.append(bool(sandbox.run_tests(*GOOD)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert labels == [True] * 6
    child = os.fork()
    if child == 0:
        os._exit(0 if sandbox.run_tests(*GOOD) and not sandbox.run_tests(*BAD) else 1)
    assert os.waitpid(child, 0)[1] == 0 and sandbox.run_tests(*GOOD)


def script(code):
    """Start a caller in another process. Switch Ctrl-C on, because background jobs start with it switched off."""
    env = {**os.environ, "PYTHONPATH": os.path.dirname(HERE)}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, env=env,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_with_child_signals_ignored_and_blocked():
    caller = script("""
        import sandbox, signal
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        with sandbox.Pool(2) as pool:
            print(pool.label([("import subprocess; print(subprocess.run(['true']).returncode)",
                               [{"input": "", "output": "0"}])] * 3))
    """)
    assert "[True, True, True]" in caller.communicate(timeout=60)[0] and caller.returncode == 0


@pytest.mark.skipif(not LINUX, reason="finds processes by /proc")
@pytest.mark.parametrize("death", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_caller_that_dies_leaves_nothing(death):
    tag = f"dust-{os.getpid()}-{random.randrange(1 << 28)}"
    caller = script(f"""
        import sandbox
        code = "import os\\nif os.fork(): os.setsid() if 0 else None\\nos.execv('/bin/sleep', ['{tag}', '60'])"
        test = [{{"input": "", "output": ""}}]
        with sandbox.Pool(2, timeout=50) as pool:
            print("ready", flush=True)
            pool.label([(code, test)] * 9)
    """)
    caller.stdout.readline()
    wait_until(lambda: len(processes_named(tag)) >= 4)
    caller.send_signal(death)
    caller.wait(20)
    caller.stdout.close()
    wait_until(lambda: not processes_named(tag))


@pytest.mark.skipif(not LINUX, reason="finds processes by /proc")
def test_a_caller_that_dies_leaves_nothing_though_its_fork_lives_on():
    """A fork of the caller once inherited the workers' sockets. So the workers waited for a caller that was dead."""
    tag = f"dust-{os.getpid()}-{random.randrange(1 << 28)}"
    caller = script(f"""
        import os, sandbox, threading, time
        code = "import os\\nos.execv('/bin/sleep', ['{tag}', '60'])"
        run = lambda: sandbox.run(code, timeout=50)
        threading.Thread(target=run, daemon=True).start()
        time.sleep(2)
        child = os.fork()
        if child:
            print(child, flush=True)
        time.sleep(60)
    """)
    child = int(caller.stdout.readline())
    try:
        wait_until(lambda: processes_named(tag))
        caller.kill()
        wait_until(lambda: not processes_named(tag))
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        caller.communicate()


@pytest.mark.skipif(not LINUX, reason="user namespaces")
def test_several_workers_find_out_at_the_same_time_that_there_are_no_namespaces():
    """Once only the first worker tried again, and the others ended the run. A map of users may have several lines."""
    caller = script("""
        import time, sandbox
        from plumbing import sandbox_child, sandbox_worker
        try: sandbox_child.libc("unshare", sandbox_child.USERS)
        except OSError: print("no user namespaces here", flush=True)
        else: print("ready", flush=True)
        while not open("/proc/self/gid_map").read(): time.sleep(.01)
        for kind in "user", "mnt": open(f"/proc/sys/user/max_{kind}_namespaces", "w").write("0")
        with sandbox.Pool(4) as pool: print(pool.label([("print(7)", [{"input": "", "output": "7"}])] * 8))
        print(sandbox_worker.Worker.mode, flush=True)
    """)
    if caller.stdout.readline() != "ready\n":
        caller.kill()
        pytest.skip("this system allows no user namespaces")
    mine = os.getuid()
    for file, text in (("setgroups", "allow" if mine == 0 else "deny"),
                       ("uid_map", "0 0 1000\n1000 1000 60000" if mine == 0 else f"0 {mine} 1"),
                       ("gid_map", "0 0 1000\n1000 1000 60000" if mine == 0 else f"0 {os.getgid()} 1")):
        with open(f"/proc/{caller.pid}/{file}", "w") as f:
            f.write(text)
    out, _ = caller.communicate(timeout=60)
    assert out == f"{[True] * 8}\nplain\n", out


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not LINUX or os.getuid() != 0, reason="only root can become an ordinary user")
@pytest.mark.parametrize("rule, user", [("", 65534), ("no namespaces", 65534), ("no namespaces", 0)])
def test_promises_hold_for_an_ordinary_user_and_without_namespaces(rule, user, tmp_path):
    """Most users are not root, and many containers allow no namespaces. The labels must be the same there."""
    python = next((p for p in (sys.executable, "/usr/bin/python3") if not os.path.realpath(p).startswith("/root")
                   or user == 0), None)
    if not python or not os.path.exists(python):
        pytest.skip("no Python that an ordinary user can read")
    folder = f"/tmp/dust-{os.getpid()}-copy"
    os.makedirs(folder)
    shutil.copy(sandbox.__file__, folder)
    shutil.copytree(os.path.dirname(sandbox_child.__file__), folder + "/plumbing", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
        import json, os, sys
        sys.path.insert(0, {folder!r})
        sys.dont_write_bytecode = True
        os.setgroups([]), os.setresgid({user}, {user}, {user}), os.setresuid({user}, {user}, {user})
        import sandbox
        from plumbing.sandbox_worker import Worker
        Worker.mode = {"plain" if rule else "isolated"!r}
        t = [{{"fn_name": "f", "args": [1], "expected": 2}}]
        codes = ["def f(x): return x + 1", "import os\\nos._exit(0)", "def f(x): return 1",
                 "import os, time\\nwhile 1:\\n try: os.fork()\\n except OSError: time.sleep(9)",
                 "import os, signal\\nos.setsid() if os.fork() == 0 else 0\\nos.kill(os.getpid(), 9)",
                 "x = bytearray(1 << 30)\\ndef f(x): return 2",
                 "import os, resource as r\\nfor k in (r.RLIMIT_NOFILE, r.RLIMIT_AS, r.RLIMIT_NPROC):\\n"
                 " try: r.prlimit(os.getppid(), k, (9, 9))\\n except OSError: pass", "def f(x): return 2"]
        a = [{{"asserts": "assert f(1) == 2", "entry_point": "f"}}]
        with sandbox.Pool(1, timeout=2, memory_mb=256) as pool:
            print(json.dumps([pool.label([(c, t) for c in codes] + [(c, a) for c in codes[:3]]),
                              sandbox.run("import os\\nos.makedirs('/'.join('d' * 400)); os.chmod('d', 0)").status,
                              sandbox.run("import os; print(os.listdir())").stdout]))
    """
    done = subprocess.run([python, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=90, cwd="/")
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    labels = [True, False, False, False, False, False, False, True, True, False, False]
    assert json.loads(done.stdout) == [labels, "ok", "[]\n"], done
    assert not [name for name in os.listdir("/tmp") if name.startswith("dust-box-")], "a folder was left behind"


@pytest.mark.parametrize("abi, ways", [
    (1, "use UDP and TCP, and send signals to other processes"), (5, "use UDP, and send signals to other processes"),
    (6, "use UDP"),
])
def test_what_this_kernels_landlock_leaves_open_is_said(monkeypatch, abi, ways):
    monkeypatch.setattr(sandbox_child, "libc", lambda *_: abi)
    assert sandbox_child.landlock([], []) == (abi, ways)
