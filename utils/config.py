"""From a command line to checked settings.

Every entry point is a function of a composed Hydra configuration, wrapped by `entry_point`. What a user can get wrong
(an unknown key, a missing file, a value of the wrong type) becomes one `UserError`: one line on standard error and exit
status 2, before any work starts. Everything else keeps its traceback, because it is our mistake.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib
import inspect
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from tqdm import tqdm

from utils import distributed
from utils.errors import UserError as UserError  # stands here for everybody else
from utils.logging import setup_logging

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

# Keys that the READMEs of the published projects spell wrongly, each with the key that works.
KNOWN_TYPOS = {"VQDncoder_path": "VQDecoder_path", "sample_root": "samples_root"}
# Keys of this project that have another name now, where the new one is there
RENAMED = {"backbone": "embedder"}

T = TypeVar("T")


def sweep_folder(number: int, overrides: str) -> str:
    """The subfolder of job `number` of a sweep, named by its overrides (`a=1,b=2`) but for those that hold paths."""
    return "_".join([str(number), *(o for o in overrides.split(",") if o and "/" not in o and len(o) < 60)])


OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)


def entry_point(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `main(cfg)` a command: compose `configs/<config_name>.yaml` with the command line, run, exit.

    The wrapped function sets up logging and torch.distributed (when started by torchrun) before `main` and takes them
    down after it. `cfg.output_dir`, where the configuration has that key, is the run folder: the one that the user
    gave, or under `-m` the subfolder of this job. Exit status: 0, 2 for a user's mistake, 130 for Ctrl-C.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        mistakes: list[UserError | OmegaConfBaseException] = []
        home = os.getpid()
        started: list[bool] = []  # not empty once `main` runs: file errors before that are about the run folder

        @functools.wraps(main)
        def task(cfg: DictConfig) -> Any:
            try:
                return run(cfg)
            except (UserError, OmegaConfBaseException) as error:
                if os.getpid() != home:
                    raise  # in a job on another machine: its launcher brings the error home
                mistakes.append(error)  # raised below: Hydra would print lines of its own around it

        def run(cfg: DictConfig) -> Any:
            if "output_dir" in cfg and HydraConfig.initialized():
                cfg.output_dir = HydraConfig.get().runtime.output_dir
            if HydraConfig.initialized():  # an experiment's file may bring sections that nothing reads
                check_keys(cfg, _sections(config_name), "")
            distributed.init()
            setup_logging(cfg.get("output_dir"))
            started.append(True)
            return main(cfg)

        @functools.wraps(main)
        def launch() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
            mistakes.clear()  # those of an earlier call in this process
            started.clear()
            try:
                hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(task)()
                if mistakes:
                    raise mistakes[0]
            except UserError as error:
                _fail(str(error))
            except (HydraException, OmegaConfBaseException) as error:
                _fail(_describe_composition_error(error, config_name))
            except OSError as error:
                if started:
                    raise
                _fail(f"output_dir: cannot write {error.filename} ({error.strerror}); give another one")
            except KeyboardInterrupt:
                sys.exit(130)
            finally:
                distributed.cleanup()

        return launch

    return decorate


class CommandLineParser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are UserErrors, as everywhere; its description keeps its lines."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help shows how it is called")


def command_line(main: Callable[[], int]) -> None:
    """Run a command that has no Hydra configuration. Exit status: what `main` returns, 2 for a user's mistake (one line
    on standard error, as everywhere), 130 for Ctrl-C."""
    try:
        status = main()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status)


def differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """The dotted keys in which two plain configurations differ, but for the run folder."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() | new.keys():
            if name != "output_dir":
                yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key


def _fail(message: str) -> None:
    """Print one line and leave with status 2."""
    if distributed.rank() != 0:
        time.sleep(3)  # rank 0 reports a mistake that all ranks share; torchrun then ends this one before it speaks
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # the message gets a line of its own
    if "Original Traceback" in message:  # a worker of a DataLoader found the mistake
        message = message.rpartition("UserError: ")[2]
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.stderr.flush()
    if distributed.world_size() > 1:
        os._exit(2)  # other ranks may wait in a collective, where a clean-up would wait with them
    sys.exit(2)


def _describe_composition_error(error: Exception, config_name: str) -> str:
    """One line for an error of Hydra or OmegaConf: the key, what is wrong with it and the nearest key that exists."""
    cause = error.__cause__ if error.__cause__ is not None else error
    key = getattr(cause, "full_key", None)
    text = str(error).split("\nTo append")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("set_struct")]
    if "Missing mandatory value: " in str(error):
        key = str(error).split("Missing mandatory value: ")[1].split()[0]
        return f"{key}: not set; give {key}=VALUE on the command line"
    if "Could not override" in text and key:
        return f"{key}: unknown key{_suggestion(key, _known_keys(config_name))}"
    if "Could not load 'hydra/launcher/submitit" in text:
        return "hydra/launcher: not installed; pip install hydra-submitit-launcher brings the launchers for Slurm"
    if group := re.match(r"Could not override '([\w./]+)'", text):
        return f"{group[1]}: unknown key{_suggestion(group[1], _known_keys(config_name))}"
    if "Available options" in text:
        head, _, options = " ".join(lines).partition("Available options in")
        group, _, names = options.partition(":")
        return f"{head.strip()}; {group.strip()} can be {', '.join(names.split('Config search path')[0].split())}"
    return "; ".join(line for line in lines if not line.startswith(("full_key:", "object_type=")))


def compose(config_name: str, overrides: Sequence[str], key: str) -> DictConfig:
    """`configs/<config_name>.yaml` with these overrides, as the entry point gets it; nothing is run.

    Raises UserError where they do not compose; the message begins with `key`, the setting that they come from.
    """
    try:
        return _compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{key}: {_describe_composition_error(error, config_name)}") from error


def _compose(config_name: str, overrides: Sequence[str] = (), *, with_hydra: bool = False) -> DictConfig:
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return hydra.compose(config_name, list(overrides), return_hydra_config=with_hydra)
    finally:
        GlobalHydra.instance().hydra = running


def _sections(config_name: str) -> list[str]:
    """The keys at the top of the configuration without any override, and the groups of which it chooses none."""
    cfg = _compose(config_name, with_hydra=True)
    return [*(key for key in cfg if key != "hydra"), *(g for g, c in cfg.hydra.runtime.choices.items() if c is None)]


def _known_keys(config_name: str) -> list[str]:
    """All dotted keys of the configuration as it is without any override."""
    cfg = _compose(config_name)
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for name in node:
            keys.append(prefix + str(name))
            child = node._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                walk(child, f"{prefix}{name}.")

    walk(cfg, "")
    return keys


def _suggestion(key: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest known key, or the known keys of the same section."""
    known = list(known)
    if key in known:  # of the defaults
        return "; the chosen config groups do not have it"
    section, _, name = key.rpartition(".")
    if name in KNOWN_TYPOS:
        return f"; the key is {section + '.' if section else ''}{KNOWN_TYPOS[name]}"
    if RENAMED.get(name) in known:
        return f"; the key is {RENAMED[name]}"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    same_name = [k for k in known if k.rpartition(".")[2] == name]
    if close or same_name:
        return f"; did you mean {(same_name or close)[0]}?"
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    return f"; there are {', '.join(siblings)}" if siblings else ""


def check_keys(node: Mapping[str, Any], allowed: Iterable[str], key: str) -> None:
    """Raise UserError when `node`, the section named `key`, holds a key that is not in `allowed`."""
    allowed = list(allowed)
    for name in node:
        if name not in allowed:
            raise UserError(
                f"{_join(key, name)}: unknown key{_suggestion(_join(key, name), [_join(key, a) for a in allowed])}"
            )


def settings(node: Any, cls: type[T], key: str) -> T:
    """The section named `key` as an instance of the dataclass `cls`.

    Types are those of the dataclass's annotations (OmegaConf's rules: "3" is an int, "abc" is not).
    Raises UserError for an unknown key, a value of another type, or a `???` that nobody filled.
    """
    if node is None:
        raise UserError(f"{key}: the section is missing; it takes {', '.join(f.name for f in dataclasses.fields(cls))}")
    if not isinstance(node, Mapping | DictConfig):
        names = ", ".join(field.name for field in dataclasses.fields(cls))
        raise UserError(f"{key}: {node!r}; keys with values are wanted: {names}")
    node = node if OmegaConf.is_config(node) else OmegaConf.create(dict(node))
    check_keys(node, [field.name for field in dataclasses.fields(cls)], key)
    schema = OmegaConf.structured(cls)
    for name in node:
        if OmegaConf.is_missing(node, name):
            raise UserError(f"{_join(key, name)}: not set; give {_join(key, name)}=VALUE on the command line")
        try:
            schema = OmegaConf.merge(schema, {name: node[name]})
        except OmegaConfBaseException as error:
            if OmegaConf.is_list(schema._get_node(name)) and not OmegaConf.is_list(node[name]):
                raise UserError(f"{_join(key, name)}: {node[name]}; a list is wanted, as in [{node[name]}]") from error
            raise UserError(f"{_join(key, name)}: {str(error).splitlines()[0]}") from error
    try:
        return OmegaConf.to_object(schema)
    except MissingMandatoryValue as error:
        raise UserError(f"{_join(key, str(error.full_key))}: not set") from error


def instantiate(node: Any, key: str, **kwargs: Any) -> Any:
    """Build what the section named `key` describes by its `_target_`, with `kwargs` on top.

    `_partial_: true` gives a functools.partial. Unlike hydra.utils.instantiate, an argument that the target does not
    take is a UserError that names the key, before anything is built.
    """
    if node is None or "_target_" not in node:
        raise UserError(f"{key}: has no _target_; choose one of the files in configs/{key.replace('.', '/')}")
    target = _locate(node["_target_"], key)
    arguments = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)
    arguments = {name: value for name, value in arguments.items() if name not in ("_target_", "_partial_", "_convert_")}
    for name, value in arguments.items():
        if value == "???":
            raise UserError(f"{_join(key, name)}: not set; give {_join(key, name)}=VALUE on the command line")
    signature = inspect.signature(target)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    if not takes_any:
        check_keys(arguments, signature.parameters, key)
    merged = {**arguments, **kwargs}
    if node.get("_partial_", False):
        return functools.partial(target, **merged)
    needed = [
        name
        for name, p in signature.parameters.items()
        if p.default is inspect.Parameter.empty
        and p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and name not in merged
    ]
    if needed:
        raise UserError(f"{_join(key, needed[0])}: not set; {node['_target_']} needs it")
    return target(**merged)


def _locate(path: str, key: str) -> Any:
    module_name, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}._target_: cannot import {path} ({error})") from error


def existing_file(path: str | os.PathLike | None, key: str, hint: str = "") -> Path:
    """`path` as a Path; UserError when it is not set or no such file exists. `hint` says what would be right."""
    return _existing(path, key, hint, "file", Path.is_file)


def existing_folder(path: str | os.PathLike | None, key: str, hint: str = "") -> Path:
    """`path` as a Path; UserError when it is not set or no such folder exists. `hint` says what would be right."""
    return _existing(path, key, hint, "folder", Path.is_dir)


def _existing(path: str | os.PathLike | None, key: str, hint: str, kind: str, test: Callable[[Path], bool]) -> Path:
    tail = f"; {hint}" if hint else ""
    if path is None or str(path) in ("", "???"):
        raise UserError(f"{key}: not set; give {key}=PATH of a {kind}{tail}")
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{key}: {path}; the path of a {kind} is wanted{tail}")
    path = Path(path).expanduser()
    if not test(path):
        raise UserError(f"{key}: no such {kind}: {path}{tail}")
    return path


def check_writable(path: str | os.PathLike, key: str) -> None:
    """UserError unless `path`, a file or folder to be written, and its folders can be made; nothing is made yet."""
    path = Path(path).expanduser()
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "no permission" if there.is_dir() else f"{there} is a file"
        raise UserError(f"{key}: cannot write {path} ({reason}); give another place")


def plain(node: Any) -> Any:
    """A configuration as plain dictionaries, lists and values with every interpolation resolved (for checkpoints)."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
