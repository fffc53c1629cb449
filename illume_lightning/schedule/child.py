"""The command that a schedule is waiting for: a process group of its own that ends with the schedule."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


class Child:
    """A started command; what it writes goes to the end of a log.

    Args:
        command: Program and words.
        log: The file.

    Raises:
        OSError: If the program can't be started.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                process_group=0,
                preexec_fn=_end_with_parent() if sys.platform == "linux" else None,
            )
        self.pid = self.process.pid
        self.start = _processes().get(self.pid, (0, ""))[1]
        """When it started, as the system tells it: with the id it names this process and no later one."""

    def wait(self, seconds: float) -> int | None:
        """Its exit status, negative for a signal; none if it hasn't ended within this time."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._signal_group(signal.SIGKILL)  # workers that it left behind
        return status

    def stop(self, number: int) -> None:
        """Hand a signal on to the command alone: its workers would die under its hands before it could save."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it and its workers at once."""
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS refuses a group of which only a zombie is left
            return


def wait_for_end(pid: int, start: str, seconds: float) -> None:
    """Wait for a command of an earlier schedule that was killed, with all its workers.

    Raises:
        BlockingIOError: If one is still alive after this time.
    """
    deadline = time.monotonic() + seconds
    while _is_alive(pid, start):
        if time.monotonic() > deadline:
            raise BlockingIOError(
                f"process {pid} of this schedule's last start is still at work: wait for it, or stop it first"
            )
        time.sleep(0.1)


def _is_alive(group: int, start: str) -> bool:
    """Whether a process of the group lives, unless its first one is not the one that started then."""
    processes = _processes()
    if group in processes and processes[group][1] != start:
        return False
    return any(found == group for found, _ in processes.values())


def _processes() -> dict[int, tuple[int, str]]:
    """Process group and start of every process that has not ended, by process id."""
    found = {}
    if sys.platform == "linux":
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                # The name before it may hold anything, also brackets and blanks.
                values = file.read_text(errors="replace").rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile, or is not ours to see
                continue
            if values[0] not in "ZX":
                found[int(file.parent.name)] = int(values[2]), values[19]
        return found
    listing = subprocess.run(["ps", "-A", "-o", "pid=,pgid=,state=,lstart="], capture_output=True, text=True)
    for line in listing.stdout.splitlines():
        pid, group, state, start = line.split(maxsplit=3)
        if not state.startswith("Z"):
            found[int(pid)] = int(group), start.strip()
    return found


def _end_with_parent() -> Callable[[], None]:
    """What a child does before its program: ask Linux to be killed when its parent is."""
    library, parent = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed in the meantime
            os._exit(1)

    return ask
