"""Every error of this library: what is wrong, where, the two facts that clash, what to do."""


class CompiledAttnError(Exception):
    """An error in four parts, printed in this order; empty parts are left out.

    what: one sentence.  where: the user's line, then the graph line.  facts: the two facts that clash.
    do: what the reader can change.
    """

    def __init__(self, what: str, *, where: str = "", facts: str = "", do: str = "") -> None:
        self.what, self.where, self.facts, self.do = what, where, facts, do
        parts = [what]
        parts += [f"  {label:<6} {text}" for label, text in (("where:", where), ("facts:", facts), ("do:", do)) if text]
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.facts, self.do))


def _rebuild(kind: type[CompiledAttnError], what: str, where: str, facts: str, do: str) -> CompiledAttnError:
    return kind(what, where=where, facts=facts, do=do)


class CaptureError(CompiledAttnError):
    """The model could not be turned into a Program."""


class VerifyError(CompiledAttnError):
    """A Program breaks a rule that every Program keeps."""


class OpError(CompiledAttnError, ValueError):
    """A vocabulary op was given arguments that it does not accept."""


class PassError(CompiledAttnError):
    """A pass was given options or a program that it cannot serve."""


class LowerError(CompiledAttnError):
    """A Program could not be turned into native code as asked."""


class TargetError(CompiledAttnError):
    """A target is unknown, not at hand, or cannot serve what was asked."""


class ContractError(CompiledAttnError):
    """An artifact, or what it was called with, contradicts its contract."""


class CheckpointError(CompiledAttnError):
    """A checkpoint does not fit the model it was loaded into."""


class StaleWeightsError(CompiledAttnError):
    """Weights that were folded into compiled code have changed since."""
