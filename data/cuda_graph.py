"""Decoding on a GPU without Python between its kernels: a step is recorded as a CUDA graph, and then replayed.

A decode step starts dozens of small kernels a layer, each from Python. With many rows the GPU is busy meanwhile; with
few it waits. A recording repeats the same kernels on the same memory, whatever Python would do: so in Replayed nothing
of a step depends on a number that Python counts, and every shape stays until rows leave or buffers grow. It suits few
rows and long answers without a window: recording takes some steps' time, and whole buffers are read and masked.

Not covered: models whose step asks the GPU for a number (as a loop over the experts in use does), --shard, and models
that repeat the prompt, which go on without it. Tested on the CPU, with an emulator of a graph; torch.cuda.graph itself
has met no GPU yet, so --cuda-graphs has to ask for it, and `python tests/bench_grpo.py --against eager` says what it is
worth.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data import BadInput, first_line
from prefix import Decoding, hide

ROOM = 128  # places in an answer's buffers at first; the unused ones are masked, and cost as much as the used ones
SETTLED = 4  # steps without change before one is recorded, which takes the time of some


def record(work, device: torch.device):
    """What `work` does on the GPU, as an object with replay(). Nothing is done yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):  # else it would record what happens on another GPU: nothing
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            work()
    return graph


class Replayed(Decoding):
    """Decoding in steps that are all alike: the place of the newest token is a tensor, and the answers' keys are read
    to the end of their buffers, with a mask over what is not written yet. A step overwrites the logits of the last."""

    def keep(self, rows: Tensor) -> None:
        """As in Decoding. The recording goes first, for its memory may be needed for the copies."""
        self.graph = None
        super().keep(rows)

    def arrange(self) -> None:
        """As in Decoding; what was recorded is for other rows now."""
        super().arrange()
        self.graph, self.settled = None, 0
        self.tokens = torch.zeros_like(self.owner)  # [n], where a recording finds its input
        self.place = torch.zeros_like(self.length[:1])  # [1], t as the GPU knows it

    def step(self, model, tokens: Tensor) -> None:
        """Feeds one token a row, [n], and sets the logits of the next. Raises BadInput for what cannot be recorded."""
        if self.own and self.t == self.own[0, 0].shape[2]:
            self.graph, self.settled = None, 0
            for at, x in self.own.items():
                self.own[at] = F.pad(x, (0, 0, 0, max(ROOM, x.shape[2] // 4)))
        self.tokens.copy_(tokens)
        self.place.fill_(self.t)
        forward = partial(self.forward, model, self.tokens, self.place)
        if self.settled == SETTLED:
            try:
                self.graph = record(forward, self.tokens.device)
            except RuntimeError as error:
                cause = error.__context__ or error  # the end of a recording that failed raises too
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                raise BadInput("--cuda-graphs: a decode step of this model cannot be recorded "
                               f"({first_line(cause)}); leave the option out") from None
        if self.graph is None:
            forward()
        else:
            self.graph.replay()
        self.settled, self.t = self.settled + 1, self.t + 1

    def remember(self, at: tuple[int, int], x: Tensor, window: int | None) -> Tensor:
        """Adds the newest token's keys or values [n, K, 1, D]; returns whole buffers [K * n, capacity, D]."""
        if at not in self.own:
            self.own[at] = x.new_zeros(x.shape[1], len(x), ROOM, x.shape[3])  # zeros: a weight of 0 times NaN is NaN
        self.own[at].index_copy_(2, self.place, x.transpose(0, 1))
        return self.own[at].flatten(0, 1)

    def mask(self, window: int | None) -> Tensor | None:
        """As in Decoding, but behind a window always a tensor: whether one is needed only Python could ask."""
        if window is None or window in self.masks:
            return super().mask(window)
        self.masks[window] = hide(self.hidden(window, self.place))[:, None]
        return self.masks[window]

    def own_mask(self, window: int | None) -> Tensor:
        """[capacity], -inf at what is not written yet and at what the window has left behind."""
        key = ("own", window)
        if key not in self.masks:
            place = torch.arange(self.own[0, 0].shape[2], device=self.place.device)
            hidden = place > self.place
            self.masks[key] = hide(hidden if window is None else hidden | (self.place - place >= window))
        return self.masks[key]
