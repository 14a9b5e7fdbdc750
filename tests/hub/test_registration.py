"""`import qtipcli` on its own: what it loads, how long it takes, and that registering twice or from threads does no harm."""

import subprocess
import sys
import warnings

import pytest
from hub import forks
from transformers.quantizers import auto

import qtipcli
from qtipcli import registration
from qtipcli.hub.config import QtipConfig
from qtipcli.hub.quantizer import QtipHfQuantizer

IMPORT_BUDGET_MS = 30
"""From the order: `import qtipcli` within 30 ms, so that the command line answers at once."""


def run(program: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, "-c", program]
    return subprocess.run(command, env=forks.environment(), capture_output=True, text=True, timeout=forks.TIMEOUT, check=True)


def test_importing_the_package_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'numpy', 'numba', 'safetensors', 'pydantic'}"
    assert run(f"import sys, qtipcli; print({heavy} & set(sys.modules))").stdout.strip() == "set()"


def test_importing_the_package_is_quick():
    def milliseconds() -> float:
        report = run("import qtipcli", "-X", "importtime").stderr.splitlines()
        return int(next(line for line in report if line.endswith("| qtipcli")).split("|")[1]) / 1000

    # The best of five: what it costs, without what else the machine does.
    assert min(milliseconds() for _ in range(5)) < IMPORT_BUDGET_MS


def test_the_version_is_there_installed_or_not():
    assert qtipcli.__version__
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        _ = qtipcli.unknown


def test_the_entries_stand_for_the_real_classes():
    deferred = auto.AUTO_QUANTIZER_MAPPING["qtip"]
    assert deferred.requires_calibration is True
    read = auto.AutoQuantizationConfig.from_dict(QtipConfig.from_layouts({}, {}).to_dict())
    assert type(read) is QtipConfig
    assert type(auto.AutoHfQuantizer.from_config(read, pre_quantized=True)) is QtipHfQuantizer
    assert not hasattr(deferred, "__deepcopy__")


def test_installing_and_registering_again_changes_nothing():
    before = auto.AUTO_QUANTIZER_MAPPING["qtip"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.install()
        registration.install()
        registration.register(auto)
    assert sys.meta_path.count(registration.RegistryWatcher) == 1
    assert auto.AUTO_QUANTIZER_MAPPING["qtip"] is before


def test_another_library_of_the_same_name_is_left_alone_and_reported(monkeypatch):
    class Foreign:
        pass

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "qtip", Foreign)
    with pytest.warns(UserWarning, match=r"Foreign.* is registered for 'qtip' models already"):
        registration.register(auto)
    assert auto.AUTO_QUANTIZER_MAPPING["qtip"] is Foreign


def test_the_registrys_module_keeps_its_loader():
    # Whoever asks the module for its source or resources must not meet the hook.
    assert type(auto.__spec__.loader).__name__ == "SourceFileLoader"
