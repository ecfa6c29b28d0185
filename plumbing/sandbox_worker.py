"""The caller's side of a fork server (sandbox_child.py): start it, send it a run, end it."""
import atexit
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from plumbing import sandbox_child

ENVIRONMENT = {  # all that candidates see besides HOME and TMPDIR. A fixed hash seed: labels must repeat
    "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1",  # each arena and each thread takes from RLIMIT_AS
}


class SandboxError(Exception):
    """The sandbox itself failed (it cannot fork, the disk is full, ...). Never a label."""


class WorkerDied(Exception):
    """A fork server ended, or did not reply in time: by accident, or because of a candidate."""


def memory_file(stack: contextlib.ExitStack, data: bytes = b"") -> int:
    """Return the descriptor of a file without a name that holds these bytes; it closes with the stack."""
    try:
        unnamed = open(os.memfd_create("sandbox"), "w+b") if sandbox_child.LINUX else tempfile.TemporaryFile()
        file = stack.enter_context(unnamed)
        file.write(data)
        file.seek(0)  # this also writes out what is in the buffer
        return file.fileno()
    except OSError as error:
        raise SandboxError(f"sandbox: cannot make a memory file: {error}") from None


def usable_cores() -> int:
    """Return how many cores this process may use: those that it is bound to, at most the quota of its container.

    With more workers than that, programs would wait for each other, and right ones would exceed the time limit.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # cgroups of version 2, and of 1
        with contextlib.suppress(OSError, ValueError):  # no such file; "max", which is no quota
            words = [word for name in names for word in Path("/sys/fs/cgroup", name).read_text().split()]
            quota, period = map(int, words)
            cores = min(cores, max(1, quota // period)) if quota > 0 else cores  # -1: no quota
    return cores


class Worker:
    """A fork server, and the socket to it."""

    alive: "set[Worker]" = set()
    mode = "isolated"  # "plain" once it is known that this system gives us no namespaces
    missing = ""  # what this system cannot give us, printed once

    def __init__(self):
        mode, why = Worker.mode, ""
        hello = self.start(mode)
        if hello[0] == "-" and mode == "isolated":
            self.close()
            Worker.mode, why = "plain", f"no namespaces ({hello[1:]}): "
            hello = self.start("plain")
        if hello[0] == "-":
            self.close()
            raise SandboxError(f"sandbox: cannot start a worker: {hello[1:]}")
        if hello[1:] and not Worker.missing:
            Worker.missing = hello[1:]
            print(f"sandbox: {why}{Worker.missing}", file=sys.stderr)

    def start(self, mode: str) -> str:
        """Start the server. Returns its first word: + and what is missing, or - and why it cannot start."""
        packages = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        program = os.path.abspath(sandbox_child.__file__)
        command = [sys.executable, "-S", "-s", "-X", "int_max_str_digits=50000", program]
        self.socket, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [*command, str(theirs.fileno()), mode, sys.prefix, *packages], cwd="/", env=ENVIRONMENT,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()], start_new_session=True)
            Worker.alive.add(self)
            self.socket.settimeout(60)
            return self.socket.recv(400).decode("utf-8", "replace") or "-the server died"
        except OSError as error:
            raise SandboxError(f"sandbox: cannot start a worker: {error}") from None

    def run(self, files: "list[int]", timeout: float, memory_mb: int) -> "tuple[str, int, float]":
        """Run once. Returns "exited", "timeout" or "memory", the exit code and the seconds. Raises WorkerDied."""
        try:
            socket.send_fds(self.socket, [f"{timeout} {memory_mb << 20}".encode()], files)
            # without namespaces a candidate can stop its worker, which would then never reply
            self.socket.settimeout(timeout + (10 if Worker.mode == "isolated" else 0.9))
            how, code, seconds, failure = self.socket.recv(1000).decode().split(" ", 3)
        except (OSError, ValueError):  # ValueError: the reply was empty
            raise WorkerDied from None
        if how == "failed":
            raise SandboxError(f"sandbox: {failure}")
        return how, int(code), float(seconds)

    def usable(self) -> bool:
        """Return whether this process started the server and it still waits: a readable socket means that it ended."""
        return bool(self.process) and not select.select([self.socket], [], [], 0)[0]

    def close(self) -> None:
        """End the server and what it runs. This also wakes a thread that waits for its reply."""
        Worker.alive.discard(self)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        if self.process:
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:  # without namespaces a candidate can have stopped it
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


class Workers(contextlib.AbstractContextManager):
    """The workers of a pool: busy ones, and idle ones that stay for the next run."""

    def __init__(self):
        self.idle, self.busy, self.stopped = [], set(), False

    def __exit__(self, *error) -> None:
        """End the workers and what they run. The pool can be used again."""
        self.stopped = True
        for worker in [*self.busy, *self.idle]:
            worker.close()
        self.idle.clear()

    def use_worker(self, files: "list[int]", timeout: float, memory_mb: int) -> "tuple[str, int, float]":
        """Run once in an idle or a new worker; return Worker.run's reply. An exception of any kind ends the worker."""
        worker = self.take_worker()
        self.busy.add(worker)
        try:
            if self.stopped:
                raise SandboxError("sandbox: the pool was closed")
            reply = worker.run(files, timeout, memory_mb)
            self.idle.append(worker)
            return reply
        except BaseException:
            worker.close()
            raise
        finally:
            self.busy.discard(worker)

    def take_worker(self) -> Worker:
        """Return an idle worker, or start one."""
        with contextlib.suppress(IndexError):  # raised by pop if no worker is idle
            while not (worker := self.idle.pop()).usable():
                worker.close()
            return worker
        return Worker()


def forget_workers() -> None:
    """Let go of all workers in a fork of the caller. If it kept their sockets, they would not see the caller die."""
    for worker in Worker.alive:
        worker.socket.close()
        worker.process = None  # it is the caller's
    Worker.alive.clear()


os.register_at_fork(after_in_child=forget_workers)
atexit.register(lambda: [worker.close() for worker in list(Worker.alive)])
