# PYTHON_ARGCOMPLETE_OK
"""`air`: from a folder of images to a classifier, its predictions and its page; the stages; the tables of results.

Each module has the commands of one topic: `add` declares their arguments, and the function that runs a command is its
parser's default `run`.
"""

from __future__ import annotations

import argparse
import os
import sys

from air_plugin import __version__
from air_plugin.cli import classifier, export, fit, report, stages
from air_plugin.cli.parsing import HelpFormatter
from air_plugin.utils.errors import exit_code
from air_plugin.utils.logs import show_logs

ABOUT = (
    "From a folder of unlabelled images and a list of names to a classifier; the stages behind it; tables of results."
)
EPILOG = """examples:
  air fit photos --classes cat dog "traffic light" --out classifier
  air predict classifier photos > labels.tsv
  air report digits --details
  air settings AIR.K

exit codes:
  0    done
  1    a defect of this package, with a traceback; please report it
  2    bad input: one line on stderr says what is wrong, where, and what to do
  130  interrupted (Ctrl-C); finished work is kept, and the same command goes on from there

completion of commands and options in bash (zsh: first autoload -U bashcompinit && bashcompinit):
  eval "$(register-python-argcomplete air)"
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a command line; `run` is the function that runs the command, `options` its KEY VALUE words."""
    parser = argparse.ArgumentParser(prog="air", description=ABOUT, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"air {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for topic in (fit, classifier, stages, export, report):
        topic.add(commands)
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    # A positional "options" would swallow every flag that follows the folder, so the pairs are the rest.
    args, options = parser.parse_known_args(argv)
    unknown = [word for word in options if word.startswith("--") or not args.takes_settings]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.options = options
    return args


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if getattr(args, "offline", False):
        from air_plugin.utils.offline import go_offline

        go_offline()  # before any library asks the hub
    return args.run(args)


def main(argv: list[str] | None = None) -> int:
    """The console script; returns the exit code, 2 for bad input."""
    args = parse(argv)
    show_logs()
    try:
        return exit_code(lambda: run(args))
    except BrokenPipeError:  # `air predict ... | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
