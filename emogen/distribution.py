"""The installed package: its name on PyPI, its version, and the libraries of its extras."""

from importlib import metadata

NAME = "emogen-toolkit"  # the name `emogen` on PyPI belongs to somebody else's package
__version__ = "0.2.0"


def install_hint(extra: str) -> str:
    """The command that installs the libraries of an extra, such as `pip install 'gradio>=6.20,<7'`.

    The libraries and their versions are read from the metadata of the installed package.
    """
    from packaging.requirements import Requirement  # every command imports this file

    libraries = []
    for requirement in map(Requirement, metadata.requires(NAME) or ()):
        needed_by = requirement.marker
        if needed_by and needed_by.evaluate({"extra": extra}) and not needed_by.evaluate({"extra": ""}):
            versions = ",".join(sorted(map(str, requirement.specifier), reverse=True))  # the lower bound first
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            libraries.append(f"'{requirement.name}{extras}{versions}'")
    return f"pip install {' '.join(libraries)}"
