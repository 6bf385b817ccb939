"""Keys and values in 8 bits each, with scales: approximate, in half the bytes."""
