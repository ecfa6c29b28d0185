"""Runs programs that a model wrote and says whether they pass: every reward in DuST comes from here.

A worker is a fork server: this file, started once as a script in a small clean interpreter, forks a child for each
run. Source, stdin and outputs are memory files that travel over a socket; expected values never leave the caller.

Covered on every system:
- The verdict is made in the caller, from what was printed or returned and the exit status that the kernel reports.
  Patched builtins, os._exit(0), a fake ==, bytes in the result channel: nothing turns a wrong answer into a right one.
- Limits on wall clock, CPU, memory, output, file size and open files; an own folder, a bare environment, no
  inherited descriptors, a fresh process for each test. Ctrl-C or the death of the caller ends what runs.
- A failure of the sandbox itself is a SandboxError, never a label.
Covered on Linux: the memory and the number of processes of the whole tree, of which nothing outlives its run.
Covered where Linux allows namespaces (to root and to most users): no network, no sight of other processes, no files
but Python, /usr (both read-only) and an empty folder of 64 MB. Elsewhere Landlock does what it can (files, TCP,
signals), and one line on stderr says what is missing.

Not covered: holes in the kernel (no seccomp filter, no virtual machine), side channels, memory in socket buffers;
without namespaces the disk space that many files take. macOS has the first list only, and there a process that
leaves its group outlives its run.
"""
import atexit
import gc
import io
import json
import marshal
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import types
from typing import Any, Iterable, Iterator, NamedTuple

LINUX, SERVER = sys.platform == "linux", __name__ == "__main__"
if SERVER:  # it goes without the caller's modules: each fork would pay for their memory and their fork hooks
    import ctypes
    import site

    LIBC = ctypes.CDLL(None, use_errno=True)
else:
    import contextlib
    import decimal
    import queue
    import subprocess
    import tempfile
    import threading

OUTPUT_CAP = 16 << 20  # bytes of stdout, of stderr, of a result and of any one file
PROCESSES = 64  # processes and threads in one run
REQUEST = struct.Struct("<d Q ? ?")  # timeout, memory in bytes, is it a function's test, does a cache come with it
REPLY = struct.Struct("<c i d 200s")  # x exit, t timeout, m memory, ! failure; exit code; seconds; what failed
ENVIRONMENT = {  # all that candidates see, with HOME and TMPDIR; hashes repeat, so that labels do
    "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1",  # each arena and thread takes from RLIMIT_AS
}


class SandboxError(Exception):
    """The sandbox itself failed (cannot fork, disk full, ...). Never a label."""


class Result(NamedTuple):
    status: str  # ok, error, timeout, memory, output (too much of it) or refused (no source text at all)
    stdout: str
    stderr: str
    exit_code: "int | None"  # negative for a signal, None where the sandbox ended the run
    seconds: float


class Verdict(NamedTuple):
    passed: bool
    results: "list[Result]"  # up to the first test that failed
    failed_test: "int | None"
    reason: str
    job: int = 0  # which of a Pool's jobs it judges

    def __bool__(self) -> bool:
        return self.passed


def encode(value: Any) -> Any:
    """A value as a JSON tree: tuples are lists, numpy scalars numbers; dicts and long ints keep their meaning."""
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, int) and value.bit_length() > 1000:
        return {"int": hex(value)}  # as a decimal it takes quadratic time, and Python refuses
    if value is None or isinstance(value, (int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def decode(tree: Any, sequence: type = list) -> Any:
    """The plain value of encode's tree."""
    if isinstance(tree, dict):
        return int(tree["int"], 16) if "int" in tree else {decode(k, tuple): decode(v) for k, v in tree["dict"]}
    return sequence(decode(item, sequence) for item in tree) if isinstance(tree, list) else tree


# -------------------------------------------------------------------------- the fork server: a room for candidates

READ_ONLY, NOSUID, NODEV, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 1 << 14, 1 << 18  # mount(2)
MOUNTS, IPC, USERS, PIDS, NETWORK = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30  # unshare(2)
VISIBLE = "/usr /lib /lib64 /bin /etc/ld.so.cache /etc/localtime /etc/alternatives " \
    "/dev/null /dev/zero /dev/random /dev/urandom"


def libc(function: str, *arguments: Any) -> int:
    result = getattr(LIBC, function)(*(a.encode() if isinstance(a, str) else a for a in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(source: "str | None", target: str, kind: "str | None", flags: int, options: "str | None" = None) -> None:
    libc("mount", source, target, kind, ctypes.c_ulong(flags), options)


def enter_namespaces() -> int:
    """Leave the caller's mounts, processes, network and System V objects. Returns the uid for candidates."""
    uid, gid = os.getuid(), os.getgid()
    try:
        libc("unshare", MOUNTS | IPC | PIDS | NETWORK)
        return foreign_uid()
    except OSError:  # not root, or root of a container: a user namespace gives us the powers that this takes
        libc("unshare", MOUNTS | IPC | PIDS | NETWORK | USERS)
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(line)
        return 0


def foreign_uid() -> int:
    """A uid for this worker alone: processes are counted by uid, and no worker's bomb may starve another worker."""
    with open("/proc/self/uid_map") as f:
        return (1 << 30 if f.read().split()[2] == "4294967295" else 10_000) + os.getpid() % 50_000


def build_root(paths: "list[str]", box_options: str) -> None:
    """Exchange all files for the given ones, read-only, and an empty folder /box."""
    sources = {path: "/old" + os.path.realpath(path) for path in paths}
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", NOSUID, "mode=755")
    os.makedirs("/tmp/root/box")
    os.makedirs("/tmp/root/proc")
    os.mkdir("/tmp/old")
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
            kept = os.statvfs(target).f_flag & 8  # a user namespace may not take a noexec away
            mount(None, target, None, REMOUNT | BIND | READ_ONLY | NOSUID | NODEV | kept)
    links = {"tmp": "box", "dev/shm": "../box", "dev/fd": "/proc/self/fd", "dev/stdin": "fd/0", "dev/stdout": "fd/1"}
    for name in links.keys() - set(os.listdir()):
        os.symlink(links[name], name)
    mount("proc", "proc", "proc", NOSUID | NODEV)
    for name, value in (("shmmni", "0"), ("msgmni", "0"), ("sem", "1 0 1 0")):
        with open("proc/sys/kernel/" + name, "w") as f:
            f.write(value)  # no System V objects: they outlive the processes that make them
    mount(None, "proc", None, REMOUNT | BIND | READ_ONLY | NOSUID | NODEV)
    libc("umount2", "/old", 2)
    mount(None, "/", None, REMOUNT | BIND | READ_ONLY | NOSUID)
    os.chroot(".")  # in a chroot nobody gets a user namespace, and with it new powers
    mount("tmpfs", "/box", "tmpfs", NOSUID | NODEV, box_options)


def landlock(readable: "list[str]", writable: "list[str]") -> int:
    """A Landlock rule set: these files only, no TCP, no signals to the outside. Returns its descriptor."""
    abi = libc("syscall", 444, None, 0, 1)
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    rules = struct.pack("QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc("syscall", 444, rules, ctypes.c_size_t(len(rules)), 0)
    for path in filter(os.path.exists, [*readable, *writable]):
        rights = files if path in writable else 0b1101  # execute, read a file, read a folder
        inode = os.open(path, os.O_PATH)
        libc("syscall", 445, ruleset, 1, struct.pack("=Qi", rights if os.path.isdir(path) else rights & 7, inode), 0)
        os.close(inode)
    return ruleset


def furnish(isolated: bool, uid: int, box: str, paths: "list[str]", control: socket.socket) -> types.SimpleNamespace:
    """Build the room that a worker's candidates run in."""
    room = types.SimpleNamespace(isolated=isolated, box=box, ruleset=None, processes=PROCESSES, missing="")
    room.uid = room.power = uid  # candidates' real and effective user
    room.box_options = f"size=64m,nr_inodes=4096,mode=700,uid={uid},gid={uid}"
    if isolated:
        build_root(paths, room.box_options)
    else:
        os.mkdir(room.box, 0o700)
        if LINUX and os.getuid() == 0:
            room.uid = room.power = foreign_uid()
            os.seteuid(room.uid)
            if not os.access(os.__file__, os.R_OK, effective_ids=True):
                room.power = 0  # Python is root's alone: root to files, without capabilities; a stranger to limits
            os.seteuid(0)
            os.chown(room.box, room.power, room.power)
        elif LINUX:  # this limit counts all that the user runs
            mine = [pid for pid in processes() if os.stat(f"/proc/{pid}").st_uid == os.getuid()]
            room.processes += sum(len(os.listdir(f"/proc/{pid}/task")) for pid in mine)
        room.missing = "candidates can see other processes"
        try:
            room.ruleset = landlock(paths, [room.box, "/dev/null", "/dev/zero"])
        except (OSError, AttributeError):
            room.missing += ", the network and all files that you can read; only the limits hold"
    os.environ.update(HOME=room.box, TMPDIR=room.box)
    room.complaints = os.pipe()  # for a child that could not even enter
    os.set_blocking(room.complaints[0], False)
    room.private = [control.fileno(), *room.complaints, *([room.ruleset] if room.ruleset else [])]
    room.clean = os.stat(room.box).st_ctime_ns  # moves with whatever is made, removed or renamed in the folder
    return room


def enter(room: types.SimpleNamespace, streams: "list[int]", timeout: float, memory: int) -> None:
    """A child's way into the room, step by step."""
    os.setsid()
    os.chdir(room.box)
    for target, fd in enumerate(streams):
        os.dup2(fd, target)
    limits = {"AS": memory, "CPU": int(timeout) + 2, "FSIZE": OUTPUT_CAP, "NPROC": room.processes, "NOFILE": 256,
              "CORE": 0, "MSGQUEUE": 0, "STACK": 120 << 20}  # Linux keeps 128 MB free below a stack
    for name, value in limits.items():
        which = getattr(resource, "RLIMIT_" + name, None)
        if which is not None and (LINUX or name != "AS"):  # which macOS cannot set
            hard = resource.getrlimit(which)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (value, value))
    if room.uid:
        os.setgroups([])
        os.setresgid(room.power, room.power, room.power)
        os.setresuid(room.uid, room.power, room.power)
    if LINUX and not room.power:
        libc("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    if room.ruleset:
        libc("syscall", 446, room.ruleset, 0)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # too much output ends the program
    for fd in (*streams, *room.private):
        os.close(fd)


# ------------------------------------------------------------------- the fork server: inside a candidate's process


def play(room: types.SimpleNamespace, fds: "list[int]", timeout: float, memory: int, call: bool, cached: bool) -> None:
    """A child's whole life. Nothing here is trusted once the candidate's code has begun."""
    status, leave, write = 1, os._exit, os.write
    try:
        try:
            enter(room, fds[:3], timeout, memory)
        except BaseException as error:
            write(room.complaints[1], str(error).encode())
            leave(1)
        try:
            execute(room, fds[3], fds[4] if cached else None, fds[-1] if call else None)
            status = 0
        except SystemExit as error:
            status = error.code & 255 if isinstance(error.code, int) else 0 if error.code is None else 1
            if status and not isinstance(error.code, int):
                print(error.code, file=sys.stderr)
        except MemoryError as error:
            error.__traceback__ = None  # frees what the program holds, so that there is memory to go on with
            vars(sys.modules["__main__"]).clear()
            write(2, b"MemoryError\n")
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


def execute(room: types.SimpleNamespace, source: int, cache: "int | None", result: "int | None") -> None:
    """Compile a program, or take the code that its first test compiled; run it; call its function if one is asked."""
    main, blob = sys.modules["__main__"], os.pread(cache, OUTPUT_CAP, 0) if cache else b""
    if blob:
        code = marshal.loads(blob)
    else:
        text = os.pread(source, os.fstat(source).st_size, 0).decode("utf-8-sig")
        code = compile(text, "<solution>", "exec", dont_inherit=True)
        if cache:
            os.write(cache, marshal.dumps(code))
    for fd in (source, cache) if cache else (source,):
        os.close(fd)
    for name in names_in(code) & room.prelude.keys():
        module = __import__(room.prelude[name])
        setattr(main, name, module if name == room.prelude[name] else getattr(module, name))
    if result:
        name, arguments, key = marshal.loads(os.pread(0, os.fstat(0).st_size, 0))
        os.ftruncate(0, 0)
        main.__name__ = "solution"  # what stands under `if __name__ == "__main__"` is no part of a function's test
        sys.modules["solution"] = main
    exec(code, vars(main))
    if result:
        solution = getattr(main, "Solution", None)
        function = getattr(solution(), name) if hasattr(solution, name) else getattr(main, name)
        answer = json.dumps(encode(function(*arguments)), separators=(",", ":"))
        with open(result, "wb") as f:
            f.write(key + answer.encode())


def finish() -> None:
    """What Python does at its end: join threads, run atexit, close the files left open, flush."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    vars(sys.modules["__main__"]).clear()
    for stream in (sys.stderr, sys.stdout, sys.__stdout__):
        stream.flush()


def names_in(code: types.CodeType) -> "set[str]":
    """Every global or attribute that a code object, or one inside it, mentions."""
    return set(code.co_names).union(*(names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)))


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


# ----------------------------------------------------------------------- the fork server: from one run to the next


def serve(control: socket.socket, room: types.SimpleNamespace) -> None:
    """Run what is asked for, one at a time, until the caller is gone or a candidate has changed our limits."""
    which = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    limits = [resource.getrlimit(each) for each in which]
    while [resource.getrlimit(each) for each in which] == limits:
        request, fds, _, _ = socket.recv_fds(control, REQUEST.size, 6, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        if not request:
            return
        try:
            reply = one_run(control, room, fds, *REQUEST.unpack(request))
        except OSError as error:
            reply = b"!", 0, 0.0, str(error).encode()
        for fd in fds:
            os.close(fd)
        control.send(REPLY.pack(*reply))


def one_run(control: socket.socket, room: types.SimpleNamespace, fds: "list[int]", timeout: float, memory: int,
            call: bool, cached: bool) -> tuple:
    """Fork a child, wait for its end, kill what it left, clear the folder. Returns the fields of a REPLY."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        play(room, fds, timeout, memory, call, cached)
    try:
        how, code = watch(control, room, child, start + timeout, memory)
    finally:
        sweep(room, child)
    seconds = time.monotonic() - start
    if os.stat(room.box).st_ctime_ns != room.clean:
        clear(room)
    try:
        return b"!", 0, seconds, os.read(room.complaints[0], 200)
    except BlockingIOError:
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


def processes() -> "list[int]":
    return [int(name) for name in os.listdir("/proc") if name.isdigit()] if LINUX else []


def descendants() -> "set[int]":
    """Every process below this one; orphans are ours too, by pid 1's office or PR_SET_CHILD_SUBREAPER."""
    parents, found, more = {}, set(), {os.getpid()}
    for pid in processes():
        try:
            with open(f"/proc/{pid}/stat", "rb") as f:
                parents[pid] = int(f.read().rpartition(b")")[2].split()[1])
        except OSError:
            pass  # it has just ended
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - found
        found |= more
    return found


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
    try:
        os.kill(-1 if room.isolated else -group, signal.SIGKILL)  # -1: all but us, as we are pid 1 of a namespace
    except (ProcessLookupError, PermissionError):
        pass
    while True:
        try:
            ended, _ = os.waitpid(-1, 0 if room.isolated else os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:  # it has left its group
            for pid in descendants():
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)


def clear(room: types.SimpleNamespace) -> None:
    """Empty the working folder."""
    if room.isolated:
        libc("umount2", room.box, 2)
        mount("tmpfs", room.box, "tmpfs", NOSUID | NODEV, room.box_options)
    else:  # rm can remove what is too deep for shutil.rmtree
        script = 'chmod -R u+rwX "$0"; cd "$0" && rm -rf -- ..?* .[!.]* *; chmod 700 "$0"'
        os.spawnl(os.P_WAIT, "/bin/sh", "sh", "-c", script, room.box)
    room.clean = os.stat(room.box).st_ctime_ns


def warm_up() -> None:
    """Do once what every child would have to do, as each is a copy of this process."""
    site.setquit()
    sys.argv, sys.path[0] = ["solution.py"], ""
    sys.setrecursionlimit(50_100)  # LiveCodeBench's 50,000, all of them for the program itself
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(50_000)
    source, sink, errors = (open(fd, mode, closefd=False) for fd, mode in ((0, "rb"), (1, "wb"), (2, "wb")))
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(source, "utf-8", "surrogateescape", newline="\n")
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(sink, "utf-8", "replace")
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(errors, "utf-8", "backslashreplace", line_buffering=True)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__, main.__file__ = sys.modules["builtins"], "solution.py"
    compile("import math\ndef f(x):\n    return [x for x in x]\nprint(f([1]))", "<warm>", "exec")
    gc.collect()
    gc.freeze()


def start_server(control_fd: str, mode: str, *paths: str) -> None:
    """The script's main. A launcher makes the namespaces, forks the server and clears up after it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    control, isolated = socket.socket(fileno=int(control_fd)), mode == "isolated"
    box = "/box" if isolated else f"/tmp/dust-box-{os.getpid()}-{os.urandom(8).hex()}"
    sys.path += paths[1:]
    visible = sorted({os.path.abspath(path) for path in (*VISIBLE.split(), sys.base_prefix, *paths)} - {"/"}, key=len)
    try:
        if LINUX:
            libc("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
            libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: a setuid program gives nothing
        uid = enter_namespaces() if isolated else 0
        server = os.fork()
        if server == 0:
            if LINUX:
                libc("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
                libc("prctl", 36, 1, 0, 0, 0)
            room = furnish(isolated, uid, box, visible, control)
            room.prelude = prelude()
            warm_up()
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


if SERVER:
    start_server(*sys.argv[1:])
    os._exit(0)  # the rest of this file is the caller's

# --------------------------------------------------------------------------------------------- the caller: workers


class _WorkerDied(Exception):
    pass


class _Worker:
    """A fork server, and the socket to it."""

    alive: "set[_Worker]" = set()
    mode, why = "isolated", ""  # "plain" once it is known why this system gives us no namespaces

    def __init__(self):
        self.owner, hello = os.getpid(), self._start()
        if hello[:1] != b"+" and _Worker.mode == "isolated":
            self.close()
            _Worker.mode, _Worker.why = "plain", hello[1:].decode() or "the server died"
            hello = self._start()
        if hello[:1] != b"+":
            self.close()
            raise SandboxError(f"sandbox: cannot start a worker: {hello[1:].decode() or 'it died'}")
        if _Worker.why:
            print(f"sandbox: no namespaces ({_Worker.why}), so {hello[1:].decode()}", file=sys.stderr)
            _Worker.why = ""  # said once

    def _start(self) -> bytes:
        """Start the server. Returns its first word: + and what is missing, or - and why it cannot."""
        places = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        self.socket, theirs = socket.socketpair()
        command = [sys.executable, "-S", "-s", os.path.abspath(__file__), str(theirs.fileno()), _Worker.mode]
        try:
            null = subprocess.DEVNULL
            self.process = subprocess.Popen([*command, sys.prefix, *places], stdin=null, stdout=null, stderr=null, cwd="/",
                                            env=ENVIRONMENT, pass_fds=[theirs.fileno()], start_new_session=True)
        except OSError as error:
            raise SandboxError(f"sandbox: cannot start a worker: {error}") from None
        finally:
            theirs.close()
        _Worker.alive.add(self)
        self.socket.settimeout(60)
        return self.socket.recv(400)

    def run(self, files: "list[int]", timeout: float, memory_mb: int, call: bool, cached: bool) -> tuple:
        """One run on stdin, stdout, stderr, source and, where there are such, cache and result."""
        try:
            socket.send_fds(self.socket, [REQUEST.pack(timeout, memory_mb << 20, call, cached)], files)
            self.socket.settimeout(timeout + (10 if _Worker.mode == "isolated" else 0.9))  # plain ones can be stopped
            reply = self.socket.recv(REPLY.size)
        except OSError:
            reply = b""
        if not reply:
            raise _WorkerDied
        how, code, seconds, failure = REPLY.unpack(reply)
        if how == b"!":
            raise SandboxError("sandbox: " + failure.rstrip(b"\0").decode("utf-8", "replace"))
        return how, code, seconds

    def usable(self) -> bool:
        return self.owner == os.getpid() and not select.select([self.socket], [], [], 0)[0]

    def close(self) -> None:
        """End the server and what it runs. Also wakes a thread that waits for it."""
        _Worker.alive.discard(self)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        if self.owner == os.getpid():
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:  # a candidate can have stopped it where there are no namespaces
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def _memory_file(stack: "contextlib.ExitStack", data: bytes = b"") -> int:
    """A descriptor of a file without a name, closed with the stack."""
    try:
        if LINUX:
            fd = os.memfd_create("sandbox")
            stack.callback(os.close, fd)
        else:
            fd = stack.enter_context(tempfile.TemporaryFile()).fileno()
        written = 0
        while written < len(data):
            written += os.pwrite(fd, memoryview(data)[written:], written)
        return fd
    except OSError as error:
        raise SandboxError(f"sandbox: cannot make a memory file: {error}") from None


def _status(how: bytes, code: int, longest: int, stderr: str) -> str:
    if longest >= OUTPUT_CAP:
        return "output"
    if how == b"t" or code == -signal.SIGXCPU:
        return "timeout"
    if how == b"m" or code and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        return "memory"
    return "error" if code else "ok"


# ----------------------------------------------------------------------------------------- the caller: the verdict


def difference(expected: str, got: str) -> str:
    """Why an output is wrong, or "": line by line as LiveCodeBench does it, as text or as exact decimals."""
    wanted, lines = ([line.strip() for line in text.strip().split("\n")] for text in (expected, got))
    for i, (want, line) in enumerate(zip(wanted, lines), 1):
        if want != line and not same_decimals(want, line):
            return f"line {i} should be {want[:60]!r}, not {line[:60]!r}"
    return "" if len(wanted) == len(lines) else f"{len(lines)} lines, not {len(wanted)}"


def same_decimals(want: str, line: str) -> bool:
    try:
        return [decimal.Decimal(item) for item in want.split()] == [decimal.Decimal(item) for item in line.split()]
    except (ArithmeticError, ValueError):
        return False  # no number, a signalling NaN or an absurd exponent


def same_value(expected: Any, answer: bytes) -> bool:
    """Is this the JSON of the expected value? It comes from the candidate's process and can be anything."""
    wanted = json.dumps(encode(expected))
    try:
        return len(answer) < 32 * len(wanted) + 1024 and decode(json.loads(answer)) == decode(json.loads(wanted))
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _source(code: str) -> "tuple[bytes, Result | None]":
    """What to compile, and the result if that is hopeless."""
    try:
        source, why = code.encode(), "the source holds a NUL" if "\0" in code else ""
    except UnicodeEncodeError:
        source, why = b"", "the source is not Unicode"
    return source, Result("refused", "", why, None, 0.0) if why else None


def run(code: str, stdin: str = "", *, timeout: float = 10.0, memory_mb: int = 1024) -> Result:
    """Run a program once."""
    source, refused = _source(code)
    with contextlib.ExitStack() as stack:
        data = stdin.encode("utf-8", "replace")
        return refused or _shared.run([_memory_file(stack, source)], data, timeout, memory_mb)[0]


def judge(code: str, tests: "list[dict]", *, timeout: float = 10.0, memory_mb: int = 1024) -> Verdict:
    """Does the program pass every test? The timeout is for each; the first that fails is the last that is run.

    A test is {"input": ..., "output": ...} or {"fn_name": ..., "args": [...], "expected": ...}.
    """
    return _judge(_shared, code, tests, timeout, memory_mb)


def _judge(pool: "Pool", code: str, tests: "list[dict]", timeout: float, memory_mb: int) -> Verdict:
    if not tests:
        raise ValueError("sandbox: a program without tests has no label")
    source, refused = _source(code)
    if refused:
        return Verdict(False, [refused], 0, f"test 0: {refused.stderr}")
    results = []
    with contextlib.ExitStack() as stack:
        files = [_memory_file(stack, source)] + ([_memory_file(stack)] if len(tests) > 1 else [])
        for i, test in enumerate(tests):
            if "fn_name" in test:
                key = os.urandom(16)
                call = marshal.dumps((test["fn_name"], list(test["args"]), key))
                result, answer = pool.run(files, call, timeout, memory_mb, call=True)
                right = answer[:16] == key and same_value(test["expected"], answer[16:])
                wrong = "" if right else "the function did not return what it should"
            else:
                result, _ = pool.run(files, test["input"].encode("utf-8", "replace"), timeout, memory_mb)
                wrong = difference(test["output"], result.stdout) if result.status == "ok" else ""
            results.append(result)
            if result.status != "ok" or wrong:
                return Verdict(False, results, i, f"test {i}: {wrong if result.status == 'ok' else result.status}")
    return Verdict(True, results, None, "")


class Pool:
    """Judges many programs at once. Without a number it takes a worker for each core."""

    def __init__(self, workers: int = 0, *, timeout: float = 10.0, memory_mb: int = 1024):
        self.workers, self.timeout, self.memory_mb = workers or os.cpu_count() or 1, timeout, memory_mb
        self._idle, self._busy, self._stopped = [], set(), False

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc: Any) -> None:
        """End the workers and what they run. The pool can be used again."""
        self._stopped = True
        for worker in [*self._busy, *self._idle]:
            worker.close()
        self._idle.clear()

    def label(self, jobs: "Iterable[tuple[str, list]]") -> "list[bool]":
        """Whether each (code, tests) passes, in order."""
        verdicts = {verdict.job: verdict.passed for verdict in self.judge(jobs)}
        return [verdicts[job] for job in range(len(verdicts))]

    def judge(self, jobs: "Iterable[tuple[str, list]]") -> Iterator[Verdict]:
        """Yield the Verdict of each (code, tests) as it is reached; its `job` says which it is."""
        waiting, done, count = queue.SimpleQueue(), queue.SimpleQueue(), 0
        for count, job in enumerate(jobs, 1):
            waiting.put(job + (count - 1,))

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while not self._stopped:
                    code, tests, job = waiting.get_nowait()
                    try:
                        done.put(_judge(self, code, tests, self.timeout, self.memory_mb)._replace(job=job))
                    except BaseException as error:
                        done.put(error)

        self._stopped = False
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self.workers, count))]
        try:
            for thread in threads:
                thread.start()
            for _ in range(count):
                verdict = done.get()
                if isinstance(verdict, BaseException):
                    raise verdict
                yield verdict
        except BaseException:  # Ctrl-C, a failure, or the caller has seen enough: nothing may go on
            self.__exit__()
            raise
        finally:
            for thread in threads:
                thread.join()

    @contextlib.contextmanager
    def _borrow(self) -> "Iterator[_Worker]":
        """An idle worker, or a new one. Whatever goes wrong meanwhile is the worker's end."""
        worker = None
        with contextlib.suppress(IndexError):
            while not worker or not worker.usable():
                worker = self._idle.pop()
        if not worker or not worker.usable():
            worker = _Worker()
        self._busy.add(worker)
        try:
            if self._stopped:
                raise SandboxError("sandbox: the pool was closed")
            yield worker
            self._idle.append(worker)
        except BaseException:
            worker.close()
            raise
        finally:
            self._busy.discard(worker)

    def run(self, source: "list[int]", stdin: bytes, timeout: float, memory_mb: int, call: bool = False) -> tuple:
        """Run once. source: the program's file, and one for compiled code. Returns a Result and a call's answer."""
        with contextlib.ExitStack() as stack:
            streams = [_memory_file(stack, stdin), _memory_file(stack), _memory_file(stack)]
            files = streams + source + ([_memory_file(stack)] if call else [])
            for attempt in (1, 2):  # twice, as a worker can also die by an accident
                try:
                    with self._borrow() as worker:
                        how, code, seconds = worker.run(files, timeout, memory_mb, call, len(source) > 1)
                    break
                except _WorkerDied:
                    how, code, seconds = b"k", -signal.SIGKILL, 0.0  # both times: the program does it
            outputs = [os.pread(fd, OUTPUT_CAP, 0) for fd in (*streams[1:], files[-1])]
        out, err = (data.decode("utf-8", "replace") for data in outputs[:2])
        status = _status(how, code, max(map(len, outputs[: 2 + call])), err)
        return Result(status, out, err, code if how in b"xk" else None, seconds), outputs[2]


def _after_fork() -> None:
    """A fork of the caller lets go of its workers: if it held their sockets, they would not see the caller die."""
    for worker in _Worker.alive:
        worker.socket.close()
    _Worker.alive.clear()
    _shared.__init__(1)


_shared = Pool(1)  # for run and judge
os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: [worker.close() for worker in list(_Worker.alive)])
