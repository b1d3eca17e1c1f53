"""A program that reads a TensorFlow checkpoint for another process: `python tensorflow_process.py PREFIX`.

TensorFlow runs in a process of its own because Triton, which our models import, crashes in a process that has imported
TensorFlow. This file imports nothing of the package, so that the process holds TensorFlow and numpy alone.

The first answer lists the variables: {"shapes": {name: [int, ...]}}. Then each line of standard input names a variable, and
the answer is a line {"dtype": text, "bytes": int} and that many bytes. An answer {"error": text, "missing": bool} ends the
program; `missing` says that TensorFlow could not be imported.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever TensorFlow prints, it prints to standard error
    imported = False
    try:
        import numpy
        import tensorflow

        imported = True
        reader = tensorflow.train.load_checkpoint(sys.argv[1])
        _answer(answers, {"shapes": reader.get_variable_to_shape_map()})
        for line in sys.stdin:
            values = numpy.asarray(reader.get_tensor(line.rstrip("\n")))
            if values.dtype.name == "bfloat16":  # not a type of numpy's own
                values = values.astype(numpy.float32)
            content = values.tobytes()
            _answer(answers, {"dtype": values.dtype.str, "bytes": len(content)}, content)
    except Exception as error:  # TensorFlow has many types of errors
        _answer(answers, {"error": str(error), "missing": not imported})


def _answer(answers: BinaryIO, values: dict[str, Any], content: bytes = b"") -> None:
    answers.write(json.dumps(values).encode() + b"\n" + content)
    answers.flush()


if __name__ == "__main__":
    main()
