"""What a run has done already, and how long the rest will take."""
import contextlib
import json
import time
from pathlib import Path

from tqdm import tqdm

from plumbing import ranks
from plumbing.problems import BadInput


class Journal:
    """Finished units of a stage, one JSON line each, so that a killed run repeats none of them.

    Rank 0 reads and writes the file; `done` is the same on all ranks.
    """

    def __init__(self, path: Path):
        self.path = path
        self.done = ranks.on_first(self.read)

    def read(self) -> dict:
        """The whole lines of the file. Raises BadInput where one is damaged."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return {}
        with self.path.open("r+b") as file:
            text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            file.truncate(len(whole))  # a kill can tear the last line
        done = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                key, done[key] = json.loads(line)
            except (ValueError, TypeError):
                raise BadInput(f"{self.path} line {number} is damaged: delete the line, and it is done again") from None
        return done

    def add(self, units: dict) -> None:
        """Appends finished units, but for those that are there; only rank 0 writes."""
        new = {key: value for key, value in units.items() if key not in self.done}  # a batch may be half there
        if ranks.rank() == 0:
            with self.path.open("a") as file:
                file.write("".join(json.dumps([key, value]) + "\n" for key, value in new.items()))
        self.done.update(new)


DAY = 86_400.0  # seconds; a run of more is told how to become shorter


class Clock:
    """How long the run will still take, from what this process has done: work is counted in sampled answers.

    smaller: for each stage the settings that its work is proportional to, as in {"sample": {"--limit": 500}}.
    """

    def __init__(self, work: dict[str, float], smaller: dict[str, dict[str, int]] | None = None):
        self.smaller, self.longest = smaller or {}, max(work, key=work.get, default="")
        self.left, self.done, self.seconds, self.began = dict(work), 0.0, {}, time.time()

    @contextlib.contextmanager
    def stage(self, name: str, total: int, found: int = 0):
        """The progress bar of a stage of `total` units, `found` of them done by a process before this one."""
        began = self.stage_began = time.time()
        with tqdm(total=total, initial=found, desc=f"{name:<24}", unit="", dynamic_ncols=True, mininterval=0.5,
                  disable=ranks.rank() > 0) as progress:
            yield progress
        self.seconds[name] = time.time() - began
        self.done += self.left.pop(name, 0.0) * (1 - found / max(total, 1))
        if self.left and self.done:
            rest = (time.time() - self.began) / self.done * sum(self.left.values())
            tqdm.write(f"  {name}: {self.seconds[name]:.0f} s; about {max(rest / 60, 0.1):.1f} min to go")

    def propose(self, name: str, progress) -> None:
        """After the first batch of the longest stage: a line with smaller settings where a run takes over a day.

        progress: the bar of that stage. Its own speed counts, and the rest of the run is taken to be as fast.
        """
        if name != self.longest or ranks.rank() > 0:  # the other ranks' bars count nothing
            return
        share = (progress.n - progress.initial) / max(progress.total, 1)
        if not share:
            return
        self.longest, work = "", self.left[name]  # said once
        left = sum(self.left.values()) - work * progress.n / progress.total
        rest = (time.time() - self.stage_began) / (share * work) * left
        if rest > DAY:
            options = [f"{option} {max(1, int(value * DAY / rest))}" for option, value in self.smaller[name].items()]
            tqdm.write(f"  about {rest / DAY:.1f} days to go; a run of about a day is one with {' or '.join(options)}")
