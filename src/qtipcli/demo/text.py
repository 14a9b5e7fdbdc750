"""Owns which modules of Python's standard library are training, calibration and evaluation text for the demo model.

Only this file knows the three lists. Every machine that runs qtipcli has the standard library, so the demo needs no download.
Calibration modules are part of the training text; evaluation modules are in neither. Each module of the two
explicit lists exists as one file in Python 3.11 to 3.14. Nothing here imports torch.
"""

import sysconfig
from pathlib import Path

from qtipcli.errors import QtipError

CALIBRATION_MODULES = (
    "argparse",
    "contextlib",
    "dataclasses",
    "enum",
    "ftplib",
    "functools",
    "imaplib",
    "inspect",
    "optparse",
    "os",
    "pickle",
    "platform",
    "random",
    "shutil",
    "smtplib",
    "socket",
    "subprocess",
    "tarfile",
    "tempfile",
    "threading",
    "traceback",
    "typing",
)

EVALUATION_MODULES = (
    "calendar",
    "cmd",
    "csv",
    "fractions",
    "heapq",
    "sched",
    "shelve",
    "shlex",
    "statistics",
    "textwrap",
)

# Third-party code, generated tables, and what the build of one machine left behind.
# And tests: their style is another, they are two thirds of the library, and some distributions leave them out.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "test", "tests", "idle_test"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


def training_documents() -> list[str]:
    """Every training file of the running Python's standard library, one string a file, in the order of their paths.

    Raises QtipError if the sources are absent.
    """
    root = _library_root()
    paths = [path for path in _python_files(root) if _is_training_file(path.relative_to(root))]
    documents = [path.read_text(encoding="utf-8") for path in paths]
    if not documents:
        raise _sources_absent(root)
    return documents


def training_text() -> str:
    """The training files as one string, about 9 MB."""
    return "\n".join(training_documents())


def calibration_text() -> str:
    """The calibration modules as one string, about 1.3 MB. Part of the training text, disjoint from the evaluation text."""
    return _modules_text(CALIBRATION_MODULES)


def evaluation_text() -> str:
    """The evaluation modules as one string, about 200 kB. The demo model has never seen them."""
    return _modules_text(EVALUATION_MODULES)


def _library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _python_files(root: Path) -> list[Path]:
    # Folder by folder, because site-packages, which is left out, is often larger than everything else together.
    folders = [path for path in root.iterdir() if path.is_dir() and path.name not in EXCLUDED_FOLDERS]
    return sorted([*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def _modules_text(modules: tuple[str, ...]) -> str:
    root = _library_root()
    texts = []
    for name in modules:
        path = root / f"{name}.py"
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise _sources_absent(path) from error
    return "\n".join(texts)


def _is_training_file(relative: Path) -> bool:
    folders = relative.parts[:-1]
    if not EXCLUDED_FOLDERS.isdisjoint(folders):
        return False
    if any(part.startswith(EXCLUDED_PREFIXES) for part in relative.parts):
        return False
    return bool(folders) or relative.stem not in EVALUATION_MODULES


def _sources_absent(path: Path) -> QtipError:
    return QtipError(
        f"The demo's text is the source of Python's standard library, and {path} cannot be read",
        hint="use a Python whose library is installed as .py files (not zipped or frozen), or pass your own text with --data",
    )
