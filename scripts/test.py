"""Runs everything that CI checks, by hand and there alike: `make test`, or `make test ARGS="unit vm"`.

The work is cut into parts that know nothing of each other; as many run side by side as the machine has cores (two at
least: much of it is waiting). Each part has a log of its own in .cache/test/<process id>/. Nothing is skipped: a
missing tool, a skipped test, a part without tests and a part over its time all count as failed.

Randomised parts (storm, sim) draw their seed from what is committed below covey/: each change of the product meets
stories that none before it met, and a run that failed is repeated as it was. COVEY_TEST_SEED names another seed.

The last line is "N passed, N failed"; the exit status is 0 only when nothing failed.
"""

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALL_LOGS = ROOT / ".cache" / "test"
LOGS = ALL_LOGS / str(os.getpid())
BIN = Path(sys.executable).parent
HEARTBEAT_S = 60.0


def seed_of_this_product() -> int:
    """Below 2**31. A tree without git has one seed: it is the same tree each time."""
    if told := os.environ.get("COVEY_TEST_SEED"):
        return int(told)
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD:covey"]
    told = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return int(told[:7] or "1", 16)


SEED = str(seed_of_this_product())


@dataclass(frozen=True, slots=True)
class Part:
    """Commands that run one after the other. `tests` names what pytest runs; `about_s` orders the queue. `workers`: so
    many of its test files at once, for parts whose tests mostly wait."""

    name: str
    about_s: int
    limit_s: int
    tests: tuple[str, ...] = ()
    checks: tuple[tuple[str, ...], ...] = ()
    workers: int = 1


# The longest begin first, so that no long one is left for the end: seconds as CI needed them.
PARTS = (
    Part("vm", 300, 1500, tests=("tests/vm",)),
    Part(
        "storm",
        360,
        1500,
        tests=("tests/storm",),
        checks=(("python", "-m", "tests.storm", "--minutes", "5", "--seed", SEED),),
    ),
    Part("outage", 150, 1500, tests=("tests/outage",)),
    Part("cluster", 500, 1500, tests=("tests/cluster",), workers=2),
    Part("operate", 280, 1500, tests=("tests/operate",), workers=2),
    Part("topology", 330, 1500, tests=("tests/topology",)),
    Part("registry", 200, 1500, tests=("tests/registry",), workers=2),
    Part("contract", 150, 1500, tests=("tests/contract",)),
    Part("mutants", 300, 1500, tests=("tests/mutants",)),
    Part(
        "sim",
        120,
        1500,
        tests=("tests/sim",),
        checks=(("python", "-m", "tests.sim", "--seeds", "1000", "--minutes", "1", "--first", SEED),),
    ),
    Part("upgrade", 150, 1500, tests=("tests/upgrade",)),
    Part("unit", 270, 1500, tests=("tests/unit",), workers=2),
    Part("conformance", 100, 1500, tests=("tests/conformance",)),
    Part(
        "check",
        40,
        1500,
        checks=(
            ("ruff", "check", "."),
            ("ruff", "format", "--check", "."),
            ("mypy",),
            ("lint-imports",),
            ("python", "scripts/gen_docs.py", "--check"),
        ),
    ),
    Part("demo", 30, 1500, checks=(("python", "scripts/demo.py"),)),
    Part("tidy", 20, 1500, tests=("tests/tidy",)),
)


@dataclass(slots=True)
class Result:
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    trouble: str = ""


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


def environment() -> dict[str, str]:
    """What the parts see. Compiled modules are kept: thousands of processes import the same ones, and to compile them
    takes twice as long as everything else at a program's start."""
    told = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**told, "PYTHONPYCACHEPREFIX": str(ROOT / ".cache" / "modules")}


async def run(command: list[str], log: Path, limit_s: float) -> int:
    """The command's exit status, 124 when it was ended for taking too long; its whole group ends with it."""
    guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(command)}\n".encode())
        output.flush()
        process = await asyncio.create_subprocess_exec(
            *guard,
            *command,
            cwd=ROOT,
            env=environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return await asyncio.wait_for(process.wait(), limit_s)
        except TimeoutError:
            output.write(f"\nended after {limit_s:.0f} s\n".encode())
            return 124
        finally:
            end_group(process.pid)
            await process.wait()


def end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all of it has ended already


async def run_checks(part: Part, log: Path, result: Result) -> None:
    for check in part.checks:
        status = await run([str(BIN / check[0]), *check[1:]], log, part.limit_s)
        if status == 0:
            result.passed += 1
        else:
            result.failed += 1
            result.trouble += f"{' '.join(check)} failed; "


async def run_tests(part: Part, log: Path, result: Result, extra: list[str]) -> None:
    report = LOGS / f"{part.name}.xml"
    report.unlink(missing_ok=True)
    side_by_side = ["-n", str(part.workers), "--dist", "loadfile"] if part.workers > 1 else []
    options = ["-q", "--durations=5", f"--junitxml={report}", *side_by_side, *extra]
    command = [str(BIN / "python"), "-m", "pytest", *options, *part.tests]
    status = await run(command, log, part.limit_s)
    if status == 124:
        result.trouble = f"took longer than {part.limit_s} s"
    if not report.exists():
        result.failed += 1
        result.trouble = result.trouble or f"pytest ended with status {status} and without a report"
        return
    count(report, status, result)


def count(report: Path, status: int, result: Result) -> None:
    """Adds up pytest's report. A skipped test counts as failed: it proves nothing."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))  # noqa: S314  (written by our own pytest)
    total, failures, errors, skipped = (
        sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    result.failed += failures + errors + skipped
    result.passed += max(total - failures - errors - skipped, 0)
    if skipped:
        result.trouble = f"{skipped} skipped"
    if status == 5:
        result.trouble = "no tests were found"
    if status != 0 and result.failed == 0:
        result.failed = 1


async def run_part(part: Part, lanes: asyncio.Semaphore, running: dict[str, float], extra: list[str]) -> Result:
    result = Result()
    log = LOGS / f"{part.name}.log"
    async with lanes:
        log.write_bytes(b"")
        begun = running[part.name] = time.monotonic()
        say(f"{part.name} begins")
        try:
            await run_checks(part, log, result)
            if part.tests:
                await run_tests(part, log, result, extra)
        except OSError as error:  # a tool is missing
            result.failed += 1
            result.trouble = str(error)
        del running[part.name]
    result.seconds = time.monotonic() - begun
    verdict = f"{result.passed} passed, {result.failed} failed"
    say(f"{part.name}: {verdict} in {result.seconds:.0f} s{' (' + result.trouble + ')' if result.trouble else ''}")
    return result


def make_room_for_logs() -> None:
    """Our own empty directory; those of runs that have ended go."""
    ALL_LOGS.mkdir(parents=True, exist_ok=True)
    for old in ALL_LOGS.iterdir():
        if not Path("/proc", old.name).exists() or old == LOGS:
            shutil.rmtree(old, ignore_errors=True)
    LOGS.mkdir()


async def tell_what_runs(running: dict[str, float]) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        now = time.monotonic()
        say("still running: " + ", ".join(f"{name} ({now - since:.0f} s)" for name, since in running.items()))


async def run_all(parts: list[Part], lanes: int, extra: list[str]) -> dict[str, Result]:
    make_room_for_logs()
    semaphore, running = asyncio.Semaphore(lanes), dict[str, float]()
    teller = asyncio.create_task(tell_what_runs(running))
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {part.name: group.create_task(run_part(part, semaphore, running, extra)) for part in parts}
    finally:
        teller.cancel()
    return {name: task.result() for name, task in tasks.items()}


def show(results: dict[str, Result]) -> None:
    for name, result in results.items():
        if result.failed:
            log = LOGS / f"{name}.log"
            print(f"\n---- end of {log.relative_to(ROOT)}")
            print("\n".join(log.read_text(errors="replace").splitlines()[-60:]))
    print(f"\n{'part':<14}{'passed':>8}{'failed':>8}{'seconds':>9}")
    for name, result in results.items():
        print(f"{name:<14}{result.passed:>8}{result.failed:>8}{result.seconds:>9.0f}  {result.trouble}".rstrip())


def main() -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description="Run what CI checks.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--lanes", type=int, default=max(2, os.cpu_count() or 2), help="parts at once")
    parser.add_argument("--pytest", default="", help="more arguments for pytest, separated by spaces")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    parts = [part for part in PARTS if not options.parts or part.name in options.parts]
    parts.sort(key=lambda part: -part.about_s)
    results = asyncio.run(run_all(parts, options.lanes, options.pytest.split()))
    show(results)
    passed, failed = (sum(getattr(result, name) for result in results.values()) for name in ("passed", "failed"))
    print(f"\n{time.monotonic() - STARTED:.0f} s in all; logs are in {LOGS.relative_to(ROOT)}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


STARTED = time.monotonic()

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
