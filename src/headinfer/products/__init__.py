"""Products of weights with few rows on the CPU, at the speed at which memory is read."""
