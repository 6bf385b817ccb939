"""How far ahead of a GPU the driver takes launches, where one thread feeds several GPUs."""

import os

_VARIABLE = "CUDA_SCALE_LAUNCH_QUEUES"
_MOST = "4x"
"""The most that the driver knows."""


def deepen_launch_queues() -> None:
    """Have the driver take as many launches ahead as it can; to be called before CUDA begins.

    A full queue blocks the thread that launches. Meanwhile it feeds no other GPU. A chunk of a
    prompt is some 55 launches for each layer, and a queue takes about 1024. So 20 layers on each of
    four GPUs are more than a queue, and one GPU works at a time.

    What the user has set stays. Drivers that do not know the variable pass over it.
    """
    os.environ.setdefault(_VARIABLE, _MOST)
