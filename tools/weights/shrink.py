#!/usr/bin/env python3
"""Keep a saved Flamingo's matrices in eight bits instead of sixteen: half the file.

    python tools/weights/shrink.py data/smol_flamingo

The same numbers that `save_flamingo(..., bits=8)` writes; a folder that is there
already need not be trained again for that.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from safetensors.torch import load_file, save_file

from flamingo_lite.foreign import in_bytes


def shrink(folder):
    """Write a folder's flamingo.safetensors anew: its size before and after, bytes."""
    path = folder / "flamingo.safetensors"
    before, tensors = path.stat().st_size, load_file(path)
    if any(name.endswith(".scale") for name in tensors):
        sys.exit(f"{path} is in eight bits already")
    save_file(in_bytes(tensors), path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    return before, path.stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    before, after = shrink(args.folder)
    print(f"{args.folder}: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now")


if __name__ == "__main__":
    main()
