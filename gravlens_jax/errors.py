"""User errors: one exception, and the checks that raise it."""

import json
from importlib.util import find_spec
from typing import Any


class InputError(ValueError):
    """An error that the user can fix; its message names what was given, what was expected and what to do."""


def check(condition: bool, message: str) -> None:
    """Raises InputError(message) unless `condition` holds."""
    if not condition:
        raise InputError(message)


def check_installed(package: str, feature: str, install: str) -> None:
    """Raises InputError unless `package` is installed; `install` is the argument for pip that installs it."""
    check(find_spec(package) is not None, f"{feature} needs {package}; run: pip install {install}")


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Returns the object of a JSON text; InputError that names `where` if it is another value or not JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8, and integers of thousands of digits
        raise InputError(f"{where} is not readable JSON ({error}); the file is damaged") from error
    check(isinstance(value, dict), f"{where} is not a JSON object; the file is damaged")
    return value
