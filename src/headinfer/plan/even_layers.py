"""How many layers each of several GPUs has, so that none holds up the others.

Chunks of a prompt follow each other through the GPUs, and the one with the most layers sets the
pace. transformers' own `device_map="auto"` gives four GPUs 7, 12, 12 and 1 of 32 layers.
"""

from collections.abc import Sequence


def even_layers(
    layers_bytes: Sequence[int], before_bytes: int, after_bytes: int, limits: Sequence[int]
) -> list[int] | None:
    """Return how many layers each GPU has, in their order: of what fits, the most even.

    Args:
        layers_bytes: of each layer as it is stored.
        before_bytes: what the first GPU has beside its layers, such as the embedding.
        after_bytes: what the last GPU has beside its layers, such as the output matrix.
        limits: the most bytes of weights on each GPU.

    Returns:
        A number from 1 on for each GPU; None where they do not hold all weights.
    """
    layers, last = len(layers_bytes), len(limits) - 1
    upto = [0]
    for size in layers_bytes:
        upto.append(upto[-1] + size)
    # The least sum of squares with which the first GPUs hold so many layers, and how.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for gpu, limit in enumerate(limits):
        room = limit - (before_bytes if gpu == 0 else 0) - (after_bytes if gpu == last else 0)
        found: dict[int, tuple[int, list[int]]] = {}
        for begin, (cost, counts) in best.items():
            for end in range(begin + 1, layers - (last - gpu) + 1):
                if upto[end] - upto[begin] > room:
                    break
                more = cost + (end - begin) ** 2
                # Of equally even ones, the one with more layers on the first GPUs.
                if end not in found or (more, found[end][1]) <= (found[end][0], counts):
                    found[end] = more, [*counts, end - begin]
        best = found
    return best[layers][1] if layers in best else None
