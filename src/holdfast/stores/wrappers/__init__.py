"""Stores around a store: each changes one thing and passes the rest on."""

from holdfast.stores.wrappers.cache import Cached
from holdfast.stores.wrappers.delegating import Delegating
from holdfast.stores.wrappers.prefix import Prefixed, url_below
from holdfast.stores.wrappers.retry import Retrying
from holdfast.stores.wrappers.throttle import Throttled

__all__ = ["Cached", "Delegating", "Prefixed", "Retrying", "Throttled", "url_below"]
