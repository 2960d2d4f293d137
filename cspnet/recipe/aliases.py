"""Names that timm, torchvision's references, Ultralytics and Darknet have for the recipe's fields.

An option or an override of such a name is refused with the override that does the same here.
"""

from typing import Any

from cspnet.shell import shell_quote

# By field: what it is, and what others call it where a value means the same here. Lower case, with
# underscores.
_FIELDS = {
    "optim.learning_rate": ("the learning rate", "lr lr0 base_lr max_lr initial_lr"),
    "optim.weight_decay": ("the weight decay", "wd l2"),
    "optim.backbone_lr": ("the backbone's learning rate", "lr_backbone backbone_learning_rate"),
    "batch": ("the batch size", "b bs batch_size batchsize train_batch_size"),
    "group": ("the group size", "mini_batch"),
    "data.image_size": (
        "the image size",
        "img img_size imgsz image_size input_size crop_size train_crop_size resolution",
    ),
    "model.name": ("the network", "model arch architecture net network backbone"),
    "model.init_from": (
        "the weights to start from",
        "pretrained initial_checkpoint init_checkpoint finetune pretrained_weights",
    ),
    "model.classes": ("the number of classes", "nc num_classes n_classes"),
    "model.activation": ("the activation", "act act_layer"),
    "loss.label_smoothing": ("label smoothing", "label_smoothing label_smooth_eps"),
    "augment.flip": ("the probability of a flip", "hflip fliplr hflip_prob"),
    "augment.value": ("the change of brightness", "exposure"),
    "augment.rotation": ("the rotation", "degrees rotation"),
    "ema.decay": ("the decay of averaged weights (EMA)", "ema ema_decay model_ema_decay"),
    "schedule.warmup_steps": ("the warm-up", "burn_in warmup_iters warmup_iterations"),
    "schedule.steps": (
        "the length of a run in optimizer steps",
        "iterations iters num_iterations max_iter max_iters max_steps total_steps max_batches",
    ),
    "evaluate.crop_pct": ("the crop of an evaluation", "crop_pct"),
    "evaluate.every": ("the number of steps between validations", "val_interval eval_every"),
    "log_every": (
        "the number of steps between lines of metrics",
        "log_interval print_freq log_freq",
    ),
    "save_every": ("the number of steps between saves", "save_period save_freq save_interval"),
    "seed": ("the seed", "random_seed"),
}
# By what to say: names whose values mean something else here, or that no single field stands for.
_TEXTS = {
    "the length of a run is counted in optimizer steps, not in epochs: "
    "schedule.steps=N with N = {value} × training images / batch": (
        "epochs epoch n_epochs num_epochs max_epochs"
    ),
    "the warm-up is counted in optimizer steps, not in epochs: "
    "schedule.warmup_steps=N with N = {value} × training images / batch": (
        "warmup_epochs lr_warmup_epochs warm_up_epochs"
    ),
    "mixed precision is a recipe field: precision=auto (the default: bf16, fp16 or fp32 by the "
    "device), bf16, fp16 or fp32": (
        "amp no_amp native_amp apex_amp half fp16 bf16 mixed_precision amp_dtype dtype"
    ),
    "the optimizer is SGD with momentum; its fields are optim.learning_rate, optim.momentum and "
    "optim.weight_decay": "opt optimizer nesterov",
    "the schedule is a polynomial decay; its fields are schedule.steps, schedule.warmup_steps and "
    "schedule.power": "sched scheduler lr_scheduler cos_lr lrf min_lr",
    # Darknet's weight decay, and a field of another meaning here.
    "the weight decay is optim.weight_decay, the decay of averaged weights ema.decay": "decay",
}
_FIELD_OF = {
    name: (what, field) for field, (what, names) in _FIELDS.items() for name in names.split()
}
_TEXT_OF = {name: text for text, names in _TEXTS.items() for name in names.split()}


def leaf_name(name: str) -> str:
    """The last part of a dotted name, as the table spells it: `optim.Batch-Size` → `batch_size`."""
    return name.lower().replace("-", "_").rpartition(".")[2]


def aliased_fields() -> set[str]:
    """The recipe's fields that have other names."""
    return set(_FIELDS)


def alias_hint(name: str, value: str | None = None) -> str:
    """What to write in place of another trainer's name for a field; empty for any other name.

    `name` may be dotted, and spelt with `-` or `_`. `value` is what was given for it, if anything.
    """
    short = leaf_name(name)
    if short in _TEXT_OF:
        return _TEXT_OF[short].replace("{value}", value or "epochs")
    if short in _FIELD_OF:
        what, field = _FIELD_OF[short]
        return f"{what} is a recipe field: {format_override(field, value)}"
    return ""


def format_override(field: str, value: str | None) -> str:
    """An override as it is typed in a shell; the field alone where there is no value."""
    return field if value is None else shell_quote(f"{field}={value}")


def spell(value: Any) -> str:
    """A value of YAML as it is written in an override."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(spell, value))}]"
    return str(value)
