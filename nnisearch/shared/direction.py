"""Which of its results a search's tuner takes for better: the least or the greatest."""

import ast
import sys
from pathlib import Path

ARGUMENT = "optimize_mode"
DIRECTIONS = ("minimize", "maximize")


def direction(params):
    """Return "minimize" or "maximize", given a configuration as NNI stores it (config.json()).

    It is the tuner's optimize_mode, and without one what its class does by default. Where that says
    nothing, as NNI's Random, it is "maximize", by which NNI's Web UI sorts then, too.
    """
    tuner = params.get("tuner") or params.get("advisor") or {}
    given = (tuner.get("classArgs") or {}).get(ARGUMENT)
    if given in DIRECTIONS:
        return given
    class_name = tuner.get("className")
    if tuner.get("name"):
        from nni.tools.package_utils import get_algo_meta  # takes a second, and is seldom needed

        algorithm = get_algo_meta(tuner["name"])
        class_name = algorithm and algorithm.class_name
    folders = [folder for folder in (tuner.get("codeDirectory"), *sys.path) if folder]
    module, _, name = (class_name or "").rpartition(".")
    return default_of(name, module, folders, set()) or "maximize"


def default_of(name, module, folders, seen):
    """Return the direction that a class has by default, of its own or inherited, or None.

    name may be dotted, as seen from the module. It is read from the source: whose class it is, its
    module is not to be imported into this process, and NNI's own may need packages not installed.
    """
    path = source_of(module, folders)
    if path is None or (name, path) in seen:
        return None
    seen.add((name, path))
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            if found := own_default(node):
                return found
            bases = [default_of(ast.unparse(base), module, folders, seen) for base in node.bases]
            return next(filter(None, bases), None)
        for bound, target in imported(node, module, path):
            if name == bound or name.startswith(f"{bound}."):
                where, _, what = (target + name[len(bound) :]).rpartition(".")
                return default_of(what, where, folders, seen)
    return None


def source_of(module, folders):
    """Return the path of a module's source, or None."""
    for folder in folders if module else []:
        place = Path(folder, *module.split("."))
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None


def imported(node, module, path):
    """Return [(name here, dotted name there), ...] of what a statement imports."""
    if isinstance(node, ast.Import):
        return [(alias.asname or alias.name, alias.name) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    there = node.module or ""
    if node.level:  # relative to the package, which an __init__.py is itself
        package = module.split(".")
        package = package[: len(package) - node.level + (path.name == "__init__.py")]
        there = ".".join([*package, *filter(None, [node.module])])
    return [(alias.asname or alias.name, f"{there}.{alias.name}") for alias in node.names]


def own_default(node):
    """Return the direction that a class's __init__ takes or hands on by default, or None."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == "__init__":
            given = method.args
            positional = [*given.posonlyargs, *given.args][-len(given.defaults) or None :]
            pairs = [*zip(positional, given.defaults, strict=False)]
            pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
            calls = [call for call in ast.walk(method) if isinstance(call, ast.Call)]
            handed_on = [(word, word.value) for call in calls for word in call.keywords]
            values = [value for argument, value in [*pairs, *handed_on] if argument.arg == ARGUMENT]
            # "minimize" or OptimizeMode.Minimize
            names = [str(getattr(v, "value", "")) for v in values if isinstance(v, ast.Constant)]
            names += [v.attr.lower() for v in values if isinstance(v, ast.Attribute)]
            return next((name for name in names if name in DIRECTIONS), None)
    return None
