"""What was compared, in words."""

from __future__ import annotations

from tract_hub.studies.compare import identity
from tract_hub.studies.compare.optim import has_momentum
from tract_hub.studies.compare.study import Study
from tract_hub.studies.images.prepared import Prepared
from tract_hub.studies.settings import CompareSettings


def facts_of(study: Study) -> list[tuple[str, str]]:
    """Return the name and the value of every setting that results show."""
    settings, data = study.settings, study.data
    arguments = ", ".join(f"{name}={value}" for name, value in settings.model_args)
    ran_on = identity.environment(study.accelerator)
    processes = _counted(ran_on["processes"], "process", "processes")
    model = f"{study.plan.name} ({arguments})" if arguments else study.plan.name
    return [
        ("recipe", f"{settings.recipe}, then the command's own options"),
        ("model", model),
        ("fitted", "; ".join(study.plan.remarks) or "nothing"),
        ("stem found", "; ".join(map(str, study.stems))),
        ("data", f"{data.source.name}: {_counts(data)}"),
        ("normalised by", _normalisation(study)),
        ("optimizer", _optimizer(settings)),
        ("training", f"{_counted(settings.epochs, 'epoch')}, batches of {settings.batch_size}"),
        ("augmentation", settings.augment),
        ("seeds", ", ".join(map(str, settings.seeds))),
        ("λ", ", ".join(f"{lam:g}" for lam in settings.lams) or "none"),
        ("device", f"{ran_on['device']}, {processes}, {settings.precision}"),
    ]


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _counts(data: Prepared) -> str:
    shape = f"{data.source.channels} × {data.size} × {data.size}"
    return (
        f"{len(data.train)} training and {len(data.test)} test images, "
        f"{len(data.source.classes)} classes, {shape}"
    )


def _normalisation(study: Study) -> str:
    name, data = study.settings.normalise, study.data
    if name != "standard":
        return {"unit": "nothing: pixels in [0, 1]", "bytes": "nothing: pixels in [0, 255]"}[name]
    mean = ", ".join(f"{value:.3f}" for value in data.mean)
    std = ", ".join(f"{value:.3f}" for value in data.std)
    return f"mean {mean} and deviation {std} of the training images"


def _optimizer(settings: CompareSettings) -> str:
    momentum = f", momentum {settings.momentum:g}" if has_momentum(settings.optimizer) else ""
    own = _stem_optimizer(settings)
    warm = f", warm-up {settings.warmup_epochs:g} epochs" if settings.warmup_epochs else ""
    return (
        f"{settings.optimizer}, lr {settings.lr:g} {settings.schedule}{warm}{momentum}, "
        f"weight decay {settings.weight_decay:g}, label smoothing {settings.label_smoothing:g}{own}"
    )


def _stem_optimizer(settings: CompareSettings) -> str:
    if settings.stem_optimizer == "same" and settings.stem_lr is None:
        return ""
    by_sgd = settings.stem_optimizer == "sgd"
    rule = f"SGD, momentum {settings.momentum:g}" if by_sgd else settings.optimizer
    return f"; first layer: {rule}, lr {settings.stem_lr or settings.lr:g}"
