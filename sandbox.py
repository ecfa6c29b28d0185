"""Runs programs that a model wrote and says whether they pass: every reward in DuST comes from here.

A worker is a fork server (sandbox_server.py): it forks a child for each run. Source, inputs and outputs are memory
files that travel over a socket; expected values never leave this process.

Covered on every system:
- The verdict is made here, from what was printed or returned and the exit status that the kernel reports. Patched
  builtins, os._exit(0), a fake ==, bytes in the result channel: nothing turns a wrong answer into a right one.
- Asserts run in a process of their own, which calls the program's functions in another one.
- Limits on wall clock, CPU, memory, output, file size and open files; an own folder, a bare environment, no inherited
  descriptors. Ctrl-C or the death of the caller ends what runs.
- Each test starts from a fresh state: in a new process, or, where the program is made of nothing that could leave a
  trace (`is_plain` in sandbox_server.py), in one that ran a test before; what fails there is run again in a new one.
- A failure of the sandbox itself is a SandboxError, never a label.
Covered on Linux: the memory and the number of processes of the whole tree, of which nothing outlives its run. Covered
where Linux allows namespaces (to root and to most users): no network, no sight of other processes, no files but Python,
/usr (both read-only) and an empty folder of 64 MB. Elsewhere Landlock does what it can (files, TCP, signals), and one
line on stderr says what is missing.

Not covered: holes in the kernel (no seccomp filter, no virtual machine) and side channels; memory in socket buffers
or in shared mappings that are mapped no more; counters and keyrings of the kernel, where a program that means to could
leave a sign for its next test; the order of a set of objects, which goes by their addresses. Without namespaces: the
disk space that many files take, and sockets with a path. macOS has the first list only, and there a process that leaves
its group outlives its run.
"""
import atexit
import contextlib
import decimal
import functools
import io
import json
import linecache
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Iterable, Iterator, NamedTuple

import sandbox_server
from sandbox_server import LINUX, OUTPUT_CAP, REPLY, REQUEST, encode

SHARED_INPUTS = 1 << 20  # bytes of input that may go along for a program's later tests
ENVIRONMENT = {  # all that candidates see, with HOME and TMPDIR; hashes repeat, so that labels do
    "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1",  # each arena and thread takes from RLIMIT_AS
}


class SandboxError(Exception):
    """The sandbox itself failed (cannot fork, disk full, ...). Never a label."""


class Result(NamedTuple):
    """One run of a program."""

    status: str  # ok, error, timeout, memory, output (too much of it) or refused (no source text at all)
    stdout: str
    stderr: str
    exit_code: "int | None"  # negative for a signal, None where the sandbox ended the run
    seconds: float


class Verdict(NamedTuple):
    """A program and its tests; true where it passed them all."""

    passed: bool
    results: "list[Result]"  # up to the first test that failed
    failed_test: "int | None"
    reason: str
    job: int = 0  # which of a Pool's jobs it judges

    def __bool__(self) -> bool:
        return self.passed


# --------------------------------------------------------------------------------------------------- the verdict


def difference(expected: str, got: str) -> str:
    """Why an output is wrong, or "": line by line as LiveCodeBench does it, as text or as exact decimals."""
    wanted, lines = ([line.strip() for line in text.strip().split("\n")] for text in (expected, got))
    for i, (want, line) in enumerate(zip(wanted, lines), 1):
        if want != line and not same_decimals(want, line):
            return f"line {i} should be {want[:60]!r}, not {line[:60]!r}"
    return "" if len(wanted) == len(lines) else f"{len(lines)} lines, not {len(wanted)}"


def same_decimals(want: str, line: str) -> bool:
    """Whether two lines are the same numbers, item by item, however they are written."""
    try:
        return [decimal.Decimal(item) for item in want.split()] == [decimal.Decimal(item) for item in line.split()]
    except (ArithmeticError, ValueError):
        return False  # no number, a signalling NaN or an absurd exponent


def same_value(expected: Any, answer: bytes) -> bool:
    """Is this the JSON of the expected value? It comes from the candidate's process and can be anything."""
    wanted = json.dumps(encode(expected))
    try:
        return len(answer) < 32 * len(wanted) + 1024 and json.loads(answer) == json.loads(wanted)
    except (ValueError, RecursionError):
        return False


def why_wrong(test: dict, result: Result, answer: bytes) -> str:
    """Why a run does not pass its test, or ""."""
    if result.status != "ok":
        return result.status
    if "fn_name" in test or "asserts" in test:
        return "" if same_value(test.get("expected", True), answer) else "the function did not return what it should"
    return difference(test["output"], result.stdout)


def run(code: str, stdin: str = "", *, timeout: float = 10.0, memory_mb: int = 1024) -> Result:
    """Run a program once. Raises SandboxError where the sandbox itself fails, ValueError for limits that are none."""
    with contextlib.ExitStack() as stack:
        program = _program(stack, code)
        return program if isinstance(program, Result) else _runs(
            _shared, program, [{"input": stdin}], timeout, memory_mb)[1][0][0]


def judge(code: str, tests: "list[dict]", *, timeout: float = 10.0, memory_mb: int = 1024) -> Verdict:
    """Does the program pass every test? The timeout is for each; the first that fails is the last that is run.

    A test is {"input": ..., "output": ...}, {"fn_name": ..., "args": [...], "expected": ...} or {"asserts": Python that
    calls the program's functions, "entry_point": the name of the one that counts, or ""}.
    """
    return _judge(_shared, code, tests, timeout, memory_mb)


def _judge(pool: "Pool", code: str, tests: "list[dict]", timeout: float, memory_mb: int) -> Verdict:
    if not tests:
        raise ValueError("sandbox: a program without tests has no label")
    results = []
    with contextlib.ExitStack() as stack:
        program = _program(stack, code)
        if isinstance(program, Result):
            return Verdict(False, [program], 0, f"test 0: {program.stderr}")
        sharing = not any("asserts" in test for test in tests)
        while len(results) < len(tests):
            left = tests[len(results) :] if sharing else tests[len(results) :][:1]
            sharing, runs = _runs(pool, program, left, timeout, memory_mb)
            for test, (result, answer) in zip(left, runs):
                wrong = why_wrong(test, result, answer)
                if wrong and sharing:
                    break
                results.append(result)
                if wrong:
                    failed = len(results) - 1
                    return Verdict(False, results, failed, f"test {failed}: {wrong}")
            sharing = sharing and len(runs) > 0 and not wrong  # what fails in a used process is run again in a new one
    return Verdict(True, results, None, "")


# ------------------------------------------------------------------------------------------------------ one run


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


def _program(stack: "contextlib.ExitStack", code: str) -> "int | Result":
    """The memory file of a program, or what is to be said where there is nothing to compile."""
    try:
        source, why = code.removeprefix("\ufeff").encode(), "the source holds a NUL" if "\0" in code else ""
    except UnicodeEncodeError:
        source, why = b"", "the source is not Unicode"
    return Result("refused", "", why, None, 0.0) if why else _memory_file(stack, b"s" + source)


def _run_asserts(pool: "Pool", program: int, test: dict, timeout: float, memory_mb: int) -> "tuple[Result, bytes]":
    """Run the asserts in one worker, and in another the program whose functions they call through a socket.

    So an exit, patched builtins or an object that equals everything do not touch the asserts. Only plain values and
    exceptions pass; what a function changes in its arguments is not seen.
    """
    def side(program: int, test: dict, end: socket.socket) -> "tuple[Result, bytes]":
        with end:  # the last of its copies: the other side learns that this one has ended
            return _runs(pool, program, [test], timeout, memory_mb, end.fileno())[1][0]

    with contextlib.ExitStack() as stack:
        asserts = _memory_file(stack, b"s" + test["asserts"].encode())
        for _ in range(2):  # as in _runs, but both sides anew: they would not find into the other's talk
            ours, theirs = socket.socketpair()
            with contextlib.suppress(_WorkerDied), ThreadPoolExecutor(1) as beside:
                answering = beside.submit(side, program, {"input": ""}, theirs)
                judged, answer = side(asserts, {"fn_name": test.get("entry_point", ""), "args": []}, ours)
                answered, _ = answering.result()
                return judged if answer or answered.status == "ok" else answered, answer
    return Result("error", "", "", -signal.SIGKILL, 0.0), b""


def _runs(pool: "Pool", program: int, tests: list, timeout: float, memory_mb: int, *wire: int) -> "tuple[bool, list]":
    """Run the first test, or as many as can share a process. Returns whether they did; a Result and an answer each."""
    if not (0 < timeout < 1e6 and memory_mb >= 1):
        raise ValueError("sandbox: timeout is a number of seconds above 0, memory_mb at least 1")
    if "asserts" in tests[0]:
        return False, [_run_asserts(pool, program, tests[0], timeout, memory_mb)]
    inputs, total = [], 0
    for test in tests:
        call = "fn_name" in test
        inputs.append((test["fn_name"], list(test["args"])) if call else test["input"].encode("utf-8", "replace"))
        total += len(marshal.dumps(inputs[-1]))
        if total > SHARED_INPUTS:
            inputs = inputs[:-1] or inputs
            break
    stdin = inputs[0] if isinstance(inputs[0], bytes) else b""
    key = os.urandom(16)
    ledger = marshal.dumps((key, inputs if inputs[1:] or not stdin else [b""]))
    for _ in range(2):  # twice, as a worker can also die by an accident
        with contextlib.ExitStack() as stack:
            files = [program, *(_memory_file(stack, data) for data in (stdin, b"", b"", ledger)), *wire]
            try:
                how, code, seconds = pool._play(files, timeout, memory_mb)
            except _WorkerDied:
                if wire:
                    raise
                how, code, seconds = b"k", -signal.SIGKILL, 0.0  # both times: the program does it
            outputs = [os.pread(fd, OUTPUT_CAP, 0) for fd in files[2:5]]
        if how != b"k":
            break
    if inputs[1:] and os.pread(program, 1, 0) == b"s":  # see load() in sandbox_server.py
        lines = [json.loads(line) for line in outputs[2].split(b"\n")[:-1]]
        return True, [(Result("ok", out, err, 0, spent), answer.encode()) for spent, out, err, answer in lines]
    out, err = (data.decode("utf-8", "replace") for data in outputs[:2])
    status = _status(how, code, max(map(len, outputs)), err)
    answer = outputs[2][len(key) :] if outputs[2].startswith(key) else b""
    return False, [(Result(status, out, err, code if how in b"xk" else None, seconds), answer)]


def _status(how: bytes, code: int, longest: int, stderr: str) -> str:
    if longest >= OUTPUT_CAP:
        return "output"
    if how == b"t" or code == -signal.SIGXCPU:
        return "timeout"
    if how == b"m" or code and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        return "memory"
    return "error" if code else "ok"


# ------------------------------------------------------------------------------------------------- many at a time


class _WorkerDied(Exception):
    pass


class _Worker:
    """A fork server, and the socket to it."""

    alive: "set[_Worker]" = set()
    mode, missing = "isolated", ""  # "plain" once it is known that this system gives us no namespaces

    def __init__(self):
        self.owner, hello, why = os.getpid(), self._start(), ""
        if hello[:1] != b"+" and _Worker.mode == "isolated":
            self.close()
            _Worker.mode, why = "plain", f"no namespaces ({hello[1:].decode() or 'the server died'}): "
            hello = self._start()
        if hello[:1] != b"+":
            self.close()
            raise SandboxError(f"sandbox: cannot start a worker: {hello[1:].decode() or 'it died'}")
        if hello[1:] and not _Worker.missing:  # said once
            _Worker.missing = hello[1:].decode()
            print(f"sandbox: {why}{_Worker.missing}".rstrip(), file=sys.stderr)

    def _start(self) -> bytes:
        """Start the server. Returns its first word: + and what is missing, or - and why it cannot."""
        places = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        self.socket, theirs = socket.socketpair()
        command = [sys.executable, "-S", "-s", os.path.abspath(sandbox_server.__file__), str(theirs.fileno())]
        try:
            null = subprocess.DEVNULL
            self.process = subprocess.Popen([*command, _Worker.mode, sys.prefix, *places], stdin=null, stdout=null,
                                            stderr=null, cwd="/", env=ENVIRONMENT, pass_fds=[theirs.fileno()],
                                            start_new_session=True)
        except OSError as error:
            raise SandboxError(f"sandbox: cannot start a worker: {error}") from None
        finally:
            theirs.close()
        _Worker.alive.add(self)
        self.socket.settimeout(60)
        return self.socket.recv(400)

    def run(self, files: "list[int]", timeout: float, memory_mb: int) -> tuple:
        """One run. Returns how it ended, its exit code and its seconds."""
        try:
            socket.send_fds(self.socket, [REQUEST.pack(timeout, memory_mb << 20)], files)
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


class Pool:
    """Judges many programs at once. Without a number it takes a worker for each core.

    Workers stay for the next call: use it in a `with`, or they stay until this process ends.
    """

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
        self._stopped = False
        with ThreadPoolExecutor(self.workers) as threads:
            limits = (self.timeout, self.memory_mb)
            waiting = {threads.submit(_judge, self, *job, *limits): i for i, job in enumerate(jobs)}
            try:
                for verdict in as_completed(waiting):
                    yield verdict.result()._replace(job=waiting[verdict])
            except BaseException:  # Ctrl-C, a failure, or the caller has seen enough: nothing may go on
                threads.shutdown(wait=False, cancel_futures=True)
                self.__exit__()
                raise

    def _play(self, files: "list[int]", timeout: float, memory_mb: int) -> tuple:
        """One run by an idle worker or a new one. Whatever goes wrong meanwhile is that worker's end."""
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
            reply = worker.run(files, timeout, memory_mb)
            self._idle.append(worker)
            return reply
        except BaseException:
            worker.close()
            raise
        finally:
            self._busy.discard(worker)


def _after_fork() -> None:
    """A fork of the caller lets go of its workers: if it held their sockets, they would not see the caller die."""
    for worker in _Worker.alive:
        worker.socket.close()
    _Worker.alive.clear()
    _shared.__init__(1)


_shared = Pool(1)  # for run and judge
os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: [worker.close() for worker in list(_Worker.alive)])

# ------------------------------------------------------------------------------------------------ for a debugger


def is_micro(code: str) -> bool:
    """Is it a program of the micro-world, which does no harm anywhere? Its first line, any of its twelve, its last."""
    from data.make_tiny import FIRST_LINE, LAST_LINE, LINES  # only here: it needs torch

    first, *lines, last = code.split("\n") if "\n" in code else ("", "")
    return first == FIRST_LINE and last == LAST_LINE and set(lines) <= set(LINES)


def play_here(code: str, stdin: str) -> str:
    """Run a program of the micro-world in this process; returns what it printed. A debugger can step into its lines."""
    program = compile(code, "<candidate>", "exec")
    linecache.cache["<candidate>"] = (len(code), None, code.splitlines(keepends=True), "<candidate>")
    printed = io.StringIO()
    names = {"input": lambda: stdin, "print": functools.partial(print, file=printed)}  # the streams are the debugger's
    exec(program, names)
    return printed.getvalue()


class InThisProcess(Pool):
    """A Pool without processes, isolation and limits, for a debugger. It runs programs of the micro-world only."""

    said = False  # that isolation is off: once

    def __init__(self):
        super().__init__(1)
        self.foreign = 0  # programs that were not run, and count as wrong
        if not InThisProcess.said:
            InThisProcess.said = True
            print("sandbox: isolation is off, programs of the micro-world run in this process", file=sys.stderr)

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if self.foreign:
            print(f"sandbox: {self.foreign} programs are none of the micro-world: not run, and wrong", file=sys.stderr)

    def judge(self, jobs: "Iterable[tuple[str, list]]") -> Iterator[Verdict]:
        for job, (code, tests) in enumerate(jobs):
            if not is_micro(code) or not tests or not all("input" in test for test in tests):
                self.foreign += 1
                yield Verdict(False, [], 0, "no program of the micro-world: not run", job)
                continue
            results = [Result("ok", play_here(code, test["input"]), "", 0, 0.0) for test in tests]
            wrong = [why_wrong(test, result, b"") for test, result in zip(tests, results)]
            failed = next((i for i, why in enumerate(wrong) if why), None)
            if failed is None:
                yield Verdict(True, results, None, "", job)
            else:
                yield Verdict(False, results[: failed + 1], failed, f"test {failed}: {wrong[failed]}", job)
