"""`PluginManager`: pluggy's, plus who answered, and a refusal at registration for what pluggy lets pass."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Generic, TypeVar

import pluggy

from infinilm.native.libraries import BackendLibrary
from infinilm.plugins import registry
from infinilm.plugins.checks import check_hooks, did_you_mean
from infinilm.plugins.fingerprint import Entry, Fingerprint, digest_files
from infinilm.plugins.report import Origin, PluginRecord, Status
from infinilm_hookspecs import BackendRequest, PluginError, hookspecs
from infinilm_hookspecs.markers import PROJECT_NAME

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What a hook was answered, and the name of the plugin that answered."""

    value: T
    plugin: str


class HookNote(str):
    """The note an exception gains when it leaves a plugin."""

    __slots__ = ()


class PluginManager(pluggy.PluginManager):
    """pluggy's plugin manager for project `infinilm`. A plugin that is refused leaves nothing behind."""

    def __init__(self) -> None:
        super().__init__(PROJECT_NAME)
        self.add_hookspecs(hookspecs)
        self._records: dict[str, PluginRecord] = {}
        self._heard: list[list[Answer[Any]]] = []
        self._asking: list[str] = []
        self.is_tracing = False
        """Whether every call is printed to stderr: who was asked, who answered, and how long it took."""

    # ------------------------------------------------------------ registration

    def register(self, plugin: object, name: str | None = None, *, record: PluginRecord | None = None) -> str | None:
        """Register `plugin` and return its name.

        `record` says where it came from; without one it is the user's own object. Raises `PluginError` for a class, for
        an object without a single hook, and for a hook or an argument that infinilm does not have.
        """
        name = name or (record.name if record else None) or _name_of(plugin)
        check_hooks(plugin, name)
        record = record or PluginRecord(name, Status.ACTIVE, Origin.REGISTERED, reference=_reference_of(plugin))
        model_types = tuple(model_type.lower() for model_type in getattr(plugin, "model_types", ()))
        self._check_model_types(plugin, record, model_types)
        if self.has_plugin(name):
            raise PluginError(f"plugin {name!r} is refused: another plugin has this name; register it under another")
        try:
            super().register(plugin, name)
        except pluggy.PluginValidationError as err:
            raise PluginError(f"plugin {name!r} is refused: {err}") from err
        except ValueError as err:  # pluggy's text lists every plugin there is
            raise PluginError(f"plugin {name!r} is refused: this object is registered already") from err
        hooks = tuple(sorted(caller.name for caller in self.get_hookcallers(plugin) or ()))
        self.note(replace(record, name=name, status=Status.ACTIVE, hooks=hooks, model_types=model_types))
        self._attribute(plugin, name)
        return name

    def _check_model_types(self, plugin: object, record: PluginRecord, model_types: tuple[str, ...]) -> None:
        """Refuse a second claim of a model type, unless the user made it or the plugin says that it overrides."""
        overridden = getattr(plugin, "overrides", ())
        for other in self.records:
            taken = [t for t in model_types if t in other.model_types and other.status is Status.ACTIVE]
            outranked = record.origin.is_users_word and not other.origin.is_users_word
            if taken and other.name not in overridden and not outranked:
                raise PluginError(
                    f"plugin {record.describe()} is refused: model_type {taken[0]!r} belongs to plugin "
                    f"{other.describe()}; settle it with -p no:{other.name} or -p no:{record.name}"
                )

    def forget(self, name: str) -> None:
        """Unregister a plugin and remove its record."""
        self.unregister(name=name)
        del self._records[name]

    def fingerprint(self) -> Fingerprint:
        """Return what is active here, in order, with the digests of its files."""
        return Fingerprint(tuple(self._entry(r) for r in self.records if r.status is Status.ACTIVE))

    def _entry(self, record: PluginRecord) -> Entry:
        files = digest_files(self.get_plugin(record.name), record.module)
        origin = str(record.origin)
        return Entry(record.name, origin, record.distribution, record.version, record.reference, files)

    def explain_difference(self, other: Fingerprint) -> list[str]:
        """Return what differs between the plugins here and those of another manager, line by line."""
        return other.explain_difference(self.fingerprint())

    def note(self, record: PluginRecord) -> None:
        """Remember `record`, also of a plugin that is blocked or failed to load."""
        self._records[record.name] = record

    @property
    def records(self) -> list[PluginRecord]:
        """Every plugin there is, in the order they were loaded."""
        return list(self._records.values())

    def record(self, name: str) -> PluginRecord:
        """Return what is known of the plugin `name`."""
        return self._records[name]

    def failures(self) -> str:
        """Return a sentence naming the plugins that failed to load, with a leading space, or ""."""
        failed = [record.describe() for record in self.records if record.status is Status.FAILED]
        if not failed:
            return ""
        noun = "plugin" if len(failed) == 1 else "plugins"
        return f" {len(failed)} discovered {noun} failed to load: {', '.join(failed)}; run 'infinilm plugins list'."

    # ------------------------------------------------------------ asking

    def call(
        self, hook: str, /, *, exclude: Collection[str] = (), **arguments: object
    ) -> tuple[Any, list[Answer[Any]]]:
        """Call a hook without the plugins in `exclude`; return its result and what each plugin said, `None` too."""
        heard: list[Answer[Any]] = []
        self._heard.append(heard)
        started = time.perf_counter()
        try:
            caller = self.subset_hook_caller(hook, [self.get_plugin(name) for name in exclude])
            return caller(**arguments), heard
        finally:
            self._heard.pop()
            if self.is_tracing:
                print(_trace(hook, arguments, heard, time.perf_counter() - started), file=sys.stderr)

    def ask_first(self, hook: str, /, *, exclude: Collection[str] = (), **arguments: object) -> Answer[Any] | None:
        """Call a firstresult hook without the plugins in `exclude`; return the answer, or `None` if nobody had one."""
        value, heard = self.call(hook, exclude=exclude, **arguments)
        return None if value is None else next(answer for answer in heard if answer.value is value)

    def ask_all(self, hook: str, /, *, exclude: Collection[str] = (), **arguments: object) -> list[Answer[Any]]:
        """Call an exclusive hook without the plugins in `exclude`; return every claim."""
        values, heard = self.call(hook, exclude=exclude, **arguments)
        claims = [*heard, *(claim for answer in heard for claim in _spread(answer))]
        return [next(claim for claim in claims if claim.value is value) for value in values]

    def ask_one(self, hook: str, /, *, exclude: Collection[str] = (), **arguments: object) -> Answer[Any] | None:
        """Call an exclusive hook and settle on one claim, or `None` if there is none.

        Raises `PluginError` naming the plugins when more than one claim remains.
        """
        claims = self.ask_all(hook, exclude=exclude, **arguments)
        claims = [claim for claim in claims if self.record(claim.plugin).origin.is_users_word] or claims
        overridden = {name for claim in claims for name in getattr(self.get_plugin(claim.plugin), "overrides", ())}
        claims = [claim for claim in claims if claim.plugin not in overridden]
        if len(claims) > 1:
            names = " and ".join(self.record(claim.plugin).describe() for claim in claims)
            given = ", ".join(repr(value) for value in arguments.values())
            ways = " or ".join(f"-p no:{claim.plugin}" for claim in claims)
            raise PluginError(f"{hook}({given}) is claimed by plugins {names}; settle it with {ways}")
        return claims[0] if claims else None

    def others(self, name: str) -> set[str]:
        """Return the names of all plugins but `name`, to exclude. Raises `PluginError` for one that is not active."""
        names = {record.name for record in self.records if record.status is Status.ACTIVE}
        if name not in names:
            raise PluginError(f"there is no plugin {name!r}{did_you_mean(name, names)}.{self.failures()}")
        return names - {name}

    @property
    def asking(self) -> str | None:
        """The plugin whose hook is running now, or `None`."""
        return self._asking[-1] if self._asking else None

    # ------------------------------------------------------------ who answered

    def _attribute(self, plugin: object, name: str) -> None:
        """Have every hookimpl of `plugin` say that an answer, or an exception, is its own."""
        for caller in self.get_hookcallers(plugin) or ():
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin:
                    attributed = self._attributed_wrapper if impl.wrapper else self._attributed
                    # pluggy does not say who answered a firstresult hook, and asks the function it finds here
                    setattr(impl, "function", attributed(impl.function, name, caller.name))  # noqa: B010  # Final in stubs

    def _attributed(self, function: Callable[..., object], name: str, hook: str) -> Callable[..., object]:
        def answer(*arguments: object) -> object:
            self._asking.append(name)
            try:
                with self._blaming(name, hook), registry.running_hook():
                    value = function(*arguments)
                    if isinstance(value, BackendLibrary):  # provide_backend may answer with a library to ask
                        value = value.provide_backend(*_requests(arguments))
                    return self._hear(value, name)
            finally:
                self._asking.pop()

        return answer

    def _attributed_wrapper(
        self, function: Callable[..., Any], name: str, hook: str
    ) -> Callable[..., Generator[None, object, object]]:
        def answer(*arguments: object) -> Generator[None, object, object]:
            with self._blaming(name, hook):
                return self._hear((yield from function(*arguments)), name)

        return answer

    def _hear(self, value: object, name: str) -> object:
        if self._heard:
            self._heard[-1].append(Answer(value, name))
        return value

    @contextmanager
    def _blaming(self, name: str, hook: str) -> Iterator[None]:
        try:
            yield
        except Exception as err:
            if hook_note(err) is None:
                err.add_note(HookNote(f"in plugin {self.record(name).describe()}, hook {hook}"))
            raise


def _requests(arguments: Sequence[object]) -> list[BackendRequest]:
    return [argument for argument in arguments if isinstance(argument, BackendRequest)]


def hook_note(err: BaseException) -> HookNote | None:
    """Return the note that says which plugin's hook raised `err`, or `None` if none did."""
    notes = getattr(err, "__notes__", ())
    return next((note for note in notes if isinstance(note, HookNote)), None)


def _trace(hook: str, arguments: Mapping[str, object], heard: Sequence[Answer[Any]], seconds: float) -> str:
    """Return one call as a line. Wrappers answer last, whatever they answer."""
    given = ", ".join(f"{name}={_brief(value)}" for name, value in arguments.items())
    asked = ", ".join(dict.fromkeys(answer.plugin for answer in heard)) or "nobody"
    answered = ", ".join(dict.fromkeys(answer.plugin for answer in heard if answer.value is not None)) or "nobody"
    return f"infinilm: {hook}({given}): asked {asked}; answered {answered}; {seconds * 1e3:.2f} ms"


def _brief(value: object) -> str:
    if isinstance(value, Mapping) and "model_type" in value:
        return f"<{value['model_type']}>"
    return f"<{type(value).__name__}>" if not isinstance(value, str) else repr(value)


def wrong_answer(pm: PluginManager, answer: Answer[Any], hook: str, wanted: str) -> PluginError:
    """Return the error for an answer that is not what the hook returns."""
    plugin = pm.record(answer.plugin).describe()
    return PluginError(f"plugin {plugin} answered {hook} with {answer.value!r:.200}, and {wanted} is wanted")


def _spread(answer: Answer[Any]) -> list[Answer[Any]]:
    """Return what a wrapper answered, a list, as claims of its own."""
    if isinstance(answer.value, list):
        return [Answer(value, answer.plugin) for value in answer.value]
    return [answer]


def _reference_of(plugin: object) -> str | None:
    return plugin.__name__ if isinstance(plugin, ModuleType) else None


def _name_of(plugin: object) -> str:
    if isinstance(plugin, ModuleType):
        return plugin.__name__
    if isinstance(name := getattr(plugin, "plugin_name", None), str):
        return name
    kind = type(plugin)
    return f"{kind.__module__}.{kind.__qualname__}"
