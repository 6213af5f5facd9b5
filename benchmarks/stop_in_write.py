"""Stop a process (SIGSTOP) in the middle of writing a file.

    python benchmarks/stop_in_write.py PID FOLDER SECONDS

Waits until a file `*.partial` is created in FOLDER, which the process writes and then renames, and
stops the process. If the file is complete by then, the process goes on and the next file is tried.
Prints the name of the file that is being written, or nothing if none was met in time. Linux only.
"""

import ctypes
import os
import select
import signal
import struct
import sys
import time
from pathlib import Path

IN_CREATE = 0x100
EVENT = struct.Struct("iIII")


def main() -> None:
    pid, folder, end = int(sys.argv[1]), Path(sys.argv[2]), time.monotonic() + float(sys.argv[3])
    libc = ctypes.CDLL(None, use_errno=True)
    notes = libc.inotify_init1(os.O_NONBLOCK)
    if notes < 0 or libc.inotify_add_watch(notes, str(folder).encode(), IN_CREATE) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    while (left := end - time.monotonic()) > 0:
        if not select.select([notes], [], [], left)[0]:
            break
        os.kill(pid, signal.SIGSTOP)
        for name in names(os.read(notes, 1 << 16)):
            if name.endswith(".partial") and is_stopped(pid) and (folder / name).exists():
                print(name)
                return
        os.kill(pid, signal.SIGCONT)


def is_stopped(pid: int) -> bool:
    """Return whether a process stands still, after waiting for it for a moment."""
    for _ in range(100):
        states = [(one / "stat").read_text() for one in Path(f"/proc/{pid}/task").iterdir()]
        if all(one.rpartition(")")[2].split()[0] == "T" for one in states):
            return True
        time.sleep(0.001)
    return False


def names(content: bytes) -> list[str]:
    """Return the names of files in the kernel's events."""
    found, at = [], 0
    while at < len(content):
        *_, length = EVENT.unpack_from(content, at)
        at += EVENT.size + length
        found.append(content[at - length : at].rstrip(b"\0").decode())
    return found


if __name__ == "__main__":
    main()
