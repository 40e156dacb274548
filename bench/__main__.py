"""`make bench ARGS="starts --nodes 500"`: one measurement by its name, with the arguments that are its own.

    starts     whole life-cycles in seven load shapes, beside the raw rate of the same etcd
    idle       what a fleet with nothing to do costs
    registry   pushing and pulling templates
    replica    how soon a new tag is whole on the followers of a push registry
    neighbours what leaves the registry when many nodes pull at once, with and without help from each other
    midpull    how soon a pull goes on at another registry when its own dies or freezes
    failover   seconds until a node is served again when its controller dies or freezes
    lists      what lists cost with thousands of instances
    flood      what others notice of a client that asks without end
    outages    what clients notice of the outages of single parts
    drill      seconds to normal after a restore from an old backup

Without a name: `starts`.
"""

import importlib
import sys

NAMES = (
    "starts",
    "idle",
    "registry",
    "replica",
    "midpull",
    "neighbours",
    "failover",
    "lists",
    "flood",
    "outages",
    "drill",
)


def main() -> int:
    name, *rest = sys.argv[1:] or ["starts"]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name.startswith("-"):
        name, rest = "starts", [name, *rest]
    if name not in NAMES:
        print(f"bench: there is no measurement {name!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    sys.argv = [f"bench {name}", *rest]
    return int(importlib.import_module(f"bench.{name}").main() or 0)


if __name__ == "__main__":
    sys.exit(main())
