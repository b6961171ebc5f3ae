"""The windows of PyTorch's adaptive pools, as constants of a graph."""

import numpy as np


def windows(side: int, target: int) -> list[tuple[int, int]]:
    """Return the first row and the row after the last of each window of PyTorch's adaptive pools."""
    return [(i * side // target, -(-(i + 1) * side // target)) for i in range(target)]


def averaging_matrix(side: int, target: int) -> np.ndarray:
    """Return the matrix (target, side) in float32 whose product with rows is their average in each window."""
    matrix = np.zeros((target, side), np.float32)
    for row, (first, after) in zip(matrix, windows(side, target), strict=True):
        row[first:after] = 1 / (after - first)
    return matrix


def window_rows(side: int, target: int) -> tuple[np.ndarray, int]:
    """Return the rows of all windows, one after the other, and their length: shorter windows repeat their last row."""
    longest = max(after - first for first, after in windows(side, target))
    rows = [min(first + i, after - 1) for first, after in windows(side, target) for i in range(longest)]
    return np.array(rows, np.int64), longest
