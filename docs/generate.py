"""Write the pages of docs/ that are made from the code; `make docs`. A test compares them with what is committed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent


def failures() -> str:
    """docs/failures.md: every failure code, from its one declaration."""
    from curation.failures import FailureCode, Trait

    rows = [f"| `{code.value}` | {code.said} | {code.retried} | {code.advice} |" for code in FailureCode]
    blocking = " or ".join(f"`{code.value}`" for code in FailureCode if Trait.BLOCKS in code.traits)
    resumed = " or ".join(f"`{code.value}`" for code in FailureCode if Trait.KEEPS_PART in code.traits)
    return "\n".join(
        [
            "# Failures",
            "",
            "A failure is not a verdict: a clip that cannot be fetched, decoded or measured is never rejected. Each",
            "failure of a clip has one of these codes. `curation failures --out FOLDER` shows them clip by clip.",
            "This page is made from `curation/failures.py` by `make docs`.",
            "",
            "| code | what happened | tried again by the next run | what to do |",
            "|---|---|---|---|",
            *rows,
            "",
            f"After {blocking}, no worker asks that platform again until its time is over; its other clips are",
            "postponed, which is no failure.",
            "",
            f"After {resumed}, what was received stays on the disk, and the next attempt resumes it if the server",
            "still reports the same ETag or Last-Modified.",
            "",
        ]
    )


def settings() -> str:
    """docs/settings.md: every setting, from its one declaration."""
    from curation.options import Option, options
    from curation.settings import VideoLimits

    signs = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than", "multiple_of": "a multiple of"}

    def default(option: Option) -> str:
        if isinstance(option.default, bool) or option.default in (None, []):
            return ""
        if isinstance(option.default, list | tuple):
            return f"`{', '.join(map(str, option.default))}`"
        return f"`{option.default}`"

    def row(option: Option, parameter: str) -> str:
        limits = [
            f"{sign} {getattr(each, name):g}"
            for each in option.field.metadata
            for name, sign in signs.items()
            if getattr(each, name, None) is not None
        ]
        said = f"{option.field.description} ({', '.join(limits)})" if limits else f"{option.field.description}"
        flags = {"teacher": "`--teacher`", "teacher_model": "`--teacher`"}
        flag = flags.get(option.name, f"`{option.flag}`")
        variable = f" or `{option.env}`" if option.env else ""
        return f"| `{parameter}` | {flag}{variable} | {default(option)} | {said} |"

    rows = []
    flat = options(flat=True)
    for option in options().values():
        if option.field.annotation is VideoLimits:
            rows += [row(flat[name], f"{option.name}: {name}") for name in VideoLimits.model_fields]
        else:
            rows.append(row(option, option.name))
    return "\n".join(
        [
            "# Settings",
            "",
            "Each setting is declared once, in `curation/settings.py`. The parameters of the flow",
            "(`prefect deployment run curate --param name=value`), the options of `curation run` and this page are",
            "made from there; `make docs` writes this page.",
            "",
            "For the flow, lists, pairs and limits are JSON: `--param 'pause_s=[5, 10]'`,",
            "`--param 'limits={\"max_fps\": 60}'` (other limits keep their defaults). On the command line, an option",
            "with several values is repeated, and a pair follows its option:",
            "`--http-host a.org --http-host b.org --pause 5 10`.",
            "`--teacher` takes one word: a MoGe-2 Hugging Face id or local file, a folder of depth, or `none`.",
            "",
            "| parameter of the flow | option of `curation run` | default | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def architecture() -> str:
    """docs/architecture.svg: the packages and which imports which."""
    import sys

    sys.path.insert(0, str(DOCS))
    from picture import svg

    return svg()


PAGES: dict[str, Callable[[], str]] = {
    "failures.md": failures,
    "settings.md": settings,
    "architecture.svg": architecture,
}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
