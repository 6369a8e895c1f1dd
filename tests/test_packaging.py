"""What a user installs: real files behind the links, nothing at the top level that shadows another package.

The tree is copied first: a build leaves folders behind, and would find those of the last one.
"""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT = ("pyproject.toml", "README.md", "LICENSE", "tierkv", "connectors", "kernels")


def run(*command: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in BUILT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, tree / name)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    # Not isolated: an isolated build fetches setuptools, and tests use no network.
    run("-m", "pip", "wheel", "-q", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(target), cwd=tree)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target)
    return target


def sources(folder: str) -> set[str]:
    return {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py")}


def test_links_are_relative_and_lead_to_the_top_level() -> None:
    for name in ("connectors", "kernels"):
        link = ROOT / "tierkv" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert not (ROOT / name / "__init__.py").exists()  # a package `kernels` would shadow the one transformers wants


def test_wheel_holds_every_source_as_a_real_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        infos = {info.filename: info for info in archive.infolist()}
    for folder, inside in (("tierkv", "tierkv"), ("connectors", "tierkv/connectors"), ("kernels", "tierkv/kernels")):
        for source in sources(folder):
            info = infos[f"{inside}/{source}"]
            assert (info.external_attr >> 28) != 0xA, f"{info.filename} is a link"
            assert info.file_size == (ROOT / folder / source).stat().st_size
    assert "tierkv/py.typed" in infos
    for path in (ROOT / "tierkv" / "data").iterdir():
        assert f"tierkv/data/{path.name}" in infos


def test_wheel_has_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tierkv"}


def test_sdist_holds_every_source_as_a_real_file(tree: Path, tmp_path: Path) -> None:
    run("-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})", cwd=tree)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        files = {"/".join(Path(member.name).parts[1:]) for member in archive.getmembers() if member.isfile()}
    for folder in ("tierkv", "tierkv/connectors", "tierkv/kernels"):
        assert {f"{folder}/{source}" for source in sources(folder.removeprefix("tierkv/"))} <= files


def test_installed_wheel_imports_from_where_it_was_installed(installed: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import tierkv, tierkv.connectors.base, importlib.util\n"
        "assert importlib.util.find_spec('tierkv.kernels.attention').origin.startswith(sys.path[0])\n"
        "print(tierkv.connectors.base.__file__)"
    )
    # -I: neither the working folder nor this checkout is on the path.
    assert run("-I", "-c", code, cwd=installed.parent).strip() == str(installed / "tierkv" / "connectors" / "base.py")


def test_editable_install_imports_from_the_tree(tree: Path, tmp_path: Path) -> None:
    run("-c", f"from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})", cwd=tree)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r})\n"
        "import importlib.util, tierkv, tierkv.connectors.base\n"
        "print(tierkv.__file__, importlib.util.find_spec('tierkv.kernels.attention').origin, sep='\\n')\n"
        "assert importlib.util.find_spec('kernels') is None and importlib.util.find_spec('connectors') is None"
    )
    # -S: the finder of the environment's own editable install has the same name, and would answer first.
    package, kernel = run("-I", "-S", "-c", code, cwd=tmp_path).split()
    assert Path(package).samefile(tree / "tierkv" / "__init__.py")
    assert Path(kernel).samefile(tree / "kernels" / "attention.py")


def test_installed_wheel_brings_the_command(installed: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(installed)!r}); from tierkv.cli import main; sys.exit(main(['--version']))"
    version = run("-I", "-c", code, cwd=installed.parent).split()[-1]
    assert (installed / f"tierkv-{version}.dist-info").is_dir()
    assert "tierkv = tierkv.cli:main" in (installed / f"tierkv-{version}.dist-info" / "entry_points.txt").read_text()


def test_transformers_builds_a_model_with_the_repository_as_working_folder() -> None:
    code = (
        "import sys; assert sys.path[0] == ''\n"  # as in `python -m`, or a notebook in the checkout
        "from transformers import AutoModelForCausalLM, LlamaConfig\n"
        "config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,"
        " num_attention_heads=2, num_key_value_heads=1)\n"
        "model = AutoModelForCausalLM.from_config(config)\n"
        "import torch\n"
        "print(model(torch.ones((1, 3), dtype=torch.long)).logits.shape[-1])"
    )
    assert run("-c", code, cwd=ROOT).split()[-1] == "32"
