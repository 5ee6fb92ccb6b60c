"""The home folder and environment variables in an experiment's paths."""

import os
from pathlib import Path

import pytest

from vkd_plugin.config import ConfigErrors, load_experiment
from vkd_plugin.config.nodes import expanded, unset_variable

DISTILL = Path(__file__).parent / "data" / "configs" / "distill.yaml"
CKPT = "models.teacher_model.src_ckpt"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("ABSENT", raising=False)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/x", "/home/somebody/x"),
        ("${DATA}/x", "/data/x"),
        ("x/${DATA}", "x//data"),
        ("$DATA/x", "/data/x"),
        ("$DATA", "/data"),
        ("${ABSENT:-~/y}/x", "/home/somebody/y/x"),
        ("${ABSENT:-}", ""),
        ("${EMPTY:-z}", "z"),
        ("${EMPTY}", ""),
        # Everything else is as it is written.
        ("a~/x", "a~/x"),
        ("~", "~"),
        ("^layer.*$", "^layer.*$"),
        ("x$DATA", "x$DATA"),
        ("$data/x", "$data/x"),
        ("$DATAx", "$DATAx"),
        ("$", "$"),
        ("${}", "${}"),
    ],
)
def test_what_is_expanded(written: str, meant: str) -> None:
    assert expanded(written) == meant
    assert unset_variable(written) is None


@pytest.mark.parametrize("written", ["${ABSENT}/x", "$ABSENT/x", "${DATA}/${ABSENT}"])
def test_an_unset_variable_has_its_line(written: str, tmp_path: Path) -> None:
    assert unset_variable(written) == "ABSENT"
    file = tmp_path / "x.yaml"
    text = DISTILL.read_text().replace("    src_ckpt:\n", f"    src_ckpt: '{written}'\n", 1)
    file.write_text(text)
    line = text[: text.index("    src_ckpt:")].count("\n") + 1
    with pytest.raises(ConfigErrors) as caught:
        load_experiment(file)
    expected = f"{file}:{line}:15: environment variable 'ABSENT' is not set (a default: ${{ABSENT:-...}})"
    assert str(caught.value) == expected


def test_a_checkpoint_is_looked_for_where_the_path_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(tmp_path))
    with pytest.raises(ConfigErrors, match=f"no checkpoint at '{tmp_path}/teacher.pt'"):
        load_experiment(DISTILL, [f"{CKPT}=${{DATA}}/teacher.pt"])
    (tmp_path / "teacher.pt").touch()
    data = load_experiment(DISTILL, [f"{CKPT}=${{DATA}}/teacher.pt"]).data
    assert data["models"]["teacher_model"]["src_ckpt"] == f"{tmp_path}/teacher.pt"


def test_what_is_saved_and_compared_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teacher.pt").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "teacher.pt").touch()
    monkeypatch.setenv("DATA", str(tmp_path))
    first = load_experiment(DISTILL, [f"{CKPT}=${{DATA}}/teacher.pt"])
    assert "${DATA}/teacher.pt" in first.dump()
    assert os.environ["DATA"] not in first.dump()
    monkeypatch.setenv("DATA", str(tmp_path / "other"))
    assert load_experiment(DISTILL, [f"{CKPT}=${{DATA}}/teacher.pt"]).digest() == first.digest()


def test_a_variable_is_not_sent_to_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigErrors, match="an environment variable cannot stand in a URL"):
        load_experiment(DISTILL, [f"{CKPT}=https://example.org/${{DATA}}"])
