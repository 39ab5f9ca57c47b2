"""What the commands do, as functions that return data. Nothing here prints: `surgeon.render` shows the results."""

from __future__ import annotations

import fnmatch
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from surgeon.artifact import RECORD, load, load_diff, load_inputs, read_record
from surgeon.batch import Batch, Data
from surgeon.cost import measure
from surgeon.diff import GraphDiff, PassDiff, compare_unrelated, snapshot
from surgeon.errors import LoadError, NothingChangedError, SaveError, SurgeonError, UsageError
from surgeon.fit import Settings
from surgeon.graph import TracedGraph, module_path, shape_of
from surgeon.inputs import as_args_kwargs, example_inputs, inputs_from, inputs_of_program
from surgeon.losses import Quality, evaluate, task_of
from surgeon.moe import find_moes, get_tau, set_tau
from surgeon.passes import Pass
from surgeon.pipeline import Diff, Origin, Pipeline, Surgery
from surgeon.report import Cost, PassReport, Progress
from surgeon.rewrite import Capture
from surgeon.sites import find_ffns, find_linear_sites
from surgeon.source import TASK_CLASSES, Source, check_finite, load_companions, load_model
from surgeon.sweep import USUAL_TAUS, Point
from surgeon.sweep import sweep as run_sweep
from surgeon.tracing import TraceInfo, adopt, from_program, relative_error, run, trace
from surgeon.workdir import WorkDirectory
