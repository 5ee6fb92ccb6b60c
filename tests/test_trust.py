"""Hostile experiments: refused at their line before anything of the file runs; and what has to stay allowed.

Every file begins with a call of ``witness.note``, a package that the test trusts: it counts what has run.
"""

import builtins
import dis
import functools
import importlib
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch
import torchvision
import torchvision.models.feature_extraction
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_plugin.check import examine
from vkd_plugin.cli import main
from vkd_plugin.config import ConfigErrors, Experiment, load_experiment
from vkd_plugin.config.construct import Refused, find, judged
from vkd_plugin.config.trust import EXCEPTIONS, NAMESPACES, PACKAGES, Trust, is_plain

CONFIGS = Path(__file__).parent / "data" / "configs"
SOUND = (CONFIGS / "supervised.yaml").read_text()
DISTILLATION = (CONFIGS / "distill.yaml").read_text()
FIRST = "datasets:\n  before: !import_call {key: 'witness.note'}\n"
MARK = "▸"  # before the character that the message has to name


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package whose ``note`` counts its calls; tests run in a folder of their own that holds it."""
    (tmp_path / "witness.py").write_text("calls = []\n\n\ndef note(*args, **kwargs):\n    calls.append(args)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("witness")
    del sys.modules["witness"]


def with_snippet(snippet: str) -> tuple[str, str]:
    """The text of a file that ends in ``snippet``, and ``LINE:COLUMN`` of its mark."""
    text = SOUND.replace("datasets:\n", FIRST, 1) + snippet + "\n"
    if MARK not in text:
        return text, ""
    before = text[: text.index(MARK)]
    place = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
    return text.replace(MARK, ""), place


def load(text: str, *trusted: str, overrides: tuple[str, ...] = ()) -> Experiment:
    Path("x.yaml").write_text(text)
    return load_experiment("x.yaml", overrides, ["witness", *trusted])


def refusals(text: str, *trusted: str, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load(text, *trusted, overrides=overrides)
    return [str(problem) for problem in caught.value.problems]


NETWORK = "it runs code from the network"
OUTSIDE = "outside the packages that an experiment may use"
PARTS = "outside the parts of"
UNPICKLES = "unpickling runs code"
WALK = "it leads to whatever Python can reach"

# (what is put at the end of the file, what the message says)
HOSTILE: list[tuple[str, str]] = [
    # names of other packages
    ("_x: !import_call {▸key: 'os.system', init: {args: ['touch pwned']}}", f"'os.system' is refused: it is {OUTSIDE}"),
    ("_x: !import_get {▸key: 'os.system'}", OUTSIDE),
    ("_x: !import_get {▸key: 'system', package: 'os'}", "'os.system' is refused"),
    ("_x: !import_get {▸key: 'os.system', package: ''}", "'os.system' is refused"),
    ("_x: !import_get {package: null, ▸key: 'os.system'}", "'os.system' is refused"),
    ("_x: !import_call {▸key: 'subprocess.check_call', init: {args: [['touch', 'pwned']]}}", OUTSIDE),
    ("_x: !import_call {▸key: 'builtins.eval', init: {args: ['1']}}", OUTSIDE),
    ("_x: !import_call {▸key: 'builtins.exec', init: {args: ['1']}}", OUTSIDE),
    ("_x: !import_call {▸key: 'builtins.__import__', init: {args: ['os']}}", "private"),
    ("_x: !import_get {▸key: 'builtins.getattr'}", OUTSIDE),
    ("_x: !import_get {▸key: 'operator.attrgetter'}", OUTSIDE),
    ("_x: !import_get {▸key: 'functools.reduce'}", OUTSIDE),
    ("_x: !import_get {▸key: 'collections.namedtuple'}", OUTSIDE),
    ("_x: !import_get {▸key: 'importlib.import_module'}", OUTSIDE),
    ("_x: !import_get {▸key: 'pickle.loads'}", OUTSIDE),
    ("_x: !import_get {▸key: 'numpy.load'}", OUTSIDE),
    ("_x: !import_get {▸key: 'yaml.unsafe_load'}", OUTSIDE),
    ("_x: !import_get {▸key: 'PIL.Image.open'}", OUTSIDE),
    ("_x: !import_get {▸key: 'ｏs.system'}", OUTSIDE),
    ("_x: !import_get {▸key: 'tоrch.nn.Linear'}", OUTSIDE),
    ("_x: !import_get {▸key: 'torchnn.Linear'}", OUTSIDE),
    ("_x: !import_get {▸key: !join ['o', 's.sys', 'tem']}", "'os.system' is refused"),
    ("_x: !import_get {? ▸!join ['k', 'ey'] : 'os.system'}", "'os.system' is refused"),
    ("_x: !import_get {? !call_method {obj: 'KEY', method_name: 'lower'} : 'x', ▸key: 'os.system'}", "'os.system'"),
    ("_x: !import_get {? ▸!call_method {obj: 'KEY', method_name: 'lower'} : 'os.system'}", "a tag cannot make a key"),
    ("_x: !import_get {▸key: !call_method {obj: 'OS.SYSTEM', method_name: 'lower'}}", "'key' has to be written out"),
    ("_x: !import_get {key: 'system', ▸package: !getattr ['os', 'x']}", "'package' has to be written out"),
    ("_x: !import_call_method {▸package: 'pathlib.Path.touch', init: {args: ['pwned']}}", OUTSIDE),
    ("_x: !import_call_method {▸package: 'pathlib', class_name: 'Path', method_name: 'home'}", "'pathlib.Path.home'"),
    ("_x: !import_call_method {▸package: 'torch.os', class_name: 'PathLike', method_name: 'register'}", PARTS),
    # walks out of allowed packages
    ("_x: !import_call {▸key: 'torch.os.system'}", "'torch.os.system' is refused"),
    ("_x: !import_get {▸key: 'torch.sys'}", "it is a module"),
    ("_x: !import_get {▸key: 'torchvision.datasets.mnist.os'}", "it is a module"),
    ("_x: !import_get {▸key: 'torch.nn.functional.importlib'}", "it is a module"),
    ("_x: !import_get {▸key: 'torchvision.datasets.mnist.os.system'}", "No module named"),
    ("_x: !import_call_method {▸package: 'torchvision.datasets.mnist.os.system'}", "it is a module"),
    ("_x: !import_get {▸key: 'torch.nn.modules.module.functools.reduce'}", "No module named"),
    ("_x: !import_get {▸key: 'timm.models._builder.load_pretrained'}", "loads the file"),
    ("_x: !import_get {▸key: 'torch._C.PyTorchFileWriter'}", "private"),
    ("_x: !import_get {▸key: 'torch.nn.Module.__subclasses__'}", "private"),
    ("_x: !import_get {▸key: 'torch.nn.__builtins__'}", "private"),
    ("_x: !getattr [!import_get {key: 'torch.nn.Linear'}, ▸'__init__']", f"attribute '__init__' is refused: {WALK}"),
    ("_x: !getattr [!getattr [!import_get {key: 'torch.relu'}, ▸'__self__'], 'x']", "'__self__' is refused"),
    ("_x: !getattr [!import_get {key: 'torch.relu'}, ▸!join ['__globals', '__']]", "'__globals__' is refused"),
    ("_x: !getattr [!import_get {key: 'torch.relu'}, ▸!getattr ['a', 'b']]", "has to be written out"),
    ("_x: !call_method {obj: 'x', method_name: ▸'__class__'}", "'__class__' is refused"),
    ("_x: !call_method {obj: '{0.__class__}', method_name: ▸'format', args: [1]}", "'format' is refused"),
    ("_x: !call_method {obj: '{x}', method_name: ▸'format_map', args: [{}]}", "'format_map' is refused"),
    ("_x: !setattr [!import_call {key: 'torch.nn.ReLU'}, ▸'__class__', 1]", "'__class__' is refused"),
    # pickles
    ("_x: !import_call {▸key: 'torch.load', init: {args: ['x.pt']}}", f"{UNPICKLES}; 'src_ckpt' reads weights without"),
    ("_x: !import_get {▸key: 'torch.serialization.load'}", UNPICKLES),
    ("_x: !import_get {▸key: 'torch.jit.load'}", PARTS),
    ("_x: !import_get {▸key: 'torch.package.PackageImporter'}", PARTS),
    ("_x: !import_get {▸key: 'timm.models.load_checkpoint'}", UNPICKLES),
    ("_x: !import_get {▸key: 'timm.models.load_state_dict'}", UNPICKLES),
    ("_x: !import_get {▸key: 'torchvision.datasets.LSUN'}", "unpickles a file"),
    ("_x: !import_get {▸key: 'torchvision.models.resnet.WeightsEnum'}", UNPICKLES),
    ("_x: !import_get {▸key: 'torchvision.models.Weights'}", UNPICKLES),
    ("_x: !import_get {▸key: 'torch.utils.data.IterDataPipe'}", "unpickles"),
    (
        "_x: !call_method\n  obj: !getattr [!import_get {key: 'torchvision.models.ResNet18_Weights'}, 'DEFAULT']\n"
        "  method_name: ▸'get_state_dict'\n  kwargs: {model_dir: '.'}",
        UNPICKLES,
    ),
    (
        "_x: ▸!setattr\n  - !getattr [!getattr [!import_get {key: 'torchvision.models.ResNet18_Weights'}, 'DEFAULT'], "
        "'value']\n  - 'url'\n  - 'file:///x.pt'",
        "only what an !import_call of a class made may be changed",
    ),
    ("_x: {▸weights_only: False}", f"{UNPICKLES}; if you trust it: --trust torch.load"),
    ("_x: !import_call {key: 'timm.create_model', init: {kwargs: {▸checkpoint_path: 'x.pt'}}}", "timm may unpickle"),
    ("_x: !import_call {key: 'timm.create_model', init: {args: ['resnet18', False, ▸{file: 'x'}]}}", "may unpickle"),
    ("_x: !import_call {key: 'timm.create_model', init: {args: ['resnet18', False, null, null, ▸'x.pt']}}", "'checkp"),
    ("_x: {▸pretrained_cfg: {file: 'x.pt'}}", "timm may unpickle"),
    ("_x: {▸pretrained_cfg_overlay: !getattr ['x', 'y']}", "timm may unpickle"),
    # the network
    ("_x: !import_call {▸key: 'torch.hub.load', init: {args: ['evil/repository', 'model']}}", NETWORK),
    ("_x: !import_get {▸key: 'torch.hub'}", NETWORK),
    (
        "_x: {▸repo_or_dir: 'evil/repository'}",
        "torch.hub runs code from the network; if you trust it: --trust torch.hub",
    ),
    ("_x: {▸repo_or_dir: []}", "'repo_or_dir' is refused"),
    ("_x: {▸repo_or_dir: ''}", "'repo_or_dir' is refused"),
    ("_x: {? ▸!join ['repo_', 'or_dir'] : 'evil'}", "'repo_or_dir' is refused"),
    ("_x: {▸trust_repo: True}", NETWORK),
    ("_x: {▸trust_remote_code: True}", NETWORK),
    ("_x: !import_get {▸key: 'torchdistill.models.registry.get_model'}", "torch.hub"),
    ("_x: !import_get {▸key: 'timm.models.push_to_hf_hub'}", "uploads"),
    ("_x: !import_get {▸key: 'timm.data.create_dataset'}", "archives and remote data sets"),
    ("_x: !import_get {▸key: 'timm.data.readers.create_reader'}", "archives and remote data sets"),
    ("_x: !import_get {▸key: 'torchvision.datasets.mnist.download_and_extract_archive'}", "it writes files"),
    ("_x: !import_get {▸key: 'torchvision.datasets.mnist.check_integrity'}", "downloads and unpacks"),
    ("_x: !import_get {▸key: 'torchvision.datasets.utils.download_url'}", "downloads and unpacks"),
    ("_x: !call_method {obj: !import_call {key: 'torchvision.datasets.FakeData'}, method_name: ▸'download'}", "writes"),
    # files, programs, compilers
    ("_x: !import_get {▸key: 'torch.save'}", "it writes files"),
    ("_x: !import_get {▸key: 'torch.PyTorchFileWriter'}", "it is defined in torch.PyTorchFileWriter"),
    ("_x: !import_get {▸key: 'torch.ScriptModule'}", "it is defined in torch.ScriptModule"),
    ("_x: !import_get {▸key: 'torch.CompilationUnit'}", "torch.jit"),
    ("_x: !import_get {▸key: 'torch.FloatStorage'}", "FloatStorage"),
    ("_x: !import_get {▸key: 'torch.from_file'}", "it writes files"),
    ("_x: !import_get {▸key: 'torch.ops'}", "it is a module"),
    ("_x: !import_get {▸key: 'torch.classes.load_library'}", PARTS),
    ("_x: !import_get {▸key: 'torchvision.io.image.write_png'}", "it writes files"),
    ("_x: !import_get {▸key: 'torchvision.utils.save_image'}", PARTS),
    ("_x: !import_get {▸key: 'torch.compile'}", "compiler"),
    ("_x: !import_call_method {▸package: 'torch.nn.Module.compile'}", "compiler"),
    ("_x: !call_method {obj: !import_call {key: 'torch.nn.ReLU'}, method_name: ▸'compile'}", "compiler"),
    ("_x: !import_get {▸key: 'torch.utils.cpp_extension.load_inline'}", PARTS),
    ("_x: !import_get {▸key: 'torch.utils.collect_env.run'}", PARTS),
    ("_x: !import_get {▸key: 'torch.distributed.run.main'}", PARTS),
    ("_x: !import_get {▸key: 'torch.fx.GraphModule'}", PARTS),
    ("_x: !import_get {▸key: 'torchvision.models.feature_extraction.create_feature_extractor'}", "runs that"),
    ("_x: !import_get {▸key: 'timm.layers.create_feature_extractor'}", "runs that"),
    ("_x: !import_get {▸key: 'torchvision.ops.roi_align.lazy_compile'}", "compiler"),
    # as arguments of what is allowed
    (
        "_x: !import_call {key: 'torchvision.transforms.Lambda', init: {args: [!import_get {▸key: 'os.system'}]}}",
        "'os.system'",
    ),
    (
        "_x: !import_call {key: 'functools.partial', init: {args: [!import_get {▸key: 'torch.load'}, 'x', {}]}}",
        UNPICKLES,
    ),
    ("_x: {worker_init_fn: !import_get {▸key: 'os.remove'}}", "'os.remove'"),
    ("_x: {lr_lambda: !import_get {▸key: 'builtins.eval'}}", "'builtins.eval'"),
    ("_x:\n  class_or_func: !import_get\n    ▸key: 'subprocess.run'\n", "'subprocess.run'"),
    ("_x: !getattr\n  - !import_call\n    ▸key: 'os.getcwd'\n  - 'x'", "'os.getcwd'"),
    ("_x: {? !import_call {▸key: 'os.getcwd'} : 1}", "'os.getcwd'"),
    ("_x: [[[{a: [!import_call {▸key: 'os.getcwd'}]}]]]", "'os.getcwd'"),
    ("_x: !!set {? !import_call {▸key: 'os.getcwd'}}", "'os.getcwd'"),
    ("_x: !!omap [a: !import_call {▸key: 'os.getcwd'}]", "'os.getcwd'"),
    ("_x: !!python/tuple [!import_call {▸key: 'os.getcwd'}]", "'os.getcwd'"),
    ("_a: &a {▸key: 'os.getcwd'}\n_x: !import_call {<<: *a}", "'os.getcwd'"),
    ("_a: &a {▸key: 'os.getcwd'}\n_x: !import_call\n  <<: [{init: null}, *a]", "'os.getcwd'"),
    ("_x: !<!import_call> {▸key: 'os.getcwd'}", "'os.getcwd'"),
    # PyYAML's own tags
    ("_x: ▸!!python/name:os.system", "refused, it runs code"),
    ("_x: ▸!!python/object/apply:os.system ['touch pwned']", "refused, it runs code"),
    ("_x: ▸!!python/object/new:os.system ['touch pwned']", "refused, it runs code"),
    ("_x: ▸!!python/object:os.system {}", "refused, it runs code"),
    ("_x: ▸!!python/module:os", "refused, it runs code"),
    ("_x: ▸!<tag:yaml.org,2002:python/object/apply:os.system> ['touch pwned']", "refused, it runs code"),
    ("_x: ▸!<tag:yaml.org,2002:python/name:os.system> ''", "refused, it runs code"),
    ("_x: {? ▸!!python/name:os.system '' : 1}", "refused, it runs code"),
    ("_x: ▸!import_Call {key: 'os.system'}", "unknown tag '!import_Call'"),
    ("_x: ▸!tag:import_call {key: 'os.system'}", "unknown tag"),
]


@pytest.mark.parametrize(("snippet", "phrase"), HOSTILE, ids=[snippet.replace(MARK, "") for snippet, _ in HOSTILE])
def test_a_hostile_file_is_refused_at_its_place_and_nothing_runs(
    witness: ModuleType, snippet: str, phrase: str
) -> None:
    text, place = with_snippet(snippet)
    found = refusals(text)
    assert any(line.startswith(f"x.yaml:{place}: ") and phrase in line for line in found), found
    assert witness.calls == []
    assert not Path("pwned").exists()


# Found only when the tag runs, as it takes a call to know what it reads: tags before it have run, itself it does not.
LATE: list[tuple[str, str]] = [
    (
        "_i: &image !access_by_index_or_key\n  data: !access_by_index_or_key\n"
        "    {data: !import_call {key: 'torchvision.datasets.FakeData'}, index_or_key: 0}\n  index_or_key: 0\n"
        "_x: ▸!call_method {obj: *image, method_name: 'save', args: ['pwned']}",
        "it is defined in PIL.Image.Image",
    ),
    (
        "_x: ▸!call_method\n  obj: !call_method {obj: !import_call {key: 'torch.ones', init: {args: [3]}}, "
        "method_name: 'numpy'}\n  method_name: 'tofile'\n  args: ['pwned']",
        "numpy.ndarray",
    ),
    (
        "_x: ▸!import_call\n  key: 'timm.create_model'\n  init:\n    kwargs: !call_method\n"
        "      {obj: {model_name: 'resnet18'}, method_name: 'update', args: [[['checkpoint_path', 'x.pt']]], "
        "returns_obj: True}",
        "'checkpoint_path' is refused here",
    ),
    (
        "_x: ▸!setattr [!getattr [!import_call {key: 'torchvision.models.get_weight', "
        "init: {args: ['ResNet18_Weights.DEFAULT']}}, 'value'], 'url', 'file:///x.pt']",
        "torchvision.models._api.Weights",
    ),
    ("_x: ▸!setattr [!getattr [!import_call {key: 'torch.nn.ReLU'}, 'training'], 'x', 1]", "may be changed"),
    (
        "_x: ▸!call_method {obj: {a: 1}, method_name: 'update', args: [[['repo_or_dir', 'x']]], returns_obj: True}",
        "hub",
    ),
    (
        "_x: ▸!call_method {obj: !call_method {obj: {}, method_name: 'values'}, method_name: 'isdisjoint'}",
        "dict_values",
    ),
    ("_x: ▸!call_method {obj: !import_get {key: 'torch.Tensor'}, method_name: 'mro'}", "torch._C.TensorBase"),
    ("_x: ▸!call_method {obj: !getattr ['x', 'upper'], method_name: 'mro'}", "builtin"),
]


@pytest.mark.parametrize(("snippet", "phrase"), LATE, ids=[phrase for _, phrase in LATE])
def test_what_only_a_call_reveals_is_refused_at_its_place(witness: ModuleType, snippet: str, phrase: str) -> None:
    text, place = with_snippet(snippet)
    (found,) = refusals(text)
    assert found.startswith(f"x.yaml:{place}: ")
    assert phrase in found
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("before", "after", "place", "phrase"),
    [
        ("dependencies: ['torchdistill.losses']", "dependencies: 'evil'", "2:1", "'evil' is refused: importing"),
        ("['torchdistill.losses']", "['torchdistill.losses', 'evil.inner']", "2:39", "'evil.inner' is refused"),
        ("['torchdistill.losses']", "[{name: 'evil'}]", "2:16", "'evil' is refused"),
        ("['torchdistill.losses']", "[{name: '.evil', package: 'tests'}]", "2:16", "'tests.evil' is refused"),
        ("['torchdistill.losses']", "[['.evil', 'tests']]", "2:16", "'tests.evil' is refused"),
        ("['torchdistill.losses']", "[['evil']]", "2:16", "'evil' is refused"),
        ("['torchdistill.losses']", "[['..subprocess', 'torch.nn']]", "2:16", "No module named 'torch.subprocess'"),
        ("['torchdistill.losses']", "['.evil']", "2:16", "'.evil' is refused"),
        ("['torchdistill.losses']", "['torch.utils.bottleneck.__main__']", "2:16", "it is private"),
        ("['torchdistill.losses']", "['torch._C']", "2:16", "it is private"),
        ("['torchdistill.losses']", "['torchdistil.losses']", "2:16", "(did you mean 'torchdistill'?)"),
        ("['torchdistill.losses']", "[!join ['ev', 'il']]", "2:16", "'evil' is refused"),
        ("['torchdistill.losses']", "!import_get {key: 'witness.calls'}", "2:1", "has to be written out"),
        ("['torchdistill.losses']", "[!getattr ['evil', 'x']]", "2:1", "has to be written out"),
        ("['torchdistill.losses']", "[{name: !getattr ['evil', 'x']}]", "2:1", "has to be written out"),
        ("dependencies: ['torchdistill.losses']", "? !join ['depen', 'dencies']\n: ['evil']", "3:4", "'evil'"),
    ],
)
def test_a_dependency_is_an_allowed_package(
    witness: ModuleType, before: str, after: str, place: str, phrase: str
) -> None:
    Path("evil.py").write_text("import witness\n\nwitness.note()\n")
    found = refusals(SOUND.replace("datasets:\n", FIRST, 1).replace(before, after, 1))
    assert any(line.startswith(f"x.yaml:{place}: ") and phrase in line for line in found), found
    assert witness.calls == []
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "override",
    [
        "_x=!import_call {key: 'os.system'}",
        "datasets.all=!import_call {key: 'os.system'}",
        "datasets.all.init.kwargs.dataset.key=os.system",
        "models.model.repo_or_dir=evil/repository",
        "dependencies=[os]",
        "train.num_epochs=!!python/object/apply:os.system ['touch pwned']",
        "models.model.kwargs={weights_only: False}",
    ],
)
def test_an_override_is_judged_like_the_file(witness: ModuleType, override: str) -> None:
    (found,) = refusals(SOUND.replace("datasets:\n", FIRST, 1), overrides=(override,))
    assert "refused" in found
    assert witness.calls == []


# --- what may not change ------------------------------------------------------------------------------------


def test_data_of_a_class_or_module_is_copied(witness: ModuleType) -> None:
    """Else a file could bring an MD5 sum or a URL of its own, and a data set would then unpickle what it names."""
    cifar = "!getattr [!import_get {key: 'torchvision.datasets.CIFAR10'}, 'train_list']"
    urls = "!import_get {key: 'torchdistill.models.classification.resnet.MODEL_URL_DICT'}"
    before = list(torchvision.datasets.CIFAR10.train_list)
    text, _ = with_snippet(
        f"_x: !call_method {{obj: {cifar}, method_name: 'clear', returns_obj: True}}\n"
        f"_y: !call_method {{obj: {urls}, method_name: 'clear', returns_obj: True}}\n"
    )
    data = load(text).data
    assert data["_x"] == []
    assert data["_y"] == {}
    assert torchvision.datasets.CIFAR10.train_list == before
    assert importlib.import_module("torchdistill.models.classification.resnet").MODEL_URL_DICT


def test_a_class_or_a_shared_object_may_not_be_changed(witness: ModuleType) -> None:
    text, place = with_snippet("_x: ▸!setattr [!import_get {key: 'torchvision.datasets.CIFAR10'}, 'tgz_md5', 'x']")
    (found,) = refusals(text)
    assert found.startswith(f"x.yaml:{place}: _x: !setattr: refused: only what an !import_call")
    text, _ = with_snippet("_x: !setattr [!import_call {key: 'torch.nn.ReLU'}, 'inplace', True]")
    assert load(text).data["_x"].inplace is True


def test_a_model_does_not_become_one_of_the_hub_behind_the_check(witness: ModuleType) -> None:
    """The key is made by a method, in a mapping that another tag holds."""
    text = SOUND.replace(
        "  model:\n    key: 'resnet20'\n", "  model: &model !call_method\n    obj:\n      key: 'resnet20'\n"
    )
    text = text.replace("    kwargs:\n      num_classes: 10\n    src_ckpt:\n", "      kwargs: {num_classes: 10}\n", 1)
    text = text.replace("    dst_ckpt: !expanduser '~/absent/resnet20.pt'\n", "    method_name: 'copy'\n", 1)
    load(text)
    changed = text + "_x: !call_method {obj: *model, method_name: 'update', args: [[['repo_or_dir', 'evil']]]}\n"
    line = changed.split("model: &model")[0].count("\n") + 1
    (found,) = refusals(changed)
    assert found.startswith(f"x.yaml:{line}:")
    assert "'repo_or_dir' is refused here" in found
    held = "!import_call {key: 'torch.nn.ParameterDict', init: {args: [!call_method {obj: {}, method_name: 'copy'}]}}"
    held = (
        f"_x: !call_method {{obj: {held}, method_name: 'update', args: [[['weights_only', 0]]], returns_obj: True}}\n"
    )
    (found,) = refusals(text + held)
    assert "'weights_only' is refused here" in found


@pytest.mark.parametrize(("levels", "said"), [(14, "has no attribute 'y'"), (60, "its anchors expand to more than")])
def test_tags_that_hold_each_other_take_no_time(levels: int, said: str, witness: ModuleType) -> None:
    names = [f"_{number}" for number in range(levels)]
    lines = [f"{names[0]}: &{names[0]} !getattr ['x', 'y']"]
    lines += [
        f"{name}: &{name} !access_by_index_or_key {{data: [*{last}, *{last}], index_or_key: 0}}"
        for last, name in pairwise(names)
    ]
    (found,) = refusals(SOUND + "\n".join(lines) + "\n")
    assert said in found


# --- --trust ------------------------------------------------------------------------------------------------


def test_what_the_user_trusts_is_said_in_the_message_and_opens_that_alone(witness: ModuleType) -> None:
    text, _ = with_snippet("_x: !import_call {key: 'torch.random.manual_seed', init: {args: [3]}}")
    (found,) = refusals(text)
    assert found.endswith("if you trust it: --trust torch.random")
    load(text, "torch.random")
    for other in ("torch.rand", "torch.randomness", "torch.hub", "random"):
        assert refusals(text, other) == [found]
    load(with_snippet("_x: {weights_only: False}")[0], "torch.load")
    load(with_snippet("_x: {repo_or_dir: 'a/b'}")[0], "torch.hub")
    assert refusals(with_snippet("_x: {repo_or_dir: 'a/b'}")[0], "torch.load")


def test_a_local_package_registers_what_the_file_names(witness: ModuleType) -> None:
    Path("house.py").write_text(
        "from torch import nn\nfrom torchdistill.models.registry import register_model\n\n\n"
        "@register_model\ndef house_model(num_classes):\n    return nn.Linear(3, num_classes)\n"
    )
    text = SOUND.replace("['torchdistill.losses']", "['house']").replace("'resnet20'", "'house_model'")
    assert refusals(text) == [
        "x.yaml:2:16: dependencies: 'house' is refused: importing a package runs its code; "
        "if you trust it: --trust house"
    ]
    assert load(text, "house").data["models"]["model"]["key"] == "house_model"


@pytest.mark.parametrize("value", ["", "no package", "torch.", ".torch", "os;", "-x", "torch..hub"])
def test_a_wrong_value_of_trust_is_one_line(
    capsys: pytest.CaptureFixture[str], witness: ModuleType, value: str
) -> None:
    Path("x.yaml").write_text(SOUND)
    assert main(["check", "x.yaml", f"--trust={value}"]) == 2
    assert capsys.readouterr().err == (
        f"error: --trust '{value}': expected the name of a package, for example torch.hub\n"
    )


def test_every_command_judges(
    capsys: pytest.CaptureFixture[str], witness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, place = with_snippet("_x: !import_call {▸key: 'os.system', init: {args: ['touch pwned']}}")
    Path("x.yaml").write_text(text)
    row = "{name: 'a', config: 'x.yaml'}"
    Path("t.yaml").write_text(f"title: 'T'\nmetric: 'best.val/top1'\nrows: [{row}]\n")
    for command in (
        ["check", "x.yaml", "--trust", "witness"],
        ["check", "x.yaml", "--data", "--trust", "witness"],
        ["--config", "x.yaml", "--device", "cpu", "--trust", "witness"],
        ["--config", "x.yaml", "--device", "cpu", "--trust", "witness", "-test_only"],
        ["table", "t.yaml", "--run", "--trust", "witness"],
    ):
        assert main(command) == 2
        assert f"error: x.yaml:{place}: _x: 'os.system' is refused" in capsys.readouterr().err
    assert witness.calls == []
    assert not Path("runs").exists()
    assert not Path("pwned").exists()


# --- pickles in files that an experiment names --------------------------------------------------------------


class Bomb:
    """Makes the file ``pwned`` when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


@pytest.fixture
def pickled(witness: ModuleType) -> str:
    torch.save({"model": Bomb()}, "bomb.pt")
    return "bomb.pt"


def test_src_ckpt_is_not_unpickled(pickled: str) -> None:
    text = SOUND.replace("    src_ckpt:\n", f"    src_ckpt: '{pickled}'\n", 1)
    Path("x.yaml").write_text(text)
    assert [problem for problem in examine("x.yaml").problems if "not a readable checkpoint" in str(problem)]
    assert not Path("pwned").exists()


def test_src_ckpt_of_a_stage_is_not_unpickled(pickled: str) -> None:
    forward = "    forward_proc: 'forward_batch_only'\n"
    assert forward in DISTILLATION
    Path("x.yaml").write_text(DISTILLATION.replace(forward, f"{forward}    src_ckpt: '{pickled}'\n", 1))
    assert examine("x.yaml").problems
    assert not Path("pwned").exists()


def test_timm_does_not_unpickle_a_local_folder(pickled: str) -> None:
    os.mkdir("folder")
    os.rename(pickled, "folder/pytorch_model.bin")
    Path("folder/config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": {}}))
    text = SOUND.replace("'resnet20'", "'timm_model'")
    text = text.replace(
        "      num_classes: 10\n    src", "      name: 'local-dir:folder'\n      pretrained: True\n    src", 1
    )
    Path("x.yaml").write_text(text)
    assert examine("x.yaml").problems
    assert not Path("pwned").exists()


# --- everything that is allowed -----------------------------------------------------------------------------

# Python functions within an experiment's reach that load, unpack or import something, each looked at.
REVIEWED = {
    "timm.data.real_labels.RealLabelsImagenet.__init__": "JSON",
    "torch.nn.functional.interpolate": "a fixed module",
    "torch.nn.functional.max_pool3d_with_indices": "a fixed module",
    "torch.nn.functional.pad": "a fixed module",
    "torchdistill.models.classification.densenet.densenet": "pickles of fixed addresses",
    "torchdistill.models.classification.resnet.resnet": "pickles of fixed addresses",
    "torchdistill.models.classification.wide_resnet.wide_resnet": "pickles of fixed addresses",
    "torchdistill.models.util.load_module_ckpt": "weights_only, by torch's default",
    "torchvision.datasets.cifar.CIFAR10.__init__": "a pickle with a fixed MD5 sum",
    "torchvision.datasets.cityscapes.Cityscapes.__init__": "unpacks fixed names in the folder of the data",
    "torchvision.datasets.food101.Food101.__init__": "JSON",
    "torchvision.datasets.imagenet.load_meta_file": "weights_only",
    "torchvision.datasets.imagenet.parse_devkit_archive": "an archive with a fixed MD5 sum",
    "torchvision.datasets.imagenet.parse_train_archive": "an archive with a fixed MD5 sum",
    "torchvision.datasets.imagenet.parse_val_archive": "an archive with a fixed MD5 sum",
    "torchvision.datasets.moving_mnist.MovingMNIST.__init__": "numpy, without pickles",
    "torchvision.datasets.phototour.PhotoTour.__init__": "weights_only",
    "torchvision.datasets.sbd.SBDataset.__init__": "fixed addresses and MD5 sums",
    "torchvision.datasets.usps.USPS.__init__": "a fixed address and MD5 sum",
    "torchvision.datasets.voc._VOCBase.__init__": "fixed addresses and MD5 sums",
    "torchvision.models._api.get_weight": "a fixed module",
    "vkd_plugin.models.weights.read_checkpoint": "weights_only",
    "vkd_plugin.datasets.coco_annotations.read_annotations": "JSON",
}
_GLOBALS = {
    *("__import__", "compile", "ctypes", "eval", "exec", "importlib", "marshal", "pickle", "runpy", "shutil"),
    *("subprocess", "urllib", "load_state_dict_from_url", "download_and_extract_archive", "download_url"),
    "extract_archive",
}
_ATTRIBUTES = {
    *("CompilationUnit", "Popen", "check_call", "check_output", "extractall", "import_module", "loads", "rmtree"),
    *("load_state_dict_from_url", "symbolic_trace", "system", "tofile", "unlink", "urlopen"),
}
_PAIRS = {
    *(("torch", "load"), ("torch", "save"), ("torch", "compile"), ("torch", "fx"), ("hub", "load")),
    *(("os", "remove"), ("os", "rename"), ("np", "load"), ("np", "save")),
}


@functools.cache
def suspicious(code: CodeType) -> bool:
    """Whether a function's own code names what runs code, loads it or writes files."""
    last = None
    for step in dis.get_instructions(code):
        name = step.argval
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            last = name
            if name in _GLOBALS:
                return True
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_NAME"):
            if name in _ATTRIBUTES or (last, name) in _PAIRS:
                return True
            last = name
    return any(isinstance(part, CodeType) and suspicious(part) for part in code.co_consts)


def reachable() -> Iterator[tuple[str, Any]]:
    """What an experiment can name in the modules that are imported, by name; each value once."""
    trust, seen = Trust(), set()
    for module, contents in list(sys.modules.items()):
        if module.partition(".")[0] in (*PACKAGES, "math", "functools", "collections"):
            for key, value in list(vars(contents).items()) if isinstance(contents, ModuleType) else ():
                name = f"{module}.{key}"
                if id(value) not in seen and not trust.of_name(name) and not trust.of_value(value, name):
                    seen.add(id(value))
                    yield name, value


def test_no_function_within_reach_runs_or_loads_code_but_those_reviewed() -> None:
    trust, found, done = Trust(), set(), set()
    for name, value in reachable():
        parts = {name: value}
        if inspect.isclass(value):
            names = [key for key in dir(value) if key == "__init__" or not trust.of_attribute(key)]
            parts = {key: getattr(value, key, None) for key in names}
        for part in parts.values():
            function = inspect.unwrap(part) if callable(part) else part
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function) and id(function) not in done:
                done.add(id(function))
                if suspicious(function.__code__):
                    found.add(f"{function.__module__}.{function.__qualname__}")
    assert len(done) > 5000  # it has looked
    assert found <= set(REVIEWED)


_RUNNERS = (os, subprocess, pickle, importlib, torch.hub, torch.serialization, torch.jit, torch.fx)
_HOMES = ("os", "posix", "nt", "subprocess", "pickle", "_pickle", "importlib", "_frozen_importlib", "torch.")
DANGEROUS = {
    id(value)
    for module in _RUNNERS
    for value in vars(module).values()
    if callable(value) and str(getattr(value, "__module__", "")).startswith(_HOMES)
} | {id(getattr(builtins, name)) for name in ("eval", "exec", "compile", "open", "getattr", "__import__")}
IMPORTED = sorted(name for name, module in sys.modules.items() if isinstance(module, ModuleType) and vars(module))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_dotted_name_leads_to_anything_dangerous(data: st.DataObject) -> None:
    """Whatever is found in Python's modules, and one attribute further."""
    module = data.draw(st.sampled_from(IMPORTED))
    name = f"{module}.{data.draw(st.sampled_from(sorted(vars(sys.modules[module]))))}"
    trust = Trust()
    if trust.of_name(name):
        assert not name.startswith(("torch.nn.Linear", "torchvision.transforms.Compose"))
        return
    value = find(name, False, trust)
    if trust.of_value(value, name) or is_plain(value):
        return
    assert name.startswith((*PACKAGES, *NAMESPACES))
    assert not name.startswith(tuple(EXCEPTIONS))
    assert not isinstance(value, ModuleType)
    assert id(value) not in DANGEROUS
    attribute = data.draw(st.sampled_from(sorted(dir(value))))
    if not trust.of_attribute(attribute):
        try:
            read = judged(trust, getattr(value, attribute), attribute)
        except (Refused, AttributeError, NotImplementedError):
            return
        assert not isinstance(read, ModuleType)
        assert id(read) not in DANGEROUS


ALLOWED = [
    "!import_call {key: 'torchvision.transforms.v2.ToDtype', init: {args: [!import_get {key: 'torch.float32'}]}}",
    "!getattr [!import_get {key: 'torchvision.transforms.InterpolationMode'}, 'BICUBIC']",
    "!getattr [!import_get {key: 'torchvision.transforms.AutoAugmentPolicy'}, 'CIFAR10']",
    "!getattr [!import_get {key: 'torchvision.models.ResNet18_Weights'}, 'IMAGENET1K_V1']",
    "!call_method {obj: !getattr [!import_get {key: 'torchvision.models.ResNet18_Weights'}, 'DEFAULT'], "
    "method_name: 'transforms'}",
    "!import_call {key: 'torchvision.models.get_weight', init: {args: ['ResNet18_Weights.DEFAULT']}}",
    "!import_call {key: 'timm.data.create_transform', init: {kwargs: {input_size: 32, is_training: True, "
    "mean: !import_get {key: 'timm.data.IMAGENET_DEFAULT_MEAN'}}}}",
    "!import_call {key: 'timm.data.Mixup'}",
    "!import_call {key: 'timm.data.rand_augment_transform', init: {args: ['rand-m9-mstd0.5', {}]}}",
    "!import_call {key: 'torch.utils.data.ConcatDataset', init: {args: [[*all, *all]]}}",
    "!import_call {key: 'torch.utils.data.Subset', init: {args: [*first, [1, 2]]}}",
    "!access_by_index_or_key {data: !import_call {key: 'torch.utils.data.random_split', "
    "init: {args: [*first, [0.5, 0.5]]}}, index_or_key: 0}",
    "!import_call {key: 'functools.partial', init: {args: [!import_get {key: 'torch.nn.LayerNorm'}], "
    "kwargs: {eps: 1.0e-6}}}",
    "!import_call {key: 'torchvision.transforms.Lambda', init: {args: [!import_get {key: 'torch.squeeze'}]}}",
    "!import_call_method {package: 'torch.nn.Embedding.from_pretrained', "
    "init: {args: [!import_call {key: 'torch.ones', init: {args: [2, 2]}}]}}",
    "!call_method {obj: !import_call {key: 'torch.ones', init: {args: [2]}}, method_name: 'mul', args: [2]}",
    "!call_method {obj: !import_call {key: 'torch.Generator'}, method_name: 'manual_seed', args: [3]}",
    "!call_method {obj: '-', method_name: 'join', args: [['a', 'b']]}",
    "!import_get {key: 'torch.channels_last'}",
    "!import_get {key: 'torch.nn.functional.gelu'}",
    "!import_get {key: 'torch.linalg.norm'}",
    "!import_get {key: 'torch.einsum'}",
    "!import_get {key: 'torch.nn.init.trunc_normal_'}",
    "!import_get {key: 'torchvision.io.ImageReadMode'}",
    "!import_get {key: 'torch.utils.data.WeightedRandomSampler'}",
    "!import_get {key: 'math.pi'}",
    "!import_get {key: 'vkd_plugin.orthogonalize'}",
    "{checkpoint_path: null, weights_only: True, trust_remote_code: False, repo_or_dir: }",
]


def test_what_experiments_use_is_allowed(witness: ModuleType) -> None:
    lines = [f"_{number}: {tag}" for number, tag in enumerate(ALLOWED)]
    text = SOUND.replace("  &second second", "  _all: *all\n  &second second", 1).replace("datasets:\n", FIRST, 1)
    load(text + "\n".join(lines) + "\n")
    assert witness.calls == [()]
