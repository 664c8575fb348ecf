"""The package as pip installs it: one wheel, alone, far from any clone."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec

import pytest
from conftest import ROOT

IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
CAPTION = """
import sys
from pathlib import Path
from PIL import Image
import flamingo_lite
from flamingo_lite import *

assert Path(flamingo_lite.__file__).parents[1] == Path(sys.argv[1]), "another one"
for name in flamingo_lite.__all__:
    assert name in globals(), name
built = load_flamingo("tiny")
print(caption(*built, [Image.open("picture.webp")]))
try:
    load_flamingo("smol")
except OSError as error:
    print(error)
"""


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def version_of(name):
    """The first number of a library's version; 0 if it is not there."""
    try:
        return int(version(name).partition(".")[0])
    except PackageNotFoundError:
        return 0


def normal(name):
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


def imported(path, everywhere=True):
    """The libraries that a file imports, wherever in it, or whenever it is imported."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def lacking(needs, everywhere):
    """Libraries that the package imports and does not declare among its needs."""
    paths = (ROOT / "flamingo_lite").glob("*.py")
    modules = {module for path in paths for module in imported(path, everywhere)}
    modules -= set(sys.stdlib_module_names) | {"flamingo_lite"}
    assert {"torch", "einops"} <= modules
    owners, declared = packages_distributions(), {normal(need) for need in needs}
    return {m for m in modules if not declared & {normal(n) for n in owners[m]}}


def defined_in(tree):
    """Public functions, classes and constants of a module's top level."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                yield target.id


def test_every_module_says_what_it_is_and_what_is_public():
    """What it imports from others is no part of `__all__`."""
    modules = [
        path
        for path in sorted((ROOT / "flamingo_lite").glob("*.py"))
        if not path.name.startswith("__")
    ]
    assert len(modules) > 20
    for path in modules:
        names = {n for n in defined_in(ast.parse(path.read_text())) if n[0] != "_"}
        module = import_module(f"flamingo_lite.{path.stem}")
        assert set(module.__all__) == names, path.name
        assert len(module.__all__) == len(names), path.name
        assert module.__doc__, path.name


def test_what_is_imported_is_declared():
    """A library that comes along with another one is no promise.

    What a function imports may be an extra: only who calls it needs that.
    """
    needs = project()["dependencies"]
    assert lacking(needs, everywhere=False) == set()
    extras = [
        need for extra in project()["optional-dependencies"].values() for need in extra
    ]
    assert lacking([*needs, *extras], everywhere=True) == set()
    assert lacking(needs, everywhere=True) == {"accelerate"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network from a copy of what a clone has."""
    if find_spec("pip") is None or version_of("setuptools") < 77:
        pytest.skip("needs pip and setuptools 77, which comes with a recent torch")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "clone"
    source.mkdir()
    for part in ("flamingo_lite", "data"):
        shutil.copytree(ROOT / part, source / part, ignore=IGNORED)
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    command = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    pip(*command, "--wheel-dir", folder, source)
    (found,) = folder.glob("*.whl")
    return found


def pip(*words):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_carries_what_tiny_needs_and_no_more(wheel):
    """Every module; weights, settings and their licences; neither pictures nor smol."""
    names = zipfile.ZipFile(wheel).namelist()
    inside = {n for n in names if ".dist-info/" not in n}
    modules = {f"flamingo_lite/{p.name}" for p in (ROOT / "flamingo_lite").glob("*.py")}
    files = {
        f"flamingo_lite/data/{path.relative_to(ROOT / 'data')}"
        for folder in ("tiny_clip", "tiny_opt", "tiny_flamingo")
        for path in (ROOT / "data" / folder).iterdir()
        if path.suffix in (".json", ".safetensors")
    }
    assert inside == modules | files | {"flamingo_lite/data/README.md"}
    assert any(name.endswith("LICENSE") for name in names)
    assert wheel.stat().st_size < 25e6
    assert wheel.name.startswith(f"flamingo_lite-{project()['version']}-")


def test_the_installed_wheel_captions_a_picture(wheel, tmp_path):
    """In a folder with one picture, no clone and no network; `import *` works too."""
    target, here = tmp_path / "installed", tmp_path / "here"
    pip("install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    here.mkdir()
    shutil.copy(ROOT / "data" / "emoji" / "noto" / "lemon.webp", here / "picture.webp")
    done = subprocess.run(
        [sys.executable, "-P", "-c", CAPTION, target],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(target), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said, smol = done.stdout.strip().splitlines()
    assert said == "['a lemon']"
    assert (
        "give their folder in a clone of the book" in smol and "smol_flamingo" in smol
    )


def test_the_installed_wheel_has_a_program(wheel, tmp_path):
    """`flamingo-lite`, as pip writes it, and `python -m flamingo_lite`."""
    target = tmp_path / "installed"
    pip("install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    picture = ROOT / "data" / "emoji" / "noto" / "lemon.webp"
    programs = [target / "bin" / "flamingo-lite"], ["-m", "flamingo_lite"]
    for program, words in zip(
        programs, (["--help"], ["caption", picture]), strict=True
    ):
        done = subprocess.run(
            [sys.executable, *program, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert {"--help": "usage:"}.get(
            words[0], f"{picture}: a lemon\n"
        ) in done.stdout
