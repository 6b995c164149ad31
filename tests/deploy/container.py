"""A stand-in for a container engine: runs a Dockerfile's own lines, and what comes out of them, without any engine.

Each stage is a folder that becomes `/` for its lines, in namespaces of its own. Where a stage begins with somebody
else's image of Python, it begins with this machine's system and Python instead; all else is as the Dockerfile has it.
What is built runs as the image's user and without any capability, as process 1, on a root that nobody can write to.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any, Literal

BUILD_S = 900.0
"""How long one line of a Dockerfile may take."""

_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
_SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
"""Folders of this machine that every image has."""

_OWN = ("dev", "etc", "opt", "proc", "root", "run", "tmp", "var")
_ETC = ("group", "gshadow", "ld.so.cache", "login.defs", "nsswitch.conf", "passwd", "shadow")
"""What an image has of its own."""

Mode = Literal["ro", "rw"]
Volumes = Mapping[str, tuple[Path, Mode]]
"""What lies where in an image, and whether it can be written to."""


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Step:
    """One instruction: its word, and what follows."""

    word: str
    rest: str


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What stands between one FROM and the next."""

    base: str
    name: str
    steps: tuple[Step, ...]


def read_steps(file: Path) -> list[Step]:
    """Return the instructions of a Dockerfile; comments are none, and a line goes on after a backslash."""
    kept = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = "\n".join(kept).replace("\\\n", "")
    lines = (line.strip().partition(" ") for line in whole.splitlines() if line.strip())
    return [Step(word=word.upper(), rest=rest.strip()) for word, _, rest in lines]


def read_stages(file: Path, given: Mapping[str, str]) -> list[Stage]:
    """Return the stages of a Dockerfile; in FROM stand the build arguments that are given, or its own."""
    known: dict[str, str] = {}
    stages: list[Stage] = []
    for step in read_steps(file):
        if step.word == "FROM":
            base, _, name = Template(step.rest).substitute(known).partition(" AS ")
            stages.append(Stage(base=base, name=name, steps=()))
        elif stages:
            stages[-1] = replace(stages[-1], steps=(*stages[-1].steps, step))
        else:
            known |= _argument(step, given)
    return stages


def _argument(step: Step, given: Mapping[str, str]) -> dict[str, str]:
    name, _, usual = step.rest.partition("=")
    return {name: given.get(name, usual)}


# Building -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Image:
    """A folder that is `/`, another one that lies over `/usr/local` in it, and how it is run."""

    root: Path
    over: Path
    env: Mapping[str, str]
    args: Mapping[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()

    def place(self, path: str) -> Path:
        """Return where a path in the image is on this machine."""
        return self.root / os.path.normpath(Path(self.workdir, path)).lstrip("/")


class Builder:
    """Builds images without a network. `env` and `volumes` are there meanwhile, as a proxy or a cache would be."""

    def __init__(
        self,
        file: Path,
        context: Path,
        folder: Path,
        *,
        args: Mapping[str, str],
        env: Mapping[str, str],
        volumes: Volumes,
    ) -> None:
        self._context, self._folder = context, folder
        self._args, self._env, self._volumes = args, env, volumes
        self._stages = read_stages(file, args)
        self._made: dict[str, Image] = {}

    def build(self) -> Image:
        """Return the image of the last stage."""
        return self._built(self._stages[-1])

    def _named(self, name: str) -> Image | None:
        """Return what the stage of a name makes, once; None if there is none."""
        stage = next((one for one in self._stages if one.name == name), None)
        if stage is None:
            return None
        if name not in self._made:
            self._made[name] = self._built(stage)
        return self._made[name]

    def _built(self, stage: Stage) -> Image:
        """Return what a stage makes. No two start from one stage, so each goes on in the folder of the one before."""
        image = replace(self._named(stage.base) or self._base(), args={})
        for step in stage.steps:
            image = self._after(step, image)
        return image

    def _base(self) -> Image:
        """Return an image of this machine's system and Python."""
        folder = self._folder / str(len(list(self._folder.iterdir())))
        image = Image(root=folder / "root", over=folder / "over", env={"PATH": _PATH})
        places = [place.lstrip("/") for place in (*self._volumes, sys.base_prefix)]
        for name in (*_OWN, *places, *(name for name in _SYSTEM if _is_folder(name))):
            (image.root / name).mkdir(parents=True, exist_ok=True)
        for name in filter(_is_link, _SYSTEM):
            (image.root / name).symlink_to(Path("/", name).readlink())
        for name in _ETC:
            if Path("/etc", name).is_file():
                shutil.copy(Path("/etc", name), image.root / "etc" / name)
        (image.root / "tmp").chmod(0o1777)
        (image.over / "work").mkdir(parents=True)
        (image.over / "upper" / "bin").mkdir(parents=True)
        packages = image.over / "upper" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        (packages / "pip").mkdir(parents=True)  # as the Python of an image has it, for the tests that it goes
        os.setxattr(packages, "trusted.overlay.opaque", b"y")  # whatever else was installed to this machine's Python
        if sys.base_prefix == "/usr":
            (image.over / "upper" / "bin" / "python").symlink_to("/usr/bin/python3")
        return image

    def _after(self, step: Step, image: Image) -> Image:
        """Return the image after one instruction."""
        match step.word:
            case "RUN":
                self._run(step.rest, image)
            case "COPY":
                self._copy(step.rest, image)
            case "ARG":
                return replace(image, args={**image.args, **_argument(step, self._args)})
            case word:
                return replace(image, **_TOLD[word](image, step.rest))
        return image

    def _run(self, line: str, image: Image) -> None:
        env = {**image.args, **image.env, **self._env}
        with started(replace(image, env=env), ("sh", "-c", line), mounts=self._volumes, building=True) as process:
            told, _ = process.communicate(timeout=BUILD_S)
        assert process.returncode == 0, f"RUN {line}\n{told}"

    def _copy(self, rest: str, image: Image) -> None:
        """Copy files to a folder, or what is in a folder to another."""
        words = shlex.split(rest)
        options = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
        *sources, target = (word for word in words if not word.startswith("--"))
        before = self._named(options["from"]) if "from" in options else None
        place = image.place(target)
        place.mkdir(parents=True, exist_ok=True)
        for source in sources:
            found = self._context / source if before is None else before.place(source)
            what = [str(found)] if found.is_file() else [f"{found}/."]
            link = () if before is None else ("--link",)  # nobody changes a stage that is done
            subprocess.run(["/bin/cp", "-a", "--no-preserve=ownership", *link, *what, str(place)], check=True)
        if "chown" in options:
            subprocess.run(["/bin/chown", "-R", options["chown"], str(place)], check=True)


def _env(image: Image, rest: str) -> dict[str, Any]:
    known, told = {**image.args, **image.env}, (part.partition("=") for part in shlex.split(rest))
    return {"env": {**image.env, **{name: Template(value).substitute(known) for name, _, value in told}}}


def _workdir(image: Image, rest: str) -> dict[str, Any]:
    image.place(rest).mkdir(parents=True, exist_ok=True)
    return {"workdir": rest}


_TOLD: dict[str, Callable[[Image, str], dict[str, Any]]] = {
    "ENV": _env,
    "WORKDIR": _workdir,
    "USER": lambda _, rest: {"user": rest},
    "ENTRYPOINT": lambda _, rest: {"entrypoint": tuple(json.loads(rest))},
    "CMD": lambda _, rest: {"cmd": tuple(json.loads(rest))},
    "HEALTHCHECK": lambda _, rest: {"healthcheck": tuple(json.loads(rest.partition(" CMD ")[2]))},
    "EXPOSE": lambda _, __: {},
}
"""What instructions say of an image, without doing anything in it."""


def _is_link(name: str) -> bool:
    return Path("/", name).is_symlink()


def _is_folder(name: str) -> bool:
    return Path("/", name).is_dir() and not _is_link(name)


# Running --------------------------------------------------------------------------------------------------------------


@contextmanager
def started(
    image: Image,
    command: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    mounts: Volumes | None = None,
    building: bool = False,
) -> Iterator[subprocess.Popen[str]]:
    """Start an image's entrypoint with a command, or its own; it is killed when the block ends, if it still runs.

    While `building`, a shell runs as root, may write anywhere and has no network.
    """
    run = tuple(command) if building else (*image.entrypoint, *(command or image.cmd))
    script = "\n".join(["set -e", *_mounting(image, mounts or {}, building=building), _entering(image, run, building)])
    apart = ("unshare", "--mount", "--pid", "--fork", "--kill-child", *(("--net",) if building else ()))
    with subprocess.Popen(
        [*apart, "sh", "-c", script],
        env={**image.env, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # and with it whoever lives in its namespace


def first(process: subprocess.Popen[str]) -> int:
    """Return how this machine calls the process 1 of an image that runs, once there is one.

    Raises:
        LookupError: there is none yet.
    """
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if not children:
        raise LookupError("nothing runs yet")
    return int(children[0])


def healthy(image: Image, process: subprocess.Popen[str], env: Mapping[str, str]) -> bool:
    """Return whether the image's own check of its health is content with what runs."""
    inside = ("nsenter", "--target", str(first(process)), "--mount", "--pid", "--root", "--wd=/")
    check = subprocess.run([*inside, *_demoted(image), *image.healthcheck], env={**image.env, **env}, check=False)
    return check.returncode == 0


def _mounting(image: Image, mounts: Volumes, *, building: bool) -> Iterator[str]:
    """Yield the lines that lay out a root; all of it is gone with the namespace."""
    root = shlex.quote(str(image.root))
    yield f"mount --bind {root} {root}"
    for name in filter(_is_folder, _SYSTEM):
        yield from _bound(f"/{name}", f"{root}/{name}", "ro")
    below = "/usr/local" if sys.base_prefix == "/usr" else sys.base_prefix
    if below != "/usr/local":
        yield from _bound(below, f"{root}{below}", "ro")  # where this Python looks for its own library
    layers = f"lowerdir={below},upperdir={image.over}/upper,workdir={image.over}/work"
    yield f"mount -t overlay overlay -o {shlex.quote(layers)} {root}/usr/local"
    if not building:
        yield f"mount -o remount,bind,ro {root}/usr/local"
    yield f"mount --rbind /dev {root}/dev"
    yield f"mount -t proc proc {root}/proc"
    for place, (here, mode) in mounts.items():
        yield from _bound(str(here), f"{root}{place}", mode)
    if not building:
        yield f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp"  # noqa: S108 - not this machine's
        yield f"mount -o remount,bind,ro {root}"


def _bound(here: str, there: str, mode: Mode) -> Iterator[str]:
    yield f"mount --bind {shlex.quote(here)} {shlex.quote(there)}"
    if mode == "ro":
        yield f"mount -o remount,bind,ro {shlex.quote(there)}"


def _entering(image: Image, run: Sequence[str], building: bool) -> str:  # noqa: FBT001 - as it came
    words = () if building else _demoted(image)
    return shlex.join(["exec", "chroot", str(image.root), "env", f"--chdir={image.workdir}", *words, *run])


def _demoted(image: Image) -> tuple[str, ...]:
    """Return what makes a command the image's user's, without any capability."""
    user, _, group = image.user.partition(":")
    return ("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs", "--bounding-set=-all")
