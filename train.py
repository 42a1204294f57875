"""Fine-tune LLaVA-NeXT to name the plant in a image.

    python train.py                      the documented run: 4-bit, adapter, Oxford Flowers 102; one CUDA GPU
    python train.py --preset tiny        the same program on drawn flowers, CPU, no download
    python train.py --dataset FOLDER     your own plants: FOLDER/<class name>/*.jpg

Writes runs/<preset>/: training_config.json, train.log, metrics.jsonl, loss.png, checkpoint-*/, best/ and eval_val.*.
The same command again goes on where a run was left unfinished. Ctrl-C, or SIGTERM, saves first; twice does not.
"""

import contextlib
import dataclasses
import logging
import sys
import time
import uuid
from pathlib import Path

from config.cli import parse_config
from config.training_config import ConfigError, TrainingConfig, load_config, save_config
from runtime.run_dir import BEST, LOCK_FILE, append_metrics, check_same_run, choose_run_folder, step_of
from utils.logging_utils import UserError, logger, report_errors, set_environment, setup_logging

SAMPLED = 500  # images of a stream whose sizes are looked at


def main(argv: list[str] | None = None) -> int:
    config = parse_config(argv, __doc__)  # before torch: a typo costs a tenth of a second
    set_environment()
    setup_logging()
    with report_errors(ConfigError), contextlib.ExitStack() as held:
        from runtime.device import choose_precision
        from runtime.distributed import init_distributed

        dist = held.enter_context(init_distributed(config))
        device = dist.device
        precision = choose_precision(config.mixed_precision, device)
        config, state, origin = open_run_folder(config, dist, held)
        if state == "finished":
            return 0
        from transformers import set_seed

        from data.collator import PlantCollator
        from data.dataset import build_datasets, data_fingerprint
        from models.builder import build_model, build_processor, check_model, describe_model, load_weights
        from models.fitting import plan_memory, shard_weights, unshard_weights
        from models.trainer import build_trainer
        from runtime.checkpoint import check_disk, fork_checkpoint, last_checkpoint, recover_interrupted_replace

        with dist.main_process_first():
            data = build_datasets(config)
            processor, prompt = build_processor(config, data.class_names)
        collator = PlantCollator(processor, prompt, data.class_names, config.image_size)
        set_seed(config.seed)  # an adapter starts at random
        model = build_model(config, processor, device, precision)
        checks = check_model(model, processor, prompt, config.load_in_4bit, config.trainable, precision)
        recorded = load_config(config.output_dir)[1] if state == "unfinished" else {"run_id": uuid.uuid4().hex}
        run_id = dist.broadcast_object(recorded.get("run_id", ""))  # runs that began before it was recorded have none
        if origin is None and recorded.get("origin"):
            origin = Path(recorded["origin"])
        trainer = build_trainer(
            *(config, model, processor, collator, data.train, data.validation, precision, device, run_id)
        )
        checkpoint = None
        if dist.is_main_process:
            check_disk(config.output_dir, model, config.save_total_limit)
            facts = describe_model(model, processor, precision, device)
            facts |= {"class_names": data.class_names, "images": data_fingerprint(data), "processes": dist.world_size}
            facts["stream_workers"] = trainer.args.dataloader_num_workers if config.streaming else None
            began = config.output_dir if state == "unfinished" else origin and origin.parent
            for note in check_same_run(facts, began, config.allow_changed) if began else ():
                logger.warning(note)
            facts |= {"run_id": run_id, "origin": str(origin.resolve()) if origin else None}
            save_config(config, config.output_dir, facts)
            log_header(
                config,
                data,
                trainer,
                f"{'fp32' if precision == 'no' else precision} on {place_of(device, dist.world_size)}, "
                f"{len(checks)} checks hold, {len(trainer.fused) or 'no'} layers fused",
            )
            recover_interrupted_replace(Path(config.output_dir) / BEST)
            checkpoint = last_checkpoint(config.output_dir, run_id)
            if checkpoint is None and origin is not None:
                checkpoint = fork_checkpoint(origin, config.output_dir, run_id)
            if checkpoint is None and state == "unfinished":
                logger.info("plan   no checkpoint to go on from: beginning at step 1")
        checkpoint = dist.broadcast_object(checkpoint and str(checkpoint))
        checkpoint = checkpoint and Path(checkpoint)
        if not dist.is_main_process:
            logger.setLevel(logging.WARNING)  # from here on what it meets is its own, such as want of memory
        largest = collator.largest_row(data.train.head(SAMPLED) if config.streaming else data.train)
        if config.sharding == "fsdp":
            shard_weights(trainer, largest, config.compile, step_of(checkpoint))
        else:
            plan_memory(
                *(trainer, largest),
                *(config.gpu_memory_fraction, config.gradient_checkpointing, config.compile, config.auto_batch),
                steps_done=step_of(checkpoint),
            )
        trainer.train_from(checkpoint)
        if data.validation is not None:
            trainer.evaluate_if_needed()
        best_step = dist.broadcast_object(trainer.load_best() if dist.is_main_process else None)
        if not dist.is_main_process and best_step != trainer.state.global_step:
            load_weights(trainer.model, trainer.best_folder)
        unshard_weights(trainer)  # after it: reading or writing a state dict would let them go again
        if data.validation is not None:
            report_val(config, data.validation, model, collator, precision, dist)
        if dist.is_main_process:  # the others are done
            steps = trainer.state.global_step
            few, expected = describe_run(config, data, model, collator, precision, prompt)
            del trainer, model  # a GPU has room for one
            prove_best(config, processor, device, precision, collator, few, expected)
            append_metrics(config.output_dir, {"step": steps, "finished": True})
    return 0


def place_of(device, processes: int) -> str:
    return f"{device}" if processes == 1 else f"{processes} x {device.type}"


def open_run_folder(config: TrainingConfig, dist, held: contextlib.ExitStack) -> tuple:
    """(config with its folder, fresh, unfinished or finished, checkpoint of another run to begin at or None).

    The main process decides, locks the folder and writes the log.
    """
    from runtime.checkpoint import lock_folder, require_valid_checkpoint

    chosen = None
    if dist.is_main_process:
        config, state, notes, origin = choose_run_folder(config)
        if state != "finished":
            held.enter_context(lock_folder(config.output_dir))
            if origin is not None:
                require_valid_checkpoint(origin)
            setup_logging(config.output_dir)
        for note in notes:
            logger.info(note)
        chosen = config.output_dir, state, origin and str(origin)
    folder, state, origin = dist.broadcast_object(chosen)
    if state != "finished" and not wait_for(Path(folder) / LOCK_FILE):
        raise UserError(
            f"{folder}: rank {dist.rank} does not see it; several machines need the run folder on a disk that "
            "they share"
        )
    return dataclasses.replace(config, output_dir=folder), state, origin and Path(origin)


def wait_for(path: Path, seconds: float = 10) -> bool:
    """Whether a file is there; other machines may see it a little later."""
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)
    return path.exists()


def report_val(config: TrainingConfig, rows, model, collator, precision: str, dist) -> None:
    """Score val with the best weights, shared out over the processes, and write the reports."""
    from data.dataset import known_duplicates
    from data.synthetic import draw_ood_images
    from evaluation.evaluator import build_evaluator
    from runtime.checkpoint import describe_best

    adapter = describe_best(Path(config.output_dir) / BEST)
    evaluator = build_evaluator(config, model, collator, precision, config.output_dir, adapter, dist)
    calibration = evaluator.calibrate(rows)
    evaluator.report(rows, "val", calibration, ood=draw_ood_images(), duplicates=known_duplicates(rows["id"]))


def describe_run(config: TrainingConfig, data, model, collator, precision: str, prompt) -> tuple:
    """Write the card of best/; (a few rows, their scores) for prove_best."""
    from evaluation.model_card import build_model_card
    from evaluation.verify import FEW, first_readable, scores_of
    from models.builder import DTYPES
    from runtime.checkpoint import CARD

    card = build_model_card(config, load_config(config.output_dir)[1], config.output_dir, prompt)
    (Path(config.output_dir) / BEST / CARD).write_text(card, encoding="utf-8")
    few = first_readable(collator, data.train if data.validation is None else data.validation, FEW)
    return few, scores_of(model, collator, few, DTYPES[precision])


def prove_best(config: TrainingConfig, processor, device, precision: str, collator, few, expected) -> None:
    """Load best/ into a fresh base, which must score `few` as `expected`."""
    from transformers import set_seed

    from evaluation.verify import verify_reload
    from models.builder import DTYPES, build_model
    from runtime.device import collect_memory

    collect_memory(device)

    def build_again():
        set_seed(config.seed)
        return build_model(dataclasses.replace(config, compile="false"), processor, device, precision)

    verify_reload(build_again, Path(config.output_dir) / BEST, expected, collator, few, DTYPES[precision])


def log_header(config: TrainingConfig, data, trainer, place: str) -> None:
    """What the run is, before it starts."""
    learning, total = trainer.model.num_parameters(only_trainable=True), trainer.model.num_parameters()
    images, steps = data.train.images if config.streaming else len(data.train), trainer.planned_steps()
    size = f"{config.image_size} x {config.image_size} pixels" if config.image_size else "their own size"
    logger.info(f"run    {config.output_dir}: preset {config.preset}, seed {config.seed}")
    logger.info(
        f"data   {data.source}: {images:,} train, "
        + (f"{len(data.validation):,} val" if data.validation is not None else "no val (it is in train)")
        + f", {len(data.test):,} test images of {len(data.class_names)} classes, at {size}"
    )
    logger.info(
        f"model  {config.model}: {total:,} weights, {learning:,} ({learning / total:.2%}) learn ({config.trainable}), "
        f"{'4-bit' if config.load_in_4bit else 'not quantized'}, {place}" + ", untested on MPS" * place.endswith("mps")
    )
    logger.info(
        f"plan   {steps:,} steps of {config.effective_batch_size} images "
        f"({steps * config.effective_batch_size / images:.1f} epochs)"
    )


if __name__ == "__main__":
    sys.exit(main())
