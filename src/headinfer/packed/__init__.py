"""A lossless code of bfloat16 keys and values: 12 bits and a little more for each value."""
