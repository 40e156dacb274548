"""Random histories of several registry servers on one storage, in one process, from a seed.

    python -m tests.histories --histories 1000            # prints the seed of a history that goes wrong
    python -m tests.histories --first 77 --histories 1 -v  # that one again, step by step

`stage` lets one thread run at a time and asks the seed at each touch of the file system who goes on, and whether a
server is killed there. `play` is what clients do and what they must never see. `planted` are bugs that must be found.
"""
