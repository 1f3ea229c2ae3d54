"""The command line: turns flags and YAML into an experiment, and errors into one sentence and exit status 2."""

import importlib
import os
import sys
from collections.abc import Sequence

from mtl import registry
from mtl.errors import UserError, nearest

COMMANDS = {
    "train": "Train one task or several on one shared backbone; write the run's folder.",
    "evaluate": "Measure a run's best checkpoint, or several as one, on held-out samples of its own or other data.",
    "predict": "Predict images of any size with a run's best checkpoint, or with several as one.",
    "soup": "Average the weights of several runs into one.",
    "preview": "Draw what the network will see, before any training: samples, augmented, and their targets.",
    "export": "Write a run's best checkpoint as an ONNX or torch.export program.",
    "study": "Measure something over many models or trainings, and end in a table.",
}
"""What each command does; ``mtl.cli.NAME`` has its function ``run``."""


def main(words: Sequence[str] | None = None, program: str = "python -m mtl") -> int:
    """Run a command and return its exit status: 0, or 2 if what the user gave cannot be used."""
    command, *rest = list(sys.argv[1:] if words is None else words) or ["--help"]
    registry.clear()
    try:
        if command in ("-h", "--help"):
            print(f"usage: {program} {{{','.join(COMMANDS)}}} [-h] [OPTIONS]\n")
            print("\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items()))
        elif command not in COMMANDS:
            raise UserError(f"{command!r} is no command{nearest(command, COMMANDS)}; there are {', '.join(COMMANDS)}")
        else:
            module = importlib.import_module(f"mtl.cli.{command}")
            module.run(rest, program if program == "train.py" else f"{program} {command}", COMMANDS[command])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read this, such as `head`, has had enough; nor may Python complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
