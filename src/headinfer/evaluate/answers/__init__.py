"""Questions that every method answers: tasks, the processes that answer, and what they gave."""
