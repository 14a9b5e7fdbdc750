"""The demo's three texts: which files they are, and that none leaks into another."""

import sysconfig
from pathlib import Path

import pytest

from qtipcli.demo import text
from qtipcli.errors import QtipError

LIBRARY = Path(sysconfig.get_path("stdlib"))


def test_calibration_and_evaluation_lists_are_disjoint_and_without_repeats():
    both = text.CALIBRATION_MODULES + text.EVALUATION_MODULES
    assert len(set(both)) == len(both)


@pytest.mark.parametrize("module", text.CALIBRATION_MODULES + text.EVALUATION_MODULES)
def test_every_listed_module_is_one_file_of_this_python(module):
    assert (LIBRARY / f"{module}.py").is_file()


def test_no_evaluation_module_is_a_training_document():
    training = set(text.training_documents())
    for module in text.EVALUATION_MODULES:
        assert (LIBRARY / f"{module}.py").read_text(encoding="utf-8") not in training


def test_few_evaluation_lines_occur_in_the_training_text():
    # Idioms are shared (an import, a separator), code is not: 1.4 % of the long lines on Python 3.11. A module that another
    # training file copies would add its whole length.
    training = {line.strip() for document in text.training_documents() for line in document.splitlines()}
    lines = [line.strip() for line in text.evaluation_text().splitlines() if len(line.strip()) > 30]
    shared = sum(line in training for line in lines)
    assert shared / len(lines) < 0.03


def test_calibration_modules_are_training_documents():
    training = set(text.training_documents())
    for module in text.CALIBRATION_MODULES:
        assert (LIBRARY / f"{module}.py").read_text(encoding="utf-8") in training


def test_sizes_are_what_the_demo_needs():
    assert 150_000 <= len(text.evaluation_text()) <= 250_000
    assert len(text.calibration_text()) >= 600_000
    assert len(text.training_text()) >= 5_000_000


@pytest.mark.parametrize(
    "name",
    [
        "site-packages/torch/nn.py",
        "encodings/cp037.py",
        "pydoc_data/topics.py",
        "_sysconfigdata__linux_.py",
        "config-3.11-x86_64-linux-gnu/python-config.py",
        "test/test_os.py",
        "unittest/test/test_case.py",
        "heapq.py",
    ],
)
def test_third_party_code_generated_tables_tests_and_evaluation_modules_are_left_out(name):
    assert not text._is_training_file(Path(name))


@pytest.mark.parametrize("name", ["os.py", "json/decoder.py", "distutils/cmd.py", "unittest/mock.py"])
def test_the_library_s_own_code_is_training_text(name):
    assert text._is_training_file(Path(name))


@pytest.mark.parametrize("read", [text.training_text, text.calibration_text, text.evaluation_text])
def test_a_library_without_sources_is_one_clear_error(read, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_library_root", lambda: tmp_path)
    with pytest.raises(QtipError) as caught:
        read()
    assert str(tmp_path) in caught.value.message
    assert "--data" in caught.value.hint
