"""One mistake in a sound file each: exactly one line about it, with its line in the file."""

import re
from pathlib import Path

import pytest

from vkd_plugin.config import ConfigErrors, load_experiment
from vkd_plugin.config.experiment import resolve
from vkd_plugin.errors import ConfigError, UserError

CONFIGS = Path(__file__).parent / "data" / "configs"


def problems(text: str, folder: Path) -> list[str]:
    path = folder / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigErrors) as caught:
        load_experiment(path)
    assert str(caught.value) == "\n".join(str(problem) for problem in caught.value.problems)
    return [str(problem).replace(str(path), "x.yaml") for problem in caught.value.problems]


# (file, what to replace, by what, message, text that begins on the line to blame: if left out, the last that
# was put in)
STRUCTURE: list[tuple[str, ...]] = [
    ("distill", "train:\n", "trian:\n", "unknown key 'trian' (did you mean 'train'?)"),
    (
        "distill",
        "  num_epochs: 2",
        "  num_epocs: 2",
        "train: unknown key 'num_epocs' (did you mean 'num_epochs'?)",
    ),
    ("distill", "  num_epochs: 2\n", "", "train: missing key 'num_epochs'", "train:\n  log"),
    (
        "distill",
        "num_epochs: 2",
        "num_epochs: 'ten'",
        "train.num_epochs: expected a whole number of at least 0, got 'ten'",
    ),
    (
        "distill",
        "num_epochs: 2",
        "num_epochs: -1",
        "train.num_epochs: expected a whole number of at least 0, got -1",
    ),
    (
        "distill",
        "num_epochs: 2",
        "num_epochs: 1.5",
        "train.num_epochs: expected a whole number of at least 0, got 1.5",
    ),
    (
        "distill",
        "num_epochs: 2",
        "num_epochs: true",
        "train.num_epochs: expected a whole number of at least 0, got True",
    ),
    (
        "distill",
        "num_epochs: 2",
        "num_epochs:",
        "train.num_epochs: expected a whole number of at least 0, got nothing",
    ),
    (
        "distill",
        "weight: 0.1",
        "weight: 'x'",
        "train.criterion.kwargs.sub_terms.feature.weight: expected a number, got 'x'",
    ),
    (
        "distill",
        "weight: 0.1",
        "weight: 1e-4",
        "train.criterion.kwargs.sub_terms.feature.weight: expected a number, got '1e-4';"
        " YAML reads it as a string, write 1.0e-4",
    ),
    (
        "distill",
        "weight: 0.1",
        "weight: .nan",
        "train.criterion.kwargs.sub_terms.feature.weight: expected a number, got nan",
    ),
    (
        "distill",
        "gamma: 0.1",
        "gamma: 1.5e3",
        "train.scheduler.kwargs.gamma: expected a number, got '1.5e3'; YAML reads it as a string, write 1.5e+3",
    ),
    (
        "distill",
        "p: 0.5",
        "p: 5e-1",
        "datasets.fake/train.init.kwargs.transform.init.kwargs.transforms.0.init.kwargs.p: "
        "expected a number, got '5e-1'; YAML reads it as a string, write 5.0e-1",
    ),
    (
        "distill",
        "requires_grad: False",
        "requires_grad: 'False'",
        "train.teacher.requires_grad: expected true or false, got 'False'",
    ),
    (
        "supervised",
        "forward_proc: 'forward_batch_only'",
        "forward_proc: 'forward_batch_only'\n    forward_hook: {output: 'fc'}",
        "train.model.forward_hook.output: expected a list, got 'fc'; write ['fc']",
        "forward_hook:",
    ),
    (
        "distill",
        "wrapper: 'DataParallel'",
        "wrapper: 'DataParalel'",
        "train.teacher.wrapper: expected one of DataParallel, DistributedDataParallel, "
        "FullyShardedDataParallel, FullyShardedDataParallel2 or a mapping, got 'DataParalel'",
    ),
    (
        "distill",
        "    max_grad_norm: 5.0",
        "    max_grad_nrom: 5.0",
        "train.optimizer: unknown key 'max_grad_nrom' (did you mean 'max_grad_norm'?)",
    ),
    (
        "distill",
        "    cache_output:",
        "    colate_fn:",
        "train.train_data_loader: unknown key 'colate_fn' (did you mean 'collate_fn'?)",
    ),
    ("distill", "    key: 'SGD'\n", "", "train.optimizer: missing key 'key'", "  optimizer:"),
    (
        "distill",
        "      class_or_func: !import_get\n        key: 'torch.utils.data.SequentialSampler'\n",
        "      class_or_func: 'SequentialSampler'\n",
        "train.train_data_loader.sampler.class_or_func: expected a class or function "
        "(!import_get {key: 'torch.utils.data.RandomSampler'}), got 'SequentialSampler'",
    ),
    (
        "distill",
        "      num_workers: 0\n    cache",
        "      shuffle: True\n    cache",
        "train.train_data_loader.kwargs: 'shuffle' is not read here: "
        "the sampler sets the order (torch.utils.data.RandomSampler shuffles)",
        "shuffle: True",
    ),
    ("distill", "_name: &dataset", "name: &dataset", "datasets.fake/train: unknown key 'name'"),
    (
        "supervised",
        "    init:\n",
        "    int:\n",
        "datasets.all: unknown key 'int' (did you mean 'init'?)",
    ),
    (
        "distill",
        "&val_set fake/val: !import_call",
        "&val_set fake/val: !import_cal",
        "unknown tag '!import_cal'",
    ),
    ("distill", "  log_freq: 10\n", "  log_freq: 10\n  log_freq: 10\n", "key 'log_freq' is written twice"),
    ("distill", "    wrapper:\n", "    wrapper: &loop [*loop]\n", "this anchor contains itself"),
    (
        "distill",
        "  teacher:\n",
        "  model: {}\n  teacher:\n",
        "train: 'model' is not read here: with models.teacher_model torchdistill calls it 'student'",
        "  model: {}",
    ),
    (
        "supervised",
        "    module_wise_kwargs:",
        "    module_wise_configs:",
        "train.optimizer: 'module_wise_configs' is not read here: "
        "without a teacher torchdistill calls it 'module_wise_kwargs'",
    ),
    (
        "staged",
        "  log_freq: 1\n",
        "  num_epochs: 3\n",
        "train: 'num_epochs' is not read here: with stages, it belongs in each of them",
    ),
    ("staged", "  stage2:", "  stage3:", "train: 'stage3' is not read here: there is no 'stage2'"),
    (
        "engine",
        "{decay: 0.999}",
        "{decay: 1.5}",
        "train.ema.decay: expected a number from 0 to 1, got 1.5",
        "ema:",
    ),
    (
        "engine",
        "{dtype: bfloat16}",
        "{dtype: bf16}",
        "train.amp.dtype: expected one of bfloat16, float16, got 'bf16' (did you mean 'bfloat16'?)",
        "  amp:",
    ),
    (
        "engine",
        "every_steps: 100",
        "every_steps: 0",
        "train.checkpoint.every_steps: expected a whole number",
        "checkp",
    ),
    (
        "distill",
        "  num_epochs: 2",
        "  num_epochs: [2",
        "expected ',' or ']', but got ':'",
        "train_data_loader:",
    ),
    ("distill", "  num_epochs: 2", "  num_epochs: *epochs", "found undefined alias 'epochs'"),
    (
        "distill",
        "dataset_id: *train_set",
        "dataset_id: *train_st",
        "found undefined alias 'train_st' (did you",
    ),
    ("distill", "  num_epochs: 2", "\tnum_epochs: 2", "found character '\\t' that cannot start any token"),
    (
        "engine",
        "  <<: *speed",
        "  <<: 3",
        "expected a mapping or list of mappings for merging, but found scalar",
    ),
    (
        "supervised",
        "            kwargs: {size: 10, image_size: [3, 32, 32], num_classes: 10}",
        "            kwargs: {size: 2020-99-99}",
        "cannot read '2020-99-99': month must be in 1..12",
    ),
    (
        "supervised",
        "            kwargs: {size: 10, image_size: [3, 32, 32], num_classes: 10}",
        "            kwargs: {size: !!bool x}",
        "cannot read 'x' as bool",
    ),
    (
        "supervised",
        "            kwargs: {size: 10, image_size: [3, 32, 32], num_classes: 10}",
        "            kwargs: {size: !!timestamp x}",
        "cannot read 'x' as timestamp",
    ),
]

REFERENCES: list[tuple[str, ...]] = [
    (
        "distill",
        "    dataset_id: *val_set\n    sampler: *sampler\n    kwargs: *loader",
        "    dataset_id: fake/vall\n    sampler: *sampler\n    kwargs: *loader",
        "train.val_data_loader.dataset_id: no dataset 'fake/vall' under datasets (did you mean 'fake/val'?)",
        "    dataset_id: fake/vall",
    ),
    ("distill", "key: 'SGD'", "key: 'SDG'", "train.optimizer.key: no optimizer 'SDG' (did you mean 'SGD'?)"),
    (
        "distill",
        "key: 'MultiStepLR'",
        "key: 'MultistepLr'",
        "train.scheduler.key: no scheduler 'MultistepLr' (did you mean 'MultiStepLR'?)",
    ),
    (
        "distill",
        "key: 'WeightedSumLoss'",
        "key: 'WeightedLossSum'",
        "train.criterion.key: no criterion 'WeightedLossSum' (did you mean 'WeightedSumLoss'?)",
    ),
    (
        "distill",
        "key: 'KDLoss'",
        "key: 'KdLos'",
        "train.criterion.kwargs.sub_terms.kd.criterion.key: no loss 'KdLos' (did you mean 'KDLoss'?)",
    ),
    (
        "distill",
        "key: 'SimpleLossWrapper'",
        "key: 'SimpleWrapper'",
        "train.criterion.kwargs.sub_terms.feature.criterion_wrapper.key: no loss wrapper 'SimpleWrapper' "
        "(did you mean 'SimpleLossWrapper'?)",
    ),
    (
        "staged",
        "key: 'Teacher4FactorTransfer'",
        "key: 'Teacher4FactorTransfr'",
        "train.stage1.teacher.auxiliary_model_wrapper.key: no teacher wrapper 'Teacher4FactorTransfr' "
        "(did you mean 'Teacher4FactorTransfer'?)",
    ),
    (
        "staged",
        "key: 'Conv2d'",
        "key: 'Conv2b'",
        "train.stage2.student.adaptations.regressor.key: no adaptation module 'Conv2b'",
    ),
    (
        "supervised",
        "forward_proc: 'forward_batch_only'",
        "forward_proc: 'forward_batch_olny'",
        "train.model.forward_proc: no forward process 'forward_batch_olny' (did you mean 'forward_batch_only'?)",
    ),
    (
        "staged",
        "'extract_model_loss_dict'",
        "'extract_model_loss'",
        "train.stage2.criterion.func2extract_model_loss: no function to extract the model's loss "
        "'extract_model_loss' (did you mean 'extract_model_loss_dict'?)",
    ),
    (
        "supervised",
        "key: 'resnet20'",
        "key: 'resnet21'",
        "models.model.key: no model 'resnet21' (did you mean",
    ),
    (
        "distill",
        "    cache_output:",
        "    collate_fn: 'my_collate'",
        "train.train_data_loader.collate_fn: no collate function 'my_collate'",
    ),
    (
        "distill",
        "    cache_output:",
        "    dataset_wrapper: {key: 'CRDWrapper'}",
        "train.train_data_loader.dataset_wrapper.key: no dataset wrapper 'CRDWrapper' (did you",
    ),
    (
        "distill",
        "    cache_output:",
        "    batch_sampler: {key: 'BatchSampler', kwargs: {batch_size: 2, drop_last: True}}",
        "train.train_data_loader.kwargs: 'batch_size' may not stand here: DataLoader is given it already",
        "      batch_size: 4",
    ),
    (
        "distill",
        "  log_freq: 10",
        "  pre_epoch_process: 'x'",
        "train.pre_epoch_process: no pre epoch process 'x' (choose from default_pre_epoch_process_with",
    ),
    (
        "distill",
        "momentum: 0.9",
        "momentun: 0.9",
        "train.optimizer.kwargs: SGD takes no argument 'momentun' (did you mean 'momentum'?)",
    ),
    (
        "distill",
        "      milestones: [1]\n",
        "",
        "train.scheduler.kwargs: MultiStepLR needs the argument 'milestones'",
        "    kwargs:\n      gamma",
    ),
    (
        "distill",
        "alpha: 0.5",
        "alpah: 0.5",
        "train.criterion.kwargs.sub_terms.kd.criterion.kwargs: KDLoss takes no argument 'alpah' "
        "(did you mean 'alpha'?)",
    ),
    (
        "distill",
        "      sub_terms:",
        "      sub_term:",
        "train.criterion.kwargs: WeightedSumLoss takes no argument 'sub_term' (did you mean 'sub_terms'?)",
    ),
    (
        "distill",
        "      num_workers: 0\n    cache",
        "      num_worker: 0\n    cache",
        "train.train_data_loader.kwargs: DataLoader takes no argument 'num_worker' (did you mean 'num_workers'?)",
        "num_worker: 0",
    ),
    (
        "supervised",
        "replacement: True",
        "replacment: True",
        "train.train_data_loader.sampler.kwargs: torch.utils.data.RandomSampler takes no argument "
        "'replacment' (did you mean 'replacement'?)",
    ),
    (
        "staged",
        "          uses_decoder: True",
        "          uses_decoder: True\n          device: 'cpu'",
        "train.stage1.teacher.auxiliary_model_wrapper.kwargs: 'device' may not stand here: "
        "Teacher4FactorTransfer is given it already",
    ),
    (
        "distill",
        "    src_ckpt:\n",
        "    src_ckpt: './no.pt'\n",
        "models.teacher_model.src_ckpt: no checkpoint at './no",
    ),
    (
        "distill",
        "    src_ckpt:\n",
        "    src_ckpt: '.'\n",
        "models.teacher_model.src_ckpt: '.' is a folder, not a checkpoint",
    ),
    (
        "distill",
        "    src_ckpt: &student_ckpt !join",
        "    src_ckpt: './no.pt'\n    _path: &student_ckpt !join",
        "models.student_model.src_ckpt: no checkpoint at './no.pt'",
        "    src_ckpt: './no.pt'",
    ),
    (
        "staged",
        "src_ckpt: *stage_ckpt",
        "src_ckpt: 'absent/other.pt'",
        "train.stage2.student.src_ckpt: no checkpoint at 'absent/other.pt'",
    ),
    (
        "engine",
        "dependencies: 'vkd_plugin'",
        "dependencies: 'vkd_plugn'",
        "dependencies: 'vkd_plugn' is refused: importing a package runs its code (did you mean 'vkd_plugin'?); "
        "if you trust it: --trust vkd_plugn",
    ),
    (
        "staged",
        "- name: 'torchdistill'",
        "- name: 'torchdistill.modles'",
        "dependencies: cannot import 'torchdistill.modles': No module named 'torchdistill.modles' "
        "(did you mean 'models'?)",
    ),
]

CONSTRUCTION: list[tuple[str, ...]] = [
    (
        "distill",
        "transforms.RandomHorizontalFlip'",
        "transforms.RandomHorizontalFlop'",
        "datasets.fake/train.init.kwargs.transform.init.kwargs.transforms.0: "
        "torchvision.transforms.RandomHorizontalFlop: module 'torchvision.transforms' "
        "has no attribute 'RandomHorizontalFlop' (did you mean 'RandomHorizontalFlip'?)",
    ),
    (
        "distill",
        "p: 0.5",
        "prob: 0.5",
        "datasets.fake/train.init.kwargs.transform.init.kwargs.transforms.0.kwargs: "
        "torchvision.transforms.RandomHorizontalFlip takes no argument 'prob' (choose from p)",
    ),
    (
        "supervised",
        "key: 'torchvision.datasets.FakeData'",
        "key: 'torchvison.datasets.FakeData'",
        "datasets.all.init.kwargs.dataset: 'torchvison.datasets.FakeData' is refused: it is outside the packages "
        "that an experiment may use (did you mean 'torchvision'?); if you trust it: --trust torchvison",
    ),
    (
        "supervised",
        "    index_or_key: 1",
        "    index_or_key: 2",
        "!access_by_index_or_key: IndexError: list index out of range",
        "  &second second: !access",
    ),
    (
        "staged",
        "key: 'torchvision.datasets.FakeData'\n    init:\n      kwargs:\n        size: 8",
        "key: 'torchvision.datasets.ImageFolder'\n    init:\n      kwargs:\n        root: './no/folder'",
        "!import_call torchvision.datasets.ImageFolder: No such file or directory: './no/folder'",
        "  fake: !import_call",
    ),
]


@pytest.mark.parametrize("case", STRUCTURE + REFERENCES + CONSTRUCTION, ids=lambda case: case[3][:60])
def test_one_mistake_one_line(case: tuple[str, ...], tmp_path: Path) -> None:
    name, old, new, message = case[:4]
    text = (CONFIGS / f"{name}.yaml").read_text()
    end = text.index(old) + len(new.rstrip("\n"))
    text = text.replace(old, new, 1)
    line = text[: text.index(case[4]) if len(case) > 4 else end].count("\n") + 1
    (problem,) = problems(text, tmp_path)
    assert re.sub(r"^(x\.yaml:\d+):\d+:", r"\1:", problem).startswith(f"x.yaml:{line}: {message}")


@pytest.mark.parametrize("case", STRUCTURE, ids=lambda case: case[3][:60])
def test_structure_is_checked_before_anything_is_imported(case: tuple[str, ...], tmp_path: Path) -> None:
    text = (CONFIGS / f"{case[0]}.yaml").read_text().replace(case[1], case[2], 1)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigErrors):
        resolve(path)


def test_all_problems_of_a_kind_come_at_once(tmp_path: Path) -> None:
    text = (CONFIGS / "distill.yaml").read_text()
    text = text.replace("num_epochs: 2", "num_epochs: two").replace("lr: 0.1", "lr: -1")
    text = text.replace("key: 'SGD'", "name: 'SGD'").replace("requires_grad: True", "requires_grads: True")
    assert problems(text, tmp_path) == [
        "x.yaml:51:3: train.num_epochs: expected a whole number of at least 0, got 'two'",
        "x.yaml:81:5: train.student: unknown key 'requires_grads' (did you mean 'requires_grad'?)",
        "x.yaml:84:5: train.optimizer: unknown key 'name' (choose from filters_params, grad_accum_step, key, "
        "kwargs, max_grad_norm, module_wise_configs)",
        "x.yaml:86:7: train.optimizer.kwargs.lr: expected a number of at least 0, got -1",
        "x.yaml:83:3: train.optimizer: missing key 'key'",
    ]


def test_an_anchor_used_twice_is_blamed_once(tmp_path: Path) -> None:
    text = (CONFIGS / "distill.yaml").read_text().replace("      batch_size: 4", "      batch_size: 0")
    expected = "train.train_data_loader.kwargs.batch_size: expected a whole number of at least 1, got 0"
    assert problems(text, tmp_path) == [f"x.yaml:59:7: {expected}"]


def test_private_keys_are_never_errors(tmp_path: Path) -> None:
    text = "_top: [1]\n" + (CONFIGS / "distill.yaml").read_text()
    for section in (
        "datasets:",
        "models:",
        "train:",
        "  teacher:",
        "  optimizer:",
        "    kwargs:",
        "      sub_terms:",
    ):
        indent = " " * (len(section) - len(section.lstrip()) + 2)
        text = text.replace(f"\n{section}\n", f"\n{section}\n{indent}_private: 1e-4\n")
    path = tmp_path / "x.yaml"
    path.write_text(text)
    data = load_experiment(path).data
    assert data["train"]["_private"] == data["train"]["optimizer"]["_private"] == "1e-4"
    assert "_private" not in data["train"]["optimizer"]["kwargs"]  # it would be passed to SGD


def test_a_student_that_resumes_from_its_own_checkpoint_starts_from_scratch(tmp_path: Path) -> None:
    experiment = load_experiment(CONFIGS / "distill.yaml")
    student = experiment.data["models"]["student_model"]
    assert student["src_ckpt"] == student["dst_ckpt"]
    assert not Path(student["src_ckpt"]).exists()


def test_a_url_is_a_checkpoint() -> None:
    load_experiment(CONFIGS / "distill.yaml", ["models.teacher_model.src_ckpt=https://example.org/x.pt"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "x.yaml: no such file"),
        (b"", "x.yaml: the file is empty"),
        (b"# only a comment\n", "x.yaml: the file is empty"),
        (
            b"- a\n- b\n",
            "x.yaml:1:1: expected a mapping with the sections datasets, models, train and test, got a list",
        ),
        (
            b"hello",
            "x.yaml:1:1: expected a mapping with the sections datasets, models, train and test, got 'hello'",
        ),
        (b"title: t\nrows: []\n", "x.yaml: this is a table, not an experiment: run.py table prints it"),
        (b"a: \xff\n", "x.yaml: not a UTF-8 text file (byte 3)"),
        (b"a: 1\nb: \x07\n", "x.yaml:2:4: unprintable character #x0007"),
        (b"a: 1\n---\nb: 1\n", "x.yaml:2:1: but found another document"),
        (b"a: " + b"[" * 3000, "x.yaml: nested too deeply"),
    ],
)
def test_files_that_are_no_experiment(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigErrors) as caught:
        load_experiment(path)
    assert str(caught.value).replace(str(path), "x.yaml") == message


def test_a_folder_and_a_misspelt_file_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match="is a folder, not an experiment file"):
        load_experiment(tmp_path)
    with pytest.raises(ConfigErrors, match=r"distil\.yaml: no such file \(did you mean 'distill\.yaml'\?\)"):
        load_experiment(CONFIGS / "distil.yaml")


def test_anchors_that_multiply_are_refused(tmp_path: Path) -> None:
    levels = ["_a0: &a0 [1, 1]"] + [f"_a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    text = "\n".join([*levels, "datasets: {x: *a39}"])
    (problem,) = problems(text, tmp_path)
    assert problem == "x.yaml: its anchors expand to more than 200000 values"


def test_the_errors_are_user_errors() -> None:
    error = ConfigErrors([ConfigError("first", "a:1"), ConfigError("second", "a:2")])
    assert isinstance(error, ConfigError)
    assert isinstance(error, UserError)
    assert str(error) == "a:1: first\na:2: second"
    assert (error.message, error.where) == ("first", "a:1")


def test_an_argument_that_is_dropped_is_a_warning_unless_it_is_near_one_that_is_read(tmp_path: Path) -> None:
    text = (CONFIGS / "distill.yaml").read_text()
    path = tmp_path / "x.yaml"
    path.write_text(text.replace("      sub_terms:", "      margin: 1.0\n      sub_terms:"))
    line = text[: text.index("      sub_terms:")].count("\n") + 1
    (warning,) = load_experiment(path).warnings
    assert warning == f"{path}:{line}:7: train.criterion.kwargs: 'margin' is not read by WeightedSumLoss"
    path.write_text(text)
    assert load_experiment(path).warnings == []
