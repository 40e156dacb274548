"""``python -m tests.sim --seeds N [--first S]``: N stories from N seeds. The last line is the verdict; a seed that
fails is named with the command that shows it again."""

import argparse
import os
import sys
import time
import traceback
from collections import Counter

from covey import observe
from tests.sim import clockwork, story


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="show the controllers' log")
    chosen = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets must not differ between two runs of one seed
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])  # noqa: S606
    observe.configure(json=False, level="debug" if chosen.verbose else "critical")
    began = time.monotonic()
    counts: Counter[str] = Counter()
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        try:
            told = clockwork.run(seed, story.Story())
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            traceback.print_exc()
            sys.stdout.write(f"FAILED at seed {seed}: python -m tests.sim --seeds 1 --first {seed}\n")
            return 1
        counts += told.counts
    what = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))
    seconds = time.monotonic() - began
    sys.stdout.write(f"{what}\nOK: {chosen.seeds} seeds in {seconds:.0f} s, no promise broken\n")
    return 0


sys.exit(main())
