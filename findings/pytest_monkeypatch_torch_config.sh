#!/usr/bin/env bash
# pytest 9.2.0, torch 2.13.0: a test that sets one of torch's settings with monkeypatch leaves torch without this setting
# when it ends. `torch.compile` and `torch.export` then fail in every later test of the process, with an AttributeError
# that names a setting of torch and no test.
#
# One would guess that monkeypatch restores what was there, as it did up to pytest 9.1.1, and as unittest.mock does with
# the same two lines. Since 9.2.0 it restores what the object's `__dict__` holds, for objects whose attributes are
# inherited. Torch's configs are modules that answer by `__getattr__` and have no entry there, so pytest takes the
# attribute away in the end, and to a config that means that the setting is hidden.
#
# What helps: `with torch._dynamo.config.patch(name=value)`, which all of torch's configs have.
#
# Output seen:
#     torch 2.13.0+cpu
#     pytest 9.1.1, monkeypatch: a later torch.compile works
#     pytest 9.2.0, monkeypatch: a later torch.compile raises AttributeError: torch._dynamo.config.suppress_errors does not exist
#     pytest 9.2.0, unittest.mock: a later torch.compile works
#     pytest 9.2.0, config.patch: a later torch.compile works
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
for version in 9.1.1 9.2.0; do
    "$folder/venv/bin/pip" install -q --target "$folder/pytest-$version" pytest==$version
done

cat > "$folder/test_settings.py" <<'PYTHON'
import os
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo

CONFIG = torch._dynamo.config


def test_sets_a_setting(monkeypatch):
    way = os.environ["WAY"]
    if way == "monkeypatch":
        monkeypatch.setattr(CONFIG, "suppress_errors", True)
    elif way == "unittest.mock":
        with mock.patch.object(CONFIG, "suppress_errors", True):
            assert CONFIG.suppress_errors
        return
    else:
        with CONFIG.patch(suppress_errors=True):
            assert CONFIG.suppress_errors
        return
    assert CONFIG.suppress_errors


def test_later():
    try:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        found = "works"
    except AttributeError as error:
        found = f"raises AttributeError: {error}"
    Path(os.environ["FOUND"]).write_text(found)
PYTHON

"$folder/venv/bin/python" -c 'import torch; print(f"torch {torch.__version__}")'
as_seen=true
check() { # pytest's version, how the setting is set, what a later torch.compile does
    PYTHONPATH="$folder/pytest-$1" WAY="$2" FOUND="$folder/found" \
        "$folder/venv/bin/python" -m pytest -q -p no:cacheprovider "$folder/test_settings.py" > "$folder/log" || cat "$folder/log"
    echo "pytest $1, $2: a later torch.compile $(cat "$folder/found")"
    case "$(cat "$folder/found")" in "$3"*) ;; *) as_seen=false ;; esac
}
check 9.1.1 monkeypatch "works"
check 9.2.0 monkeypatch "raises AttributeError: torch._dynamo.config.suppress_errors does not exist"
check 9.2.0 unittest.mock "works"
check 9.2.0 config.patch "works"
$as_seen || { echo "it behaves otherwise now" >&2; exit 1; }
