"""Debian's packages, with all that they need, in a folder: for tools that no Python package has.

For machines with Debian among apt's sources, of any release. apt runs with a configuration of its own and
installs nothing, and needs no root; what it loads is checked against Debian's keys.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


def mirror() -> str:
    """The address from which this machine's apt gets Debian."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    try:
        addresses = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except FileNotFoundError:
        raise SystemExit("no apt-get: this is for Debian and what derives from it") from None
    if not addresses:
        raise SystemExit("apt knows no source whose origin is Debian (apt-get update looks for them)")
    return addresses[0]


@contextmanager
def downloaded(
    packages: tuple[str, ...],
    suite: str,
    *,
    architecture: str = "amd64",
    components: str = "main",
    with_dependencies: bool = True,
) -> Iterator[list[Path]]:
    """The .deb files of these packages, and of what they depend on, while the context lasts.

    suite: a release, such as "bookworm"; architecture: as Debian names it. Raises CalledProcessError where
    apt fails: it has said why.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("lists/partial", "cache/archives/partial", "state"):
            (folder / part).mkdir(parents=True)
        (folder / "status").touch()  # of installed packages: none
        source = f"deb [signed-by={KEYS}] {mirror()} {suite} {components}\n"
        (folder / "sources.list").write_text(source)
        settings = {
            "Dir::State": folder / "state",
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Install-Recommends": "0",
            "APT::Sandbox::User": "root",  # a user of apt's own could not write here
            "Debug::NoLocking": "1",  # of this machine's packages, which are not touched
        }
        apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
        subprocess.run([*apt, "update"], cwd=folder, check=True)
        command = ["--yes", "--download-only", "install"] if with_dependencies else ["download"]
        subprocess.run([*apt, *command, *packages], cwd=folder, check=True)
        yield sorted(folder.glob("cache/archives/*.deb" if with_dependencies else "*.deb"))


def unpacked(folder: Path, suite: str, *packages: str, architecture: str = "amd64") -> Path:
    """The folder, with the packages and what they need, unless it has them from before."""
    complete = folder / ".complete"
    if not complete.exists():
        print(f"Debian {suite}: {', '.join(packages)}", flush=True)
        unpack(packages, suite, folder, architecture=architecture)
        complete.touch()
    return folder


def write_script(path: Path, command: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


def compiler_script(path: Path, folder: Path, program: str) -> str:
    """The path of a script that runs the compiler usr/bin/`program` of a folder on that folder's headers and
    libraries."""
    libraries = folder / "usr/lib/x86_64-linux-gnu"
    command = f'LD_LIBRARY_PATH={libraries} exec {folder}/usr/bin/{program} --sysroot={folder} "$@"'
    write_script(path, command)
    return str(path)


def unpack(packages: tuple[str, ...], suite: str, target: Path, *, architecture: str = "amd64") -> None:
    """The packages and what they depend on, as if `target` were the file system's root; no script is run."""
    target.mkdir(parents=True, exist_ok=True)
    with downloaded(packages, suite, architecture=architecture) as files:
        for file in files:
            subprocess.run(["dpkg-deb", "--extract", str(file), str(target)], check=True)
