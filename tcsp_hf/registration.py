"""Registers the compressed architectures with transformers' Auto classes, without importing them.

`import transformers` is cheap because its modules, PyTorch too, are loaded when they are first needed; so is
`import tcsp_hf`. An entry of an Auto mapping needs the configuration class, and that needs PyTorch: registration waits
until transformers' own mappings are imported (at once, if they are), and the modeling files until a class is asked for.
"""

import importlib
import sys
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto"
_FAMILIES = {
    "configuration_tcsp_bert": ("TCSPBertConfig", "BertTokenizer"),
    "configuration_tcsp_t5": ("TCSPT5Config", "T5Tokenizer"),
}
"""Configuration file -> configuration class, and transformers' tokenizer."""

_CHOICES = {"modeling_tcsp_t5.TCSPT5Model": ("TCSPT5Model", "TCSPT5EncoderModel")}
"""Several classes let the checkpoint's own `architectures` choose: an encoder-only T5 has no decoder to load."""


@dataclass(frozen=True)
class _Later:
    """Model classes that are not imported yet."""

    module: str
    names: tuple[str, ...]

    def load(self) -> Any:
        module = importlib.import_module(f".{self.module}", __package__)
        classes = tuple(getattr(module, name) for name in self.names)
        return classes if len(classes) > 1 else classes[0]


class _LazyClasses(UserDict[Any, Any]):
    """What was registered in an Auto mapping; a class of ours is imported when it is read."""

    def __getitem__(self, key: Any) -> Any:
        value = self.data[key]
        if isinstance(value, _Later):
            value = self.data[key] = value.load()
        return value


def _configurations() -> dict[str, tuple[Any, ModuleType]]:
    """Name of the tokenizer -> configuration class and its module."""
    found = {}
    for file, (name, tokenizer) in _FAMILIES.items():
        module = importlib.import_module(f".{file}", __package__)
        found[tokenizer] = (getattr(module, name), module)
    return found


def _register_configurations(auto: Any) -> None:
    for config_class, _ in _configurations().values():
        auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_tokenizers(auto: Any) -> None:
    import transformers

    for tokenizer, (config_class, _) in _configurations().items():
        auto.AutoTokenizer.register(config_class, fast_tokenizer_class=getattr(transformers, tokenizer), exist_ok=True)


def _register_models(auto: Any) -> None:
    for config_class, module in _configurations().values():
        for auto_name, target in module.AUTO_MAP.items():
            if auto_name == "AutoConfig":
                continue
            file, name = target.split(".")
            mapping = getattr(auto, auto_name)._model_mapping
            if config_class in mapping:
                continue
            entry = _Later(file, _CHOICES.get(target, (name,)))
            # `register` would only add to this dictionary, but from classes that are imported already
            registered = getattr(mapping, "_extra_content", None)
            if isinstance(registered, (dict, _LazyClasses)):
                if not isinstance(registered, _LazyClasses):
                    mapping._extra_content = registered = _LazyClasses(registered)
                registered[config_class] = entry
            else:
                mapping.register(config_class, entry.load(), exist_ok=True)


def _push(model: Any, repo_id: str, **options: Any) -> str:
    from .publish.push import push_model  # not needed to load or to save

    return push_model(model, repo_id, **options)


def _set_publisher(modeling: Any) -> None:
    modeling.TCSPPreTrainedMixin.publisher = _push


_ACTIONS: dict[str, Callable[[Any], None]] = {
    f"{_AUTO}.configuration_auto": _register_configurations,
    f"{_AUTO}.tokenization_auto": _register_tokenizers,
    f"{_AUTO}.modeling_auto": _register_models,
    f"{__package__}.modeling_tcsp": _set_publisher,
}


class _AfterImport:
    """A finder that finds nothing by itself: it adds an action to the loading of the modules it knows."""

    def __init__(self, actions: Mapping[str, Callable[[Any], None]]) -> None:
        self.actions = dict(actions)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = self.actions.get(name)
        if action is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        loader: Any = spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                action(module)

            loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Idempotent: a second call changes nothing."""
    waiting = {}
    for name, action in _ACTIONS.items():
        module = sys.modules.get(name)
        if module is None or getattr(module.__spec__, "_initializing", False):
            waiting[name] = action
        else:
            action(module)
    if waiting and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(waiting))
