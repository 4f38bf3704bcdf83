"""Variants whose engines run elsewhere: the table that `vllm-rvec route` works with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_rvec.router.variants import VariantFacts, VariantTable

if TYPE_CHECKING:
    from vllm_rvec.router.config import RouteConfig, RoutedVariant, UpstreamConfig
    from vllm_rvec.router.upstreams import Upstream

__all__ = ["make_table", "update_table", "upstreams_of"]


def make_table(config: RouteConfig) -> VariantTable:
    """The variants of a configuration, all taken to be ready: requests and checks tell.

    Raises:
        ConfigError: The key of an engine is not in the environment.
    """
    table = VariantTable(list(config.variants), config.made_dial())
    _fill(table, config, upstreams_of(config))
    return table


def update_table(
    table: VariantTable, config: RouteConfig, upstreams: dict[str, list[Upstream]]
) -> None:
    """Have a table follow another configuration; what stays the same is not disturbed.

    Args:
        table: From `make_table`.
        config: The new one.
        upstreams: From `upstreams_of`, which may fail; this does not.
    """
    table.reconfigure(list(config.variants), config.made_dial())
    _fill(table, config, upstreams)


def upstreams_of(config: RouteConfig) -> dict[str, list[Upstream]]:
    """Every variant's upstreams, with their keys.

    Raises:
        ConfigError: The key of one is not in the environment.
    """
    return {
        name: [upstream.upstream() for upstream in _configured(config, variant)]
        for name, variant in config.variants.items()
    }


def _fill(table: VariantTable, config: RouteConfig, upstreams: dict[str, list[Upstream]]) -> None:
    dial = table.dial
    for name, variant in config.variants.items():
        alpha = variant.alpha
        if variant.upstreams is None and dial is not None:
            alpha = dial.plain(dial.variants[name])
        table.describe(name, VariantFacts(alpha, variant.vector, fingerprint=variant.fingerprint))
        table.set_ready(name, *upstreams[name])


def _configured(config: RouteConfig, variant: RoutedVariant) -> list[UpstreamConfig]:
    if variant.upstreams is not None:
        return variant.upstreams
    return [] if config.dial is None else config.dial.upstreams
