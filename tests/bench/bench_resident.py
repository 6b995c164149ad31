"""Resident memory of `dmn serve`: `python tests/bench/bench_resident.py [--images 200] [--json]`.

Starts the real command on a free port, makes one small tenant, posts real JPEGs over HTTP, and reads what the kernel
says of the process. Asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--encoder", default="lite")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    command = [Path(sys.executable).with_name("dmn"), "serve", "--port", "0", "--encoder", options.encoder]
    start = time.perf_counter()
    quiet = {**os.environ, "DMN_LOG_LEVEL": "error"}  # so that its log cannot fill the pipe that nobody reads
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=quiet)
    try:
        url = _url(server)
        figures = {"start_s": round(time.perf_counter() - start, 1), **_drive(url, server.pid, options.images)}
    finally:
        server.terminate()
        server.wait(60)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:>24} {value}")


def _drive(url: str, pid: int, images: int) -> dict[str, float]:
    pictures = [_jpeg(seed) for seed in range(images)]
    with httpx.Client(base_url=url, timeout=120) as client:
        client.put("/tenants/default", json={"classes": CLASSES}).raise_for_status()
        idle = _resident(pid, "VmRSS")
        start = time.perf_counter()
        for picture in pictures:
            client.post("/classify", content=picture, headers={"Content-Type": "image/jpeg"}).raise_for_status()
        seconds = time.perf_counter() - start
    return {
        "resident_idle_mb": idle,
        "resident_mb": _resident(pid, "VmRSS"),
        "resident_peak_mb": _resident(pid, "VmHWM"),
        "images_per_second": round(images / seconds, 1),
    }


def _url(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    for line in server.stderr:
        found = re.search(r"http://[^\s]+", line)
        if found:
            return found[0]
    raise SystemExit("dmn serve did not start.")


def _resident(pid: int, field: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return round(int(found[1]) / 1024, 1)


def _jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    file = BytesIO()
    small.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


if __name__ == "__main__":
    main()
