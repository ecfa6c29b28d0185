"""Run programs that a model wrote, and decide whether they pass their tests (paper 2.2: y = 1 only if all pass).

`run_tests` gives the verdict on one program, `Pool.label` labels many at a time, `run` runs one without a verdict.
Each test of a program runs in a new process. A worker (plumbing/sandbox_worker.py) is a small server that forks a
child for each run (plumbing/sandbox_child.py). Source, inputs and outputs are memory files; their descriptors are sent
over a socket. The expected values never reach the candidate's process.

Protection on every system:
- The verdict is made here, from what the program printed or returned and from the exit status that the kernel reports.
  Patched builtins, os._exit(0), a fake == or bytes in the result channel cannot turn a wrong answer into a right one.
- Asserts run in one process, and the program whose functions they call runs in another.
- Limits on wall clock, CPU, output, file size and open files. The program has an empty folder, a bare
  environment and no inherited descriptors. Ctrl-C, or the death of the caller, ends what runs.
- A failure of the sandbox itself is a SandboxError, never a label; a program whose worker dies twice is wrong.
On Linux: limits on the memory and the number of all processes of a run together. No process outlives its run.
Where Linux allows namespaces (to root and to most users): no network, no sight of other processes, no files except
Python, /usr (both read-only) and an empty folder of 64 MB. Elsewhere Landlock does what it can (files, TCP, signals),
and one line on stderr says what is missing.

No protection:
- Holes in the kernel (there is no seccomp filter and no virtual machine), and side channels.
- Memory in socket buffers, or in shared mappings that no process maps any more.
- Counters and keyrings of the kernel, where a program could leave a sign for its next test.
- The order of a set of objects: it depends on their addresses, and can differ from run to run.
- Without namespaces: the disk space that many files take, and sockets with a path.
- On macOS only the first list holds, and a process that leaves its group outlives its run.

To step through a candidate, save it in a file and start `python -m pdb` on it. There is no protection then.
"""
import contextlib
import decimal
import json
import marshal
import os
import re
import signal
import socket
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Iterable, Iterator, NamedTuple

from plumbing.sandbox_child import KEY_BYTES, OUTPUT_CAP, encode
from plumbing.sandbox_worker import SandboxError, WorkerDied, Workers, memory_file, usable_cores  # noqa: F401

KEPT = 100_000  # bytes of stdout and of stderr that a verdict keeps for each test
BLANKS = re.compile(rb"\s*")
SHOWN, SHOWN_LINES = 200, 5  # characters and lines of what a failed program printed, in Verdict.failure
SHOWN_VALUE = 60  # characters of a line or of a returned value, in Verdict.reason


class Result(NamedTuple):
    """The result of one run of a program."""
    status: str  # ok, error, timeout, memory, output (too much of it) or refused (code or test cannot be used)
    stdout: str  # all of it from run(), the first 100,000 bytes in a Verdict
    stderr: str  # the last 100,000 bytes
    exit_code: "int | None"  # negative for a signal, None where the sandbox ended the run
    seconds: float


class Verdict(NamedTuple):
    """Whether a program passed all of its tests; as a bool, this is `passed`."""
    passed: bool
    results: "list[Result]"  # up to the first test that failed
    failed_test: "int | None"  # its number, from 0
    reason: str  # why it failed; "" if all passed
    job: int = 0  # the number of the program in a call of Pool.run_tests

    def __bool__(self) -> bool:
        return self.passed

    @property
    def failure(self) -> "dict | None":
        """The first failed test, in short: its number, why, and the first lines printed. None if all passed."""
        if self.passed:
            return None
        result, why = self.results[-1], self.reason.partition(": ")[2]
        if result.status == "error":
            why += f": {(result.stderr.strip().splitlines() or ['nothing on stderr'])[-1]}"
        printed = "\n".join(result.stdout.splitlines()[:SHOWN_LINES])
        return {"test": self.failed_test, "why": why[:SHOWN], "printed": printed[:SHOWN]}


# --------------------------------------------------------------------------------------------------- the verdict


def run_tests(code: str, tests: "list[dict]", *, timeout: float = 10.0, memory_mb: int = 1024,
              pool: "Pool | None" = None) -> Verdict:
    """Run the program on its tests, and stop at the first that fails (paper 2.2).

    A test is {"input": ..., "output": ...}, {"fn_name": ..., "args": [...], "expected": ...} or {"asserts": Python that
    calls the program's functions, "entry_point": the name of the main one, or ""}. No program passes a test of another
    form, or one whose values cannot be sent or compared. timeout: seconds for each test.
    Raises SandboxError if the sandbox itself fails, ValueError without tests or for bad limits.
    """
    if not tests:
        raise ValueError("sandbox: a program without tests has no label")
    if refused := refusal(code):
        return Verdict(False, [refused], 0, f"test 0: {refused.stderr}")
    results = []
    with contextlib.ExitStack() as stack:
        program = memory_file(stack, code.encode())
        for number, test in enumerate(tests):
            result, wrong = run_test(pool or shared_pool, program, test, timeout, memory_mb)
            results.append(result)
            if wrong:
                return Verdict(False, results, number, f"test {number}: {wrong}")
    return Verdict(True, results, None, "")


def run_test(pool: "Pool", program: int, test: dict, timeout: float, memory_mb: int) -> "tuple[Result, str]":
    """Run a program (a memory file) on one test. Returns the result, and why the test is not passed, or ""."""
    try:
        prepared = prepare(test)
    except Exception as error:  # a caller's test can hold objects of any class, and their code can raise anything
        wrong = "the test cannot be used: " + traceback.format_exception_only(error)[-1].strip()[:200]
        return Result("refused", "", wrong, None, 0.0), wrong
    result, answer = run_once(pool, program, prepared, timeout, memory_mb)
    return result, why_wrong(prepared, result, answer)


class Prepared(NamedTuple):
    """A test as text and bytes. What follows runs no code of the objects in it."""
    stdin: bytes
    call: bytes  # the function's name and its arguments; empty if the program reads stdin instead
    asserts: "bytes | None"  # source of the asserts, run in place of the call; None: the candidate itself is called
    wanted: str  # what has to be printed, or the JSON of what the function has to return


def prepare(test: dict) -> Prepared:
    """Prepare a test before anything runs. Raises an exception of any kind if the test cannot be used."""
    if "asserts" in test:  # the call of asserts runs them and returns True
        call = marshal.dumps((test.get("entry_point", ""), []))
        return Prepared(b"", call, test["asserts"].encode("utf-8", "replace"), "true")
    if "fn_name" in test:
        call = marshal.dumps((test["fn_name"], list(test["args"])))
        return Prepared(b"", call, None, json.dumps(encode(test["expected"]), separators=(",", ":")))
    return Prepared(test["input"].encode("utf-8", "replace"), b"", None, "" + test["output"])


def why_wrong(test: Prepared, result: Result, answer: bytes) -> str:
    """Return why a run does not pass its test, or "". answer: as from run_process().

    Blanks around an output do not count. Without them, it may have 32 times the expected length plus 1 MB: more is
    wrong, so that a flood cannot fill our memory.
    """
    if result.status != "ok":
        return result.status
    if test.call:
        # as JSON: a value that a program made up, such as bytes of a huge number, is never built in this process
        got = answer[:SHOWN_VALUE].decode("utf-8", "replace") or "nothing"
        return "" if same_value(test.wanted, answer) else f"returned {got}, not {test.wanted[:SHOWN_VALUE]}"
    start = BLANKS.match(answer).end()
    end = start + 32 * len(test.wanted) + (1 << 20)
    if BLANKS.match(answer, end).end() < len(answer):
        return f"{len(answer)} bytes of output, far more than expected"
    return difference(test.wanted, answer[start:end].decode("utf-8", "replace"))


def difference(expected: str, got: str) -> str:
    """Return why an output is wrong, or "". Compare as LiveCodeBench does: line by line, as text or exact decimals."""
    wanted = expected.strip().split("\n")
    lines = got.strip().split("\n", len(wanted))  # all that are too many stay one piece
    for number, (want, line) in enumerate(zip(wanted, lines), 1):
        want, line = want.strip(), line.strip()
        if want != line and not same_decimals(want, line):
            return f"line {number} should be {want[:SHOWN_VALUE]!r}, not {line[:SHOWN_VALUE]!r}"
    return "" if len(wanted) == len(lines) else f"{'more' if lines[len(wanted):] else 'fewer'} than {len(wanted)} lines"


def same_decimals(want: str, line: str) -> bool:
    """Return whether two lines hold the same numbers, for example 1.50 and 1.5."""
    items = want.split()
    try:
        return list(map(decimal.Decimal, items)) == list(map(decimal.Decimal, line.split(None, len(items))))
    except (ArithmeticError, ValueError):
        return False  # no number, a signalling NaN or an absurd exponent


def same_value(wanted: str, answer: bytes) -> bool:
    """Return whether an answer is the JSON of the same value. The program may have written any bytes there."""
    def plain(tree: dict) -> Any:  # the files of tests are JSON: a tuple counts as a list, a dict has no order
        [(kind, parts)] = tree.items()
        return parts if kind == "tuple" else {kind: sorted(parts, key=json.dumps) if kind == "dict" else parts}

    try:
        short = len(answer) < 32 * len(wanted) + 1024
        return short and json.loads(answer, object_hook=plain) == json.loads(wanted, object_hook=plain)
    except (ValueError, TypeError, RecursionError):
        return False


# ------------------------------------------------------------------------------------------------------- one run


def run(code: str, stdin: str = "", *, timeout: float = 10.0, memory_mb: int = 1024) -> Result:
    """Run a program once, without a verdict. Raises SandboxError and ValueError as run_tests() does."""
    with contextlib.ExitStack() as stack:
        if refused := refusal(code):
            return refused
        program = memory_file(stack, code.encode())
        result, printed = run_once(shared_pool, program, prepare({"input": stdin, "output": ""}), timeout, memory_mb)
        return result._replace(stdout=printed.decode("utf-8", "replace"))


def refusal(code: str) -> "Result | None":
    """Return a Result if no compiler could read the code; None if it can be run."""
    try:
        code.encode()
    except UnicodeEncodeError:
        return Result("refused", "", "the source is not Unicode", None, 0.0)
    return Result("refused", "", "the source holds a NUL", None, 0.0) if "\0" in code else None


def run_once(pool: "Pool", program: int, test: Prepared, timeout: float, memory_mb: int) -> "tuple[Result, bytes]":
    """Run a program (a memory file) on one test. Returns the result and the answer, as run_process() does."""
    if not (0 < timeout < 1e6 and memory_mb >= 1):
        raise ValueError("sandbox: timeout is a number of seconds above 0, memory_mb at least 1")
    attempt = run_process if test.asserts is None else run_asserts
    for _ in range(2):  # twice, because a worker can also die by accident
        with contextlib.suppress(WorkerDied):
            return attempt(pool, program, test, timeout, memory_mb)
    return Result("error", "", "the program killed its worker", -signal.SIGKILL, 0.0), b""


def run_process(pool: "Pool", program: int, test: Prepared, timeout: float, memory_mb: int,
                *wire: int) -> "tuple[Result, bytes]":
    """Run a program in one process: on the test's input, or to call its function. wire: the socket of run_asserts.

    Returns the result and the answer: the JSON of what the function returned, or all that the program printed.
    """
    key = os.urandom(KEY_BYTES)  # so that a program that writes to every descriptor cannot fake an answer
    call = key + test.call if test.call else b""
    with contextlib.ExitStack() as stack:
        files = [memory_file(stack, data) for data in (test.stdin, b"", b"", call)]  # the answer replaces the call
        how, code, seconds = pool.use_worker([program, *files, *wire], timeout, memory_mb)
        sizes = [os.fstat(fd).st_size for fd in files[1:]]
        stdout, stderr = os.pread(files[1], KEPT, 0), os.pread(files[2], KEPT, max(0, sizes[1] - KEPT))
        answer = os.pread(files[3], OUTPUT_CAP, len(key)) if call else os.pread(files[1], OUTPUT_CAP, 0)
        if call and os.pread(files[3], len(key), 0) != key:
            answer = b""
    status = status_of(how, code, max(sizes), stderr)
    stdout, stderr = stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace")
    return Result(status, stdout, stderr, code if how == "exited" else None, seconds), answer


def status_of(how: str, code: int, longest: int, stderr: bytes) -> str:
    """Return the status of a run. how, code: from Pool.use_worker; longest: bytes of its longest output."""
    if longest >= OUTPUT_CAP:
        return "output"
    if how == "timeout" or code == -signal.SIGXCPU:
        return "timeout"
    if how == "memory" or code and stderr.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError"):
        return "memory"
    return "error" if code else "ok"


def run_asserts(pool: "Pool", program: int, test: Prepared, timeout: float, memory_mb: int) -> "tuple[Result, bytes]":
    """Run the asserts in one worker and the program in another. The asserts call its functions through a socket.

    So an exit, patched builtins or an object that equals everything cannot change the asserts. Only plain values and
    exceptions are sent; if a function changes its arguments, the asserts do not see it.
    """
    def run_side(program: int, test: Prepared, end: socket.socket) -> "tuple[Result, bytes]":
        with end:  # when its last copy is closed, the other side knows that this one has ended
            return run_process(pool, program, test, timeout, memory_mb, end.fileno())

    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as beside:
        asserts = memory_file(stack, test.asserts)
        answering = beside.submit(run_side, program, test._replace(call=b""), theirs)
        result, answer = run_side(asserts, test, ours)
        program_result, _ = answering.result()
    if not answer and result.status in ("ok", "error") and program_result.status != "ok":
        result = program_result  # the asserts failed only because the program had ended
    return result, answer


# -------------------------------------------------------------------------------------- many programs at a time


class Pool(Workers):
    """Run the tests of many programs at a time.

    workers: how many programs run at a time; 0 means one for each core that this process may use. timeout, memory_mb:
    as in run_tests(). Worker processes stay for the next call, until the end of the pool's `with` or of this process.
    """

    def __init__(self, workers: int = 0, *, timeout: float = 10.0, memory_mb: int = 1024):
        super().__init__()
        self.workers, self.timeout, self.memory_mb = workers or usable_cores(), timeout, memory_mb

    def label(self, jobs: "Iterable[tuple[str, list]]") -> "list[bool]":
        """Return whether each (code, tests) passes, in order."""
        return [failure is None for failure in self.failures(jobs)]

    def failures(self, jobs: "Iterable[tuple[str, list]]") -> "list[dict | None]":
        """Return Verdict.failure for each (code, tests), in order: None if it passes."""
        found = {verdict.job: verdict.failure for verdict in self.run_tests(jobs)}
        return [found[job] for job in range(len(found))]

    def run_tests(self, jobs: "Iterable[tuple[str, list]]") -> Iterator[Verdict]:
        """Yield the Verdict of each (code, tests) as soon as it is known. Verdict.job: the number of the pair."""
        self.stopped = False
        with ThreadPoolExecutor(self.workers) as threads:
            options = {"timeout": self.timeout, "memory_mb": self.memory_mb, "pool": self}
            waiting = {threads.submit(run_tests, *job, **options): number for number, job in enumerate(jobs)}
            try:
                for done in as_completed(waiting):
                    number = waiting.pop(done)  # drop the future: it would keep its verdict in memory
                    yield done.result()._replace(job=number)
            except BaseException:  # Ctrl-C, a failure, or the caller stops reading: end all that runs
                threads.shutdown(wait=False, cancel_futures=True)
                self.__exit__()
                raise


shared_pool = Pool(1)  # for run() and run_tests()
