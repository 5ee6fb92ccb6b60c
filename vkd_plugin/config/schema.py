"""The vocabulary: which sections and keys an experiment has, what they hold, and which are needed.

Needed is what torchdistill indexes without a default. ``experiment(root)`` gives the tables for one file:
what is read under ``train`` depends on whether there is a teacher and whether there are stages.
"""

from dataclasses import replace

import yaml

from vkd_plugin.config.nodes import Entries, entries, is_null, plain_value
from vkd_plugin.config.spec import Anything, Either, Flag, Function, Items, Named, Number, Section, Spec, Text
from vkd_plugin.suggest import closest

# --- torchdistill's tags ------------------------------------------------------------------------------------

# Any scalar: a version such as 1e-4 in a file name is no mistyped number.
PIECE = Either((Text(), Number(), Flag()), nullable=True)
CALL = Section({"args": Items(), "kwargs": Named()}, nullable=True)
TAGS: dict[str, Spec] = {
    "!join": Items(PIECE),
    "!pathjoin": Items(PIECE),
    "!expanduser": Text(),
    "!abspath": Text(),
    "!import_get": Section({"key": Text(), "package": Text(nullable=True)}, ("key",)),
    "!import_call": Section({"key": Text(), "package": Text(nullable=True), "init": CALL}, ("key",)),
    "!import_call_method": Section(
        {"package": Text(), "class_name": Text(), "method_name": Text(), "init": CALL}, ("package",)
    ),
    "!call_method": Section(
        {
            "obj": Anything(),
            "method_name": Text(),
            "args": Items(nullable=True),
            "kwargs": Named(nullable=True),
            "returns_obj": Flag(),
        },
        ("obj", "method_name"),
    ),
    "!getattr": Items(),
    "!setattr": Items(),
    "!access_by_index_or_key": Section({"data": Anything(), "index_or_key": Anything()}, ("data", "index_or_key")),
}

# --- sections -----------------------------------------------------------------------------------------------

COUNT = Number(low=1, whole=True)
AMOUNT = Number(low=0, whole=True)
NAMES = Items(Text())
ARGS = Items(nullable=True)


def component(kind: str, needs: tuple[str, ...] = ("key", "kwargs"), more: dict[str, Spec] | None = None) -> Section:
    """``{key, kwargs}`` that builds a component of ``kind``; ``more`` replaces or adds keys."""
    keys: dict[str, Spec] = {"key": Text(), "kwargs": Named(nullable="kwargs" not in needs)}
    return Section(keys | (more or {}), needs, component=kind)


DEPENDENCIES = Either(
    (
        Text(),
        Items(Either((Text(), Section({"name": Text(), "package": Text(nullable=True)}, ("name",)), NAMES))),
    ),
    nullable=True,
)

MODEL = Section(
    {
        "key": Text(),
        "kwargs": Named(),
        "src_ckpt": Text(role="checkpoint", nullable=True),
        "dst_ckpt": Text(nullable=True),
        "repo_or_dir": Text(nullable=True),
        "quantized": Flag(),
        "sync_bn": Flag(),
    },
    ("key", "kwargs"),
    component="model",
)

LOADER = Section(
    {
        "dataset_id": Text(role="dataset"),
        "sampler": Section(
            {"class_or_func": Function(), "kwargs": Named(nullable=True)},
            ("class_or_func",),
            component="sampler",
        ),
        "batch_sampler": replace(component("batch sampler"), nullable=True),
        "collate_fn": Text(role="collate function", nullable=True),
        "dataset_wrapper": replace(component("dataset wrapper", ("key",), {"args": ARGS}), nullable=True),
        "requires_supp": Flag(),
        "cache_output": Text(nullable=True),
        "kwargs": Section(
            {
                "batch_size": Number(low=1, whole=True, nullable=True),
                "num_workers": AMOUNT,
                "pin_memory": Flag(),
                "drop_last": Flag(),
                "persistent_workers": Flag(),
                "prefetch_factor": Number(low=1, whole=True, nullable=True),
                "timeout": Number(low=0),
            },
            open=True,
            elsewhere={"shuffle": "the sampler sets the order (torch.utils.data.RandomSampler shuffles)"},
        ),
    },
    ("dataset_id", "sampler", "kwargs"),
    component="data loader",
)

ADAPTATIONS = Named(component("adaptation module"), nullable=True)
DESIGN: dict[str, Spec] = {
    "sequential": Items(Text(), nullable=True),
    "adaptations": ADAPTATIONS,
    "frozen_modules": NAMES,
}


def side(wrapper: str) -> Section:
    """``train.teacher``, ``train.student`` or ``train.model``; ``wrapper``: the kind of auxiliary wrapper."""
    wrappers = (
        "DataParallel",
        "DistributedDataParallel",
        "FullyShardedDataParallel",
        "FullyShardedDataParallel2",
    )
    parallel = Text(choices=wrappers, nullable=True)
    return Section(
        DESIGN
        | {
            "forward_proc": Text(role="forward process"),
            "forward_hook": Section({"input": NAMES, "output": NAMES}),
            "auxiliary_model_wrapper": component(wrapper, ("key",), DESIGN),
            "wrapper": Either((parallel, Section({"key": parallel, "kwargs": Named()})), nullable=True),
            "requires_grad": Flag(),
            "src_ckpt": Text(role="checkpoint", nullable=True),
            "dst_ckpt": Text(nullable=True),
        },
        ("forward_proc",),
    )


PARAM_GROUP = Section(
    {
        "lr": Number(low=0),
        "weight_decay": Number(low=0),
        "momentum": Number(low=0),
        "betas": Items(Number(low=0, high=1)),
        "eps": Either((Number(low=0), Items(Number(low=0, nullable=True)))),  # Adafactor has two
    },
    open=True,
)


def optimizer(has_teacher: bool) -> Section:
    """``optimizer``; torchdistill has two names for the list of modules with options of their own."""
    module = Section({"module": Text(), "kwargs": PARAM_GROUP}, ("module",))
    names = ("module_wise_configs", "module_wise_kwargs")
    if has_teacher:
        module = Section({**module.keys, "is_teacher": Flag()}, ("module",))
        read, unread, when = *names, "with a teacher"
    else:
        unread, read, when = *names, "without a teacher"
    return Section(
        {
            "key": Text(),
            "kwargs": PARAM_GROUP,
            read: Items(module),
            "max_grad_norm": Number(low=0, nullable=True),
            "grad_accum_step": COUNT,
            "filters_params": Flag(),
        },
        ("key", "kwargs"),
        component="optimizer",
        elsewhere={unread: f"{when} torchdistill calls it '{read}'"},
    )


SCHEDULER = replace(component("scheduler", more={"scheduling_step": AMOUNT}), nullable=True)
MODEL_TERM = Section({"weight": Either((Number(), Named(Number())), nullable=True)}, nullable=True)
SUB_TERM = Section(
    {
        "criterion": component("loss"),
        "criterion_wrapper": replace(component("loss wrapper", ("key",), {"args": ARGS}), nullable=True),
        "weight": Number(),
    },
    ("criterion", "weight"),
    component="term",
)
CRITERION = component(
    "criterion",
    ("key",),
    {
        "args": ARGS,
        "kwargs": Section(
            {"sub_terms": Named(SUB_TERM, nullable=True), "model_term": MODEL_TERM}, open=True, nullable=True
        ),
        "func2extract_model_loss": Text(role="function to extract the model's loss", nullable=True),
    },
)

PROCESSES = ("pre_epoch_process", "pre_forward_process", "post_forward_process", "post_epoch_process")

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
COMPILE = Either((Flag(), Text(choices=COMPILE_MODES)), nullable=True)
AMP = Section({"dtype": Text(choices=("bfloat16", "float16"))}, ("dtype",), nullable=True)
ENGINE: dict[str, Spec] = {
    "task": Text(choices=("classification", "detection")),
    "amp": AMP,
    "teacher_amp": AMP,
    "ema": Section({"decay": Number(low=0, high=1)}, ("decay",), nullable=True),
    "compile": Section({"student": COMPILE, "teacher": COMPILE}, nullable=True),
    "channels_last": Either((Flag(), Section({"student": Flag(), "teacher": Flag()}))),
    "checkpoint": Section(
        {"every_steps": COUNT, "keep": COUNT, "on_error": Text(choices=("stop", "continue"))}, nullable=True
    ),
    "skip_nonfinite": AMOUNT,
    "validate_every": COUNT,
    "teacher_cache": Section(
        {
            "folder": Text(),
            "views": COUNT,
            "seed": AMOUNT,
            "dtype": Text(choices=("bfloat16", "float16", "float32")),
        },
        ("folder", "views"),
        nullable=True,
    ),
    "deterministic": Flag(),
    "global_batch": Flag(),
}
"""What the engine of this package reads under ``train``; torchdistill does not."""

PICTURES = Section(
    {"count": Number(low=1, high=100, whole=True), "score": Number(low=0, high=1)}, ("count",), nullable=True
)


def test(is_detection: bool) -> Section:
    """``test``; pictures are the engine's, torchdistill does not read them."""
    keys: dict[str, Spec] = {"test_data_loader": LOADER, "log_freq": COUNT}
    elsewhere = {"pictures": "they are of detections (train: task: 'detection')"}
    if is_detection:
        keys, elsewhere = {**keys, "pictures": PICTURES}, {}
    return Section(keys, ("test_data_loader",), elsewhere=elsewhere)


def stage(has_teacher: bool, first: bool) -> Section:
    """One stage's part of ``train``; a later one keeps the loaders and optimizer that it does not name."""
    sides = {"teacher": side("teacher wrapper"), "student": side("student wrapper")}
    if not has_teacher:
        sides = {"model": side("student wrapper")}
    keys: dict[str, Spec] = {
        "num_epochs": AMOUNT,
        "train_data_loader": LOADER,
        "val_data_loader": LOADER,
        **sides,
        "optimizer": optimizer(has_teacher),
        "scheduler": SCHEDULER,
        "criterion": CRITERION,
        **{name: Text(role=name.replace("_", " ")) for name in PROCESSES},
    }
    required = ("num_epochs", *sides, "criterion")
    if first:
        required += ("train_data_loader", "val_data_loader", "optimizer")
    return Section(keys, required, elsewhere=_unread_sides(has_teacher))


def _unread_sides(has_teacher: bool) -> dict[str, str]:
    if has_teacher:
        return {"model": "with models.teacher_model torchdistill calls it 'student'"}
    return {
        "teacher": "there is no models.teacher_model",
        "student": "without models.teacher_model torchdistill calls it 'model'",
    }


def train(names: set[object], has_teacher: bool) -> Section:
    """``train``, given the names of the keys that stand there."""
    common: dict[str, Spec] = {"log_freq": COUNT, **ENGINE}
    one = stage(has_teacher, first=True)
    if "stage1" not in names:
        # One mistake, said once: the other stages are let through, and what would be needed without stages is not.
        first, *others = sorted(_stages(names)) or [""]
        unread = {first: "the first stage is called 'stage1'"} if first else {}
        keys = {**one.keys, **common, **dict.fromkeys(others, Anything())}
        return Section(keys, () if first else one.required, elsewhere={**one.elsewhere, **unread})
    count = 1
    while f"stage{count + 1}" in names:
        count += 1
    stages = {f"stage{i}": stage(has_teacher, first=i == 1) for i in range(1, count + 1)}
    saved = {name: Section({"dst_ckpt": Text(nullable=True)}) for name in ("teacher", "student", "model")}
    unread = dict.fromkeys(one.keys, "with stages, it belongs in each of them")
    unread |= {name: f"there is no 'stage{count + 1}'" for name in _stages(names) if name not in stages}
    keys = {**common, **stages, **{name: saved[name] for name in saved if name in one.keys}}
    return Section(keys, tuple(stages), elsewhere={**unread, **one.elsewhere})


def _stages(names: set[object]) -> list[str]:
    return [name for name in names if isinstance(name, str) and name.startswith("stage") and name[5:].isdigit()]


def experiment(root: yaml.MappingNode) -> Section:
    """The tables for this file."""
    top = entries(root)
    models = _section(top, "models")
    teacher = next((name for name in models if name == "teacher_model" or _is_misspelt_teacher(name)), None)
    has_teacher = teacher is not None and not is_null(models[teacher][1])
    student = "model" if "model" in models and "student_model" not in models else "student_model"
    unread = {"model": "models.student_model is taken"} if student == "student_model" else {}
    return Section(
        {
            "dependencies": DEPENDENCIES,
            "datasets": Named(),
            "models": Section(
                {"teacher_model": replace(MODEL, nullable=True), student: MODEL},
                (student,),
                elsewhere=unread,
            ),
            "train": train(set(_section(top, "train")), has_teacher),
            "test": test(_is_detection(_section(top, "train"))),
        },
        ("datasets", "models", "train", "test"),
    )


def _is_misspelt_teacher(name: object) -> bool:
    """So that what stands under ``train`` is read as the user meant it."""
    known = ("teacher_model", "student_model", "model")
    return name not in known and closest(name, known) == "teacher_model"


def _is_detection(section: Entries) -> bool:
    """Whether ``task`` may come to that: a misspelt one is said in its place."""
    task = section.get("task")
    return task is not None and plain_value(task[1]) != "classification"


def _section(top: Entries, section: str) -> Entries:
    node = top[section][1] if section in top else None
    return entries(node) if isinstance(node, yaml.MappingNode) else {}
