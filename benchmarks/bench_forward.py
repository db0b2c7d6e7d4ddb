"""One forward pass of BLIP-base at 384 pixels: ours over transformers', and cached over plain.

Caching everything keeps 0.8 GB per image. By default glibc gives such blocks back to the kernel
after each run and faults them in again, page by page, at a price that depends on the machine: the
script prints it. The ratios are measured with an allocator that keeps its memory, so that they
compare the work; `--glibc-defaults` measures them with the faults.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time

import torch
from common import blip_base, in_turn, inputs

KEEP = {"MALLOC_TRIM_THRESHOLD_": str(10**11), "MALLOC_MMAP_MAX_": "0"}


def fresh_gigabyte() -> float:
    """CPU seconds for the first touch of a GB of memory, page by page."""
    page, size = mmap.PAGESIZE, 1 << 30
    with mmap.mmap(-1, size) as memory:

        def touch() -> float:
            start = time.process_time()
            for at in range(0, size, page):
                memory[at] = 1
            return time.process_time() - start

        return touch() - touch()


def main() -> None:
    """Prints one line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--glibc-defaults", action="store_true")
    options = parser.parse_args()
    if not options.glibc_defaults and KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(options.threads)
    kept = "given back" if options.glibc_defaults else "kept"
    print(f"memory {kept}; a fresh GB costs {fresh_gigabyte():.2f} s of CPU here", flush=True)
    theirs, ours = blip_base()
    for batch in options.batch:
        given = inputs(batch, batch)
        seconds = in_turn(
            options.runs,
            theirs=lambda given=given: theirs(**given),
            ours=lambda given=given: ours(**given),
            cached=lambda given=given: ours.run_with_cache(**given),
        )
        print(
            f"batch {batch}: forward / transformers' {seconds['ours'] / seconds['theirs']:.2f} "
            f"(at most 1.0), all hooks cached / forward {seconds['cached'] / seconds['ours']:.2f} "
            f"(at most 1.25), forward {seconds['ours']:.2f} s of CPU",
            flush=True,
        )


if __name__ == "__main__":
    main()
