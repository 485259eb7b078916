"""Which questions about a model a plan implies, and how many different models each of them may be about.

Every answer to "how good is this model on your cases?" tells a little about those cases, and a server that
could ask it about models of its own making, as often as it likes, could find out who is among them
(membership inference). So a site answers what the approved plan calls for and nothing else: a round is
trained with one model, and models are measured where the plan measures them, a few in each place.

Why a few and not one: a server that died after a round was measured but before it was committed repeats the
round, perhaps with other sites, and has another model to measure; one that lost the selected round's
checkpoint selects another round for the test. Two such accidents in one place are plausible, twenty are not.
"""

from __future__ import annotations

from fedward_common.envelope import Instruction
from fedward_common.plan import ReadinessPlan, TrainingPlan

MAX_MODELS = 3
"""How many different models a site measures on validation cases for one round, and on test cases in all."""


def is_implied(plan: TrainingPlan | ReadinessPlan, instruction: Instruction) -> bool:
    """Whether carrying out the plan involves this question, in this round and about these cases."""
    index = instruction.round_index
    if isinstance(plan, ReadinessPlan):
        return instruction.action == "survey" and index == 0 and instruction.base_digest is None
    match instruction.action, instruction.split:
        case "train", _:
            return 1 <= index <= plan.rounds
        case "evaluate", "validation":
            return _is_measured(plan, index)
        case "evaluate", "test":
            return index == plan.rounds or (plan.evaluation.select == "best" and 1 <= index < plan.rounds)
        case "baseline", "test":
            return index == 0 and plan.evaluation.compare_local
    return False


def max_models(instruction: Instruction) -> int:
    """How many different models a site measures in the place of this question; the untrained one is one."""
    return 1 if instruction.action == "baseline" else MAX_MODELS


def place_of_question(instruction: Instruction) -> str:
    """What the limit is counted over: a round's validation, but the test in all rounds together."""
    if instruction.action == "evaluate" and instruction.split == "validation":
        return f"validation {instruction.round_index}"
    return f"{instruction.action} {instruction.split}"


def _is_measured(plan: TrainingPlan, index: int) -> bool:
    """Whether the model after this round is measured on validation cases; round 0 is the untrained one."""
    if index == 0:
        return plan.evaluation.initial
    return index == plan.rounds or (index < plan.rounds and index % plan.evaluation.every == 0)
