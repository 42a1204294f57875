"""Fine-tune LLaVA-NeXT to classify plant images.

    python train.py                      the documented run: 4-bit base, LoRA, Oxford Flowers 102; one CUDA GPU
    python train.py --preset tiny        the same program on synthetic images, on the CPU, without a download
    python train.py --dataset FOLDER     your own plants: FOLDER/<class name>/*.jpg
    torchrun --nproc-per-node 2 train.py

Writes runs/<preset>/: training_config.json, train.log, metrics.jsonl, loss.png, checkpoint-*/, best/ and eval_val.*.
The same command resumes an interrupted run. Ctrl-C, SIGTERM or SIGHUP saves first; a second one ends at once.
"""

import sys

from config.cli import EvaluationOptions, parse_config
from config.training_config import ConfigError
from utils.logging_utils import HOW_TO_RESUME, report_errors, set_environment, setup_logging


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv, __doc__)  # before torch is imported: a typo costs a tenth of a second
    set_environment()
    setup_logging()
    change = "leave --resume never out, and " if config.resume == "never" else ""  # with it a new run would start
    with report_errors(ConfigError, when_interrupted=change + HOW_TO_RESUME):
        from data.dataset import build_datasets
        from evaluation.evaluator import build_evaluator
        from evaluation.verify import verify_reload
        from models.builder import PlantModel
        from models.trainer import build_trainer
        from models.training_arguments import check_trackers
        from runtime.distributed import init_distributed
        from runtime.run_dir import open_run

        check_trackers(config.report_to)
        with init_distributed(config) as dist, open_run(config, dist) as run:
            if run.completed:
                return 0
            config = run.config
            with dist.main_process_first():
                data = build_datasets(run.data_config)
            plant = PlantModel.from_config(config, data.class_names, dist.device)
            trainer = build_trainer(run, plant, data)
            run.record(plant, data, trainer)
            run.log_header(plant, data, trainer)
            run.end_phase("load")
            trainer.plan_memory()
            trainer.train(resume_from_checkpoint=run.resume_from)
            trainer.load_best()
            evaluator = build_evaluator(run, plant, dist, EvaluationOptions())
            evaluator.keep("val", trainer.examined)
            evaluator.report(data.validation, "val", data=data)
            run.end_phase("report")
            step = trainer.state.global_step
            del trainer  # the GPU has room for one model
            verify_reload(run, plant, data)
            run.complete(step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
