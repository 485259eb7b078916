"""A signed plan in words, for the operator who has to approve it: what, on which data, what leaves."""

from __future__ import annotations

import math

from fedward_client.questions import MAX_MODELS
from fedward_client.survey_summary import survey_rows
from fedward_common.evaluation.state import state_layout
from fedward_common.plan import ReadinessPlan, SignedPlan, TrainingPlan
from fedward_common.weights import num_bytes


def readable_summary(signed: SignedPlan) -> list[tuple[str, str]]:
    """Return titles and texts, most important first.

    Texts that the coordinator wrote are freed of control characters, so that they cannot redraw the
    operator's screen. They may still hold the square brackets of a markup language: print them as text.
    """
    plan = signed.content
    rows = [
        ("Plan", plan.name),
        ("Description", plan.description or "none"),
        ("Signed by", f"coordinator {signed.signer}, {signed.body.signed_at:%Y-%m-%d %H:%M %Z}"),
        ("Valid until", "no date" if plan.expires is None else f"{plan.expires:%Y-%m-%d %H:%M %Z}"),
        ("Digest", signed.digest),
    ]
    if isinstance(plan, ReadinessPlan):
        rows += survey_rows(plan)
    else:
        rows += _training_rows(signed, plan)
    return [(title, _printable(text)) for title, text in rows]


def _training_rows(signed: SignedPlan, plan: TrainingPlan) -> list[tuple[str, str]]:
    return [
        ("Learns", _task(plan)),
        ("Data used", _data(plan)),
        ("Images become", f"{plan.transforms.name}, {' x '.join(map(str, plan.transforms.size))}"),
        ("Model", _model(signed)),
        ("Training", _training(plan)),
        ("How long", _duration(plan)),
        ("Leaves each round", _leaves_each_round(signed)),
        ("Leaves in all", f"at most {_in_all(signed) / 1e6:,.1f} MB, in messages of fixed length"),
        ("Numbers that leave", _numbers(plan)),
        ("Kept back", f"every number about fewer than {plan.privacy.min_cases} cases"),
        ("Never leaves", "images, DICOM fields, file names, case ids, error texts"),
    ]


def _task(plan: TrainingPlan) -> str:
    positive = plan.task.labels[plan.task.positive_index]
    return f"{plan.task.name} of {', '.join(plan.task.labels)} (positive: {positive})"


def _data(plan: TrainingPlan) -> str:
    data = plan.data
    train = 1 - data.validation_fraction - data.test_fraction
    return (
        f"{data.dataset}, modalities {', '.join(data.modalities)}; patients divided {train:.0%} training,"
        f" {data.validation_fraction:.0%} validation, {data.test_fraction:.0%} test,"
        " unless the label file divides them"
    )


def _model(signed: SignedPlan) -> str:
    model = signed.plan.model
    options = ", ".join(f"{name} = {value}" for name, value in sorted(model.options.items()))
    elements = sum(spec.size for spec in signed.body.layout)
    return f"{model.name}, {elements:,} numbers" + (f" ({options})" if options else "")


def _training(plan: TrainingPlan) -> str:
    training = plan.training
    return (
        f"{training.trainer}: {training.local_epochs} epochs a round, {training.optimizer},"
        f" learning rate {training.learning_rate:g}, batches of {training.batch_size};"
        f" combined by {plan.strategy.name}"
    )


def _duration(plan: TrainingPlan) -> str:
    part = plan.participation
    return (
        f"{plan.rounds} rounds, {plan.rounds * plan.training.local_epochs} epochs over the training cases;"
        f" a round waits at most {part.deadline_s:,.0f} s and needs {part.quorum} sites"
    )


def _leaves_each_round(signed: SignedPlan) -> str:
    bounds = signed.plan.privacy
    return (
        f"an update of {num_bytes(signed.body.layout):,} bytes (the change of each number of the model,"
        f" none above {bounds.max_abs:g}, norm at most {bounds.max_norm:g}) and metric counts of"
        f" {_state_bytes(signed.plan):,} bytes"
    )


def _in_all(signed: SignedPlan) -> int:
    """Bytes of all payloads that the plan can call for, envelopes (under 2 kB each) included."""
    plan = signed.plan
    evaluations = plan.rounds // plan.evaluation.every + plan.evaluation.initial
    # last round's validation, the test as often as a site permits, the local model
    at_the_end = 1 + MAX_MODELS + plan.evaluation.compare_local
    states = (evaluations + at_the_end) * _state_bytes(plan)
    messages = plan.rounds + evaluations + at_the_end + 1
    return plan.rounds * num_bytes(signed.body.layout) + states + 2000 * messages


def _numbers(plan: TrainingPlan) -> str:
    local = ", the same for a model trained here alone" if plan.evaluation.compare_local else ""
    return (
        "number of cases per purpose; per round the number of training cases and their mean loss; as metric"
        f" counts the confusion matrix, how many cases fall into each of {plan.evaluation.score_bins} cells"
        f" of model score, and two sums of errors{local}; of at most {MAX_MODELS} different models for each"
        f" measured round on validation cases, and of {MAX_MODELS} in all on test cases"
    )


def _state_bytes(plan: TrainingPlan) -> int:
    return 8 * sum(math.prod(shape) for shape in state_layout(plan).values())


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
