"""Sex as the field records it for bone age: a closed type with one parser and no default.

Bone age atlases and every data set this package reads know two reference populations. A model that uses sex is wrong
by many months when it is given the other one, so nothing here guesses: anything but the two exact strings is an error.
"""

from typing import Literal, get_args

from .errors import InputError

Sex = Literal["female", "male"]

#: Both values in the order of their index: ``ClassLabel`` of the data set, embedding rows of the model.
SEXES: tuple[Sex, ...] = get_args(Sex)

#: ``{"female": 0, "male": 1}``
SEX_INDEX: dict[Sex, int] = {sex: index for index, sex in enumerate(SEXES)}


def parse_sex(value: object) -> Sex:
    """Return ``value`` if it is exactly ``"female"`` or ``"male"``.

    Raises:
        InputError: for everything else, including ``None``, ``"F"``, ``"Male"`` and ``0``.
    """
    if value == "female":
        return "female"
    if value == "male":
        return "male"
    raise InputError(f'sex must be exactly "female" or "male", not {value!r}; it is never guessed.')
