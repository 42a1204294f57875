"""Keys of files that runs wrote before 2026-11-27, and what they are called now: such runs still load."""

RENAMED = {
    "answered": "coverage",
    "answered_precision": "selective_accuracy",
    "bad_photos": "unreadable_images",
    "eval_bad_photos": "eval_unreadable_images",
    "figures": "metrics",
    "finished": "completed",
    "longest": "max_new_tokens",
    "look_alikes": "confusions",
    "max_unreadable_fraction": "max_bad_fraction",
    "not_sure": "abstention_rate",
    "photo": "image",
    "photos": "images",
    "photos_per_s": "images_per_s",
    "probe_ids": "tokenizer_probe",
    "processes": "ranks",
    "strangers": "ood",
    "target_precision": "target_selective_accuracy",
    "twins": "duplicates",
}


def renamed(entry: dict) -> dict:
    """A JSON object under today's keys, unless its keys are names of classes or kinds, which users chose."""
    if all(isinstance(value, dict) and "n" in value for value in entry.values()):
        return entry
    return {RENAMED.get(key, key): value for key, value in entry.items()}
