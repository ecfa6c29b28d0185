"""The other half of sandbox.py: a fork server, and the room in which it lets one candidate after another run.

It is a program of its own: sandbox.py starts it in a small clean interpreter, without the caller's modules, memory and
secrets, and each run is a fork of it. It never learns an expected value, so nothing that happens here can decide a
verdict. From top to bottom: the room (namespaces, Landlock, limits), the life of a child, the server's loop.

A request is a timeout, a memory limit and five memory files: the program, its stdin, stdout and stderr, and a ledger
that brings the tests' inputs and takes back, a line each, what was returned or printed. Where asserts judge, a sixth
is a socket between two workers' children: one runs the asserts, the other the program that they call.
"""
import ast
import atexit
import builtins
import collections
import ctypes
import functools
import gc
import io
import json
import marshal
import os
import re
import resource
import select
import signal
import site
import socket
import struct
import sys
import time
import types
from typing import Any, BinaryIO, Iterator

LINUX = sys.platform == "linux"
OUTPUT_CAP = 16 << 20  # bytes of stdout, of stderr, of the ledger and of any one file
PROCESSES = 64  # processes and threads in one run
RECURSION = 50_100  # LiveCodeBench's 50,000, all of them for the program itself
ONE_AFTER_ANOTHER = 1.0  # seconds that a plain program's tests may take in one process
REQUEST = struct.Struct("<d Q")  # timeout, memory in bytes
REPLY = struct.Struct("<c i d 200s")  # x exit, t timeout, m memory, ! failure; exit code; seconds; what failed


KINDS = {"tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes, "iter": Iterator}  # besides JSON's own
EXCEPTIONS = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}
MAKERS = {**KINDS, "iter": iter, "dict": dict, "complex": complex, "int": lambda digits: int(digits, 16)}


def encode(value: Any, exact: bool = False) -> Any:
    """A value as a JSON tree: tuples are lists, numpy scalars numbers; dicts and long ints keep their meaning.
    If exact, decode() makes each part anew, of its own kind; what derives from a kind is that kind.
    """
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, list) or isinstance(value, tuple) and not exact:
        return [encode(item, exact) for item in value]
    if isinstance(value, dict):
        items = [[encode(key, exact), encode(item, exact)] for key, item in value.items()]
        return {"dict": items if exact else sorted(items, key=json.dumps)}
    if exact and isinstance(value, complex):
        return {"complex": str(value)}
    for name, kind in KINDS.items() if exact else ():
        if isinstance(value, kind):
            return {name: [encode(item, exact) for item in value]}
    if isinstance(value, int) and value.bit_length() > 1000:
        return {"int": hex(value)}  # as a decimal it takes quadratic time, and Python refuses
    if value is None or isinstance(value, (int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def decode(tree: Any) -> Any:
    """The value of an exact tree. It may come from a candidate: nothing but plain values and exceptions can result."""
    if isinstance(tree, dict):
        [(kind, parts)] = tree.items()
        return MAKERS[kind](decode(parts))
    return [decode(part) for part in tree] if isinstance(tree, list) else tree


# ----------------------------------------------------------------------------------------------------- the room

READ_ONLY, NOSUID, NODEV, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 1 << 14, 1 << 18  # mount(2)
MOUNTS, IPC, USERS, PIDS, NETWORK = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30  # unshare(2)
READABLE = "/usr /lib /lib64 /bin /etc/ld.so.cache /etc/localtime /etc/alternatives " \
    "/dev/null /dev/zero /dev/random /dev/urandom"
LIBC = ctypes.CDLL(None, use_errno=True)
NO_CAPABILITIES = struct.pack("Ii", 0x20080522, 0)


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


def build_root(paths: "list[str]", box_options: str) -> None:
    """Exchange all files for the given ones, read-only, and an empty folder /box."""
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
            kept = os.statvfs(target).f_flag & 8  # a user namespace may not take a noexec away
            mount(None, target, None, REMOUNT | BIND | READ_ONLY | NOSUID | NODEV | kept)
    links = {"tmp": "box", "dev/shm": "../box", "dev/fd": "/proc/self/fd", "dev/stdin": "fd/0", "dev/stdout": "fd/1"}
    for name in links.keys() - set(os.listdir()):
        os.symlink(links[name], name)
    mount("proc", "proc", "proc", NOSUID | NODEV)
    for name, value in (("shmmni", "0"), ("msgmni", "0"), ("sem", "1 0 1 0")):
        write("proc/sys/kernel/" + name, value)  # no System V objects: they outlive the processes that make them
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
    for path in filter(os.path.exists, [*writable, *readable]):
        rights = files if path in writable else 0b1101  # execute, read a file, read a folder
        inode = os.open(path, os.O_PATH)
        libc("syscall", 445, ruleset, 1, struct.pack("=Qi", rights if os.path.isdir(path) else rights & 7, inode), 0)
        os.close(inode)
    return ruleset


def choose_user(room: types.SimpleNamespace) -> None:
    """Who candidates are, and the process limit that holds for that user."""
    with open("/proc/self/uid_map") as f:
        _, _, size = f.read().split()
    if size == "1":  # a user namespace of our own, where processes are counted anew
        return
    if os.getuid():  # this limit counts all that the user runs
        mine = [pid for pid in os.listdir("/proc") if pid.isdigit() and os.stat(f"/proc/{pid}").st_uid == os.getuid()]
        room.limits["NPROC"] += sum(len(os.listdir(f"/proc/{pid}/task")) for pid in mine)
        return
    # a uid for this worker alone, as processes are counted by uid: no worker's bomb may starve another worker
    room.user = (1 << 30 if size == "4294967295" else 10_000) + int.from_bytes(os.urandom(2), "little") % 50_000
    if not room.isolated:  # then Python may be root's alone: the new user reads and writes files as root does
        os.seteuid(room.user)
        room.root_files = not os.access(os.__file__, os.R_OK, effective_ids=True)
        os.seteuid(0)


def furnish(isolated: bool, box: str, paths: "list[str]", control: socket.socket) -> types.SimpleNamespace:
    """Build the room that a worker's candidates run in. room.missing says what this system does not give."""
    room = types.SimpleNamespace(isolated=isolated, box=box, control=control.fileno(), user=0, root_files=False,
                                 ruleset=None, missing="")
    room.limits = {"FSIZE": OUTPUT_CAP, "NPROC": PROCESSES, "NOFILE": 256, "CORE": 0, "MSGQUEUE": 0,
                   "STACK": 120 << 20}  # Linux keeps 128 MB free below a stack
    if LINUX:
        choose_user(room)
    owner = 0 if room.root_files else room.user
    room.box_options = f"size=64m,nr_inodes=4096,mode=700,uid={owner},gid={owner}"
    paths = sorted({*READABLE.split(), *paths}, key=len)  # a folder before what is in it
    if isolated:
        build_root(paths, room.box_options)
    else:
        os.mkdir(box, 0o700)
        os.chown(box, owner or -1, owner or -1)
        room.missing = "candidates can see other processes"
        try:
            room.ruleset = landlock(paths, [box, "/dev/null", "/dev/zero"])
        except (OSError, AttributeError):
            room.missing += ", the network and all files that you can read; only the limits hold"
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
            resource.setrlimit(which, (limit, hard if name == "STACK" else limit))  # programs like to raise that one
    if room.user:
        if room.root_files:
            libc("prctl", 28, 4, 0, 0, 0)  # PR_SET_SECUREBITS: no change of user changes what the next lines do
        os.setgroups([])
        os.setresgid(room.user, room.user, room.user)
        os.setresuid(room.user, room.user, room.user)
        if room.root_files:
            libc("setfsuid", 0)
    if LINUX and (room.root_files or not room.user):
        libc("syscall", 126, NO_CAPABILITIES, bytes(24))  # capset(2)
    if room.ruleset:
        libc("syscall", 446, room.ruleset, 0)
        os.close(room.ruleset)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # too much output ends the program
    for fd in (*streams, room.control):
        os.close(fd)


# ----------------------------------------------------------------------------------------------- a child's life

# What a plain program is made of; whatever is not listed here makes a program one that is not plain.
NODES = "Module FunctionDef ClassDef Return Delete Assign AugAssign AnnAssign For While If Raise Try Assert " \
    "Import ImportFrom Global Nonlocal Expr Pass Break Continue NamedExpr BoolOp BinOp UnaryOp Lambda IfExp Dict Set " \
    "ListComp SetComp DictComp GeneratorExp Compare Call FormattedValue JoinedStr Constant Attribute Subscript " \
    "Starred Name List Tuple Slice comprehension ExceptHandler arguments arg keyword alias"
CAUGHT = "EOFError IndexError KeyError NameError OverflowError StopIteration TypeError ValueError ZeroDivisionError"
BUILTINS = CAUGHT + " abs all any ascii bin bool bytearray bytes callable chr classmethod complex dict divmod " \
    "enumerate exit filter float format frozenset hash hex input int isinstance issubclass iter len list map max min " \
    "next oct ord pow print property quit range repr reversed round set slice sorted staticmethod str sum tuple zip"
MODULES = {  # and the names in them that leave no trace
    "math": "*", "itertools": "*", "heapq": "*", "bisect": "*", "operator": "*", "copy": "copy deepcopy",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits punctuation",
    "collections": "Counter OrderedDict defaultdict deque namedtuple",
    "functools": "cache cmp_to_key lru_cache partial reduce",
    "sys": "exit maxsize setrecursionlimit stderr stdin stdout",
    "typing": "Any Callable Deque Dict Generator Iterable Iterator List Optional Sequence Set Tuple Union",
}
STREAMS = "buffer flush read readline readlines write writelines"
OWN_NAMES = ("_", "__name__")
BY_NAME = {"attrgetter", "methodcaller", "format", "format_map"}  # these read whatever attribute a text names
FIELD = re.compile(r"\{\{|\}\}|\{[0-9a-zA-Z]*(![rsa])?(:[^{}]*)?\}")  # of a format that reads none


def is_safe(module: str, name: str) -> bool:
    names = MODULES.get(module, "")
    return name not in BY_NAME and (names == "*" or name in names.split())


def plain_sets(prelude: "dict[str, str]") -> types.SimpleNamespace:
    """What is_plain compares with: kinds of nodes and attributes that may occur, and names that may not."""
    operators = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
    values = (str, bytes, bytearray, int, float, list, tuple, dict, set, frozenset, range, collections.deque)
    inner = (types.FrameType, types.TracebackType, types.GeneratorType, types.CodeType, type, io.TextIOWrapper,
             io.BufferedRandom, io.BytesIO)

    def is_foreign(name: str, module: str) -> bool:  # a name of the prelude that does not come from MODULES
        constant = isinstance(getattr(sys.modules.get(module), name, None), (str, int, float, tuple))
        return module not in MODULES if name == module else not constant and not is_safe(module, name)

    safe = {name for module in MODULES for name in vars(sys.modules[module]) if is_safe(module, name)}
    safe.update(STREAMS.split(), ["most_common", "move_to_end"], *map(dir, values))
    return types.SimpleNamespace(
        nodes={kind for name, kind in vars(ast).items() if name in NODES.split() or (
            isinstance(kind, type) and issubclass(kind, operators))},
        attributes=safe - BY_NAME, barred_methods={name for kind in inner for name in dir(kind)} | {"register"},
        barred_names={name for name in dir(builtins) if name not in BUILTINS.split()}.union(
            name for name, module in prelude.items() if is_foreign(name, module)))


def is_plain(source: str, sets: types.SimpleNamespace) -> bool:
    """Can this program leave nothing behind in its process, so that its next test may run there too?

    It is made of NODES, BUILTINS, MODULES, methods of plain values and names of its own; it sets no attribute, has no
    name with an underscore in front, and catches no error that the state of a process can cause. Cautious: False for
    many programs that would do no harm; they pay with a process for each test.
    """
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (RecursionError, MemoryError):  # deeper than a tree may be, though not than code may
        return False
    methods = {node.name for node in nodes if type(node) is ast.FunctionDef} - sets.barred_methods
    for node in nodes:
        kind = type(node)
        if kind not in sets.nodes:
            return False
        if kind is ast.Attribute:
            literal = getattr(node.value, "value", None) if type(node.value) is ast.Constant else None
            formats = node.attr == "format" and isinstance(literal, str) and not set("{}") & set(FIELD.sub("", literal))
            known = formats or node.attr in sets.attributes or node.attr in methods
            if type(node.ctx) is not ast.Load or not known or node.attr[0] == "_":
                return False
        elif kind is ast.Import and not all(alias.name in MODULES for alias in node.names):
            return False
        elif kind is ast.ImportFrom and not all(is_safe(node.module or "", alias.name) for alias in node.names):
            return False  # `*` is a name, too: of the modules where all names are safe
        elif kind is ast.ExceptHandler:
            caught = node.type.elts if type(node.type) is ast.Tuple else [node.type]
            if not all(type(each) is ast.Name and each.id in CAUGHT.split() for each in caught):
                return False
        if kind not in (ast.Attribute, ast.Constant):  # every name there is, wherever the grammar has one
            for _, value in ast.iter_fields(node):
                for name in value if type(value) is list else [value]:
                    if type(name) is str and (name in sets.barred_names or name[:1] == "_") and name not in OWN_NAMES:
                        return False
    return True


def names_in(code: types.CodeType) -> "set[str]":
    """Every global or attribute that a code object, or one inside it, mentions."""
    return set(code.co_names).union(*(names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def load(program: int, room: types.SimpleNamespace, more: bool) -> "tuple[types.CodeType, bool]":
    """A program's code, and whether its tests may share a process, where there is more than one.

    If they may not, the code takes the place of the source: the first byte says so to the caller, and no later run has
    to compile it. No candidate has run yet, and none gets this file.
    """
    data = os.pread(program, os.fstat(program).st_size, 0)
    if data[:1] == b"c":
        return marshal.loads(data[1:]), False
    source = data[1:].decode()
    code = compile(source, "<solution>", "exec", dont_inherit=True)
    plain = more and is_plain(source, room.sets)
    if more and not plain:
        os.pwrite(program, b"c" + marshal.dumps(code), 0)
    return code, plain


def execute(code: types.CodeType, prelude: "dict[str, str]", call: "tuple | None", wire: "BinaryIO | None") -> str:
    """Run a program as __main__; call its function, if one is asked for. Returns the JSON of what that returned.

    With a wire: answer run_asserts(). What is no answer (an exit, no plain value) ends this process, and so the test.
    """
    main = sys.modules["__main__"]
    for name in names_in(code) & prelude.keys():
        module = __import__(prelude[name])
        setattr(main, name, module if name == prelude[name] else getattr(module, name))
    if call or wire:
        main.__name__ = "solution"  # what stands under `if __name__ == "__main__"` is no part of a function's test
        sys.modules["solution"] = main
    try:
        exec(code, vars(main))
    except SystemExit as error:
        if call or wire or error.code is not None and not (type(error.code) is int and error.code == 0):
            raise
    solution = getattr(main, "Solution", None)
    find = lambda name: getattr(solution(), name) if hasattr(solution, name) else getattr(main, name)
    if call:
        return json.dumps(encode(find(call[0])(*call[1])), separators=(",", ":"))
    functions = [key for key, item in vars(main).items() if wire and callable(item)]
    while question := wire and wire.readline():
        name, arguments, named = decode(json.loads(question))
        try:
            answer = [find(name)(*arguments, **named) if name else functions]
        except Exception as error:
            answer = [kind.__name__ for kind in type(error).__mro__], str(error)
        wire.write(json.dumps(encode(answer, exact=True)).encode() + b"\n")
        wire.flush()
    return ""


def run_asserts(code: types.CodeType, entry_point: str, wire: BinaryIO) -> str:
    """Run asserts with a stand-in for each function of the program, which asks the process where the program is.

    A name that is a builtin's, or that the asserts bind themselves, is never the program's; and there is no prelude, or
    gcd(4, 6) would be right without a program.
    """
    def ask(name: str, *arguments: Any, **named: Any) -> Any:
        try:
            wire.write(json.dumps(encode((name, arguments, named), exact=True)).encode() + b"\n")
            wire.flush()
            line = wire.readline()
        except OSError:
            line = b""
        if not line:
            print("the program ended before it had answered", file=sys.stderr, flush=True)
            os._exit(1)  # as asserts could catch an exception
        answer, *text = decode(json.loads(line))
        if not text:
            return answer
        raise next(vars(builtins)[kind] for kind in answer if kind in EXCEPTIONS)(*text)
    main = sys.modules["__main__"]
    for name in {entry_point} | names_in(code) & set(ask("")) - vars(main).keys() - vars(builtins).keys():
        setattr(main, name, functools.partial(ask, name))
    exec(code, vars(main))
    return "true"


def play(room: types.SimpleNamespace, files: "list[int]", timeout: float, memory: int, complain: int) -> None:
    """A child's whole life. Nothing here is trusted once the code of a candidate has begun that is not plain."""
    status, leave, say = 1, os._exit, os.write
    try:
        program, *streams, ledger = files[:5]
        try:
            enter(room, streams, timeout, memory)
        except BaseException as error:
            say(complain, str(error).encode())
            leave(1)
        try:
            os.close(complain)
            key, tests = marshal.loads(os.pread(ledger, os.fstat(ledger).st_size, 0))
            os.ftruncate(ledger, 0)
            code, plain = load(program, room, len(tests) > 1)
            os.close(program)
            if plain:
                play_all(room, code, tests, ledger, min(timeout, ONE_AFTER_ANOTHER))
            call = tests[0] if isinstance(tests[0], tuple) else None
            if not call:
                os.close(ledger)
            wire = socket.socket(fileno=files[5]).makefile("rwb") if files[5:] else None
            answer = run_asserts(code, call[0], wire) if wire and call else execute(code, room.prelude, call, wire)
            if call:
                os.pwrite(ledger, key + answer.encode(), 0)
            status = 0
        except SystemExit as error:
            status = error.code & 255 if isinstance(error.code, int) else 1
            if not isinstance(error.code, int):
                print(error.code, file=sys.stderr)
        except MemoryError as error:
            error.__traceback__ = None  # frees what the program holds, so that there is memory to go on with
            vars(sys.modules["__main__"]).clear()
            say(2, b"MemoryError\n")
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


def play_all(room: types.SimpleNamespace, code: types.CodeType, tests: list, ledger: int, seconds: float) -> None:
    """A plain program's tests, each as if the process were new, as many as end well within some seconds.

    Writes a line for each into the ledger: seconds, stdout, stderr, answer. Where one fails we leave: it will be run
    again, alone.
    """
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends us
        os.lseek(ledger, 0, os.SEEK_SET)
        for test in tests:
            start, call = time.monotonic(), test if isinstance(test, tuple) else None
            new_main()
            sys.setrecursionlimit(RECURSION)
            out, err = io.BytesIO(), io.BytesIO()
            open_streams(io.BytesIO(b"" if call else test), out, err)
            answer = execute(code, room.prelude, call, None)
            flush()
            outputs = (stream.getvalue().decode("utf-8", "replace") for stream in (out, err))
            os.write(ledger, json.dumps([time.monotonic() - start, *outputs, answer]).encode() + b"\n")
    finally:
        os._exit(0)


def new_main() -> None:
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__, main.__file__ = builtins, "solution.py"


def open_streams(stdin: Any, stdout: Any, stderr: Any) -> None:
    """sys.stdin, stdout and stderr as Python opens them, on these buffers."""
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(stdin, "utf-8", "surrogateescape", newline="\n")
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(stdout, "utf-8", "replace")
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(stderr, "utf-8", "backslashreplace", line_buffering=True)
    sys.stdin.mode, sys.stdout.mode, sys.stderr.mode = "r", "w", "w"


def finish() -> None:
    """What Python does at its end: join threads, run atexit, close the files left open, flush."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    flush()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    vars(sys.modules["__main__"]).clear()
    flush()


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()


# --------------------------------------------------------------------------------------------- the server's loop


def serve(control: socket.socket, room: types.SimpleNamespace) -> None:
    """Run what is asked for, one at a time, until the caller is gone or a candidate has changed our limits."""
    which = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    limits = [resource.getrlimit(each) for each in which]
    while [resource.getrlimit(each) for each in which] == limits:
        request, files, _, _ = socket.recv_fds(control, REQUEST.size, 6, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
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
    start, (complaints, complain) = time.monotonic(), os.pipe()  # for a child that could not even enter
    child = os.fork()
    if child == 0:
        os.close(complaints)
        play(room, files, timeout, memory, complain)
    os.close(complain)
    try:
        how, code = watch(control, room, child, start + timeout, memory)
    finally:
        sweep(room, child)
    seconds, complaint = time.monotonic() - start, os.read(complaints, 200)
    os.close(complaints)
    if os.stat(room.box).st_ctime_ns != room.clean:
        clear(room)
    return b"!" if complaint else how, code, seconds, complaint


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


def threads_of(pid: "int | str") -> "list[str]":
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []  # it has just ended, or this is not Linux


def descendants(pid: "int | str" = "self") -> "set[int]":
    """Every process below one; orphans are the server's too, by pid 1's office or PR_SET_CHILD_SUBREAPER."""
    found = set()
    try:
        for thread in threads_of(pid):
            with open(f"/proc/{pid}/task/{thread}/children") as f:
                found.update(map(int, f.read().split()))
    except OSError:
        pass  # it has just ended
    return found.union(*map(descendants, found))


def memory_of(pids: "set[int]") -> int:
    """Bytes that the processes hold in memory: each its share (PSS) of what it maps, and files without a name."""
    shares, files = {}, {}
    for pid in pids:
        for thread in threads_of(pid):
            try:  # each thread: the first one may be gone, and another may have other files
                with open(f"/proc/{pid}/task/{thread}/smaps_rollup") as f:
                    shares.update({pid: int(line.split()[1]) << 10 for line in f if line.startswith("Pss:")})
                for fd in os.listdir(f"/proc/{pid}/task/{thread}/fd"):
                    about = os.stat(f"/proc/{pid}/task/{thread}/fd/{fd}")
                    files[about.st_ino] = 0 if about.st_nlink else about.st_blocks * 512
            except OSError:
                pass  # it has just ended
    return sum(shares.values()) + sum(files.values())


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
        names.update((name, module.__name__) for name in public if not hasattr(builtins, name))
    return {**names, **{module: module for module in [*late, *early.split()]}}


def warm_up(room: types.SimpleNamespace) -> None:
    """Do once what every child would have to do, as each is a copy of this process."""
    room.prelude = prelude()
    room.sets = plain_sets(room.prelude)
    site.setquit()
    sys.argv, sys.path[0] = ["solution.py"], ""
    sys.setrecursionlimit(RECURSION)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(50_000)
    open_streams(*(open(fd, mode, closefd=False) for fd, mode in ((0, "rb"), (1, "wb"), (2, "wb"))))
    new_main()
    source = "import math\ndef f(x):\n    return [x for x in x]\nprint(f([1]))"
    is_plain(source, room.sets)
    compile(source, "<warm>", "exec")
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
    readable = [path for path in map(os.path.abspath, (sys.base_prefix, *paths)) if path != "/"]
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
