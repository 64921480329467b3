"""`as-float`: rounded weights are taken as float weights, for orders of passes that a pipeline refuses."""

from dataclasses import dataclass

from mxcompile.passes.writing import Pass, PassResult, Program, Stage


@dataclass(frozen=True)
class AsFloat(Pass):
    """The values stay; that they are on a format's grid is forgotten, so that folds may follow."""

    name = "as-float"
    accepts = frozenset({Stage.ROUNDED})
    gives = Stage.FLOAT

    @property
    def reads_calibration(self) -> bool:
        """It reads nothing."""
        return False

    def run(self, program: Program) -> PassResult:
        """Forget how weights were rounded."""
        count = len(program.rounded)
        program.rounded.clear()
        return PassResult(count)
