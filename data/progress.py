"""What a run has done already, and how long the rest will take."""
import contextlib
import json
import time
from pathlib import Path

from tqdm import tqdm

from data import BadInput, ranks


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
        new = {key: value for key, value in units.items() if key not in self.done}  # a batch may be half there
        if ranks.rank() == 0:
            with self.path.open("a") as file:
                file.write("".join(json.dumps([key, value]) + "\n" for key, value in new.items()))
        self.done.update(new)


class Clock:
    """How long the run will still take, from what this process has done: work is counted in sampled answers."""

    def __init__(self, work: dict[str, float]):
        self.left, self.done, self.seconds, self.began = dict(work), 0.0, {}, time.time()

    @contextlib.contextmanager
    def stage(self, name: str, total: int, found: int = 0):
        """The progress bar of a stage of `total` units, `found` of them done by a process before this one."""
        began = time.time()
        with tqdm(total=total, initial=found, desc=f"{name:<24}", unit="", dynamic_ncols=True, mininterval=0.5,
                  disable=ranks.rank() > 0) as progress:
            yield progress
        self.seconds[name] = time.time() - began
        self.done += self.left.pop(name, 0.0) * (1 - found / max(total, 1))
        if self.left and self.done:
            rest = (time.time() - self.began) / self.done * sum(self.left.values())
            tqdm.write(f"  {name}: {self.seconds[name]:.0f} s; about {max(rest / 60, 0.1):.1f} min to go")
