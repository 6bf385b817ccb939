"""`python -m headinfer`, as torchrun starts it in each rank: the same as the command."""

from headinfer.cli.entry import run

if __name__ == "__main__":
    run()
