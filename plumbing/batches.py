"""Cut work into batches that fit into memory. An example has a prompt and an answer; a group shares one prompt."""
from plumbing import ranks


def my_micro_batches(groups: list[list], micro_tokens: int, shared: bool) -> list[tuple[list[list], bool]]:
    """Return (micro-batch, whether it counts) for this rank's share of the groups. shared: as in micro_batches.

    Every rank gets the same number of batches, because the forward pass of a sharded model waits for all ranks. A rank
    with less work repeats the shortest of all answers, in batches that do not count.
    """
    batches = micro_batches(ranks.share(groups), micro_tokens, shared)
    missing = max(ranks.gather(len(batches))) - len(batches)
    shortest = sorted((e for group in groups for e in group), key=lambda e: len(e.prompt) + len(e.answer))[:1]
    return [(batch, True) for batch in batches] + [([shortest], False)] * missing


def micro_batches(groups: list[list], micro_tokens: int, shared: bool) -> list[list[list]]:
    """Return batches of groups with at most micro_tokens tokens each. A larger group is cut into parts.

    shared: the answers to a prompt share it. If not, each answer is a padded row, and the padding counts too.
    """
    parts, sizes = [], []
    for group in groups:
        prompt, longest = len(group[0].prompt), max(len(e.answer) for e in group)
        answers = [len(e.answer) if shared else prompt + longest for e in group]
        once = prompt if shared else 0  # tokens that each part adds to its answers
        for part in split_by_size(answers, micro_tokens - once):
            parts.append(group[part])
            sizes.append(once + sum(answers[part]))
    return [parts[batch] for batch in split_by_size(sizes, micro_tokens)]


def split_by_size(sizes: list[int], bound: int) -> list[slice]:
    """Cut a list into slices so that the sizes in each add up to at most bound. A larger item is a slice by itself."""
    starts, used = [], bound
    for i, size in enumerate(sizes):
        if used + size > bound or not starts:
            starts.append(i)
            used = 0
        used += size
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(sizes)])]
