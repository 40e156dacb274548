"""Runs histories: `python -m tests.reigns --histories 1000`. Exit status 1 when one went wrong."""

import argparse
import sys
import time

from covey import observe
from tests.reigns import planted, play


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=1000)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--planted", choices=sorted(planted.BUGS), help="with a bug that must be found")
    parser.add_argument("--strands", action="store_true", help="only such as give up by force what one server has")
    parser.add_argument("-v", action="store_true", help="tell what happens")
    options = parser.parse_args()
    observe.configure(level="critical")
    bugs = planted.BUGS[options.planted] if options.planted else None
    started, wrong = time.monotonic(), 0
    for seed in range(options.first, options.first + options.histories):
        try:
            play.run(seed, bugs, say if options.v else lambda _: None, strands=options.strands)
        except play.Wrong as error:
            wrong += 1
            say(f"seed {seed}: {error}")
            if options.planted:
                break
    spent_s = time.monotonic() - started
    say(f"{options.histories} histories from seed {options.first}, {spent_s:.0f} s: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
