"""Builds the native code through CMake; everything else about the package stands in pyproject.toml.

Environment: MAX_JOBS (parallel compilations, default 2), SLIDERQUANT_CUDA (0: no CUDA kernels, 1: fail without nvcc,
unset: where an nvcc of 12.0 or later is found), SLIDERQUANT_CUDA_ARCHS (such as "80;90a", the default; newer GPUs
compile the PTX of the lowest one at first use), CUDACXX or CUDA_HOME (an nvcc that is not on PATH).
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_CUDA_ARCHS = "80;90a"
OLDEST_NVCC = (12, 0)


def package_dir(name: str) -> Path:
    """Directory of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"sliderquant-vllm: {name} is not installed in {sys.executable}, and the native code is built against it; "
            f"install it there and build again with 'pip install --no-build-isolation -e .'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def tool(name: str) -> str:
    """A build tool from PATH or, in an environment that is not activated, beside the running interpreter."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"sliderquant-vllm: {name} not found; install it with 'pip install {name}' and build again")
    return found


def locate_nvcc() -> str | None:
    """The CUDA compiler that is named or on PATH, or else that of the wheel nvidia-cuda-nvcc in this environment."""
    if found := os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return found
    home = os.environ.get("CUDA_HOME")
    folders = [Path(home, "bin")] if home else []
    folders += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin"))
    return shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))


def find_nvcc() -> str | None:
    """The CUDA compiler to build with, None for a build without CUDA kernels."""
    request = os.environ.get("SLIDERQUANT_CUDA", "")
    if request not in ("", "0", "1"):
        raise SystemExit(f"SLIDERQUANT_CUDA: expected 0, 1 or nothing, found {request!r}")
    if request == "0":
        return None
    found = locate_nvcc()
    problem = nvcc_problem(found) if found else "nvcc not found; put it on PATH or set CUDA_HOME or CUDACXX"
    if problem and request == "1":
        raise SystemExit(
            f"SLIDERQUANT_CUDA=1, which make sets where it takes cuda.lock: {problem}; "
            "SLIDERQUANT_CUDA=0 builds without CUDA kernels"
        )
    if found and problem:
        print(f"warning: {problem}; building without CUDA kernels", file=sys.stderr)
    return None if problem else found


def nvcc_problem(nvcc: str) -> str | None:
    """Why this CUDA compiler cannot build the kernels, or None."""
    expected = "expected nvcc {}.{} or later".format(*OLDEST_NVCC)
    try:
        output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{expected}, found {nvcc}, which does not run ({error})"
    version = re.search(r"release (\d+)\.(\d+)", output)
    if version is None or tuple(map(int, version.groups())) < OLDEST_NVCC:
        found = version[0] if version else "no version"
        return f"{expected}, found {found} ({nvcc}); name a newer one in CUDACXX"
    return None


def remove_moved_build(build: Path) -> None:
    """CMake refuses a build folder that was made for a checkout at another place."""
    cache = build / "CMakeCache.txt"
    if not cache.exists():
        return
    home = re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", cache.read_text(), re.MULTILINE)
    if home is None or Path(home[1]) != ROOT:
        shutil.rmtree(build)


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions, then copies each to where setuptools expects it."""

    def build_extensions(self):
        # A fixed place, not setuptools' temporary one: a second build compiles only what changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        torch, nvcc = package_dir("torch"), find_nvcc()
        archs = os.environ.get("SLIDERQUANT_CUDA_ARCHS") or DEFAULT_CUDA_ARCHS
        options = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "SLIDERQUANT_TORCH": torch,
            # torch ships the headers of pybind11.
            "SLIDERQUANT_PYTHON_INCLUDES": f"{sysconfig.get_path('include')};{torch / 'include'}",
            "SLIDERQUANT_CUDA": "ON" if nvcc else "OFF",
        }
        if nvcc:
            options["CMAKE_CUDA_COMPILER"] = nvcc
            options["SLIDERQUANT_CUDA_ARCHS"] = ";".join(re.split(r"[;, ]+", archs.strip()))
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        cmake = tool("cmake")
        remove_moved_build(build)
        subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *definitions], check=True)
        subprocess.run([cmake, "--build", build, "-j", os.environ.get("MAX_JOBS") or "2"], check=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Removed first: a process that has the old file mapped keeps it whole.
            target.unlink(missing_ok=True)
            shutil.copyfile(build / (extension.name.rpartition(".")[2] + ".so"), target)


if __name__ == "__main__":
    setup(
        ext_modules=[
            # _C is no Python module at all: its name only needs to be the same under every Python.
            Extension("sliderquant_vllm._C", sources=[], py_limited_api=True),
            Extension("sliderquant_vllm._host", sources=[]),
        ],
        cmdclass={"build_ext": CMakeBuild},
    )
