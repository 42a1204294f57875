"""Export a trained model: the adapter merged into the 16-bit base model, verified to be what was measured.

    python export.py runs/default flowers                    the whole model in bf16, for plain transformers
    python export.py runs/default flowers --adapter-only     the adapter, processor and model card, for PEFT
    python export.py runs/default flowers --format gguf --quantize q4_k_m    for llama.cpp and ollama
    python export.py runs/default flowers --push-to-hub me/flowers

The folder appears only after it was loaded afresh, reproduced the logits of base model and adapter on val images, and
reached the validated accuracy. Needs a GPU for what does not fit the CPU, and disk space for the merged weights.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from config.cli import COMPUTE_FIELDS, DATA_FIELDS, parse_run_command
from config.training_config import ConfigError, option
from runtime.run_dir import Run
from utils.logging_utils import logger, report_errors, set_environment, setup_logging


@dataclass(frozen=True)
class ExportOptions:
    dtype: Literal["bf16", "fp16", "fp32", "nf4"] = option("bf16", "of the merged weights; nf4: 4-bit language model")
    format: Literal["safetensors", "gguf"] = option("safetensors", "gguf: for llama.cpp and ollama")
    quantize: Literal["f16", "q8_0", "q4_k_m"] = option("f16", "of the language model in gguf")
    adapter_only: bool = option(False, "export the adapter, for the base model it was trained on")
    push_to_hub: str | None = option(None, "OWNER/NAME: upload the same files there; a new repository is private")
    limit: int | None = option(None, "val images that the merged model is scored on; none: all", low=1)

    def find_conflicts(self) -> Iterator[str]:
        if self.adapter_only and self.dtype != "bf16":
            yield f"dtype={self.dtype} with adapter_only=true: an adapter is saved as it was trained; leave one out"
        if self.adapter_only and self.limit is not None:
            yield f"limit={self.limit} with adapter_only=true: an adapter's logits are compared; leave one out"
        if self.adapter_only and self.format == "gguf":
            yield "format=gguf with adapter_only=true: the merged model is written; leave one out"
        if self.format == "gguf" and self.dtype != "bf16":
            yield f"dtype={self.dtype} with format=gguf: it is merged in fp16; use --quantize, or leave one out"
        if self.format != "gguf" and self.quantize != "f16":
            yield f"quantize={self.quantize} with format={self.format}: only gguf is quantized; add --format gguf"


def main(argv: list[str] | None = None) -> int:
    fields = (*COMPUTE_FIELDS, *DATA_FIELDS)
    run, words, options = parse_run_command(argv, __doc__, ExportOptions, fields, Run.load, "OUT")
    out, adapter_only, repository = Path(words[0]), options.adapter_only, options.push_to_hub
    set_environment()
    setup_logging()
    with report_errors(ConfigError, when_interrupted="nothing was exported"):
        from evaluation.exporter import check_can_export, export_run, open_hub, staging_dir
        from evaluation.results import same_weights

        is_gguf = options.format == "gguf"
        check_can_export(run, out, adapter_only, repository, is_gguf)
        with staging_dir(out) as draft, same_weights(run):
            if is_gguf:
                from evaluation.gguf_export import export_gguf

                export_gguf(run, draft, options.quantize, options.limit)
            else:
                export_run(run, draft, options.dtype, adapter_only, options.limit)
        size = sum(path.stat().st_size for path in out.iterdir())
        logger.info(f"saved | {out} | {size / 1e6:,.1f} MB | see its README.md")
    if repository:
        retry = f"{out} is complete; upload it with: hf upload {repository} {out}"
        with report_errors(when_interrupted=retry), open_hub(repository, retry) as hub:
            message = "Exported by LLaVA Plants"
            commit = hub.upload_folder(repo_id=repository, folder_path=out, commit_message=message)
            logger.info(f"saved | {commit.commit_url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
