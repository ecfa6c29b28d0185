"""Programs that cheat, and the naive runners that they defeat. Used by test_sandbox.py.

Each attack succeeds against a naive runner below. Only therefore its failure in the sandbox proves something.
All attacks are limited: a bomb stops at a number, a flood at a size, an orphan after seconds.
"""
import json
import subprocess
import sys
import time


def naive_run(code: str, stdin: str = "", timeout: float = 5.0, cwd: str | None = None):
    """Run a program in the simplest way. Return its stdout, its stderr and the seconds that it took."""
    start = time.monotonic()
    try:
        done = subprocess.run([sys.executable, "-c", code], input=stdin.encode(), capture_output=True,
                              timeout=timeout, cwd=cwd)
        out, err = done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        out, err = b"", b""
    return out.decode("utf-8", "replace"), err.decode("utf-8", "replace"), time.monotonic() - start


def one_process_verdict(code: str, tests: list, cwd: str) -> bool:
    """Return whether all tests pass in one process that gives each test a new namespace and new streams."""
    script = ("import contextlib, io, json, sys\ncode, inputs = json.load(sys.stdin)\nout = []\nfor text in inputs:\n"
              " sys.stdin = io.StringIO(text)\n with contextlib.redirect_stdout(io.StringIO()) as o:\n"
              "  exec(code, {'__name__': '__main__'})\n out.append(o.getvalue().strip())\nprint(json.dumps(out))")
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps([code, [t["input"] for t in tests]]),
                          text=True, capture_output=True, cwd=cwd, timeout=20)
    last = (done.stdout.splitlines() or ["[]"])[-1]  # code that runs late may print before this line
    return json.loads(last) == [test["output"] for test in tests]


def naive_verdict(code: str, tests: list, cwd: str) -> bool:
    """Return whether all tests pass. A function is tested by an assert and its exit code, a program by its stdout."""
    for test in tests:
        if "fn_name" in test:
            path = cwd + "/solution.py"
            with open(path, "w") as f:
                f.write(f"{code}\nassert {test['fn_name']}(*{test['args']!r}) == {test['expected']!r}\n")
            if subprocess.run([sys.executable, path], cwd=cwd, timeout=20, capture_output=True).returncode:
                return False
        elif naive_run(code, test["input"], 20, cwd)[0].strip() != test["output"].strip():
            return False
    return True


CALL = [{"fn_name": "f", "args": [3], "expected": 1234567}]
NONE = [{"fn_name": "f", "args": [3], "expected": None}]
PRINT = [{"input": "", "output": "7"}]
TWICE = [{"input": "", "output": "1"}, {"input": "", "output": "2"}]

# Wrong programs that look right: name -> (code, tests). The naive runner passes each of them.
FORGERIES = {
    "exit_0_at_import": ("import sys\nsys.exit(0)", CALL),
    "os_exit_0_at_import": ("import os\nos._exit(0)", CALL),
    "exit_0_inside_the_call": ("def f(x): raise SystemExit(0)", CALL),
    "builtin_exit_inside_the_call": ("def f(x): exit()", CALL),
    "os_exit_0_inside_the_call": ("import os\ndef f(x): os._exit(0)", CALL),
    "exit_counts_as_returned_none": ("import os\ndef f(x): os._exit(0)", NONE),
    "system_exit_counts_as_returned_none": ("def f(x): raise SystemExit", NONE),
    "object_that_equals_everything": ("class A:\n def __eq__(s, o): return True\ndef f(x): return A()", CALL),
    "int_that_equals_everything": ("class A(int):\n def __eq__(s, o): return True\ndef f(x): return A(1)", CALL),
    "float_that_equals_everything": ("class A(float):\n def __eq__(s, o): return True\ndef f(x): return A(1)", CALL),
    "str_that_equals_everything": ("class A(str):\n def __eq__(s, o): return True\ndef f(x): return A('1')", CALL),
    "list_that_equals_everything": ("class A(list):\n def __eq__(s, o): return True\ndef f(x): return A()", CALL),
    "dict_that_equals_everything": ("class A(dict):\n def __eq__(s, o): return True\ndef f(x): return A()", CALL),
    "tuple_that_equals_everything": ("class A(tuple):\n def __eq__(s, o): return True\ndef f(x): return A()", CALL),
    "metaclass_that_equals_everything": (
        "class M(type):\n def __eq__(s, o): return True\n __hash__ = None\nclass A(metaclass=M): pass\n"
        "def f(x): return A", CALL),
    "atexit_hides_a_wrong_answer": ("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0", CALL),
    "excepthook_hides_a_wrong_answer": (
        "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): return 0 if x == 3 else 1\nf('')", CALL),
    "thread_exits_0_first": (
        "import os, threading, time\ndef f(x):\n threading.Thread(target=os._exit, args=(0,)).start()\n time.sleep(9)",
        CALL),
    "signal_handler_exits_0": (
        "import os, signal\nsignal.signal(15, lambda *a: os._exit(0))\ndef f(x): os.kill(os.getpid(), 15)", CALL),
    "alarm_exits_0": (
        "import os, signal, time\nsignal.signal(14, lambda *a: os._exit(0))\nsignal.setitimer(0, .1)\n"
        "def f(x): time.sleep(9)", CALL),
    "becomes_true_by_exec": ("import os\nfor p in '/bin/true', '/usr/bin/true':\n"
                             " if os.path.exists(p): os.execv(p, ['true'])\n", CALL),
    "python_without_asserts": (
        "import os, sys\nif __debug__: os.execv(sys.executable, [sys.executable, '-O', __file__])\n"
        "def f(x): return 0", CALL),
    "parent_exits_0_child_goes_on": ("import os\nif os.fork(): os._exit(0)\ndef f(x): return 0", CALL),
    "writes_to_every_descriptor": (
        "import os\ndef f(x):\n for fd in range(3, 64):\n"
        "  for text in b'null', b'1234567', b'{\"passed\": true}', b'\\x01':\n"
        "   try: os.write(fd, text)\n   except OSError: pass\n os._exit(0)", CALL),
    "none_written_to_every_descriptor": (
        "import os\ndef f(x):\n for fd in range(3, 64):\n  try: os.write(fd, b'null')\n  except OSError: pass\n"
        " os._exit(0)", NONE),
    "reads_the_answer_in_its_source": (
        "import re\ndef f(x): return int(re.findall(r'== (\\d+)$', open(__file__).read(), re.M)[-1])", CALL),
    "reads_the_answer_in_its_constants": (
        "import sys\ndef f(x):\n frame = sys._getframe()\n while frame:\n"
        "  for c in frame.f_code.co_consts:\n   if isinstance(c, int) and c > 9999: return c\n"
        "  frame = frame.f_back", CALL),
    "prints_a_marker_and_exits": ("import os\nprint('OK\\nPASSED\\n{\"passed\": true}', flush=True)\nos._exit(0)", CALL),
    "right_then_exception": ("print(7)\nraise ValueError", PRINT),
    "right_then_exit_1": ("print(7)\nexit(1)", PRINT),
    "right_then_killed": ("import os\nprint(7, flush=True)\nos.kill(os.getpid(), 9)", PRINT),
    "right_then_abort": ("import os\nprint(7, flush=True)\nos.abort()", PRINT),
    "right_then_segfault": ("import ctypes\nprint(7, flush=True)\nctypes.string_at(0)", PRINT),
    "right_then_memory_error": ("print(7)\nraise MemoryError", PRINT),
    "right_then_atexit_exits_3": ("import atexit, os, sys\nprint(7, flush=True)\natexit.register(os._exit, 3)", PRINT),
    "right_in_a_child_parent_fails": (
        "import os\npid = os.fork()\nif pid:\n os.waitpid(pid, 0)\n os._exit(5)\nprint(7)", PRINT),
}

COUNT = "import os\np = {!r}\nn = os.path.exists(p)\nopen(p, 'w').close()\nprint(1 + n)"
SYSV = "import ctypes\nc = ctypes.CDLL(None)\n"
# Programs that remember an earlier test: they print 1 and then 2. {tag} is unique, {folder} belongs to the caller.
MEMORIES = {
    "by_a_file_in_the_folder": COUNT.format("state"),
    "by_a_file_in_tmp": COUNT.format("/tmp/{tag}"),
    "by_a_file_in_var_tmp": COUNT.format("/var/tmp/{tag}"),
    "by_a_file_in_shm": COUNT.format("/dev/shm/{tag}"),
    "by_a_file_of_the_callers": COUNT.format("{folder}/state"),
    "by_a_deep_folder": "import os\nn = os.path.exists('d/d/d')\nos.makedirs('d/d/d', exist_ok=True)\nprint(1 + n)",
    "by_a_symbolic_link": "import os\nn = os.path.islink('l')\nn or os.symlink('/x', 'l')\nprint(1 + n)",
    "by_system_v_memory": SYSV + "n = c.shmget({number}, 9, 0o600)\nc.shmget({number}, 9, 0o1600)\nprint(1 + (n >= 0))",
    "by_a_system_v_queue": SYSV + "n = c.msgget({number}, 0o600)\nc.msgget({number}, 0o1600)\nprint(1 + (n >= 0))",
    "by_a_system_v_semaphore": SYSV + "n = c.semget({number}, 1, 0o600)\nc.semget({number}, 1, 0o1600)\n"
    "print(1 + (n >= 0))",
    "by_a_process_that_stays": (
        "import os, socket, time\ns = socket.socket(socket.AF_UNIX)\ntry:\n s.bind('\\0{tag}')\n"
        "except OSError: print(2)\nelse:\n print(1, flush=True)\n if os.fork() == 0:\n  os.setsid()\n  os.close(1)\n"
        "  os.close(2)\n  time.sleep(3)\n  os._exit(0)\n"),
}

# Programs that remember an earlier test in the memory of their process, for runners with one process for all tests.
KEEP = "\nd['n'] = d.get('n', 0) + 1\nprint(d['n'])"
TRACES = {
    "in_a_module": "import math\ntry: math.n += 1\nexcept AttributeError: math.n = 1\nprint(math.n)",
    "in_a_class_of_a_module": (
        "from collections import Counter\ntry: n = Counter.n + 1\nexcept AttributeError: n = 1\n"
        "for Counter.n in [n]: print(n)"),
    "in_the_builtins": "import builtins\nd = vars(builtins)" + KEEP,
    "in_its_own_builtins": "d = __builtins__ if type(__builtins__) is dict else __builtins__.__dict__" + KEEP,
    "in_the_builtins_of_a_function": "def f(): pass\nd = f.__builtins__" + KEEP,
    "in_the_builtins_by_a_pattern": "def f(): pass\nmatch f:\n case object(__builtins__=d): pass" + KEEP,
    "in_the_builtins_by_a_frame": "g = (x for x in [1])\nd = g.gi_frame.f_builtins" + KEEP,
    "in_the_builtins_by_name": "def f(): pass\nd = getattr(f, '__built' + 'ins__')" + KEEP,
    "in_the_builtins_by_a_getter": (
        "from operator import attrgetter\ndef f(): pass\nd = attrgetter('__builtins__')(f)" + KEEP),
    "in_the_builtins_by_a_getter_that_nobody_imports": (
        "try: attrgetter\nexcept NameError: from operator import attrgetter\ndef f(): pass\n"
        "d = attrgetter('__builtins__')(f)" + KEEP),
    "in_a_module_by_a_formatter": (
        "import string\nd = string.Formatter().get_field('0.__globals__', [string.capwords], {})[0]" + KEEP),
    "in_code_made_late": "exec('import builtins')\nd = eval('vars(builtins)')" + KEEP,
    "in_wide_letters": "\uff45xec('import builtins')\nd = \uff45val('vars(builtins)')" + KEEP,
    "in_the_list_of_modules": "import sys\nd = sys.modules" + KEEP,
    "in_the_list_of_modules_by_the_way": "import typing\nd = typing.sys.modules" + KEEP,
    "in_a_dict_of_a_module": "from linecache import cache as d" + KEEP,
    "in_the_arguments": "import sys\nsys.argv.append(1)\nprint(len(sys.argv) - 1)",
    "in_the_recursion_limit": "import sys\nprint(1 + (sys.getrecursionlimit() == 777))\nsys.setrecursionlimit(777)",
    "in_the_random_state": (
        "import random\nprint(1 + (random.getstate()[1][:3] == (1, 2, 3)))\n"
        "random.setstate((3, (1, 2, 3) + (0,) * 621 + (624,), None))"),
    "in_the_decimal_context": (
        "import decimal\nprint(1 + (decimal.getcontext().prec == 7))\ndecimal.getcontext().prec = 7"),
    "in_the_environment": "import os\nd = os.environ\nd['n'] = str(int(d.get('n', 0)) + 1)\nprint(d['n'])",
    "in_the_names_of_a_frame": (
        "S = []\nA = type('A', (), {'__enter__': lambda s: s, '__exit__': lambda s, t, v, b: S.append(b) or True})\n"
        "with A(): 1 / 0\nd = S[0].tb_frame.f_builtins" + KEEP),
    "in_the_names_of_a_frame_by_a_pattern": (
        "class A:\n match lambda s: s:\n  case __enter__: pass\n match lambda s, t, v, b: s.got.append(b) or True:\n"
        "  case __exit__: pass\n got = []\nwith A(): 1 / 0\nd = A.got[0].tb_frame.f_builtins" + KEEP),
    "in_a_module_by_a_copy": (
        "import copy, math\nn = hasattr(math, 'n')\nA = type('A', (), {'__reduce_ex__': lambda s, v: "
        "(lambda: math, (), (None, {'n': 1}))})\ncopy.copy(A())\nprint(1 + n)"),
    "in_a_register_of_classes": (
        "from typing import Iterable\nn = isinstance(1, Iterable)\nIterable.register(int)\nprint(1 + n)"),
    "in_a_file_without_open": (
        "import sys\nimport io\nF = io.FileIO\ntry: F('state')\nexcept OSError: n = 0\nelse: n = 1\nF('state', 'w')\n"
        "print(1 + n)"),
    "in_the_builtins_by_their_owner": "d = print.__self__.__dict__" + KEEP,
}

# Programs that print ESCAPED if the attack succeeds. True: only namespaces (or Landlock) can stop the attack.
ESCAPES = {
    "secret_in_the_environment": ("import os\nif 'DUST_SECRET' in os.environ: print('ESCAPED')", False),
    "secret_in_a_file": ("if open('{folder}/secret').read(): print('ESCAPED')", True),
    "list_of_the_callers_folder": ("import os\nif 'secret' in os.listdir('{folder}'): print('ESCAPED')", True),
    "the_callers_home": (
        "import os, sys\nfor n in os.listdir({home!r}):\n"
        " if not sys.base_prefix.startswith({home!r} + '/' + n): print('ESCAPED')", True),
    "the_callers_etc_passwd": ("if open('/etc/passwd').read(): print('ESCAPED')", True),
    "the_callers_environment_in_proc": ("if open('/proc/{caller}/environ').read(): print('ESCAPED')", True),
    "the_callers_command_line": ("if open('/proc/{caller}/cmdline').read(): print('ESCAPED')", True),
    "the_callers_process": ("import os\nos.kill({caller}, 0)\nprint('ESCAPED')", True),
    "the_callers_files_by_proc": ("import os\nos.listdir('/proc/{caller}/cwd/')\nprint('ESCAPED')", True),
    "the_callers_priority": ("import os\nos.getpriority(os.PRIO_PROCESS, {caller})\nprint('ESCAPED')", True),
    "a_file_deleted": ("import os\nos.remove('{folder}/victim')\nprint('ESCAPED')", True),
    "a_file_overwritten": ("open('{folder}/victim', 'w').write('x')\nprint('ESCAPED')", True),
    "a_file_made": ("open('{folder}/new', 'w').write('x')\nprint('ESCAPED')", True),
    "a_tcp_connection": (
        "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nprint('ESCAPED')", True),
    "an_abstract_socket": (
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{tag}')\nprint('ESCAPED')", True),
    "a_socket_with_a_path": (
        "import socket\nsocket.socket(socket.AF_UNIX).connect('/tmp/dust-{caller}-named')\nprint('ESCAPED')", True),
    "what_files_there_are": ("import os\nos.stat('{folder}/secret')\nprint('ESCAPED')", True),
    "150_processes_by_another_user": (
        "import os, time\ntry: os.setresuid(0, 0, 0)\nexcept OSError: pass\nfor i in range(150):\n if os.fork() == 0:\n"
        "  time.sleep(1)\n  os._exit(0)\nprint('ESCAPED')", False),
    "memory_behind_a_thread_that_is_gone": (
        "import ctypes, os, threading, time\ndef f():\n x = b'x' * (60 << 20)\n time.sleep(1.3)\n os._exit(0)\n"
        "for i in range(4):\n if os.fork() == 0:\n  threading.Thread(target=f).start()\n"
        "  ctypes.CDLL(None).syscall({exit}, 0)\ntime.sleep(1.2)\nprint('ESCAPED')", False),
    "a_datagram": (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ns.sendto(b'x', ('127.0.0.1', {port}))\n"
        "print('ESCAPED')", True),
    "a_server_of_its_own": (
        "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\n"
        "socket.create_connection(s.getsockname(), 2)\nprint('ESCAPED')", True),
    "a_new_user_namespace": ("import ctypes\nif ctypes.CDLL(None).unshare(1 << 28) == 0: print('ESCAPED')", True),
    "memory_of_one_process": ("x = b'x' * (300 << 20)\nprint('ESCAPED')", False),
    "address_space_without_end": ("import mmap\nx = mmap.mmap(-1, 8 << 30)\nprint('ESCAPED')", False),
    "memory_of_many_processes": (
        "import os, time\nfor i in range(4):\n if os.fork() == 0:\n  x = b'x' * (60 << 20)\n  time.sleep(1.5)\n"
        "  os._exit(0)\nfor i in range(4): os.wait()\nprint('ESCAPED')", False),
    "memory_in_nameless_files": (
        "import os, time\nfor i in range(20):\n os.write(os.memfd_create('x'), b'x' * (12 << 20))\n"
        "time.sleep(1)\nprint('ESCAPED')", False),
    "150_processes": (
        "import os, time\nfor i in range(150):\n if os.fork() == 0:\n  time.sleep(1)\n  os._exit(0)\n"
        "print('ESCAPED')", False),
    "150_threads": (
        "import threading, time\nthreading.stack_size(65536)\nfor i in range(150):\n"
        " threading.Thread(target=time.sleep, args=(1,)).start()\nprint('ESCAPED')", False),
    "600_open_files": (
        "import os\nfor i in range(600): os.dup(1)\nprint('ESCAPED')", False),
    "a_file_of_40_MB": ("open('x', 'wb').write(bytes(40 << 20))\nprint('ESCAPED')", False),
    "a_sparse_file": ("import os\nos.truncate(os.open('x', os.O_RDWR | os.O_CREAT), 1 << 40)\nprint('ESCAPED')", False),
    "100_MB_in_small_files": ("for i in range(10): open(str(i), 'wb').write(bytes(10 << 20))\nprint('ESCAPED')", True),
    "5000_files": ("for i in range(5000): open(str(i), 'w').close()\nprint('ESCAPED')", True),
    "limits_taken_off": (
        "import resource as r\nfor k in r.RLIMIT_FSIZE, r.RLIMIT_CPU:\n"
        " r.setrlimit(k, (r.RLIM_INFINITY, r.RLIM_INFINITY))\nprint('ESCAPED')", False),
    "20_MB_of_output": ("import sys\nfor i in range(20): sys.stderr.write('x' * (1 << 20))\nprint('ESCAPED')", False),
}

# Programs that leave a process behind. They end only after this process has taken its name, {tag}.
SLEEP = "os.execv('/bin/sleep', ['{tag}', '20'])\nimport time\ntime.sleep(.4)\n"
NULL = "for fd in 0, 1, 2: os.dup2(os.open('/dev/null', os.O_RDWR), fd)\n"
ORPHANS = {
    "a_child": "import os\nif os.fork() == 0:\n " + NULL + " " + SLEEP,
    "a_daemon": "import os\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0:\n  " + NULL + "  " + SLEEP,
    "one_that_ignores_signals": "import os, signal\nif os.fork() == 0:\n os.setsid()\n"
    " for s in 1, 2, 3, 15: signal.signal(s, signal.SIG_IGN)\n " + NULL + " " + SLEEP,
    "a_stopped_one": "import os, signal\np = os.fork()\nif p == 0:\n os.setsid()\n " + NULL + " " + SLEEP
    + "os.kill(p, signal.SIGSTOP)",
    "a_background_job": "import subprocess\nsubprocess.Popen(['{tag}', '20'], executable='/bin/sleep', "
    "stdout=-3, stderr=-3, start_new_session=True)\nimport time\ntime.sleep(.4)",
    "one_of_a_crashed_program": "import os\nif os.fork() == 0:\n os.setsid()\n " + NULL + " " + SLEEP + "os.abort()",
}
