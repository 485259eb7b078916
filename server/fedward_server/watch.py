"""Show a run while it goes: a live table on a terminal, a line an event elsewhere, or JSON lines.

`run watch`, `simulate` and `demo` all show their events through here. Names and reasons come from other
machines, so they are printed as plain text, never as markup, and control characters become blanks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedward_common.console import plain
from fedward_common.errors import RefusalCode
from fedward_common.plan import ReadinessPlan, TrainingPlan
from fedward_server.progress import Progress, RoundProgress, SiteProgress, apply
from fedward_server.run_records import Event, RunStatus

_NUM_ROUNDS_SHOWN = 8
_REFRESHES_PER_SECOND = 4
_COLOURS = {
    "completed": "green",
    "failed": "red",
    "stopped": "yellow",
    "interrupted": "yellow",
    "contributed": "green",
    "refused": "red",
    "training": "cyan",
    "waiting": "yellow",
}


def _utc_now() -> datetime:
    return datetime.now(UTC)


def watch(
    events: Iterable[Event],
    *,
    plan: TrainingPlan | ReadinessPlan,
    json_lines: bool,
    console: Console | None = None,
    now: Callable[[], datetime] = _utc_now,
) -> RunStatus:
    """Show events until there are no more, and return the run's status by then.

    Args:
        events: of one run, in order; the iterable ends when the run has ended.
        plan: the run's plan.
        json_lines: write each event as one line of JSON and nothing else.
        console: where to show; standard output when not given.
    """
    trains_alone = isinstance(plan, TrainingPlan) and plan.evaluation.compare_local
    rounds_after = 1.0 + (plan.rounds if trains_alone else 0)
    progress = Progress(rounds_total=plan.rounds, rounds_after=rounds_after)
    if json_lines:
        for event in events:
            progress = apply(progress, event)
            sys.stdout.write(event.model_dump_json() + "\n")
            sys.stdout.flush()
        return progress.status
    console = console or Console(highlight=False)
    if not console.is_terminal:
        for event in events:
            progress = apply(progress, event)
            console.print(_line(event, progress, now()), soft_wrap=True)
        return progress.status
    return _watch_live(events, plan, progress, console, now)


def _watch_live(
    events: Iterable[Event],
    plan: TrainingPlan | ReadinessPlan,
    progress: Progress,
    console: Console,
    now: Callable[[], datetime],
) -> RunStatus:
    with Live(
        get_renderable=lambda: screen(plan.name, progress, now()),
        console=console,
        refresh_per_second=_REFRESHES_PER_SECOND,
    ) as live:
        for event in events:
            progress = apply(progress, event)
        live.refresh()
    return progress.status


def screen(name: str, progress: Progress, now: datetime) -> Group:
    """The live view: a headline, the sites, the last rounds."""
    parts: list[Text | Table] = [_headline(name, progress, now)]
    if progress.sites:
        parts.append(_sites_table(progress))
    if any(line.index > 0 or line.auroc is not None for line in progress.rounds):
        parts.append(_rounds_table(progress))
    return Group(*parts)


def _headline(name: str, progress: Progress, now: datetime) -> Text:
    line = Text(plain(name), style="bold")
    line.append("  ")
    line.append(progress.status, style=_COLOURS.get(progress.status, "cyan"))
    if progress.rounds_total:  # a survey has none
        line.append(f"  round {progress.round_index}/{progress.rounds_total}", style="not bold")
    line.append(f"  {_clock(progress.elapsed_s(now))} elapsed", style="not bold")
    left = progress.left_s(now)
    if left is not None:
        line.append(f", about {_clock(left)} left", style="not bold")
    if progress.test_auroc is not None:
        line.append(f"  test AUROC {progress.test_auroc:.3f}", style="bold green")
    if progress.decision:
        line.append(f"  {progress.decision}", style="bold green" if progress.decision == "go" else "bold red")
    if progress.reason:
        line.append(f"\n{plain(progress.reason)}", style=_COLOURS.get(progress.status, "default"))
    return line


def _sites_table(progress: Progress) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("Site", "State"):
        table.add_column(title)
    for title in ("Cases", "Loss", "AUROC", "Seconds"):
        table.add_column(title, justify="right")
    for name, site in sorted(progress.sites.items()):
        table.add_row(
            Text(plain(name)),
            Text(_state(site), style=_COLOURS.get(site.state, "default")),
            "-" if site.num_cases is None else f"{site.num_cases:,}",
            _figure(site.loss, 4),
            _figure(site.auroc, 3),
            _figure(site.seconds, 1),
        )
    return table


def _rounds_table(progress: Progress) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("Round", "Sites", "Loss", "AUROC", "Seconds"):
        table.add_column(title, justify="right")
    for line in progress.rounds[-_NUM_ROUNDS_SHOWN:]:
        chosen = " *" if line.index == progress.selected_round else ""
        table.add_row(
            f"{line.index}{chosen}",
            str(line.num_sites or "-"),
            _figure(line.loss, 4),
            _figure(line.auroc, 3),
            _figure(line.seconds, 1),
        )
    return table


def _line(event: Event, progress: Progress, now: datetime) -> Text:
    """One event as one line of plain text."""
    local = event.at.astimezone().strftime("%H:%M:%S")
    return Text(f"{local}  {_LINES[event.kind](event, progress, now)}")


def _tell_status(_: Event, progress: Progress, __: datetime) -> str:
    return f"run is {progress.status}" + (f": {plain(progress.reason)}" if progress.reason else "")


def _tell_sites(_: Event, progress: Progress, __: datetime) -> str:
    return "sites: " + ", ".join(
        f"{plain(name)} {_state(site)}" for name, site in sorted(progress.sites.items())
    )


def _tell_round_started(_: Event, progress: Progress, __: datetime) -> str:
    return f"round {progress.round_index}/{progress.rounds_total} started"


def _tell_site(event: Event, progress: Progress, __: datetime) -> str:
    name = str(event.fields["site"])
    site = progress.sites[name]
    if site.state == "refused":
        return f"round {event.fields['round']}: {plain(name)} {_state(site)}"
    refused = f", refuses {site.num_quarantined} studies" if site.num_quarantined else ""
    return (
        f"round {event.fields['round']}: {plain(name)} contributed {site.num_cases} cases{refused},"
        f" loss {_figure(site.loss, 4)}, {_figure(site.seconds, 1)} s"
    )


def _tell_aggregated(event: Event, progress: Progress, __: datetime) -> str:
    line = _round(progress, event)
    return f"round {line.index}: {line.num_sites} sites aggregated, loss {_figure(line.loss, 4)}"


def _tell_evaluated(event: Event, progress: Progress, __: datetime) -> str:
    if event.fields["split"] == "test":
        return f"model of round {event.fields['round']}: test AUROC {_figure(progress.test_auroc, 3)}"
    sites = ", ".join(
        f"{plain(name)} {_figure(site.auroc, 3)}" for name, site in sorted(progress.sites.items())
    )
    line = _round(progress, event)
    return f"round {line.index}: validation AUROC {_figure(line.auroc, 3)} ({sites})"


def _tell_committed(event: Event, progress: Progress, now: datetime) -> str:
    left = progress.left_s(now)
    ahead = f", about {_clock(left)} left" if left is not None else ""
    done = _figure(_round(progress, event).seconds, 1)
    return f"round {progress.committed}/{progress.rounds_total} committed after {done} s{ahead}"


def _tell_surveyed(event: Event, progress: Progress, __: datetime) -> str:
    name = str(event.fields["site"])
    count = progress.sites[name].num_cases
    told = "its counts held back" if count is None else f"{count:,} cases"
    return f"survey: {plain(name)} answered, {told}"


def _tell_judged(event: Event, progress: Progress, __: datetime) -> str:
    reasons = event.fields["reasons"]
    return f"{progress.decision}, {len(reasons) if isinstance(reasons, list) else 0} reasons"


def _tell_finished(_: Event, progress: Progress, __: datetime) -> str:
    chosen = f", result: model of round {progress.selected_round}" if progress.selected_round else ""
    reason = f": {plain(progress.reason)}" if progress.reason else ""
    return f"run {progress.status}{chosen}{reason}"


_LINES: dict[str, Callable[[Event, Progress, datetime], str]] = {
    "status": _tell_status,
    "sites": _tell_sites,
    "round_started": _tell_round_started,
    "site_update": _tell_site,
    "site_refused": _tell_site,
    "aggregated": _tell_aggregated,
    "evaluated": _tell_evaluated,
    "round_committed": _tell_committed,
    "site_surveyed": _tell_surveyed,
    "judged": _tell_judged,
    "finished": _tell_finished,
}


def _round(progress: Progress, event: Event) -> RoundProgress:
    return next(line for line in progress.rounds if line.index == event.fields["round"])


def _state(site: SiteProgress) -> str:
    if site.state not in ("waiting", "refused") or not site.code:
        return site.state
    try:
        return f"{site.state}: {RefusalCode(site.code).meaning}"
    except ValueError:
        return f"{site.state}: code {site.code}"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
