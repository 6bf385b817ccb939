"""A sentence off the main theme of a long document, asked for: Figure 7 of the paper."""
