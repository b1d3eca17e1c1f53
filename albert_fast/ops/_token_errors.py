"""The errors for ids outside their tables, whether they are found at once or reported late by a GPU."""

from __future__ import annotations

from torch import Tensor

from . import _reports

TABLES = ("input_ids", "token_type_ids", "position_ids")


class TokenIndexError(IndexError):
    """An id outside its table: the table's name and size, the packed token and the id's value; `where` says it to the user."""

    def __init__(self, table: str, token: int, value: int, size: int, where: str):
        self.table, self.token, self.value, self.size = table, token, value, size
        found = f"is {value}, outside its table of {size} rows (0 to {size - 1})"
        if 0 <= value < size:  # a GPU reports late
            found = f"was outside its table of {size} rows (0 to {size - 1}), and has been written again since"
        super().__init__(f"{table}[{where}] {found}")


def check_ids(ids: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    """Raise TokenIndexError for the first id outside its table. Ids of None (inputs_embeds were given) are skipped."""
    for table, (values, size) in enumerate(zip(ids, sizes, strict=True)):
        bad = None if values is None else ((values < 0) | (values >= size)).nonzero()
        if bad is not None and len(bad):
            raise index_error(ids, sizes)(int(bad[0]) * len(TABLES) + table)


def index_error(ids: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> _reports.Describe:
    """A function that makes this call's error from a kernel's code, token * 3 + table."""
    where = _reports.current_place()

    def describe(code: int) -> TokenIndexError:
        token, table = divmod(code, len(TABLES))
        value = int(ids[table][token])  # type: ignore[index]
        return TokenIndexError(TABLES[table], token, value, sizes[table], where(token))

    return describe
