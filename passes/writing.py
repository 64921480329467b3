"""What a pass of your own imports: one module for all the names, wherever the framework defines them.

    from mxcompile.passes.writing import Pass, PassResult, Request, choose, finite_rows, observers

- Pass and result: `Pass`, `PassResult`, `Miss`, `Program`, `Stage` and `FLOATING` (the stages before lowering), `where`
  (a node's name and module path, for a miss); `Range` for the limits of an option; `Instrument` and `PipelineStep` to
  observe a run.
- Matmuls: `choose`, `MatmulChoice`, `Matmul`, `finite_rows`; `override_formats` and `Overrides` for an option that maps
  name patterns to formats; `round_rows` and `Rounding` for a pass that rounds weights.
- Statistics: `Request`, `observers`, `Observer`; `find_segments`, `Segment` and `Sweep` for sequential calibration.
- Folds: `find_groups`, `ScaleGroup`, `fold`, `Fold`.
- Graph rewrites: `Rule`, `apply_rules`, `Match`, the patterns `Wildcard` and `Call`; `insert_call`, `insert_tensor`.
- Numbers: `sqnr_db`, `rounding_db`, `kl_divergence`, `top1_agreement`.

Formats are in `mxcompile.formats`, errors in `mxcompile.errors`. The built-in passes import from the rooms themselves.
"""

from mxcompile.analysis.choice import MatmulChoice, choose, override_formats
from mxcompile.analysis.folds.groups import ScaleGroup, find_groups, fold
from mxcompile.analysis.matmuls import Matmul, finite_rows
from mxcompile.analysis.segments import Segment, find_segments
from mxcompile.calibration.runs.run import Request
from mxcompile.calibration.runs.sweep import Sweep
from mxcompile.calibration.statistics import observers
from mxcompile.calibration.statistics.observers import Observer
from mxcompile.graph.edit import insert_call, insert_tensor
from mxcompile.graph.name_patterns import Overrides
from mxcompile.graph.program import Program, Rounding, Stage, where
from mxcompile.graph.records import Fold, Miss, PassResult
from mxcompile.graph.rules import Call, Match, Rule, Wildcard, apply_rules
from mxcompile.numerics.importance import round_rows
from mxcompile.numerics.metrics import kl_divergence, rounding_db, sqnr_db, top1_agreement
from mxcompile.pipeline.interfaces import FLOATING, Instrument, Pass, PipelineStep
from mxcompile.pipeline.options import Range

__all__ = [
    "FLOATING",
    "Call",
    "Fold",
    "Instrument",
    "Match",
    "Matmul",
    "MatmulChoice",
    "Miss",
    "Observer",
    "Overrides",
    "Pass",
    "PassResult",
    "PipelineStep",
    "Program",
    "Range",
    "Request",
    "Rounding",
    "Rule",
    "ScaleGroup",
    "Segment",
    "Stage",
    "Sweep",
    "Wildcard",
    "apply_rules",
    "choose",
    "find_groups",
    "find_segments",
    "finite_rows",
    "fold",
    "insert_call",
    "insert_tensor",
    "kl_divergence",
    "observers",
    "override_formats",
    "round_rows",
    "rounding_db",
    "sqnr_db",
    "top1_agreement",
    "where",
]
