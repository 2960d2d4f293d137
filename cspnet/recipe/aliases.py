"""Names that timm, torchvision's references, Ultralytics and Darknet use for the recipe's fields.

An option or override with such a name is rejected, and the message gives the equivalent override.
The same applies to names that the fields had in earlier versions.
"""

from typing import Any

from cspnet.shell import shell_quote

# For each field: its description, and other names for it, in lower case with underscores. A value
# means the same under each name.
_FIELDS = {
    "optim.learning_rate": ("the learning rate", "lr lr0 base_lr max_lr initial_lr"),
    "optim.weight_decay": ("the weight decay", "wd l2"),
    "optim.backbone_lr": ("the backbone's learning rate", "lr_backbone backbone_learning_rate"),
    "batch": ("the batch size", "b bs batch_size batchsize train_batch_size"),
    "group": ("the group size", "mini_batch"),
    "data.image_size": (
        "the image size",
        "size img img_size imgsz input_size crop_size train_crop_size resolution",
    ),
    "model.name": ("the network", "model arch architecture net network backbone"),
    "model.init_from": (
        "the file with the initial weights",
        "weights pretrained initial_checkpoint init_checkpoint finetune pretrained_weights",
    ),
    "model.freeze_stages": ("the number of frozen stages", "freeze"),
    "model.classes": ("the number of classes", "nc num_classes n_classes"),
    "model.activation": ("the activation", "act act_layer"),
    "loss.label_smoothing": ("label smoothing", "smoothing label_smooth_eps"),
    "augment.flip": ("the probability of a flip", "hflip fliplr hflip_prob"),
    "augment.value": ("the change of brightness", "exposure"),
    "augment.rotation": ("the maximum rotation", "degrees angle"),
    "ema.decay": ("the decay of the EMA", "ema ema_decay model_ema_decay"),
    "schedule.warmup_steps": ("the warm-up", "burn_in warmup_iters warmup_iterations"),
    "schedule.steps": (
        "the length of a run in optimizer steps",
        "iterations iters num_iterations max_iter max_iters max_steps total_steps max_batches",
    ),
    "evaluate.crop_pct": ("the crop of an evaluation", "crop"),
    "evaluate.every": ("the number of steps between validations", "val_interval eval_every"),
    "log_every": (
        "the number of steps between lines of metrics",
        "log_interval print_freq log_freq",
    ),
    "save_every": ("the number of steps between saves", "save_period save_freq save_interval"),
    "seed": ("the seed", "random_seed"),
}
# Other names, by the answer to give: their values mean something else here, or no single field
# corresponds to them.
_TEXTS = {
    "the length of a run is counted in optimizer steps, not in epochs: "
    "schedule.steps=N with N = {value} × training images / batch": (
        "epochs epoch n_epochs num_epochs max_epochs"
    ),
    "the warm-up is counted in optimizer steps, not in epochs: "
    "schedule.warmup_steps=N with N = {value} × training images / batch": (
        "warmup_epochs lr_warmup_epochs warm_up_epochs"
    ),
    "mixed precision is a recipe field: precision=auto (the default: bf16, fp16 or fp32 depending "
    "on the device), bf16, fp16 or fp32": (
        "amp no_amp native_amp apex_amp half fp16 bf16 mixed_precision amp_dtype dtype"
    ),
    "the optimizer is SGD with momentum; its fields are optim.learning_rate, optim.momentum and "
    "optim.weight_decay": "opt optimizer nesterov",
    "the schedule is a polynomial decay; its fields are schedule.steps, schedule.warmup_steps and "
    "schedule.power": "sched scheduler lr_scheduler cos_lr lrf min_lr",
    # Weight decay in Darknet, but the name of another field here.
    "the weight decay is optim.weight_decay, the decay of the EMA is ema.decay": "decay",
}
# Fields that earlier versions had under another name: section, field, new key.
_RENAMED = {
    "average": {"decay": "ema.decay"},
    "mix": {"share": "mix.images_per_draw"},
    "adversarial": {
        "strength": "adversarial.step_size",
        "target": "adversarial.objective (nothing is now suppress, label is now mislead)",
    },
    "augment": {"resize": "augment.scale", "angle": "augment.rotation"},
    "data": {
        "size": "data.image_size",
        "start_size": "data.start_image_size",
        "scaled_decode": "data.reduced_decode",
    },
    "evaluate": {
        "crop": "evaluate.crop_pct",
        "resize": "evaluate.interpolation (corners is now align_corners)",
    },
    "model": {"weights": "model.init_from", "freeze": "model.freeze_stages"},
    "loss": {"smoothing": "loss.label_smoothing"},
}
_FIELD_OF = {
    name: (what, field) for field, (what, names) in _FIELDS.items() for name in names.split()
}
_TEXT_OF = {name: text for text, names in _TEXTS.items() for name in names.split()}


def leaf_name(name: str) -> str:
    """The last part of a dotted name, in lower case: `optim.Batch-Size` → `batch_size`."""
    return name.lower().replace("-", "_").rpartition(".")[2]


def aliased_fields() -> set[str]:
    """Fields of the recipe that have aliases."""
    return set(_FIELDS)


def renamed() -> dict[str, str]:
    """Old dotted key of each renamed field, and its new key, with a remark on renamed values."""
    return {
        f"{section}.{field}": new
        for section, names in _RENAMED.items()
        for field, new in names.items()
    }


def renamed_leaves(leaf: str) -> list[str]:
    """New keys of the fields whose names ended in `leaf` in earlier versions."""
    return [new.partition(" ")[0] for old, new in renamed().items() if leaf_name(old) == leaf]


def alias_hint(name: str, value: str | None = None) -> str:
    """What to write instead of another trainer's name for a field; empty for any other name.

    `name` may be dotted and may contain `-` or `_`. `value` is the value given for it, if any.
    """
    leaf = leaf_name(name)
    if leaf in _TEXT_OF:
        return _TEXT_OF[leaf].replace("{value}", value or "epochs")
    if leaf in _FIELD_OF:
        what, field = _FIELD_OF[leaf]
        return f"{what} is a recipe field: {format_override(field, value)}"
    return ""


def format_override(field: str, value: str | None) -> str:
    """An override as typed in a shell; the field alone if there is no value."""
    return field if value is None else shell_quote(f"{field}={value}")


def format_value(value: Any) -> str:
    """A YAML value as written in an override."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    return str(value)
