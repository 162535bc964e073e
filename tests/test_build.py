"""What was built: an op library on LibTorch's stable ABI, free of Python and OpenMP, whose instruction-set levels keep
to themselves; and a build that, where it can't succeed, says what to do.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vcr_ops
from vcr_ops import _C, library

ROOT = Path(__file__).resolve().parent.parent
TORCH_SYMBOL = re.compile(r"\b(at|c10|caffe2|torch)::")
# The C functions of torch's stable ABI, and what a C++ program takes from its run-time libraries.
STABLE_SYMBOL = re.compile(r"(aoti_)?torch_\w+$")
LEVELS = {"x86_64": ["baseline", "avx2", "avx512"], "aarch64": ["neon"], "arm64": ["neon"]}[platform.machine()]

needs_binutils = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("nm") and shutil.which("readelf")), reason="reads ELF with binutils"
)


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def symbols(file: Path, *options: str) -> list[tuple[str, str]]:
    """(type, demangled name) of each."""
    found = []
    for line in output("nm", "-C", "--no-recurse-limit", *options, file).splitlines():
        kind, name = re.fullmatch(r"[0-9a-f ]{16,} (\w) (.*)", line).groups()
        found.append((kind, name))
    assert found
    return found


def needed(file: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", file)))


@needs_binutils
def test_op_library_takes_only_the_stable_abi():
    undefined = [name for _, name in symbols(library.PATH, "-D", "--undefined-only")]
    assert [name for name in undefined if TORCH_SYMBOL.search(name)] == []
    from_torch = [name for name in undefined if "torch" in name or "aoti" in name]
    assert len(from_torch) > 10
    assert [name for name in from_torch if not STABLE_SYMBOL.match(name)] == []


@needs_binutils
def test_op_library_is_free_of_python_and_openmp():
    undefined = [name for _, name in symbols(library.PATH, "-D", "--undefined-only")]
    assert [name for name in undefined if re.match(r"_?Py|GOMP_|omp_|__kmpc", name)] == []
    libraries = needed(library.PATH)
    assert "libtorch_cpu.so" in libraries
    assert [name for name in libraries if re.match(r"lib(python|torch_python|gomp|omp|iomp5|c10)\b", name)] == []


@needs_binutils
def test_info_module_needs_no_torch():
    assert [name for name in needed(Path(_C.__file__)) if "torch" in name or "c10" in name] == []


@needs_binutils
def test_levels_keep_to_themselves():
    """One exported symbol per object: a weak one would be merged with another level's, which may not run here."""
    objects = sorted(ROOT.glob(f"build/native-*-{sys.implementation.cache_tag}*/kernels/*.o"))
    if not objects and not os.environ.get("CI"):
        pytest.skip("the objects of the build aren't here")
    assert {path.stem for path in objects} == {
        f"{level}-{dtype}" for level in LEVELS for dtype in ("float", "double", "bf16")
    }
    for path in objects:
        level, dtype = path.stem.split("-")
        defined = [(kind, name) for kind, name in symbols(path, "--defined-only") if kind.isupper() or kind in "vwu"]
        # DW.ref.*: an address that exception tables point to; data, so the same in every level.
        ours = [name for _, name in defined if not name.startswith("DW.ref.")]
        assert ours == [f"vcr::kernels_{level}_{dtype}"], path.name


def test_build_info():
    info = _C.build_info()
    assert info["version"] == importlib.metadata.version("vcr-ops") == vcr_ops.__version__
    assert tuple(int(part) for part in info["torch"].split(".")[:2]) >= (2, 10)
    assert info["isa_levels"] == LEVELS
    assert bool(info["cuda_archs"]) == library.CUDA_PATH.is_file()
    assert info["compiler"]
    assert info["variants"] == _C.variants()
    assert _C.active_isa() == library.active_isa()
    assert library.active_isa() in library.isa_levels()
    assert set(library.isa_levels()) <= set(LEVELS)


def test_info_module_without_the_op_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "why_not", lambda: "the C++ ops aren't built")
    with pytest.raises(RuntimeError, match=r"^the C\+\+ ops aren't built$"):
        _C.active_isa()


def test_environment_report():
    report = output(sys.executable, "-m", "vcr_ops")
    for expected in (torch.__version__, vcr_ops.__version__, platform.python_version(), library.active_isa()):
        assert expected in report


@pytest.mark.parametrize("level", [*LEVELS, "sse9"])
def test_named_level(level: str):
    code = "from vcr_ops import _C; print(_C.active_isa())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"VCR_OPS_ISA": level}, capture_output=True, text=True
    )
    if level in library.isa_levels():
        assert run.stdout.split() == [level], run.stderr
    else:  # an error that names the choices, never a quiet second best
        assert run.returncode != 0
        assert "VCR_OPS_ISA" in run.stderr
        assert level in run.stderr
        assert library.isa_levels()[0] in run.stderr


# --- builds that can't succeed --------------------------------------------------------------------------------------


def failed_build(**environment: str) -> str:
    """What ``setup.py build_ext`` says when it stops."""
    run = subprocess.run(
        [sys.executable, "-S", "setup.py", "-q", "build_ext", "--inplace"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert len(run.stderr.strip().splitlines()) <= 8, run.stderr
    return run.stderr


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of packages to build with: this environment's, but for torch."""
    for package in Path(torch.__file__).parent.parent.iterdir():
        if not package.name.startswith("torch"):
            (tmp_path / package.name).symlink_to(package)
    return tmp_path


def test_build_without_torch(packages: Path):
    said = failed_build(PYTHONPATH=str(packages))
    assert "has no PyTorch" in said
    assert "pip install --no-build-isolation" in said


def test_build_with_old_torch(packages: Path):
    (packages / "torch").mkdir()
    (packages / "torch/__init__.py").touch()
    (packages / "torch-2.9.1.dist-info").mkdir()
    (packages / "torch-2.9.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n")
    said = failed_build(PYTHONPATH=str(packages))
    assert "needs torch 2.10 or later, and torch 2.9.1 is installed" in said
    assert "pip install 'torch>=2.10'" in said


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"VCR_OPS_CUDA": "yes"}, "VCR_OPS_CUDA is 'yes'"),
        ({"NVCC": "false", "TORCH_CUDA_ARCH_LIST": "9.0 Hopper"}, "'Hopper' is no architecture by number"),
        ({"NVCC": "false", "TORCH_CUDA_ARCH_LIST": "7.5;9.0"}, "is '7.5;9.0', and the CUDA kernels need 8.0 or later"),
        pytest.param(
            {"VCR_OPS_CUDA": "1", "NVCC": "", "CUDA_HOME": "/nowhere", "CUDA_PATH": "", "PATH": "/nowhere"},
            "there is no nvcc",
            marks=pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="nvcc is where it is sought"),
        ),
    ],
)
def test_build_with_cuda(environment: dict[str, str], expected: str):
    cxx = shutil.which("c++") or "c++"  # by its place, for PATH may be another
    assert expected in failed_build(PYTHONPATH=str(Path(torch.__file__).parent.parent), **{"CXX": cxx} | environment)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"CXX": "/nowhere/g++"}, "'/nowhere/g++' doesn't start"),
        ({"CXX": "false"}, "'false' doesn't compile a C++17 program"),
        ({"CXX": "", "PATH": "/nowhere"}, "there is no C++ compiler"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS is 'many'"),
    ],
)
def test_build_without_compiler(environment: dict[str, str], expected: str):
    said = failed_build(PYTHONPATH=str(Path(torch.__file__).parent.parent), **environment)
    assert expected in said
