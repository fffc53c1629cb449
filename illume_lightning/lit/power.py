"""Energy of the devices that a process trains on, where they tell their power."""

import time
from collections.abc import Sequence

import torch

SECONDS = 10.0
"""Between two looks at the power; a look takes about a millisecond."""


class PowerMeter:
    """Adds up the power of this process's devices over time, from a look every `SECONDS`.

    Args:
        devices: of this process.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = [device for device in devices if device.type == "cuda"]
        self.joules: float | None = None
        """Energy since the start; none where no device tells it."""
        self.why: str | None = None if self._devices else "no device that tells its power"
        """Why there is no energy."""
        self._since = time.monotonic()
        self._look()

    def sample(self, at_once: bool = False) -> None:
        """Look at the power if it is time to.

        Args:
            at_once: also look if it is not.
        """
        seconds = time.monotonic() - self._since
        if self.why is None and (at_once or seconds >= SECONDS):
            watts = self._look()
            if watts is not None:
                self.joules = (self.joules or 0.0) + watts * seconds
                self._since += seconds

    def _look(self) -> float | None:
        """Watts of all devices now; none where they don't tell."""
        if self.why is not None:
            return None
        try:
            from pynvml import NVMLError
        except ImportError:
            self.why = "the package nvidia-ml-py is missing"
            return None
        try:
            return sum(torch.cuda.power_draw(device) for device in self._devices) / 1000
        except (NVMLError, RuntimeError) as error:
            self.why = f"the device does not tell its power: {error}"
            return None
