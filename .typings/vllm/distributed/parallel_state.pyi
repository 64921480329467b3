class GroupCoordinator:
    local_rank: int

def get_world_group() -> GroupCoordinator: ...
