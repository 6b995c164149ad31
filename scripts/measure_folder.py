"""What shots are worth, over HTTP: `python scripts/measure_folder.py FOLDER [--shots 4] [--url http://127.0.0.1:8000]`.

FOLDER holds one folder of pictures for each class. Against a running service this makes a fresh tenant with these
classes, posts every picture, uploads the first `--shots` of each class (chosen by the seed) as labelled shots, posts
the other pictures again, and prints the accuracy of each branch before and after, of the same pictures.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

BRANCHES = ("text", "dynamic", "static", "statistics")


def main() -> None:
    """Run the measurement and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=("auto", "dmn"), default="auto")
    parser.add_argument("--tenant", default="measure-folder")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    options = parser.parse_args()
    shots, stream = split(options.folder, options.shots, random.Random(options.seed))
    with httpx.Client(base_url=options.url, headers={"X-Tenant": options.tenant}, timeout=120) as client:
        client.delete(f"/tenants/{options.tenant}")
        client.put(
            f"/tenants/{options.tenant}", json={"classes": sorted(shots), "method": options.method}
        ).raise_for_status()
        everything = [(path, label) for label, paths in shots.items() for path in paths] + stream
        random.Random(options.seed).shuffle(everything)
        chosen = {path for path, _ in stream}
        before = classify(client, everything, "before the shots", keep=chosen)
        for label, paths in shots.items():
            files = [("images", (path.name, path.read_bytes())) for path in paths]
            client.post("/memory/static", data={"label": label}, files=files).raise_for_status()
        after = classify(client, stream, "after the shots", keep=chosen)
        client.delete(f"/tenants/{options.tenant}")
    show(before, after, len(stream), options.shots)


def split(folder: Path, shots: int, rng: random.Random) -> tuple[dict[str, list[Path]], list[tuple[Path, str]]]:
    """Return the shots of each class, and the other pictures with their labels, in shuffled order."""
    support, stream = {}, []
    for own in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(own.iterdir())
        rng.shuffle(files)
        support[own.name] = files[:shots]
        stream += [(path, own.name) for path in files[shots:]]
    rng.shuffle(stream)
    return support, stream


def classify(
    client: httpx.Client, pictures: list[tuple[Path, str]], title: str, *, keep: set[Path]
) -> dict[str, float | None]:
    """Post pictures one by one, and return each branch's share of right answers among those to keep."""
    right: dict[str, list[bool]] = {name: [] for name in (*BRANCHES, "fused")}
    for path, label in track(pictures, title, console=Console(stderr=True)):
        answer = client.post("/classify", files={"images": path.read_bytes()})
        told = answer.raise_for_status().json()["predictions"][0]
        if path not in keep:
            continue
        right["fused"].append(told["label"] == label)
        for name in BRANCHES:
            if told["readouts"][name] is not None:
                right[name].append(told["readouts"][name]["label"] == label)
    return {name: 100 * sum(hits) / len(hits) if hits else None for name, hits in right.items()}


def show(before: dict[str, float | None], after: dict[str, float | None], pictures: int, shots: int) -> None:
    """Print the accuracies side by side."""
    table = Table("branch", "before, %", f"after {shots} shots a class, %", title=f"{pictures} pictures")
    for name, value in before.items():
        table.add_row(name, *("-" if one is None else f"{one:.1f}" for one in (value, after[name])))
    Console().print(table)


if __name__ == "__main__":
    main()
