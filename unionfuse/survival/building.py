"""How setuptools builds the programs in C beside the modules (pyproject.toml names this class).

It is not imported when unionfuse runs.
"""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_ext import build_ext

PROGRAMS = {
    "unionfuse/survival/unionfuse-keeper": ["unionfuse/survival/keeper.c"],
    "tools/unionimage/container/unionfuse-waiter": ["tools/unionimage/container/waiter.c"],
}


class BuildPrograms(build_ext):  # type: ignore[misc]
    """Compiles the extension modules, and then the programs."""

    def run(self) -> None:
        super().run()
        compiler = self.compiler  # made by the parent's run
        for program, sources in PROGRAMS.items():
            built = self._place(program)
            built.parent.mkdir(parents=True, exist_ok=True)
            objects = compiler.compile(
                sources, output_dir=self.build_temp, extra_postargs=["-O2", "-g0", "-Wall"]
            )
            compiler.link_executable(objects, str(built))

    def _place(self, program: str) -> Path:
        if self.inplace:
            return Path(program)
        return Path(self.build_lib, program.removeprefix("tools/"))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(one for of in PROGRAMS.values() for one in of)]

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *(str(self._place(program)) for program in PROGRAMS)]
