"""How many threads our kernels in C run on: as many as torch's own operations do."""

import torch


def take_torchs_threads() -> int:
    """Have OpenMP begin as many threads as torch is set to, and return how many.

    OpenMP has a number for each thread that calls it, and torch sets it where it is asked first.
    Until then a fresh thread has the number of the environment, or of all cores.
    """
    return torch.get_num_threads()
