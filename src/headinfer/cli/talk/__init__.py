"""`headinfer chat`: what is said, by whom, and the one cache that has read all of it."""
