"""Which times of captions cannot be right."""

SLACK_S = 1.0  # by which the end of a caption, or of a cut, may lie behind its video's: annotations round


def impossible(start: float | None, end: float | None, duration: float) -> bool:
    """Whether a caption of a video of `duration` seconds lies outside it, or ends before it starts."""
    if start is not None and (start < 0 or start >= duration):
        return True
    if end is None:
        return False
    return end <= 0 or end > duration + SLACK_S or (start is not None and end < start)
