"""Fine-tune LLaVA-NeXT to classify plant images.

    python train.py                      the documented run: 4-bit base, LoRA, Oxford Flowers 102; one CUDA GPU
    python train.py --preset tiny        the same program on synthetic images, on the CPU, without a download
    python train.py --dataset FOLDER     your own plants: FOLDER/<class name>/*.jpg
    torchrun --nproc-per-node 2 train.py

Writes runs/<preset>/: training_config.json, train.log, metrics.jsonl, loss.png, checkpoint-*/, best/ and eval_val.*.
The same command resumes an interrupted run. Ctrl-C, or SIGTERM, saves first; a second one ends at once.
"""

import dataclasses
import sys
from pathlib import Path

from config.cli import parse_config
from config.training_config import ConfigError, TrainingConfig
from runtime.run_files import BEST, load_config
from utils.logging_utils import report_errors, set_environment, setup_logging


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv, __doc__)  # before torch is imported: a typo costs a tenth of a second
    set_environment()
    setup_logging()
    with report_errors(ConfigError):
        from data.dataset import build_datasets
        from models.builder import PlantModel
        from models.trainer import build_trainer
        from runtime.distributed import init_distributed
        from runtime.run_dir import open_run

        with init_distributed(config) as dist, open_run(config, dist) as run:
            if run.completed:
                return 0
            config = run.config
            with dist.main_process_first():
                data = build_datasets(config)
            plant = PlantModel.from_config(config, data.class_names, dist.device)
            trainer = build_trainer(run, plant, data)
            run.record(plant, data, trainer)
            run.log_header(plant, data, trainer)
            trainer.plan_memory(run.resume_from)
            trainer.train(resume_from_checkpoint=run.resume_from)
            trainer.load_best()
            if data.validation is not None:
                report_val(config, data.validation, plant, dist)
            if dist.is_main_process:
                step = trainer.state.global_step
                few, expected = describe_run(config, data, plant)
                del trainer  # the GPU has room for one model
                plant.model = None
                prove_best(config, plant, few, expected)
                run.complete(step)
    return 0


def report_val(config: TrainingConfig, rows, plant, dist) -> None:
    """Score val with the best weights, distributed across ranks, and write the reports."""
    from data.dataset import known_duplicates
    from data.synthetic import draw_ood_images
    from evaluation.evaluator import build_evaluator
    from runtime.checkpoint import describe_best

    adapter = describe_best(Path(config.output_dir) / BEST)
    evaluator = build_evaluator(config, plant.model, plant.collator, plant.precision, config.output_dir, adapter, dist)
    calibration = evaluator.calibrate(rows)
    evaluator.report(rows, "val", calibration, ood=draw_ood_images(), duplicates=known_duplicates(rows["id"]))


def describe_run(config: TrainingConfig, data, plant) -> tuple:
    """Write the model card of best/; (a few rows, their scores) for prove_best."""
    from evaluation.model_card import build_model_card
    from evaluation.verify import FEW, first_readable, scores_of
    from runtime.checkpoint import CARD

    card = build_model_card(config, load_config(config.output_dir)[1], config.output_dir, plant.prompt)
    (Path(config.output_dir) / BEST / CARD).write_text(card, encoding="utf-8")
    few = first_readable(plant.collator, data.train if data.validation is None else data.validation, FEW)
    return few, scores_of(plant.model, plant.collator, few, plant.dtype)


def prove_best(config: TrainingConfig, plant, few, expected) -> None:
    """Load best/ into a fresh base, which must score `few` as `expected`."""
    from transformers import set_seed

    from evaluation.verify import verify_reload
    from models.builder import build_model
    from runtime.device import collect_memory

    collect_memory(plant.device)

    def build_again():
        set_seed(config.seed)
        eager = dataclasses.replace(config, compile="false")
        return build_model(eager, plant.processor, plant.device, plant.precision)

    verify_reload(build_again, Path(config.output_dir) / BEST, expected, plant.collator, few, plant.dtype)


if __name__ == "__main__":
    sys.exit(main())
