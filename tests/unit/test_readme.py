"""README and docs/ are true where a test can tell: commands parse, names exist, defaults are those of the code."""

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from config.training_config import PRESETS, TrainingConfig
from runtime.run_files import save_config
from tests.unit.test_house import CORE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
EVERY = {"README.md": README} | {f"docs/{name}": text for name, text in PAGES.items()}
INDENTED = re.findall(r"^    (\w.*(?:(?<=\\)\n.*)*)", "\n".join(EVERY.values()), re.MULTILINE)
COMMANDS = sorted({re.split("  +#?", line)[0] for line in INDENTED if re.match(r"(python|make) ", line)})
LAUNCHES = sorted({line for line in INDENTED if re.match(r"(torchrun|accelerate|srun) ", line)})
MODULES = [
    path.relative_to(ROOT)
    for room in ("", "benchmarks", "config", "data", "models", "evaluation", "runtime", "utils")
    for path in sorted((ROOT / room).glob("[a-z]*.py"))
]


def errors_of(script: str, flags: list[str], capsys) -> list[str]:
    """What a script reports about its command line: it reports all problems at once, before it does anything."""
    main = importlib.import_module(script.removesuffix(".py")).main
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--no-such-flag"])
    assert stopped.value.code == 2
    reported = re.findall(r"^error: .*", "".join(capsys.readouterr()), re.MULTILINE)
    return [error for error in reported if "no-such-flag" not in error]


def test_readme_is_short():
    assert len(README.split()) <= 1100


def test_readme_shows_the_documented_setup():
    assert {"make demo", "python test_trainer.py", "python train.py"} <= set(COMMANDS)
    assert "conda create -n plant_vision python=3.10" in INDENTED and "pip install -r requirements.txt" in INDENTED
    assert "HUGGINGFACE_TOKEN" in README and "Number of image tokens: 1" in re.sub(r"\s+", " ", README)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, target, *flags = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{target.split('=')[0] if '=' not in target else flags[0]}:", makefile(), re.MULTILINE)
        return
    for word in flags:
        if word.startswith("runs/") and not Path(word).exists():
            Path(word).mkdir(parents=True)
            save_config(TrainingConfig(), word, {})
    if "--help" in flags:
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(target.removesuffix(".py")).main(flags)
        assert stopped.value.code == 0 and "--learning-rate" in capsys.readouterr().out
    else:
        assert errors_of(target, flags, capsys) == []


def test_launchers_start_scripts_with_flags_that_parse(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/default").mkdir(parents=True)
    save_config(TrainingConfig(), "runs/default", {})
    assert any("srun" in line for line in LAUNCHES) and any("--sharding fsdp" in line for line in LAUNCHES)
    for line in LAUNCHES:
        launcher, script, flags = re.split(r" (\w+\.py)", line, maxsplit=1)
        assert "--nproc-per-node" in launcher or "--num_processes" in launcher
        assert errors_of(script, shlex.split(flags.strip("'")), capsys) == []


def test_usage_lists_every_option_with_its_default():
    rows = re.findall(r"^\| `--([\w-]+)` \| `([^|]+)` \| (yes|no) \|", PAGES["usage.md"], re.MULTILINE)
    shown = {name.replace("-", "_"): (default, resumable) for name, default, resumable in rows}
    fields = {field.name: field for field in dataclasses.fields(TrainingConfig)}
    assert set(shown) == set(fields)
    for name, field in fields.items():
        default = str(field.default).lower() if field.default in (None, True, False) else str(field.default)
        assert shown[name] == (default, "yes" if field.metadata["resumable"] else "no"), name
    assert all(f"| `{name}` |" in PAGES["usage.md"] for name in PRESETS)


@pytest.mark.parametrize(
    ("page", "script"),
    [("usage.md", "predict"), ("usage.md", "app"), ("evaluation.md", "evaluate"), ("export.md", "export")]
    + [("speed.md", "benchmark")],
)
def test_pages_list_every_option_of_their_script(page, script):
    (options,) = [
        value
        for name, value in vars(importlib.import_module(script)).items()
        if name.endswith("Options") and dataclasses.is_dataclass(value)
    ]
    for field in dataclasses.fields(options):
        default = str(field.default).lower() if field.default in (None, True, False) else str(field.default)
        assert f"| `--{field.name.replace('_', '-')}` | `{default}` |" in PAGES[page], field.name


def test_readme_links_every_page_and_links_lead_somewhere():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", README))
    assert linked == set(PAGES)
    for page, text in EVERY.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            file = (ROOT / page).parent / target if target else ROOT / page
            assert file.is_file(), f"{page} links {target}"
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE) if anchor else ()
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in headings]


def test_pictures_are_there_and_small():
    for page, text in EVERY.items():
        for picture in re.findall(r"!\[.+?\]\((.+?)\)", text):
            assert (ROOT / page).parent.joinpath(picture).stat().st_size < 150_000
    assert len(re.findall(r"!\[", README)) == 3


def test_names_in_the_file_tree_exist():
    tree = README.partition("## Code")[2]
    names = re.findall(r"^    (\S+)  +\S", tree, re.MULTILINE)
    assert len(names) > 10 and not [name for name in names if not (ROOT / name).exists()]


def test_readme_lists_the_core_path_in_reading_order():
    shown = re.findall(r"^    (\w+\.py|\w+/\w+\.py)  ", README.partition("## Code")[2], re.MULTILINE)
    assert shown == CORE


def test_every_module_is_mentioned_and_every_mention_exists():
    text = README + PAGES["architecture.md"]
    assert not [str(module) for module in MODULES if module.name not in text]
    names = {module.name for module in MODULES} | {path.name for path in (ROOT / "tests").rglob("*.py")}
    mentioned = re.findall(r"\b(\w+\.py)\b", "\n".join(EVERY.values()))
    assert not sorted(set(mentioned) - names - {"modeling_llava_next.py", "masking_utils.py"})


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")
