"""One of the processes that encode rows: `python -m worker.training.encode_process`.

On standard input come a pickled `RowSpec` and then batches, from the process that started it and nobody else;
each is answered on standard output. The input's end is this process' end.
"""

from __future__ import annotations

import os
import sys

from worker.training.encode import RowEncoder, receive, send


def main() -> None:
    # Nothing that a library prints may get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        encoder = RowEncoder(receive(sys.stdin.buffer))
        while True:
            send(answers, encoder.encode(receive(sys.stdin.buffer)))
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
