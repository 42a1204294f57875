"""Every command that the README shows exists and parses; every file it names is there."""

import re
import shlex
from pathlib import Path

import pytest

from config.benchmark_options import parse_benchmark
from config.evaluation_options import parse_evaluation
from config.training_config import TrainingConfig, parse_config, save_config
from config.use_options import COMPUTING, ExportOptions, PageOptions, PredictionOptions, parse_use

USES = {
    "predict.py": (PredictionOptions, COMPUTING, "PHOTO ..."),
    "export.py": (ExportOptions, COMPUTING, "OUT", 1),
    "app.py": (PageOptions, COMPUTING),
}
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *[path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]]
COMMANDS = re.findall(r"^    (?:python|make) .*?(?=  |$)", "\n".join(PAGES), re.MULTILINE)


def test_the_readme_shows_both_ways():
    shown = {command.strip() for command in COMMANDS}
    assert {"make demo", "make test", "make setup", "python test_trainer.py", "python train.py"} <= shown
    assert "conda create -n plant_vision python=3.10" in README and "pip install -r requirements.txt" in README


def test_launchers_of_the_readme_start_train_with_flags_that_parse():
    lines = re.findall(r"^    (?:torchrun|accelerate|srun) (?:.*\\\n)*.*$", README, re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        program, _, flags = line.partition(" train.py")
        assert "--nproc-per-node" in program or "--num_processes" in program
        parse_config(shlex.split(flags.strip("'")), "")


@pytest.mark.parametrize("command", sorted({command.strip() for command in COMMANDS}))
def test_commands_of_the_readme_parse(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, target, *flags = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif "--help" in flags:
        with pytest.raises(SystemExit) as stopped:
            parse_config(flags, "")
        assert stopped.value.code == 0 and "--learning-rate" in capsys.readouterr().out
    elif target == "evaluate.py":
        for word in flags:
            if word.startswith("runs/"):
                Path(word).mkdir(parents=True)
                save_config(TrainingConfig(), word, {})
        parse_evaluation(flags, "")
    elif target in USES:
        Path(flags[0]).mkdir(parents=True)
        save_config(TrainingConfig(), flags[0], {})
        parse_use(flags, "", *USES[target])
    elif target == "benchmark.py":
        parse_benchmark(flags, "")
    else:
        assert (ROOT / target).is_file()
        parse_config(flags, "")


def test_files_of_the_readme_exist():
    tree = README.partition("## The code")[2]
    folder = ""
    for start, names in re.findall(r"^    (\S+)? +(.*)$", tree, re.MULTILINE):
        folder = start if start else folder  # a line without a start goes on with the folder above
        for name in re.findall(r"\w+\.py", names if folder.endswith("/") else folder):
            assert (ROOT / (folder if folder.endswith("/") else "") / name).is_file(), f"{folder}{name}"


def test_pages_that_the_readme_links_are_there():
    linked = re.findall(r"\]\((docs/\w+\.md)\)", README)
    assert sorted(set(linked)) == sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def test_pictures_of_the_readme_are_there_and_small():
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert len(pictures) == 2 and all((ROOT / path).stat().st_size < 150_000 for path in pictures)


def test_every_module_stands_in_the_readme():
    modules = {path.name for part in ("config", "data", "models", "utils") for path in (ROOT / part).glob("[a-z]*.py")}
    assert not [module for module in sorted(modules) if module not in README]
