"""Builds the native files of vcr_ops; everything else about the package stands in pyproject.toml.

``vcr_ops/_ops.so``
    The op library, on LibTorch's stable ABI: it knows nothing of Python and serves every torch from 2.10 on. The
    kernels' source, ``csrc/cpu/table_isa.cpp``, is compiled once per instruction-set level and feature type.
``vcr_ops/_cuda.so``
    The CUDA kernels of the same ops, where nvcc is found. It loads beside any torch, with CUDA or without, and finds
    what it needs of one with CUDA when it first launches. ``csrc/cuda/instances.cu`` is compiled once per feature type.
``vcr_ops/_C.cpython-*.so``
    A small pybind11 module that says what was built in.

All objects of all files go through one ninja run, which follows header dependencies and compiles in parallel.
Environment:

``MAX_JOBS``                 compile jobs at a time (default: the cores this process may use)
``CXX CXXFLAGS LDFLAGS``     the compiler, and flags added after ours
``VCR_OPS_CXX_WERROR=1``     -Wall -Wextra -Werror for our sources
``VCR_OPS_CUDA=0|1``         leave the CUDA kernels out, or demand them (default: built where nvcc is found)
``NVCC``                     the CUDA compiler (default: CUDA_HOME's, else nvcc on the path, else /usr/local/cuda's)
``TORCH_CUDA_ARCH_LIST``     the GPUs to compile for, as torch reads it (default: see DEFAULT_CUDA_ARCHS)
"""

import filecmp
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools import __version__ as setuptools_version
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

OLDEST_TORCH = (2, 10)
TORCH_TARGET = "0x020a000000000000"  # OLDEST_TORCH, as torch's headers spell it
INSTALL = "pip install 'torch>=2.10' 'setuptools>=77' wheel pybind11 ninja"

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# As ninja sees it from the build folder. Relative: in a copy of the whole tree the objects stay valid.
SEEN_CSRC = Path("../../csrc")

COMPILE_FLAGS = [
    f"-I{SEEN_CSRC}",
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
]
# g++ 12 reports its own AVX-512 headers under -Wuninitialized and -Wmaybe-uninitialized.
WARNING_FLAGS = ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
X86_LEVELS: dict[str, list[str]] = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
}
ARM_LEVELS: dict[str, list[str]] = {"neon": []}
LEVELS = {"x86_64": X86_LEVELS, "amd64": X86_LEVELS, "aarch64": ARM_LEVELS, "arm64": ARM_LEVELS}
DTYPES = ["bf16", "float", "double"]  # in csrc's names; the slowest to compile first
CUDA_DTYPES = ["double", "float", "bf16", "f16"]
OLDEST_CUDA_ARCH = (8, 0)
DEFAULT_CUDA_ARCHS = "8.0;9.0;10.0+PTX"
# Contracted multiply-adds would round differently in both directions: csrc spells them out.
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def stop(problem: str, remedy: str) -> SystemExit:
    """What a failed build ends with: two lines for a reader, no traceback."""
    return SystemExit(f"\nvcr_ops can't be built: {problem}\n{remedy}\n")


# --- what the machine has -------------------------------------------------------------------------------------------


def torch_root() -> Path:
    """The folder of the torch to build against. torch isn't imported: that would take longer than the build check."""
    remedy = (
        "Its C++ ops are compiled against the PyTorch that you have. Install that and the build tools,\n"
        "then build without isolation:\n"
        f"    {INSTALL}\n"
        f"    pip install --no-build-isolation ."
    )
    spec = util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise stop(
            f"{sys.executable} has no PyTorch (or pip hides it: it builds in an isolated environment by default).",
            remedy,
        )
    version = metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise stop(f"it needs torch 2.10 or later, and torch {version} is installed.", remedy)
    root = Path(next(iter(spec.submodule_search_locations)))
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        raise stop(f"the torch {version} in {root} comes without its C++ headers.", remedy)
    return root


def compiler() -> list[str]:
    """The C++ compiler's command, seen to compile C++17."""
    remedy = (
        "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++),\n"
        "or name one in the environment variable CXX."
    )
    asked = os.environ.get("CXX")
    if asked:
        command = shlex.split(asked)
    else:
        command = [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))][:1]
        if not command:
            raise stop("there is no C++ compiler (looked for c++, g++ and clang++).", remedy)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <vector>\ntemplate <auto> struct needs_cxx17 {};\nneeds_cxx17<1> probe; std::vector<int> v;\n"
        )
        try:
            subprocess.run(
                [*command, "-std=c++17", "-fsyntax-only", str(source)], check=True, capture_output=True, text=True
            )
        except OSError as error:
            raise stop(f"the C++ compiler {shlex.join(command)!r} doesn't start: {error.strerror}.", remedy) from None
        except subprocess.CalledProcessError as error:
            lines = "\n".join(f"    {line}" for line in error.stderr.splitlines()[:5])
            raise stop(f"{shlex.join(command)!r} doesn't compile a C++17 program:\n{lines}", remedy) from None
    return command


def ninja() -> str:
    try:
        from ninja import BIN_DIR  # pip's ninja, found also when the environment isn't activated
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = str(Path(BIN_DIR, "ninja"))
    if not found:
        raise stop("ninja is missing.", f"Install the build tools:\n    {INSTALL}")
    return found


def nvcc() -> str | None:
    """The CUDA compiler's command, or None where the CUDA kernels are to be left out."""
    asked = os.environ.get("VCR_OPS_CUDA", "")
    if asked not in ("", "0", "1"):
        raise stop(
            f"VCR_OPS_CUDA is {asked!r}.", "Set it to 1 or 0 (with the CUDA kernels or without), or leave it unset."
        )
    if asked == "0" or sys.platform != "linux":
        return None
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    tried = [os.environ.get("NVCC") or "", *(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next((path for command in tried if command and (path := shutil.which(command))), None)
    if found is None and asked == "1":
        raise stop(
            "VCR_OPS_CUDA=1 asks for the CUDA kernels, and there is no nvcc.",
            "Install CUDA's compiler (the CUDA toolkit, 12.8 or later for all GPUs), or name it in NVCC or CUDA_HOME.",
        )
    return found


def cuda_archs() -> list[str]:
    """``TORCH_CUDA_ARCH_LIST`` taken apart: "9.0" is code for sm_90, "9.0+PTX" also what later GPUs translate."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS
    archs = [arch for arch in re.split(r"[;, ]+", text) if arch]
    remedy = f"List architectures from 8.0 on, as in {DEFAULT_CUDA_ARCHS!r}, or set VCR_OPS_CUDA=0."
    for arch in archs:
        parts = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if parts is None:
            raise stop(f"TORCH_CUDA_ARCH_LIST is {text!r}, and {arch!r} is no architecture by number.", remedy)
        if (int(parts[1]), int(parts[2])) < OLDEST_CUDA_ARCH:
            raise stop(f"TORCH_CUDA_ARCH_LIST is {text!r}, and the CUDA kernels need 8.0 or later.", remedy)
    return archs


def python_includes() -> list[Path]:
    """Include folders of ``_C``: Python's and pybind11's."""
    folders = list(dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("include", "platinclude")))
    if not any((folder / "Python.h").is_file() for folder in folders):
        raise stop(
            f"Python.h isn't in {folders[0]}.",
            "Install Python's headers (Debian, Ubuntu: apt-get install python3-dev; Fedora: python3-devel).",
        )
    try:
        import pybind11
    except ImportError:
        raise stop("pybind11 is missing.", f"Install the build tools:\n    {INSTALL}") from None
    return [*folders, Path(pybind11.get_include())]


def strict() -> bool:
    return os.environ.get("VCR_OPS_CXX_WERROR") == "1"


def job_count() -> int:
    asked = os.environ.get("MAX_JOBS")
    if not asked:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked.isdecimal() or int(asked) < 1:
        raise stop(
            f"MAX_JOBS is {asked!r}.", "Set it to the number of compile jobs to run at a time, or leave it unset."
        )
    return int(asked)


# --- what is to be built --------------------------------------------------------------------------------------------


class Object(NamedTuple):
    """One compiler call; ``name`` is the object's path below the build folder, ``rule`` ninja's: cxx or nvcc."""

    name: str
    source: Path
    flags: list[str]
    rule: str = "cxx"


class Library(NamedTuple):
    """One linker call; ``name`` is the file's name below the build folder, ``rule`` ninja's: link or nvcc_link."""

    name: str
    objects: list[Object]
    flags: list[str]
    rule: str = "link"


def system_includes(folders: Iterable[Path]) -> list[str]:
    return [f"-isystem{folder}" for folder in folders]  # no warnings from there


def op_library(torch: Path) -> Library:
    """``_ops.so``. Only ``binding`` sources see torch; the kernels see nothing but ``csrc``."""
    machine = platform.machine().lower()
    if machine not in LEVELS:
        raise stop(
            f"its C++ kernels are for x86-64 and 64-bit Arm, and this is {machine}.", "Nothing of it runs there yet."
        )
    levels = LEVELS[machine]
    table = CSRC / "cpu/table_isa.cpp"
    kernels = [
        Object(f"kernels/{level}-{dtype}.o", table, [*flags, f"-DVCR_LEVEL={level}", f"-DVCR_DTYPE={dtype}"])
        for dtype in DTYPES
        for level, flags in reversed(levels.items())
    ]
    plain = [path for path in CSRC.glob("cpu/*.cpp") if path != table]
    bindings = [*CSRC.glob("*/binding_cpu.cpp"), CSRC / "binding/library.cpp"]
    torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *system_includes([torch / "include"])]
    others = [
        Object(f"ops/{path.relative_to(CSRC).with_suffix('.o')}", path, flags)
        for paths, flags in ((plain, []), (bindings, torch_flags))
        for path in sorted(paths)
    ]
    link = ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu"]
    if sys.platform == "linux":
        # Every symbol must be found now, not at load time. No -rpath: torch is in memory before this library is.
        link += ["-Wl,--no-undefined", "-Wl,--as-needed", f"-Wl,-rpath-link,{torch / 'lib'}"]
    return Library("_ops.so", [*kernels, *others], link)


def cuda_library(torch: Path, archs: list[str]) -> Library:
    """``_cuda.so``. ``*.cu`` see CUDA and not torch, ``binding*`` sources torch and not CUDA."""
    gencode = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        gencode += ["-gencode", f"arch=compute_{number},code={code}"]
    kernels = [
        Object(
            f"cuda/{dtype}.o",
            CSRC / "cuda/instances.cu",
            [*gencode, f"-DVCR_DTYPE={dtype}", f"-DVCR_STATES={int(dtype in ('float', 'double'))}"],
            "nvcc",
        )
        for dtype in CUDA_DTYPES
    ]
    own = Object("cuda/library.o", CSRC / "cuda/library.cu", gencode, "nvcc")
    torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *system_includes([torch / "include"])]
    torch_flags.append(f'-DVCR_CUDA_ARCHS="{", ".join(archs)}"')
    bindings = [
        Object(f"cuda/{path.relative_to(CSRC).with_suffix('.o')}", path, torch_flags)
        for path in sorted([*CSRC.glob("*/binding_cuda.cpp"), CSRC / "binding/cuda.cpp"])
    ]
    link = ["-shared", "-cudart", "static", f"-L{torch / 'lib'}", "-ltorch_cpu", "-ldl"]
    for option in ("--no-undefined", "--as-needed", f"-rpath-link={torch / 'lib'}"):
        link += ["-Xlinker", option]
    return Library("_cuda.so", [*kernels, own, *bindings], link, "nvcc_link")


def info_module(version: str, archs: list[str]) -> Library:
    """``_C``."""
    defines = [f'-DVCR_OPS_VERSION="{version}"', f'-DVCR_TORCH_VERSION="{metadata.version("torch")}"']
    defines.append(f'-DVCR_CUDA_ARCHS="{" ".join(archs)}"')
    flags = ["-O1", *system_includes(python_includes()), *defines]
    link = ["-shared"] if sys.platform == "linux" else ["-shared", "-undefined", "dynamic_lookup"]
    return Library(
        f"_C{sysconfig.get_config_var('EXT_SUFFIX')}",
        [Object("info/module.o", CSRC / "binding/module.cpp", flags)],
        link,
    )


def ninja_file(command: list[str], cuda: str | None, libraries: list[Library]) -> str:
    def path(text: object) -> str:
        return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def shell(words: Iterable[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    compile_words = [*command, *COMPILE_FLAGS, *(WARNING_FLAGS if strict() else [])]
    compile_extra, link_extra = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {shell(compile_words)} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {shell(command)} -o $out $in $flags",
        "  description = link $out",
    ]
    extra = {"cxx": compile_extra, "link": link_extra, "nvcc": [], "nvcc_link": []}
    if cuda is not None:
        host = [cuda, "-ccbin", command[0]]
        # What ptxas says of registers and spills is kept beside the object.
        lines += [
            "rule nvcc",
            f"  command = {shell([*host, *NVCC_FLAGS])} -Xptxas -v $flags -MD -MF $out.d -c $in -o $out "
            ">$out.ptxas 2>&1 || { cat $out.ptxas; exit 1; }",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule nvcc_link",
            f"  command = {shell(host)} -o $out $in $flags",
            "  description = link $out",
        ]
    for library in libraries:
        for each in library.objects:
            lines += [
                f"build {path(each.name)}: {each.rule} {path(SEEN_CSRC / each.source.relative_to(CSRC))}",
                f"  flags = {shell([*each.flags, *extra[each.rule]])}",
            ]
        objects = " ".join(path(each.name) for each in library.objects)
        lines += [
            f"build {path(library.name)}: {library.rule} {objects}",
            f"  flags = {shell([*library.flags, *extra[library.rule]])}",
        ]
    return "\n".join(lines) + "\n"


# --- setuptools' commands -------------------------------------------------------------------------------------------


class BuildNative(build_ext):
    """Runs ninja over everything at once, in a folder that outlives pip's temporary ones."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith(("_ops", "_cuda")):
            return str(Path(*fullname.split("."))) + ".so"  # not tied to a Python
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        torch, cuda = torch_root(), nvcc()
        archs = cuda_archs() if cuda else []
        libraries = {
            "vcr_ops._ops": op_library(torch),
            "vcr_ops._C": info_module(self.distribution.get_version(), archs),
        }
        if cuda:
            libraries["vcr_ops._cuda"] = cuda_library(torch, archs)
        text = ninja_file(compiler(), cuda, list(libraries.values()))
        kind = "-strict" if strict() else ""  # apart, so that neither build makes the other start anew
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        plan = folder / "build.ninja"
        if not plan.is_file() or plan.read_text() != text:
            plan.write_text(text)
        if subprocess.run([ninja(), "-C", str(folder), "-j", str(job_count())]).returncode != 0:
            raise stop("a compiler or linker call failed.", "What it said stands above, under FAILED.")
        for name, library in libraries.items():
            put(folder / library.name, Path(self.get_ext_fullpath(name)))
        if not cuda:  # what an earlier build left would not be what _C tells of
            Path(self.get_ext_fullpath("vcr_ops._cuda")).unlink(missing_ok=True)


def put(built: Path, target: Path) -> None:
    """Copies in one step, since a running process may have the old file mapped."""
    if target.is_file() and filecmp.cmp(built, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(built, fresh)
    os.replace(fresh, target)


class DistInfo(dist_info):
    """pip's first question, answered only where there is a torch: else pip would fetch one before the build fails."""

    def run(self) -> None:
        torch_root()
        super().run()


if __name__ == "__main__":
    if int(setuptools_version.split(".")[0]) < 77:  # pyproject.toml would stop it with a traceback
        raise stop(
            f"it needs setuptools 77 or later, and setuptools {setuptools_version} is installed.",
            f"Install the build tools:\n    {INSTALL}",
        )
    setup(
        # _cuda.so, which not every build makes, is a further file that build_ext puts beside these.
        ext_modules=[Extension("vcr_ops._ops", []), Extension("vcr_ops._C", [])],
        cmdclass={"build_ext": BuildNative, "dist_info": DistInfo},
    )
