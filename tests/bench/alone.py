"""An encoder and nothing around it: for each line `BATCH SECONDS` on stdin, prints the images that it encodes a second.

`python -m tests.bench.alone --encoder lite`; the pixels stand ready as the service hands them over.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tests.bench.launch import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="lite")
    encoder = load(parser.parse_args().encoder, device=torch.device("cpu"))
    generator, side = torch.Generator().manual_seed(0), encoder.preprocess.size
    print("ready", flush=True)
    for line in sys.stdin:
        batch, seconds = int(line.split()[0]), float(line.split()[1])
        pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)
        done, start = 0, time.perf_counter()
        with torch.inference_mode():
            while (spent := time.perf_counter() - start) < seconds:
                encoder.encode_images(pixels)
                done += batch
        print(done / spent, flush=True)


if __name__ == "__main__":
    main()
