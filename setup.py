"""Builds the native libraries ahead of time where torch can be imported; else pure Python.

`pip wheel --no-build-isolation .` makes a wheel for machines with this operating system and CPU
type. If nvcc is found, it is for NVIDIA cards too, whether this machine has one or not, and
whichever torch is installed. A plain `pip install .` builds in an environment without torch; then
the first start compiles for its machine (pyserve/ops/build.py).
"""

import dataclasses
import importlib.util
import json
import logging
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "cuda"


def load(name):
    """Import pyserve/ops/NAME.py by its path, as pyserve's dependencies may not be installed."""
    full_name = f"pyserve.ops.{name}"
    path = ROOT / "pyserve" / "ops" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(full_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module  # dataclasses, and imports from `module`, look it up there
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Compiles with the same code, flags and ninja file as a first start would."""

    def run(self):
        def say(line):
            self.announce(f"native: {line}", level=logging.INFO)

        march = toolchain.portable_march()
        native = toolchain.find_toolchain(os.environ.get("CXX"), march=march)
        try:
            cuda = nvcc.find_cuda_compiler(os.environ)
        except nvcc.NoCudaCompilerError as error:
            cuda = None
            say(f"{error}: building without CUDA")
        except nvcc.CompileError as error:
            remedy = f"or build without CUDA: {nvcc.ARCHS_VARIABLE}=none"
            raise SystemExit(f"{error}; {remedy}") from error
        native = dataclasses.replace(native, cuda=cuda)
        told = set()

        def tell(done, total):
            if total and done not in told:  # `progress` is also called when nothing has changed
                told.add(done)
                say(f"{done} of {total}")

        build_dir = Path(self.build_temp).resolve() / "native"
        toolchain.compile_products(
            SOURCES,
            build_dir,
            native,
            progress=tell,
            env=os.environ,
        )
        manifest = {
            "sources": toolchain.source_hash(SOURCES, has_cuda=cuda is not None),
            "soabi": sysconfig.get_config_var("SOABI"),
            "march": march,
            "cuda": None if cuda is None else {"version": cuda.version, "archs": cuda.archs},
            "sizes": {
                name: (build_dir / name).stat().st_size
                for name in (toolchain.OPS_PRODUCT, toolchain.HOST_PRODUCT)
            },
        }
        (build_dir / "native.json").write_text(json.dumps(manifest), encoding="utf-8")
        for output in self.get_outputs():
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(build_dir / Path(output).name, output)

    def get_outputs(self):
        base = ROOT if self.inplace else Path(self.build_lib)
        names = (toolchain.OPS_PRODUCT, toolchain.HOST_PRODUCT, "native.json")
        return [str(base / "pyserve" / "ops" / name) for name in names]

    def get_output_mapping(self):
        return {}


has_torch = importlib.util.find_spec("torch") is not None
if has_torch:
    nvcc, toolchain = load("nvcc"), load("toolchain")
setup(
    ext_modules=[Extension("pyserve.ops._host", [])] if has_torch else [],
    cmdclass={"build_ext": BuildNative},
)
