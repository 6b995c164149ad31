"""What `docker` holds, read once for the tests of it and of manifests."""

from __future__ import annotations

import tomllib
from typing import Any

from tests.deploy.observability import ROOT, read

DOCKER = ROOT / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
DEVICES = ("cpu", "cuda")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE: dict[str, Any] = read(DOCKER / "compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]
OWN = frozenset(f"dmn-clip-service:{PROJECT['version']}-{device}" for device in DEVICES)
"""Images that the Dockerfile makes."""

IMAGES = OWN | {one["image"] for one in SERVICES.values()}
"""These, and those of others, of which each is run in one version."""
