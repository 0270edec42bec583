from typing import Final

PAGE_SIZE: Final[int]

def survey(
    pagemap_fd: int,
    flags_fd: int,
    count_fd: int,
    start: int,
    end: int,
    inherited: dict[int, int],
    inherited_here: set[int],
) -> tuple[int, int, int, int, float]: ...
def ksm_frames(pagemap_fd: int, flags_fd: int, start: int, end: int) -> dict[int, int]: ...
