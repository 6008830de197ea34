"""setup.py's choices and errors, and what the installed package says about how it was built."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch

import m2d_ext
from m2d_ext import _extension, ops

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
needs_source = pytest.mark.skipif(not SETUP.exists(), reason="not in a source tree")
needs_extension = pytest.mark.skipif(not _extension.available(), reason="built without the extension")


@pytest.fixture(scope="module")
def setup_py():
    """setup.py as a module: imported under another name than __main__ it builds nothing."""
    spec = importlib.util.spec_from_file_location("m2d_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_setup(*args, **environ):
    return subprocess.run(
        [sys.executable, str(SETUP), *args],
        env={**os.environ, **environ},
        cwd=SETUP.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_source
def test_an_unknown_build_is_one_line():
    result = run_setup("--version", M2D_BUILD="gpu")
    assert result.returncode != 0
    assert result.stderr.strip() == "m2d_ext: M2D_BUILD='gpu' is unknown, choose one of auto, cpu, cuda, none."


@needs_source
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_cuda_build_without_a_cuda_torch_is_one_line():
    result = run_setup("build_ext", M2D_BUILD="cuda")
    assert result.returncode != 0
    assert result.stderr.strip().splitlines() == [
        f"m2d_ext: M2D_BUILD=cuda needs a CUDA build of torch, but torch {torch.__version__} is installed: "
        "install a CUDA build of torch, or set M2D_BUILD=cpu."
    ]


def run_setup_without_torch(*args):
    """With None in sys.modules Python behaves as if torch were not installed."""
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"import sys; sys.argv = {[str(SETUP), *args]!r}; {code}"
    environ = {k: v for k, v in os.environ.items() if k != "M2D_BUILD"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=SETUP.parent, capture_output=True, text=True, timeout=120
    )


@needs_source
def test_the_metadata_for_an_sdist_needs_no_torch(tmp_path):
    result = run_setup_without_torch("egg_info", "--egg-base", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"\nVersion: {m2d_ext.__version__}\n" in (tmp_path / "m2d_ext.egg-info" / "PKG-INFO").read_text()


@needs_source
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the default is to build nothing")
@pytest.mark.parametrize("commands", ["dist_info", "bdist_wheel", "build_ext", "clean bdist_wheel"])
def test_a_build_without_torch_says_in_one_line_what_to_type(commands):
    result = run_setup_without_torch(*commands.split())
    assert result.returncode != 0
    assert len(result.stderr.strip().splitlines()) == 1
    assert "run `pip install torch`, then `pip install --no-build-isolation .`" in result.stderr


@needs_source
@pytest.mark.parametrize(
    ("arguments", "compiles"),
    [
        ("", False),
        ("--version", False),
        ("bdist_wheel --help", False),
        ("clean --all", False),
        ("egg_info --egg-base out", False),
        ("sdist --formats gztar --dist-dir out", False),
        ("egg_info sdist", False),
        ("clean bdist_wheel", True),
        ("egg_info --tag-build .dev build_ext --inplace", True),
        ("bdist_wheel --dist-dir out", True),
        ("another_command", True),
    ],
)
def test_which_commands_compile(setup_py, arguments, compiles):
    assert setup_py.compiles(arguments.split()) is compiles


@needs_source
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the default is to build nothing")
@pytest.mark.parametrize("compiler", ["", "no_such_compiler -O2"])
def test_a_build_without_a_compiler_is_one_line(tmp_path, compiler):
    result = run_setup("bdist_wheel", M2D_BUILD="", CXX=compiler, PATH=str(tmp_path))
    assert result.returncode != 0
    name = compiler.split(" ")[0] or "c++"
    assert result.stderr.strip() == (
        f"m2d_ext: the extension needs a C++20 compiler, but there is no {name}: install one "
        "(such as g++), set CXX to the one to use, or set M2D_BUILD=none to install without the extension."
    )


@needs_source
def test_the_compiler_may_have_arguments_and_on_windows_be_anywhere(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    setup_py.check_compiler({"CXX": f"{sys.executable} -O2"}, "Linux")
    setup_py.check_compiler({}, "Windows")
    with pytest.raises(SystemExit, match=r"there is no c\+\+"):
        setup_py.check_compiler({}, "Darwin")


@needs_source
@pytest.mark.parametrize(("system", "build"), [("Linux", "auto"), ("Darwin", "none"), ("Windows", "none")])
def test_the_default_depends_on_the_platform(setup_py, system, build):
    assert setup_py.requested_build({}, system) == build
    assert setup_py.requested_build({"M2D_BUILD": "cpu"}, system) == "cpu"


CUDA = {"torch_version": "2.13.0+cu130", "torch_cuda": "13.0", "nvcc": "/cuda/bin/nvcc", "cuda_sources": ["a.cu"]}


@needs_source
@pytest.mark.parametrize(
    ("requested", "lacking", "build"),
    [
        ("auto", {}, "cuda"),
        ("auto", {"torch_cuda": None}, "cpu"),
        ("auto", {"nvcc": None}, "cpu"),
        ("auto", {"cuda_sources": []}, "cpu"),
        ("cpu", {}, "cpu"),
        ("cuda", {}, "cuda"),
    ],
)
def test_what_is_built(setup_py, requested, lacking, build):
    assert setup_py.resolve_build(requested, **{**CUDA, **lacking}) == build


@needs_source
@pytest.mark.parametrize(
    ("lacking", "what_to_do"),
    [
        ({"torch_cuda": None}, "install a CUDA build of torch"),
        ({"nvcc": None}, "install the CUDA 13.0 toolkit"),
        ({"cuda_sources": []}, "csrc/cuda has none"),
    ],
)
def test_a_cuda_build_says_what_it_lacks(setup_py, lacking, what_to_do):
    with pytest.raises(SystemExit, match=what_to_do):
        setup_py.resolve_build("cuda", **{**CUDA, **lacking})


@needs_source
def test_the_arch_list_is_the_users_or_what_nvcc_knows(setup_py, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_90\\ncompute_100\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup_py.cuda_arch_list(str(nvcc)) == "8.0;9.0;10.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert setup_py.cuda_arch_list(str(nvcc)) == "9.0a"


def test_version_is_the_installed_one():
    assert m2d_ext.__version__ == importlib.metadata.version("m2d_ext")


def test_build_info():
    info = m2d_ext.build_info()
    assert info["version"] == m2d_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["cuda"] == torch.version.cuda
    assert info["python"] == sys.version.split()[0]
    assert isinstance(info["cuda_arches"], list)
    assert info["cpu_capability"]
    if info["build"] == "none":
        assert not _extension.available()
    else:
        assert info["build"] in {"cpu", "cuda"}
        assert info["torch_built"] == torch.__version__
        assert info["compiler"]
        assert info["openmp"]
    # CI says which build it has installed, lest the tests run another one than they seem to.
    assert os.environ.get("M2D_EXPECT_BUILD", info["build"]) == info["build"]


@needs_extension
@pytest.mark.parametrize(
    ("built_with", "says"),
    [
        ({"torch": "2.1.0+cpu"}, "torch 2.1.0 "),
        ({"torch": torch.__version__.split("+")[0] + ".dev20300101"}, ".dev20300101"),
        ({"cuda": "99.0"}, "CUDA 99.0"),
    ],
)
def test_another_torch_is_refused_before_the_library_is_opened(monkeypatch, built_with, says):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"opened {name}"))
    with pytest.raises(ImportError, match="is running: reinstall with `pip install") as error:
        _extension._load({**_extension._config, **built_with})
    message = str(error.value)
    assert says in message
    assert "\n" not in message


@needs_extension
def test_the_local_tag_of_torch_does_not_matter():
    release = torch.__version__.split("+")[0]
    assert _extension._load({**_extension._config, "torch": f"{release}+another"}) is _extension._module


@needs_extension
def test_the_record_is_read_at_import(tmp_path):
    # A copy of the loader in a package whose record names another torch and whose library is no library.
    package = tmp_path / "m2d_ext"
    package.mkdir()
    for name in ("_extension.py", "_version.py"):
        (package / name).write_text(Path(_extension.__file__).with_name(name).read_text())
    (package / "__init__.py").touch()
    (package / Path(_extension._module.__file__).name).touch()
    (package / "_build_config.json").write_text(json.dumps({"build": "cpu", "torch": "2.1.0", "cuda": None}))
    result = subprocess.run(
        [sys.executable, "-c", "import m2d_ext._extension"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stderr.strip().splitlines()[-1].startswith("ImportError: m2d_ext was built with torch 2.1.0 ")


@needs_extension
@pytest.mark.parametrize(
    ("name", "fake"),
    [
        ("pool_of_a_later_version", lambda hidden_states, coefficients, cu_seqlens: None),
        ("pool", lambda hidden_states, coefficients, cu_seqlens, later: None),
        ("pool", lambda hidden_states, coefficients: None),
    ],
)
def test_an_extension_of_another_version_is_one_line(name, fake):
    with pytest.raises(ImportError, match="another version than its Python files: reinstall with `pip") as error:
        ops._register_fake(name, fake)
    assert "\n" not in str(error.value)


@needs_extension
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_no_openmp_runtime_is_added():
    # Two runtimes would mean two thread pools that compete for the cores. A process of its own: other tests import
    # packages that bring theirs.
    code = (
        "import re, sentence_transformers, torch; "
        "runtimes = lambda: set(re.findall(r'\\S*lib(?:gomp|omp|iomp5)[^/\\s]*', "
        "open('/proc/self/maps').read())); before = runtimes(); import m2d_ext._extension as e; "
        "assert e.available(); print(*sorted(runtimes() - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not result.stdout.split()


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(_extension, "_module", _extension._load({"build": "none"}))
    monkeypatch.setattr(_extension, "_warned", False)
    assert not _extension.available()
    assert _extension.build_info()["build"] == "none"
    with pytest.raises(RuntimeError, match="build it with `M2D_BUILD=cpu pip install"):
        _extension.require()
    with pytest.warns(UserWarning, match="because of this") as caught:
        _extension.warn_missing_once("because of this")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _extension.warn_missing_once("a second time")


@needs_extension
def test_the_source_tree_that_hides_its_installation_is_named(tmp_path):
    """After `pip install .`, Python in the same folder imports the sources, which have no extension."""
    source, installed = tmp_path / "source" / "m2d_ext", tmp_path / "site-packages" / "m2d_ext"
    package = Path(_extension.__file__).parent
    for copy, built in ((source, False), (installed, True)):
        shutil.copytree(package, copy, ignore=None if built else shutil.ignore_patterns("*.so", "_build_config.json"))
    (source.parent / "setup.py").touch()
    code = (
        "import m2d_ext, torch; print(m2d_ext.build_info()['build']); "
        "m2d_ext.functional.pool_layers([torch.ones(2, 3, 4)], torch.ones(2, 3))"
    )

    def run(folder):
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(installed.parent)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )

    hidden = run(source.parent)
    assert hidden.stdout.strip() == "none"
    places = f"is imported from {source}, where no extension was compiled, and not from {installed}, where one was"
    assert places in hidden.stderr
    assert "`pip install --no-build-isolation --no-deps -e .`" in hidden.stderr
    elsewhere = run(tmp_path)
    assert (elsewhere.stdout.strip(), elsewhere.stderr) == (_extension.build_info()["build"], "")


@needs_source
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_kernels_compile_without_x86_intrinsics(setup_py):
    """What aarch64 gets. Its cross compiler is used where there is one."""
    compiler = shutil.which("aarch64-linux-gnu-g++") or "g++"
    flags, _ = setup_py.compile_flags(torch, sanitize=False)
    flags += ["-DM2D_PORTABLE", "-fsyntax-only", "-Werror", f"-isystem{sysconfig.get_path('include')}"]
    for source in sorted(SETUP.parent.glob("csrc/cpu/*.cpp")):
        result = subprocess.run([compiler, *flags, str(source)], capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
