"""Command lines of all scripts: flags, words, problems, and time to --help."""

import dataclasses
import resource
import subprocess
import sys

import pytest

import benchmark
import evaluate
from config.cli import BOOLEAN_WORDS, CommandLine, parse_config, parse_run_command
from config.training_config import PRESETS, TrainingConfig, option
from runtime.run_dir import Run
from runtime.run_files import save_config
from tests.conftest import ROOT


@dataclasses.dataclass(frozen=True)
class Options:
    top: int = option(5, "classes shown", low=1)
    json: bool = option(False, "as JSON")
    ood: str | None = option(None, "a folder")


def errors_of(parse, capsys) -> str:
    """What is printed, without the closing line, by a command line that must be refused with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        parse()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.endswith("\nAll options: --help\n")
    return printed.err


def parse_words(*argv) -> CommandLine:
    line = CommandLine(list(argv), "", Options, "RUN IMAGE ...")
    line.exit_on_problems()
    return line


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    assert parse_config(["--preset", preset]).preset == preset


def test_flags_override_the_preset_in_either_spelling():
    config = parse_config(
        ["--preset=tiny", "--max_steps", "9", "--learning-rate=2e-4", "--image-size", "none", "--pin-memory"]
    )
    assert (config.max_steps, config.learning_rate, config.image_size, config.pin_memory) == (9, 2e-4, None, True)


def test_the_last_of_two_spellings_wins():
    assert parse_config(["--lora-r", "4", "--lora_r", "8"]).lora_r == 8
    assert parse_config(["--lora_r", "4", "--lora-r", "8"]).lora_r == 8


def test_false_is_false_and_none_is_none():
    config = parse_config(["--load-in-4bit", "false", "--pin_memory=False", "--eval-steps", "None"])
    assert (config.load_in_4bit, config.pin_memory, config.eval_steps) == (False, False, None)


def test_negative_numbers_are_values():
    assert parse_config(["--max-steps", "-1"]).max_steps == -1


BAD_FLAGS = [
    (["--lora-alpa", "1"], "error: --lora-alpa: unknown flag; did you mean --lora-alpha?\n"),
    (["--lora_alpa=1"], "error: --lora_alpa=1: unknown flag; did you mean --lora-alpha?\n"),
    (["--preset", "tny"], "error: --preset tny: not one of default, tiny, scratch, native, projector, published; did"),
    (["runs/x"], "error: runs/x: unexpected argument; options are given as --name value\n"),
    (["--load-in-4bit", "nope"], "error: load_in_4bit=nope: true or false is needed\n"),
    (["--lora-r", "many"], "error: lora_r=many: a whole number is needed\n"),
    (["--seed", "none"], "error: seed=none: a whole number is needed\n"),
    (["--compile", "--lora-r", "4"], "error: --compile: a value is needed\n"),
    (["--help=x"], "error: -h/--help: ignored explicit argument 'x'\n"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_FLAGS)
def test_a_bad_flag_is_reported_with_its_value_and_the_next_move(argv, message, capsys):
    assert message in errors_of(lambda: parse_config(argv), capsys)


def test_all_problems_are_reported_at_once(capsys):
    argv = ["--lora-r", "0", "--sed", "1", "--max-steps", "x", "--learning-rate", "-1", "--optim", "--trainable", "all"]
    errors = errors_of(lambda: parse_config(argv), capsys)
    assert errors.count("error:") == 6 and "did you mean --seed?" in errors


def test_folders_become_absolute_paths_but_names_of_models_and_data_sets_do_not(tmp_path, monkeypatch):
    """An export may lie in the working directory under the very name of a randomly initialized model."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "synthetic", "oxford_flowers102", "mine"):
        (tmp_path / name).mkdir()
    config = parse_config(["--preset", "tiny"])
    assert (config.model, config.dataset) == ("tiny", "synthetic") and parse_config([]).dataset == "oxford_flowers102"
    assert parse_config(["--dataset", "mine"]).dataset == str(tmp_path / "mine")


# ---- positional words


def test_a_boolean_flag_does_not_take_the_word_after_it():
    line = parse_words("one", "--json", "a.jpg", "b.jpg", "--top", "3", "c.jpg")
    assert line.words == ["one", "a.jpg", "b.jpg", "c.jpg"] and line.given == {"json": "true", "top": "3"}


@pytest.mark.parametrize("word", BOOLEAN_WORDS)
def test_a_word_that_looks_like_a_boolean_is_the_value_of_the_flag(word):
    line = parse_words("one", "--load_in_4bit", word, "a.jpg")
    assert line.words == ["one", "a.jpg"] and line.given == {"load_in_4bit": word}


def test_after_two_dashes_nothing_is_a_flag():
    line = parse_words("one", "--json", "--", "--top", "true")
    assert line.words == ["one", "--top", "true"] and line.given == {"json": "true"}


# ---- commands that use a run


@pytest.fixture
def run_folder(here):
    """runs/mine, whose config trains an adapter in 4 bit with compiled kernels."""
    (here / "runs" / "mine").mkdir(parents=True)
    save_config(TrainingConfig(seed=7, compile="true"), "runs/mine", {"class_names": ["oak"]})
    return "runs/mine"


def parse_use(*argv, words=""):
    return parse_run_command(list(argv), "", Options, ("num_workers", "load_in_4bit"), Run.load, words)


def test_flags_override_the_config_of_the_run(run_folder):
    argv = [run_folder, "a.jpg", "--num-workers", "0", "--top=3", "b.jpg"]
    run, words, options = parse_use(*argv, words="IMAGE ...")
    assert (run.config.seed, run.config.num_workers, run.config.compile) == (7, 0, "false")
    assert (f"{run.folder}", run.recorded) == (run_folder, {"class_names": ["oak"]})
    assert (words, options) == (["a.jpg", "b.jpg"], Options(top=3))


BAD_COMMANDS = [
    ([], "", "error: RUN is missing; usage: RUN. Runs here: runs/mine\n"),
    ([], "OUT", "error: RUN is missing; usage: RUN OUT. Runs here: runs/mine\n"),
    (["runs/mine"], "OUT", "error: runs/mine: OUT is missing after it; usage: RUN OUT\n"),
    (["runs/mine", "a", "b"], "OUT", "error: b: unexpected argument; usage: RUN OUT\n"),
    (["runs/mine", "a"], "", "error: a: unexpected argument; usage: RUN\n"),
    (
        ["runs/gone"],
        "",
        "error: runs/gone: not a run, training_config.json is missing. Start one with: python train.py",
    ),
    (["runs/gone"], "", ". Runs here: runs/mine\n"),
    (["runs/mine", "--seed", "3"], "", "error: --seed 3: is fixed by the run\n"),
    (["runs/mine", "--preset", "tiny"], "", "error: --preset tiny: is fixed by the run\n"),
    (["runs/mine", "--topp", "3"], "", "error: --topp: unknown flag; did you mean --top?\n"),
    (["runs/mine", "--lora", "3"], "", "error: --lora: unknown flag\n"),
]


@pytest.mark.parametrize(("argv", "words", "message"), BAD_COMMANDS)
def test_a_bad_command_is_reported(argv, words, message, run_folder, capsys):
    assert message in errors_of(lambda: parse_use(*argv, words=words), capsys)


def test_a_run_that_cannot_be_read_is_one_problem_of_several(run_folder, capsys):
    errors = errors_of(lambda: parse_use("runs/gone", "--top", "0", "--nun-workers", "1", words="OUT"), capsys)
    assert errors.count("error:") == 4
    for words in ("runs/gone: not a run", "OUT is missing", "top=0: must be at least 1", "did you mean --num-workers?"):
        assert words in errors


def test_help_shows_the_flags_that_the_run_does_not_fix(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_use("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: ") and " RUN [--option VALUE ...]" in text
    assert "--top" in text and "--num-workers" in text and "--seed" not in text and "_" not in text.split("options:")[1]


# ---- the scripts


def test_a_base_model_is_evaluated_with_any_option_and_the_published_question(here):
    run, other, options = evaluate.parse_evaluation(
        ["--model", "me/base", "--mixed-precision", "no", "--split", "test"]
    )
    assert run.config.question == "What type of object is in this photo?" and run.config.model == "me/base"
    assert f"{run.folder}" == "runs/base-base" and run.is_base_model
    assert (other, options.split) == (None, "test")


def test_a_benchmark_offers_no_option_without_an_effect(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_benchmark(["--help"])
    text = capsys.readouterr().out
    assert "--against" in text and "--lora-r" in text and "--dataset" not in text and "--save-steps" not in text


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_help_takes_less_than_0_3_seconds(script):
    """Of processor time, which other programs on the machine hardly change; and no package is imported."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-X", "importtime", ROOT / script, "--help"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    imported = {line.split("|")[-1].strip().partition(".")[0] for line in found.stderr.splitlines()}
    assert "usage" in found.stdout and min(seconds) < 0.3
    assert "argparse" in imported and not imported & {"torch", "numpy", "transformers", "datasets", "PIL", "psutil"}
