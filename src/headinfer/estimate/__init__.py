"""What contexts cost on machines, predicted for every method, beside what the paper printed."""
