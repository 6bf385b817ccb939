"""Finding which heads of a model retrieve, and attending as if the others kept few tokens."""
