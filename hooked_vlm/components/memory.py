"""Whether something large fits, before it is made."""

from __future__ import annotations

import psutil
import torch

LARGE = 2**30  # bytes; what is smaller is not asked about


def free(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    return int(psutil.virtual_memory().available)


def check_room(needed: int, device: torch.device, what: str) -> None:
    """Refuses what does not fit.

    Args:
        needed: bytes.
        device: where.
        what: what they are for, and what to do if there are not as many.

    Raises:
        MemoryError: it says how much is needed and how much there is.
    """
    if needed > LARGE and needed > (there := free(device)):
        raise MemoryError(
            f"{needed / 2**30:.1f} GiB are needed and {there / 2**30:.1f} GiB are free on "
            f"{device}: {what}"
        )
