"""`rolecast templates check`: every template with every sample."""

from __future__ import annotations

import typer

from worker.commands.console import Exit, Json, Stop, counted, print_json, print_line, say, settings_of

app = typer.Typer(help="The templates of the mails.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """The templates of the mails."""


@app.command("check")
def check(ctx: typer.Context, json: Json = False) -> None:
    """Render every template with every sample; exit 6 where one has a fault."""
    settings = settings_of(ctx)
    from worker.doctor import mailed_samples
    from worker.rendering import Renderer

    samples = mailed_samples()
    findings = Renderer(templates_dir=settings.templates_dir).check(samples)
    if json:
        print_json({"findings": [{"template": one.template, "fault": one.fault} for one in findings]})
    else:
        for one in findings:
            print_line(f"{one.template}: {one.fault}")
    say(f"{counted(len(samples), 'type')} checked, {counted(len(findings), 'finding')}")
    if findings:
        raise Stop(Exit.FINDINGS)
