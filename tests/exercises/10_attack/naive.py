"""Three runners of the kind that is written on a first evening. Each is fooled by a program that solves nothing.

A runner takes a program (str) and tests ([{"input", "output"}, ...]) and returns whether it believes in it. The program
runs in another process, in a temporary folder, where the runner's harness calls it once a test.
"""
import json
import os
import subprocess
import sys
import tempfile

RUN = """
import contextlib, io, json, sys
code, tests = json.load(open("job.json"))

def printed(test):
    sys.stdin = io.StringIO(test["input"])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "solution.py", "exec"), {"__name__": "__main__"})
    return out.getvalue()
"""
EXIT_STATUS = RUN + """
for test in tests:
    if printed(test) != test["output"]:
        sys.exit(1)
"""
LAST_WORD = RUN + """
try:
    passed = all([printed(test) == test["output"] for test in tests])
except BaseException:
    passed = False
print("passed" if passed else "failed")
"""
SAME_PROCESS = RUN + """
import os
count = 0
try:
    for test in tests:
        count += printed(test) == test["output"]
except BaseException:
    count = 0
os.write(int(sys.argv[1]), str(count).encode())
"""


def play(harness: str, code: str, tests: list, descriptor: "int | None" = None) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "job.json"), "w") as file:
            json.dump([code, tests], file)
        kept = [] if descriptor is None else [descriptor]
        return subprocess.run([sys.executable, "-I", "-c", harness, *map(str, kept)], cwd=folder, pass_fds=kept,
                              capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)


def exit_status(code: str, tests: list) -> bool:
    return play(EXIT_STATUS, code, tests).returncode == 0


def last_word(code: str, tests: list) -> bool:
    return play(LAST_WORD, code, tests).stdout.endswith("passed\n")


def same_process(code: str, tests: list) -> bool:
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb") as answer:
        try:
            play(SAME_PROCESS, code, tests, theirs)
        finally:
            os.close(theirs)
        return answer.read() == str(len(tests)).encode()


RUNNERS = {"exit_status": exit_status, "last_word": last_word, "same_process": same_process}
