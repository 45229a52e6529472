"""What the blocks of the operators beside lora_linear do: for walks() of test_launches.py."""

from __future__ import annotations

from collections.abc import Callable

#: Threads of a block that groups tokens, and of the one that lists tiles; elements of a block that finishes.
GROUP_THREADS, LIST_THREADS, MAX_GRID_Y = 256, 512, 65535

Walk = tuple[str, int, int, int]


FEW_TILE, FEW_COLUMNS = 16, 256  # tokens of a tile, and columns of a block, where there are few


def tile_slots(task: dict, tile: int) -> int:
    return task["rows"] // tile + min(task["adapters"] + 2, task["rows"])


def part_slots(task: dict) -> int:
    return task["rows"] // task["rows_per_part"] + task["adapters"]


def group_tokens(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    return [
        ("groups", task["adapters"] + 2, 1, grid[0]),
        ("rows", task["rows"], GROUP_THREADS * task["rows_per_thread"], 1),
    ]


def group_few_tokens(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    return [
        ("rows", task["rows"], GROUP_THREADS, grid[0]),
        ("tiles", tile_slots(task, task["tile_rows"]), task["tile_slots"], 1),
    ]


def list_tiles(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    return [("groups", task["adapters"] + 2, LIST_THREADS * task["groups_per_thread"], grid[0])]


def grouped_shrink(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    return [
        ("tiles", tile_slots(task, tile), 1, grid[0]),
        ("depth", max(task["depth"], 1), task["depth_per_split"], grid[1]),
        ("rank", max(task["rank"], 1), int(options[-1]), grid[2]),
    ]


def grouped_shrink_few(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    return grouped_shrink(task, FEW_TILE, grid, options)


def grouped_expand_few(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    return [
        ("tiles", tile_slots(task, FEW_TILE), 1, grid[0]),
        ("columns", task["columns"], FEW_COLUMNS, grid[1]),
    ]


def grouped_expand(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    return [
        ("tiles", tile_slots(task, tile), 1, grid[0]),
        ("columns", task["columns"], task["columns_per_block"], grid[1]),
    ]


def grouped_gradient(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    on_tensor_cores = options[0] == options[1] != "float"
    return [
        ("parts", part_slots(task), 1, grid[0]),
        ("features", task["features"], 2 * tile if on_tensor_cores else tile, grid[1]),
        ("rank", task["rank"], int(options[-1]), grid[2]),
    ]


def grouped_finish(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    return [("adapters", task["adapters"], 1, grid[0])]  # along y each block goes on until nothing is left


def multi_shrink(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    return [
        ("rows", task["rows"], tile, grid[0]),
        ("depth", max(task["depth"], 1), task["depth_per_split"], grid[1]),
        ("rank", max(task["rank"], 1), int(options[-1]), grid[2]),
    ]


def multi_expand(task: dict, tile: int, grid: list[int], options: list[str]) -> list[Walk]:
    return [
        ("rows", task["rows"], tile, grid[0]),
        ("columns", task["columns"], task["columns_per_block"], grid[1]),
    ]


#: kernel -> (fields of its task, tile, grid, template arguments) -> (axis, extent, how much a block does, blocks)
WALKS: dict[str, Callable[[dict, int, list[int], list[str]], list[Walk]]] = {
    walk.__name__: walk
    for walk in (
        group_tokens,
        group_few_tokens,
        list_tiles,
        grouped_shrink,
        grouped_expand,
        grouped_shrink_few,
        grouped_expand_few,
        grouped_gradient,
        grouped_finish,
        multi_shrink,
        multi_expand,
    )
}
