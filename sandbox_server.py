"""The other half of sandbox.py: a fork server, and the room in which it lets one candidate after another run.

It is a program of its own: sandbox.py starts it in a small clean interpreter, without the caller's modules, memory and
secrets, and each run is a fork of it. It never learns an expected value, so nothing that happens here can decide a
verdict. From top to bottom: the room (namespaces, Landlock, limits), the life of a child, the server's loop.

A request is a timeout, a memory limit and five memory files: the program, its stdin, stdout and stderr, and a ledger
that brings the tests' inputs and takes back, a line each, what was returned or printed.
"""
import ast
import atexit
import ctypes
import gc
import io
import json
import marshal
import os
import resource
import select
import signal
import site
import socket
import struct
import sys
import time
import types
from typing import Any

LINUX = sys.platform == "linux"
OUTPUT_CAP = 16 << 20  # bytes of stdout, of stderr, of the ledger and of any one file
PROCESSES = 64  # processes and threads in one run
RECURSION = 50_100  # LiveCodeBench's 50,000, all of them for the program itself
ONE_AFTER_ANOTHER = 1.0  # seconds that the later tests of a plain program may take in the process of the first
REQUEST = struct.Struct("<d Q")  # timeout, memory in bytes
REPLY = struct.Struct("<c i d 200s")  # x exit, t timeout, m memory, ! failure; exit code; seconds; what failed


def encode(value: Any) -> Any:
    """A value as a JSON tree: tuples are lists, numpy scalars numbers; dicts and long ints keep their meaning."""
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": sorted(([encode(key), encode(item)] for key, item in value.items()), key=json.dumps)}
    if isinstance(value, int) and value.bit_length() > 1000:
        return {"int": hex(value)}  # as a decimal it takes quadratic time, and Python refuses
    if value is None or isinstance(value, (int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} is not a plain value")


# ----------------------------------------------------------------------------------------------------- the room

READ_ONLY, NOSUID, NODEV, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 4096, 1 << 14, 1 << 18  # mount(2)
MOUNTS, IPC, USERS, PIDS, NETWORK = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30  # unshare(2)
READABLE = "/usr /lib /lib64 /bin /etc/ld.so.cache /etc/localtime /etc/alternatives /dev/random /dev/urandom"
LIBC = ctypes.CDLL(None, use_errno=True)


def libc(function: str, *arguments: Any) -> int:
    result = getattr(LIBC, function)(*(a.encode() if isinstance(a, str) else a for a in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(source: "str | None", target: str, kind: "str | None", flags: int, options: "str | None" = None) -> None:
    libc("mount", source, target, kind, ctypes.c_ulong(flags), options)


def write(path: str, text: str) -> None:
    with open(path, "w") as f:
        f.write(text)


def leave_namespaces() -> None:
    """Leave the caller's mounts, processes, network and System V objects. The next fork is pid 1 of its own world."""
    uid, gid = os.getuid(), os.getgid()
    try:
        libc("unshare", MOUNTS | IPC | PIDS | NETWORK)
    except OSError:  # not root, or root of a container: a user namespace gives us the powers that this takes
        libc("unshare", MOUNTS | IPC | PIDS | NETWORK | USERS)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {uid} 1")
        write("/proc/self/gid_map", f"0 {gid} 1")


def isolate(box: str, box_options: str) -> None:
    """Make every file read-only, show no processes but ours, and lay an empty folder over the box."""
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("proc", "/proc", "proc", NOSUID | NODEV)
    for name, value in (("shmmni", "0"), ("msgmni", "0"), ("sem", "1 0 1 0")):
        write(f"/proc/sys/kernel/{name}", value)  # no System V objects: they outlive the processes that make them
    mount("/", "/proc", None, BIND | RECURSIVE)
    os.chdir("/proc")
    os.chroot(".")  # to the same files; but in a chroot nobody gets a user namespace, and with it new powers
    attributes = struct.pack("4Q", READ_ONLY | NOSUID, 0, 0, 0)
    libc("syscall", 442, -100, "/", 1 << 15, attributes, ctypes.c_size_t(len(attributes)))  # mount_setattr, all below /
    mount("tmpfs", box, "tmpfs", NOSUID | NODEV, box_options)


def lock(room: types.SimpleNamespace) -> None:
    """Make the room's Landlock rule set: its files only, no TCP, no signals to the outside."""
    abi = libc("syscall", 444, None, 0, 1)
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    rules = struct.pack("QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc("syscall", 444, rules, ctypes.c_size_t(len(rules)), 0)
    for path in filter(os.path.exists, [*room.readable, "/dev/null", "/dev/zero", room.box]):
        rights = 0b1101 if path in room.readable else files  # execute, read a file, read a folder
        inode = os.open(path, os.O_PATH)
        libc("syscall", 445, ruleset, 1, struct.pack("=Qi", rights if os.path.isdir(path) else rights & 7, inode), 0)
        os.close(inode)
    if room.ruleset:
        os.close(room.ruleset)
    room.ruleset = ruleset


def choose_user(room: types.SimpleNamespace) -> None:
    """Who candidates are (real and effective uid), and the process limit that holds for that user."""
    room.real = room.power = 0  # in a user namespace of our own: root of nothing; without one: whoever runs us
    with open("/proc/self/uid_map") as f:
        _, _, size = f.read().split()
    if size == "1":
        return
    if os.getuid():  # this limit counts all that the user runs
        mine = [pid for pid in os.listdir("/proc") if pid.isdigit() and os.stat(f"/proc/{pid}").st_uid == os.getuid()]
        room.limits["NPROC"] += sum(len(os.listdir(f"/proc/{pid}/task")) for pid in mine)
        return
    # a uid for this worker alone, as processes are counted by uid: no worker's bomb may starve another worker
    room.real = (1 << 30 if size == "4294967295" else 10_000) + int.from_bytes(os.urandom(2), "little") % 50_000
    os.seteuid(room.real)
    if os.access(os.__file__, os.R_OK, effective_ids=True):
        room.power = room.real  # else Python is root's alone: root to files, without capabilities; a stranger to limits
    os.seteuid(0)


def furnish(isolated: bool, box: str, paths: "list[str]", control: socket.socket) -> types.SimpleNamespace:
    """Build the room that a worker's candidates run in. room.missing says what this system does not give."""
    room = types.SimpleNamespace(isolated=isolated, box=box, ruleset=None, real=0, power=0, missing="",
                                 control=control.fileno())
    room.limits = {"FSIZE": OUTPUT_CAP, "NPROC": PROCESSES, "NOFILE": 256, "CORE": 0, "MSGQUEUE": 0,
                   "STACK": 120 << 20}  # Linux keeps 128 MB free below a stack
    room.no_capabilities = struct.pack("Ii", 0x20080522, 0)
    if LINUX:
        choose_user(room)
    room.box_options = f"size=64m,nr_inodes=4096,mode=700,uid={room.power},gid={room.power}"
    if isolated:
        isolate(box, room.box_options)
    else:
        os.mkdir(box, 0o700)
        os.chown(box, room.power or -1, room.power or -1)
        room.missing = "candidates can see other processes and the network. "
    room.readable = [*READABLE.split(), *paths, *(["/proc"] if isolated else [])]
    try:
        lock(room)
    except (OSError, AttributeError):
        room.missing += "no Landlock: candidates can read what you can read. "
    os.environ.update(HOME=box, TMPDIR=box)
    room.clean = os.stat(box).st_ctime_ns  # moves with whatever is made, removed or renamed in the folder
    return room


def enter(room: types.SimpleNamespace, streams: "list[int]", timeout: float, memory: int) -> None:
    """A child's way into the room, step by step."""
    os.setsid()
    os.chdir(room.box)
    for target, fd in enumerate(streams):
        os.dup2(fd, target)
    for name, limit in {**room.limits, "CPU": int(timeout) + 2, "AS": memory}.items():
        which = getattr(resource, "RLIMIT_" + name, None)
        if which is not None and (LINUX or name != "AS"):  # which macOS cannot set
            hard = resource.getrlimit(which)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(which, (limit, limit))
    if room.real:
        os.setgroups([])
        os.setresgid(room.power, room.power, room.power)
        os.setresuid(room.real, room.power, room.power)
    if LINUX and not room.power:
        libc("syscall", 126, room.no_capabilities, bytes(24))  # capset(2)
    if room.ruleset:
        libc("syscall", 446, room.ruleset, 0)
        os.close(room.ruleset)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # too much output ends the program
    for fd in (*streams, room.control):
        os.close(fd)


# ----------------------------------------------------------------------------------------------- a child's life

SAFE = {  # modules in which a program can leave no trace, and those of their names for which that holds
    "math": "*", "itertools": "*", "heapq": "*", "bisect": "*", "operator": "*", "string": "*",
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "copy": "copy deepcopy", "sys": "exit getrecursionlimit setrecursionlimit stderr stdin stdout",
    "typing": "Any Callable Deque Dict Generator Iterable Iterator List Optional Sequence Set Tuple Union",
}
BARRED = "exec eval compile open globals locals vars getattr setattr delattr breakpoint help " \
    "attrgetter methodcaller Formatter Template gi_frame gi_code cr_frame cr_code ag_frame ag_code"


def traces(module: str) -> "set[str]":
    """The names of a module by which a program could leave a trace: all but what is safe, or a constant."""
    safe, public = SAFE.get(module, ""), vars(__import__(module))
    constants = {name for name, value in public.items() if isinstance(value, (str, int, float, tuple))}
    return set() if safe == "*" else public.keys() - constants - {*safe.split(), *SAFE}


def is_plain(source: str, room: types.SimpleNamespace) -> bool:
    """Can this program leave nothing behind in its process, so that its next test may run there too?

    True when all it mentions are names of its own, harmless builtins and SAFE; when it sets no attribute, has no name
    with an underscore in front, no pattern that reads attributes and no generator that could clean up late. Cautious:
    False for many programs that would do no harm; they pay with a process for each test.
    """
    kinds, modules, free, names = set(), set(), set(), set()
    try:
        tree = ast.parse(source)
    except (RecursionError, MemoryError):  # deeper than a tree may be, though not than code may
        return False
    for node in ast.walk(tree):
        kind = type(node)
        kinds.add(kind)
        if kind is ast.Name:
            free.add(node.id)
        elif kind is ast.Attribute:
            names.add(node.attr)
            kinds.add("attribute read" if isinstance(node.ctx, ast.Load) else "attribute set")
        elif kind in (ast.FunctionDef, ast.ClassDef):
            names.add(node.name)
        elif kind in (ast.Import, ast.ImportFrom):
            listed = {alias.name for alias in node.names}
            modules.update(listed if kind is ast.Import else [node.module])
            names.update(listed if kind is ast.ImportFrom else ())
    if kinds & {"attribute set", ast.MatchClass, ast.AsyncFunctionDef, ast.Await}:
        return False
    if kinds & {ast.Yield, ast.YieldFrom} and kinds & {ast.Try, ast.With}:
        return False
    names |= free
    private = any(name[0] == "_" and name not in ("_", "__name__") for name in names)
    return not (private or modules - SAFE.keys() or names & room.barred or free & room.foreign)


def names_in(code: types.CodeType) -> "set[str]":
    """Every global or attribute that a code object, or one inside it, mentions."""
    return set(code.co_names).union(*(names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def load(program: int, room: types.SimpleNamespace, more: bool) -> "tuple[types.CodeType, bool]":
    """A program's code, and whether more of its tests may follow the first in the same process.

    If they may not, the code is left in the place of the source, so that no later run has to compile it.
    """
    data = os.pread(program, os.fstat(program).st_size, 0)
    if data[:1] == b"c":
        return marshal.loads(data[1:]), False
    source = data[1:].decode()
    code = compile(source, "<solution>", "exec", dont_inherit=True)
    plain = more and is_plain(source, room)
    if more and not plain:
        os.pwrite(program, b"c" + marshal.dumps(code), 0)
    return code, plain


def execute(code: types.CodeType, prelude: "dict[str, str]", call: "tuple | None") -> str:
    """Run a program as __main__; call its function, if one is asked for. Returns the JSON of what that returned."""
    main = sys.modules["__main__"]
    for name in names_in(code) & prelude.keys():
        module = __import__(prelude[name])
        setattr(main, name, module if name == prelude[name] else getattr(module, name))
    if call:
        main.__name__ = "solution"  # what stands under `if __name__ == "__main__"` is no part of a function's test
        sys.modules["solution"] = main
    try:
        exec(code, vars(main))
    except SystemExit as error:
        if call or error.code not in (None, 0):
            raise
    if not call:
        return ""
    name, arguments = call
    solution = getattr(main, "Solution", None)
    function = getattr(solution(), name) if hasattr(solution, name) else getattr(main, name)
    return json.dumps(encode(function(*arguments)), separators=(",", ":"))


def play(room: types.SimpleNamespace, files: "list[int]", timeout: float, memory: int) -> None:
    """A child's whole life. Nothing here is trusted once the candidate's code has begun, unless it is plain."""
    status, leave, write_fd = 1, os._exit, os.write
    try:
        program, *streams, ledger = files
        tests, keys = marshal.loads(os.pread(ledger, os.fstat(ledger).st_size, 0))
        os.ftruncate(ledger, 0)
        try:
            enter(room, streams, timeout, memory)
        except BaseException as error:
            write_fd(ledger, b"%s ! %s\n" % (keys[True], str(error).encode()))
            leave(1)
        try:
            play_tests(room, program, ledger, tests, keys, min(timeout, ONE_AFTER_ANOTHER))
            status = 0
        except SystemExit as error:
            status = error.code & 255 if isinstance(error.code, int) else 0 if error.code is None else 1
            if status and not isinstance(error.code, int):
                print(error.code, file=sys.stderr)
        except MemoryError as error:
            error.__traceback__ = None  # frees what the program holds, so that there is memory to go on with
            vars(sys.modules["__main__"]).clear()
            write_fd(2, b"MemoryError\n")
        except BaseException as error:
            trace = error.__traceback__
            while trace and trace.tb_frame.f_code.co_filename == __file__:
                trace = trace.tb_next
            sys.excepthook(type(error), error.with_traceback(trace), trace)
        finish()
    except BaseException:
        status = status or 120  # as Python's own when it cannot flush
    finally:
        leave(status)


def play_tests(room: types.SimpleNamespace, program: int, ledger: int, tests: list, keys: list,
               seconds: float) -> None:
    """Run the first test, and after it, if the program is plain, as many others as end well within some seconds.

    A plain program's lines in the ledger are signed with another key: they alone say that a test ended well, where
    else the exit status does. An attentive program could read the one key that it is left, and write with it what its
    function returns: it may as well return it.
    """
    code, plain = load(program, room, bool(tests[1:]))
    start, call = time.monotonic(), tests[0] if isinstance(tests[0], tuple) else None
    key = keys[plain]
    keys.clear()
    for fd in (program,) if plain or call else (program, ledger):
        os.close(fd)
    answer = execute(code, room.prelude, call)
    if plain:
        sys.stdout.flush()
    if plain or call:
        os.pwrite(ledger, b"%s %f %s\n" % (key, time.monotonic() - start, answer.encode()), 0)
    if plain:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends us; the rest will be run again, alone
        os.lseek(ledger, 0, os.SEEK_END)
        try:
            for test in tests[1:]:
                os.write(ledger, key + play_again(room, code, test))
        finally:
            os._exit(0)


def play_again(room: types.SimpleNamespace, code: types.CodeType, test: "bytes | tuple") -> bytes:
    """One more test of a plain program in the same process, as if it were a new one. Returns its line of the ledger."""
    start, call = time.monotonic(), test if isinstance(test, tuple) else None
    new_main()
    sys.setrecursionlimit(RECURSION)
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"" if call else test), "utf-8", "surrogateescape", newline="\n")
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace") for _ in range(2))
    answer, outputs = execute(code, room.prelude, call), []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        outputs.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    return b" %f %s\n" % (time.monotonic() - start, (answer or json.dumps(outputs)).encode())


def new_main() -> None:
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__, main.__file__ = sys.modules["builtins"], "solution.py"


def finish() -> None:
    """What Python does at its end: join threads, run atexit, close the files left open, flush."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    vars(sys.modules["__main__"]).clear()
    for stream in (sys.stderr, sys.stdout, sys.__stdout__):
        stream.flush()


# --------------------------------------------------------------------------------------------- the server's loop


def serve(control: socket.socket, room: types.SimpleNamespace) -> None:
    """Run what is asked for, one at a time, until the caller is gone or a candidate has changed our limits."""
    which = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    limits = [resource.getrlimit(each) for each in which]
    while [resource.getrlimit(each) for each in which] == limits:
        request, files, _, _ = socket.recv_fds(control, REQUEST.size, 5, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        if not request:
            return
        try:
            reply = one_run(control, room, files, *REQUEST.unpack(request))
        except OSError as error:
            reply = b"!", 0, 0.0, str(error).encode()
        for fd in files:
            os.close(fd)
        control.send(REPLY.pack(*reply))


def one_run(control: socket.socket, room: types.SimpleNamespace, files: list, timeout: float, memory: int) -> tuple:
    """Fork a child, wait for its end, kill what it left, clear the folder. Returns the fields of a REPLY."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        play(room, files, timeout, memory)
    try:
        how, code = watch(control, room, child, start + timeout, memory)
    finally:
        sweep(room, child)
    seconds = time.monotonic() - start
    if os.stat(room.box).st_ctime_ns != room.clean:
        clear(room)
    return how, code, seconds, b""


def watch(control: socket.socket, room: types.SimpleNamespace, child: int, deadline: float, memory: int) -> tuple:
    """Wait until the child ends, its time is up, its tree holds too much memory, or the caller is dead."""
    poll, tick = select.poll(), 1  # milliseconds
    poll.register(control, select.POLLIN)
    pidfd = os.pidfd_open(child) if hasattr(os, "pidfd_open") else None
    if pidfd is not None:
        poll.register(pidfd, select.POLLIN)
        tick = 25 if room.isolated else 100
    try:
        while True:
            left = deadline - time.monotonic()
            ready = poll.poll(max(0, min(tick, left * 1000)))
            if any(fd == control.fileno() for fd, _ in ready):  # nothing is sent during a run: it is the end of file
                return b"!", 0
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return b"x", os.waitstatus_to_exitcode(status)
            if left <= 0:
                return b"t", 0
            if LINUX and memory_of(descendants()) > memory:
                return b"m", 0
    finally:
        if pidfd is not None:
            os.close(pidfd)


def descendants(pid: "int | str" = "self") -> "set[int]":
    """Every process below one; orphans are the server's too, by pid 1's office or PR_SET_CHILD_SUBREAPER."""
    found = set()
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children") as f:
                found.update(map(int, f.read().split()))
    except OSError:
        pass  # it has just ended, or this is not Linux
    return found.union(*map(descendants, found))


def memory_of(pids: "set[int]") -> int:
    """Bytes that the processes hold in memory, files without a name (memfd_create) included."""
    total, files = 0, {}
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm") as f:
                total += int(f.read().split()[1]) * resource.getpagesize()
            for fd in os.listdir(f"/proc/{pid}/fd"):
                about = os.stat(f"/proc/{pid}/fd/{fd}")
                files[about.st_ino] = 0 if about.st_nlink else about.st_blocks * 512
        except OSError:
            pass  # it has just ended
    return total + sum(files.values())


def sweep(room: types.SimpleNamespace, group: int) -> None:
    """Kill every process of a run and wait until all are gone."""
    targets = {-1 if room.isolated else -group}  # -1: all but us, as we are pid 1 of a namespace
    while True:
        for pid in targets:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        try:
            ended, _ = os.waitpid(-1, 0 if room.isolated else os.WNOHANG)
        except ChildProcessError:
            return
        targets = set() if ended else descendants()  # those that have left their group
        time.sleep(0 if ended else 0.002)


def clear(room: types.SimpleNamespace) -> None:
    """Empty the working folder."""
    if room.isolated:
        libc("umount2", room.box, 2)
        mount("tmpfs", room.box, "tmpfs", NOSUID | NODEV, room.box_options)
        if room.ruleset:
            lock(room)  # a rule holds for one folder, and this is another
    else:  # rm can remove what is too deep for shutil.rmtree
        script = 'chmod -R u+rwX "$0"; cd "$0" && rm -rf -- ..?* .[!.]* *; chmod 700 "$0"'
        os.spawnl(os.P_WAIT, "/bin/sh", "sh", "-c", script, room.box)
    room.clean = os.stat(room.box).st_ctime_ns


def prelude() -> "dict[str, str]":
    """The names that LiveCodeBench's candidates use without an import, and the module of each."""
    late = {  # not imported before the fork: their fork hooks would cost every run
        "random": "choice choices getrandbits randint randrange sample seed shuffle uniform",
        "statistics": "fmean mean median median_high median_low mode multimode pstdev pvariance stdev variance",
    }
    early = "string re datetime collections heapq bisect copy math itertools functools operator io sys json typing"
    names = {name: module for module in late for name in late[module].split()}
    for module in map(__import__, early.split()):
        public = getattr(module, "__all__", None) or [name for name in dir(module) if name[0] != "_"]
        names.update((name, module.__name__) for name in public if not hasattr(__builtins__, name))
    return {**names, **{module: module for module in [*late, *early.split()]}}


def warm_up(room: types.SimpleNamespace) -> None:
    """Do once what every child would have to do, as each is a copy of this process."""
    room.prelude = prelude()
    room.barred = set(BARRED.split()).union(*map(traces, SAFE))
    room.foreign = {name for name, module in room.prelude.items()
                    if module not in SAFE and name in {module, *traces(module)}}
    site.setquit()
    sys.argv, sys.path[0] = ["solution.py"], ""
    sys.setrecursionlimit(RECURSION)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(50_000)
    source, sink, errors = (open(fd, mode, closefd=False) for fd, mode in ((0, "rb"), (1, "wb"), (2, "wb")))
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(source, "utf-8", "surrogateescape", newline="\n")
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(sink, "utf-8", "replace")
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(errors, "utf-8", "backslashreplace", line_buffering=True)
    new_main()
    source = "import math\ndef f(x):\n    return [x for x in x]\nprint(f([1]))"
    is_plain(source, room)
    compile(source, "<warm>", "exec")
    gc.collect()
    gc.freeze()


def start_server(control_fd: str, mode: str, *paths: str) -> None:
    """The script's main. A launcher makes the namespaces, forks the server and clears up after it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    control, isolated = socket.socket(fileno=int(control_fd)), mode == "isolated"
    box = "/dev/shm" if isolated else f"/tmp/dust-box-{os.getpid()}-{os.urandom(8).hex()}"
    sys.path += paths[1:]
    readable = sorted({os.path.abspath(path) for path in (sys.base_prefix, *paths)} - {"/"})
    try:
        if LINUX:
            libc("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
            libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: a setuid program gives nothing
        if isolated:
            leave_namespaces()
        server = os.fork()
        if server == 0:
            if LINUX:
                libc("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
                libc("prctl", 36, 1, 0, 0, 0)
            room = furnish(isolated, box, readable, control)
            warm_up(room)
            control.send(b"+" + room.missing.encode())
            serve(control, room)
            os._exit(0)
    except (OSError, AttributeError) as error:  # AttributeError: not Linux
        control.send(b"-" + str(error).encode())
        os._exit(1)
    control.close()
    os.waitpid(server, 0)
    if not isolated:
        room = types.SimpleNamespace(isolated=False, box=box, clean=0)
        sweep(room, server)  # no longer a group of its own: it sweeps the orphans
        clear(room)
        os.rmdir(box)


if __name__ == "__main__":
    start_server(*sys.argv[1:])
    os._exit(0)
