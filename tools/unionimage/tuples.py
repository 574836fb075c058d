"""`NamedTuple` as typing has it, made without compiling code for each class.

Typing's own costs half a millisecond a class, and a command makes up to sixty of them when it
starts. This one has the same methods; what makes a value is Python instead of generated code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["NamedTuple"]

if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from _collections import _tuplegetter

    class _Maker(type):
        def __new__(maker, name, bases, namespace):
            fields = tuple(namespace.get("__annotations__", ()))
            if not fields:  # a subclass of one, with more methods
                return super().__new__(maker, name, bases, namespace)
            defaults = {field: namespace[field] for field in fields if field in namespace}
            for position, field in enumerate(fields):
                namespace[field] = _tuplegetter(position, None)
            namespace.setdefault("__slots__", ())
            namespace |= {"_fields": fields, "_field_defaults": defaults}
            return super().__new__(maker, name, bases, namespace | {"__match_args__": fields})

    class NamedTuple(tuple, metaclass=_Maker):
        __slots__ = ()
        _fields = ()

        def __new__(cls, *values: Any, **named: Any):
            fields = cls._fields
            if named or len(values) != len(fields):
                left = fields[len(values) :]
                given = {**cls._field_defaults, **named}
                try:
                    values += tuple([given[field] for field in left])
                except KeyError as error:
                    raise TypeError(f"{cls.__name__} lacks {error.args[0]!r}") from None
                if len(values) > len(fields) or not named.keys() <= set(left):
                    raise TypeError(f"{cls.__name__} has only {', '.join(fields)}, each once")
            return tuple.__new__(cls, values)

        @classmethod
        def _make(cls, values):
            return cls(*values)

        def _replace(self, **changes):
            return type(self)(**{**self._asdict(), **changes})

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def __getnewargs__(self):
            return tuple(self)

        def __repr__(self):
            shown = ", ".join(f"{field}={value!r}" for field, value in self._asdict().items())
            return f"{type(self).__name__}({shown})"
