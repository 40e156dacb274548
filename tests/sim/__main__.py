"""``python -m tests.sim``: stories from many seeds, a process of its own for each, or one seed with all that happens.

    --seeds N --first S    N stories; those after the first failure are not begun
    --step K               every K-th seed: 4 tells stories with a restore only
    --minutes M            no story is begun after so long
    --seed N               one story, told line by line

The last line is the verdict; a seed that fails is named with the command that shows it again.
"""

import argparse
import logging
import os
import signal
import sys
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import msgspec
import structlog

from tests.sim import clockwork, story, truth

_PROGRESS_S = 15.0
_CPU_S = 60.0  # of one story; most take two
_SAID = 20_000  # characters of a fault: they fit into a pipe


@dataclass
class Ended:
    """How one story ended. `why` "": well."""

    seed: int
    why: str
    counts: dict[str, int]


def tell_one(seed: int, storm_s: float, end: Callable[[Ended], NoReturn], *, aloud: bool) -> NoReturn:
    """Live through one story in this process, which is good for nothing afterwards."""

    def take_too_long(_number: int, frame: types.FrameType | None) -> None:
        """Something turns and turns while no time goes by. An exception would be taken for a fault of whatever runs."""
        where = "".join(traceback.format_stack(frame))
        end(Ended(seed, f"{_CPU_S:g} s of processor time are over: {where}"[-_SAID:], {}))

    one = story.Story(storm_s=storm_s, tell=_say if aloud else lambda _at_s, _text: None)
    _listen(one, aloud=aloud)
    signal.signal(signal.SIGVTALRM, take_too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_S)
    end(_live_through(seed, one))


def _live_through(seed: int, one: story.Story) -> Ended:
    try:
        counts = clockwork.run(seed, one)
    except truth.Broken as error:
        return Ended(seed, str(error)[:_SAID], {})
    except Exception:
        return Ended(seed, traceback.format_exc()[-_SAID:], {})
    return Ended(seed, "", dict(counts))


def _say(at_s: float, text: str) -> None:
    sys.stdout.write(f"{at_s:9.3f} {text}\n")


def _listen(one: story.Story, *, aloud: bool) -> None:
    """The programs' own logs become lines of the story. A fault that no program expected ends it."""

    def hear(_logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        process = clockwork.current()
        if method in ("exception", "critical") and (process is None or not process.dead):
            one.truth.fail(f"an unexpected fault: {event['event']}: {traceback.format_exc()}")
        if aloud and process is not None:
            words = " ".join(f"{name}={value}" for name, value in event.items() if name not in ("event", "part"))
            one.hear(f"{process.name}: {event['event']} {words}")
        raise structlog.DropEvent

    level = logging.DEBUG if aloud else logging.ERROR
    wrapper = structlog.make_filtering_bound_logger(level)
    structlog.configure(processors=[hear], wrapper_class=wrapper, cache_logger_on_first_use=False)


def tell_in_child(seed: int, storm_s: float) -> tuple[int, int]:
    """Fork for one story: (process, where its end can be read)."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:

        def end(ended: Ended) -> NoReturn:
            os.write(theirs, msgspec.json.encode(ended))
            os._exit(0)  # nothing of the story ends: see `clockwork.run`

        tell_one(seed, storm_s, end, aloud=False)
    os.close(theirs)
    return child, ours


def tell_many(first: int, count: int, jobs: int, storm_s: float, limit_s: float, step: int = 1) -> Iterator[Ended]:
    """The ends of the stories as they come, until the first that is bad."""
    running: dict[int, tuple[int, int]] = {}  # process -> (seed, where to read)
    begun_s, seed, end = time.monotonic(), first, first + count * step
    while True:
        while len(running) < jobs and seed < end and time.monotonic() - begun_s < limit_s:
            child, out = tell_in_child(seed, storm_s)
            running[child] = (seed, out)
            seed += step
        if not running:
            return
        child, status = os.wait()
        its_seed, out = running.pop(child)
        with os.fdopen(out, "rb") as answer:
            content = answer.read()
        ended = msgspec.json.decode(content, type=Ended) if content else Ended(its_seed, f"it died: {status}", {})
        yield ended
        if ended.why:
            seed = end


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--step", type=int, default=1, help="from one seed to the next")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="stories at once")
    parser.add_argument("--storm", type=float, default=90.0, help="simulated seconds of bad weather")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no story after so long")
    parser.add_argument("--seed", type=int, help="tell this one story aloud")
    chosen = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets must not differ between two runs of one seed
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.sim", *sys.argv[1:]])  # noqa: S606
    if chosen.seed is not None:
        tell_one(chosen.seed, chosen.storm, _verdict, aloud=True)
    return _many(chosen)


def _verdict(ended: Ended) -> NoReturn:
    """On the one story that was told aloud."""
    seed, why = ended.seed, ended.why
    sys.stdout.write(f"FAILED at seed {seed}: {why}\n" if why else f"OK: seed {seed}, no promise broken\n")
    sys.stdout.flush()
    os._exit(1 if ended.why else 0)


def _many(chosen: argparse.Namespace) -> int:
    begun_s = said_s = time.monotonic()
    counts: Counter[str] = Counter()
    told = 0
    failed: list[Ended] = []
    for ended in tell_many(chosen.first, chosen.seeds, chosen.jobs, chosen.storm, 60 * chosen.minutes, chosen.step):
        told += 1
        counts.update(ended.counts)
        if ended.why:
            failed.append(ended)
        if time.monotonic() - said_s > _PROGRESS_S:
            said_s = time.monotonic()
            sys.stdout.write(f"{told} stories, {counts['guests']} VMs, {counts['faults']} faults\n")
            sys.stdout.flush()
    what = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    seconds = time.monotonic() - begun_s
    for bad in failed:
        again = f"python -m tests.sim --seed {bad.seed} --storm {chosen.storm:g}"
        sys.stdout.write(f"{bad.why}\nFAILED at seed {bad.seed} after {told} seeds: {again}\n")
    if not failed:
        sys.stdout.write(f"{what}\nOK: {told} seeds from {chosen.first} on in {seconds:.0f} s, no promise broken\n")
    return 1 if failed or not told else 0


if __name__ == "__main__":
    sys.exit(main())
