"""The process that a candidate runs in: a fork server, the other half of sandbox.py.

sandbox_worker.py starts this file as a program, in a small clean interpreter (-S -s), so that the caller's modules,
memory and secrets are not in it. The process of the candidate never learns an expected value, so nothing that happens
in it can decide a verdict.

A request is a timeout, a memory limit and these descriptors: the program (its source, and after the first run its
compiled code); stdin, stdout and stderr; the call (a key, a function's name and its arguments, and later the key and
what the function returned; empty where the program reads stdin instead). Tests made of asserts add the wire: a socket
between the children of two workers, of which one runs the asserts and the other runs the program that they call.
The reply is "exited", "timeout", "memory" or "failed", the exit code, the seconds, and the message of a failure.
"""
import _thread
import atexit
import builtins
import contextlib
import ctypes
import functools
import gc
import glob
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
from typing import Any, Callable, Iterator, TextIO

LINUX = sys.platform == "linux"
OUTPUT_CAP = 16 << 20  # bytes of stdout, of stderr, of a returned value and of any one file
KEY_BYTES = 16  # the key comes before a call, and before what the function returned
COMPILED = b"\0"  # the first byte of compiled code; no source begins with it

# ------------------------------------------------------------------------------------------------- values as JSON

KINDS = {"tuple": tuple, "dict": dict, "set": set, "frozenset": frozenset, "bytes": bytes, "iter": Iterator}
MAKERS = {**KINDS, "iter": iter, "complex": complex, "int": lambda digits: int(digits, 16)}


def encode(value: Any) -> Any:
    """Turn a value into a tree of JSON values, for decode(). Raises TypeError for what is not a plain value."""
    if getattr(value, "shape", None) == ():
        value = value.item()  # a numpy scalar
    if isinstance(value, list):
        return [encode(item) for item in value]
    for name, kind in KINDS.items():
        if isinstance(value, kind):
            return {name: [encode(item) for item in (value.items() if kind is dict else value)]}
    if isinstance(value, complex):
        return {"complex": str(value)}
    if isinstance(value, int) and value.bit_length() > 1000:
        return {"int": hex(value)}  # Python refuses long decimals, because they take quadratic time
    if value is None or isinstance(value, (int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def decode(text: str) -> Any:
    """Turn the JSON of a tree into its value. A candidate may have made the tree: the result is plain values only."""
    return json.loads(text, object_hook=lambda tree: [MAKERS[kind](parts) for kind, parts in tree.items()][0])


# ------------------------------------------------------------------------------------------------------- the room

READ_ONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 1 << 12, 1 << 14, 1 << 18  # mount
DETACH = 2  # umount2(2)
MOUNTS, IPC, USERS, PIDS, NETWORK = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30  # unshare(2)
SECURE_BITS, CHILD_SUBREAPER, NO_NEW_PRIVILEGES = 28, 36, 38  # prctl(2)
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the system calls of Landlock, on every processor
READABLE = ("/usr /lib /lib64 /bin /etc/ld.so.cache /etc/localtime /etc/alternatives "
            "/dev/null /dev/zero /dev/random /dev/urandom").split()
LIBC = ctypes.CDLL(None, use_errno=True)


def libc(function: str, *arguments: Any) -> int:
    """Call a function of the C library. Raises OSError where it returns -1."""
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
    """Leave the caller's mounts, processes, network and System V objects. The next fork is process 1 of new ones."""
    uid, gid = os.getuid(), os.getgid()
    try:
        libc("unshare", MOUNTS | IPC | PIDS | NETWORK)
    except OSError:  # we are not root, or only root of a container: a user namespace gives us the powers for this
        libc("unshare", MOUNTS | IPC | PIDS | NETWORK | USERS)
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {uid} 1")
        write("/proc/self/gid_map", f"0 {gid} 1")


class Room:
    """The place where a worker's candidates run: their files, their user and their limits."""

    def __init__(self, isolated: bool, box: str, paths: "list[str]"):
        """Build the room in this process. box: the working folder; paths: what candidates may read besides READABLE."""
        self.isolated, self.box = isolated, box
        self.user = self.owner = 0  # the candidates' user, and the one as whom they use files; 0: that of this process
        self.ruleset, self.missing = None, []  # of Landlock; what this system cannot give us
        self.empty_since = 0  # a time that moves with whatever is made, removed or renamed in the box
        self.limits = {"FSIZE": OUTPUT_CAP, "NOFILE": 256, "CORE": 0, "MSGQUEUE": 0, "STACK": STACK,
                       "NPROC": 64}  # and threads
        if LINUX:
            self.choose_user()
        self.box_options = f"size=64m,nr_inodes=4096,mode=700,uid={self.owner},gid={self.owner}"
        paths = sorted({*READABLE, *paths}, key=len)  # a folder comes before what is in it
        if isolated:
            self.build_root(paths)
        else:
            os.mkdir(box, 0o700)
            os.chown(box, self.owner or -1, self.owner or -1)
            self.missing += ["candidates can see other processes"]
            try:
                self.ruleset, open_ways = landlock(paths, [box, "/dev/null", "/dev/zero"])
                self.missing += [f"they can {open_ways}"]
            except (OSError, AttributeError):
                self.missing += ["they can use the network and read your files: only the limits hold"]
        if sys.version_info >= (3, 12) and call_counter() is None:
            self.missing += ["on this Python, deep recursion through C code (@cache, max, map) fails early"]
        os.environ.update(HOME=box, TMPDIR=box)

    def choose_user(self) -> None:
        """Choose the user of the candidates, and set the limit on processes so that it fits this user."""
        with open("/proc/self/uid_map") as f:
            sizes = f.read().split()[2::3]
        if sizes == ["1"]:  # we are in a user namespace of our own, which counts its processes itself
            return
        me = os.getuid()
        if me:  # the limit counts everything that this user runs
            for thread in glob.glob("/proc/[0-9]*/task/*"):
                with contextlib.suppress(OSError):  # it may have just ended
                    self.limits["NPROC"] += os.stat(thread).st_uid == me
            return
        first = 1 << 30 if sizes == ["4294967295"] else 10_000
        # Each worker takes another user, because the limit counts by user: no bomb may starve another worker.
        self.user = self.owner = first + int.from_bytes(os.urandom(2), "little") % 50_000
        if not self.isolated:  # if only root can read Python, candidates use files as root, without its other powers
            os.seteuid(self.user)
            if not os.access(os.__file__, os.R_OK, effective_ids=True):
                self.owner = 0
            os.seteuid(0)

    def build_root(self, paths: "list[str]") -> None:
        """Replace all files by the given paths, which become read-only, and an empty box."""
        mount(None, "/", None, RECURSIVE | PRIVATE)
        sources = {path: "/old" + os.path.realpath(path) for path in paths}
        mount("tmpfs", "/tmp", "tmpfs", NOSUID, "mode=755")
        for folder in ("root/box", "root/proc", "root/dev", "old"):
            os.makedirs("/tmp/" + folder)
        libc("pivot_root", "/tmp", "/tmp/old")
        os.chdir("/root")
        for path, source in sources.items():
            target = "/root" + path
            if os.path.exists(target) or not os.path.exists(source):
                continue
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.mkdir(target) if os.path.isdir(source) else open(target, "w").close()
            mount(source, target, None, BIND | RECURSIVE)
            if not path.startswith("/dev/"):
                kept = os.statvfs(target).f_flag & NOEXEC  # a user namespace must not take this flag away
                mount(None, target, None, REMOUNT | BIND | READ_ONLY | NOSUID | NODEV | kept)
        links = {"tmp": "box", "dev/shm": "../box", "dev/fd": "/proc/self/fd",
                 "dev/stdin": "fd/0", "dev/stdout": "fd/1"}
        for name in links.keys() - set(os.listdir()):
            os.symlink(links[name], name)
        mount("proc", "proc", "proc", NOSUID | NODEV)
        for name, value in (("shmmni", "0"), ("msgmni", "0"), ("sem", "1 0 1 0")):
            write("proc/sys/kernel/" + name, value)  # no System V objects: they outlive the processes that make them
        mount(None, "proc", None, REMOUNT | BIND | READ_ONLY | NOSUID | NODEV)
        libc("umount2", "/old", DETACH)
        mount(None, "/", None, REMOUNT | BIND | READ_ONLY | NOSUID)
        os.chroot(".")  # in a chroot no process gets a user namespace, and with it new powers
        mount("tmpfs", "/box", "tmpfs", NOSUID | NODEV, self.box_options)

    def enter(self, streams: "list[int]", timeout: float, memory: int) -> None:
        """Bring a child into the room: session, folder, streams, limits, user. Raises OSError."""
        os.setsid()
        os.chdir(self.box)
        for target, fd in enumerate(streams):
            os.dup2(fd, target)
            os.close(fd)
        for name, limit in {**self.limits, "CPU": int(timeout) + 2, "AS": memory}.items():
            kind = getattr(resource, "RLIMIT_" + name, None)
            if kind is None or name == "AS" and not LINUX:  # which macOS cannot set
                continue
            hard = resource.getrlimit(kind)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (limit, hard if name == "STACK" else limit))  # programs may raise their stack
        if self.user:
            if not self.owner:
                libc("prctl", SECURE_BITS, 4, 0, 0, 0)  # 4: the change of user takes no powers away
            os.setgroups([])
            os.setresgid(self.user, self.user, self.user)
            os.setresuid(self.user, self.user, self.user)
            if not self.owner:
                libc("setfsuid", 0)
        if LINUX and not self.owner:  # otherwise the change of user has taken all powers away
            libc("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # none, in version 3 of their format
        if self.ruleset:
            libc("syscall", RESTRICT_SELF, self.ruleset, 0)
            os.close(self.ruleset)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # too much output ends the program

    def clear(self) -> None:
        """Empty the box, if the last candidate has changed anything in it."""
        if os.stat(self.box).st_ctime_ns != self.empty_since:
            if self.isolated:
                libc("umount2", self.box, DETACH)
                mount("tmpfs", self.box, "tmpfs", NOSUID | NODEV, self.box_options)
            else:
                remove_contents(self.box)
            self.empty_since = os.stat(self.box).st_ctime_ns


def remove_contents(folder: str) -> None:
    """Empty a folder with rm, which removes what is too deep for shutil.rmtree."""
    script = 'chmod -R u+rwX "$0"; cd "$0" && rm -rf -- ..?* .[!.]* *; chmod 700 "$0"'
    os.spawnl(os.P_WAIT, "/bin/sh", "sh", "-c", script, folder)


def landlock(readable: "list[str]", writable: "list[str]") -> "tuple[int, str]":
    """Make a Landlock rule set: these files only, and no TCP and no signals if the kernel can forbid them.

    Returns its descriptor, and what candidates can still do.
    """
    abi = libc("syscall", CREATE_RULESET, None, 0, 1)
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1  # every right on files that this kernel knows
    rules = struct.pack("QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc("syscall", CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    for path in filter(os.path.exists, [*writable, *readable]):
        rights = files if path in writable else 0b1101  # execute, read a file, read a folder
        inode = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", rights if os.path.isdir(path) else rights & 0b111, inode)
        libc("syscall", ADD_RULE, ruleset, 1, rule, 0)
        os.close(inode)
    tcp, signals = "" if abi >= 4 else " and TCP", "" if abi >= 6 else ", and send signals to other processes"
    return ruleset, f"use UDP{tcp}{signals}"


# ------------------------------------------------------------------------------------- recursion through C code

STACK = 120 << 20  # bytes. Linux keeps 128 MB free below a stack
BYTES_A_CALL = 300  # of a stack, for each step of the counter below; 150 to 350 were measured


def thread_state() -> "ctypes.Array[ctypes.c_int]":
    """Return the first 32 integers of this thread's state in Python: its memory, not a copy of it."""
    ctypes.pythonapi.PyThreadState_Get.restype = ctypes.c_void_p
    return (ctypes.c_int * 32).from_address(ctypes.pythonapi.PyThreadState_Get())


@functools.cache
def call_counter() -> "int | None":
    """Return which integer of thread_state() counts down the calls through C code, or None if none is to be changed."""
    if sys.version_info < (3, 12) or not LINUX:  # on macOS the stack of the main thread is small
        return None
    state = thread_state()
    before = list(state)
    ctypes.pythonapi.Py_EnterRecursiveCall(b"")
    inside = list(state)
    ctypes.pythonapi.Py_LeaveRecursiveCall()
    after = list(state)
    found = [i for i, count in enumerate(before) if inside[i] == count - 1 and after[i] == count]
    return found[0] if len(found) == 1 else None


def limit_calls_as_before() -> None:
    """Let setrecursionlimit() set how deep a program may call itself through C code, as it did before Python 3.12.

    Such calls are those of a function with @cache, or of f in max(f(n - 1) for ...). On Python 3.12 and 3.13 a counter
    of each thread allows 450 and 3,300 of them, whatever the limit is. Labels would depend on the Python.
    """
    thread, set_limit = _thread._local(), sys.setrecursionlimit  # thread.stack: its bytes, if we know them

    def set_counter() -> None:
        if stack := getattr(thread, "stack", 0):  # an older Python counts 2 where this one counts 3
            thread_state()[call_counter()] = min(3 * sys.getrecursionlimit() // 2, stack // BYTES_A_CALL)

    def set_both(limit: int) -> None:
        set_limit(limit)
        set_counter()

    def start_thread(start: Callable, function: Callable, *arguments: Any, **named: Any) -> Any:
        stack = _thread.stack_size()  # 0 if the program has not chosen it. The call also sets it to 0
        _thread.stack_size(stack)

        def run(*arguments: Any, **named: Any) -> None:
            thread.stack = stack
            set_counter()
            function(*arguments, **named)

        return start(run, *arguments, **named)

    for name in {"start_new_thread", "start_joinable_thread"} & vars(_thread).keys():
        setattr(_thread, name, functools.partial(start_thread, getattr(_thread, name)))
    sys.setrecursionlimit = set_both
    thread.stack = STACK
    set_counter()


# ----------------------------------------------------------------------------------------------- the life of a child


def child_main(room: Room, files: "list[int]", timeout: float, memory: int, failures: int) -> None:
    """Enter the room, run the candidate, exit. Never returns. failures: a pipe for why the child cannot enter."""
    leave, say, status = os._exit, os.write, 1  # the functions are kept here, because a candidate can replace them
    program, *streams, call = files[:5]
    try:
        room.enter(streams, timeout, memory)
        os.close(failures)
    except BaseException as error:
        say(failures, str(error).encode())
        leave(1)
    try:
        try:
            run_candidate(program, call, *files[5:])
            status = 0
        except SystemExit as error:
            if error.code is None or isinstance(error.code, int):
                status = int.__and__(error.code or 0, 255)
            else:
                print(error.code, file=sys.stderr)
        except MemoryError as error:
            error.__traceback__ = None  # this frees what the program holds, so that there is memory to go on with
            vars(sys.modules["__main__"]).clear()
            say(2, b"MemoryError\n")
        except BaseException as error:
            trace = error.__traceback__
            while trace and trace.tb_frame.f_code.co_filename == __file__:
                trace = trace.tb_next
            sys.excepthook(type(error), error.with_traceback(trace), trace)
        finish()
    except BaseException:
        status = status or 120  # Python's own code where it cannot flush
    finally:
        leave(status)


def run_candidate(program: int, call_file: int, wire_end: "int | None" = None) -> None:
    """Run a program on its stdin, or call one of its functions, or be one of the two sides of asserts."""
    code = load_program(program)
    call = os.pread(call_file, os.fstat(call_file).st_size, 0)
    os.ftruncate(call_file, 0)
    wire = socket.socket(fileno=wire_end).makefile("rw") if wire_end is not None else None
    if not call:
        os.close(call_file)
        main = run_program(code, as_module=wire is not None)
        if wire:
            answer_calls(main, wire)
        return
    key, (name, arguments) = call[:KEY_BYTES], marshal.loads(call[KEY_BYTES:])
    if wire:
        run_asserts(code, name, wire)
        value = True
    else:
        value = find_function(run_program(code, as_module=True), name)(*arguments)  # an exit here leaves no answer
    os.pwrite(call_file, key + json.dumps(encode(value), separators=(",", ":")).encode(), 0)


def load_program(file: int) -> types.CodeType:
    """Return the code of a program, and close its file. The first run puts the code there, for the runs that follow.

    This is safe: no line of the candidate has run yet, and the file is closed before the first one runs.
    """
    data = os.pread(file, os.fstat(file).st_size, 0)
    if data.startswith(COMPILED):
        code = marshal.loads(data[1:])
    else:
        code = compile(data.decode().removeprefix("\ufeff"), "<solution>", "exec", dont_inherit=True)
        compiled = COMPILED + marshal.dumps(code)
        if len(compiled) < OUTPUT_CAP:
            os.pwrite(file, compiled, 0)
    os.close(file)
    return code


def names_in(code: types.CodeType) -> "set[str]":
    """Return every global and every attribute that a code object, or one inside it, mentions."""
    return set(code.co_names).union(*(names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)))


@functools.cache
def prelude() -> "dict[str, str]":
    """Return the names that programs for LiveCodeBench use without an import, and the module of each."""
    late = {  # not imported before the fork, because their fork hooks would make every run slower
        "random": "choice choices getrandbits randint randrange sample seed shuffle uniform",
        "statistics": "fmean mean median median_high median_low mode multimode pstdev pvariance stdev variance",
    }
    early = "string re datetime collections heapq bisect copy math itertools functools operator io sys json typing"
    names = {name: module for module in late for name in [module, *late[module].split()]}
    for module in early.split():
        public = {module: module}
        exec(f"from {module} import *", public)
        names.update((name, module) for name in public if name[0] != "_" and not hasattr(builtins, name))
    return names


def run_program(code: types.CodeType, as_module: bool) -> types.ModuleType:
    """Execute a program in __main__, and return this module. as_module: skip what stands under `if __name__ == ...`.

    The program finds the prelude's names. as_module: as builtins, so that none is taken for what the program defines.
    """
    main = sys.modules["__main__"]
    for name in names_in(code) & prelude().keys():
        home = prelude()[name]
        module = __import__(home)
        setattr(builtins if as_module else main, name, module if name == home else getattr(module, name))
    if as_module:
        main.__name__ = "solution"
        sys.modules["solution"] = main
    exec(code, vars(main))
    return main


def find_function(main: types.ModuleType, name: str) -> Any:
    """Return a function of a program, or the method of a new Solution, as LeetCode's problems have it."""
    solution = getattr(main, "Solution", None)
    return getattr(solution(), name) if hasattr(solution, name) else getattr(main, name)


def answer_calls(main: types.ModuleType, wire: TextIO) -> None:
    """Call the program's functions for run_asserts() in another process, until the wire closes."""
    functions = [name for name, item in vars(main).items() if callable(item)]
    while question := wire.readline():
        name, arguments, named = decode(question)
        try:
            answer = [find_function(main, name)(*arguments, **named) if name else functions]
        except Exception as error:
            answer = [kind.__name__ for kind in type(error).__mro__], str(error)
        wire.write(json.dumps(encode(answer)) + "\n")
        wire.flush()


def run_asserts(code: types.CodeType, entry_point: str, wire: TextIO) -> None:
    """Run asserts with a stand-in for each function of the program. A stand-in asks the process that has the program.

    Except entry_point no builtin gets a stand-in, and the asserts can bind any name themselves. The asserts have no
    prelude: with one, gcd(4, 6) would be right without a program.
    """
    # Not StopIteration: it would end a loop or a map of the asserts, and the rest would go unchecked.
    errors = {name: kind for name, kind in vars(builtins).items()
              if isinstance(kind, type) and issubclass(kind, Exception) and not name.startswith("Stop")}

    def ask(name: str, *arguments: Any, **named: Any) -> Any:
        line = ""
        with contextlib.suppress(OSError):
            wire.write(json.dumps(encode((name, arguments, named))) + "\n")
            wire.flush()
            line = wire.readline()
        if not line:
            print("the program ended before it had answered", file=sys.stderr, flush=True)
            os._exit(1)  # not an exception, because the asserts could catch it
        answer, *message = decode(line)
        if message:
            known = [name for name in answer if name in errors]
            raise errors[known[0]](*message)
        return answer

    main = sys.modules["__main__"]
    for name in {entry_point} | names_in(code) & set(ask("")) - vars(main).keys() - vars(builtins).keys():
        setattr(main, name, functools.partial(ask, name))
    exec(code, vars(main))


def finish() -> None:
    """Do what Python does at its end: join threads, call atexit's functions, close open files, flush."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    for _ in range(2):  # first the streams that the program may have put in place of ours
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        vars(sys.modules["__main__"]).clear()


# --------------------------------------------------------------------------------------------- the loop of the server


def serve(control: socket.socket, room: Room) -> None:
    """Answer one request after another, until the caller is gone or a candidate has changed this process's limits."""
    kinds = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    limits = list(map(resource.getrlimit, kinds))
    while list(map(resource.getrlimit, kinds)) == limits:
        request, files, _, _ = socket.recv_fds(control, 100, 6, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        if not request:
            return
        try:
            timeout, memory = request.split()
            reply = run_child(control, room, files, float(timeout), int(memory))
        except OSError as error:
            reply = f"failed 0 0 {error}"
        for fd in files:
            os.close(fd)
        control.send(reply.encode())


def run_child(control: socket.socket, room: Room, files: "list[int]", timeout: float, memory: int) -> str:
    """Fork a child, wait for its end, kill what it left, empty the box. Returns the reply."""
    start, (failures, theirs) = time.monotonic(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(failures)
        os.close(control.fileno())
        child_main(room, files, timeout, memory, theirs)
    os.close(theirs)
    try:
        how, code = watch(control, child, start + timeout, memory)
    finally:
        sweep(room.isolated, child)
    seconds, failure = time.monotonic() - start, os.read(failures, 200)
    os.close(failures)
    room.clear()
    return f"{'failed' if failure else how} {code} {seconds} {failure.decode('utf-8', 'replace')}"


def watch(control: socket.socket, child: int, deadline: float, memory: int) -> "tuple[str, int]":
    """Wait until the child ends, its time is up, its tree holds too much memory, or the caller is dead."""
    waiting, tick = [control], 0.001
    if hasattr(os, "pidfd_open"):
        waiting, tick = [control, os.pidfd_open(child)], 0.025
    try:
        while True:
            left = deadline - time.monotonic()
            ready, _, _ = select.select(waiting, [], [], max(0, min(tick, left)))
            if control in ready:  # the caller sends nothing now, so this is its end
                return "failed", 0
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return "exited", os.waitstatus_to_exitcode(status)
            if left <= 0:
                return "timeout", 0
            if LINUX and memory_of(descendants()) > memory:
                return "memory", 0
    finally:
        for pidfd in waiting[1:]:
            os.close(pidfd)


def descendants(pid: "int | str" = "self") -> "set[int]":
    """Return every process below one. Orphans become children of the server: it is process 1, or a subreaper."""
    found = set()
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(path) as f:
            found.update(map(int, f.read().split()))
    return found.union(*map(descendants, found))


def memory_of(pids: "set[int]") -> int:
    """Return the bytes that processes hold: of each mapping their share (PSS), and files without a name."""
    shares, files = {}, {}
    for pid in pids:
        for thread in glob.glob(f"/proc/{pid}/task/*"):  # the first may be gone, and another one may have other files
            with contextlib.suppress(OSError):
                with open(thread + "/smaps_rollup") as f:
                    shares.update({pid: int(line.split()[1]) << 10 for line in f if line.startswith("Pss:")})
                for fd in os.listdir(thread + "/fd"):
                    about = os.stat(f"{thread}/fd/{fd}")
                    files[about.st_ino] = 0 if about.st_nlink else about.st_blocks * 512
    return sum(shares.values()) + sum(files.values())


def sweep(isolated: bool, group: int) -> None:
    """Kill every process of a run and wait until all are gone."""
    targets = {-1 if isolated else -group}  # -1 means all but this process, which is process 1 of its namespace
    while True:
        for pid in targets:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            ended, _ = os.waitpid(-1, 0 if isolated else os.WNOHANG)
        except ChildProcessError:
            return
        targets = set() if ended else descendants()  # those that have left their group
        time.sleep(0 if ended else 0.002)


def warm_up() -> None:
    """Do once, before the first fork, what every child would have to do again."""
    prelude()
    site.setquit()
    sys.argv, sys.path[0] = ["solution.py"], ""
    sys.setrecursionlimit(50_100)  # LiveCodeBench's 50,000, and some for our own frames
    if call_counter() is not None:
        limit_calls_as_before()
    sys.stdin.reconfigure(newline="\n")
    sys.stdout.reconfigure(errors="replace")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__, main.__file__ = builtins, "solution.py"
    compile("import math\ndef f(x):\n    return [x for x in x]\nprint(f([1]))", "<warm>", "exec")
    gc.collect()
    gc.freeze()


def start_server(control_fd: str, mode: str, *paths: str) -> None:
    """Make the namespaces, fork the server inside them, wait for its end and clear up (the program's main)."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    control, isolated = socket.socket(fileno=int(control_fd)), mode == "isolated"
    box = "/box" if isolated else f"/tmp/dust-box-{os.getpid()}-{os.urandom(8).hex()}"
    sys.path += paths[1:]
    readable = [path for path in map(os.path.abspath, (sys.base_prefix, *paths)) if path != "/"]
    try:
        if LINUX:
            libc("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)  # a setuid program gives nothing
            libc("prctl", CHILD_SUBREAPER, 1, 0, 0, 0)
        if isolated:
            leave_namespaces()
        server = os.fork()
        if server == 0:
            if LINUX:
                libc("prctl", CHILD_SUBREAPER, 1, 0, 0, 0)
            room = Room(isolated, box, readable)
            warm_up()
            control.send(b"+" + "; ".join(room.missing).encode())
            serve(control, room)
            os._exit(0)
    except (OSError, AttributeError) as error:  # AttributeError: this is not Linux
        control.send(b"-" + str(error).encode())
        os._exit(1)
    control.close()
    os.waitpid(server, 0)
    if not isolated:
        sweep(isolated, server)  # the group of the server is gone: this kills the orphans
        remove_contents(box)
        os.rmdir(box)


if __name__ == "__main__":
    start_server(*sys.argv[1:])
    os._exit(0)
