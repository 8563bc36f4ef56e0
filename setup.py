"""What pyproject.toml cannot say: where the packages lie, and the C++ extension."""

from glob import glob

from setuptools import Extension, setup

try:
    import pybind11
except ImportError:  # `python setup.py --version` and the like outside a build environment
    EXTENSIONS = []
else:
    EXTENSIONS = [
        Extension(
            "elo_engine._csrc",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h*")),
            include_dirs=[pybind11.get_include()],
            # -g0: Python's own flags ask for debugging information, which takes as long to write as all the rest.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fopenmp", "-pthread", "-fvisibility=hidden"],
            extra_link_args=["-fopenmp", "-pthread"],
            language="c++",
            # Everything in it has a Python twin: without a compiler the install goes on, slower.
            optional=True,
        )
    ]

setup(
    # One by one: find_packages() would take the top-level kernels/ for a package of that name, which would hide the
    # one from PyPI that transformers looks for (kernels/README.md).
    packages=[
        "elo_engine",
        "elo_engine.checkpoint",
        "elo_engine.data",
        "elo_engine.benchmarks",
        "elo_engine.kernels",
        "elo_engine.measure",
        "elo_engine.model",
        "elo_engine.model.ops",
        "elo_engine.stream",
        "elo_engine.train",
    ],
    package_dir={"elo_engine.benchmarks": "benchmarks", "elo_engine.kernels": "kernels"},
    ext_modules=[extension for extension in EXTENSIONS if extension.sources],
)
