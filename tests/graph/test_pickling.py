"""What importing the reader of saved surgeries brings along."""

import subprocess
import sys


def test_only_pickling_imports_the_compilers_of_torch() -> None:
    code = "import sys, surgeon.surgery.artifact; print({'torch', 'torch._dynamo', 'torch._inductor'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'torch'}\n"
