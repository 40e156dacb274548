"""Generate covey/store/etcdpb/etcd_pb2.py and .pyi from etcd.proto; `--check` only says whether they are fresh."""

import pathlib
import sys
import tempfile

from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCE = "covey/store/etcdpb/etcd.proto"
GENERATED = ("covey/store/etcdpb/etcd_pb2.py", "covey/store/etcdpb/etcd_pb2.pyi")


def generate(target: pathlib.Path) -> None:
    """Write the generated modules below `target`."""
    if protoc.main(["protoc", f"-I{ROOT}", f"--python_out={target}", f"--pyi_out={target}", SOURCE]) != 0:
        raise SystemExit("protoc failed")


def stale() -> list[str]:
    """Names of the generated modules that differ from what etcd.proto gives now."""
    with tempfile.TemporaryDirectory() as fresh:
        generate(pathlib.Path(fresh))
        return [name for name in GENERATED if (ROOT / name).read_text() != (pathlib.Path(fresh) / name).read_text()]


def main() -> None:
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
    elif names := stale():
        raise SystemExit(f"not fresh: {', '.join(names)}; run scripts/gen_etcdpb.py")


if __name__ == "__main__":
    main()
