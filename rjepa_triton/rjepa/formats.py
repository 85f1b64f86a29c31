"""The kinds of eye-tracking files that are read, and what tables of each call their columns.

A kind is what a sidecar's `columns` would say of such a table, so that it need not; what it does say comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# As commands and configurations name them: a table of one's own, reports of EyeLink Data Viewer, EyeLink .asc files,
# exports of Tobii Studio and Pro Lab, of SMI BeGaze and the IDF event detector, of Pupil Player and Pupil Cloud, events
# of pymovements, and BIDS.
FORMATS = ("table", "eyelink", "asc", "tobii", "smi", "pupil", "pymovements", "bids")


@dataclass(frozen=True)
class Called:
    """A name that a column may have.

    unit       of a time, or of a position, as in a sidecar; None: pixels, or of a time one that the table has to show
    up         of y: whether it grows upwards
    of_frame   of a position: whether it is of the movie's frame, and of no screen
    """

    name: str
    unit: str | None = None
    up: bool = False
    of_frame: bool = False


@dataclass(frozen=True)
class Kind:
    """Tables of one kind.

    columns   for each of `sidecar.COLUMNS`, the names that it may have; the first that is there counts. An offset
              is used only where there is no duration
    events    of the column name: what fixations may be called; the first that is there counts
    index     columns that number fixations, of which the first that is there counts: of rows with the same number the
              first row counts
    within    columns within which numbers are of the same fixation, beside participant and eye
    true      columns that must say true: rows that don't are not on the picture
    """

    columns: Mapping[str, tuple[Called, ...]]
    events: tuple[str, ...] = ()
    index: tuple[str, ...] = ()
    within: tuple[str, ...] = ()
    true: tuple[str, ...] = ()


def _names(*names: str, unit: str | None = None) -> tuple[Called, ...]:
    return tuple(Called(name, unit) for name in names)


def _tobii(axis: str) -> tuple[Called, ...]:
    """Positions: of the media (MCS) in Tobii Studio, else of the display (DACS), of which Pro Lab may have both."""
    point = f"Fixation point {axis}"
    return (
        Called(f"FixationPoint{axis} (MCSpx)", of_frame=True),
        *_names(point, f"{point} [DACS px]", f"{point} (DACSpx)"),
        Called(f"{point} [MCS px]", of_frame=True),
        *(Called(f"{point} {kind}", "fraction", of_frame=True) for kind in ("[MCS norm]", "(MCSnorm)")),
    )


def _pupil(axis: str) -> tuple[Called, ...]:
    """Positions: Pupil Cloud's grow downwards, Pupil Player's upwards from the lower left corner."""
    return (
        Called(f"fixation {axis} [px]", of_frame=True),
        Called(f"fixation {axis} [normalized]", "fraction", of_frame=True),
        Called(f"norm_pos_{axis}", "fraction", up=axis == "y", of_frame=True),
    )


KINDS = {
    "tobii": Kind(
        {
            "participant": _names("Participant name", "ParticipantName"),
            "movie": _names("Presented Stimulus name", "Presented Media name", "MediaName"),
            "onset": (
                *_names("RecordingTimestamp", "Recording timestamp [ms]", unit="ms"),
                Called("Recording timestamp [μs]", "us"),
                Called("Recording timestamp"),
            ),
            "duration": _names(
                "GazeEventDuration",
                "Gaze event duration",
                "Gaze event duration [ms]",
                "Eye movement event duration",
                "Eye movement event duration [ms]",
                unit="ms",
            ),
            "x": _tobii("X"),
            "y": _tobii("Y"),
            "name": _names("GazeEventType", "Eye movement type"),
        },
        events=("Fixation",),
        index=("FixationIndex", "Eye movement type index"),
        within=("RecordingName", "Recording name"),
    ),
    "smi": Kind(
        {
            "participant": _names("Participant"),
            "movie": _names("Stimulus"),
            "onset": _names("Event Start Trial Time [ms]", unit="ms"),
            "duration": _names("Event Duration [ms]", unit="ms"),
            "offset": _names("Event End Trial Time [ms]", unit="ms"),
            "x": _names("Fixation Position X [px]", "Visual Intake Position X [px]"),
            "y": _names("Fixation Position Y [px]", "Visual Intake Position Y [px]"),
            "eye": _names("Eye L/R"),
            "name": _names("Category"),
        },
        events=("Fixation", "Visual Intake"),
        index=("Index",),
        within=("Trial", "Stimulus"),
    ),
    "pupil": Kind(
        {
            "participant": _names("recording id"),
            "movie": (),
            "onset": (Called("start timestamp [ns]", "ns"), Called("start_timestamp", "s")),
            "duration": _names("duration [ms]", "duration", unit="ms"),
            "offset": _names("end timestamp [ns]", unit="ns"),
            "x": _pupil("x"),
            "y": _pupil("y"),
        },
        index=("fixation id", "fixation_id", "id"),
        within=("section id",),
        true=("fixation detected in reference image", "fixation detected on surface", "on_surf", "on_srf"),
    ),
    "pymovements": Kind(
        {
            "participant": _names("participant", "subject", "subject_id"),
            "movie": _names("movie", "stimulus", "trial"),
            "onset": _names("onset", unit="ms"),
            "duration": _names("duration", unit="ms"),
            "offset": _names("offset", unit="ms"),
            "x": _names("location_x"),
            "y": _names("location_y"),
            "name": _names("name"),
        },
        events=("fixation",),
    ),
}
