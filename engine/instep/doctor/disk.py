"""The disk of the recording: its file system, its free space, and how long it takes to sync."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

from instep.config import Config
from instep.doctor.findings import Findings
from instep.memory import size

SYNCS: Final = 9
SLOW_SYNC_MS: Final = 10.0
_NETWORK: Final = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.s3fs")


def examine_disk(findings: Findings, config: Config | None, mounts: Path = Path("/proc/self/mounts")) -> None:
    """Write a small file, which is removed again, where the recording is, or where `--record FILE` would put one.

    Without a configuration, because it has errors, that is the working directory.
    """
    file = None if config is None else config.recording.file
    folder = Path.cwd() if file is None else file if os.path.isdir(file) else file.parent
    section = findings.section("disk")
    about = "of the recording" if file else "nothing is recorded; --record FILE would record here"
    if config is None:
        about = "the working directory; that of a recording is known once the configuration is correct"
    section.note("folder", str(folder), f"{folder} ({about})")
    kind = _file_system(folder, mounts)
    section.note("file_system", kind)
    if file is not None and kind.startswith(_NETWORK):
        findings.warn(
            f"the recording is on a network file system ({kind}), where SQLite's WAL can be damaged",
            "put recording.file on a local disk, and copy finished recordings: instep recordings cut FILE COPY",
        )
    try:
        milliseconds = _sync_ms(folder)
        free = os.statvfs(folder)
    except OSError as error:  # what looks at the recording says what to do
        section.note("sync_ms", None, f"cannot be written: {error.strerror}")
        return
    section.note("sync_ms", milliseconds, f"{milliseconds:.2f} ms (median of {SYNCS})")
    free_bytes = free.f_bavail * free.f_frsize
    section.note("free_bytes", free_bytes, size(free_bytes))
    if milliseconds > SLOW_SYNC_MS and file is not None:
        findings.warn(
            f"a sync of the disk takes {milliseconds:.0f} ms: with recording.durability fsync every answer waits for "
            "one, and with commit the recorder falls behind",
            "use a local SSD; durability commit survives a crash of the server without waiting for the disk",
        )
    if config is not None and file is not None and free_bytes < config.recording.warn_free_bytes:
        findings.warn(
            f"{size(free_bytes)} are free for the recording, and a full disk ends the server",
            "make room, or bound the recording with recording.keep_bytes",
        )


def _sync_ms(folder: Path) -> float:
    """The median time to write 4 KiB and sync them."""
    times = []
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".instep-doctor-") as file:
        for _ in range(SYNCS):
            file.write(bytes(4096))
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - began) * 1000)
    return round(median(times), 3)


def _file_system(folder: Path, mounts: Path) -> str:
    """The type of the file system that holds a folder, as the kernel calls it."""
    place, best = folder.resolve(), ("", "not known")
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return best[1]
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if place.is_relative_to(point) and len(point) >= len(best[0]):
            best = point, kind
    return best[1]
