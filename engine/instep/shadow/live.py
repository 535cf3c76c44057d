"""The process that shadows a model for a server, at the lowest priority: `python -m instep.shadow.live`.

A status has counts since it began: `frames` that were compared, `equal` ones, and streams that were `dropped`; the
`largest` and the `mean` difference, null where they are not finite; the `streams` that are followed now; and the
`position` of the recording up to which everything was read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from instep.background import AGAIN, CANNOT, end_of_input, in_slices, run_in_the_background, write

if TYPE_CHECKING:
    from instep.shadow.shadow import Shadow

_PAUSE_S: Final = 1.0
"""Between two looks at the recording, after each of which there is a status."""


def command(recording: Path, folder: Path, fingerprint: str, share: float, after: int) -> list[str]:
    """The module and arguments of a process that follows a recording with the candidate in a folder.

    Args:
        recording: of the version that is served.
        folder: the candidate's.
        fingerprint: the candidate's, too; if the folder holds another one by then, the process refuses it.
        share: of the streams.
        after: a position of the recording; frames up to there are not compared.
    """
    values = map(str, (recording, folder, fingerprint, share, after))
    return ["instep.shadow.live", *values]


def main(arguments: list[str]) -> int:
    """Follow a recording until standard input ends; the exit status."""
    recording, folder, fingerprint, share, after = arguments
    from instep.models.errors import ModelError
    from instep.recording.errors import RecordingError, UnavailableRecording, with_advice
    from instep.shadow.command import Shadowing, make_shadow

    ended = end_of_input()
    asked = Shadowing(Path(recording), Path(folder), float(share), None, None, None, json=True)
    try:
        shadow = make_shadow(asked, int(after), fingerprint)
        shadow.follow()  # what came before does not count as being late
        _tell(shadow)
        while not ended.wait(_PAUSE_S):
            with in_slices():
                shadow.keep_up()
            _tell(shadow)
    except UnavailableRecording as error:
        sys.stderr.write(f"{error}\n")
        return AGAIN
    except (ModelError, RecordingError) as error:
        write({"error": with_advice(error)})
        return CANNOT
    return 0


def _tell(shadow: Shadow) -> None:
    if shadow.unavailable is not None:  # the server notices that it hears nothing
        return
    found = shadow.report("").as_json()
    status = {name: found[name] for name in ("frames", "equal", "largest", "mean", "dropped")}
    write(status | {"streams": shadow.following, "position": shadow.position})


if __name__ == "__main__":
    run_in_the_background()
    sys.exit(main(sys.argv[1:]))
