"""The traffic part of a file of `serve`: checked against the variants that it has."""

from pathlib import Path

from vllm_rvec.router import Routing, load_routing
from vllm_rvec.serve import ServeConfig

__all__ = ["routing_of"]


def routing_of(
    settings: ServeConfig, path: Path | None, *, is_dial: bool = True, insecure: bool = False
) -> Routing:
    """Read what stands under `routing`.

    Args:
        settings: The whole file, checked.
        path: The file, from whose folder relative paths are taken.
        is_dial: Whether names such as `enhanced@0.35` are answered, too.
        insecure: `--insecure` of the command line.

    Raises:
        ConfigError: Some of it is wrong; all problems at once.
    """
    values = {**settings.routing, **({"insecure": True} if insecure else {})}
    folder = Path() if path is None else path.parent
    dial = settings.dial if is_dial else None
    return load_routing(values, folder, list(settings.variants), dial)
