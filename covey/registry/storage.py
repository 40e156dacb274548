"""Which storage a registry works on, put together: blobs, logs and their care, on a disk or in a bucket of S3.

This is the one place that knows all implementations; everything else knows the Protocols of `blobs`.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from covey import world
from covey.registry import blobs, disk, disk_care, journal, replica_disk, s3, s3_bucket, s3_care, s3_log


@dataclass(frozen=True, slots=True)
class Storage:
    """`open` before the first use (raises SettingError), `close` after the last. `shown`: what to call it in a log."""

    content: blobs.Blobs
    logs: blobs.Logs
    care: blobs.Care
    log_care: blobs.LogCare
    open: Callable[[], Awaitable[None]]
    close: Callable[[], None]
    shown: str
    replica: replica_disk.ReplicaDisk | None = None  # what one of several with disks of their own needs beside


def on_disk(
    base: Path, world: world.World, *, reserved_bytes: int, fsync: bool = True, replica: bool = False
) -> Storage:
    """Below one folder. Raises SettingError when that cannot hold a registry."""
    files = disk.Disk(base, world, reserved_bytes=reserved_bytes, fsync=fsync)
    held = replica_disk.ReplicaDisk(base, files, world, fsync=fsync) if replica else None
    on_entry = held.hint if held is not None else lambda log: None
    logs = journal.Journal(base, world, fsync=fsync, on_entry=on_entry)
    care = disk_care.DiskCare(base, world, fsync=fsync)

    async def ready() -> None:
        return

    def close() -> None:
        for part in (files, logs, care):
            part.close()
        if held is not None:
            held.close()

    return Storage(files, logs, care, care, ready, close, str(base), held)


def in_bucket(config: s3_bucket.Config, environ: Mapping[str, str], world: world.World) -> Storage:
    """In a bucket, found and opened by the AWS_* variables of `environ`."""
    bucket = s3_bucket.Bucket(config, environ, world)
    objects = s3.S3(bucket, world)
    care = s3_care.S3Care(bucket, world)
    logs = s3_log.S3Log(bucket, world)
    return Storage(objects, logs, care, care, objects.open, lambda: None, f"s3://{config.bucket}")
