"""A model that does nothing: what remains is the server."""


def echo(inputs: list[str]) -> list[str]:
    return inputs


def size(inputs: list[bytes]) -> list[int]:
    return [len(content) for content in inputs]
