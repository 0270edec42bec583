"""Not written yet."""


def live():
    return []
