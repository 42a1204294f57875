"""The plain transformers Trainer on the layers of PEFT, which benchmark.py compares with."""

from collections.abc import Sequence
from functools import partial

import torch
from peft import prepare_model_for_kbit_training
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from config.training_config import TrainingConfig
from models.builder import PlantModel, build_base, set_trainable
from utils.image_utils import fit_image, open_image


def build_stock_trainer(config: TrainingConfig, plant: PlantModel, rows: Sequence[dict]) -> Trainer:
    """On a freshly loaded base model, with the processor and prompt of `plant`; everything as PEFT documents it."""
    model = build_base(config, plant.processor, plant.device, plant.dtype)
    if config.load_in_4bit:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    arguments = TrainingArguments(
        config.output_dir,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.load_in_4bit,
        learning_rate=config.learning_rate,
        max_grad_norm=config.max_grad_norm,
        bf16=plant.precision == "bf16",
        fp16=plant.precision == "fp16",
        use_cpu=plant.device.type == "cpu",
        optim=config.optim,
        max_steps=config.max_steps,
        dataloader_num_workers=config.num_workers,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model=set_trainable(model, config.trainable, config.lora_r, config.lora_alpha, config.lora_dropout),
        args=arguments,
        train_dataset=rows,
        data_collator=partial(collate, plant, config.image_size),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def collate(plant: PlantModel, image_size: int | None, rows: Sequence[dict]) -> dict:
    """Rows to the processor's padded batch, with labels on the class name and the end-of-turn token."""
    processor, prompt = plant.processor, plant.prompt
    images = [fit_image(open_image(row["image"]), image_size) for row in rows]
    texts = [prompt.text(plant.class_names[row["label"]]) for row in rows]
    batch = processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="right")
    batch.setdefault("image_sizes", torch.tensor([image.size[::-1] for image in images]))  # none of base views
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    image_tokens = int((batch["input_ids"][0] == processor.image_token_id).sum())
    labels[:, : len(processor.tokenizer(prompt.prompt).input_ids) - 1 + image_tokens] = -100
    return batch | {"labels": labels}
