"""requirements.lock: one version of each package for every Python that requirements*.txt are promised for."""

import json
import re
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import app
from tests.conftest import ROOT

FILES = sorted(ROOT.glob("requirements*.txt"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
LOCKED = [Requirement(line) for line in LOCK.splitlines() if line and not line.lstrip().startswith("#")]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}


def read_requirements(text: str) -> list[Requirement]:
    lines = (line.split(" #")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith(("-r", "#"))]


def locked_for(environment: dict[str, str]) -> dict[str, str]:
    """{package: version} of an environment. Fails for two versions of one package."""
    fitting = [each for each in LOCKED if each.marker is None or each.marker.evaluate(environment)]
    found = {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in fitting}
    assert len(found) == len(fitting)
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_satisfies_every_requirement(python):
    locked = locked_for(LINUX | {"python_version": python, "python_full_version": f"{python}.9"})
    for path in FILES:
        wanted = read_requirements(path.read_text(encoding="utf-8"))
        assert [
            str(each) for each in wanted if locked.get(canonicalize_name(each.name), "") not in each.specifier
        ] == []


def test_the_lock_holds_all_that_its_packages_need():
    """As far as they are installed here in their locked versions."""
    locked, checked = locked_for(default_environment()), 0
    for name, version in locked.items():
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if found.version.split("+")[0] != version:
            continue
        checked += 1
        for need in map(Requirement, found.requires or ()):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert locked.get(canonicalize_name(need.name), "") in need.specifier, f"{name} needs {need}"
    assert checked > 20


def test_the_lock_names_no_index():
    assert not re.search(r"://|--|file:|\+cpu|\+cu", LOCK)


# ---- the image of Docker


def test_the_docker_image_holds_what_the_web_demo_imports():
    """.dockerignore names what is copied; each room is imported by another of them, or by app.py."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = {line[1:] for line in lines if line.startswith("!")}
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} - {"benchmarks", "tests"}
    assert rooms | {"app.py", "web", "requirements.lock"} <= copied and "*" in lines
    files = re.findall(r"requirements[-a-z]*[.](?:txt|lock)", DOCKERFILE)
    assert files and all((ROOT / file).exists() for file in files)


def test_the_docker_image_starts_the_web_demo_with_flags_that_it_has(capsys):
    program, script, *flags = json.loads(re.search(r"^ENTRYPOINT (.*)", DOCKERFILE, re.MULTILINE)[1])
    (run,) = json.loads(re.search(r"^CMD (.*)", DOCKERFILE, re.MULTILINE)[1])
    with pytest.raises(SystemExit):
        app.main([*flags, run, "--no-such-flag"])
    errors = re.findall(r"^error: (\S+)", "".join(capsys.readouterr()), re.MULTILINE)
    assert (program, script, set(errors)) == ("python", "app.py", {f"{run}:", "--no-such-flag:"})


def test_the_docker_image_asks_a_path_that_the_endpoint_has():
    (path,) = re.findall(r"http://127\.0\.0\.1:7860(/\w+)", DOCKERFILE)
    assert f'Route("{path}"' in (ROOT / "evaluation" / "endpoint.py").read_text(encoding="utf-8")
