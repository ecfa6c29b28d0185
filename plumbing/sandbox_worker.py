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
        if sandbox_child.LINUX:
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


class Worker:
    """A fork server, and the socket to it."""

    alive: "set[Worker]" = set()
    mode = "isolated"  # "plain" once it is known that this system gives us no namespaces
    missing = ""  # what this system cannot give us, printed once

    def __init__(self):
        self.owner, hello, why = os.getpid(), self.start(), ""
        if hello[:1] != b"+" and Worker.mode == "isolated":
            self.close()
            Worker.mode, why = "plain", f"no namespaces ({hello[1:].decode() or 'the server died'}): "
            hello = self.start()
        if hello[:1] != b"+":
            self.close()
            raise SandboxError(f"sandbox: cannot start a worker: {hello[1:].decode() or 'it died'}")
        if hello[1:] and not Worker.missing:
            Worker.missing = hello[1:].decode()
            print(f"sandbox: {why}{Worker.missing}".rstrip(), file=sys.stderr)

    def start(self) -> bytes:
        """Start the server. Returns its first word: + and what is missing, or - and why it cannot start."""
        packages = [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]
        self.socket, theirs = socket.socketpair()
        command = [sys.executable, "-S", "-s", os.path.abspath(sandbox_child.__file__), str(theirs.fileno())]
        try:
            null = subprocess.DEVNULL
            self.process = subprocess.Popen([*command, Worker.mode, sys.prefix, *packages], stdin=null, stdout=null,
                                            stderr=null, cwd="/", env=ENVIRONMENT, pass_fds=[theirs.fileno()],
                                            start_new_session=True)
        except OSError as error:
            raise SandboxError(f"sandbox: cannot start a worker: {error}") from None
        finally:
            theirs.close()
        Worker.alive.add(self)
        self.socket.settimeout(60)
        return self.socket.recv(400)

    def run(self, files: "list[int]", timeout: float, memory_mb: int) -> "tuple[bytes, int, float]":
        """Run once. Returns how it ended, the exit code and the seconds. Raises WorkerDied."""
        try:
            socket.send_fds(self.socket, [sandbox_child.REQUEST.pack(timeout, memory_mb << 20)], files)
            # without namespaces a candidate can stop its worker, which would then never reply
            self.socket.settimeout(timeout + (10 if Worker.mode == "isolated" else 0.9))
            reply = self.socket.recv(sandbox_child.REPLY.size)
        except OSError:
            reply = b""
        if not reply:
            raise WorkerDied
        how, code, seconds, failure = sandbox_child.REPLY.unpack(reply)
        if how == sandbox_child.FAILED:
            raise SandboxError("sandbox: " + failure.rstrip(b"\0").decode("utf-8", "replace"))
        return how, code, seconds

    def usable(self) -> bool:
        """Return whether this process started the server and it still waits: a readable socket means that it ended."""
        return self.owner == os.getpid() and not select.select([self.socket], [], [], 0)[0]

    def close(self) -> None:
        """End the server and what it runs. This also wakes a thread that waits for its reply."""
        Worker.alive.discard(self)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        if self.owner == os.getpid():
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:  # without namespaces a candidate can have stopped it
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def forget_workers() -> None:
    """Let go of all workers in a fork of the caller. If it kept their sockets, they would not see the caller die."""
    for worker in Worker.alive:
        worker.socket.close()
    Worker.alive.clear()


os.register_at_fork(after_in_child=forget_workers)
atexit.register(lambda: [worker.close() for worker in list(Worker.alive)])
