"""Declares what pyproject.toml cannot: the packages, with kernels/ installed as xpo_fast.kernels, and the CUDA library.

If nvcc is found (in CUDA_HOME or CUDA_PATH, or on PATH), csrc/*.cu are built into xpo_fast/_native/libxpo_fast_cuda.so,
which links only CUDA's static runtime and is loaded by ctypes. ptxas.txt beside it records the version of nvcc, the
command, and the resources of each kernel. The library is rebuilt if a source is newer, or if nvcc or the command has
changed. XPO_FAST_CUDA=0 skips the library. A failed build is a warning, and an error with XPO_FAST_CUDA=1. Targets that
nvcc does not know are skipped with a warning.
"""

import os
import shutil
import subprocess
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NAME, REPORT = "libxpo_fast_cuda.so", "ptxas.txt"
# compute_90 is PTX, from which the driver compiles for all other devices when it loads the library.
TARGETS = {
    "sm_80": "arch=compute_80,code=sm_80",
    "sm_90a": "arch=compute_90a,code=sm_90a",
    "sm_100f": "arch=compute_100f,code=sm_100f",
    "compute_90": "arch=compute_90,code=compute_90",
}
WANTED = os.environ.get("XPO_FAST_CUDA", "")


def find_nvcc() -> str | None:
    """Returns the path of nvcc in CUDA_HOME, in CUDA_PATH or on PATH, the first that exists, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join(os.path.join(h, "bin") for h in homes)) or shutil.which("nvcc")


def known_targets(nvcc: str) -> dict[str, str]:
    """Returns the targets that nvcc compiles for; all of them if it accepts none, so that the build shows the error.

    nvcc makes a dry run of each, since --list-gpu-code lists no targets of one chip or family, such as 90a and 100f.
    """
    dry_run = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull, "-gencode"]
    known = {
        name: target
        for name, target in TARGETS.items()
        if subprocess.run([*dry_run, target], capture_output=True).returncode == 0
    }
    missing = ", ".join(name for name in TARGETS if name not in known)
    if missing and known:
        warnings.warn(
            f"xpo-fast's CUDA library is built without {missing}, which {nvcc} does not know: install a newer nvcc",
            stacklevel=1,
        )
    return known or TARGETS


class BuildNative(build_ext):
    """Builds a plain library with nvcc, instead of an extension module with Python's compiler."""

    def run(self) -> None:
        """Builds the library, or warns and leaves it out if that fails and XPO_FAST_CUDA is not 1."""
        for ext in list(self.extensions):
            try:
                self._build(ext)
            except RuntimeError as error:
                if WANTED == "1":
                    raise
                warnings.warn(f"xpo-fast is installed without its CUDA library: {error}", stacklevel=1)
                for file in self._files(ext):  # of an earlier build: they would be installed
                    file.unlink(missing_ok=True)
                self.extensions.remove(ext)

    def get_ext_filename(self, fullname: str) -> str:
        """Returns the library's path within the package."""
        return os.path.join(*fullname.split(".")[:-1], NAME)

    def get_outputs(self) -> list[str]:
        """Returns the files to install: each library and its report."""
        return [str(f) for ext in self.extensions for f in self._files(ext)]

    def _files(self, ext: Extension) -> tuple[Path, Path]:
        library = Path(self.get_ext_fullpath(ext.name))
        return library, library.with_name(REPORT)

    def _build(self, ext: Extension) -> None:
        library, report = self._files(ext)
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("there is no nvcc on PATH, nor in CUDA_HOME")
        targets = known_targets(nvcc)
        command = [nvcc, "-shared", "-O3", "-std=c++17", "-t", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        command += ["-cudart", "static", "-Xptxas", "-v", f'-DXPO_ARCHITECTURES="{" ".join(targets)}"']
        command += [word for target in targets.values() for word in ("-gencode", target)]
        command += ext.sources
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        how = f"{version}{' '.join(command)}\n"
        if not self.force and self._is_current(library, report, how):
            return
        library.parent.mkdir(parents=True, exist_ok=True)
        beside = library.with_name(f".{os.getpid()}.{NAME}")  # renamed once complete: the old library may be in use
        command += ["-o", str(beside)]
        try:
            done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            report.write_text(how + done.stdout + done.stderr)
            beside.replace(library)
        finally:
            beside.unlink(missing_ok=True)

    @staticmethod
    def _is_current(library: Path, report: Path, how: str) -> bool:
        if not (library.exists() and report.exists() and report.read_text().startswith(how)):
            return False
        made = min(library.stat().st_mtime, report.stat().st_mtime)
        return all(f.stat().st_mtime <= made for f in (HERE / "setup.py", *(HERE / "csrc").iterdir()))


class Wheel(bdist_wheel):
    """Tags the wheel by platform only: the library does not depend on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Returns the tags of Python, ABI and platform."""
        *_, platform = super().get_tag()
        return "py3", "none", platform


sources = sorted(str(f.relative_to(HERE)) for f in (HERE / "csrc").glob("*.cu"))
native = WANTED == "1" or (WANTED != "0" and find_nvcc() is not None)

setup(
    packages=[*find_packages(include=["xpo_fast*"]), "xpo_fast.kernels"],
    package_dir={"xpo_fast.kernels": "kernels"},
    ext_modules=[Extension("xpo_fast._native.library", sources)] if native else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
