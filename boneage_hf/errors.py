"""The one exception whose message is meant for the person who made the mistake."""


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that says what is wrong and how to put it right.

    Command line, Space and pipeline show the message as it stands. It never holds what a DICOM header or a file
    name says about a person.
    """
